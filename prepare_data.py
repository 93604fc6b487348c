"""Turn any text source into token shards that pretrain_gpt.py reads.

    python prepare_data.py --source=embedded --tokenizer=train --vocab_size=4096 --out_dir=data/embedded
    python prepare_data.py --max_tokens=1e9               # FineWeb-Edu, streamed, SmolLM2's tokenizer
    python prepare_data.py --source=texts/,more.jsonl.zst --tokenizer=gpt2 --out_dir=data/mine

Documents are read in order, tokenized on all cores and appended to shards; memory use does not grow with the
source. A stopped run, started again with the same command, continues where it was and ends with the same
bytes.

    torchrun --nproc_per_node=8 prepare_data.py --source=crawl/ --out_dir=data/crawl
    python prepare_data.py --part=3/8 --source=crawl/ --out_dir=data/crawl

Several processes, of torchrun, of a Slurm array or started by hand, divide a source's files, see parts.py.
Shards are not shuffled, because the order in which a run reads them is: a batch has windows from all over the
data, see order.py.
"""

import itertools
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import (
    InputError,
    check_numbers,
    file_sha256,
    lock_folder,
    make_folder,
    read_json,
    run_script,
    sync_to_disk,
    write_json,
)
from data import ShardWriter, damaged_shards, read_manifest
from sources import BadRows, folder_notes, hash_fraction, newest_commit, rows_by_file, source_files, text_of
from tokenization import (
    END,
    MOST_IDS,
    encode,
    load_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
    vocabulary_size,
)

PARTS = "parts"  # what several processes prepare: in out_dir, a folder for each file of the source
BATCH_DOCUMENTS = 256  # tokenized together
SAVE_EVERY = 20_000_000  # tokens between two places to continue from
TOKENIZER_BYTES = 200_000_000  # of text, from the beginning, that --tokenizer=train learns from
TOKENIZER_FILES = (  # of transformers
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
)
MOST_WORKERS = 1024  # threads; far more than any machine has cores


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
    max_bad_rows: float = 0.1  # share of unusable rows, which are skipped; of a file's with --part
    shard_tokens: int = 100_000_000  # tokens in a shard
    workers: int = 0  # tokenizing threads; 0 for one a core
    part: str = ""  # 3/8: the third of eight shares of the files; empty: torchrun's or Slurm's, or all


def share_of(part: str) -> tuple[int, int]:
    """A share, counted from 0, and how many there are: (2, 8) of "3/8". InputError for what is no share."""
    if not part:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError(f"--part={part} is no share; expected 1/8 to 8/8 for eight processes")
    return int(found[1]) - 1, int(found[2])


@dataclass(frozen=True)
class File:
    """One of the source's files, as it is read."""

    number: int = 0  # in the order of reading
    bad_rows: tuple[int, int, str] = (0, 0, "")  # BadRows.counts() where it begins


@dataclass(frozen=True)
class Place:
    """How far a source has been read, so that a stopped preparation opens no file before that again."""

    documents: int = 0  # that the shards hold
    documents_in_file: int = 0  # of these
    file: File = File()

    def after(self, file: File) -> "Place":
        """The place behind one more document, which is of this file."""
        return Place(self.documents + 1, self.documents_in_file + 1 if file == self.file else 1, file)


def documents(
    config: Config, bad_rows: BadRows | None = None, start: File = File(), commit: str | None = None
) -> Iterator[tuple[File, str]]:
    """The source's texts from a file on, each with its file, in an order that never changes; those of a hub
    dataset at a commit. Empty ones are left out, unusable rows counted."""
    if config.source == "embedded":
        import embedded

        yield from ((start, text) for text in embedded.documents())
        return
    bad_rows = bad_rows or BadRows(config.max_bad_rows)
    bad_rows.rows, bad_rows.bad, bad_rows.first = start.bad_rows
    share, source = share_of(config.part), (config.source, config.config, config.split)
    files = rows_by_file(*source, share=share, start=start.number, commit=commit)
    for number, rows in enumerate(files, start.number):
        file = File(number, bad_rows.counts())
        for row, where in rows:
            try:
                text = text_of(row, config.column)
            except ValueError as error:
                bad_rows.skip(where, str(error))
                continue
            bad_rows.good()
            if text.strip():
                yield file, text
    bad_rows.check()


def read_ahead(texts: Iterator) -> Iterator[list]:
    """Batches of texts, the next one read while the last is being worked on."""
    with ThreadPoolExecutor(1) as thread:

        def fetch():
            return thread.submit(lambda: list(itertools.islice(texts, BATCH_DOCUMENTS)))

        pending = fetch()
        while batch := pending.result():
            pending = fetch()
            yield batch


