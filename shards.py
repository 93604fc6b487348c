"""How prepare_data.py makes shards: the documents of a source, the tokenizer, the notes to go on from.

data.py describes a shard, and reads it. `config` is prepare_data.py's.
"""

import itertools
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import InputError, file_sha256, read_json, sync_to_disk, write_json
from data import DTYPES, HEADER_INTS, MAGIC, note_verified, stamp_of
from sources import BadRows, hash_fraction, newest_commit, rows_by_file, source_files, text_of
from tokenization import END, encode, load_tokenizer, train_tokenizer, vocabulary_size

PARTS = "parts"  # what several processes prepare: in out_dir, a folder for each file of the source
BATCH_DOCUMENTS = 256  # tokenized together
SAVE_EVERY = 20_000_000  # tokens between two places to continue from
TOKENIZER_CHARACTERS = 200_000_000  # of text, from the beginning, that --tokenizer=train learns from
TOKENIZER_FILES = (  # of transformers
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
)


class ShardWriter:
    """Appends documents to one split's shards, `train_000000.bin`, …; each is `.partial` until it is full and
    on disk.

    `seek` returns to a place that `position` gave. So a resumed preparation writes the same bytes.
    """

    def __init__(self, folder: Path, split: str, *, version: int, shard_tokens: int):
        self.folder, self.split, self.version, self.shard_tokens = folder, split, version, shard_tokens
        self.file = None
        self.shards: list[dict] = []  # of finished ones: file, tokens, bytes, sha256
        self.count = 0  # tokens in the open shard
        self.totals = {"documents": 0, "tokens": 0, "bytes": 0}

    def path(self) -> Path:
        return self.folder / f"{self.split}_{len(self.shards):06d}.bin"

    def open(self):
        self.file = open(self.path().with_suffix(".bin.partial"), "w+b")
        self.file.write(np.zeros(HEADER_INTS, "<i4").tobytes())

    def append(self, ids: np.ndarray, text_bytes: int) -> None:
        self.totals["documents"] += 1
        self.totals["tokens"] += len(ids)
        self.totals["bytes"] += text_bytes
        dtype = DTYPES[self.version]
        assert ids.min() >= 0 and ids.max() <= np.iinfo(dtype).max, (ids.min(), ids.max(), dtype)
        while len(ids):
            if self.file is None:
                self.open()
            part, ids = np.split(ids, [self.shard_tokens - self.count])
            self.file.write(part.astype(dtype).tobytes())
            self.count += len(part)
            if self.count == self.shard_tokens:
                self.finish()

    def flush(self) -> None:
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())

    def finish(self) -> None:
        """Complete the open shard, if there is one: header, disk, name."""
        if self.file is None:
            return
        header = np.zeros(HEADER_INTS, "<i4")
        header[:3] = MAGIC, self.version, self.count
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.flush()
        self.file.close()
        path = self.path()
        path.with_suffix(".bin.partial").replace(path)
        size, sha256 = path.stat().st_size, file_sha256(path)
        self.shards.append({"file": path.name, "tokens": self.count, "bytes": size, "sha256": sha256})
        note_verified(self.folder, {path.name: stamp_of(path, sha256)})
        self.file, self.count = None, 0

    def position(self) -> dict:
        return {"shards": list(self.shards), "count": self.count, "totals": dict(self.totals)}

    def seek(self, position: dict) -> None:
        """Return to a position: shards made since are dropped, the one then open is cut back."""
        self.shards, self.totals = list(position["shards"]), dict(position["totals"])
        path = self.path()
        if path.exists():  # it was finished after the position was taken
            path.replace(path.with_suffix(".bin.partial"))
        for later in self.folder.iterdir():
            name = re.fullmatch(rf"({self.split}_\d{{6,}})\.bin(\.partial)?", later.name)
            if name and (name[1] > path.stem or (position["count"] == 0 and name[1] == path.stem)):
                later.unlink()
        self.count = position["count"]
        if self.count:
            partial = path.with_suffix(".bin.partial")
            size = 4 * HEADER_INTS + self.count * DTYPES[self.version].itemsize
            if not partial.is_file() or partial.stat().st_size < size:
                raise InputError(
                    f"{partial} is missing or has lost bytes, {size} are noted in progress.json; bring it "
                    f"back, or delete {self.folder} and prepare again"
                )
            self.file = open(partial, "r+b")
            self.file.truncate(size)
            self.file.seek(0, os.SEEK_END)


