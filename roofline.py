"""What a training step costs on a GPU, without one: FLOPs, bytes, kernels, and their time at the roofline.

    python bench.py --only=roofline --gpu=h100 --vocab_size=49152 --hidden_size=512 --num_attention_heads=8 \\
        --num_hidden_layers=12 --context_length=1024 --micro_batch_size=32 --batch_tokens=65536

The step runs on fake tensors. torch's compiler fuses as for a GPU, but what it would make is counted and not
built. A kernel takes as long as its bytes or its FLOPs need, whichever is longer (Williams et al. 2009).
Caches are not modelled, so kernels that find their input there are told too slow. Attention counts all T keys
of a query, and every kernel reaches the same share of the peak: a real GPU's attention is slower, the more so
with a mask. What the host takes to start kernels, and what it waits for, is not told.
"""

import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import fake_cuda
from common import InputError, check_choice, run_script

if __name__ == "__main__":
    fake_cuda.install()

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from bench import Config, model_of, optimizer_of
from distributed import Ranks
from metrics import flops_per_token
from optim import set_learning_rate
from precision import GPUS, Gpu
from sharding import wrap
from training import forward_backward

# Shares of the peaks that good kernels reach; assumed, from what large products and copies reach on an H100:
# 650 TFLOP/s and 2.9 TB/s. A kernel takes two microseconds at least.
FLOPS_REACHED, BANDWIDTH_REACHED, SHORTEST = 0.657, 0.866, 2e-6

PARTS = ("embedding", "attention", "MLP", "norms, residuals", "head and loss", "gradients", "optimizer")
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias"}
FREE |= {"_unsafe_view", "lift_fresh", "is_same_size"}
OVERWRITE = {"copy_", "fill_", "zero_"}  # these write their first argument without reading it


@dataclass
class Cost:
    kernels: int = 0
    bytes: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0


