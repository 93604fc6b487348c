"""From text to shards, stopped and continued anywhere."""

import gc
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import (
    ODD_TEXTS,
    ROOT,
    TEXTS,
    contents,
    prepare,
    prepare_config,
    read_documents,
    read_ids,
    refused,
    text,
    write_jsonl,
)
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import data
import prepare_data
import shards
import sources
import tokenization
from common import InputError
from data import verified_manifest
from shards import ShardWriter
from sources import hash_fraction
from tokenization import SPECIALS, encode, load_tokenizer, tokenizer_fingerprint


@pytest.mark.parametrize("vocab_size, version", [(65_535, 1), (65_536, 2)])
def test_ids_are_uint32_as_soon_as_the_vocabulary_is_above_65535(
    tmp_path, monkeypatch, source, vocab_size, version
):
    words = [*SPECIALS, *(f"w{i}" for i in range(vocab_size - 3))]
    big = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[-1]))
    big = PreTrainedTokenizerFast(tokenizer_object=big)
    monkeypatch.setattr(shards, "load_tokenizer", lambda name: tokenization.with_chatml(big))
    monkeypatch.setattr(prepare_data, "save_tokenizer", lambda *_: None)
    prepare(tmp_path / "out", source, "big", val_fraction=1e-9)
    assert len(big) == vocab_size
    assert read_ids(tmp_path / "out", "train") == [0, vocab_size - 1] * len(TEXTS)
    assert (tmp_path / "out/train_000000.bin").read_bytes()[4] == version


def test_an_id_beyond_the_tokenizers_length_is_stored_as_it_is(tmp_path, monkeypatch, source):
    sparse = Tokenizer(
        models.WordLevel({**{t: i for i, t in enumerate(SPECIALS)}, "?": 70_000}, unk_token="?")
    )
    sparse = PreTrainedTokenizerFast(tokenizer_object=sparse)
    monkeypatch.setattr(shards, "load_tokenizer", lambda name: tokenization.with_chatml(sparse))
    out = prepare(tmp_path / "out", source, "sparse", val_fraction=1e-9)
    assert len(sparse) == 4 and read_ids(out, "train") == [0, 70_000] * len(TEXTS)
    assert json.loads((out / "manifest.json").read_text())["vocab_size"] == 70_001


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
    assert tokenizer_fingerprint(load_tokenizer(prepared / "tokenizer")) == manifest["tokenizer_fingerprint"]
    assert verified_manifest(prepared) == manifest


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


def test_a_manifest_cut_short_is_refused_and_nothing_is_touched(copied, source, tokenizer_dir):
    path = copied / "manifest.json"
    path.write_text(path.read_text()[:100])
    before = contents(copied)
    refused("manifest.json cannot be read", verified_manifest, copied)
    refused("manifest.json cannot be read", prepare, copied, source, tokenizer_dir)
    assert contents(copied) == before


class Stop(BaseException):
    """What no code catches, as a KeyboardInterrupt."""


def stopped(monkeypatch, name: str, after: int, out, *arguments, **changes) -> None:
    """Prepare until shards.<name>, `documents` or `encode`, has given so many documents or batches."""
    real = getattr(shards, name)

    def texts(*arguments, **options):
        yield from itertools.islice(real(*arguments, **options), after)
        raise Stop

    calls = itertools.count()

    def batches(*arguments):
        if next(calls) == after:
            raise Stop
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shards, name, texts if name == "documents" else batches)
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
    monkeypatch.setattr(shards, "BATCH_DOCUMENTS", 2)
    out = tmp_path / "out"
    for save_every, after in ((10**9, 15), (200, 3), (10**9, 12)):
        monkeypatch.setattr(shards, "SAVE_EVERY", save_every)
        stopped(monkeypatch, "encode", after, out, source, tokenizer_dir)
    positions = json.loads((out / "progress.json").read_text())["positions"]
    assert len(positions["train"]["shards"]) + 1 < len(list(out.glob("train_*.bin")))
    assert contents(prepare(out, source, tokenizer_dir)) == contents(prepared)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_begun_shard_that_has_lost_bytes_is_not_filled_with_zeros(
    damage, tmp_path, monkeypatch, source, tokenizer_dir, often
):
    out = tmp_path / "out"
    stopped(monkeypatch, "encode", 6, out, source, tokenizer_dir)
    (begun,) = out.glob("train_*.bin.partial")
    whole = begun.read_bytes()
    if damage == "cut":
        os.truncate(begun, 1030)
    else:
        begun.unlink()
    refused(f"{begun} is missing or has lost bytes", prepare, out, source, tokenizer_dir)
    begun.write_bytes(whole)
    prepare(out, source, tokenizer_dir)


