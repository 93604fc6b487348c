"""A model on several ranks, whole (DDP) or split over them (FSDP2); which part of a tensor a rank has."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from common import InputError
from distributed import TIMEOUT, Ranks

SHARD = ("none", "full", "hybrid")
COMPILE = ("auto", "true", "false")


def shard_model(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Split a language model's parameters over the ranks (FSDP2), in place; their names stay.

    With them their gradients and the optimizer's state are split. A block's parameters are whole on every
    rank only while it computes. They travel and compute in the type of matrix products; gradients are added
    up in fp32. "hybrid" splits them over the ranks of a machine and keeps a copy on each machine.
    """
    if not ranks.sharded:
        return model
    shape, names = (ranks.world,), ("shard",)
    if ranks.shard == "hybrid":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
        shape, names = (ranks.world // local, local), ("replicate", "shard")
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    if ranks.shard == "hybrid" and dist.get_backend() == "nccl":  # whose new groups have ten minutes
        for name in names:
            dist.distributed_c10d._set_pg_timeout(TIMEOUT, mesh.get_group(name))
    compute = None if ranks.dtype == torch.float32 else ranks.dtype
    # A block's inputs, the residual stream and the rotary angles, stay in fp32.
    policy = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "next_logits")  # what generation calls
    return model


def require_compiler(kind: str) -> None:
    """Raise InputError if torch.compile will find no compiler for a kind of device: Triton builds its driver
    in C when it is first used, and a CPU's kernels are C++."""
    variable, names = ("CC", ("gcc", "clang")) if kind == "cuda" else ("CXX", ("g++",))
    if variable not in os.environ and not any(map(shutil.which, names)):
        raise InputError(
            f"torch.compile needs a compiler on each machine, and {socket.gethostname()} has no "
            f"{' and no '.join(names)}; install one, with Python's headers (python3-dev), or use "
            f"--compile=false, which is slower"
        )


def wrap(model: nn.Module, ranks: Ranks, compile: str) -> nn.Module:
    """The model as a step calls it: compiled ("auto": only on CUDA), gradients averaged over ranks."""
    wanted = compile == "true" or (compile == "auto" and ranks.device.type == "cuda")
    if wanted:
        require_compiler(ranks.device.type)
    torch._dynamo.config.recompile_limit = 32  # for rows of several lengths, in training and evaluation
    # Gradients are sent block by block as it is. DDP would have each block cut in two before down_proj, and
    # what passes the cut is kept for the backward pass.
    torch._dynamo.config.optimize_ddp = False
    module = model
    if ranks.world > 1 and not ranks.sharded:
        module = nn.parallel.DistributedDataParallel(
            model,
            device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        module.broadcast_buffers = False  # the argument has another name since torch 2.13
    if ranks.world > 2 and not ranks.sharded and ranks.device.type == "cpu":
        # DDP arranges its buckets anew after its first backward pass. In which order three ranks and more
        # are added follows from the buckets. So a run and its continuation both begin with an empty pass.
        ids = torch.zeros(2, 1, dtype=torch.long)
        (module(ids, ids).sum() * 0).backward()
        model.zero_grad(set_to_none=True)
    if wanted:
        model.compile_blocks()
    return module


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
    """Ranks exchange the gradients of this backward pass, or keep them for a later one.

    A split model's gradients are split after each backward pass. Kept whole, they would take four bytes for
    each of all parameters. Only the copies of "hybrid" are added up once.
    """
    if ranks.sharded:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.set_requires_all_reduce(wanted, recurse=False)
    with nullcontext() if wanted or ranks.sharded or ranks.world == 1 else module.no_sync():
        yield
