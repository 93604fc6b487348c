"""Where text and conversations come from: local files and folders, or a dataset of the hub."""

import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

from common import InputError, one_line

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
TXT_PIECE = 20_000  # characters: a longer .txt is cut, at line ends, into documents of about this size


def source_rows(source: str, name: str, split: str) -> Iterator[tuple[dict, str]]:
    """Rows of files and folders (with commas between), or of a hub dataset, each with the place it was found.

    Raises InputError for what is missing, empty, damaged or cut short.
    """
    files = source_files(source)
    if files is None:
        yield from hub_rows(source, name, split)
    for path in files or []:
        number = 0
        try:
            reader = {".txt": read_txt, ".parquet": read_parquet}.get(path.suffix, read_jsonl)
            for number, row in enumerate(reader(path), 1):
                if not isinstance(row, dict):
                    raise InputError(
                        f"row {number} of {path} is {type(row).__name__}, expected a JSON object"
                    )
                yield row, f"row {number} of {path}"
        except (OSError, ValueError) as error:  # pyarrow's errors, json's and Unicode's are of these kinds
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path} cannot be read beyond row {number}, it is damaged or cut short: {error}"
            ) from error


def source_files(source: str) -> list[Path] | None:
    """The files that a source names, folders searched, in sorted order; None if it is a hub dataset's id."""
    paths = [Path(part) for part in source.split(",")]
    missing = [path for path in paths if not path.exists()]
    if missing and len(paths) == 1 and source.count("/") <= 1 and not source.endswith(SUFFIXES):
        return None
    if missing:
        raise InputError(f"{missing[0]} does not exist; give files, folders, a hub dataset's id, or embedded")
    files = []
    for path in paths:
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [p for p in inside if p.name.endswith(SUFFIXES)]
        if not found:
            raise InputError(
                f"{path} holds nothing to read; expected files that end in {', '.join(SUFFIXES)}"
            )
        files += found
    return files


def read_txt(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8") as file:
        while piece := file.read(TXT_PIECE):
            yield {"text": piece + file.readline(TXT_PIECE)}


def read_parquet(path: Path) -> Iterator[dict]:
    import pyarrow.parquet

    # pyarrow would by default keep all that it has read ahead, in the end the whole file
    file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    for batch in file.iter_batches(batch_size=256):
        yield from batch.to_pylist()


def read_jsonl(path: Path) -> Iterator[dict]:
    import pyarrow

    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pyarrow.input_stream(str(path), compression=compression) as stream:
        for line in io.BufferedReader(stream, 1 << 20):
            if line.strip():
                yield json.loads(line)


def hub_rows(source: str, name: str, split: str) -> Iterator[tuple[dict, str]]:
    """Rows of a hub dataset, streamed."""
    from datasets import load_dataset
    from huggingface_hub.utils import httpx

    try:
        rows = load_dataset(source, name or None, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError, httpx.HTTPError) as error:
        raise InputError(
            f"no file or folder {source}, and no dataset of that name could be had from the hub: "
            f"{one_line(error)}"
        ) from error
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            yield row, f"row {number} of {source}"
    except (OSError, httpx.HTTPError) as error:
        raise InputError(
            f"{source} broke off after row {number} ({one_line(error)}); run the same command again, "
            f"it continues"
        ) from error
    except (ValueError, TypeError) as error:  # of pyarrow and datasets, about what the files hold
        raise InputError(
            f"{source} cannot be read beyond row {number}, it is damaged or its rows differ in type: "
            f"{one_line(error)}"
        ) from error


def column_of(row: dict, column: str, kind: type, where: str):
    """The value in a row's column; InputError names the columns there are, or the type it has."""
    if column not in row:
        raise InputError(
            f"{where} has no column {column!r}, but {', '.join(map(repr, row))}; name one with --column"
        )
    if not isinstance(row[column], kind):
        raise InputError(f"{where}: {column!r} is {type(row[column]).__name__}, expected {kind.__name__}")
    if kind is str and (half := half_surrogate(row[column])):
        raise InputError(
            f"{where}: {column!r} is no Unicode text: it holds {half!r}, half of a surrogate pair"
        )
    return row[column]


def half_surrogate(text: str) -> str | None:
    """The first half of a surrogate pair in a text, which JSON can spell but no UTF-8 holds."""
    found = None if text.isascii() else re.search("[\ud800-\udfff]", text)
    return found and found[0]


def hash_fraction(text: str) -> float:
    """A number in [0, 1) picked by a text's hash; it settles on which side of a split the text falls."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