def test_a_preparation_notes_its_shards_as_verified_so_that_no_run_hashes_them(prepared, monkeypatch):
    monkeypatch.setattr(data, "file_sha256", None)
    assert len(data.verified_shards(prepared)) == len(list(prepared.glob("*.bin"))) > 2
    assert data.damaged_shards(prepared, data.read_manifest(prepared)) == {}


def test_a_preparation_goes_on_only_if_the_files_that_it_has_read_are_still_the_first(
    tmp_path, monkeypatch, tokenizer_dir, often
):
    folder, out = tmp_path / "source", tmp_path / "out"
    folder.mkdir()
    for i in range(4):
        write_jsonl(folder / f"{i}.jsonl", [{"text": text} for text in TEXTS[i * 9 : i * 9 + 9]])
    undisturbed = prepare(tmp_path / "undisturbed", folder, tokenizer_dir)
    stopped(monkeypatch, "encode", 5, out, folder, tokenizer_dir)
    before = contents(out)
    assert json.loads(before["progress.json"])["file"] > 0
    for name, content in (("+.jsonl", '{"text": "new"}\n'), ("0.jsonl", '{"text": "another"}\n')):
        was = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_text(content)
        refused("the first \\d files of the source, .* are others now", prepare, out, folder, tokenizer_dir)
        assert contents(out) == before
        (folder / name).write_bytes(was) if was else (folder / name).unlink()
    assert data_files(prepare(out, folder, tokenizer_dir)) == data_files(undisturbed)


def data_files(folder) -> dict[str, bytes]:
    return {name: raw for name, raw in contents(folder).items() if name.endswith(".bin")}


def test_a_hub_dataset_is_read_at_the_commit_that_its_preparation_began_with(
    tmp_path, monkeypatch, tokenizer_dir, often
):
    newest, read = ["a" * 40], []

    def rows_by_file(*source, commit, start, share):
        read.append(commit)
        rows = [({"text": text}, "a row") for text in TEXTS]
        return iter([iter(rows)][start:])

    monkeypatch.setattr(shards, "newest_commit", lambda dataset: newest[0])
    monkeypatch.setattr(shards, "rows_by_file", rows_by_file)
    stopped(monkeypatch, "encode", 3, tmp_path / "out", "some/dataset", tokenizer_dir)
    newest[0] = "b" * 40
    out = prepare(tmp_path / "out", "some/dataset", tokenizer_dir)
    assert read == ["a" * 40] * 2
    assert json.loads((out / "manifest.json").read_text())["settings"]["commit"] == "a" * 40
    (out / "train_000000.bin").write_bytes(b"damaged")
    prepare(out, "some/dataset", tokenizer_dir)
    prepare(tmp_path / "new", "some/dataset", tokenizer_dir)
    assert read == ["a" * 40] * 3 + ["b" * 40]


@pytest.mark.parametrize("after", [3, 5, 7, 8])
def test_a_continued_preparation_opens_no_file_that_is_done_and_counts_bad_rows_as_an_undisturbed_one(
    after, tmp_path, monkeypatch, tokenizer_dir, often, capsys
):
    folder, opened, read = tmp_path / "source", [], sources.read_jsonl
    folder.mkdir()
    for i in range(4):
        rows = [{"text": text} for text in TEXTS[i * 9 : i * 9 + 9]]
        write_jsonl(folder / f"{i}.jsonl", [{"text": None}] * (i + 1) + rows)
    undisturbed = prepare(tmp_path / "undisturbed", folder, tokenizer_dir, max_bad_rows=0.5)
    told = capsys.readouterr().out
    assert f"10 of 46 rows skipped; the first is row 1 of {folder / '0.jsonl'}" in told
    stopped(monkeypatch, "encode", after, tmp_path / "out", folder, tokenizer_dir, max_bad_rows=0.5)
    note = json.loads((tmp_path / "out/progress.json").read_text())
    assert note["documents"] and note["documents_in_file"] == note["documents"] - 9 * note["file"]
    monkeypatch.setattr(sources, "read_jsonl", lambda path: opened.append(path.name) or read(path))
    capsys.readouterr()
    prepare(tmp_path / "out", folder, tokenizer_dir, max_bad_rows=0.5)
    assert opened == [f"{i}.jsonl" for i in range(note["file"], 4)]
    assert capsys.readouterr().out.endswith(told)
    assert contents(tmp_path / "out") == contents(undisturbed)


