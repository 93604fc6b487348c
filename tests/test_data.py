"""Token shards and the windows read from them."""

import hashlib
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import planted
import pytest
from conftest import ALONE, ROOT, TEXTS, prepare, pretrain_config, refused, write_shard
from properties import few, given, st

import data
import tokenization
from common import IGNORE
from data import TokenLoader, verified_manifest
from order import batch_order
from shards import ShardWriter
from sources import hash_fraction


@pytest.mark.parametrize("version, code, top", [(1, "H", 65_535), (2, "I", 2**31 - 1)])
def test_a_shard_is_256_int32_with_magic_version_and_count_then_ids_little_endian(
    tmp_path, version, code, top
):
    ids = [0, 1, 258, top, 7, 0, 5]
    writer = ShardWriter(tmp_path, "train", version=version, shard_tokens=4)
    writer.append(np.array(ids), 11)
    writer.finish()
    for name, part in (("train_000000.bin", ids[:4]), ("train_000001.bin", ids[4:])):
        expected = struct.pack("<3i", 20240520, version, len(part)) + bytes(4 * 253)
        expected += struct.pack(f"<{len(part)}{code}", *part)
        assert (tmp_path / name).read_bytes() == expected
        assert data.read_shard(tmp_path / name).tolist() == part
    assert len(list(tmp_path.glob("*.bin*"))) == 2
    assert writer.totals == {"documents": 1, "tokens": 7, "bytes": 11}


@pytest.mark.parametrize("version, id", [(1, 65_536), (2, 2**32), (1, -1)])
def test_an_id_that_its_type_cannot_hold_is_never_written(tmp_path, version, id):
    writer = ShardWriter(tmp_path, "train", version=version, shard_tokens=4)
    with pytest.raises(AssertionError):
        writer.append(np.array([0, id]), 1)
    assert list(tmp_path.iterdir()) == []


def test_shards_of_llm_c_without_manifest_are_read_with_a_tokenizer_given_and_refused_without(
    tmp_path, tokenizer, tokenizer_dir
):
    splits = {"edu_fineweb_train_000001": range(100), "edu_fineweb_train_000002": range(100, 160)}
    splits["edu_fineweb_val_000000"] = range(200, 240)
    for name, ids in splits.items():
        write_shard(tmp_path / f"{name}.bin", ids)
    refused("no manifest.json .* --tokenizer=", verified_manifest, tmp_path)
    manifest = verified_manifest(tmp_path, str(tokenizer_dir))
    assert [(s["file"], s["bytes"]) for s in manifest["shards"]] == [
        (f"{name}.bin", 1024 + 2 * len(ids)) for name, ids in sorted(splits.items())
    ]
    train, val = (TokenLoader(tmp_path, split, 10, 320) for split in ("train", "val"))
    assert train.read(range(len(train)))[0].flatten().tolist() == [*range(90), *range(100, 150)]
    assert val.read(range(len(val)))[0].flatten().tolist() == [*range(200, 230)]


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
            320,
        )
    for raw in (whole[:-1], whole + b"\0\0", whole[:1024]):
        path.write_bytes(raw)
        refused(rf"has {len(raw)} bytes, its header says 1124", TokenLoader, tmp_path, "train", 4, 320)


def test_a_shard_without_a_manifest_is_of_the_split_that_a_word_of_its_name_tells(tmp_path):
    names = {
        "train": ["FineWebTrain_0.bin", "edu_pretrain_1.bin", "retrieval_train_000001.bin", "train.bin"],
        "val": ["retrieval_validation_0.bin", "val.bin"],
    }
    for name in [*names["train"], *names["val"], "medieval_0.bin"]:
        write_shard(tmp_path / name, range(50))
    for split, own in names.items():
        assert [path.name for path in data.shard_paths(tmp_path, split)] == own
    write_shard(tmp_path / "pretrain-val_train.bin", range(50))
    refused("pretrain-val_train.bin is named after both splits", data.shard_paths, tmp_path, "val")


