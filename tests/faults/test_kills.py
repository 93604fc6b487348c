"""Runs killed at random moments end in the same bytes as undisturbed ones."""

import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import planted
import pytest
from conftest import assert_recovered, dpo_config, pretrain_config, sft_config

pytestmark = pytest.mark.slow


def killed_at_random(script: str, config, world: int, kills: int, step_seconds: float) -> Counter:
    """Run a script in forked ranks, of which SIGKILL ends one or all at a random moment of the start or the
    first steps; after so many kills let it finish. How many kills met the run, and how many of them a
    checkpoint half written."""
    moments, counts, metrics = random.Random(0), Counter(), Path(config.out_dir) / "metrics.jsonl"
    for _ in range(kills):
        pids = planted.launch(script, config, world)
        steps = moments.choice([0, 1, 1, 2])
        if steps:
            planted.wait_for_rows(metrics, steps)
        time.sleep(moments.uniform(0, min(2 * step_seconds, 0.15) if steps else 0.3))
        alone = world > 1 and moments.random() < 0.5
        for pid in [moments.choice(pids)] if alone else pids:
            os.kill(pid, signal.SIGKILL)
        codes = planted.finish(pids, 60, grace=moments.uniform(0, 0.5))
        counts["kills"] += -signal.SIGKILL in codes
        counts["saving"] += any(Path(config.out_dir).glob(".step_*.partial"))
    counts["failed"] = any(planted.finish(planted.launch(script, config, world), 60))
    return counts


@pytest.mark.parametrize("world", [1, 2], ids=["one rank", "two ranks"])
@pytest.mark.parametrize("script", ["pretrain_gpt", "sft_gpt", "dpo_gpt"])
def test_a_run_killed_at_twenty_moments_equals_an_undisturbed_one(
    script, world, data_dir, base_run, chats, preferences, tmp_path, fresh
):
    def config(name: str):
        changes = {"max_steps": 60, "save_every": 1, "keep_last": 2, "eval_every": 20}
        if script == "pretrain_gpt":
            return pretrain_config(data_dir, tmp_path / name, length_warmup_fraction=0.75, **changes)
        if script == "dpo_gpt":
            return dpo_config(base_run, preferences, tmp_path / name, **changes)
        return sft_config(base_run, chats, tmp_path / name, **changes)

    codes, log, duration = fresh.submit(planted.forked, script, config("straight"), world).result(90)
    assert not any(codes), log
    counts = fresh.submit(killed_at_random, script, config("killed"), world, 20, duration / 60).result(600)
    print(f"{script}, {world} ranks, {duration:.1f} s undisturbed: {dict(counts)}")
    assert not counts["failed"] and counts["kills"] >= 18, counts
    assert_recovered(tmp_path / "killed", tmp_path / "straight", counts["kills"])
    shutil.rmtree(tmp_path)
