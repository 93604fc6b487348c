"""Turn any text source into token shards that pretrain_gpt.py reads.

    python prepare_data.py --source=embedded --tokenizer=train --vocab_size=4096 --out_dir=data/embedded
    python prepare_data.py --max_tokens=1e9               # FineWeb-Edu, streamed, SmolLM2's tokenizer
    python prepare_data.py --source=texts/,more.jsonl.zst --tokenizer=gpt2 --out_dir=data/mine

Documents are read in order, tokenized on all cores and appended to shards; memory use does not grow with the
source. A stopped run, started again with the same command, continues where it was and ends with the same
bytes.

    torchrun --nproc_per_node=8 prepare_data.py --source=crawl/ --out_dir=data/crawl
    python prepare_data.py --part=3/8 --source=crawl/ --out_dir=data/crawl

Several processes, of torchrun, of a Slurm array or started by hand, divide a source's files. Each file is
prepared in a folder of its own, as if it were the whole source. Whoever finishes last joins the folders. So
these shards do not depend on the number of processes: a shard ends where a file ends.

Shards are not shuffled, because the order in which a run reads them is: a batch has windows from all over the
data, see order.py.
"""

import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common import (
    InputError,
    check_numbers,
    file_sha256,
    lock_folder,
    locked,
    make_folder,
    read_json,
    run_script,
    sync_to_disk,
    write_json,
)
from data import damaged_shards, note_verified, read_manifest, verified_shards
from shards import (
    PARTS,
    Place,
    check_same_preparation,
    differing,
    known_commit,
    make_tokenizer,
    read_progress,
    refuse_foreign_files,
    save_progress,
    save_tokenizer,
    settings_of,
    share_of,
    write_shards,
)
from sources import count_files, folder_notes
from tokenization import MOST_IDS, load_tokenizer, tokenizer_fingerprint, vocabulary_size

WAIT = 1.0  # seconds between two looks for what another process makes
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
    max_tokens: int = 0  # stop after the document (with --part: the file) that reaches so many; 0 reads all
    val_fraction: float = 0.005  # share of the documents that go to validation, chosen by a hash of the text
    max_bad_rows: float = 0.1  # share of unusable rows, which are skipped; of a file's with --part
    shard_tokens: int = 100_000_000  # tokens in a shard
    workers: int = 0  # tokenizing threads; 0 for one a core
    part: str = ""  # 3/8: the third of eight shares of the files; empty: torchrun's or Slurm's, or all


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
    of_part = f"part {config.part}, " if config.part else ""
    for split, writer in writers.items():
        print(f"{of_part}{split}: " + ", ".join(f"{value:,} {name}" for name, value in writer.totals.items()))
        if writer.totals["documents"] or config.part:
            continue
        if split == "train" and config.val_fraction == 1:
            print(f"all is held out; pretraining can validate on it: --data_dir=data/mine:1,{out_dir}:0")
            continue
        change = "raise" if split == "val" else "lower"
        print(
            f"no document is in {split}, and pretraining needs both; delete {out_dir} and {change} "
            f"--val_fraction"
        )


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


# -- several processes ---------------------------------------------------------------------------------------


def started_part(environment: Mapping[str, str]) -> str:
    """The part that torchrun or a Slurm array gave this process, empty if neither started several."""
    if int(environment.get("WORLD_SIZE", 1)) > 1:
        return f"{int(environment['RANK']) + 1}/{environment['WORLD_SIZE']}"
    if int(environment.get("SLURM_ARRAY_TASK_COUNT", 1)) > 1:
        names = ("ID", "MIN", "MAX", "COUNT")
        task, first, last, count = (int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in names)
        step = (last - first) // (count - 1)
        if last - first != step * (count - 1) or (task - first) % step:
            raise InputError("the numbers of this Slurm array have gaps; use --array=1-8, or give --part")
        return f"{(task - first) // step + 1}/{count}"
    return ""