def test_shards_found_right_are_not_hashed_again_until_they_change(copied, monkeypatch):
    hashed = []
    monkeypatch.setattr(
        data,
        "file_sha256",
        lambda path: (hashed.append(path.name), hashlib.sha256(path.read_bytes()).hexdigest())[1],
    )
    files = sorted(p.name for p in copied.glob("*.bin"))
    (copied / ".verified.json").unlink(missing_ok=True)
    verified_manifest(copied)
    assert sorted(hashed) == files
    verified_manifest(copied)
    assert len(hashed) == len(files)
    os.utime(copied / files[1], ns=(1, 1))
    verified_manifest(copied)
    assert hashed[len(files) :] == [files[1]]


@pytest.mark.parametrize("damage", ["byte", "cut", "longer", "gone"])
def test_a_shard_that_differs_from_the_manifest_is_refused_by_name(copied, damage):
    verified_manifest(copied)
    path = copied / "train_000001.bin"
    raw = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(
            {"byte": raw[:-1] + bytes([raw[-1] ^ 1]), "cut": raw[:-2], "longer": raw + b"xx"}[damage]
        )
    refused(rf"{path} .*manifest.*prepare the data again", verified_manifest, copied)
    if damage == "gone":
        refused(rf"{path} is missing; copy or prepare it again", TokenLoader, str(copied), "train", 32, 320)


def test_a_tokenizer_that_did_not_make_the_shards_is_refused(prepared, tmp_path, tokenizer_dir):
    tokenization.train_tokenizer(iter(TEXTS), 300).save_pretrained(tmp_path / "other")
    refused(r"were made with .* not with .*other", verified_manifest, prepared, str(tmp_path / "other"))
    assert verified_manifest(prepared, str(tokenizer_dir))["vocab_size"] == 320


@pytest.mark.parametrize("sign", ["progress.json", "parts"])
def test_a_preparation_that_is_not_finished_is_told_as_that(sign, prepared, tmp_path):
    begun = shutil.copytree(prepared, tmp_path / "begun")
    (begun / "manifest.json").rename(begun / sign)
    refused("begun is not finished; run its prepare_data.py command again", verified_manifest, begun, "gpt2")


