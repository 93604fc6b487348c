"""The comparison with nanoGPT, on a stand-in for its model.py."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ALONE, ROOT, refused

import bench_time
from bench import Config
from common import parse_config
from distributed import Ranks
from pretrain_gpt import Config as Pretraining

STAND_IN = """
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    dropout: float
    bias: bool


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = nn.Linear(config.vocab_size, config.vocab_size, bias=False)

    def configure_optimizers(self, decay, rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=rate, betas=betas, weight_decay=decay)

    def forward(self, x, y):
        logits = self.table(F.one_hot(x, self.table.in_features).float())
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten())
"""


@pytest.fixture
def nanogpt(tmp_path):
    (tmp_path / "nanogpt").mkdir()
    (tmp_path / "nanogpt" / "model.py").write_text(STAND_IN)
    return str(tmp_path / "nanogpt")


def test_the_recipe_is_the_quick_start_s():
    script = (ROOT / "quickstart.sh").read_text().replace("\\\n", " ")
    command = next(line for line in script.splitlines() if "pretrain_gpt.py" in line)
    flags = [flag for flag in re.findall(r"--\w+=\S+", command) if "$" not in flag]
    there = vars(parse_config(Pretraining, flags))
    named = [flag[2:].partition("=")[0] for flag in flags]
    compared = [name for name in named if not name.startswith(("eval_", "save_"))]
    assert len(compared) >= 13
    assert {name: there[name] for name in compared} == {
        name: getattr(bench_time.QUICK_START, name) for name in compared
    }


@pytest.mark.parametrize(("needed", "start"), [(70, 60), (70, 70), (70, 110), (10, 40), (3, 10)])
def test_the_fewest_steps_are_found_from_any_start(needed, start):
    def reach(steps: int) -> tuple[float, float]:
        return (5.0 if steps >= needed else 6.0), steps / 10

    grains = -(-needed // bench_time.GRAIN) * bench_time.GRAIN
    assert bench_time.fewest_steps(reach, 5.0, start) == (grains, 5.0, grains / 10)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_nanogpt_learns_in_each_type(kind, nanogpt):
    tokens, ranks = np.arange(4000) % 16, Ranks(0, 1, torch.device("cpu"))
    ranks.precision = kind
    config = Config(their_steps=100)
    settings = {"shape": bench_time.SHAPE, "tokens": tokens, "vocab_size": 16, "ranks": ranks}
    model, seconds = bench_time.train_nanogpt(
        bench_time.nanogpt(nanogpt), config=config, rate=0.3, **settings
    )
    ids = torch.arange(16)[None]
    assert model(ids, (ids + 1) % 16)[1] < 0.5 and seconds > 0  # ln 16 = 2.8 before


def test_the_schedule_rises_to_the_rate_and_falls_to_a_tenth():
    rates = [bench_time.cosine(step, 600, 1e-3) for step in range(601)]
    assert max(rates) == rates[bench_time.WARMUP] == pytest.approx(1e-3)
    assert rates[600] == pytest.approx(1e-4)
    assert rates[: bench_time.WARMUP] == sorted(rates[: bench_time.WARMUP]) and rates[0] > 0


def test_what_is_missing_is_one_sentence(nanogpt, tmp_path):
    refused("--nanogpt= has no model.py; git clone", bench_time.compare, Config(), ALONE)
    refused(
        "has no model.py", bench_time.compare, Config(nanogpt=str(tmp_path), data_dir=str(tmp_path)), ALONE
    )
    refused("needs --data_dir", bench_time.compare, Config(nanogpt=nanogpt), ALONE)


@pytest.mark.slow
def test_both_are_trained_on_the_same_data_and_the_margin_is_that_of_their_seconds(
    nanogpt, prepared_for_time, monkeypatch, capsys
):
    monkeypatch.setattr(bench_time, "has_bf16", lambda: False)
    small = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "batch_tokens": 1024}
    monkeypatch.setattr(bench_time, "RECIPE", replace(bench_time.RECIPE, **small))
    runs, run_ours = [], bench_time.run_ours
    monkeypatch.setattr(bench_time, "run_ours", lambda *a, **k: runs.append(run_ours(*a, **k)) or runs[-1])
    config = Config(
        nanogpt=nanogpt, data_dir=str(prepared_for_time), their_steps=110, eval_windows=2, seeds=2,
        dtype="float32",
    )  # fmt: skip
    bench_time.compare(config, ALONE)
    said = capsys.readouterr().out
    assert "as shipped, float32: 4 x 256" in said and "of our shape, float32: 1 x 32" in said
    peers = len(bench_time.RATES)
    rates = [float(loss) for loss in re.findall(r"rate \S+ +([\d.]+) nats/token", said)]
    target, seconds = map(float, re.search(r"shipped: ([\d.]+) after ([\d.]+) s; ours", said).groups())
    losses = [float(loss) for loss in re.findall(r"seed \d: ([\d.]+) after \d+ steps", said)]
    assert len(rates) == 2 * peers and target == min(rates[:peers])
    assert len(losses) == 4 and max(losses[:2]) <= target
    losses = losses[:2]
    chosen = [next(took for found, took in runs if f"{found:.4f}" == f"{loss:.4f}") for loss in losses]
    margin = sum((seconds + 0.05) / took for took in chosen) / 2
    assert 0 < float(re.search(r"in 1/([\d.]+)", said)[1]) <= margin + 0.06


@pytest.fixture
def prepared_for_time(tokenizer_dir, tmp_path):
    from conftest import prepare, text, write_jsonl

    source = write_jsonl(tmp_path / "texts.jsonl", ({"text": text(i)} for i in range(400)))
    return prepare(tmp_path / "shards", source, tokenizer_dir, val_fraction=0.2, shard_tokens=10**6)
