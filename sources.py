"""Where text and conversations come from: local files and folders, or a dataset of the hub."""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from common import InputError, fingerprint, half_surrogate, one_line, patiently, read_json, write_json

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
HELD_BACK = {"test", "val", "validation", "dev", "eval"}  # words in the names of files not meant for training
TXT_PIECE = 20_000  # characters: a longer .txt is cut, at line ends, into documents of about this size


def source_rows(
    source: str, name: str, split: str, *, commit: str | None = None
) -> Iterator[tuple[dict, str]]:
    """Rows of files and folders (with commas between), or of a hub dataset, each with the place it was found.

    A commit is one of the hub dataset's. A row that is no object is given as it is; a damaged row as its
    ValueError. Raises InputError for what is missing or empty, and for a file that is damaged or cut short.
    """
    for rows in rows_by_file(source, name, split, commit=commit):
        yield from rows


def rows_by_file(
    source: str,
    name: str,
    split: str,
    *,
    share: tuple[int, int] = (0, 1),
    start: int = 0,
    commit: str | None = None,
) -> Iterator[Iterator[tuple[dict, str]]]:
    """The rows of source_rows, file by file. A share (i, n) has every n-th of the files from the i-th on. The
    first `start` files of the share are not opened."""
    files, (first, every) = source_files(source), share
    if files is not None:
        if not (split or "train").startswith("train"):
            raise InputError(
                f"{source} is read whole, and the split {split!r} is for datasets of the hub; leave it out "
                f"and name the files that you want, or in a mix give each source its own, as {split},train"
            )
        yield from map(file_rows, files[first::every][start:])
        return
    stream = hub_stream(source, name, split, commit)
    for number in range(first, stream.num_shards, every)[start:]:
        yield hub_rows(stream, number, source)


def file_rows(path: Path) -> Iterator[tuple[object, str]]:
    """Rows of a local file, see source_rows."""
    number = 0
    try:
        reader = {".txt": read_txt, ".parquet": read_parquet}.get(path.suffix, read_jsonl)
        for number, row in enumerate(reader(path), 1):
            yield row, f"row {number} of {path}"
    except (OSError, ValueError) as error:  # pyarrow's errors, json's and Unicode's are of these kinds
        if isinstance(error, InputError):
            raise
        if isinstance(error, UnicodeDecodeError) and error.reason != "unexpected end of data":
            raise InputError(
                f"{path} is no UTF-8 beyond row {number} ({one_line(error)}); convert it to UTF-8"
            ) from error
        raise InputError(
            f"{path} cannot be read beyond row {number}, it is damaged or cut short "
            f"({one_line(error)}); bring a whole one"
        ) from error


def source_files(source: str) -> list[Path] | None:
    """The files that a source names, folders searched, in sorted order; None if it is a hub dataset's id."""
    parts = source.split(",")
    if not all(part.strip() for part in parts):
        raise InputError(
            f"the source {source!r} has an empty name in it; give files, folders, a hub dataset's id, or "
            f"embedded, with commas between them only"
        )
    paths = [Path(part) for part in parts]
    missing = [path for path in paths if not os.path.exists(path)]
    if missing and len(paths) == 1 and source.count("/") <= 1 and not source.endswith(SUFFIXES):
        return None
    if missing and len(paths) > 1:
        raise InputError(
            f"{missing[0]} does not exist or cannot be reached; commas join files and folders only; "
            f"sft_gpt.py mixes any sources by weights, as embedded:0.5,mine.jsonl:0.5"
        )
    if missing:
        raise InputError(
            f"{missing[0]} does not exist or cannot be reached; give files, folders, a hub dataset's id, or "
            f"embedded"
        )
    files, names = [], {}
    for path in paths:
        inside = files_below(path) if path.is_dir() else [path]
        readable = [p for p in inside if p.name.endswith(SUFFIXES)]
        for lost in (p for p in readable if not os.path.isfile(p)):
            raise InputError(f"{lost} is no file, or a link to nothing; mend it or take it away")
        if not readable:
            raise InputError(
                f"{path} holds nothing to read; expected files that end in {', '.join(SUFFIXES)}"
            )
        for file in readable:
            status = file.stat()
            if (first := names.setdefault((status.st_dev, status.st_ino), path)) is not path:
                raise InputError(f"{file} is in the source twice, by {first} and by {path}; name it once")
        files += readable
    return files


def ending(file: Path) -> str:
    """A file's suffix, with the one before it if it is compressed; the name of a file without any."""
    compressed = file.suffix in (".gz", ".zst")
    return "".join(file.suffixes[-2 if compressed else -1 :]) or file.name


