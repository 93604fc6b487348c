"""The quick start, shrunk."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT


def run_quickstart(out: Path) -> str:
    """What the quick start prints, as a user runs it, but shrunk to seconds."""
    small = "--log_every=2 --eval_every=4 --batch_tokens=1024 --max_steps=4 --wandb=off"
    environment = os.environ | {
        "PYTHON": sys.executable,
        "VENV": str(out / "venv"),
        "OUT": str(out),
        "PREPARE_FLAGS": "--max_tokens=300_000",
        "PRETRAIN_FLAGS": f"{small} --hidden_size=64 --num_hidden_layers=2 --eval_tokens=2048",
        "SFT_FLAGS": f"{small} --eval_questions=4 --max_new_tokens=8 --cache_dir={out}/cache",
    }
    command = ["bash", str(ROOT / "quickstart.sh")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_from_raw_text_to_a_chat_and_a_second_time_every_step_finds_its_result(tmp_path):
    printed = run_quickstart(tmp_path)
    assert not (tmp_path / "venv").exists()  # PYTHON is taken as it is
    for part in ("train: ", "val_bpb", "tok/s", "| The history of", "val_loss", "What is water?"):
        assert part in printed, part
    told = r"(\d+) of 25 plain questions in (known|new) wordings are answered right"
    assert [kind for _, kind in re.findall(told, printed)] == ["known", "new"]
    assert printed.rstrip().endswith(f"Talk to it: {sys.executable} chat.py --model={tmp_path}/chat")
    dtype, steps = re.search(r"matrix products in (\w+).*: (\d+) steps of pretraining", printed).groups()
    assert steps == {"bfloat16": "800", "float32": "300"}[dtype]
    assert f"1 x cpu, {dtype}" in printed or "1 x cuda:0, bfloat16" in printed
    for name in (
        "data/manifest.json",
        "base/loss.png",
        "base/metrics.jsonl",
        "chat/step_0000004/model.safetensors",
    ):
        assert (tmp_path / name).exists(), name
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    assert manifest["vocab_size"] == 4096 and manifest["splits"]["val"]["documents"] > 0
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = run_quickstart(tmp_path)
    assert "is already prepared" in again and again.count("is finished") == 2
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert np.all([part in again for part in ("What is water?", "Talk to it")])


def test_the_quick_start_validates_its_fine_tuning_at_least_five_times():
    text = (ROOT / "quickstart.sh").read_text()
    script = text[text.rindex("sft_gpt.py --model") :]
    steps, every = (int(re.search(rf"--{name}=(\d+)", script)[1]) for name in ("max_steps", "eval_every"))
    assert len({*range(0, steps, every), steps}) >= 5


def test_a_word_that_the_quick_start_does_not_know_is_told_and_nothing_is_done(tmp_path):
    environment = os.environ | {"VENV": str(tmp_path / "venv"), "OUT": str(tmp_path / "out")}
    command = ["bash", str(ROOT / "quickstart.sh"), "smollm"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and not done.stdout and not any(tmp_path.iterdir())
    assert done.stderr == (
        "error: smollm is not understood; write bash quickstart.sh, or smollm2 or setup behind it\n"
    )


def test_with_python_given_the_tests_run_in_that_environment_and_nothing_is_installed(tmp_path):
    environment = os.environ | {
        "PYTHON": sys.executable,
        "VENV": str(tmp_path / "venv"),
        "PATH": "/usr/bin:/bin",
    }
    command = ["bash", str(ROOT / "test.sh"), "--version"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout + done.stderr == f"pytest {pytest.__version__}\n"
    assert not (tmp_path / "venv").exists()


def test_an_environment_that_others_made_is_not_changed(tmp_path):
    (tmp_path / "theirs/bin").mkdir(parents=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHON"} | {"VENV": str(tmp_path / "theirs")}
    command = ["bash", str(ROOT / "quickstart.sh"), "setup"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"error: {tmp_path}/theirs is there already" in done.stderr
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["bin"]
