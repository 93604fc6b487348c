"""A training step rehearsed without a GPU: the memory that it takes, by kind, and what it sends to others.

The scripts' own model, sharding, optimizer and forward_backward run on fake tensors, as rank 0 of a group
whose messages go nowhere. Blocks are compiled up to the choice of what the backward pass keeps. Nothing is
fused, so a block's short-lived tensors are told somewhat too large.

B windows, rows or pairs in a micro-batch, T tokens in each or, of pairs, in each answer.
"""

import itertools
import os
import warnings
import weakref
from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sharding
import training
from attention import has_varlen
from distributed import Ranks
from dpo import PreferenceModel
from gpt import GPTConfig, GPTModel
from loss import nats_and_gradient
from optim import make_optimizer, set_learning_rate
from sharding import own_numbers

KINDS = ("weights", "gradients", "optimizer", "activations")  # the last: all that is none of the others
BLOCK = 512  # bytes; torch's allocator rounds up to these
SEQUENCES = 16  # conversations in a row; their number takes next to no memory


class Ledger(TorchDispatchMode):
    """Writes down each storage that is allocated on a device, grows, shrinks or is freed, in order, and each
    collective operation. What a storage is for may be told later."""

    def __init__(self, kind: str):
        """`kind` of device, cuda or cpu."""
        super().__init__()
        self.kind, self.live, self.entries = kind, {}, []  # live: number by storage
        self.kinds: dict[int, str] = {}  # by number
        self.sent: Counter = Counter()  # bytes by operation, and the group's ranks

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # or compiled code would not be used in here

    def number(self, tensor: torch.Tensor) -> int | None:
        """The number of a tensor's storage, a new one if it was not seen before; None on another device."""
        tensor = own_numbers(tensor)
        if tensor.device.type != self.kind:
            return None
        storage = tensor.untyped_storage()
        if id(storage) not in self.live:
            number, key = len(self.entries), id(storage)

            def gone(_):
                del self.live[key]
                self.entries.append((number, 0))

            self.live[key] = number, weakref.ref(storage, gone)
            self.entries.append((number, storage.nbytes()))
        return self.live[id(storage)][0]

    def name(self, kind: str, tensors) -> None:
        """These tensors' storages are of a kind."""
        self.kinds.update((self.number(tensor), kind) for tensor in tensors)

    def resized(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self.live:
            self.entries.append((self.live[id(storage)][0], storage.nbytes()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it is called again with this rank's own part
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self.number(value)
        if func.namespace == "c10d":
            given = dict(zip((argument.name for argument in func._schema.arguments), args))
            self.note_collective(func.overloadpacket.__name__, given)
        return out

    def note_collective(self, name: str, given: dict) -> None:
        """Bytes that each of n ranks sends: (n - 1) / n of the whole tensor where it is gathered, scattered
        or exchanged, twice that where all ranks get its sum."""
        tensors = [value for value in tree_leaves(given) if isinstance(value, torch.Tensor)]
        ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(given["process_group"]))
        whole, n = max(t.numel() * t.itemsize for t in tensors), len(ranks)
        times = 2 if name.startswith("allreduce") else 1
        self.sent[name.strip("_"), tuple(ranks)] += times * whole * (n - 1) / n

    def peak(self, since: int) -> dict[str, int]:
        """Bytes by kind at the moment when most were held, of the entries from `since` on."""
        sizes, now, most, when = {}, 0, -1, 0
        for i, (number, size) in enumerate(self.entries):
            size = -(-size // BLOCK) * BLOCK
            now += size - sizes.get(number, 0)
            sizes[number] = size
            if i >= since and now > most:
                most, when = now, i
        sizes = dict(self.entries[: when + 1])
        held = defaultdict(int)
        for number, size in sizes.items():
            held[self.kinds.get(number, "activations")] += -(-size // BLOCK) * BLOCK
        return {kind: held[kind] for kind in KINDS}


class Stream:
    """A queue of a device's work, or a mark in it. There is no work, so all is done at once."""

    def __init__(self, *args, **kwargs):
        self.device = torch.device("cuda", 0)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def __call__(self, *args, **kwargs):
        return self

    def query(self) -> bool:
        return True

    wait_stream = wait_event = record_event = record = synchronize = wait = __call__


def pretend_streams() -> None:
    """Answer what FSDP2 asks torch about streams and devices; torch stays changed."""

    def answer(value):  # each a function of its own, as torch's compiler wants them
        return lambda *args: value

    for module, name in itertools.product((torch, torch.cuda), ("Stream", "Event")):
        setattr(module, name, type(name, (Stream,), {}))
    torch.accelerator.current_stream = answer(Stream())
    answers = {"current_stream": Stream(), "default_stream": Stream(), "stream": Stream()}
    answers |= {"current_device": 0, "device_count": 1, "is_initialized": True}
    answers |= {"set_device": None, "synchronize": None}
    for name, value in answers.items():
        setattr(torch.cuda, name, answer(value))


def pretend_ranks(world: int, per_machine: int) -> None:
    """Become rank 0 of so many, in a group whose collective operations go nowhere."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if world == 1:
        return
    pretend_streams()
    import torch.distributed._tools.fake_collectives  # noqa: F401, which registers them for fake tensors
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ["LOCAL_WORLD_SIZE"] = str(min(world, per_machine))
    warnings.filterwarnings("ignore", message=".*returned a view tensor")  # a real product is none
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())

    def mesh(*args, **kwargs):
        with unset_fake_temporarily():  # it reads the numbers of its ranks
            return init_device_mesh(*args, **kwargs)

    sharding.init_device_mesh = mesh
    training.gradients_exchanged = exchanged_if_split


def exchanged_if_split(module, wanted: bool, ranks: Ranks):
    """DDP is left out, as it needs a real group: its buckets are the gradients, held all the time."""
    return sharding.gradients_exchanged(module, wanted, ranks) if ranks.sharded else nullcontext()


def compile_for_memory(model: GPTModel) -> None:
    """Compile the blocks as wrap does, up to what the backward pass keeps."""
    compile = torch.compile

    def partitioned(*args, **kwargs):
        return compile(*args, **kwargs, backend="aot_eager_decomp_partition")

    torch.compile = partitioned
    torch._dynamo.config.recompile_limit = 64  # for several B
    model.compile_blocks()
    torch.compile = compile
    model.softmax = nats_and_gradient  # in place, as much memory as the fused one takes on a GPU


def batch_of(
    unit: str, B: int, T: int, *, shape: GPTConfig, device: torch.device, noisy: bool
) -> dict[str, torch.Tensor]:
    """A micro-batch as the loader of the windows, rows or pairs makes it, with zeros for values; of rows with
    noise for the embeddings if they are `noisy`."""
    ids = torch.zeros(2 * B if unit == "pairs" else B, T, dtype=torch.long, device=device)
    batch = {"input_ids": ids, "targets": ids}
    if unit == "pairs":
        batch["reference"] = torch.zeros(2 * B, device=device)
    if unit == "rows":
        batch["positions"] = torch.zeros_like(ids)
        if has_varlen(device, shape.head_dim):
            batch["cu_seqlens"] = torch.zeros(B * SEQUENCES + 1, dtype=torch.int, device=device)
        else:
            batch["mask"] = torch.zeros(B, 1, T, T, dtype=torch.bool, device=device)
    if noisy:
        batch["noise"] = torch.zeros(B, T, shape.hidden_size, device=device)
    return batch


@dataclass
class Footprint:
    """What a step takes."""

    memory: dict[str, int]  # the most bytes held at once, by kind
    passes: Counter  # bytes that a rank sends in the forward and backward passes, by operation and ranks
    update: Counter  # bytes that it sends in the optimizer's update


class Rehearsal:
    """A model and its optimizer on a device, which make steps that are written down in a ledger."""

    def __init__(
        self,
        shape: GPTConfig,
        ranks: Ranks,
        *,
        T: int,
        unit: str,
        optimizer: str,
        compile: bool,
        checkpoint_activations: bool,
        noisy: bool = False,
    ):
        """`unit` is windows, rows or pairs, of T tokens; `noisy` rows have noise on their embeddings."""
        self.ranks, self.T, self.unit, self.noisy = ranks, T, unit, noisy
        with ranks.device:
            self.model = GPTModel(shape)
        self.model.checkpoint_activations = checkpoint_activations
        sharding.shard_model(self.model, ranks)
        rates = {"lr": 1e-3, "matrix_lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
        self.optimizer = make_optimizer(self.model, optimizer, ranks=ranks, **rates)
        if compile:
            compile_for_memory(self.model)
        self.module = PreferenceModel(self.model, beta=0.1) if unit == "pairs" else self.model
        self.ledger = Ledger(ranks.device.type)
        self.ledger.name("weights", [*self.model.parameters(), *self.model.buffers()])
        for p in self.model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: self.ledger.name("gradients", [p.grad]))
        self.micro_batches, self.footprints = 1, {}
        self.make_step(1)  # makes the state of the optimizer

    def __call__(self, **batch) -> torch.Tensor:
        """The module as forward_backward calls it."""
        self.name_gradients()
        return self.module(**batch)

    def parameters(self):
        return self.model.parameters()

    def modules(self):
        return self.model.modules()

    def name_gradients(self) -> None:
        """Tell the ledger which storages are gradients, also sums that FSDP2 keeps apart until "hybrid" adds
        up the copies."""
        parts = [part for part in self.model.modules() if isinstance(part, FSDPModule)]
        kept = [part._get_fsdp_state()._fsdp_param_group._partial_reduce_output for part in parts]
        grads = [p.grad for p in self.model.parameters()]
        self.ledger.name("gradients", [grad for grad in (*kept, *grads) if grad is not None])

    def step(self, B: int) -> Footprint:
        """A step of self.micro_batches micro-batches of B windows, rows or pairs, remembered by B."""
        if B not in self.footprints:
            self.footprints[B] = self.make_step(B)
        return self.footprints[B]

    def make_step(self, B: int) -> Footprint:
        ledger, device = self.ledger, self.ranks.device
        began, resize = len(ledger.entries), torch.UntypedStorage.resize_

        def resized(storage, size):
            out = resize(storage, size)
            ledger.resized(storage)
            return out

        torch.UntypedStorage.resize_ = resized  # no dispatch mode sees it
        with ledger:
            shape = self.model.config
            batch = batch_of(self.unit, B, self.T, shape=shape, device=device, noisy=self.noisy)
            batches, targets = [batch] * self.micro_batches, self.micro_batches * B * self.T
            ledger.sent = passes = Counter()
            _, norm = training.forward_backward(
                self, batches, targets=targets, max_grad_norm=1.0, ranks=self.ranks
            )
            self.name_gradients()
            ledger.sent = update = Counter()
            set_learning_rate(self.optimizer, 1.0)
            self.optimizer.step(skip=norm.isnan() if device.type == "cuda" else None)
            self.optimizer.zero_grad(set_to_none=True)
        torch.UntypedStorage.resize_ = resize
        ledger.name("optimizer", [v for state in self.optimizer.state.values() for v in state.values()])
        return Footprint(ledger.peak(began), passes, update)