def test_a_folder_without_shards_is_refused_with_the_command_that_makes_them(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        refused("holds no token shards; make them with prepare_data.py", verified_manifest, folder, "gpt2")


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
        return refused("too few for one window", TokenLoader, folder, "train", T, 10**6)
    loader = TokenLoader(folder, "train", T, 10**6)
    assert len(loader) == sum(whole)
    inputs, targets = loader.read(range(len(loader)))
    assert inputs.shape == targets.shape == (len(loader), T)
    rows = iter(zip(inputs.tolist(), targets.tolist()))
    for shard, n in zip(shards, whole):
        mine = list(itertools.islice(rows, n))
        assert [i for x, _ in mine for i in x] == shard[: n * T] and n * T + T >= len(shard) - 1
        assert [i for _, y in mine for i in y] == shard[1 : n * T + 1]


def test_a_batch_s_rows_are_the_windows_asked_for_in_that_order(data_dir):
    loader = TokenLoader(data_dir, "train", 16, 320)
    everything = loader.read(range(len(loader)))
    picks = batch_order(0, 2, 50, len(loader))
    for rows, all_rows in zip(loader.read(picks), everything):
        assert rows.tolist() == all_rows[picks].tolist() and rows.dtype == all_rows.dtype


@pytest.mark.parametrize("pieces", [1, 2, 8])
def test_a_window_in_pieces_is_as_many_rows_and_rows_that_pad_stay_without_targets(pieces, data_dir):
    loader, ranks = TokenLoader(data_dir, "train", 16, 320), replace(ALONE, even_batches=True)
    first, last = loader.micro_batches(range(5), 3, ranks, pieces)
    inputs, targets = loader.read(range(5))
    for name, rows in (("input_ids", inputs), ("targets", targets)):
        assert first[name].tolist() == rows[:3].reshape(3 * pieces, -1).tolist()
        assert last[name][: 2 * pieces].tolist() == rows[3:].reshape(2 * pieces, -1).tolist()
    assert (last["targets"][2 * pieces :] == IGNORE).all() and len(last["targets"]) == 3 * pieces


def test_only_the_manifest_s_shards_are_read_whatever_else_lies_there(copied):
    before = [len(TokenLoader(copied, split, 16, 320)) for split in ("train", "val")]
    write_shard(copied / "train_000099.bin", [319] * 100)
    (copied / "val_labels.bin").write_bytes(b"mine")
    assert [len(TokenLoader(copied, split, 16, 320)) for split in ("train", "val")] == before


def test_a_token_id_beyond_the_vocabulary_is_refused_with_id_size_and_file(tmp_path):
    write_shard(tmp_path / "train_000000.bin", [1] * 20)
    write_shard(tmp_path / "train_000001.bin", [1] * 9 + [400] * 11)
    small, almost, enough = (TokenLoader(tmp_path, "train", 4, size) for size in (320, 400, 401))
    assert small.read([0, 1, 2, 3, 4, 5])[0].max() == 1
    refused("train_000001.bin holds token id 400, beyond the vocabulary of 320", small.read, [0, 6])
    refused("holds token id 400, beyond the vocabulary of 400", almost.read, [6])
    assert enough.read([6])[1].max() == 400


def test_a_validation_split_without_a_window_is_refused_with_the_flags_that_mend_it(
    tmp_path, source, tokenizer_dir, prepared
):
    out = prepare(tmp_path / "out", source, tokenizer_dir, val_fraction=1e-9)
    told = "the val split in .* has no shard as val_000000.bin, .* --val_fraction"
    refused(told, TokenLoader, out, "val", 8, 320)
    tokens = json.loads((prepared / "manifest.json").read_text())["splits"]["val"]["tokens"]
    refused(
        f"has {tokens} tokens, too few for one window of 1025.*--context_length",
        TokenLoader,
        prepared,
        "val",
        1024,
        320,
    )


def test_text_bytes_is_the_length_of_the_text_that_the_targets_spell(prepared, data_dir, tokenizer):
    val, texts = TokenLoader(prepared, "val", 1, 320), [t for t in TEXTS if hash_fraction(t) < 0.2]
    assert all(t.isascii() for t in texts) and len(list(prepared.glob("val*"))) == 1
    assert val.text_bytes(range(len(val)), tokenizer) == sum(map(len, texts))
    loader, windows = TokenLoader(data_dir, "train", 24, 320), [5, 0, 11, 5]
    spelled = {i: 0 if i < 3 else len(tokenizer.decode([i])) for i in range(320)}
    targets = loader.read(windows)[1].flatten().tolist()
    assert loader.text_bytes(windows, tokenizer) == sum(spelled[i] for i in targets)


def test_a_thousand_shards_need_few_open_files(tmp_path):
    for i in range(300):
        write_shard(tmp_path / f"train_{i:06d}.bin", range(i, i + 9))
    code = (
        "import resource, sys; from data import TokenLoader\n"
        "import data; data.SHARDS_OPEN = 8\n"
        "import os; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        f"loader = TokenLoader({str(tmp_path)!r}, 'train', 4, 1000)\n"
        "assert loader.read(range(len(loader)))[0][::2, 0].tolist() == list(range(300))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_bytes_of_a_validation_are_counted_window_by_window_on_rank_0_alone(
    data_dir, tmp_path, fresh, tokenizer
):
    loader = TokenLoader(data_dir, "train", 32, 320)
    asked, read = [], loader.read

    def noted(windows):
        asked.append(len(windows))
        return read(windows)

    loader.read = noted
    total = loader.text_bytes(range(700), tokenizer)
    assert asked == [256, 256, 188]
    targets = read(range(700))[1].tolist()
    assert total == sum(len(tokenizer.decode(row, skip_special_tokens=True).encode()) for row in targets)
    config = pretrain_config(data_dir, tmp_path / "run", max_steps=1)
    assert fresh.submit(planted.forked, "pretrain_gpt", config, 2, (), count_bytes).result(90)[0] == [0, 0]
    assert (tmp_path / "run" / "counted").read_text() == "0"


def count_bytes(out_dir) -> None:
    """Have each rank that counts bytes note its number in a file."""
    original = TokenLoader.text_bytes

    def noted(self, *arguments):
        with open(out_dir / "counted", "a") as file:
            file.write(os.environ["RANK"])
        return original(self, *arguments)

    TokenLoader.text_bytes = noted
