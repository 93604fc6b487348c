"""Token shards on disk: their format, verifying them, and the windows that pretraining reads.

A shard is a flat file of token ids behind a header of 256 int32 (magic 20240520, version, count), the public
format of llm.c and modded-nanogpt: version 1 stores uint16 ids, version 2 (ours, for vocabularies above
65,535) uint32. Each document begins with <|endoftext|>. `manifest.json` beside the shards names the tokenizer
and each shard's size and hash; shards of others, without a manifest, work too when `*train*.bin` and
`*val*.bin` tell the splits apart.

T context length in tokens.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import IGNORE, InputError, file_sha256, fingerprint, read_json, write_json
from distributed import Ranks
from order import CYCLE, batch_order, epochs_read, mix_report, mixed_order, parse_sources, taken
from tokenization import load_tokenizer, tokenizer_fingerprint

MAGIC, HEADER_INTS = 20240520, 256
SHARDS_OPEN = 128  # at once, of a loader; a process may often have 1,024 files
DTYPES = {1: np.dtype("<u2"), 2: np.dtype("<u4")}  # by the header's version


def shard_header(path: Path) -> tuple[np.dtype, int]:
    """The type and number of a shard's ids; InputError if it is missing, no shard of ours or cut short."""
    if not path.is_file():
        raise InputError(f"{path} is missing; copy or prepare it again")
    header = np.fromfile(path, "<i4", HEADER_INTS)
    if len(header) < HEADER_INTS or header[0] != MAGIC or header[1] not in DTYPES:
        raise InputError(
            f"{path} is no token shard: expected a header with magic {MAGIC} and version 1 or 2; make it "
            f"again with prepare_data.py"
        )
    dtype, count = DTYPES[int(header[1])], int(header[2])
    expected = 4 * HEADER_INTS + count * dtype.itemsize
    if path.stat().st_size != expected:
        raise InputError(
            f"{path} has {path.stat().st_size} bytes, its header says {expected}; copy or prepare it again"
        )
    return dtype, count


def read_shard(path: Path) -> np.ndarray:
    """A shard's ids, memory-mapped: the file stays open as long as they are used."""
    dtype, count = shard_header(path)
    return np.memmap(path, dtype, "r", offset=4 * HEADER_INTS, shape=(count,))


def read_manifest(folder: Path) -> dict:
    """The manifest of a data directory; InputError if it is not one that prepare_data.py writes."""
    manifest = read_json(folder / "manifest.json")
    shards, texts = manifest.get("shards"), ("tokenizer", "tokenizer_fingerprint")
    right = isinstance(shards, list) and all(isinstance(manifest.get(name), str) for name in texts)
    for shard in shards if right else ():
        file = shard.get("file") if isinstance(shard, dict) else None
        right &= isinstance(file, str) and bool(re.fullmatch(r"[\w.-]+\.bin", file))
        right = right and isinstance(shard.get("bytes"), int) and isinstance(shard.get("sha256"), str)
    if not right:
        raise InputError(
            f"{folder / 'manifest.json'} is not one that prepare_data.py writes; give the folder of shards"
        )
    return manifest


def verified_shards(folder: Path) -> dict[str, list]:
    """What note_verified noted, by file."""
    note = folder / ".verified.json"
    return read_json(note) if note.exists() else {}


def stamp_of(path: Path, sha256: str) -> list:
    """What marks a shard as the checked one: its hash, last change, and inode, which no copy keeps."""
    status = path.stat()
    return [sha256, status.st_mtime_ns, status.st_ino]


def note_verified(folder: Path, stamps: dict[str, list]) -> None:
    """Note the stamps of shards that were found right, or have just been written."""
    write_json(folder / ".verified.json", verified_shards(folder) | stamps)


def damaged_shards(folder: Path, manifest: dict) -> dict[str, str]:
    """What is wrong with each shard that differs from the manifest, by file.

    Hashing reads all the data. Of shards that were noted as right only size and stamp are looked at.
    """
    seen, right, damaged = verified_shards(folder), {}, {}
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        size = path.stat().st_size if path.exists() else None
        if size != shard["bytes"]:
            damaged[path.name] = f"{path} has {size or 'no'} bytes, the manifest says {shard['bytes']}"
            continue
        stamp = stamp_of(path, shard["sha256"])
        if seen.get(path.name) != stamp:
            if file_sha256(path) != shard["sha256"]:
                damaged[path.name] = (
                    f"{path} is not what was prepared: its SHA-256 differs from the manifest's"
                )
                continue
            right[path.name] = stamp
    if right and os.access(folder, os.W_OK):
        note_verified(folder, right)
    return damaged