def folder_notes(source: str) -> list[str]:
    """Lines about files in a source's folders that a user may not expect: those whose names end otherwise are
    not read; those of a test split are."""
    files = [file for path in map(Path, source.split(",")) if path.is_dir() for file in files_below(path)]
    left, notes = [file for file in files if not file.name.endswith((*SUFFIXES, ".md"))], []
    if left:
        ends = sorted({ending(file) for file in left})
        told = ", ".join(ends[:5]) + (", …" if len(ends) > 5 else "")
        notes = [
            f"{source}: {len(left)} files are not read ({told}); names must end in {', '.join(SUFFIXES)}"
        ]
    read = [file for file in files if file.name.endswith(SUFFIXES)]
    first = {}
    for file in read:
        status = file.stat()
        if (same := first.setdefault((status.st_dev, status.st_ino), file)) is not file:
            notes.append(f"{source}: {file.name} is the same file as {same.name}; both are read")
    tests = [file for file in read if HELD_BACK & set(re.split("[^a-z]+", file.name.lower()))]
    if tests:
        notes.append(
            f"{source}: all {len(read)} files are read, {tests[0].name} too; name those that you want"
        )
    return notes


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and those below it, sorted, but for hidden ones: editors and file managers keep
    copies there. Links are followed, but no folder is read twice."""

    def refuse(error: OSError):
        raise InputError(
            f"{error.filename} cannot be searched for files ({error.strerror}); change its permissions, or "
            f"name another source"
        ) from error

    files, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        here = os.stat(place)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(place) / name for name in names if not name.startswith(".")]
    return sorted(files)


def read_txt(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8-sig") as file:  # without the mark that Windows' editors put first
        while piece := file.read(TXT_PIECE):
            yield {"text": piece + file.readline(TXT_PIECE)}


def read_parquet(path: Path) -> Iterator[dict | ValueError]:
    """The rows, as arrow_rows gives them."""
    import pyarrow.parquet

    # pyarrow would by default keep all that it has read ahead, in the end the whole file
    file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    for batch in file.iter_batches(batch_size=256):
        yield from arrow_rows(batch)


def arrow_rows(batch) -> list[dict | ValueError]:
    """The rows of an Arrow batch or table. What Python cannot represent in a row, as a text that is no UTF-8
    or a date beyond its calendar, is a ValueError under its column."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        if batch.num_rows > 1:
            return [row for i in range(batch.num_rows) for row in arrow_rows(batch.slice(i, 1))]
    row = {}
    for name, values in zip(batch.column_names, batch.columns):
        try:
            (row[name],) = values.to_pylist()
        except (ValueError, OverflowError) as error:
            row[name] = ValueError(one_line(error))
    return [row]


def open_maybe_compressed(path: Path) -> io.BufferedReader:
    """A file's bytes, those of .gz and .zst decompressed; only these need pyarrow."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    if compression is None:
        return open(path, "rb", 1 << 20)
    import pyarrow

    if not path.stat().st_size:
        raise ValueError("it has 0 bytes, and a compressed file has more")
    return io.BufferedReader(pyarrow.input_stream(str(path), compression=compression), 1 << 20)


def read_jsonl(path: Path) -> Iterator[object]:
    """The value of each line; for a line that is no JSON, its ValueError. An invalid last line without a
    newline, as in a file cut short, raises it instead."""
    with open_maybe_compressed(path) as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except RecursionError:
                row = ValueError("it is nested too deeply")
            except ValueError as error:
                if not line.endswith(b"\n"):
                    raise
                row = error
            yield row


def count_files(source: str, name: str, split: str, commit: str | None = None) -> int:
    """How many files a source has that shares can be made of."""
    files = source_files(source)
    return hub_stream(source, name, split, commit).num_shards if files is None else len(files)


def hub_commits(sources: Iterable[str], known: dict[str, str], notes: Path) -> dict[str, str]:
    """The commit of each source that is a hub dataset: the known one, else its newest. A dataset whose commit
    nobody knows is left out."""
    named = [source for source in sources if source != "embedded" and source_files(source) is None]
    commits = {source: known.get(source) or newest_commit(source, notes) for source in named}
    return {source: commit for source, commit in commits.items() if commit}


def commit_note(dataset: str, notes: Path) -> Path:
    """Where newest_commit notes a hub dataset's commit."""
    return notes / f"commit-{fingerprint(dataset)}.json"


