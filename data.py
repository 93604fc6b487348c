"""Tokenizers, token shards on disk, and the order in which training reads them.

A shard is a flat file of token ids behind a header of 256 int32 (magic 20240520, version, count), the public
format of llm.c and modded-nanogpt: version 1 stores uint16 ids, version 2 (ours, for vocabularies above
65,535) uint32. Each document begins with <|endoftext|>. `manifest.json` beside the shards names the tokenizer
and each shard's size and hash; shards of others, without a manifest, work too when `*train*.bin` and
`*val*.bin` tell the splits apart.

T context length in tokens.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from gpt import InputError, one_line, read_json

END, TURN_START, TURN_END = SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MAGIC, HEADER_INTS = 20240520, 256
DTYPES = {1: np.dtype("<u2"), 2: np.dtype("<u4")}  # by the header's version
# ChatML; the generation marks let `apply_chat_template(..., return_assistant_tokens_mask=True)` give the loss
# mask.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# -- sources -------------------------------------------------------------------------------------------------

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


# -- tokenizers ----------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterator[str], vocab_size: int):
    """A byte-level BPE of vocab_size ids, the special ones first; GPT-2's splitting, digits apart."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(SPECIALS):
        raise InputError(
            f"vocab_size is {vocab_size}; a byte-level one needs at least {len(alphabet) + len(SPECIALS)}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return with_chatml(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def load_tokenizer(name: str | Path):
    """Any Hugging Face tokenizer, by directory or hub id, made ready for ChatML; or InputError."""
    from huggingface_hub.utils import httpx
    from transformers import AutoTokenizer

    files = [Path(name) / file for file in ("tokenizer.json", "tokenizer.model", "vocab.json")]
    if Path(name).is_dir() and not any(file.exists() for file in files):  # else an empty one would be made up
        raise InputError(f"{name} holds no tokenizer; expected a tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name))
    except (OSError, ValueError, KeyError, httpx.HTTPError) as error:
        raise InputError(f"no tokenizer could be loaded from {name}: {one_line(error)}") from error
    if not tokenizer.is_fast:
        raise InputError(
            f"{name} is a slow tokenizer; only those of the tokenizers library (tokenizer.json) are supported"
        )
    return with_chatml(tokenizer)


def with_chatml(tokenizer):
    """Add the special tokens that a tokenizer lacks, `new_tokens` of them, and set the ChatML template."""
    from tokenizers import AddedToken

    tokenizer.new_tokens = tokenizer.add_tokens(
        [AddedToken(t, special=True, normalized=False) for t in SPECIALS], special_tokens=True
    )
    tokenizer.eos_token = tokenizer.pad_token = END
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, on all cores, with no special id: text that looks like a special token stays text."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer may have been saved with them
    backend.no_padding()
    backend.encode_special_tokens = True  # the library's name for: as the text that they are spelled with
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = False


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of all that decides how text becomes ids; equal for a tokenizer and its saved copy."""
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {name: fields[name] for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()[:16]


# -- shards --------------------------------------------------------------------------------------------------


def write_json(path: Path, value) -> None:
    """Replace a JSON file in one step: a reader sees the old or the new, also after a crash."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "w") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class ShardWriter:
    """Appends documents to one split's shards, `train_000000.bin`, …; each is `.partial` until it is full and
    on disk.

    `position` names a place that `seek` returns to, which is how a stopped preparation goes on with the same
    bytes.
    """

    def __init__(self, folder: Path, split: str, version: int, shard_tokens: int):
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
        while len(ids):
            if self.file is None:
                self.open()
            part, ids = np.split(ids, [self.shard_tokens - self.count])
            self.file.write(part.astype(DTYPES[self.version]).tobytes())
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
        self.shards.append(
            {
                "file": path.name,
                "tokens": self.count,
                "bytes": path.stat().st_size,
                "sha256": file_sha256(path),
            }
        )
        self.file, self.count = None, 0

    def position(self) -> dict:
        return {"shards": list(self.shards), "count": self.count, "totals": dict(self.totals)}

    def seek(self, position: dict) -> None:
        """Return to a position: shards made since are dropped, the one then open is cut back."""
        self.shards, self.totals = list(position["shards"]), dict(position["totals"])
        path = self.path()
        if path.exists():  # it was finished after the position was taken
            path.replace(path.with_suffix(".bin.partial"))
        for later in self.folder.glob(f"{self.split}_*.bin*"):
            if later.name.split(".")[0] > path.stem or (
                position["count"] == 0 and later.name.split(".")[0] == path.stem
            ):
                later.unlink()
        self.count = position["count"]
        if self.count:
            self.file = open(path.with_suffix(".bin.partial"), "r+b")
            self.file.truncate(4 * HEADER_INTS + self.count * DTYPES[self.version].itemsize)
            self.file.seek(0, os.SEEK_END)


def read_shard(path: Path) -> np.ndarray:
    """A shard's ids, memory-mapped; InputError if its header is not one of ours or the file is cut short."""
    header = np.fromfile(path, "<i4", HEADER_INTS)
    if len(header) < HEADER_INTS or header[0] != MAGIC or header[1] not in DTYPES:
        raise InputError(f"{path} is no token shard: expected a header with magic {MAGIC} and version 1 or 2")
    dtype, count = DTYPES[int(header[1])], int(header[2])
    expected = 4 * HEADER_INTS + count * dtype.itemsize
    if path.stat().st_size != expected:
        raise InputError(
            f"{path} has {path.stat().st_size} bytes, its header says {expected}; copy or prepare it again"
        )
    return np.memmap(path, dtype, "r", offset=4 * HEADER_INTS, shape=(count,))


def verify_shards(folder: Path, manifest: dict) -> None:
    """Compare every shard with the manifest; InputError names the first that differs.

    Hashing reads all the data, so shards found right are noted by modification time in `.verified.json`, and
    later runs only look at size and time.
    """
    note = folder / ".verified.json"
    seen = read_json(note) if note.exists() else {}
    before = dict(seen)
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        size = path.stat().st_size if path.exists() else None
        if size != shard["bytes"]:
            raise InputError(
                f"{path} has {size or 'no'} bytes, the manifest says {shard['bytes']}; prepare the data again"
            )
        stamp = [shard["sha256"], path.stat().st_mtime_ns]
        if seen.get(shard["file"]) != stamp:
            if file_sha256(path) != shard["sha256"]:
                raise InputError(
                    f"{path} is not what was prepared: its SHA-256 differs from the manifest's; "
                    f"prepare the data again"
                )
            seen[shard["file"]] = stamp
    if seen != before and os.access(folder, os.W_OK):
        write_json(note, seen)


# -- reading order -------------------------------------------------------------------------------------------


def mix(x: np.ndarray, key: int) -> np.ndarray:
    """A well-mixed 64-bit hash of integers (the finalizer of MurmurHash3, with a key)."""
    x = x ^ np.uint64(key)
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(multiplier)
    return x ^ (x >> np.uint64(33))


def shuffled(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a keyed permutation of 0 … n-1 sends each index, in constant memory.

    A Feistel network permutes the 4^k numbers from n on up; an image that is not below n is sent on until it
    is (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    x = np.asarray(index, np.uint64)
    outside = np.ones(x.shape, bool)
    while outside.any():
        left, right = x[outside] >> half, x[outside] & low
        for turn in range(6):
            left, right = right, left ^ (mix(right, key + turn * 0x9E3779B97F4A7C15 & 2**64 - 1) & low)
        x[outside] = left << half | right
        outside = x >= n
    return x.astype(np.int64)


def batch_order(seed: int, step: int, batch: int, n: int) -> np.ndarray:
    """Which of n samples make up a step's global batch, a pure function; an epoch is a fresh permutation."""
    positions = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
    order = np.empty(batch, np.int64)
    for epoch in np.unique(positions // n):
        here = positions // n == epoch
        key = int(mix(np.array([epoch], np.uint64), int(mix(np.array([seed % 2**64], np.uint64), 0)[0]))[0])
        order[here] = shuffled(positions[here] % n, n, key)
    return order


class TokenLoader:
    """The windows of one split: T tokens each, and the T that follow by one. None crosses shards."""

    def __init__(self, folder: str | Path, split: str, context_length: int):
        self.folder, self.T = Path(folder), context_length
        self.paths = sorted(self.folder.glob(f"*{split}*.bin"))
        self.shards = [read_shard(path) for path in self.paths]
        self.ends = np.cumsum([max(0, (len(shard) - 1) // context_length) for shard in self.shards])
        if not len(self.ends) or self.ends[-1] == 0:
            found = f"{sum(map(len, self.shards))} tokens" if self.shards else "no shard"
            raise InputError(
                f"the {split} split in {folder} has {found}, too few for one window of {context_length + 1}; "
                f"prepare more data, raise --val_fraction, or lower --context_length"
            )

    def __len__(self) -> int:
        return int(self.ends[-1])

    def batch(self, windows: Sequence[int], vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Input ids and targets, (B, T) int64 each; InputError for an id beyond the vocabulary."""
        rows = np.empty((len(windows), self.T + 1), np.int64)
        for row, window in zip(rows, windows):
            shard = int(np.searchsorted(self.ends, window, side="right"))
            start = (window - (self.ends[shard - 1] if shard else 0)) * self.T
            row[:] = self.shards[shard][start : start + self.T + 1]
            if row.max() >= vocab_size:
                raise InputError(
                    f"{self.paths[shard]} holds token id {row.max()}, beyond the vocabulary of {vocab_size}: "
                    f"it was made with another tokenizer"
                )
        ids = torch.from_numpy(rows)
        return ids[:, :-1], ids[:, 1:]

    def text_bytes(self, windows: Sequence[int], tokenizer) -> int:
        """UTF-8 bytes of the text that these windows' targets spell: what turns nats into bits per byte."""
        rows = self.batch(windows, len(tokenizer))[1].tolist()
        return sum(len(tokenizer.decode(row, skip_special_tokens=True).encode()) for row in rows)


def open_data(folder: str | Path, tokenizer_name: str = "") -> tuple[dict, object]:
    """The manifest and tokenizer of a data directory, its shards verified.

    Shards without a manifest (llm.c's, modded-nanogpt's) need tokenizer_name. Raises InputError for shards
    that differ from the manifest or a tokenizer that is not the one they were made with.
    """
    folder = Path(folder)
    if (folder / "manifest.json").exists():
        manifest = read_json(folder / "manifest.json")
        verify_shards(folder, manifest)
        tokenizer = load_tokenizer(tokenizer_name or folder / "tokenizer")
        found, expected = tokenizer_fingerprint(tokenizer), manifest["tokenizer_fingerprint"]
        if found != expected:
            raise InputError(
                f"the shards in {folder} were made with tokenizer {manifest['tokenizer']} ({expected}), not "
                f"with {tokenizer_name or folder / 'tokenizer'} ({found}); use that one or prepare again"
            )
        return manifest, tokenizer
    if not folder.is_dir() or not any(folder.glob("*.bin")):
        raise InputError(f"{folder} holds no token shards; make them with prepare_data.py --out_dir={folder}")
    if not tokenizer_name:
        raise InputError(
            f"{folder} has no manifest.json to name the tokenizer of its shards; give it, as --tokenizer=gpt2"
        )
    shards = []  # told apart, as many are of one size, by how they begin: hashing all would take minutes
    for path in sorted(folder.glob("*.bin")):
        with open(path, "rb") as file:
            begins = hashlib.sha256(file.read(1 << 20)).hexdigest()
        shards.append({"file": path.name, "bytes": path.stat().st_size, "begins": begins})
    return {"shards": shards}, load_tokenizer(tokenizer_name)
