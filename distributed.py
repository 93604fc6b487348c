"""The processes that torchrun starts, their devices, the signals they get, and a watchdog over them."""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

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
    shard: str = "none"  # how parameters are split over the ranks: none, full or hybrid

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        return self.world > 1 and self.shard != "none"

    def print(self, *values) -> None:
        """Print on rank 0."""
        if self.is_main:
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

    def sum(self, *values: float | torch.Tensor) -> list[float]:
        """Each value's sum over all ranks. A GPU is waited for."""
        return self.total(*values).tolist()

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

    def to_host(self, values: torch.Tensor) -> tuple[torch.Tensor, Callable]:
        """Values on their way to the host, and what waits until they are there."""
        if not values.is_cuda:
            return values, lambda: None
        there = values.to("cpu", non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return there, copied.synchronize

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


def join_ranks(device: str, shard: str = "none") -> Ranks:
    """Join the other ranks (NCCL on GPUs, gloo on CPUs) on a device, "auto" or as torch names it.

    `shard` is how parameters will be split over them: none, full or hybrid.

    Raises InputError for a device that cannot be used here.
    """
    device = usable_device(device)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    store = None
    if world > 1:
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
    return Ranks(rank, world, device, store, shard=shard)


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
SHARD = ("none", "full", "hybrid")


def wrap(model: nn.Module, ranks: Ranks, compile: str) -> nn.Module:
    """The model as a step calls it: compiled ("auto": only on CUDA), gradients averaged over ranks."""
    wanted = compile == "true" or (compile == "auto" and ranks.device.type == "cuda")
    torch._dynamo.config.recompile_limit = 32  # for rows of several lengths, in training and evaluation
    if wanted:
        model.compile_blocks()
    if ranks.world > 1 and not ranks.sharded:
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )
    return model


# -- sharding ------------------------------------------------------------------------------------------------


def shard_model(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Split a language model's parameters over the ranks (FSDP2), in place; their names stay.

    With them their gradients and the optimizer's state are split. A block's parameters are whole on every
    rank only while it computes. On CUDA they travel and compute in bf16; gradients are added up in fp32.
    "hybrid" splits them over the ranks of a machine and keeps a copy on each machine.
    """
    if not ranks.sharded:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    shape, names = (ranks.world,), ("shard",)
    if ranks.shard == "hybrid":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
        shape, names = (ranks.world // local, local), ("replicate", "shard")
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    compute = torch.bfloat16 if ranks.device.type == "cuda" else None
    # A block's inputs, the residual stream and the rotary angles, stay in fp32.
    policy = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "next_logits")  # what generation calls
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor put together from its parts on all ranks, which ask together; as it is if it is not split."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_numbers(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor lies on this rank, all of it if it is not split; it shares memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole tensor that is to be split as another is, or all of it."""
    if not isinstance(like, DTensor) or not tensor.dim():
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def own_rows(rows: int, rank: int, world: int) -> tuple[int, int]:
    """Which of a tensor's rows, from one on and up to another, FSDP2 gives to a rank: as torch.chunk does."""
    size = -(-rows // world)
    return min(rows, rank * size), min(rows, (rank + 1) * size)


@contextmanager
def gradients_exchanged(module: nn.Module, wanted: bool, ranks: Ranks) -> Iterator[None]:
    """Ranks exchange the gradients of this backward pass, or keep them for a later one."""
    if ranks.sharded:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.set_requires_gradient_sync(wanted, recurse=False)
    with nullcontext() if wanted or ranks.sharded or ranks.world == 1 else module.no_sync():
        yield


class StopSignals:
    """Notes SIGTERM, SIGINT and SIGUSR1 (Slurm's warning), so that a run can finish its step, save and leave.

    A second SIGINT ends the process at once. `close` brings the earlier handlers back. After a stopped run it
    ignores SIGTERM and SIGUSR1 instead: torchrun sends SIGTERM to all ranks as soon as the first has left.
    """

    def __init__(self):
        self.seen: set[int] = set()
        self.handlers = {
            n: signal.signal(n, self.note) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        }

    def note(self, number: int, frame) -> None:
        if number == signal.SIGINT:  # the next one ends the process, also amid a kernel or a save
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        self.seen.add(number)

    def close(self, stopped: bool) -> None:
        for number, handler in self.handlers.items():
            ignored = stopped and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if ignored else handler)
