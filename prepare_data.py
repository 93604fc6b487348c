"""Turn any text source into token shards that pretrain_gpt.py reads.

    python prepare_data.py --source=embedded --tokenizer=train --vocab_size=4096 --out_dir=data/embedded
    python prepare_data.py --max_tokens=1e9               # FineWeb-Edu, streamed, SmolLM2's tokenizer
    python prepare_data.py --source=texts/,more.jsonl.zst --tokenizer=gpt2 --out_dir=data/mine

Documents are read in order, tokenized on all cores and appended to shards; memory use does not grow with the
source. A stopped run, started again with the same command, continues where it was and ends with the same
bytes.
"""

import itertools
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import InputError, read_json, run_script, write_json
from data import ShardWriter, verified_manifest
from sources import column_of, hash_fraction, source_files, source_rows
from tokenization import END, encode, load_tokenizer, tokenizer_fingerprint, train_tokenizer, vocabulary_size

BATCH_DOCUMENTS = 256  # tokenized together
SAVE_EVERY = 20_000_000  # tokens between two places to continue from
TOKENIZER_BYTES = 200_000_000  # of text, from the beginning, that --tokenizer=train learns from


@dataclass
class Config:
    source: str = "HuggingFaceFW/fineweb-edu"  # embedded, a hub dataset's id, or files and folders: a,b
    config: str = "sample-10BT"  # the hub dataset's configuration; empty for its default
    split: str = "train"  # the hub dataset's split
    column: str = "text"  # the column or JSON key with the text
    tokenizer: str = "HuggingFaceTB/SmolLM2-135M"  # hub id or directory; train makes a new one
    vocab_size: int = 4096  # ids of a tokenizer to train
    out_dir: str = "data/fineweb-edu"  # folder for the shards
    max_tokens: int = 0  # stop after the document that reaches so many tokens; 0 reads all
    val_fraction: float = 0.005  # share of the documents that go to validation, chosen by a hash of the text
    shard_tokens: int = 100_000_000  # tokens in a shard
    workers: int = 0  # tokenizing threads; 0 for one a core


def documents(config: Config) -> Iterator[str]:
    """The source's texts, in an order that never changes; empty ones are left out."""
    if config.source == "embedded":
        import embedded

        texts = embedded.documents()
    else:
        texts = (
            column_of(row, config.column, str, where)
            for row, where in source_rows(config.source, config.config, config.split)
        )
    return (text for text in texts if text.strip())


def read_ahead(texts: Iterator[str]) -> Iterator[list[str]]:
    """Batches of texts, the next one read while the last is being worked on."""
    with ThreadPoolExecutor(1) as thread:

        def fetch():
            return thread.submit(lambda: list(itertools.islice(texts, BATCH_DOCUMENTS)))

        pending = fetch()
        while batch := pending.result():
            pending = fetch()
            yield batch


def make_tokenizer(config: Config):
    """The tokenizer of this preparation."""
    if config.tokenizer != "train":
        return load_tokenizer(config.tokenizer)

    def beginning():
        read = 0
        for text in documents(config):
            yield text
            read += len(text)
            if read >= TOKENIZER_BYTES:
                return

    print(f"training a tokenizer of {config.vocab_size} ids", flush=True)
    tokenizer = train_tokenizer(beginning(), config.vocab_size)
    if len(tokenizer) < config.vocab_size:
        print(f"the text gave only {len(tokenizer)} ids")
    return tokenizer


def save_tokenizer(tokenizer, folder: Path) -> None:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)  # an earlier preparation's
    partial.rename(folder)


def is_prepared(out_dir: Path, settings: dict) -> bool:
    """Whether out_dir holds the finished result of these settings; what is damaged is removed, to be made
    again.

    Raises InputError if it holds another preparation.
    """
    for name in ("manifest.json", "progress.json"):
        noted = read_json(out_dir / name) if (out_dir / name).exists() else {"documents": 0}
        if noted.get("documents") == 0:  # nothing done yet binds to nothing
            continue
        # A source that broke off may be mended before the preparation continues, but not after it is
        # finished.
        free = () if name == "manifest.json" else ("source_files",)
        there = noted["settings"]
        differing = [
            f"{k}={there.get(k)!r} there, {v!r} here"
            for k, v in settings.items()
            if there.get(k) != v and k not in free
        ]
        if differing:
            raise InputError(
                f"{out_dir} holds another preparation ({', '.join(differing)}); choose another --out_dir or "
                f"delete it"
            )
    if not (out_dir / "manifest.json").exists():
        return False
    (out_dir / "progress.json").unlink(missing_ok=True)  # stopped between the manifest and this
    try:
        verified_manifest(out_dir)
        return True
    except InputError as error:
        print(f"{error}: preparing again")
        (out_dir / "manifest.json").unlink()  # the writers drop the shards as they begin
        return False


