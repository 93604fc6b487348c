"""The processes that torchrun starts, their devices, the signals they get, and a watchdog over them."""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from common import InputError


@dataclass
class Ranks:
    """This process among those that torchrun started, and its device; alone when there is no torchrun."""

    rank: int
    world: int
    device: torch.device
    store: dist.Store | None = None
    watchdog: "Watchdog | None" = None
    answers: int = 0  # that rank 0 has given so far

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *values) -> None:
        """Print on rank 0."""
        if self.is_main:
            print(*values, flush=True)

    def sum(self, *values: float | torch.Tensor) -> list[float]:
        """Each value's sum over all ranks, in float64."""
        device = self.device if self.world > 1 else "cpu"
        total = torch.stack([torch.as_tensor(v).to(device).double() for v in values])
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def any(self, value: bool) -> bool:
        """Whether it is true on any rank. All ranks ask together and get the same answer."""
        return self.sum(bool(value))[0] > 0

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.world > 1:
            dist.barrier()

    def from_main(self, compute: Callable):
        """What `compute` gives on rank 0, a JSON value, on all ranks; it runs there only.

        The others ask for it every moment. So they wait as long as rank 0 needs; a collective operation would
        time out. After an InputError of rank 0 they end, too.
        """
        if self.world == 1:
            return compute()
        self.answers += 1
        key = f"answer {self.answers}"
        if self.is_main:
            try:
                answer = {"value": compute()}
            except InputError as error:
                self.store.set(key, json.dumps({"error": str(error)}))
                raise
            self.store.set(key, json.dumps(answer))
            return answer["value"]
        while not self.store.check([key]):
            self.at(f"waiting for rank 0's {key}")
            time.sleep(0.05)
        answer = json.loads(self.store.get(key))
        if "error" in answer:
            raise SystemExit(1)  # rank 0 tells why
        return answer["value"]

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
            self.watchdog = Watchdog(f"rank {self.rank} of {self.world}", 60 * minutes)

    def at(self, place: str) -> None:
        """Give a sign of life, with the place where this rank is."""
        if self.watchdog:
            self.watchdog.place, self.watchdog.since = place, time.monotonic()

    def pin(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch in host memory that a GPU can read by itself, while Python goes on."""
        if self.device.type != "cuda":
            return batch
        return {name: tensor.pin_memory() for name, tensor in batch.items()}

    def to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A pinned batch on this rank's device, without waiting for it."""
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def autocast(self):
        """bf16 matrix products on CUDA, fp32 elsewhere."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def leave(self) -> None:
        """Wait for the others, then part from them: torchrun ends all ranks as soon as one has ended.

        Delete the wrapped model before. Otherwise its destructor destroys the process group, holds Python's
        lock while it waits for gloo's thread, and that thread may wait for the lock to free a tensor.
        """
        self.barrier()
        if dist.is_initialized():
            dist.destroy_process_group()


class Watchdog:
    """Ends the process when it has given no sign of life for some seconds, and says where it stands.

    A collective operation that one rank never enters keeps the others waiting. torchrun sees that a process
    has ended, but not that it waits. Once this one ends, torchrun ends or restarts the whole job.
    """

    def __init__(self, name: str, seconds: float):
        self.name, self.seconds = name, seconds
        self.place, self.since = "the set-up", time.monotonic()
        threading.Thread(target=self.exit_when_silent, daemon=True).start()

    def exit_when_silent(self) -> None:
        while (left := self.since + self.seconds - time.monotonic()) > 0:
            time.sleep(left)
        print(
            f"error: {self.name} has made no progress for {self.seconds:.0f} s in {self.place}; it stands at",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback()
        os._exit(1)


def join_ranks(device: str) -> Ranks:
    """Join the other ranks (NCCL on GPUs, gloo on CPUs) on a device, "auto" or as torch names it.

    Raises InputError for a device that cannot be used here.
    """
    device = usable_device(device)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    store = None
    if world > 1:
        check_restarts(os.environ)
        store, *_ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # After a restart torchrun reuses the old store, with the dead ranks' addresses. So the number of
            # restarts is put before each key. Several machines count restarts apart; they need a new store,
            # by TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
            store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            device_id=device if device.type == "cuda" else None,
            timeout=timedelta(hours=1),  # the watchdog is quicker
        )
    return Ranks(rank, world, device, store)


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
    """The device that a user named, made the current one; InputError if it cannot be used here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device={name}, but no CUDA device is visible; use --device=cpu or --device=auto")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device={name} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    return device


COMPILE = ("auto", "true", "false")


def wrap(model: nn.Module, ranks: Ranks, compile: str) -> nn.Module:
    """The model as a step calls it: compiled ("auto": only on CUDA), gradients averaged over ranks."""
    wanted = compile == "true" or (compile == "auto" and ranks.device.type == "cuda")
    torch._dynamo.config.recompile_limit = 32  # for rows of several lengths, in training and evaluation
    if wanted:
        model.compile_blocks()
    if ranks.world > 1:
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )
    return model


class StopSignals:
    """Notes SIGTERM, SIGINT and SIGUSR1 (Slurm's warning), so that a run can finish its step, save and leave.

    A second SIGINT ends the process at once. `close` brings the earlier handlers back. A stopped run ignores
    SIGTERM and SIGUSR1 instead: torchrun sends SIGTERM to all ranks as soon as the first one has left.
    """

    def __init__(self, ranks: Ranks):
        self.ranks, self.seen, self.stopped = ranks, set(), False
        self.handlers = {
            n: signal.signal(n, self.note) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        }

    def note(self, number: int, frame) -> None:
        if number == signal.SIGINT:  # the next one ends the process, also amid a kernel or a save
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        self.seen.add(number)

    def on_any_rank(self) -> bool:
        """Whether a signal reached any rank. All ranks ask together and get the same answer."""
        self.stopped = self.ranks.any(self.seen)
        return self.stopped

    def close(self) -> None:
        for number, handler in self.handlers.items():
            ignored = self.stopped and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if ignored else handler)
