"""Several sources as one: how a flag names them, their shares, and whole runs on a mix."""

import dataclasses
import json
import math
import os
import shutil

import planted
import pytest
from conftest import SMALL, assert_recovered, flags, losses, pretrain_config, refused, run, text, write_jsonl
from properties import given, st

import prepare_data
import pretrain_gpt
from common import InputError, read_records
from data import TokenLoader, verified_manifests
from mixture import parse_sources, rounded_shares, validation_numbers
from order import CYCLE
from tokenization import load_tokenizer, train_tokenizer

WEIGHTS = (0.2, 0.1, 0.7)


@pytest.fixture(scope="session")
def folders(tokenizer_dir, tmp_path_factory):
    """Three sources of different sizes, the smallest of which a few steps read more than once."""
    made = []
    for name, first, count in (("web", 0, 300), ("math", 1000, 120), ("code", 2000, 16)):
        folder = tmp_path_factory.mktemp(name)
        source = write_jsonl(folder / "texts.jsonl", ({"text": text(first + i)} for i in range(count)))
        places = {"source": str(source), "tokenizer": str(tokenizer_dir), "out_dir": str(folder / name)}
        prepare_data.main(prepare_data.Config(**places, val_fraction=0.2, shard_tokens=3000))
        made.append(folder / name)
    return made


@pytest.fixture(scope="session")
def mix(folders):
    """The flag for a mix of all three."""
    return ",".join(f"{folder}:{weight}" for folder, weight in zip(folders, WEIGHTS))


# -- the flag ------------------------------------------------------------------------------------------------


def test_weights_stand_behind_the_last_colon_and_need_not_sum_to_one(tmp_path):
    def shares(data_dir):
        return [(source.path, source.share) for source in parse_sources(data_dir)]

    assert shares("data/web:0.7,data/math:0.2,data/code:0.1") == [
        ("data/web", 7000),
        ("data/math", 2000),
        ("data/code", 1000),
    ]
    assert shares("a:21,b:6,c:3") == shares("a:0.7,b:0.2,c:0.1") == [("a", 7000), ("b", 2000), ("c", 1000)]
    assert shares("disk:1/web:3,b:1e0") == [("disk:1/web", 7500), ("b", 2500)]
    assert shares("a,b") == [("a", None), ("b", None)] and shares("a") == [("a", None)]
    folder = tmp_path / "odd:1,name:2"
    folder.mkdir()
    assert shares(str(folder)) == [(str(folder), None)]  # what is itself a folder is that folder
    assert [source.name for source in parse_sources("data/web/:1,data/math:1")] == ["web", "math"]
    assert [source.name for source in parse_sources("a/web:1,b/web:1,c:1")] == ["a/web", "b/web", "c"]