def write_shards(config: Config, tokenizer, settings: dict) -> dict[str, ShardWriter]:
    """Tokenize the source into whole shards, from where progress.json says; returns each split's writer."""
    out_dir, end = Path(config.out_dir), tokenizer.convert_tokens_to_ids(END)
    version = 1 if vocabulary_size(tokenizer) <= 65_535 else 2
    writers = {
        split: ShardWriter(out_dir, split, version=version, shard_tokens=config.shard_tokens)
        for split in ("train", "val")
    }
    progress = read_json(out_dir / "progress.json")
    done = progress["documents"]
    for split, writer in writers.items():
        writer.seek(progress["positions"].get(split, writer.position()))
    if done:
        print(f"continuing after {done:,} documents", flush=True)

    def tokens() -> int:
        return sum(writer.totals["tokens"] for writer in writers.values())

    saved = tokens()
    with tqdm(
        total=config.max_tokens or None, initial=saved, unit="tok", unit_scale=True, disable=None
    ) as bar:
        for texts in read_ahead(itertools.islice(documents(config), done, None)):
            for text, ids in zip(texts, encode(tokenizer, texts)):
                if config.max_tokens and tokens() >= config.max_tokens:
                    break
                split = "val" if hash_fraction(text) < config.val_fraction else "train"
                writers[split].append(np.array([end, *ids]), len(text.encode()))
                done += 1
            else:  # more may be wanted
                bar.update(tokens() - bar.n)
                if tokens() - saved >= SAVE_EVERY:
                    save_progress(out_dir, settings, done, writers)
                    saved = tokens()
                continue
            break
    if done == 0:
        raise InputError(f"{config.source} holds no text; nothing was prepared")
    for writer in writers.values():
        writer.finish()
    return writers


def save_progress(out_dir: Path, settings: dict, done: int, writers: dict[str, ShardWriter]) -> None:
    """Note, once their bytes are on disk, how many documents the shards hold and where each writer stands."""
    for writer in writers.values():
        writer.flush()
    positions = {split: writer.position() for split, writer in writers.items()}
    write_json(out_dir / "progress.json", {"settings": settings, "documents": done, "positions": positions})


def main(config: Config) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if config.workers:
        os.environ["RAYON_NUM_THREADS"] = str(config.workers)
    if not 0 <= config.val_fraction < 1:
        raise InputError(
            f"--val_fraction={config.val_fraction} is no share of the documents; expected 0 to below 1"
        )
    if not 0 < config.shard_tokens < 2**31:  # the header's count is an int32
        raise InputError(
            f"--shard_tokens={config.shard_tokens} is no size of a shard; expected 1 to {2**31 - 1}"
        )
    out_dir = Path(config.out_dir)
    files = source_files(config.source) if config.source != "embedded" else None
    settings = {k: v for k, v in asdict(config).items() if k not in ("out_dir", "workers")}
    settings["source_files"] = [[path.name, path.stat().st_size] for path in files or []]
    if is_prepared(out_dir, settings):
        print(f"{out_dir} is already prepared")
        return
    out_dir.mkdir(parents=True, exist_ok=True)
    progress = out_dir / "progress.json"
    if progress.exists() and read_json(progress)["documents"]:
        tokenizer = load_tokenizer(out_dir / "tokenizer")
    else:
        tokenizer = make_tokenizer(config)
        save_tokenizer(tokenizer, out_dir / "tokenizer")
        save_progress(out_dir, settings, 0, {})
    writers = write_shards(config, tokenizer, settings)
    write_json(
        out_dir / "manifest.json",
        {
            "settings": settings,
            "source": config.source,
            "tokenizer": config.tokenizer,
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
            "vocab_size": vocabulary_size(tokenizer),
            "splits": {split: writer.totals for split, writer in writers.items()},
            "shards": [shard for writer in writers.values() for shard in writer.shards],
        },
    )
    (out_dir / "progress.json").unlink()
    for split, writer in writers.items():
        print(f"{split}: " + ", ".join(f"{value:,} {name}" for name, value in writer.totals.items()))
        if not writer.totals["documents"]:
            print(
                f"no document is in {split}, pretraining needs both: delete {out_dir}, raise --val_fraction"
            )


if __name__ == "__main__":
    run_script(main, Config)