def make_tokenizer(config: Config, commit: str | None = None):
    """The tokenizer of this preparation; a new one learns from a hub dataset at a commit."""
    if config.tokenizer != "train":
        return load_tokenizer(config.tokenizer)

    def beginning():
        read = 0
        for _, text in documents(replace(config, part=""), commit=commit):
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
    """Put a tokenizer into a folder, in place of an earlier preparation's, and on the disk.

    A stop in between does no harm: the progress note or the manifest tells that it is not whole.
    """
    folder.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    for path in (*folder.iterdir(), folder):
        sync_to_disk(path)


def refuse_foreign_files(out_dir: Path) -> None:
    """Raise InputError if a folder has files under our names, but no note that we wrote them."""
    notes = ("manifest.json", "progress.json", PARTS)
    if not out_dir.is_dir() or any((out_dir / name).exists() for name in notes):
        return
    names = [path.name for path in out_dir.iterdir()]
    foreign = [name for name in names if re.fullmatch(r"(train|val)_.*\.bin.*|tokenizer", name)]
    if foreign:
        raise InputError(
            f"{out_dir} holds {', '.join(sorted(foreign))}, not written by prepare_data.py; choose another "
            f"--out_dir"
        )


def check_same_preparation(out_dir: Path, settings: dict) -> None:
    """Raise InputError if a folder holds a preparation by other settings, finished or begun."""
    for name in ("manifest.json", "progress.json"):
        noted = read_json(out_dir / name) if (out_dir / name).exists() else {"documents": 0}
        if noted.get("documents") == 0:  # an empty preparation has no settings to match
            continue
        there = noted.get("settings")
        if not isinstance(there, dict):
            raise InputError(f"{out_dir / name} was not written by prepare_data.py; choose another --out_dir")
        # A source that broke off may be mended before the preparation continues, not after it is finished.
        free = () if name == "manifest.json" else ("source_files",)
        if told := differing(there, {k: v for k, v in settings.items() if k not in free}):
            raise InputError(
                f"{out_dir} holds another preparation ({told}); choose another --out_dir or delete it"
            )
        if name == "progress.json":
            check_files_read(out_dir, noted, settings["source_files"])


def differing(there: dict, here: dict) -> str:
    """The settings that are others here than there, as a sentence names them; empty if there are none."""
    pairs = ((name, there.get(name), value) for name, value in here.items())
    return ", ".join(f"{name}={old!r} there, {new!r} here" for name, old, new in pairs if old != new)


def check_files_read(out_dir: Path, noted: dict, files: list) -> None:
    """Raise InputError if the files that a begun preparation has read are not the source's first ones any
    more. The one that it was amid may have been mended, and more may follow."""
    there, number = noted["settings"].get("source_files", []), noted.get("file", 0)
    if not isinstance(there, list) or not isinstance(number, int):  # read_progress tells what is wrong
        return
    amid = [
        [file[:1] if isinstance(file, list) else file for file in some[number:][:1]]
        for some in (there, files)
    ]
    if there[:number] != files[:number] or amid[0] != amid[1]:
        raise InputError(
            f"the first {number + 1} files of the source, up to where {out_dir} stopped, are others now; "
            f"bring them back as they were, or choose another --out_dir or delete it"
        )


def whole_tokenizer(folder: Path, manifest: dict):
    """The tokenizer in a prepared folder, or None if it is not the one that made the shards."""
    try:
        tokenizer = load_tokenizer(folder / "tokenizer")
    except InputError as error:
        print(error)
        return None
    return tokenizer if tokenizer_fingerprint(tokenizer) == manifest["tokenizer_fingerprint"] else None


def mend(config: Config, settings: dict) -> None:
    """Make again what of a finished preparation is damaged. What is whole stays, and so does the manifest.

    Raises InputError, having changed nothing, if the source or the tokenizer is not what it was.
    """
    out_dir = Path(config.out_dir)
    manifest = read_manifest(out_dir)
    tokenizer = whole_tokenizer(out_dir, manifest)
    if tokenizer is None:
        tokenizer = make_tokenizer(config, settings.get("commit"))
        if tokenizer_fingerprint(tokenizer) != manifest["tokenizer_fingerprint"]:
            raise InputError(
                f"{out_dir}/tokenizer is damaged and {config.tokenizer} is not the tokenizer that made the "
                f"shards; bring it back, or prepare into another --out_dir (nothing was changed)"
            )
        save_tokenizer(tokenizer, out_dir / "tokenizer")
    damaged, again = damaged_shards(out_dir, manifest), out_dir / ".again"
    if not damaged:
        for folder in (again, out_dir / PARTS):
            shutil.rmtree(folder, ignore_errors=True)  # stopped when all was done
        return
    print(f"{'; '.join(damaged.values())}: preparing again")
    if "files" in manifest:
        from parts import mend_parts

        mend_parts(config, manifest, damaged)
        return
    again.mkdir(exist_ok=True)
    if not (again / "progress.json").exists():
        save_progress(again, settings, Place(), {})
    write_shards(replace(config, out_dir=str(again)), tokenizer, settings)
    expected = {shard["file"]: shard["sha256"] for shard in manifest["shards"]}
    for name in damaged:
        if not (again / name).exists() or file_sha256(again / name) != expected[name]:
            shutil.rmtree(again)
            raise InputError(
                f"{config.source} does not give {name} again as it was; prepare into another --out_dir "
                f"(nothing was changed)"
            )
    (again / "progress.json").unlink()  # after a stop from here on, .again is begun anew
    for name in damaged:
        (again / name).replace(out_dir / name)
    shutil.rmtree(again)


