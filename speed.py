"""How fast a run is, measured against what its device can do, and where its time goes.

FLOPs of a token, what a device reaches at best, the most memory it has held, and a profile of a few steps.

C hidden size, H query heads, G key/value heads, D dimensions of a head, F width of the SwiGLU, L blocks,
V vocabulary, T tokens that attention reaches over.
"""

import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import make_folder
from distributed import Ranks
from gpt import GPTConfig


def flops_per_token(config: GPTConfig, T: float) -> float:
    """Floating-point operations to train on a token of a sequence of T: 6 N + 12 L H D T, as in appendix B of
    PaLM (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311).

    N are the weights of all matrix products: those of the blocks, and the head, tied or not. The lookup in
    the embedding and the norms' weights are not among them. Each weight takes a multiplication and an
    addition in the forward pass, and twice that in the backward pass. Attention counts all T keys of a
    query, although causality hides half of them. What is computed twice to save memory is not counted, nor
    is the optimizer.
    """
    C, D, L = config.hidden_size, config.head_dim, config.num_hidden_layers
    H, G, F, V = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
        config.vocab_size,
    )
    block = C * D * (H + 2 * G) + H * D * C + 3 * C * F
    return 6 * (L * block + C * V) + 12 * L * H * D * T


def mean_context(lengths: np.ndarray) -> float:
    """T for flops_per_token where sequences differ in length: that of a token's own sequence, on average over
    all tokens. A long sequence has more of them."""
    lengths = lengths.astype(np.float64)
    return float((lengths**2).sum() / lengths.sum())


# -- the peak of a device ------------------------------------------------------------------------------------

# Dense bf16 matrix products with sums in fp32, in TFLOP/s, by the name that the driver gives, whole and
# without "NVIDIA". From NVIDIA's data sheets; where one tells only "with sparsity", it is half of that. The
# GeForce cards: appendix A of the whitepapers on Ampere GA102, Ada and Blackwell RTX.
PEAKS = {
    r"A100-SXM4-(40|80)GB|A100-PCIE-40GB|A100 80GB PCIe": 312.0,
    r"H100 PCIe": 756.0,
    r"H100 NVL": 835.5,
    r"H100 80GB HBM3": 989.4,  # SXM
    r"H200 NVL": 835.5,
    r"H200": 989.4,
    r"GH200 .*": 989.4,
    r"B200": 2250.0,
    r"GB200": 2500.0,
    r"A10": 125.0,
    r"A10G": 70.0,
    r"A30": 165.0,
    r"A40": 149.7,
    r"L4": 121.0,
    r"L40": 181.0,
    r"L40S": 362.0,
    r"RTX A6000": 154.8,
    r"RTX 6000 Ada Generation": 364.2,
    r"GeForce RTX 3090": 71.0,
    r"GeForce RTX 4090": 165.2,
    r"GeForce RTX 5090": 209.5,
}


@dataclass
class Gpu:
    """A GPU that a step can be planned for."""

    name: str  # as the driver gives it
    bandwidth: float  # bytes a second, of its memory
    memory: float  # GiB that torch tells
    capability: tuple[int, int]
    processors: int  # streaming multiprocessors
    link: float  # bytes a second that it sends to the others of its machine
    network: float  # bytes a second that it sends to other machines

    @property
    def flops(self) -> float:
        """A second, dense bf16 matrix products."""
        return known_peak(self.name)


# From NVIDIA's data sheets of the SXM modules and of the L4; NVLink in one direction, PCIe 4.0 for the L4.
# Multiprocessors from the architectures' whitepapers. The network is that of the DGX H100, H200, A100 and
# B200, a 400 Gb/s port for each GPU (A100: 200); for the L4 100 Gb/s for a machine of eight, assumed.
GPUS = {
    "h100": Gpu("H100 80GB HBM3", 3.35e12, 79.2, (9, 0), 132, 450e9, 50e9),
    "h200": Gpu("H200", 4.8e12, 139.8, (9, 0), 132, 450e9, 50e9),
    "a100": Gpu("A100-SXM4-80GB", 2.039e12, 79.2, (8, 0), 108, 300e9, 25e9),
    "b200": Gpu("B200", 8e12, 178.4, (10, 0), 148, 900e9, 50e9),
    "l4": Gpu("L4", 0.3e12, 22.0, (8, 9), 58, 32e9, 1.6e9),
}


def known_peak(name: str) -> float | None:
    """The peak in FLOP/s of a GPU, by the name that torch.cuda.get_device_name gives; None for an unknown
    one, as a part of a GPU (MIG) or a laptop's."""
    if " MIG " in name:
        return None
    name = name.removeprefix("NVIDIA ")
    return next((1e12 * peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, name)), None)


def measured_peak(dtype: torch.dtype, seconds: float = 0.2) -> float:
    """The FLOP/s of the fastest matrix product that fits in a moment, on this process's CPU threads. The
    matrices grow until one product takes a fair part of the time."""
    best, n, end = 0.0, 256, time.perf_counter() + seconds
    x = torch.ones(n, n, dtype=dtype)
    while True:
        began = time.perf_counter()
        x @ x
        now = time.perf_counter()
        best = max(best, 2 * n**3 / (now - began))
        if now + (now - began) > end:
            return best
        if now + 16 * (now - began) < end:  # twice the size takes eight times as long
            n *= 2
            x = torch.ones(n, n, dtype=dtype)


def peak_flops(ranks: Ranks, dtype: torch.dtype) -> float | None:
    """The FLOP/s that this rank's device reaches at best in matrix products of a type: on a CPU measured at
    once, of a GPU known for bf16. None, and rank 0 says so, where nothing is known."""
    if ranks.device.type == "cpu":
        return measured_peak(dtype)
    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ranks.device.type
    peak = known_peak(name) if dtype == torch.bfloat16 else None
    if peak is None:
        kind = str(dtype).removeprefix("torch.")
        ranks.print(f"the {kind} peak of {name} is not known, so there is no mfu; PEAKS in speed.py has them")
    return peak


def peak_memory(device: torch.device) -> float | None:
    """The most GB (1e9 bytes) that tensors on a GPU have taken so far in this process; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


# -- a profile -----------------------------------------------------------------------------------------------


class Profiler:
    """Records what some steps do, kernel by kernel, and writes it to out_dir/profile/rank0.json.gz, a file a
    rank, for https://ui.perfetto.dev. With 0 steps it does nothing.

    The first steps compile and allocate, so SKIPPED of them are left out. A run that ends amid the recorded
    steps writes what there is; one that ends before says so.
    """

    SKIPPED = 5  # the profiler itself warms up in the last two

    def __init__(self, steps: int, out_dir: str | Path, ranks: Ranks):
        self.path = Path(out_dir) / "profile" / f"rank{ranks.rank}.json.gz"
        self.ranks, self.profile, self.written = ranks, None, False
        if steps:
            make_folder(self.path.parent)
            schedule = torch.profiler.schedule(wait=self.SKIPPED - 2, warmup=2, active=steps, repeat=1)
            self.profile = torch.profiler.profile(schedule=schedule, on_trace_ready=self.write)
            self.profile.start()

    def step(self) -> None:
        """Say that a step has ended."""
        if self.profile:
            self.profile.step()

    def write(self, profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(self.path))
        self.written = True
        self.ranks.print(f"{self.path} is written; https://ui.perfetto.dev shows it")

    def close(self) -> None:
        if self.profile:
            self.profile.stop()
            if not self.written:
                self.ranks.print(f"no profile is written; it begins after {self.SKIPPED} steps of a run")
