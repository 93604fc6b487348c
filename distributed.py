"""The processes that torchrun starts, their devices, the signals they get, and a watchdog over them."""

import faulthandler
import json
import os
import re
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common import InputError, die_with_launcher, keep_freed_memory, surviving_lost_output


@dataclass
class Ranks:
    """This process among those that torchrun started, and its device; alone when there is no torchrun."""

    rank: int
    world: int
    device: torch.device
    store: dist.Store | None = None
    watchdog: "Watchdog | None" = None
    answers: int = 0  # that rank 0 has given so far
    shard: str = "none"  # how parameters are split over the ranks: none, full or hybrid
    # All micro-batches have one shape, and all ranks equally many. Then nothing is compiled twice, and the
    # ranks of a split model compute together. On a CPU without either, smaller batches are faster.
    even_batches: bool = False
    precision: str = ""  # what products are computed in, see precision.py; at first bfloat16 on CUDA only

    def __post_init__(self):
        self.precision = self.precision or ("bfloat16" if self.device.type == "cuda" else "float32")
        self.own_work, self.slow = OwnWork(self.device), None  # the rank that was slow when last asked
        if self.store:
            self.store.set(f"host of rank {self.rank}", socket.gethostname())

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dtype(self) -> torch.dtype:
        """The type of matrix products."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    @property
    def sharded(self) -> bool:
        return self.world > 1 and self.shard != "none"

    def share(self, items: Sequence | np.ndarray, size: int, *, most: int = 0) -> list[list]:
        """This rank's share of a step's items in micro-batches of at most `size`; at least one of them.

        None stands for padding. With even_batches a step of `most` items, the largest, decides the shape.
        """
        own = list(items)[self.rank :: self.world] or [None]
        if self.even_batches:
            each = -(-max(most, len(items)) // self.world)
            count = -(-each // size)
            size = -(-each // count)
            own += [None] * (count * size - len(own))
        return [own[i : i + size] for i in range(0, len(own), size)]

    def print(self, *values) -> None:
        """Print on rank 0."""
        if self.is_main:
            with surviving_lost_output():
                print(*values, flush=True)

    @property
    def sum_device(self) -> torch.device:
        """Where sums over the ranks are: on the GPU, where nobody waits for them; else on the CPU."""
        return self.device if self.device.type == "cuda" else torch.device("cpu")

    def total(self, *values: float | torch.Tensor) -> torch.Tensor:
        """Each value's sum over all ranks, in float64, on sum_device."""
        there = {"device": self.sum_device, "dtype": torch.float64}
        on_gpu = self.sum_device.type == "cuda"
        total = torch.stack(
            [
                value.to(self.sum_device, non_blocking=on_gpu).double()
                if isinstance(value, torch.Tensor)
                else torch.full((), value, **there)  # written there, not copied, so nobody waits
                for value in values
            ]
        )
        if self.world > 1:
            dist.all_reduce(total)
        return total

    def sum(self, *values: float | torch.Tensor) -> list:
        """Each value's sum over all ranks, a tensor's as a list. A GPU is waited for."""
        return self.total(*values).tolist()

    def any(self, value: bool) -> bool:
        """Whether it is true on any rank. All ranks ask together and get the same answer."""
        return self.sum(bool(value))[0] > 0

    def each(self, value: float) -> list[float]:
        """The value of every rank, in their order, in float64. All ranks ask together."""
        values = torch.zeros(self.world, dtype=torch.float64)
        values[self.rank] = value
        return self.sum(values)[0]

    def slow_one(self) -> str | None:
        """A sentence about the rank that keeps the others waiting, or None. Twice in a row its own work took
        over SLOW times the median rank's. All ranks call this together; only rank 0 gets the sentence."""
        seconds = self.each(self.own_work.take())
        median, slowest = statistics.median_low(seconds), max(seconds)
        before, self.slow = self.slow, seconds.index(slowest) if slowest > SLOW * median else None
        if not self.is_main or self.slow is None or self.slow != before:
            return None
        host = self.store.get(f"host of rank {self.slow}").decode()
        return (
            f"rank {self.slow} on {host} is slow: {slowest:.3g} s to the end of a step's first forward pass, "
            f"the median rank {median:.3g} s"
        )

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.world > 1:
            dist.barrier()

    def from_main(self, compute: Callable):
        """Run `compute` on rank 0 only; return its result, a JSON value, on all ranks.

        The others poll for it. So they wait as long as rank 0 needs; a collective operation would time out.
        If rank 0 raises InputError, they end, too.
        """
        if self.world == 1:
            return compute()
        self.answers += 1
        key = f"answer {self.answers}"
        if self.is_main:
            try:
                answer = {"value": compute()}
            except InputError as error:
                self.publish(key, {"error": str(error)})
                raise
            self.publish(key, answer)
            return answer["value"]
        while not self.store.check([key]):
            self.at(f"waiting for rank 0's {key}")
            time.sleep(0.05)
        answer = json.loads(b"".join(self.store.get(f"{key}.{i}") for i in range(int(self.store.get(key)))))
        if "error" in answer:
            raise SystemExit(1)  # rank 0 tells why
        return answer["value"]

    def publish(self, key: str, answer: dict) -> None:
        """Put an answer into the store, in parts; then, under the key, their number."""
        text, most = json.dumps(answer).encode(), 2**22  # torch's store takes no value above 8 MiB
        count = -(-len(text) // most)
        for i in range(count):
            self.store.set(f"{key}.{i}", text[i * most : (i + 1) * most])
        self.store.set(key, str(count))

    def gather(self, value) -> list | None:
        """Each rank's value, any object that pickles, on rank 0; None on the others."""
        if self.world == 1:
            return [value]
        values = [None] * self.world if self.is_main else None
        dist.gather_object(value, values)
        return values

    def require_shared(self, path: Path) -> None:
        """Wait up to ten seconds for a file of rank 0's; InputError if this rank never sees it."""
        if self.is_main:
            return
        for _ in range(100):
            if path.exists():
                return
            time.sleep(0.1)
        raise InputError(
            f"rank {self.rank} does not see {path}; --out_dir and --cache_dir have to be one folder each for "
            f"all machines"
        )

    def watch(self, minutes: float) -> None:
        """With other ranks, start the watchdog: without a sign of life for so long it ends this process."""
        if self.world > 1:
            self.watchdog = Watchdog(self.rank, self.world, 60 * minutes)

    def at(self, place: str) -> None:
        """Give a sign of life, with the place where this rank is."""
        if self.watchdog:
            self.watchdog.place, self.watchdog.since = place, time.monotonic()

    def pin(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch in host memory that a GPU can read by itself, while Python goes on."""
        if self.device.type != "cuda":
            return batch
        torch.cuda.set_device(self.device)  # a new thread has GPU 0, and would open a context there
        return {name: tensor.pin_memory() for name, tensor in batch.items()}

    def to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch on this rank's device. A GPU's is pinned, so nobody waits for it."""
        on_gpu = self.device.type == "cuda"
        return {name: tensor.to(self.device, non_blocking=on_gpu) for name, tensor in batch.items()}

    def to_host(self, values: torch.Tensor) -> tuple[torch.Tensor, Callable]:
        """Values on their way to the host, and what waits until they are there."""
        if not values.is_cuda:
            return values, lambda: None
        there = values.to("cpu", non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return there, copied.synchronize

    def autocast(self):
        """Matrix products in this type."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def leave(self) -> None:
        """Wait for the others, then part from them: torchrun ends all ranks as soon as one has ended.

        Delete the wrapped model before. Otherwise its destructor destroys the process group, holds Python's
        lock while it waits for gloo's thread, and that thread may wait for the lock to free a tensor.
        """
        self.barrier()
        if dist.is_initialized():
            dist.destroy_process_group()


SLOW = 1.2


class OwnWork:
    """How long a rank works in a step before it waits for others: from the step's beginning to the end of its
    first forward pass. On a GPU it is the GPU's time, read without waiting for it.

    A slow GPU or a slow reader of data shows there. Ranks differ in how many micro-batches they have, but
    each has a first one.
    """

    def __init__(self, device: torch.device):
        self.on_gpu, self.began, self.spans = device.type == "cuda", None, []

    def now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        self.began = self.now()

    def end(self) -> None:
        """End the work that has begun. Later calls in the same step do nothing."""
        if self.began is not None:
            self.spans.append((self.began, self.now()))
            self.began = None

    def take(self) -> float:
        """Seconds a step, the mean of those since the last call; 0 if there are none. What a GPU has not
        finished belongs to the next call."""
        finished = [(a, b) for a, b in self.spans if not self.on_gpu or b.query()]
        self.spans = self.spans[len(finished) :]
        seconds = [a.elapsed_time(b) / 1000 if self.on_gpu else b - a for a, b in finished]
        return statistics.fmean(seconds) if seconds else 0.0


class Watchdog:
    """Ends the process when it has given no sign of life for some seconds, and says where it stands. Under
    NCCL it leaves the flight record, too: which collective operations this rank has entered and finished.

    A collective operation that one rank never enters keeps the others waiting. torchrun sees that a process
    has ended, but not that it waits. Once this one ends, torchrun ends or restarts the whole job.
    """

    def __init__(self, rank: int, world: int, seconds: float):
        self.rank, self.name, self.seconds = rank, f"rank {rank} of {world}", seconds
        self.place, self.since = "the set-up", time.monotonic()
        threading.Thread(target=self.exit_when_silent, daemon=True).start()

    def exit_when_silent(self) -> None:
        while (left := self.since + self.seconds - time.monotonic()) > 0:
            time.sleep(left)
        told = f"{self.name} has made no progress for {self.seconds:.0f} s in {self.place}; it stands at"
        print(f"error: {told}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback()
        if dist.is_initialized() and dist.get_backend() == "nccl":
            faulthandler.dump_traceback_later(60, exit=True)  # even if the driver never answers
            prefix, path = write_flight_record(self.rank)
            print(
                f"NCCL's flight record is {path}; `torchfrtrace --prefix={prefix} {path.parent}` compares "
                f"those of all ranks",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)


TIMEOUT = timedelta(hours=1)  # of collective operations; the watchdog is quicker

# NCCL's flight recorder, as torch reads it: how many operations it keeps, and the beginning of the names of
# its files, to which torch adds the rank. The second name of each is the older one.
RECORDED = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
RECORD_FILES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")


def set_flight_recorder(folder: str | Path) -> None:
    """Have NCCL keep its last operations and write them into a folder when it fails or times out. What the
    user has set in the environment stays. This has to come before the first process group."""
    for names, value in ((RECORDED, "2000"), (RECORD_FILES, f"{Path(folder).absolute()}/nccl_trace_rank_")):
        value = next((os.environ[name] for name in names if name in os.environ), value)
        os.environ.update(dict.fromkeys(names, value))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def write_flight_record(rank: int) -> tuple[str, Path]:
    """Write what NCCL has recorded to this rank's file, as it would by itself. Returns how the names of all
    ranks' files begin, and the file."""
    prefix = os.environ[RECORD_FILES[0]]
    path = Path(f"{prefix}{rank}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(torch._C._distributed_c10d._dump_nccl_trace())
    return Path(prefix).name, path


def join_ranks(name: str, out_dir: str | Path = ".", *, shard: str = "none", compile: str = "auto") -> Ranks:
    """Join the other ranks (NCCL on GPUs, gloo on CPUs) on the device of a name, "auto" or as torch has it.
    What NCCL records for the case of a hang goes to out_dir.

    `shard` and `compile` are what shard_model and wrap will be asked for.

    Raises InputError for a device that cannot be used here, and as check_ranks does.
    """
    device = usable_device(name)
    if device.type == "cpu":
        keep_freed_memory()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check_ranks(device, world, shard)
    store = None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_launcher()
    if world > 1:
        check_restarts(os.environ)
        store, *_ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # After a restart torchrun reuses the old store, with the dead ranks' addresses. So the number of
            # restarts is put before each key. Several machines count restarts apart; they need a new store,
            # by TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
            store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        if device.type == "cuda":
            set_flight_recorder(out_dir)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            device_id=device if device.type == "cuda" else None,
            timeout=TIMEOUT,
        )
    even = device.type == "cuda" or compile == "true" or (world > 1 and shard != "none")
    return Ranks(rank, world, device, store, shard=shard, even_batches=even)


def check_ranks(device: torch.device, world: int, shard: str) -> None:
    """Raise InputError for a device that has no engine for several ranks, and for machines that differ in
    their number of ranks where each is to hold a whole model."""
    if world > 1 and device.type not in ("cuda", "cpu"):
        raise InputError(
            f"{world} ranks cannot train together on --device={device.type}; start one, without torchrun, or "
            f"use --device=cpu"
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if shard == "hybrid" and world % local:
        raise InputError(
            f"--shard=hybrid needs as many ranks on each machine, but {world} ranks in all are no multiple "
            f"of the {local} on this one; start as many everywhere, or use --shard=full"
        )


DEVICES = Path("/dev")  # nvidia0 and so on
DRIVER = Path("/proc/driver/nvidia/version")


def why_no_gpu() -> str | None:
    """Why torch cannot use the NVIDIA GPU that is there, and what to do. None where there is none, or where
    the user hides it by a CUDA_VISIBLE_DEVICES that names no device: empty, -1, Slurm's NoDevFiles."""
    visible, given = os.environ.get("CUDA_VISIBLE_DEVICES"), any(DEVICES.glob("nvidia[0-9]*"))
    hidden = visible is not None and not re.match(r"\s*(\d|GPU-|MIG-)", visible)
    if hidden or not (given or DRIVER.exists()):
        return None
    version = re.search(r"\s(\d{3}[\d.]+)\s", DRIVER.read_text() if DRIVER.exists() else "")
    driver = f"driver {version[1]}" if version else "a driver that does not tell its version"
    if torch.version.cuda is None:
        build, remedy = "a CPU build", "install a CUDA build (https://pytorch.org/get-started/locally)"
    else:
        build, remedy = (
            f"built for CUDA {torch.version.cuda}",
            "update the driver, or install a torch for its CUDA",
        )
    if not given:
        remedy = (
            f"give this process the GPU, which is not in {DEVICES} (docker run --gpus=all), then {remedy}"
        )
    named = f" with CUDA_VISIBLE_DEVICES={visible}" if visible else ""
    return (
        f"there is an NVIDIA GPU with {driver}, but torch {torch.__version__}, {build}, cannot use it"
        f"{named}; {remedy}, or use --device=cpu"
    )


def check_restarts(environment: Mapping[str, str]) -> None:
    """InputError if several nodes may restart without a new store: they would meet dead ranks' addresses."""
    several = environment.get("GROUP_WORLD_SIZE", "1") != "1"
    restarts = int(environment.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if several and restarts and environment.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        raise InputError(
            f"--max_restarts={restarts} on {environment['GROUP_WORLD_SIZE']} nodes needs "
            f"TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in each node's environment, for a new store each time; "
            f"set it, or start by pretrain_full.sh, which does"
        )


def usable_device(name: str) -> torch.device:
    """The device that a user named, made the current one; InputError if it cannot be used here. "auto" is a
    GPU or, only where there is none, the CPU."""
    if name.startswith(("auto", "cuda")) and not torch.cuda.is_available():
        if reason := why_no_gpu():
            raise InputError(f"--device={name}: {reason}")
        if name != "auto":
            raise InputError(
                f"--device={name}, but no CUDA device is visible; use --device=cpu or --device=auto"
            )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]  # torch adds paragraphs of advice
        raise InputError(f"--device={name} cannot be used here: {reason}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


class StopSignals:
    """Notes SIGTERM, SIGINT, SIGUSR1 (Slurm's warning) and SIGHUP, so that a run can finish its step, save
    and leave. A SIGHUP that is ignored, as under nohup, stays so.

    A second SIGINT ends the process at once. So does a SIGTERM after it, which torchrun sends then. `close`
    brings the earlier handlers back. After a stopped run it ignores all but SIGINT instead: torchrun sends
    SIGTERM to all ranks as soon as the first has left.
    """

    def __init__(self):
        self.seen: set[int] = set()
        noted = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            noted.remove(signal.SIGHUP)
        self.handlers = {n: signal.signal(n, self.note) for n in noted}

    def note(self, number: int, frame) -> None:
        if number == signal.SIGINT:  # the next one ends the process, also amid a kernel or a save
            for again in (signal.SIGINT, signal.SIGTERM):
                signal.signal(again, signal.SIG_DFL)
        self.seen.add(number)

    def close(self, stopped: bool) -> None:
        for number, handler in self.handlers.items():
            ignored = stopped and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if ignored else handler)