def write_shards(config: Config, tokenizer, settings: dict) -> dict[str, ShardWriter]:
    """Tokenize the source into whole shards, from where progress.json says; returns each split's writer."""
    out_dir, end = Path(config.out_dir), tokenizer.convert_tokens_to_ids(END)
    version = 1 if vocabulary_size(tokenizer) <= 65_535 else 2
    writers = {
        split: ShardWriter(out_dir, split, version=version, shard_tokens=config.shard_tokens)
        for split in ("train", "val")
    }
    (place, positions), bad_rows = read_progress(out_dir), BadRows(config.max_bad_rows)
    for split, writer in writers.items():
        writer.seek(positions.get(split, writer.position()))
    if place.documents:
        print(f"continuing after {place.documents:,} documents", flush=True)
    texts = documents(config, bad_rows, place.file, settings.get("commit"))
    rest = itertools.islice(texts, place.documents_in_file, None)

    def tokens() -> int:
        return sum(writer.totals["tokens"] for writer in writers.values())

    saved, total = tokens(), config.max_tokens or None
    with tqdm(total=total, initial=saved, unit="tok", unit_scale=True, disable=None) as bar:
        for batch in read_ahead(rest):
            for (file, text), ids in zip(batch, encode(tokenizer, [text for _, text in batch])):
                if config.max_tokens and tokens() >= config.max_tokens:
                    break
                split = "val" if hash_fraction(text) < config.val_fraction else "train"
                writers[split].append(np.array([end, *ids]), len(text.encode()))
                place = place.after(file)
            else:  # more may be wanted
                bar.update(tokens() - bar.n)
                if tokens() - saved >= SAVE_EVERY:
                    save_progress(out_dir, settings, place, writers)
                    saved = tokens()
                continue
            break
    if not place.documents and not config.part:  # a file among others may be empty
        raise InputError(f"{config.source} holds no text, so nothing was prepared; name another --source")
    for writer in writers.values():
        writer.finish()
    bad_rows.check()
    if note := bad_rows.note():
        print(note)
    return writers


def read_progress(out_dir: Path) -> tuple[Place, dict]:
    """What save_progress wrote, a place and each split's position; InputError if it is something else."""
    progress = read_json(out_dir / "progress.json")
    kinds = {"documents": int, "documents_in_file": int, "file": int, "bad_rows": list, "positions": dict}
    if not {"documents_in_file", "file", "bad_rows"} & set(progress):  # an older note knows of no files
        progress |= {"documents_in_file": progress.get("documents"), "file": 0, "bad_rows": [0, 0, ""]}
    for name, kind in kinds.items():
        if not isinstance(progress.get(name), kind):
            raise InputError(
                f"{out_dir / 'progress.json'} has no {name} as prepare_data.py writes it; delete the folder "
                f"{out_dir} to prepare anew, or choose another --out_dir"
            )
    file = File(progress["file"], tuple(progress["bad_rows"]))
    return Place(progress["documents"], progress["documents_in_file"], file), progress["positions"]


def save_progress(out_dir: Path, settings: dict, place: Place, writers: dict[str, ShardWriter]) -> None:
    """Note, once their bytes are on disk, what of the source the shards hold and where each writer stands."""
    for writer in writers.values():
        writer.flush()
    positions = {split: writer.position() for split, writer in writers.items()}
    done = {"documents": place.documents, "documents_in_file": place.documents_in_file}
    done |= {"file": place.file.number, "bad_rows": place.file.bad_rows, "positions": positions}
    write_json(out_dir / "progress.json", {"settings": settings} | done)


