"""What bench.py counts, on tiny shapes; how fast things are is no test's matter."""

import re

import torch
from conftest import ALONE

import bench
from bench import Config

TINY = {"vocab_size": 320, "hidden_size": 32, "num_attention_heads": 2, "context_length": 32}


def test_the_most_memory_is_that_of_the_tensors_that_live_at_the_same_time():
    def run() -> None:
        for _ in range(3):
            kept = torch.ones(1_000_000)  # fp32
            torch.ones(500_000)
            del kept

    assert bench.most_memory(run, torch.device("cpu")) == 6_000_000


def test_a_steps_memory_is_told_beside_transformers_and_is_less_when_activations_are_computed_again(capsys):
    bench.bench_memory(Config(**TINY, num_hidden_layers=8, micro_batch_size=16), ALONE)
    told = re.findall(r"^  (\S.*?)  +[\d.]+ GB +([\d.]+) x", capsys.readouterr().out, re.MULTILINE)
    ratios = {name: float(ratio) for name, ratio in told}
    assert list(ratios) == ["transformers Qwen3", "GPTModel", "GPTModel, activations computed again"]
    theirs, ours, again = ratios.values()
    assert again < ours < theirs == 1