def prepare_share(config: Config) -> None:
    """Prepare this process's share, and join all shares if the others are finished.

    Each process can be stopped and started again by itself. None waits for another, but for the tokenizer,
    which the first one makes. With max_tokens the data end with the file that reaches them.
    """
    out_dir, (first, every) = Path(config.out_dir), share_of(config.part)
    if config.source == "embedded":
        raise InputError("--source=embedded has no files that processes could divide; leave --part out")
    whole, manifest = replace(config, part=""), out_dir / "manifest.json"
    if manifest.exists():
        if first == 0:
            prepare_folder(whole)
        return
    if (out_dir / "progress.json").exists():
        raise InputError(
            f"{out_dir} holds a preparation by one process; go on without --part, or choose another --out_dir"
        )
    refuse_foreign_files(out_dir)
    make_folder(out_dir / PARTS)
    commit = share_tokenizer(whole, makes_it=first == 0)
    files = count_files(config.source, config.config, config.split, commit)
    if first >= files:
        print(f"part {config.part} has nothing to do, as the source has {files} files")
    for number in range(first, files, every):
        if manifest.exists() or wanted_parts(out_dir, files, config.max_tokens) is not None:
            break
        prepare_folder(part_config(whole, number, files), commit)
    with locked(out_dir / ".lock"):
        wanted = None if manifest.exists() else wanted_parts(out_dir, files, config.max_tokens)
        if wanted is not None:
            join_parts(whole, wanted, files, commit)
        if manifest.exists():
            remove_parts(out_dir, range(first, files, every))


def remove_parts(out_dir: Path, own: Sequence[int]) -> None:
    """After the join: remove this process's parts, and those that are finished. With max_tokens others may
    still be at parts that nobody wants any more."""
    places = out_dir / PARTS
    if not places.exists():  # another process was the last
        return
    for folder in places.iterdir():
        mine = folder.name.isdecimal() and int(folder.name) in own
        if mine or ((folder / "manifest.json").exists() and not (folder / "progress.json").exists()):
            shutil.rmtree(folder, ignore_errors=True)
    if not any(folder.is_dir() for folder in places.iterdir()):
        shutil.rmtree(places)


def part_folder(out_dir: Path, number: int) -> Path:
    return out_dir / PARTS / f"{number:06d}"


def part_config(config: Config, number: int, files: int) -> Config:
    """How one file of the source is prepared."""
    out_dir, part = Path(config.out_dir), f"{number + 1}/{files}"
    places = {"out_dir": str(part_folder(out_dir, number)), "tokenizer": str(out_dir / "tokenizer")}
    return replace(config, part=part, max_tokens=0, **places)


def share_tokenizer(config: Config, *, makes_it: bool) -> str | None:
    """Make the tokenizer in out_dir, unless it is there, or wait until another process has. Returns the
    commit at which all processes read a hub dataset. Raises InputError if other flags made the tokenizer."""
    out_dir = Path(config.out_dir)
    folder, new, note = out_dir / "tokenizer", out_dir / "tokenizer.new", out_dir / PARTS / "begun.json"
    flags = {"tokenizer": config.tokenizer, "vocab_size": config.vocab_size}
    if makes_it and not folder.exists():
        commit = known_commit(config)
        write_json(note, flags | {"commit": commit})
        save_tokenizer(make_tokenizer(config, commit), new)
        new.rename(folder)
    if not folder.exists():
        print(
            "waiting for the first part, which makes the tokenizer; if it has failed, end this one",
            flush=True,
        )
    while not folder.exists():
        time.sleep(WAIT)
    begun = read_json(note) if note.exists() else flags  # parts of an older version have no note
    if told := differing(begun, flags):
        raise InputError(
            f"{out_dir} holds parts with another tokenizer ({told}); choose another --out_dir or delete it"
        )
    return begun.get("commit")


def wanted_parts(out_dir: Path, files: int, max_tokens: int) -> int | None:
    """How many parts, from the first on, make the whole; None if they are not all finished."""
    tokens = 0
    for number in range(files):
        manifest = part_folder(out_dir, number) / "manifest.json"
        if not manifest.exists():
            return None
        tokens += sum(totals["tokens"] for totals in read_json(manifest)["splits"].values())
        if max_tokens and tokens >= max_tokens:
            return number + 1
    return files