def test_a_note_of_before_files_were_noted_continues_from_the_first_file(
    tmp_path, monkeypatch, source, tokenizer_dir, prepared, often
):
    stopped(monkeypatch, "encode", 5, tmp_path / "out", source, tokenizer_dir)
    note = json.loads((tmp_path / "out/progress.json").read_text())
    older = {name: note[name] for name in ("settings", "documents", "positions")}
    assert note["documents"] > 0
    (tmp_path / "out/progress.json").write_text(json.dumps(older))
    assert contents(prepare(tmp_path / "out", source, tokenizer_dir)) == contents(prepared)


@contextmanager
def copied_at_each_operation(monkeypatch, out: Path, folder: Path):
    """Copies a folder to folder/0, 1, … before each file operation of the block; yields the operations."""
    points = []

    def copying(name, real):
        def operation(*arguments, **keywords):
            if out.exists():
                shutil.copytree(out, folder / str(len(points)))
                points.append(f"{len(points)}, {name} {str(arguments[0]).removeprefix(str(out))}")
            return real(*arguments, **keywords)

        return operation

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", copying("fsync", lambda descriptor: None))
        patch.setattr(shards, "encode", copying("encode", encode))
        for name in ("replace", "unlink"):
            patch.setattr(Path, name, copying(name, getattr(Path, name)))
        patch.setattr(shutil, "rmtree", copying("rmtree", shutil.rmtree))
        yield points


@pytest.mark.parametrize("changes", [{}, {"max_tokens": 1500}], ids=str)
def test_killed_at_any_file_operation_and_continued_gives_identical_bytes(
    tmp_path, monkeypatch, source, tokenizer_dir, often, changes
):
    """Before each operation the folder is copied: what a killed process, its buffers lost, would leave."""
    out = tmp_path / "out"
    with copied_at_each_operation(monkeypatch, out, tmp_path) as points:
        prepare(out, source, tokenizer_dir, **changes)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    expected, different = contents(out), []
    for i, point in enumerate(points):
        again = contents(prepare(tmp_path / str(i), source, tokenizer_dir, **changes))
        if again != expected:
            different.append(
                (point, sorted(k for k in {**again, **expected} if again.get(k) != expected.get(k)))
            )
    assert len(points) > 20 and not different


def test_killed_at_any_file_operation_while_damage_is_mended_the_next_run_mends_it(
    tmp_path, monkeypatch, copied, source, tokenizer_dir, often, prepared
):
    last = {split: max(path.name for path in copied.glob(f"{split}_*.bin")) for split in ("train", "val")}
    for name in ("train_000000.bin", *last.values()):  # the writers stand in the last two until the end
        (copied / name).write_bytes((copied / name).read_bytes()[:-1] + b"x")
    (copied / "tokenizer" / "tokenizer.json").write_text("{}")
    with copied_at_each_operation(monkeypatch, copied, tmp_path) as points:
        prepare(copied, source, tokenizer_dir)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    assert len(points) > 20 and contents(copied) == contents(prepared)
    for i, point in enumerate(points):
        assert contents(prepare(tmp_path / str(i), source, tokenizer_dir)) == contents(prepared), point
        assert not (tmp_path / str(i) / ".again").exists(), point


def test_a_trained_tokenizer_survives_the_stop(tmp_path, monkeypatch, source, often):
    whole = prepare(tmp_path / "whole", source, "train", vocab_size=300)
    stopped(monkeypatch, "encode", 4, tmp_path / "out", source, "train", vocab_size=300)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "train_tokenizer", None)  # not called again
        prepare(tmp_path / "out", source, "train", vocab_size=300)
    assert contents(tmp_path / "out") == contents(whole)


def test_only_the_manifest_s_shards_are_left_when_the_source_shrinks_between_stop_and_continuation(
    tmp_path, monkeypatch, tokenizer, tokenizer_dir
):
    source = write_jsonl(tmp_path / "texts.jsonl", ({"text": t} for t in TEXTS))
    monkeypatch.setattr(shards, "BATCH_DOCUMENTS", 4)
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
    (copied / "progress.json").write_text('{"documents": 0, "positions": {}}')  # begun, nothing done yet
    tokenization.train_tokenizer(iter(ODD_TEXTS), 270).save_pretrained(copied / "tokenizer")
    chosen = {"tokenizer": tokenizer_dir} if kind == "given" else {"tokenizer": "train", "vocab_size": 300}
    out = prepare(copied, source, **chosen)
    assert contents(out) == contents(prepare(tmp_path / "fresh", source, **chosen))


