"""The CUDA path on a machine without a GPU: fake tensors on the device "cuda".

    python tests/fake_cuda_scenarios.py train '{"script": "pretrain"}'

runs a scenario below in this process and prints what it recorded as JSON. Fake tensors need a guard that is
there before torch is imported, see fake_cuda.py, so each scenario has a process of its own.
"""

import json
import sys
import tempfile
import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORLD, RANK = 8, 1
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fake_cuda import fake_cuda, install  # noqa: E402

if __name__ == "__main__":
    install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

SHAPE = {"vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
T, ROWS, MICRO = 256, 4, 2  # tokens in a row, a rank's rows of a step, and of a micro-batch


def place() -> str:
    """The innermost line of the project's own code."""
    frames = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT]
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}:{frames[-1].lineno}" if frames else "torch"


class Recorder(TorchDispatchMode):
    """Notes every operation: products and their types, values that the host waits for, copies, collectives.

    Fake tensors have no values: Python reads 1 or False on the device, 0.0 on the host.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.products, self.collectives, self.mixed = Counter(), Counter(), Counter(), Counter()
        self.operations, self.statistics, self.phase = Counter(), Counter(), "step"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, str(func)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_cuda = [t for t in tensors if t.device.type == "cuda"]
        if name == "aten._local_scalar_dense.default" and isinstance(args[0], FakeTensor):
            if on_cuda:
                self.waits[f"{self.phase}: reads a value at {place()}"] += 1
            return (
                float(bool(on_cuda))
                if args[0].is_floating_point()
                else False
                if args[0].dtype == torch.bool
                else 1
            )
        if name == "aten.nonzero.default" and on_cuda:
            self.waits[f"{self.phase}: a shape that depends on data at {place()}"] += 1
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)
        out = func(*args, **kwargs)
        self.operations[name] += bool(on_cuda)
        if name in ("aten._to_copy.default", "aten.copy_.default"):
            to, source = (args[0], args[1]) if "copy_." in name else (out, args[0])
            ends = {to.device.type, source.device.type}
            if ends == {"cpu", "cuda"} and not kwargs.get("non_blocking", len(args) > 2 and args[2]):
                self.waits[f"{self.phase}: a blocking copy to {to.device.type} at {place()}"] += 1
        elif on_cuda and any(t.dim() and t.device.type == "cpu" for t in tensors):
            self.mixed[f"{name} at {place()}"] += 1
        if name.split(".")[1] in ("mm", "bmm", "addmm", "baddbmm") and on_cuda:
            factors = [t for t in args if isinstance(t, torch.Tensor)][-2:]
            types = " ".join(str(t.dtype).removeprefix("torch.") for t in (*factors, out))
            self.products[f"{self.phase}: {types} at {place().rpartition(':')[0]}"] += 1
        if name.startswith(("aten.rsqrt.", "aten._fused_rms_norm.")) and on_cuda:
            statistic = out[1] if isinstance(out, tuple) else out  # 1 / root mean square
            self.statistics[str(statistic.dtype).removeprefix("torch.")] += 1
        if name.startswith("c10d."):
            size = sum(t.numel() * t.itemsize for t in tensors)
            self.collectives[f"{self.phase}: {name.split('.')[1].strip('_')} {size} bytes"] += 1
        return out

    def report(self) -> dict:
        names = ("waits", "products", "collectives", "mixed", "statistics")
        return {name: dict(getattr(self, name)) for name in names}


def fake_ranks():
    """Rank 1 of 8, whose collectives go nowhere."""
    import torch.distributed._tools.fake_collectives
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from distributed import Ranks

    dist.init_process_group("fake", rank=RANK, world_size=WORLD, store=FakeStore())
    parallel = torch.nn.parallel.distributed  # parts in C++ that read values
    parallel._verify_param_shape_across_processes = lambda *a, **k: True
    parallel._sync_module_states = lambda *a, **k: None
    return Ranks(RANK, WORLD, torch.device("cuda", 0), even_batches=True)


def wrapped(model, ranks, compile: str):
    """sharding.wrap, with a hook for DDP's buckets: its own wants what the fake group cannot give."""
    from sharding import wrap

    module = wrap(model, ranks, compile)

    def average(state, bucket):
        dist.all_reduce(bucket.buffer())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    if ranks.world > 1:
        module.register_comm_hook(None, average)
    return module