def check_alike(config: Config, settings: dict, wanted: int, files: int) -> None:
    """Raise InputError if a process made a part with other flags, or of another list of files."""
    for number in range(wanted):
        own = {"part": f"{number + 1}/{files}", "max_tokens": 0}
        own["source_files"] = settings["source_files"][number : number + 1]
        expected = {name: value for name, value in (settings | own).items() if name != "tokenizer"}
        folder = part_folder(Path(config.out_dir), number)
        if told := differing(read_manifest(folder)["settings"], expected):
            raise InputError(
                f"{folder} was made otherwise ({told}); delete {folder.parent} and start all processes again "
                f"with the same flags, on a source that stays as it is"
            )


def join_parts(config: Config, wanted: int, files: int, commit: str | None) -> None:
    """Move the parts' shards into out_dir, numbered through, and write the manifest. A stop does no harm."""
    out_dir, shards = Path(config.out_dir), {"train": [], "val": []}
    settings = settings_of(config, commit)
    check_alike(config, settings, wanted, files)
    totals, verified = {split: Counter(documents=0, tokens=0, bytes=0) for split in shards}, {}
    for number in range(wanted):
        folder = part_folder(out_dir, number)
        manifest, seen = read_manifest(folder), verified_shards(folder)
        for split in shards:
            totals[split].update(manifest["splits"][split])
        for shard in manifest["shards"]:
            split = shard["file"].partition("_")[0]
            name = f"{split}_{len(shards[split]):06d}.bin"
            if (folder / shard["file"]).exists():
                (folder / shard["file"]).replace(out_dir / name)
            verified |= {name: seen[shard["file"]]} if shard["file"] in seen else {}
            shards[split].append({**shard, "file": name, "part": number, "was": shard["file"]})
    if not sum(total["documents"] for total in totals.values()):
        raise InputError(f"{config.source} holds no text, so nothing was prepared; name another --source")
    sync_to_disk(out_dir)
    note_verified(out_dir, verified)
    write_json(
        out_dir / "manifest.json",
        {
            "settings": settings,
            "source": config.source,
            "tokenizer": config.tokenizer,
            "tokenizer_fingerprint": manifest["tokenizer_fingerprint"],
            "vocab_size": manifest["vocab_size"],
            "splits": {split: dict(total) for split, total in totals.items()},
            "files": files,
            "shards": shards["train"] + shards["val"],
        },
    )
    tokens = sum(total["tokens"] for total in totals.values())
    if tokens < config.max_tokens:
        print(f"the source ended after {tokens:,} tokens, before --max_tokens={config.max_tokens:,}")
    for split, total in totals.items():
        print(f"{split}: " + ", ".join(f"{value:,} {name}" for name, value in total.items()))


def mend_parts(config: Config, manifest: dict, damaged: Mapping[str, str]) -> None:
    """Prepare the files again whose shards are damaged, and put these in their places. Raises InputError,
    having changed nothing, if a file does not give them as they were."""
    out_dir, lost = Path(config.out_dir), [s for s in manifest["shards"] if s["file"] in damaged]
    for number in sorted({shard["part"] for shard in lost}):
        prepare_folder(part_config(config, number, manifest["files"]), manifest["settings"].get("commit"))
    for shard in lost:
        path = part_folder(out_dir, shard["part"]) / shard["was"]
        if not path.exists() or file_sha256(path) != shard["sha256"]:
            shutil.rmtree(out_dir / PARTS)
            raise InputError(
                f"{config.source} does not give {shard['file']} again as it was; prepare into another "
                f"--out_dir (nothing was changed)"
            )
    for shard in lost:
        (part_folder(out_dir, shard["part"]) / shard["was"]).replace(out_dir / shard["file"])
    shutil.rmtree(out_dir / PARTS)


# -- the command ---------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    if not config.part and config.source != "embedded" and (part := started_part(os.environ)):
        config = replace(config, part=part)
        print(f"part {part} of {config.out_dir}, as one of several processes; --part=1/1 prepares all of it")
    check_settings(config)
    share_of(config.part)
    begun = any((Path(config.out_dir) / name).exists() for name in ("manifest.json", "progress.json", PARTS))
    if config.val_fraction == 0 and not begun:
        raise InputError(
            "--val_fraction=0 holds nothing out, and pretraining validates; give a share above 0"
        )
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