@pytest.mark.parametrize(
    "data_dir, message",
    [
        ("a:0.7,b", "gives weights to some, but none to b; give all a weight, as b:0.5, or none"),
        ("a:0,b:1", "a:0, which does not exist, and '0' is no weight; .* a number above zero"),
        ("a:-1,b:1", "'-1' is no weight"),
        ("a:nan,b:1", "'nan' is no weight"),
        ("a:inf,b:1", "'inf' is no weight"),
        ("a:lots,b:1", "'lots' is no weight"),
        (":0.5,b:1", ":0.5, which does not exist"),
        ("a,,b", "has an empty name in it"),
        ("", "has an empty name in it"),
        ("a:1,b:0.00001", "b has the weight 1e-05 of 1.00001, less than one window in 10,000"),
    ],
)
def test_what_is_no_mix_is_refused_in_one_sentence_before_anything_is_read(data_dir, message, tmp_path):
    refused(message, parse_sources, data_dir)
    with pytest.raises(InputError, match=message):
        pretrain_gpt.main(pretrain_config(data_dir, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@given(st.lists(st.floats(1e-2, 1e3), min_size=1, max_size=8))
def test_rounded_shares_sum_to_the_cycle_and_are_off_by_less_than_one_window_in_it(weights):
    if min(weights) / sum(weights) * CYCLE < 1:
        return
    shares = rounded_shares([str(weight) for weight in weights], weights)
    assert sum(shares) == CYCLE
    assert all(abs(s - w / sum(weights) * CYCLE) < 1 for s, w in zip(shares, weights))


def test_a_folder_named_twice_is_refused(folders):
    data_dir = f"{folders[0]}:1,{folders[0].parent}/./{folders[0].name}{os.sep}:2"
    refused("names a folder twice; name it once, with the sum", verified_manifests, data_dir)


def test_sources_of_different_tokenizers_are_refused_before_a_shard_is_read(folders, tmp_path):
    train_tokenizer((text(i) for i in range(50)), 300).save_pretrained(tmp_path / "tokenizer")
    source = write_jsonl(tmp_path / "texts.jsonl", ({"text": text(i)} for i in range(40)))
    other, places = tmp_path / "other", {"source": str(source), "tokenizer": str(tmp_path / "tokenizer")}
    prepare_data.main(prepare_data.Config(**places, out_dir=str(other), val_fraction=0.2))
    next(other.glob("train*.bin")).unlink()  # would be told if shards were looked at
    refused(
        r"web \(.*\) and .*other \(.*\) were made with different tokenizers; prepare one of them again",
        verified_manifests,
        f"{folders[0]}:1,{other}:1",
    )


# -- windows -------------------------------------------------------------------------------------------------


def test_a_mix_s_windows_are_those_of_its_sources_counted_through(folders, mix):
    whole, parts = TokenLoader(mix, "train", 16, 320), [TokenLoader(f, "train", 16, 320) for f in folders]
    assert whole.sizes == [len(part) for part in parts] and len(whole) == sum(whole.sizes)
    windows = [row for part in parts for row in part.read(range(len(part)))[0].tolist()]
    assert whole.read(range(len(whole)))[0].tolist() == windows


def test_a_single_source_is_read_in_the_order_of_batch_order_with_a_weight_or_without(folders):
    from order import batch_order

    for data_dir in (folders[0], f"{folders[0]}:0.3"):
        loader = TokenLoader(data_dir, "train", 16, 320)
        for step in (0, 3, 10**6):
            expected = batch_order(5, step, 24, len(loader))
            assert loader.step_windows(5, step, 24).tolist() == expected.tolist()
        assert loader.first_windows(7, [1.0]) == [range(7)] and not loader.report(100)
        assert loader.first_windows(0, [1.0]) == loader.first_windows(10**9, [1.0]) == [range(len(loader))]


def test_folders_joined_by_a_comma_are_read_as_one_each_window_once_an_epoch(folders):
    loader = TokenLoader(",".join(map(str, folders)), "train", 16, 320)
    windows = [int(w) for step in range(len(loader)) for w in loader.step_windows(1, step, 1)]
    assert sorted(windows) == list(range(len(loader))) and windows != sorted(windows)
    assert loader.shares == pytest.approx([size / len(loader) for size in loader.sizes])
    assert list(loader.epochs(2 * len(loader)).values()) == pytest.approx([2.0] * 3)


def test_validation_reads_of_each_source_its_share_of_the_windows_and_at_least_one(folders, mix):
    val = TokenLoader(mix, "val", 4, 320)
    firsts = [sum(val.sizes[:i]) for i in range(3)]
    assert min(val.sizes) > 10
    shares = [0.7, 0.25, 0.05]
    assert val.first_windows(20, shares) == [range(f, f + n) for f, n in zip(firsts, (14, 5, 1))]
    assert val.first_windows(1, shares) == [range(f, f + 1) for f in firsts]
    assert val.first_windows(0, shares) == [range(f, f + n) for f, n in zip(firsts, val.sizes)]
    assert val.first_windows(10**9, shares) == val.first_windows(0, shares)


def test_the_validation_loss_of_a_mix_is_that_of_a_token_drawn_by_the_shares():
    """A source that has too few windows for its share counts no less."""
    numbers = validation_numbers(
        ["web", "math"], [0.75, 0.25], [5, 1], [(300.0, 0, 100), (40.0, 0, 20)], [400, 50]
    )
    assert numbers["val_loss/web"] == 3.0 and numbers["val_loss/math"] == 2.0
    assert numbers["val_loss"] == pytest.approx(0.75 * 3.0 + 0.25 * 2.0)
    bytes_per_token = 0.75 * 4.0 + 0.25 * 2.5
    assert numbers["val_bpb"] == pytest.approx(2.75 / math.log(2) / bytes_per_token)
    assert validation_numbers(["web"], [1.0], [7], [(300.1, 0, 77)], [401]) == {
        "val_loss": 300.1 / 77,
        "val_bpb": 300.1 / math.log(2) / 401,
    }


# -- whole runs ----------------------------------------------------------------------------------------------


def test_a_run_on_a_mix_reports_each_source_apart(mix, folders, tokenizer_dir, tmp_path, capsys):
    pretrain_gpt.main(pretrain_config(mix, tmp_path, max_steps=30, eval_every=30))
    printed, rows = capsys.readouterr().out, read_records(tmp_path / "metrics.jsonl")
    sizes = [len(TokenLoader(folder, "train", 32, 320)) for folder in folders]
    epochs = [30 * 8 * weight / size for weight, size in zip(WEIGHTS, sizes)]
    assert epochs[2] > 1  # the smallest source begins again while the others go on
    for name, share, size, read in zip(("web", "math", "code"), ("20", "10", "70"), sizes, epochs):
        assert f"{name:<4}   {share}.00% of the tokens; {size:,} windows, {read:.2f} epochs" in printed
    own = [rows[-1][f"val_loss/{name}"] for name in ("web", "math", "code")]
    assert rows[-1]["val_loss"] == pytest.approx(sum(w * x for w, x in zip(WEIGHTS, own)))
    assert f"val_loss/math {own[1]:.4f}" in printed
    assert [rows[-1][f"epochs/{name}"] for name in ("web", "math", "code")] == pytest.approx(epochs)
    # each source's loss is the one that it has alone: 512 tokens are 16 windows, of which web's share is 3
    model = pretrain_gpt.GPTModel.from_pretrained(tmp_path / "step_0000030")
    ids, targets = TokenLoader(folders[0], "val", 32, 320).read(range(3))
    assert own[0] == pytest.approx(model(ids, targets).item() / targets.numel(), rel=1e-5)
    card = (tmp_path / "step_0000030" / "README.md").read_text()
    assert "20.00% text files: texts.jsonl; 10.00% text files" in card


@pytest.mark.slow
def test_one_two_and_three_ranks_train_on_the_same_global_batches_of_a_mix(mix, tmp_path):
    """7 windows a step: 3, 2 and 2 on three ranks."""
    for ranks in (1, 2, 3):
        config = pretrain_config(mix, tmp_path / str(ranks), batch_tokens=7 * 32, max_steps=4)
        result = run("pretrain_gpt.py", *flags(config), ranks=ranks)
        assert result.returncode == 0, result.stderr
    one = losses(tmp_path / "1")
    for ranks in (2, 3):
        for a, b in zip(one, losses(tmp_path / str(ranks)), strict=True):
            assert all(x == y or math.isclose(x, y, rel_tol=2e-4) for x, y in zip(a, b)), (a, b)


@pytest.mark.parametrize("joined", [False, True], ids=["weighted", "joined"])
def test_a_killed_run_on_a_mix_ends_in_the_same_bytes_as_an_undisturbed_one(
    joined, mix, folders, tmp_path, fresh
):
    data_dir = ",".join(map(str, folders)) if joined else mix
    straight, killed = (pretrain_config(data_dir, tmp_path / name, **SMALL) for name in ("a", "b"))
    assert fresh.submit(planted.forked, "pretrain_gpt", straight).result(90)[0] == [0]
    for step in (4, 5):  # the second checkpoint was begun, so the first is whole
        fault = (f"SIGKILL:{step}:0",)
        assert fresh.submit(planted.forked, "pretrain_gpt", killed, 1, fault).result(90)[0] == [-9]
    codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", killed).result(90)
    assert codes == [0] and "continuing from" in log, log
    assert_recovered(tmp_path / "b", tmp_path / "a", 2)


def test_a_mix_that_moved_is_the_same_and_one_with_other_weights_or_content_is_refused(
    mix, folders, tmp_path
):
    config = pretrain_config(mix, tmp_path / "run", max_steps=2)
    pretrain_gpt.main(config)

    def resumed(data_dir):
        pretrain_gpt.main(dataclasses.replace(config, data_dir=data_dir))

    moved = [shutil.copytree(folder, tmp_path / f"moved_{folder.name}") for folder in folders]
    resumed(",".join(f"{folder}:{10 * weight}" for folder, weight in zip(moved, WEIGHTS)))
    with pytest.raises(InputError, match=r"shares \[2000, 1000, 7000\] → \[1000, 2000, 7000\]"):
        resumed(",".join(f"{folder}:{weight}" for folder, weight in zip(folders, (1, 2, 7))))
    with pytest.raises(InputError, match=r"shares \[2000, 1000, 7000\] → 'joined'"):
        resumed(",".join(map(str, folders)))
    with pytest.raises(InputError, match=r"other settings .*data "):
        resumed(",".join(f"{folder}:{weight}" for folder, weight in zip(folders[::-1], WEIGHTS)))
    with pytest.raises(InputError, match=r"other settings .*data .*windows "):
        resumed(str(folders[0]))


def test_a_checkpoint_of_one_folder_keeps_what_it_held_before_mixes(folders, tmp_path):
    """An older version's checkpoint has no word of sources and phases, and goes on."""
    import torch

    from common import file_sha256, fingerprint

    config = pretrain_config(folders[0], tmp_path, max_steps=2)
    pretrain_gpt.main(config)
    path = tmp_path / "step_0000002"
    state = torch.load(path / "training_state.pt", weights_only=True)
    manifest = json.loads((folders[0] / "manifest.json").read_text())
    windows = sum((shard["tokens"] - 1) // 32 for shard in manifest["shards"] if "train" in shard["file"])
    content = {"data": fingerprint(manifest["shards"]), "windows": windows}
    assert state["content"] == content | {"init_from": None, "weights": None}
    del state["config"]["init_from"]
    torch.save(state | {"content": content}, path / "training_state.pt")
    told, file = json.loads((path / "checkpoint.json").read_text()), path / "training_state.pt"
    told["files"][file.name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    (path / "checkpoint.json").write_text(json.dumps(told))
    pretrain_gpt.main(dataclasses.replace(config, data_dir=f"{folders[0]}{os.sep}"))
    assert load_tokenizer(path)  # it is still the newest, and whole