def newest_commit(dataset: str, notes: Path | None = None) -> str | None:
    """A hub dataset's newest commit, kept in a note. If the hub cannot be reached, as on a compute node, the
    noted one; None without a note. Reading the dataset then tells what is wrong."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import httpx

    note = notes and commit_note(dataset, notes)
    try:
        commit = patiently(lambda: HfApi().dataset_info(dataset, timeout=10).sha)
    except (OSError, ValueError, httpx.HTTPError):
        return read_json(note)["commit"] if note and note.exists() else None
    if note:
        write_json(note, {"dataset": dataset, "commit": commit})
    return commit


def hub_stream(source: str, name: str, split: str, commit: str | None = None):
    """A hub dataset, whose rows come as they are asked for; InputError if it cannot be had."""
    from datasets import load_dataset
    from huggingface_hub.utils import httpx

    try:
        return patiently(
            lambda: load_dataset(source, name or None, split=split, revision=commit, streaming=True)
        )
    except (OSError, ValueError, RuntimeError, httpx.HTTPError) as error:
        raise InputError(
            f"no file or folder {source}, and no dataset of that name could be had from the hub; "
            f"name what is there{f', or another configuration than {name}' if name else ''}, or see that the "
            f"hub can be reached: {one_line(error)}"
        ) from error


def hub_rows(stream, file: int, source: str) -> Iterator[tuple[object, str]]:
    """Rows of one of the files, counted from 0, that hub_stream reads, as arrow_rows gives them."""
    from huggingface_hub.utils import httpx

    if stream.num_shards > 1:
        stream = stream.shard(num_shards=stream.num_shards, index=file, contiguous=False)
        source = f"file {file + 1} of {source}"
    number = 0
    try:
        # Tables of one row each: asked for Python's objects, datasets would give up at such a text.
        for number, table in enumerate(stream.with_format("arrow"), 1):
            yield arrow_rows(table)[0], f"row {number} of {source}"
    except (OSError, httpx.HTTPError) as error:
        raise InputError(
            f"{source} broke off after row {number} ({one_line(error)}); run the same command again, "
            f"it continues"
        ) from error
    except (ValueError, TypeError) as error:  # of pyarrow and datasets, about what the files hold
        raise InputError(
            f"{source} cannot be read beyond row {number}, it is damaged or its rows differ in type "
            f"({one_line(error)}); name other files of it, or mend it"
        ) from error


def column_of(row: object, column: str) -> object:
    """The value in a row's column; ValueError, with the reason, for a row without it."""
    if isinstance(row, json.JSONDecodeError):  # one reason for all such rows, wherever each is damaged
        raise ValueError("it is damaged; expected a JSON object in one line")
    if isinstance(row, ValueError):
        raise ValueError(f"it is damaged ({one_line(row)})")
    if not isinstance(row, dict):
        raise ValueError(f"it is {type(row).__name__}, not a JSON object")
    if column not in row:
        raise ValueError(
            f"it has no column {column!r}, only {', '.join(map(repr, row)) or 'none'}; name one with --column"
        )
    if isinstance(row[column], ValueError):
        raise ValueError(f"its {column!r} is damaged ({row[column]})")
    return row[column]


def text_of(row: object, column: str) -> str:
    """The text in a row's column; ValueError, with the reason, for a row without one."""
    value = column_of(row, column)
    if not isinstance(value, str):
        raise ValueError(f"{column!r} is {type(value).__name__}, not str")
    if half := half_surrogate(value):
        raise ValueError(f"{column!r} is no Unicode text: it holds {half!r}, half of a surrogate pair")
    return value


class BadRows:
    """Counts the rows of a source that cannot be used, and refuses a source that has too many."""

    def __init__(self, max_share: float, counts: Sequence = (0, 0, "")):
        self.max_share = max_share
        self.rows, self.bad, self.first = counts

    def counts(self) -> tuple[int, int, str]:
        return self.rows, self.bad, self.first

    def good(self) -> None:
        self.rows += 1

    def skip(self, where: str, reason: str) -> None:
        """Count a bad row; InputError if among a thousand and more there are too many."""
        self.rows, self.bad = self.rows + 1, self.bad + 1
        self.first = self.first or f"{where}: {reason}"
        if self.rows >= 1000:
            self.check()

    def check(self) -> None:
        """At the end: InputError if the share of bad rows is too large."""
        if self.bad > self.max_share * self.rows:
            raise InputError(
                f"{self.bad} of {self.rows} rows cannot be used, more than --max_bad_rows={self.max_share} "
                f"allows; mend them, or raise it; the first is {self.first}"
            )

    def note(self) -> str | None:
        """A line about what was skipped, if anything."""
        return f"{self.bad} of {self.rows} rows skipped; the first is {self.first}" if self.bad else None


def hash_fraction(text: str) -> float:
    """A number in [0, 1) picked by a text's hash; it settles on which side of a split the text falls."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