def size(tensor: torch.Tensor) -> int:
    """Bytes that are read to read it all; an expanded tensor is no larger than what it expands."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def tensors_in(values) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def moved_bytes(func, args: tuple, kwargs: dict, out) -> int:
    """What an operation reads and writes. Lookups read the rows they give."""
    name = func.overloadpacket.__name__
    if name == "embedding":
        return 2 * size(out) + size(args[1])
    given = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
    changed = {a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write}
    unread = set(kwargs) & changed if "out" in func._schema.overload_name else set()
    unread |= changed if name in OVERWRITE else set()
    read = sum(size(t) for key, value in given.items() if key not in unread for t in tensors_in(value))
    written = sum(size(t) for key in changed for t in tensors_in(given.get(key)))
    return read + (written or sum(map(size, tensors_in(out))))


def flops_of(func, args, kwargs, out) -> int:
    packet = func.overloadpacket
    args = [value for value in args if not isinstance(value, torch.dtype)]  # addmm's formula takes none
    return flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0


def part_of_code(name: str) -> str:
    """The part of a step that an operation outside compiled code belongs to, by who calls it."""
    frame = sys._getframe(2)
    while frame:
        file = frame.f_code.co_filename.rpartition("/")[2]
        if file in ("loss.py", "optim.py"):
            return "head and loss" if file == "loss.py" else "optimizer"
        frame = frame.f_back
    kinds = {"embedding": "embedding", "norm_backward": "norms, residuals", "rms_norm": "norms, residuals"}
    return next((part for word, part in kinds.items() if word in name and "foreach" not in name), "gradients")


def part_of_graph(origins) -> str:
    """The part that a compiled kernel belongs to: that of most of the operations it was fused of."""
    parts = [part_of_node(node) for node in origins]
    return max(PARTS, key=parts.count)


def part_of_node(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    words = {"self_attn": "attention", "rotary": "attention", "mlp": "MLP", "lm_head": "head and loss"}
    words["embed_tokens"] = "embedding"
    if any(word in str(node.meta.get("stack_trace")) for word in ("/loss.py", "/loss_utils.py")):
        return "head and loss"
    return next((part for word, part in words.items() if word in path), "norms, residuals")


class Meter(TorchDispatchMode):
    """Adds up what runs in it, by part: operations one by one, and compiled graphs by their kernels."""

    def __init__(self, gpu: Gpu):
        super().__init__()
        self.gpu, self.on = gpu, True
        self.parts = {part: Cost() for part in PARTS}

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # or compiled code would not be used in here

    def add(self, part: str, bytes: float, flops: float) -> None:
        limits = bytes / (BANDWIDTH_REACHED * self.gpu.bandwidth), flops / (FLOPS_REACHED * self.gpu.flops)
        cost = self.parts[part]
        cost.kernels += 1
        cost.bytes += bytes
        cost.flops += flops
        cost.seconds += max(*limits, SHORTEST)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        on_gpu = any(t.is_cuda for t in tensors_in((args, kwargs, out)))
        if self.on and on_gpu and not func.is_view and name not in FREE and func.namespace == "aten":
            bytes = moved_bytes(func, args, kwargs, out)
            self.add(part_of_code(name), bytes, flops_of(func, args, kwargs, out))
        return out


def kernels_of(graph) -> Iterator[tuple[str, int, int]]:
    """Part, bytes and FLOPs of each kernel that Inductor would make of a lowered graph."""
    for node in graph.scheduler.nodes:
        inner = getattr(node, "node", None)
        kinds = type(node).__name__, type(inner).__name__
        if "NopKernelSchedulerNode" in kinds or "MultiOutput" in kinds:
            continue
        origins = {o for n in node.get_nodes() for o in n.node.get_origins()}
        flops = 0
        for origin in origins if kinds[0] == "ExternKernelSchedulerNode" else ():
            if isinstance(origin.target, torch._ops.OpOverload):
                args, kwargs = tree_map_only(
                    torch.fx.Node, lambda n: n.meta["val"], (origin.args, origin.kwargs)
                )
                flops += flops_of(origin.target, args, kwargs, origin.meta["val"])
        yield part_of_graph(origins), node.get_read_write_buffers_sizes(), flops


def count_instead_of_compiling(meter: Meter) -> None:
    """From here on Inductor fuses and schedules, but its graphs run as they are and add to the meter."""
    import torch._inductor.fx_passes.fuse_attention as fuse_attention
    import torch._inductor.fx_passes.joint_graph as joint_graph
    import torch._inductor.fx_passes.pad_mm as pad_mm
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    # Patterns that are traced on real tensors.
    joint_graph.lazy_init = fuse_attention._sfdp_init = pad_mm._pad_mm_init = lambda *a, **k: None
    config.fx_graph_cache, config.compile_threads = False, 1
    config.shape_padding = config.joint_graph_constant_folding = False

    def compile_to_module(graph):
        graph.init_wrapper_code()
        graph._update_scheduler()
        kernels, module = list(kernels_of(graph)), graph.orig_gm

        def call(args):
            inputs = list(args)
            args.clear()
            was, meter.on = meter.on, False
            out = tuple(tree_leaves(module(*inputs), is_leaf=lambda v: v is None))
            meter.on = was
            if was:
                for kernel in kernels:
                    meter.add(*kernel)
            return out

        return types.SimpleNamespace(call=call, __file__="none.py", key="", runner=None)

    GraphLowering._compile_to_module = compile_to_module


class NoDevice:
    """torch.cuda.device, where there is none to make the current one."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


def pretend(gpu: Gpu) -> None:
    """Answer what Inductor asks a driver about its GPU."""
    import torch._subclasses.fake_tensor as fake_tensor
    from torch._dynamo.device_interface import CudaInterface

    properties = types.SimpleNamespace(
        name=f"NVIDIA {gpu.name}",
        major=gpu.capability[0],
        minor=gpu.capability[1],
        total_memory=int(gpu.memory * 2**30),
        multi_processor_count=gpu.processors,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=101376,
        shared_memory_per_multiprocessor=102400,
        L2_cache_size=32 << 20,
        gcnArchName="",
        uuid="0",
        pci_bus_id=0,
    )

    def answer(value):  # each a function of its own, as torch's compiler wants them
        return lambda *_: value

    fake_tensor.init_gpu_context = answer(None)
    fake_tensor.FakeTensorMode.avoid_device_init = True
    torch.version.cuda = "12.8"
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True}
    answers |= {"get_device_properties": properties, "get_device_capability": gpu.capability}
    answers |= {"get_device_name": properties.name, "synchronize": None, "_lazy_init": None}
    answers |= {"current_stream": None}
    for key, value in answers.items():
        setattr(torch.cuda, key, answer(value))
    torch.cuda.get_rng_state, torch.cuda.set_rng_state = torch.get_rng_state, torch.set_rng_state
    for key in ("is_available", "device_count", "current_device", "get_device_properties"):
        setattr(CudaInterface, key, staticmethod(getattr(torch.cuda, key)))
    CudaInterface.exchange_device = CudaInterface.maybe_exchange_device = staticmethod(answer(0))
    CudaInterface.device = torch.cuda.device = torch.cuda._DeviceGuard = NoDevice
    for key in ("getDevice", "exchangeDevice", "maybeExchangeDevice", "getCurrentRawStream"):
        setattr(torch._C, f"_cuda_{key}", answer(0))


