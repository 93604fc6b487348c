"""Ranks that raise, are killed, hang, or come back in another number."""

import dataclasses
import os
import re
import time
from functools import partial
from pathlib import Path

import planted
import pytest
from conftest import SMALL, assert_recovered, losses, pretrain_config, torchrun

from checkpoint import newest_checkpoint
from distributed import Ranks

pytestmark = pytest.mark.slow


def test_a_users_mistake_is_told_once_and_torchrun_does_not_try_again(tmp_path):
    config = pretrain_config(tmp_path / "missing", tmp_path / "run", **SMALL)
    with torchrun("none:1", config, "--max_restarts=3") as job:
        printed, errors = job.communicate(timeout=120)
    assert job.returncode != 0
    assert (printed + errors).count("holds no token shards; make them with prepare_data.py") == 1


def ranks_alive(out_dir) -> list[int]:
    """The processes that still train into a folder."""
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.parent.name != str(os.getpid()) and f"--out_dir={out_dir}" in readable(path)
    ]


def readable(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process has ended
        return ""


def test_a_rank_that_raises_ends_all_with_its_error(data_dir, tmp_path):
    config = pretrain_config(data_dir, tmp_path / "run", **SMALL)
    with torchrun("raise:3:1", config) as job:
        planted.wait_for_rows(tmp_path / "run" / "metrics.jsonl", 2, 120)
        began = time.monotonic()
        _, errors = job.communicate(timeout=60)
    assert job.returncode == 1 and time.monotonic() - began < 30
    assert "RuntimeError: planted in rank 1" in errors and not ranks_alive(tmp_path / "run")
    assert newest_checkpoint(tmp_path / "run").name == "step_0000002"


def test_torchrun_brings_a_job_back_whose_ranks_raise_and_are_killed(data_dir, tmp_path, undisturbed):
    """Rank 1 raises in step 3; after the restart rank 0 is killed in step 6; after another the run ends, and
    as if nothing had been. That --resume=none was said at first does not stop the restarts."""
    config = pretrain_config(data_dir, tmp_path / "run", **SMALL, resume="none")
    with torchrun("raise:3:1,SIGKILL:6:0:1", config, "--max_restarts=2", "--shutdown_timeout=5") as job:
        printed, errors = job.communicate(timeout=200)
    assert job.returncode == 0, errors
    assert "RuntimeError: planted in rank 1" in errors and "exitcode: -9" in errors
    # the kill may meet the writing of step 4
    assert re.findall(r"continuing from \S+/step_000000(\d)", printed) in (["2", "4"], ["2", "2"]), printed
    assert_recovered(tmp_path / "run", undisturbed(2), 2)


@pytest.mark.parametrize("name", ["raise", "SIGKILL"])
def test_the_other_rank_ends_by_itself_within_seconds(name, data_dir, tmp_path, fresh, undisturbed):
    """On CPUs it notices that the connection broke, whether torchrun ends it or not."""
    config = pretrain_config(data_dir, tmp_path / "run", **SMALL)
    forked = partial(fresh.submit, planted.forked, "pretrain_gpt", config, 2)
    codes, log, seconds = forked([f"{name}:3:1"], grace=30).result(90)
    assert codes == [1, -9 if name == "SIGKILL" else 1] and seconds < 20, log
    codes, log, _ = forked().result(90)
    assert not any(codes), log
    assert_recovered(tmp_path / "run", undisturbed(2), 1)


@pytest.mark.parametrize("name", ["sleep", "SIGSTOP"])
def test_a_hung_rank_is_reported_with_the_rank_and_the_step(name, data_dir, tmp_path, fresh, undisturbed):
    config = pretrain_config(data_dir, tmp_path / "run", **SMALL, timeout_minutes=0.05)
    forked = partial(fresh.submit, planted.forked, "pretrain_gpt", config, 2)
    codes, log, seconds = forked([f"{name}:3:1"]).result(90)
    assert codes[0] == 1 and codes[1] != 0 and seconds < 30, log
    told = "0" if name == "SIGSTOP" else "[01]"  # one that sleeps can tell by itself
    assert re.search(f"error: rank {told} of 2 has made no progress for 3 s in step 3; it stands at", log), (
        log
    )
    assert "in forward_backward" in log  # where it waits
    codes, log, _ = forked().result(90)
    assert not any(codes), log
    assert_recovered(tmp_path / "run", undisturbed(2, timeout_minutes=0.05), 1)


def test_a_run_resumed_on_other_ranks_continues_the_same_batches(data_dir, tmp_path, fresh):
    """Steps 1–2 on one rank, 3–4 on two, 5 on three, 6 on one, with other micro-batches each time."""
    straight = pretrain_config(data_dir, tmp_path / "straight", **SMALL)
    elastic = pretrain_config(data_dir, tmp_path / "elastic", **SMALL)
    fresh.submit(planted.forked, "pretrain_gpt", straight).result(90)
    for world, size, stop in ((1, 4, 2), (2, 1, 4), (3, 2, 5), (1, 2, None)):
        config = dataclasses.replace(elastic, micro_batch_size=size, save_every=100)
        faults = [f"SIGTERM:{stop}:0"] if stop else []
        codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config, world, faults).result(90)
        assert set(codes) == {75 if stop else 0}, log
    for a, b in zip(losses(tmp_path / "straight"), losses(tmp_path / "elastic"), strict=True):
        for x, y in zip(a, b):
            assert x == y or abs(x - y) <= 1e-5 * max(1, abs(x)), (a, b)


def test_ranks_without_a_common_folder_do_not_train(data_dir, tmp_path, fresh):
    """As on two machines with a folder of their own each."""
    config = pretrain_config(data_dir, tmp_path / "run", **SMALL)
    assert not any(fresh.submit(planted.forked, "pretrain_gpt", config, 2).result(90)[0])
    codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config, 2, (), elsewhere).result(90)
    assert codes[1] == 1 and codes[0] != 0, log
    assert "rank 1 does not see" in log and "have to be one folder each for all machines" in log, log


def elsewhere(out_dir: Path) -> None:
    """Have rank 1 look for the checkpoint in another folder."""
    if os.environ["RANK"] == "1":
        original = Ranks.require_shared
        Ranks.require_shared = lambda ranks, path: original(ranks, out_dir / "elsewhere" / path.name)


def test_a_second_start_in_the_same_folder_is_refused_while_the_first_runs(
    data_dir, tmp_path, fresh, undisturbed
):
    config = pretrain_config(data_dir, tmp_path / "run", **SMALL)
    (first, second), log = fresh.submit(twice_at_once, config).result(90)
    assert second == [1] and re.search(r"run is in use by process \d+ on .*; wait for it or end it", log), log
    assert first == [0]
    assert_recovered(tmp_path / "run", undisturbed(1), 1)


def twice_at_once(config) -> tuple:
    pids = planted.launch("pretrain_gpt", config, 1, ["slow:3-6:0"])
    planted.wait_for_rows(Path(config.out_dir) / "metrics.jsonl", 2)
    second, log, _ = planted.forked("pretrain_gpt", config)
    return (planted.finish(pids, 60), second), log
