"""roofline.py: bytes and FLOPs of operations counted by hand, and a whole step's parts against formulas."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import fake_cuda_works

import bench
import roofline
from bench import Config
from common import InputError, parse_config
from roofline import GPUS, Cost, Meter, flops_of, moved_bytes

aten = torch.ops.aten


def test_an_operation_moves_what_it_reads_and_what_it_writes():
    a, b, ids = torch.zeros(4, 8), torch.zeros(8, 2), torch.zeros(3, dtype=torch.long)
    assert moved_bytes(aten.mm.default, (a, b), {}, a @ b) == 4 * (32 + 16 + 8)
    assert moved_bytes(aten.add_.Tensor, (a, a), {}, a) == 4 * (32 + 32 + 32)
    assert moved_bytes(aten.copy_.default, (a, a.bfloat16()), {}, a) == 32 * (2 + 4)
    assert moved_bytes(aten.zero_.default, (a,), {}, a) == 4 * 32
    assert moved_bytes(aten._foreach_mul_.Scalar, ([a, b], 2.0), {}, None) == 2 * 4 * (32 + 16)
    assert moved_bytes(aten.embedding.default, (a, ids), {}, a[ids]) == 3 * 8 + 2 * 4 * 3 * 8
    row = torch.zeros(1, 8).expand(100, 8)  # is read from its eight numbers
    assert moved_bytes(aten.neg.default, (row,), {}, -row) == 4 * (8 + 800)


def test_a_product_that_is_added_to_a_total_has_the_flops_of_the_product():
    total, a, b = torch.zeros(4, 2), torch.zeros(4, 8), torch.zeros(8, 2)
    added = aten.addmm.dtype_out, (total, a.bfloat16(), b.bfloat16(), torch.float32), {"out": total}
    assert flops_of(*added, total) == flops_of(aten.mm.default, (a, b), {}, total) == 2 * 4 * 8 * 2
    assert moved_bytes(*added, total) == 4 * 8 + 2 * (32 + 16) + 4 * 8


def test_a_kernel_takes_as_long_as_its_bytes_or_its_flops_whichever_is_longer():
    gpu = GPUS["h100"]
    meter = Meter(gpu)
    second_of_bytes, second_of_flops = 0.866 * gpu.bandwidth, 0.657 * gpu.flops
    meter.add("MLP", 3 * second_of_bytes, 2 * second_of_flops)
    meter.add("MLP", 1 * second_of_bytes, 2 * second_of_flops)
    meter.add("attention", 0, 0)
    assert meter.parts["MLP"].seconds == pytest.approx(5) and meter.parts["MLP"].kernels == 2
    assert meter.parts["attention"] == Cost(kernels=1, seconds=2e-6)


def test_without_triton_or_with_an_unknown_gpu_one_sentence_says_so(monkeypatch):
    monkeypatch.setattr(roofline, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs triton; pip install triton"):
        roofline.main(Config())
    with pytest.raises(InputError, match="h100"):
        roofline.main(Config(gpu="voodoo"))


def test_bench_gives_all_its_flags_to_the_roofline_and_ends_as_it_does(monkeypatch):
    def run(command):
        assert Path(command[1]).name == "roofline.py"
        assert parse_config(Config, command[2:]) == Config(hidden_size=64, gpu="l4", only="roofline")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(bench.subprocess, "run", run)
    with pytest.raises(SystemExit) as left:
        bench.main(Config(hidden_size=64, gpu="l4", only="roofline"))
    assert left.value.code == 1


@pytest.mark.slow
@fake_cuda_works
@pytest.mark.skipif(not shutil.which("g++"), reason="fake CUDA tensors need a C++ compiler (g++)")
@pytest.mark.skipif(not find_spec("triton"), reason="torch's compiler needs triton to fuse for a GPU")
def test_the_parts_of_a_step_have_the_flops_of_their_products():
    """MLP: 3 matrices, 6 FLOPs a weight and token. Head: one. Attention: its matrices, and of the two
    products over T keys flash attention computes one more in its backward pass, 14 instead of 12."""
    C, F, V, L, T, B, H, n = 512, 1408, 49152, 2, 1024, 8, 8, 2
    flags = f"--vocab_size={V} --hidden_size={C} --num_hidden_layers={L} --num_attention_heads={H} "
    flags += f"--context_length={T} --micro_batch_size={B} --batch_tokens={n * B * T}"
    command = [sys.executable, Path(roofline.__file__), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    tables = done.stdout.split("\n\n")[1:]
    row = r"  ([a-zA-Z, ]+?) +([\d,]+) +([\d.]+) +([\d.]+) +[\d.]+ +[\d.]+%"
    ours, _, without_mask = ({m[0]: m[1:] for m in re.findall(row, table)} for table in tables)
    tokens = n * B * T
    for parts in (ours, without_mask):
        assert float(parts["MLP"][2]) == round(6 * 3 * C * F * L * tokens / 1e12, 3)
        assert float(parts["head and loss"][2]) == round(6 * C * V * tokens / 1e12, 3)
        assert float(parts["attention"][2]) == round((6 * 4 * C * C + 14 * C * T) * L * tokens / 1e12, 3)
    # Logits are written in fp32 and read once, their gradient is written in bf16 and read by two products: 14
    # bytes. Three are for the weights. To read the logits once more would be another four.
    assert 14 < float(ours["head and loss"][1]) * 1e9 / (V * tokens) < 18
    assert int(ours["embedding"][0]) == 2 * n  # forward and backward, each micro-batch
