"""Runs that are stopped, killed or damaged go on as if nothing had happened."""

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import planted
import pytest
from conftest import assert_recovered, flags, pretrain_config, run, sft_config
from test_training import losses, weights

import pretrain_gpt
import training


def raise_at(monkeypatch, module, step: int, *numbers: int) -> None:
    """Have the process get signals in the middle of a step."""
    original = training.train_step
    calls = []

    def step_with_signals(*arguments):
        calls.append(arguments)
        if len(calls) == step:
            for number in numbers:
                signal.raise_signal(number)
        return original(*arguments)

    monkeypatch.setattr(module.training, "train_step", step_with_signals)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_step_saves_and_says_resumable(number, data_dir, tmp_path, monkeypatch, capsys):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path / "straight"))
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == handlers
    raise_at(monkeypatch, pretrain_gpt, 3, number)
    try:
        with pytest.raises(SystemExit) as stop:
            pretrain_gpt.main(pretrain_config(data_dir, tmp_path / "run", save_every=100))
    finally:
        for n, handler in zip((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), handlers):
            signal.signal(n, handler)
    assert stop.value.code == training.RESUMABLE == 75
    assert "stopped by a signal; the same command continues" in capsys.readouterr().out
    assert training.newest_checkpoint(tmp_path / "run").name == "step_0000003"
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path / "run"))
    assert weights(tmp_path / "run", 6) == weights(tmp_path / "straight", 6)
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


def test_a_second_ctrl_c_quits_at_once(data_dir, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    raise_at(monkeypatch, pretrain_gpt, 3, signal.SIGINT, signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            pretrain_gpt.main(pretrain_config(data_dir, tmp_path, save_every=100))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert not training.checkpoints(tmp_path)


def test_a_signal_to_one_rank_stops_both(data_dir, tmp_path):
    """Rank 1 alone gets SIGUSR1; both save after the same step, and the run goes on."""
    script = tmp_path / "driver.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path[:0] = {[str(p) for p in sys.path if p]!r}\n"
        "import pretrain_gpt, training\n"
        "original, calls = training.train_step, []\n"
        "def step(*arguments):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3 and os.environ['RANK'] == '1':\n"
        "        signal.raise_signal(signal.SIGUSR1)\n"
        "    return original(*arguments)\n"
        "training.train_step = step\n"
        "training.run_script(pretrain_gpt.main, pretrain_gpt.Config)\n"
    )
    config = pretrain_config(data_dir, tmp_path / "run", save_every=100)
    result = run(str(script), *flags(config), ranks=2)
    assert result.returncode != 0 and "exitcode  : 75" in result.stderr, result.stderr
    assert training.newest_checkpoint(tmp_path / "run").name == "step_0000003"


def killed_at_random(script: str, config, world: int, kills: int, step_seconds: float) -> Counter:
    """Run a script in forked ranks, of which SIGKILL ends one or all at a random moment of the start or of the
    first steps; after so many kills let it finish. How many kills met the run, and how many of them a
    checkpoint half written."""
    moments, counts, metrics = random.Random(0), Counter(), Path(config.out_dir) / "metrics.jsonl"
    for _ in range(kills):
        pids = planted.launch(script, config, world)
        steps = moments.choice([0, 1, 1, 2])
        if steps:
            planted.wait_for_rows(metrics, steps)
        time.sleep(moments.uniform(0, 2 * step_seconds if steps else 0.3))
        alone = world > 1 and moments.random() < 0.5
        for pid in [moments.choice(pids)] if alone else pids:
            os.kill(pid, signal.SIGKILL)
        codes = planted.finish(pids, 60, grace=moments.uniform(0, 0.5))
        counts["kills"] += -signal.SIGKILL in codes
        counts["saving"] += any(Path(config.out_dir).glob(".step_*.partial"))
    counts["failed"] = any(planted.finish(planted.launch(script, config, world), 60))
    return counts


@pytest.mark.parametrize("world", [1, 2], ids=["one rank", "two ranks"])
@pytest.mark.parametrize("script", ["pretrain_gpt", "sft_gpt"])
def test_a_run_killed_at_twenty_moments_equals_an_undisturbed_one(
    script, world, data_dir, base_run, chats, tmp_path, fresh
):
    def config(name: str):
        changes = {"max_steps": 60, "save_every": 1, "keep_last": 2, "eval_every": 20}
        if script == "pretrain_gpt":
            return pretrain_config(data_dir, tmp_path / name, **changes)
        return sft_config(base_run, chats, tmp_path / name, **changes)

    codes, log, duration = fresh.submit(planted.forked, script, config("straight"), world).result(90)
    assert not any(codes), log
    counts = fresh.submit(killed_at_random, script, config("killed"), world, 20, duration / 60).result(180)
    print(f"{script}, {world} ranks, {duration:.1f} s undisturbed: {dict(counts)}")
    assert not counts["failed"] and counts["kills"] >= 18, counts
    assert_recovered(tmp_path / "killed", tmp_path / "straight", counts["kills"])
    shutil.rmtree(tmp_path)
