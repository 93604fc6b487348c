"""What matrix products are computed in, and how many a second a device computes at best.

The type is chosen at a run's first start, recorded in its checkpoints, and kept. Weights, optimizer state,
norms' statistics, losses and sums of gradients are fp32 in any case.

    python precision.py     # what a run that starts now would multiply in
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from common import check_choice, run_script
from distributed import Ranks, usable_device

DTYPES = ("auto", "float32", "bfloat16")
# Where torch has MKL it computes fp32 products. On AMD's CPUs MKL leaves out AVX-512: oneDNN may be faster.
ONEDNN = "float32 by oneDNN"
# How many times as fast it must be to be chosen: far from what noise can make of equally fast ones.
MARGINS = {ONEDNN: 1.25, "bfloat16": 1.4}
EXACT = 2e-6  # relative error of an fp32 product of 512 terms, at most; in bf16 it is 3e-3


def settle_precision(ranks: Ranks, wanted: str, recorded: str | None = None) -> None:
    """Decide what these ranks multiply in, for a flag out of DTYPES and what a run has `recorded` earlier.

    A run keeps what it began with, so that a resumed one is bit-exact and no noisy measurement changes it.
    Otherwise rank 0 chooses for all.
    """
    if recorded and wanted in ("auto", recorded.split()[0]):
        ranks.precision = recorded
    else:
        ranks.precision = ranks.from_main(lambda: choose_precision(wanted, ranks.device))
    if ranks.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if ranks.dtype == torch.bfloat16 else "highest")
    elif ranks.device.type == "cpu":
        by_onednn = ranks.precision == ONEDNN and product_error("medium") < EXACT
        torch.set_float32_matmul_precision("medium" if by_onednn else "highest")
        if ranks.precision == "bfloat16" and not has_bf16():
            ranks.print(
                "warning: this CPU has no bf16 instructions, and bfloat16 is about 100 times slower than "
                "float32 on it; use --dtype=float32, with --force too if the run has begun"
            )


@cache
def choose_precision(wanted: str, device: torch.device) -> str:
    """The fastest of what a flag allows on a device: float32, float32 by oneDNN (if exact there) or bfloat16.

    "auto" is bfloat16 on CUDA, from Ampere on. On a CPU it is so if the CPU has instructions for it and a
    product is faster.
    """
    if device.type != "cpu" or wanted == "bfloat16":
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return "bfloat16" if wanted == "bfloat16" or (wanted == "auto" and fast) else "float32"
    seconds = product_seconds(bf16=wanted == "auto" and has_bf16())
    # On AMX, oneDNN rounds the factors to bf16.
    if not has_wide_avx512() or product_error("medium") >= EXACT:
        del seconds[ONEDNN]
    fp32 = ONEDNN if seconds["float32"] > MARGINS[ONEDNN] * seconds.get(ONEDNN, float("inf")) else "float32"
    faster = seconds[fp32] > MARGINS["bfloat16"] * seconds.get("bfloat16", float("inf"))
    return "bfloat16" if faster else fp32


def has_bf16() -> bool:
    """Whether this CPU has instructions for bf16 products."""
    known = torch.cpu.get_capabilities()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def has_wide_avx512(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether this is a CPU of AMD's family 26 (Zen 5) or later, which computes 512 bits at once. On others
    oneDNN is at most a tenth faster, and noise could decide."""
    try:
        told = Path(cpuinfo).read_text()
    except OSError:  # no Linux
        return False
    family = re.search(r"^cpu family\s*: (\d+)$", told, re.MULTILINE)
    return "AuthenticAMD" in told and family is not None and int(family[1]) >= 26


def with_precision(kind: str, compute: Callable):
    """What `compute` returns under set_float32_matmul_precision(kind)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(kind)
    try:
        return compute()
    finally:
        torch.set_float32_matmul_precision(before)


def factors() -> tuple[torch.Tensor, torch.Tensor]:
    """Two random matrices whose product takes a core about a millisecond."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(256, 512, generator=random), torch.randn(512, 512, generator=random)


def seconds_of(a: torch.Tensor, b: torch.Tensor) -> float:
    """How long their product takes."""
    began = time.perf_counter()
    a @ b
    return time.perf_counter() - began


def product_error(kind: str) -> float:
    """The error of an fp32 product under set_float32_matmul_precision(kind), relative to its norm."""
    x, w = factors()
    exact = x.double() @ w.double()
    return ((with_precision(kind, lambda: x @ w).double() - exact).norm() / exact.norm()).item()


def product_seconds(*, bf16: bool, rounds: int = 25) -> dict[str, float]:
    """The least time that a product takes in each way, measured in turn, so that all meet the same noise. One
    thread computes it: several wait for one another on a busy machine."""
    x, w = factors()
    ways = {"float32": ("highest", x, w), ONEDNN: ("medium", x, w)}
    if bf16:
        ways["bfloat16"] = ("highest", x.bfloat16(), w.bfloat16())
    seconds, threads = dict.fromkeys(ways, float("inf")), torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(rounds):
        for name, (kind, a, b) in ways.items():
            seconds[name] = min(seconds[name], with_precision(kind, partial(seconds_of, a, b)))
    torch.set_num_threads(threads)
    return seconds


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
    # name, bandwidth, memory, capability, processors, link, network
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
        ranks.print(
            f"the {kind} peak of {name} is not known, so there is no mfu; PEAKS in precision.py has them"
        )
    return peak


# -- the command ---------------------------------------------------------------------------------------------


@dataclass
class Config:
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # float32, bfloat16, or auto for the faster one


def main(config: Config) -> None:
    """Print what a run that starts now would multiply in."""
    check_choice("dtype", config.dtype, DTYPES)
    print(choose_precision(config.dtype, usable_device(config.device)))


if __name__ == "__main__":
    run_script(main, Config)
