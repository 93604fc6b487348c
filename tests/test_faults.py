"""Runs that are stopped, killed or damaged go on as if nothing had happened."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
from conftest import flags, pretrain_config, run, sft_config
from test_training import losses, weights

import pretrain_gpt
import sft_gpt
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


def killed_at_random(script: str, config, kills: int, longest: float) -> int:
    """Run a script in children that SIGKILL ends at random moments, until one finishes; how many were killed.

    For a process that has imported everything and started no thread, so that it may fork.
    """
    main, moments, done = sys.modules[script].main, random.Random(0), 0
    while True:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            main(config)
            os._exit(0)
        if done < kills:
            time.sleep(moments.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return done
        done += 1


@pytest.mark.parametrize("script", ["pretrain_gpt", "sft_gpt"])
def test_a_run_killed_at_twenty_moments_equals_an_undisturbed_one(
    script, data_dir, base_run, chats, tmp_path
):
    def config(name: str):
        if script == "pretrain_gpt":
            return pretrain_config(
                data_dir, tmp_path / name, max_steps=60, save_every=1, keep_last=2, eval_every=5
            )
        return sft_config(
            base_run, chats, tmp_path / name, max_steps=40, save_every=1, keep_last=2, eval_every=5
        )

    main = {"pretrain_gpt": pretrain_gpt, "sft_gpt": sft_gpt}[script].main
    began = time.monotonic()
    main(config("straight"))
    duration = time.monotonic() - began
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        kills = fresh.submit(killed_at_random, script, config("killed"), 20, duration / 3).result(timeout=120)
    last = 60 if script == "pretrain_gpt" else 40
    assert kills >= 10, "too few of the kills met the run"
    assert weights(tmp_path / "killed", last) == weights(tmp_path / "straight", last)
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    print(f"{script}: {kills} kills, {kills} recovered, 0 bytes lost")
    shutil.rmtree(tmp_path)
