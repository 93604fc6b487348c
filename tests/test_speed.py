"""FLOPs, peaks, profiles."""

import gzip
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ALONE, random_ids, small_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import speed
from distributed import Ranks
from gpt import GPTConfig
from speed import Profiler, flops_per_token, known_peak, mean_context, measured_peak, peak_flops, peak_memory


def test_the_flops_of_a_token_are_those_computed_by_hand():
    """Per block: q 64 x 64, k and v 64 x 32 each, o 64 x 64, three matrices of 64 x 192; the head 64 x 1000;
    and attention over 128 tokens."""
    fields = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    block = 4096 + 2 * 2048 + 4096 + 3 * 12288
    expected = 6 * (3 * block + 64_000) + 12 * 3 * 64 * 128
    for tied in (False, True):
        config = GPTConfig(**fields, num_key_value_heads=2, tie_word_embeddings=tied)
        assert config.intermediate_size == 192 and flops_per_token(config, 128) == expected == 1_563_648


@pytest.mark.parametrize("change", [{}, {"num_key_value_heads": 2, "head_dim": 16}, {"qk_norm": False}])
def test_torch_counts_the_same_flops_to_the_last_one(change):
    """With attention as plain products; torch counts no fused kernel of the CPU."""
    model, (B, T) = small_model(**change), (2, 64)
    ids = random_ids(B, T)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, ids).backward()
    assert counter.get_total_flops() == B * T * flops_per_token(model.config, T)


def test_the_mean_context_gives_the_flops_of_sequences_of_all_lengths():
    config, lengths = small_model().config, np.array([3, 5, 5, 60])
    together = sum(n * flops_per_token(config, n) for n in lengths)
    assert lengths.sum() * flops_per_token(config, mean_context(lengths)) == pytest.approx(
        together, rel=1e-12
    )


NAMES = {
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA L4": 121,
    "NVIDIA L40": 181,
    "NVIDIA L40S": 362,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA GeForce RTX 4090": 165.2,
}
STRANGERS = [
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA A100-SXM-64GB",  # a supercomputer's own, with more multiprocessors
    "NVIDIA H20",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 3090 Ti",
    "Quadro RTX 6000",
    "AMD Instinct MI300X",
    "",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_gpus_name_fits_one_entry_of_the_peaks_wherever_that_stands(name):
    fitting = [p for p in speed.PEAKS if re.fullmatch(p, name.removeprefix("NVIDIA "))]
    assert len(fitting) == 1 and known_peak(name) == NAMES[name] * 1e12


@pytest.mark.parametrize("name", STRANGERS)
def test_a_gpu_that_is_like_a_known_one_has_no_peak(name):
    assert known_peak(name) is None


@pytest.mark.parametrize("name", speed.GPUS)
def test_each_gpu_that_can_be_planned_for_has_a_known_peak(name):
    gpu = speed.GPUS[name]
    assert gpu.flops == NAMES[f"NVIDIA {gpu.name}"] * 1e12


def test_an_unknown_peak_is_told_by_rank_0_and_gives_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H20")
    for rank, told in ((0, 1), (1, 0)):
        assert peak_flops(Ranks(rank, 2, torch.device("cuda:0")), torch.bfloat16) is None
        assert capsys.readouterr().out.count("the bfloat16 peak of NVIDIA H20 is not known") == told
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    h200 = Ranks(0, 1, torch.device("cuda:0"))
    assert peak_flops(h200, torch.bfloat16) == 989.4e12 and capsys.readouterr().out == ""
    assert peak_flops(h200, torch.float32) is None  # the table is of bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpus_peak_is_that_of_its_fastest_product(dtype, monkeypatch):
    """By a clock that stands still but in products, at 100 GFLOP/s for small matrices and 200 for large."""
    clock, product = SimpleNamespace(now=0.0), torch.Tensor.__matmul__

    def timed_product(x, y):
        assert x.dtype == y.dtype == dtype
        clock.now += 2 * len(x) ** 3 / (1e11 if len(x) < 512 else 2e11)
        return product(x[:1], y)

    monkeypatch.setattr(torch.Tensor, "__matmul__", timed_product)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock.now)
    assert measured_peak(dtype) == pytest.approx(2e11) and 0.1 < clock.now < 0.2


def test_on_a_cpu_the_peak_is_measured_and_memory_is_not():
    assert 1e8 < peak_flops(ALONE, torch.float32) < 1e15
    assert peak_memory(torch.device("cpu")) is None


# -- a profile -----------------------------------------------------------------------------------------------


def trace_of(folder, steps: int, done: int) -> list[str]:
    """The names of what was recorded in a run of `done` steps, each a matrix product and a step's number."""
    profiler = Profiler(steps, folder, Ranks(3, 4, torch.device("cpu")))
    for _ in range(done):
        torch.ones(4, 4) @ torch.ones(4, 4)
        profiler.step()
    profiler.close()
    (path,) = (folder / "profile").iterdir()
    assert path.name == "rank3.json.gz"
    return [event["name"] for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]


@pytest.mark.parametrize(("done", "recorded"), [(20, 2), (6, 1)])
def test_a_profile_holds_the_wanted_steps_and_their_kernels_also_of_a_run_that_ends_amid_them(
    tmp_path, done, recorded
):
    names = trace_of(tmp_path, 2, done)
    assert names.count("aten::mm") == recorded
    assert (
        {"ProfilerStep#5"} <= set(names) and "ProfilerStep#4" not in names and "ProfilerStep#7" not in names
    )


def test_without_steps_to_profile_nothing_is_written(tmp_path):
    profiler = Profiler(0, tmp_path, ALONE)
    profiler.step()
    profiler.close()
    assert not list(tmp_path.iterdir())


def test_a_run_too_short_for_a_profile_says_so(tmp_path, capsys):
    profiler = Profiler(2, tmp_path, ALONE)
    for _ in range(4):
        profiler.step()
    profiler.close()
    assert not list((tmp_path / "profile").iterdir())
    assert "no profile is written; it begins after 5 steps" in capsys.readouterr().out