def test_a_whole_preparation_is_skipped_and_nothing_is_rewritten(
    copied, source, tokenizer_dir, monkeypatch, capsys
):
    monkeypatch.setattr(shards, "documents", None)  # not called
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
        refused("--val_fraction=1.5: expected a share", prepare, out, source, tokenizer_dir, val_fraction=1.5)
        assert contents(out) == before


def test_a_source_that_fails_half_way_keeps_what_was_done_and_continues_when_mended(
    tmp_path, tokenizer_dir, prepared, source, often
):
    broken = tmp_path / "texts.jsonl"
    lines = source.read_text().splitlines(keepends=True)
    broken.write_text("".join(lines[:30]) + '{"text": "cut sho')
    changes = {"column": "text", "shard_tokens": 500}
    refused(
        f"{broken} cannot be read beyond row 30", prepare, tmp_path / "out", broken, tokenizer_dir, **changes
    )
    gc.collect()
    before = contents(tmp_path / "out")
    assert json.loads(before["progress.json"])["documents"] >= 20
    refused(
        f"{broken} cannot be read beyond row 30", prepare, tmp_path / "out", broken, tokenizer_dir, **changes
    )
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


def test_the_bytes_do_not_depend_on_threads_or_batch(tmp_path, monkeypatch, source, tokenizer_dir, prepared):
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")  # restored afterwards
    for batch, workers in ((1, 0), (7, 1), (1000, 3)):
        monkeypatch.setattr(shards, "BATCH_DOCUMENTS", batch)
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


def document(i: int) -> shards.Document:
    return shards.Document(text(i), shards.File(), (0, 0, ""))


def test_the_source_is_read_at_most_two_batches_ahead(tmp_path, monkeypatch, tokenizer_dir):
    read, done, ahead = 0, 0, []

    def endless(*_):
        nonlocal read
        while True:
            read += 1
            yield document(read)

    def counting(tokenizer, texts):
        nonlocal done
        ahead.append(read - done)
        done += len(texts)
        return encode(tokenizer, texts)

    monkeypatch.setattr(shards, "BATCH_DOCUMENTS", 8)
    monkeypatch.setattr(shards, "documents", endless)
    monkeypatch.setattr(shards, "encode", counting)
    prepare(tmp_path / "out", "endless", tokenizer_dir, max_tokens=20_000, shard_tokens=10**6)
    assert len(ahead) > 20 and max(ahead) <= 16 and read - done <= 16


def test_with_max_tokens_only_the_rows_up_to_the_last_document_are_counted(tmp_path, tokenizer_dir, capsys):
    rows = [{"text": text(0)}, {"no": "text"}, *({"text": text(i)} for i in range(1, 300)), *[{}] * 200]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    prepare(tmp_path / "out", source, tokenizer_dir, max_tokens=1500, max_bad_rows=0.4)
    told = capsys.readouterr().out
    documents = int(re.search(r"train: (\d+) documents", told)[1]) + int(re.search(r"val: (\d+)", told)[1])
    assert f"1 of {documents + 1} rows skipped" in told and documents < 250
    refused("rows cannot be used", prepare, tmp_path / "all", source, tokenizer_dir, max_bad_rows=0.2)
    tokens = json.loads((tmp_path / "out/manifest.json").read_text())["splits"]["train"]["tokens"]
    most = tokens * 280 // documents  # in the second batch, which ends in the bad rows
    prepare(tmp_path / "most", source, tokenizer_dir, max_tokens=most, max_bad_rows=0.2)