# As it comes, transformers makes a causal mask when it is compiled (up to torch 2.13, see
# masking_utils.py:_ignore_causal_mask_sdpa), which flash attention cannot take. A user may tell it not to.
THEIR_MASKS = {"transformers Qwen3": None, "without its mask": {"full_attention": None}}


class Theirs(torch.nn.Module):
    """Hugging Face's model of a config with the loss as our step wants it, summed."""

    mask = None

    def __init__(self, fields: dict):
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))

    def forward(self, input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        given = {"input_ids": input_ids, "attention_mask": self.mask, "labels": targets}
        return self.model(**given, use_cache=False).loss * targets.numel()


def step_costs(
    config: Config, model: torch.nn.Module, module: torch.nn.Module, meter: Meter
) -> dict[str, Cost]:
    """The costs of one of the scripts' training steps, by part. A first step is not counted: it compiles and
    makes the optimizer's state. `module` is what a step calls: the model, or a wrapper of it."""
    ranks, B, T = Ranks(0, 1, torch.device("cuda", 0)), config.micro_batch_size, config.context_length
    ids = torch.zeros(B, T, dtype=torch.long, device="cuda")
    batches = [{"input_ids": ids, "targets": ids}] * micro_batches(config)
    optimizer = optimizer_of(model, config.optimizer, config, ranks)
    set_learning_rate(optimizer, 1.0)

    def step():
        targets = len(batches) * B * T
        _, norm = forward_backward(module, batches, targets=targets, max_grad_norm=1.0, ranks=ranks)
        optimizer.step(skip=norm.isnan())
        optimizer.zero_grad(set_to_none=True)

    meter.on = False
    step()
    meter.parts, meter.on = {part: Cost() for part in PARTS}, True
    with meter:
        step()
    return meter.parts


def micro_batches(config: Config) -> int:
    """Of a step."""
    return max(1, config.batch_tokens // (config.micro_batch_size * config.context_length))


def print_costs(title: str, parts: dict[str, Cost], gpu: Gpu, model_flops: float) -> None:
    """A table; model_flops are those of which the share of the peak (MFU) is told."""
    total = Cost(*(sum(getattr(cost, name) for cost in parts.values()) for name in vars(Cost())))
    print(f"\n{title:20} kernels       GB    TFLOP       ms  share")
    for part, cost in (*parts.items(), ("all", total)):
        print(
            f"  {part:18} {cost.kernels:7,} {cost.bytes / 1e9:8.2f} {cost.flops / 1e12:8.3f} "
            f"{1e3 * cost.seconds:8.2f} {100 * cost.seconds / total.seconds:5.1f}%"
        )
    mfu = model_flops / total.seconds / gpu.flops
    print(f"  {model_flops / 1e12:.1f} TFLOP by 6 N + 12 L H D T: {100 * mfu:.1f}% MFU at the roofline")


def main(config: Config) -> None:
    check_choice("gpu", config.gpu, GPUS)
    if find_spec("triton") is None:
        raise InputError("the roofline asks torch's compiler, which needs triton; pip install triton")
    warnings.simplefilter("ignore")  # of the compiler, about tensors without values
    gpu, T = GPUS[config.gpu], config.context_length
    meter = Meter(gpu)
    with fake_cuda.fake_cuda():
        pretend(gpu)
        count_instead_of_compiling(meter)
        ours = model_of(config, torch.device("cuda"))
        with torch.device("cuda"):
            theirs = Theirs(ours.config.to_hf())
        tokens = f"{micro_batches(config)} x {config.micro_batch_size} x {T}"
        flops = flops_per_token(ours.config, T) * micro_batches(config) * config.micro_batch_size * T
        print(
            f"step of {ours.num_parameters():,} parameters on a pretended {config.gpu}, {tokens} tokens, "
            f"{config.optimizer}; {gpu.flops * FLOPS_REACHED / 1e12:.0f} TFLOP/s and "
            f"{gpu.bandwidth * BANDWIDTH_REACHED / 1e12:.2f} TB/s assumed"
        )
        wrap(ours, Ranks(0, 1, torch.device("cuda", 0)), "true")
        print_costs("GPTModel", step_costs(config, ours, ours, meter), gpu, flops)
        for title, theirs.mask in THEIR_MASKS.items():
            compiled = torch.compile(theirs, dynamic=False)
            print_costs(title, step_costs(config, theirs, compiled, meter), gpu, flops)


if __name__ == "__main__":
    run_script(main, Config)