def fake_model(**changes):
    from gpt import GPTConfig, GPTModel

    with torch.device("cuda"):
        return GPTModel(GPTConfig(**SHAPE, max_position_embeddings=T, **changes))


def conversations_on_disk(folder: Path):
    """Made-up conversations of many lengths, as sft.py writes them."""
    from sft import SFTDataset, Writer

    writer = Writer(folder, 0)
    for i in range(400):
        ids = [7 + (i + k) % 4000 for k in range(20 + 37 * i % 150)]
        writer.append(ids, [-100] * 5 + ids[5:])
    writer.close()
    return SFTDataset(folder)


def batches_of(script: str, folder: Path, ranks):
    """The module that a script trains, and what gives a step's number of targets and micro-batches."""
    import numpy as np

    from data import TokenLoader
    from order import batch_order
    from shards import ShardWriter

    rows = ROWS * ranks.world - 1  # not all micro-batches are full
    if script == "pretrain":
        for split in ("train", "val"):
            writer = ShardWriter(folder, split, version=1, shard_tokens=10**6)
            writer.append(np.arange(100_000) % 4096, 1)
            writer.finish()
        loader = TokenLoader(folder, "train", T, 4096)

        def step(i):
            windows = batch_order(0, i, rows, len(loader))
            return rows * T, list(loader.micro_batches(windows, MICRO, ranks))

        return fake_model(), step
    dataset = conversations_on_disk(folder / "data")
    if script == "sft":
        from packing import PackedLoader

        packed = PackedLoader(dataset, row_length=T, rows_per_step=rows, seed=0, varlen=True)

        def step(i):
            chosen = packed.step_rows(i)
            return packed.count(chosen)[1], list(packed.micro_batches(chosen, MICRO, ranks))

        return fake_model(num_key_value_heads=2), step
    from dpo import PreferenceModel, micro_batches

    reference = np.zeros(len(dataset), np.float32)

    def step(i):
        chosen = batch_order(0, i, rows, len(dataset) // 2).tolist()
        return rows, list(micro_batches(dataset, reference, chosen, T=T, size=MICRO, ranks=ranks))

    return PreferenceModel(fake_model(), 0.1), step


def train(script: str, *, optimizer: str = "muon") -> dict:
    """A whole step and an evaluation, as one of eight ranks, and what they did."""
    from dpo import pairs_in
    from optim import make_optimizer, set_learning_rate
    from training import StepHistory, evaluate, forward_backward, targets_in

    with tempfile.TemporaryDirectory() as folder, fake_cuda():
        ranks = fake_ranks()
        model, step = batches_of(script, Path(folder), ranks)
        rates = {"lr": 1e-3, "matrix_lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
        updates = make_optimizer(model, optimizer, ranks=ranks, **rates)
        module = wrapped(model, ranks, "false")
        count = pairs_in if script == "dpo" else targets_in
        history, read = StepHistory(6.0, ranks, read_all=lambda step: False), []
        with Recorder() as recorder:
            targets, batches = step(0)
            loss_sum, grad_norm = forward_backward(
                module, batches, targets=targets, max_grad_norm=1.0, ranks=ranks
            )
            recorder.phase = "update"
            lr = set_learning_rate(updates, 0.5)
            values = {
                "loss_sum": loss_sum,
                "grad_norm": grad_norm,
                "targets": targets,
                "tokens": targets,
                "lr": lr,
            }
            bad = history.record(1, **values, stop=False)
            updates.step(skip=bad)
            read.append([outcome.step for outcome in history.outcomes(1)])
            recorder.phase = "next record"  # a second forward is more than DDP can do with fake tensors
            history.record(2, **values, stop=False)
            read.append([outcome.step for outcome in history.outcomes(2)])
            recorder.phase = "evaluation"
            evaluate(module, step(1)[1], ranks, count)
        state = Counter(
            f"{str(value.dtype).removeprefix('torch.')} on {value.device.type}"
            for values in updates.state.values()
            for value in values.values()
        )
        sizes = sum(4 * p.numel() for p in model.parameters())
        return recorder.report() | {"state": state, "read": read, "parameter_bytes": sizes}


def generate(*, new_tokens: int, compile: bool) -> dict:
    """Three answers to prompts of several lengths: what is done while a graph of a step is recorded, and how
    many operations Python starts for each further token."""
    from distributed import Ranks
    from generation import KVCache

    recorder, made, store = Recorder(), set(), KVCache.store
    found = {"recorded": 0, "replayed": 0, "steps": 0, "operations": []}

    class Graph:
        def replay(self):
            found["replayed"] += 1

    @contextmanager
    def recording(graph, capture_error_mode):
        found["recorded"], recorder.phase = found["recorded"] + 1, "recording"
        yield
        recorder.phase = "step"

    def noted(cache, *args):
        made.update(f"{t.dtype} {t.device.type}".removeprefix("torch.") for t in cache.layers[0])
        return store(cache, *args)

    torch.cuda.CUDAGraph, torch.cuda.graph, KVCache.store = Graph, recording, noted
    with fake_cuda():
        model = fake_model(num_key_value_heads=2)
        if compile:
            model.compile_blocks()
        for prompts in ([[1, 2, 3], [4, 5]], [[6], [7] * 20], [[8] * 9, [9] * 9]):
            with recorder, Ranks(0, 1, torch.device("cuda", 0)).autocast():
                for _ in model.generate(prompts, new_tokens, temperature=0.8, top_k=50, top_p=0.9):
                    found["steps"] += 1
                    found["operations"].append(sum(recorder.operations.values()))
        return recorder.report() | found | {"cache": sorted(made)}


def compiles(script: str) -> dict:
    """How often the blocks and the loss are compiled in the first step, in an evaluation, and afterwards."""
    from torch._dynamo.testing import CompileCounterWithBackend

    from distributed import Ranks
    from dpo import pairs_in
    from sharding import wrap
    from training import evaluate, forward_backward, targets_in

    Ranks.sum = lambda self, *values: [1.0] * len(values)  # Python reads no value of a fake tensor
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    real = torch.compile
    torch.compile = lambda *args, **kwargs: real(*args, backend=counter, **kwargs)
    with tempfile.TemporaryDirectory() as folder, fake_cuda():
        ranks, found = Ranks(0, 1, torch.device("cuda", 0), even_batches=True), {}
        model, step = batches_of(script, Path(folder), ranks)
        module, count = wrap(model, ranks, "true"), pairs_in if script == "dpo" else targets_in
        for name, i in (("first step", 0), ("evaluation", 1), ("later", 2), ("later", 3), ("later", 4)):
            before = counter.frame_count
            targets, batches = step(i)
            if name == "evaluation":
                evaluate(module, batches, ranks, count)
            else:
                forward_backward(module, batches, targets=targets, max_grad_norm=1.0, ranks=ranks)
            found[name] = found.get(name, 0) + counter.frame_count - before
        return found


def heads() -> dict:
    """How many query and key heads reach a kernel, by the type of matrix products."""
    found, real = {}, F.scaled_dot_product_attention
    with fake_cuda():
        model = fake_model(num_key_value_heads=2)
        ids = torch.zeros(2, 8, dtype=torch.long, device="cuda")
        for dtype in (torch.float32, torch.bfloat16):

            def noted(q, k, v, dtype=dtype, **options):
                found[str(dtype)] = [q.size(1), k.size(1), v.size(1)]
                return real(q, k, v, **options)

            F.scaled_dot_product_attention = noted
            with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
                model(ids)
    return found


if __name__ == "__main__":
    scenario, settings = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps(globals()[scenario](**settings)))
