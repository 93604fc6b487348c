"""A signal finishes the step, saves and leaves."""

import shutil
import signal

import planted
import pytest
from conftest import SMALL, assert_recovered, pretrain_config, torchrun

from checkpoint import list_checkpoints, newest_checkpoint, step_of
from common import RESUMABLE

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
@pytest.mark.parametrize("world", [1, 2], ids=["one rank", "two ranks"])
def test_a_signal_amid_accumulation_finishes_the_step_saves_and_says_resumable(
    name, world, data_dir, tmp_path, fresh, undisturbed
):
    """The last rank alone gets it, between two micro-batches of step 3; all save after that step."""
    config = pretrain_config(data_dir, tmp_path / "run", **SMALL, save_every=100)
    faults, grace = [f"{name}:3:{world - 1}"], 30  # seconds, torchrun's own, for the second rank to end
    codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config, world, faults, None, grace).result(
        90
    )
    assert codes == [RESUMABLE] * world == [75] * world, log
    assert log.count("stopped by a signal; the same command continues") == 1
    assert newest_checkpoint(tmp_path / "run").name == "step_0000003"
    codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config, world).result(90)
    assert not any(codes) and f"continuing from {tmp_path}/run/step_0000003" in log, log
    shutil.rmtree(tmp_path / "run" / "step_0000003")
    assert_recovered(tmp_path / "run", undisturbed(world, save_every=100), 1)


def test_a_second_ctrl_c_quits_at_once(data_dir, tmp_path, fresh):
    config = pretrain_config(data_dir, tmp_path, **SMALL, save_every=100)
    codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config, 1, ["twice:3:0"]).result(90)
    assert codes == [-signal.SIGINT], log
    assert not list_checkpoints(tmp_path)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGINT"])
def test_torchrun_hands_a_signal_on_and_the_run_saves(name, data_dir, tmp_path, fresh, undisturbed):
    config = pretrain_config(data_dir, tmp_path / "run", **SMALL, save_every=100)
    options = ["--signals_to_handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    slow = "slow:1-6:0,slow:1-6:1"
    with torchrun(slow, config, *options) as job:
        planted.wait_for_rows(tmp_path / "run" / "metrics.jsonl", 2, 120)
        job.send_signal(signal.Signals[name])
        _, errors = job.communicate(timeout=60)
    assert job.returncode != 0
    stopped = newest_checkpoint(tmp_path / "run")
    assert stopped and 2 <= step_of(stopped) <= 5, errors
    codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config, 2).result(90)
    assert not any(codes) and f"continuing from {stopped}" in log, log
    assert_recovered(tmp_path / "run", undisturbed(2, save_every=100), 1)
