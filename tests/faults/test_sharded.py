"""The faults of the other rooms, met by a model that is split over ranks (FSDP2)."""

import shutil
from functools import partial

import planted
import pytest
from conftest import SMALL, assert_recovered, dpo_config, losses, pretrain_config, sft_config

from checkpoint import newest_checkpoint
from common import read_records

pytestmark = pytest.mark.slow


def test_a_split_run_whose_ranks_are_killed_equals_an_undisturbed_one(data_dir, tmp_path, fresh, undisturbed):
    """Of three ranks each is killed once, in another step; the others end by themselves."""
    config = pretrain_config(data_dir, tmp_path / "run", **SMALL, shard="full", save_every=1)
    forked = partial(fresh.submit, planted.forked, "pretrain_gpt", config, 3)
    for rank, step in enumerate((1, 3, 6)):
        codes, log, _ = forked([f"SIGKILL:{step}:{rank}"], grace=30).result(90)
        assert codes == [-9 if r == rank else 1 for r in range(3)], log
    codes, log, _ = forked().result(90)
    assert not any(codes), log
    assert_recovered(tmp_path / "run", undisturbed(3, shard="full", save_every=1), 3)


def test_a_signal_to_one_rank_stops_a_split_run_after_its_step(data_dir, tmp_path, fresh, undisturbed):
    config = pretrain_config(data_dir, tmp_path / "run", **SMALL, shard="full", save_every=100)
    forked = partial(fresh.submit, planted.forked, "pretrain_gpt", config, 3)
    codes, log, _ = forked(["SIGTERM:3:2"], grace=30).result(90)
    assert codes == [75] * 3 and newest_checkpoint(tmp_path / "run").name == "step_0000003", log
    codes, log, _ = forked().result(90)
    assert not any(codes), log
    shutil.rmtree(tmp_path / "run" / "step_0000003")
    assert_recovered(tmp_path / "run", undisturbed(3, shard="full", save_every=100), 1)


def test_a_hung_rank_of_a_split_model_is_reported_with_its_step(data_dir, tmp_path, fresh):
    config = pretrain_config(data_dir, tmp_path, **SMALL, shard="full", timeout_minutes=0.05)
    codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config, 2, ["SIGSTOP:3:1"]).result(90)
    assert codes == [1, -9], log
    assert "error: rank 0 of 2 has made no progress for 3 s in step 3; it stands at" in log


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_nan_on_one_rank_skips_the_step_of_a_split_model_as_of_a_whole_one(
    optimizer, data_dir, tmp_path, fresh
):
    for shard in ("none", "full"):
        config = pretrain_config(data_dir, tmp_path / shard, **SMALL, shard=shard, optimizer=optimizer)
        codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config, 2, ["nan:3:1"]).result(90)
        assert not any(codes), log
        rows = read_records(tmp_path / shard / "metrics.jsonl")
        assert [row["step"] for row in rows if "skipped" in row] == [3]
    for a, b in zip(losses(tmp_path / "none"), losses(tmp_path / "full"), strict=True):
        assert all(x == y or x != x or abs(x - y) <= 1e-5 * abs(x) for x, y in zip(a, b)), (a, b)


@pytest.mark.parametrize("script", ["sft_gpt", "dpo_gpt"])
def test_fine_tuning_goes_on_under_any_engine_and_warns_of_nothing(
    script, base_run, chats, preferences, tmp_path, fresh
):
    """Split over two ranks, then whole on three, then split over three, then on one."""

    def config(name: str, **changes):
        if script == "sft_gpt":
            return sft_config(base_run, chats, tmp_path / name, save_every=100, **changes)
        return dpo_config(base_run, preferences, tmp_path / name, save_every=100, **changes)

    codes, log, _ = fresh.submit(planted.forked, script, config("straight")).result(90)
    assert not any(codes), log
    for world, shard, stop in ((2, "full", 1), (3, "none", 2), (3, "full", 3), (1, "full", None)):
        faults = [f"SIGTERM:{stop}:0"] if stop else []
        changed = config("elastic", shard=shard, micro_batch_size=1)
        codes, log, _ = fresh.submit(planted.forked, script, changed, world, faults).result(90)
        assert set(codes) == {75 if stop else 0} and "Warning" not in log, log
    for a, b in zip(losses(tmp_path / "straight"), losses(tmp_path / "elastic"), strict=True):
        assert all(x == y or abs(x - y) <= 1e-4 * abs(x) for x, y in zip(a, b)), (a, b)