def test_of_two_lists_of_files_only_the_difference_is_told(source, tokenizer_dir, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(300):
        (folder / f"{i:03}.txt").write_text(text(i))
    out = prepare(tmp_path / "out", folder, tokenizer_dir)
    for name in "abcde":
        (folder / f"{name}.txt").write_text("x")
    told = r"\(source_files=\[\] there, \[\['a.txt', 1\], .*\] and 2 more here\)"
    refused(f"another preparation {told}; choose", prepare, out, folder, tokenizer_dir)


def test_a_tokenizer_is_trained_on_no_more_than_the_beginning(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(shards, "TOKENIZER_CHARACTERS", 5000)
    monkeypatch.setattr(
        shards, "documents", lambda c, **_: (read.append(i) or document(i) for i in itertools.count())
    )
    tokenizer = shards.make_tokenizer(prepare_config(tmp_path, "endless", "train", vocab_size=280))
    assert sum(len(text(i)) for i in read[:-1]) < 5000 <= sum(len(text(i)) for i in read)
    assert len(tokenizer) == 280


@pytest.mark.parametrize("val_fraction", [-0.1, 7.0, math.nan])
def test_a_val_fraction_that_is_no_share_is_refused_before_anything_is_written(
    tmp_path, source, tokenizer_dir, val_fraction
):
    out = tmp_path / "out"
    refused("--val_fraction=.* expected", prepare, out, source, tokenizer_dir, val_fraction=val_fraction)
    assert not out.exists()


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
    assert f"needs both; delete {tmp_path}/short and raise --val_fraction" in capsys.readouterr().out


# -- what is somebody else's, or whole, stays ----------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    "name",
    [
        "train_images.bin",
        "val_labels.bin",
        "train_000000.bin",
        "val_000000.bin.partial",
        "tokenizer/my_notes.txt",
        "tokenizer/tokenizer.json",
    ],
)
def test_a_folder_with_somebody_elses_files_is_refused_and_nothing_is_touched(
    name, tmp_path, source, tokenizer_dir
):
    file = tmp_path / "mine" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"mine")
    refused(
        "holds .*not written by prepare_data.py; choose", prepare, tmp_path / "mine", source, tokenizer_dir
    )
    assert snapshot(tmp_path / "mine") == {name: b"mine"}


def test_files_of_others_beside_a_preparation_stay_when_it_continues(
    tmp_path, monkeypatch, source, tokenizer_dir, often, prepared
):
    out = tmp_path / "out"
    stopped(monkeypatch, "encode", 6, out, source, tokenizer_dir)
    mine = {"train_images.bin", "val_labels.bin", "train_000009.txt", "tokenizer/my_notes.txt"}
    for name in mine:
        (out / name).write_bytes(b"mine")
    prepare(out, source, tokenizer_dir)
    (out / "tokenizer" / "tokenizer.json").unlink()
    prepare(out, source, tokenizer_dir)
    assert all((out / name).read_bytes() == b"mine" for name in mine)
    assert {k: v for k, v in contents(out).items() if k not in mine} == contents(prepared)


def test_only_the_damaged_shard_is_made_again(copied, prepared, source, tokenizer_dir):
    bad, whole = copied / "train_000001.bin", [p for p in copied.glob("*.bin") if "000001" not in p.name]
    bad.write_bytes(bad.read_bytes()[:-1] + b"x")
    before = {path: path.stat().st_mtime_ns for path in [*whole, copied / "manifest.json"]}
    prepare(copied, source, tokenizer_dir)
    assert contents(copied) == contents(prepared)
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("lost", ["the source", "the tokenizer", "both changed"])
def test_a_damaged_preparation_that_cannot_be_made_again_keeps_all_it_has(
    lost, tmp_path, copied, source, tokenizer_dir
):
    bad = copied / "train_000001.bin"
    bad.write_bytes(bad.read_bytes()[:-1] + b"x")
    if lost == "the source":  # the same names and sizes, other text
        moved = tmp_path / source.name
        moved.write_text(source.read_text().replace("river", "rever"))
        source = moved
    else:
        (copied / "tokenizer" / "tokenizer.json").write_text("{}")
    if lost == "both changed":
        tokenization.train_tokenizer(iter(ODD_TEXTS), 300).save_pretrained(copied / "tokenizer")
    before = contents(copied)
    manifest = json.loads(before["manifest.json"])
    tokenizer = tokenizer_dir
    if lost != "the source":
        tokenizer = tmp_path / "gone"
        manifest["settings"]["tokenizer"] = str(tokenizer)
        (copied / "manifest.json").write_text(json.dumps(manifest))
        before = contents(copied)
    else:
        manifest["settings"]["source"] = str(source)
        (copied / "manifest.json").write_text(json.dumps(manifest))
        before = contents(copied)
    with pytest.raises(InputError):
        prepare(copied, source, tokenizer)
    gc.collect()
    assert contents(copied) == before