class TokenLoader:
    """The windows of one split: T inputs each, and the same T shifted by one as targets. None crosses shards.

    `data_dir` names a folder or several, see parse_sources. Windows are numbered across all folders. A
    folder's shards are those of its manifest; without one, see shard_paths. Raises InputError for a folder
    whose split has no window, unless nothing is trained on it, and when it meets an id beyond vocab_size.
    """

    def __init__(self, data_dir: str | Path, split: str, context_length: int, vocab_size: int):
        self.T, self.vocab_size, self.sources = context_length, vocab_size, parse_sources(data_dir)
        self.paths: list[Path] = []
        self.sizes: list[int] = []  # windows of each source
        windows = []  # of each shard
        for source in self.sources:
            paths = shard_paths(Path(source.path), split)
            tokens = [shard_header(path)[1] for path in paths]
            windows += [max(0, (count - 1) // context_length) for count in tokens]
            self.sizes.append(sum(windows[len(self.paths) :]))
            self.paths += paths
            if not self.sizes[-1] and (split != "train" or source.share != 0):
                shards = f" in {len(tokens)} shards" if len(tokens) > 1 else ""
                amount = f"{sum(tokens)} tokens{shards}" if tokens else f"no shard as {split}_000000.bin"
                raise InputError(
                    f"the {split} split in {source.path} has {amount}, too few for one window of "
                    f"{context_length + 1}; prepare more data, raise --val_fraction, or lower "
                    f"--context_length"
                )
        self.ends = np.cumsum(windows)  # of each shard, among all windows
        self.shard = lru_cache(SHARDS_OPEN)(read_shard)

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def windows_trained_on(self) -> int:
        """All but those of sources with weight 0."""
        return sum(size for size, source in zip(self.sizes, self.sources) if source.share != 0)

    @property
    def names(self) -> list[str]:
        return [source.name for source in self.sources]

    @property
    def weighted(self) -> bool:
        return len(self.sources) > 1 and self.sources[0].share is not None

    @property
    def shares(self) -> list[float]:
        """Each source's share of the windows that are read: as its weight says, or as many as it has."""
        if self.weighted:
            return [source.share / CYCLE for source in self.sources]
        return [size / len(self) for size in self.sizes]

    def step_windows(self, seed: int, step: int, batch_size: int) -> np.ndarray:
        """Which windows make up a step's global batch: a pure function of seed and step.

        Sources with weights have epochs of their own. Those without are one source.
        """
        if not self.weighted:
            return batch_order(seed, step, batch_size, len(self))
        shares = [source.share for source in self.sources]
        return mixed_order(seed, step, batch_size, sizes=self.sizes, shares=shares)

    def first_windows(self, most: int, shares: Sequence[float]) -> list[range]:
        """The first windows of each source, its share of `most` in all (0: all it has), and at least one."""
        ends, counts = np.cumsum(self.sizes).tolist(), taken(shares, self.sizes, most)
        return [range(end - n, end - n + count) for end, n, count in zip(ends, self.sizes, counts)]

    def epochs(self, windows: int) -> dict[str, float]:
        """How often each of several sources was read when so many windows were, as epochs/NAME."""
        return epochs_read(self.names, self.shares, self.sizes, windows)

    def report(self, windows: int) -> list[str]:
        """A line on each of several sources, for a run that reads so many windows."""
        return mix_report(self.names, self.shares, self.sizes, read=windows, unit="windows")

    def content(self, manifests: Sequence[dict]) -> dict:
        """What a run's data hold, for check_same_run, with each source's manifest; not where they are."""
        if len(self.sources) == 1:
            return {"data": fingerprint(manifests[0]["shards"]), "windows": len(self)}
        data = [fingerprint(manifest["shards"]) for manifest in manifests]
        shares = [source.share for source in self.sources] if self.weighted else "joined"
        return {"data": data, "windows": self.sizes, "shares": shares}

    def read(self, windows: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Input ids and targets of some windows, (B, T) int64 each."""
        rows = np.empty((len(windows), self.T + 1), np.int64)
        for row, window in zip(rows, windows):
            shard = int(np.searchsorted(self.ends, window, side="right"))
            start = (window - (self.ends[shard - 1] if shard else 0)) * self.T
            row[:] = self.shard(self.paths[shard])[start : start + self.T + 1]
            if row.max() >= self.vocab_size:
                raise InputError(
                    f"{self.paths[shard]} holds token id {row.max()}, beyond the vocabulary of "
                    f"{self.vocab_size}: it was made with another tokenizer; name "
                    f"that one by --tokenizer"
                )
        ids = torch.from_numpy(rows)
        return ids[:, :-1], ids[:, 1:]

    def micro_batches(
        self, windows: Sequence[int] | np.ndarray, micro_batch_size: int, ranks: Ranks, pieces: int = 1
    ) -> Iterator[dict]:
        """A rank's share of some windows, as the keyword arguments of the model's forward. Each window is cut
        into so many pieces, which are rows of their own."""
        for some in ranks.share(windows, micro_batch_size):
            input_ids, targets = self.read([int(window) for window in some if window is not None])
            padding = (0, 0, 0, len(some) - len(input_ids))
            batch = {"input_ids": F.pad(input_ids, padding), "targets": F.pad(targets, padding, value=IGNORE)}
            yield ranks.pin({name: ids.reshape(-1, ids.shape[1] // pieces) for name, ids in batch.items()})

    def text_bytes(self, windows: Sequence[int], tokenizer) -> int:
        """UTF-8 bytes of the text that these windows' targets spell: what turns nats into bits per byte."""
        total = 0
        for i in range(0, len(windows), 256):
            rows = self.read(windows[i : i + 256])[1].tolist()
            total += sum(len(tokenizer.decode(row, skip_special_tokens=True).encode()) for row in rows)
        return total


SPLITS = {"train": r".*train$|train", "val": r"val"}  # and a word in the names of their shards


def shard_paths(folder: Path, split: str) -> list[Path]:
    """A split's shards, in order: those of the manifest, or without one all that are named after it, as
    fineweb_train_000001.bin. Raises InputError for a name that is of both splits."""
    if (folder / "manifest.json").exists():
        names = [shard["file"] for shard in read_manifest(folder)["shards"]]
    else:
        names = [path.name for path in folder.glob("*.bin")]
    paths = []
    for name in sorted(names):
        words = re.split(r"[^a-z]+", name.lower())  # pretrain is train, validation is val, retrieval is not
        splits = [word for word in SPLITS if any(re.match(SPLITS[word], other) for other in words)]
        if len(splits) > 1:
            raise InputError(
                f"{folder / name} is named after both splits, train and val; give it a name with one of them"
            )
        if splits == [split]:
            paths.append(folder / name)
    return paths


def joint_folders(data_dir: str) -> list[Path]:
    """The folders that --data_dir names; InputError for one that is named twice, and for different
    tokenizers. No shard is read."""
    folders = [Path(source.path) for source in parse_sources(data_dir)]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError(
            f"--data_dir={data_dir} names a folder twice; name it once, with the sum of its weights"
        )
    made_with = {}
    for folder in folders:
        if (folder / "manifest.json").exists():
            manifest = read_manifest(folder)
            made_with.setdefault(manifest["tokenizer_fingerprint"], f"{folder} ({manifest['tokenizer']})")
    if len(made_with) > 1:
        raise InputError(
            f"{' and '.join(made_with.values())} were made with different tokenizers; prepare one of them "
            f"again with the other's, by --tokenizer"
        )
    return folders


def verified_manifests(data_dir: str, tokenizer_name: str = "") -> list[dict]:
    """The manifest of each folder that --data_dir names, as verified_manifest gives it; InputError as
    joint_folders raises it, before any shard is read."""
    return [verified_manifest(folder, tokenizer_name) for folder in joint_folders(data_dir)]


def require_shards(folder: Path, tokenizer_name: str) -> None:
    """Raise InputError for a folder without token shards, for one whose preparation is not finished, or with
    nothing to name the shards' tokenizer."""
    if not (folder / "manifest.json").exists() and any(
        (folder / n).exists() for n in ("progress.json", "parts")
    ):
        raise InputError(
            f"the preparation in {folder} is not finished; run its prepare_data.py command again"
        )
    if not folder.is_dir() or not any(folder.glob("*.bin")):
        raise InputError(f"{folder} holds no token shards; make them with prepare_data.py --out_dir={folder}")
    if not tokenizer_name and not (folder / "manifest.json").exists():
        raise InputError(
            f"{folder} has no manifest.json to name the tokenizer of its shards; give it, as --tokenizer=gpt2"
        )


def verified_manifest(folder: str | Path, tokenizer_name: str = "") -> dict:
    """The manifest of a data directory, its shards verified.

    Shards without a manifest (llm.c's, modded-nanogpt's) need tokenizer_name. Raises InputError for shards
    that differ from the manifest or a tokenizer that is not the one they were made with.
    """
    folder = Path(folder)
    if (folder / "manifest.json").exists():
        manifest = read_manifest(folder)
        for what in damaged_shards(folder, manifest).values():
            raise InputError(f"{what}; prepare the data again")
        name = tokenizer_name or folder / "tokenizer"
        given, expected = tokenizer_fingerprint(load_tokenizer(name)), manifest["tokenizer_fingerprint"]
        if given != expected:
            raise InputError(
                f"the shards in {folder} were made with tokenizer {manifest['tokenizer']} ({expected}), not "
                f"with {name} ({given}); use that one or prepare again"
            )
        return manifest
    require_shards(folder, tokenizer_name)
    shards = []  # identified by size and first MiB; hashing all would take minutes
    for path in sorted(folder.glob("*.bin")):
        with open(path, "rb") as file:
            first = hashlib.sha256(file.read(1 << 20)).hexdigest()
        shards.append({"file": path.name, "bytes": path.stat().st_size, "begins": first})
    return {"shards": shards}