def check_settings(config: Config) -> None:
    """Raise InputError for an invalid setting, before anything is read."""
    check_numbers(asdict(config), positive=("vocab_size", "shard_tokens"))
    for name in ("split", "column", "tokenizer", "out_dir"):
        if not getattr(config, name).strip():
            raise InputError(f"--{name}= is empty; give a value, or leave the flag out")
    for name, most in (("vocab_size", MOST_IDS), ("workers", MOST_WORKERS)):
        if getattr(config, name) > most:
            raise InputError(f"--{name}={getattr(config, name)}: expected at most {most}")
    if config.shard_tokens >= 2**31:  # the header's count is an int32
        raise InputError(
            f"--shard_tokens={config.shard_tokens} is no size of a shard; expected 1 to {2**31 - 1}"
        )


def prepare(config: Config, settings: dict) -> None:
    """Prepare from the beginning, or from where progress.json says."""
    # The tokenizer, new or that of the part that is done.
    out_dir = Path(config.out_dir)
    progress = out_dir / "progress.json"
    if progress.exists() and read_progress(out_dir)[0].documents:
        tokenizer = load_tokenizer(out_dir / "tokenizer")
    else:
        tokenizer = make_tokenizer(config, settings.get("commit"))
        save_progress(out_dir, settings, Place(), {})  # from here on the folder is ours
        save_tokenizer(tokenizer, out_dir / "tokenizer")

    # The shards, and last of all the manifest that vouches for them.
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
    progress.unlink()
    total = sum(writer.totals["tokens"] for writer in writers.values())
    if total < config.max_tokens:
        print(f"the source ended after {total:,} tokens, before --max_tokens={config.max_tokens:,}")
    for split, writer in writers.items():
        print(f"{split}: " + ", ".join(f"{value:,} {name}" for name, value in writer.totals.items()))
        if writer.totals["documents"] or config.part:
            continue
        if split == "train" and config.val_fraction == 1:
            print(f"all is held out; pretraining takes it with weight 0: --data_dir=data/mine:1,{out_dir}:0")
            continue
        print(f"no document is in {split}, pretraining needs both: delete {out_dir}, raise --val_fraction")


def known_commit(config: Config) -> str | None:
    """The commit at which a hub dataset is read: the one that out_dir began with, else the newest. None of
    local files, and where nobody knows it."""
    if config.source == "embedded" or source_files(config.source) is not None:
        return None
    for name in ("manifest.json", "progress.json"):
        path = Path(config.out_dir) / name
        noted = read_json(path) if path.exists() else {}
        settings = noted.get("settings") if isinstance(noted, dict) else None
        if isinstance(settings, dict) and noted.get("documents") != 0:
            return settings.get("commit")
    return newest_commit(config.source)


def settings_of(config: Config, commit: str | None) -> dict:
    """What decides about the shards: flags, names and sizes of the files, a hub dataset's commit."""
    free = ("out_dir", "workers", "max_bad_rows", *(() if config.part else ("part",)))
    settings = {name: value for name, value in asdict(config).items() if name not in free}
    files, (first, every) = [], share_of(config.part)
    if config.source != "embedded":
        files = (source_files(config.source) or [])[first::every]
    settings["source_files"] = [[path.name, path.stat().st_size] for path in files]
    return settings | ({"commit": commit} if commit else {})


def prepare_folder(config: Config, commit: str | None = None) -> None:
    """Make the shards of a source in out_dir, go on making them, or see that they are whole. A hub dataset is
    read at a commit, without one at known_commit."""
    out_dir = Path(config.out_dir)
    refuse_foreign_files(out_dir)
    make_folder(out_dir)
    with lock_folder(out_dir):
        settings = settings_of(config, commit or known_commit(config))
        check_same_preparation(out_dir, settings)
        if (out_dir / "manifest.json").exists():
            (out_dir / "progress.json").unlink(missing_ok=True)  # stopped between the manifest and this
            mend(config, settings)
            print(f"{out_dir} is already prepared")
        elif (out_dir / PARTS).exists():
            raise InputError(
                f"{out_dir} holds parts of a preparation by several processes; go on with --part, torchrun "
                f"or a Slurm array, or choose another --out_dir"
            )
        else:
            prepare(config, settings)


def main(config: Config) -> None:
    from parts import prepare_share, started_part  # which imports this

    config = replace(config, part=config.part or started_part(os.environ))
    check_settings(config)
    share_of(config.part)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of torchrun on this machine
    if config.workers or here > 1:
        os.environ["RAYON_NUM_THREADS"] = str(config.workers or max(1, (os.cpu_count() or 1) // here))
    if config.part:
        prepare_share(config)
    else:
        prepare_folder(config)
    for note in folder_notes(config.source) if share_of(config.part)[0] == 0 else []:
        print(note)


if __name__ == "__main__":
    run_script(main, Config)