@pytest.mark.parametrize("place", ["file", "file/below", "closed"])
def test_a_folder_that_cannot_be_made_or_written_to_is_one_sentence(
    place, tmp_path, monkeypatch, source, tokenizer_dir
):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root
    match = f"{place} cannot be {'written to' if place == 'closed' else 'made a folder'}.*choose another"
    refused(match, prepare, tmp_path / place, source, tokenizer_dir)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "flag, value, match",
    [
        *((name, " ", f"--{name}= is empty") for name in ("split", "column", "tokenizer", "out_dir")),
        ("vocab_size", 10**20, "expected at most"),
        ("workers", 10**6, "--workers=1000000: expected at most 1024"),
        ("max_bad_rows", 1.5, "--max_bad_rows=1.5: expected a share"),
        ("val_fraction", 0.0, "--val_fraction=0 holds nothing out"),
    ],
)
def test_a_flag_that_can_mean_nothing_is_refused_before_anything_is_read(flag, value, match, monkeypatch):
    monkeypatch.setattr(shards, "source_files", None)  # not called
    refused(match, prepare_data.main, prepare_data.Config(**{flag: value}))


def test_a_second_preparation_in_the_same_folder_is_refused_while_the_first_runs(
    tmp_path, source, tokenizer_dir
):
    code = (
        f"import sys, common; lock = common.lock_folder({str(tmp_path)!r})\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        refused("is in use by process", prepare, tmp_path, source, tokenizer_dir)
        other.stdin.close()
    prepare(tmp_path, source, tokenizer_dir)


def test_unusable_rows_are_skipped_counted_and_the_first_is_named(
    tmp_path, source, tokenizer_dir, prepared, capsys
):
    lines = source.read_text().splitlines(keepends=True)
    bad = [
        '{"text": null}\n',
        '{"text": "x\\ud800"}\n',
        "[1]\n",
        '{"other": 1}\n',
        "{no json\n",
        "[" * 99_999 + "\n",
    ]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(lines[:20] + bad + lines[20:]))
    out = prepare(tmp_path / "out", mixed, tokenizer_dir, max_bad_rows=0.2)
    assert (
        f"6 of {len(lines) + 6} rows skipped; the first is row 21 of {mixed}: 'text' is NoneType"
        in capsys.readouterr().out
    )
    shards = [{k: v for k, v in contents(folder).items() if k.endswith(".bin")} for folder in (out, prepared)]
    assert shards[0] == shards[1]
    refused(
        rf"6 of {len(lines) + 6} rows cannot be used, more than --max_bad_rows=0.1 allows; .* row 21",
        prepare,
        tmp_path / "strict",
        mixed,
        tokenizer_dir,
        max_bad_rows=0.1,
    )


@pytest.mark.parametrize(
    "manifest",
    [
        {},
        {"shards": 5},
        {"shards": [{"file": "../x.bin", "bytes": 1, "sha256": ""}]},
        {"settings": 3, "documents": 7},
    ],
)
def test_a_foreign_manifest_is_one_sentence(manifest, tmp_path, source, tokenizer_dir):
    texts = {"tokenizer": "", "tokenizer_fingerprint": ""}
    (tmp_path / "manifest.json").write_text(json.dumps(texts | manifest))
    with pytest.raises(InputError):
        prepare(tmp_path, source, tokenizer_dir)
    refused("manifest.json is not one that prepare_data.py writes", verified_manifest, tmp_path)


@pytest.mark.parametrize(
    "lost", ["settings", "documents", "documents_in_file", "file", "bad_rows", "positions"]
)
def test_a_progress_note_without_what_it_needs_is_one_sentence_and_nothing_is_lost(
    lost, source, tokenizer_dir, tmp_path, often, monkeypatch
):
    original, saves = shards.save_progress, []

    def stop_at_the_third(*arguments):
        original(*arguments)
        saves.append(arguments)
        if len(saves) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(shards, "save_progress", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "shards", source, tokenizer_dir)
    monkeypatch.setattr(shards, "save_progress", original)
    note = tmp_path / "shards" / "progress.json"
    progress = json.loads(note.read_text())
    assert progress["documents"] > 0
    note.write_text(json.dumps({name: value for name, value in progress.items() if name != lost}))
    before = contents(tmp_path / "shards")
    refused("progress.json", prepare, tmp_path / "shards", source, tokenizer_dir)
    assert contents(tmp_path / "shards") == before