# -- the source ----------------------------------------------------------------------------------------------


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
class Document:
    """A text of the source."""

    text: str
    file: File
    bad_rows: tuple[int, int, str]  # BadRows.counts() up to it


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
    config, bad_rows: BadRows | None = None, start: File = File(), commit: str | None = None
) -> Iterator[Document]:
    """The source's texts from a file on, in an order that never changes; those of a hub dataset at a commit.
    Empty ones are left out, unusable rows counted."""
    if config.source == "embedded":
        import embedded

        yield from (Document(text, start, start.bad_rows) for text in embedded.documents())
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
                yield Document(text, file, bad_rows.counts())
    bad_rows.check()


def read_ahead(texts: Iterator) -> Iterator[list]:
    """Batches of texts, the next one read while the last is being worked on. An error in reading comes after
    the texts that were read before it: perhaps no more are wanted."""

    def fetch() -> tuple[list, Exception | None]:
        batch = []
        try:
            for text in itertools.islice(texts, BATCH_DOCUMENTS):
                batch.append(text)
        except Exception as error:
            return batch, error
        return batch, None

    with ThreadPoolExecutor(1) as thread:
        batch, error = fetch()
        while batch and error is None:
            pending = thread.submit(fetch)
            yield batch
            batch, error = pending.result()
    if batch:
        yield batch
    if error:
        raise error


def known_commit(config) -> str | None:
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


# -- the tokenizer -------------------------------------------------------------------------------------------


def make_tokenizer(config, commit: str | None = None):
    """The tokenizer of this preparation; a new one learns from a hub dataset at a commit."""
    if config.tokenizer != "train":
        return load_tokenizer(config.tokenizer)

    def beginning():
        read = 0
        for document in documents(replace(config, part=""), commit=commit):
            yield document.text
            read += len(document.text)
            if read >= TOKENIZER_CHARACTERS:
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


# -- the shards ----------------------------------------------------------------------------------------------


def write_shards(config, tokenizer, settings: dict) -> dict[str, ShardWriter]:
    """Tokenize the source into whole shards, from where progress.json says; returns each split's writer."""
    out_dir, end = Path(config.out_dir), tokenizer.convert_tokens_to_ids(END)
    version = 1 if vocabulary_size(tokenizer) <= 65_535 else 2
    writers = {
        split: ShardWriter(out_dir, split, version=version, shard_tokens=config.shard_tokens)
        for split in ("train", "val")
    }
    (place, positions), bad_rows = read_progress(out_dir), BadRows(config.max_bad_rows)
    counts = place.file.bad_rows
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
            for document, ids in zip(batch, encode(tokenizer, [document.text for document in batch])):
                if config.max_tokens and tokens() >= config.max_tokens:
                    bad_rows = BadRows(config.max_bad_rows, counts)  # not what was read ahead
                    break
                counts, text = document.bad_rows, document.text
                split = "val" if hash_fraction(text) < config.val_fraction else "train"
                writers[split].append(np.array([end, *ids]), len(text.encode()))
                place = place.after(document.file)
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


# -- the same preparation ------------------------------------------------------------------------------------


def settings_of(config, commit: str | None) -> dict:
    """What decides about the shards: flags, names and sizes of the files, a hub dataset's commit."""
    free = ("out_dir", "workers", "max_bad_rows", *(() if config.part else ("part",)))
    settings = {name: value for name, value in asdict(config).items() if name not in free}
    files, (first, every) = [], share_of(config.part)
    if config.source != "embedded":
        files = (source_files(config.source) or [])[first::every]
    settings["source_files"] = [[path.name, path.stat().st_size] for path in files]
    return settings | ({"commit": commit} if commit else {})


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
    return ", ".join(
        f"{name}={shown(old, new)} there, {shown(new, old)} here" for name, old, new in pairs if old != new
    )


def shown(value, other) -> str:
    """A setting in a sentence; of a list, as of files, the first few items that the other one lacks."""
    if not (isinstance(value, list) and isinstance(other, list)):
        return repr(value)
    known = set(map(str, other))
    own = [item for item in value if str(item) not in known]
    return f"{own[:3]}" + (f" and {len(own) - 3} more" if own[3:] else "")


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
