"""A look at the machines before a run, in seconds: what differs, is not shared, or is slow.

    torchrun --standalone --nproc_per_node=8 preflight.py --data=data/fineweb-edu --out_dir=out/base

Each rank tells what it has and sees; rank 0 compares. Each failure is a sentence that names the host.
"""

import os
import platform
import secrets
import shutil
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from common import InputError, file_sha256, fingerprint, make_folder, one_line, run_script
from distributed import Ranks, join_ranks
from order import parse_sources


@dataclass
class Config:
    data: str = "data/fineweb-edu"  # the run's data; folders and files here have to be the same for all ranks
    out_dir: str = "out/base"  # the run's folder, shared by all ranks
    slow_factor: float = 2.0  # a GPU whose matrix product takes so many times the median is refused
    min_bandwidth: float = 0.0  # GB/s that an all-reduce must reach; 0 only reports it
    device: str = "auto"  # auto, cpu, cuda


PACKAGES = ("torch", "numpy", "transformers", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """What has to be the same on all ranks: Python, packages, CUDA, and this project's code."""
    code = fingerprint([[p.name, file_sha256(p)] for p in sorted(Path(__file__).parent.glob("*.py"))])
    packages = {name: version(name) for name in PACKAGES}
    return {"Python": platform.python_version(), **packages, "CUDA": str(torch.version.cuda), "code": code}


def seen_data(data: str) -> str:
    """A fingerprint of the names and sizes below the local paths of `data`, which may have weights; of the
    name alone for an id."""
    sizes = []
    for path in (Path(source.path) for source in parse_sources(data, "data", os.path.exists)):
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        sizes += [[str(p), p.stat().st_size] for p in files if p.is_file() and not p.name.startswith(".")]
    return fingerprint([data, sizes])


def product_seconds(device: torch.device) -> float:
    """The quickest of eight products of matrices of small integers, in seconds; inf if one is wrong.

    Entries are −1, 0, 1 and the width is below 2²⁴, so fp32 sums are exact, and so are TF32's and bf16's.
    """
    n = 4096 if device.type == "cuda" else 512
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-1, 2, (n, n), generator=generator).float() for _ in range(2))
    expected = a[:4].double() @ b.double()
    a, b, times = a.to(device), b.to(device), []
    for _ in range(8):
        began = time.perf_counter()
        product = a @ b
        rows = product[:4].cpu()  # waits for the device
        times.append(time.perf_counter() - began)
        if not torch.equal(rows.double(), expected) or not torch.equal(product, a @ b):
            return float("inf")
    return min(times)


def bandwidth(ranks: Ranks) -> float:
    """Bus bandwidth of an all-reduce in GB/s, 2 (n − 1) / n × bytes / seconds, as in nccl-tests."""
    if ranks.world == 1:
        return 0.0
    size = 256_000_000 if ranks.device.type == "cuda" else 16_000_000  # bytes
    values, times = torch.ones(size // 4, device=ranks.device), []
    for _ in range(4):
        ranks.barrier()
        began = time.perf_counter()
        dist.all_reduce(values)
        values[0].item()
        times.append(time.perf_counter() - began)
    return 2 * (ranks.world - 1) / ranks.world * size / min(times) / 1e9


def write_note(folder: str, name: str) -> str:
    """Write a file of one line; what went wrong, or nothing."""
    try:
        make_folder(folder)
        (Path(folder) / name).write_text("preflight\n")
    except (OSError, InputError) as error:
        return one_line(error)
    return ""


def gather(ranks: Ranks, value) -> list:
    """Each rank's value, on all ranks."""
    values = [value]
    if ranks.world > 1:
        values *= ranks.world
        dist.all_gather_object(values, value)
    return values


def look(config: Config, ranks: Ranks) -> list[dict]:
    """What each rank has and sees, in the order of ranks."""
    token = gather(ranks, secrets.token_hex(4))[0]  # so that no earlier preflight's files are seen
    mine = f".preflight-{token}-{ranks.rank}"
    unwritable = write_note(config.out_dir, mine)
    ranks.barrier()
    seen = (Path(config.out_dir) / f".preflight-{token}-0").exists()
    ranks.barrier()
    if not unwritable:
        (Path(config.out_dir) / mine).unlink()
    gpu = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"
    return gather(
        ranks,
        {
            "who": f"rank {ranks.rank} on {socket.gethostname()}",
            "device": gpu,
            "versions": versions(),
            "unwritable": unwritable,
            "seen": seen,
            "data": seen_data(config.data),
            "free": 0 if unwritable else shutil.disk_usage(config.out_dir).free,
            "seconds": product_seconds(ranks.device),
        },
    )


def failures_of(fact: dict, first: dict, usual: float, config: Config) -> Iterator[str]:
    """A sentence for each thing that is wrong with what one rank told, beside the first; `usual` are the
    median seconds of a matrix product."""
    who, there = fact["who"], first["versions"]
    differ = [f"{k} {v} (not {there[k]})" for k, v in fact["versions"].items() if v != there[k]]
    if differ:
        yield f"{who} has {', '.join(differ)}, unlike {first['who']}; use one environment for all"
    if fact["device"] != first["device"]:
        yield f"{who} has a {fact['device']}, {first['who']} a {first['device']}; ask for equal nodes"
    if fact["unwritable"]:
        yield f"{who} cannot write to {config.out_dir} ({fact['unwritable']}); choose another --out_dir"
    elif not fact["seen"] and not first["unwritable"]:
        yield (
            f"{who} does not see what {first['who']} wrote into {config.out_dir}; put it on a disk that all "
            f"share"
        )
    if fact["data"] != first["data"]:
        yield f"{who} does not see the same files in {config.data} as {first['who']}; share that folder"
    if fact["seconds"] == float("inf"):
        yield f"{who} computes a wrong matrix product on its {fact['device']}; leave this host out"
    elif fact["device"] != "CPU" and fact["seconds"] > config.slow_factor * usual:  # CPUs are often shared
        yield (
            f"{who} needs {fact['seconds'] * 1e3:.1f} ms for a matrix product, the median is "
            f"{usual * 1e3:.1f}; leave this host out, or see what else runs there"
        )


def failures(facts: list[dict], gb_per_second: float, config: Config) -> list[str]:
    """A sentence for each thing that is wrong with what the ranks told."""
    usual = statistics.median(fact["seconds"] for fact in facts)
    found = [sentence for fact in facts for sentence in failures_of(fact, facts[0], usual, config)]
    if len(facts) > 1 and gb_per_second < config.min_bandwidth:
        found.append(
            f"an all-reduce reaches {gb_per_second:.2f} GB/s, less than {config.min_bandwidth:g}; look at "
            f"the network between the hosts (NCCL_DEBUG=INFO shows what NCCL uses)"
        )
    return found


def main(config: Config) -> None:
    ranks = join_ranks(config.device)
    ranks.watch(1.0)  # minutes
    facts = look(config, ranks)
    ranks.at("an all-reduce")
    speed = bandwidth(ranks)
    found = failures(facts, speed, config) if ranks.is_main else []
    for sentence in found:
        print(f"error: preflight: {sentence}", file=sys.stderr, flush=True)
    failed = ranks.any(found)
    usual = statistics.median(fact["seconds"] for fact in facts)
    ranks.print(
        f"preflight: {ranks.world} x {facts[0]['device']}, a matrix product {usual * 1e3:.2f} ms, "
        f"all-reduce {speed:.2f} GB/s, {facts[0]['free'] / 1e9:.0f} GB free"
    )
    ranks.leave()
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main, Config)
