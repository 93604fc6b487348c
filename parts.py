"""Preparing data by several processes, each of which takes its share of the source's files.

Each file is prepared in a folder of its own, as if it were the whole source. Whoever finishes last joins the
folders. So the shards do not depend on the number of processes: a shard ends where a file ends.
"""

import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from common import InputError, file_sha256, locked, make_folder, read_json, sync_to_disk, write_json
from data import note_verified, read_manifest, verified_shards
from prepare_data import (
    PARTS,
    Config,
    differing,
    known_commit,
    make_tokenizer,
    prepare_folder,
    refuse_foreign_files,
    save_tokenizer,
    settings_of,
    share_of,
)
from sources import count_files

WAIT = 1.0  # seconds between two looks for what another process makes


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
