"""How fast the parts are, side by side with what a user would pick instead.

    python bench.py                       # all but roofline and time_to_loss; on the GPU if there is one
    python bench.py --only=loss
    python bench.py --only=step --hidden_size=512 --num_attention_heads=8 --num_hidden_layers=12

Speeds are medians of `rounds` runs of each candidate, in turn; a warm-up run comes first. Memory is measured
once. How time_to_loss measures is told in bench_time.py.
"""

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import pretrain_gpt
import sft_gpt
from checkpoint import Checkpoints, find_model
from common import check_choice, run_script
from distributed import Ranks, join_ranks
from generation import Int8Matrix
from gpt import GPTConfig, GPTModel
from huggingface import model_directory
from loss import summed_loss
from metrics import Metrics, flops_per_token
from optim import Muon, make_optimizer, set_learning_rate
from packing import collate
from precision import DTYPES, has_bf16, peak_flops, settle_precision
from sft import render_batch, why_unusable
from sharding import wrap
from training import StepHistory, evaluate, forward_backward, targets_in


@dataclass
class Config:
    only: str = "all"  # loss, step, memory, optimizer, generate, save, sft; also roofline, time_to_loss
    rounds: int = 7  # times that each candidate runs
    vocab_size: int = 4096  # ids of the tokenizer
    hidden_size: int = 256  # width of the residual stream
    num_hidden_layers: int = 4  # blocks
    num_attention_heads: int = 4  # query heads
    context_length: int = 256  # T, tokens in a window
    micro_batch_size: int = 16  # B, windows at once
    optimizer: str = "muon"  # of the step: muon or adamw
    lr: float = 3e-3  # AdamW's learning rate
    matrix_lr: float = 0.02  # Muon's learning rate
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    weight_decay: float = 0.1  # on matrices
    data: str = "embedded"  # of sft and generate: conversations as in sft_gpt.py
    model: str = ""  # of generate: a checkpoint, a model directory or a hub id; empty for random weights
    conversations: int = 3000  # of sft: about so many of them, evenly spaced, are an epoch
    batch_tokens: int = 4096  # of sft and roofline: tokens in an optimizer step
    their_batch_size: int = 8  # of sft: conversations that TRL gives to its model at once
    nanogpt: str = ""  # of time_to_loss and, on a CPU, step: the folder of a clone of karpathy/nanoGPT
    data_dir: str = ""  # of time_to_loss: prepared shards, one comparison for each folder: a,b
    their_steps: int = 600  # of time_to_loss: steps that nanoGPT makes
    eval_windows: int = 200  # of time_to_loss: so many windows of the validation split give the loss
    seeds: int = 5  # of time_to_loss: runs of ours, each with other weights and another order
    gpu: str = "h100"  # of roofline: h100, h200, a100, b200 or l4
    device: str = "auto"  # auto, cpu, cuda
    dtype: str = "auto"  # of matrix products: float32, bfloat16, or auto for the faster one


class LargestTensor(TorchDispatchMode):
    """Remembers the size in bytes of the largest storage that any operation gave."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def medians(candidates: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each candidate, run in turn."""
    seconds = {name: [] for name in candidates}
    for i in range(rounds + 1):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(title: str, results: dict[str, float], amount: float, unit: str) -> None:
    print(f"\n{title}")
    first = next(iter(results.values()))
    for name, seconds in results.items():
        speed = f"{amount / seconds:12,.0f} {unit}"
        print(f"  {name:44} {1000 * seconds:9.1f} ms {speed}  {seconds / first:5.2f} x the time")


def model_of(config: Config, device: torch.device) -> GPTModel:
    torch.manual_seed(0)
    shape = GPTConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.context_length,
    )
    with device:
        return GPTModel(shape)


def optimizer_of(model: torch.nn.Module, kind: str, config, ranks: Ranks) -> Muon:
    """An optimizer with the rates of a Config, this one or a training script's."""
    return make_optimizer(
        model,
        kind,
        ranks=ranks,
        lr=config.lr,
        matrix_lr=config.matrix_lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )


def training_step(module, optimizer, batches: list[dict], *, lr_scale: float, ranks: Ranks) -> None:
    """A step as the scripts' loops make it."""
    targets = int(sum(targets_in(batch) for batch in batches))
    history = StepHistory(0.0, ranks)
    loss_sum, grad_norm = forward_backward(module, batches, targets=targets, max_grad_norm=1.0, ranks=ranks)
    lr = set_learning_rate(optimizer, lr_scale)
    bad = history.record(
        1, loss_sum=loss_sum, grad_norm=grad_norm, targets=targets, tokens=targets, lr=lr, stop=False
    )
    optimizer.step(skip=bad)
    optimizer.zero_grad(set_to_none=True)
    history.outcomes(1)


def bench_loss(config: Config, ranks: Ranks) -> None:
    """The head and its loss, forward and backward, over the (N, V) logits."""
    N, C, V = config.micro_batch_size * config.context_length, config.hidden_size, config.vocab_size
    x = torch.randn(N, C, device=ranks.device, requires_grad=True)
    w = torch.randn(V, C, device=ranks.device, requires_grad=True)
    y = torch.randint(V, (N,), device=ranks.device)
    half = y.masked_fill(torch.arange(N, device=ranks.device) % 2 == 0, -100)

    def chunked(targets):
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(x, w, targets, reduction="sum", options=options)

    losses = {
        "summed_loss (ours)": lambda: summed_loss(x, w, y),
        "F.linear_cross_entropy, chunked": lambda: chunked(y),
        "F.cross_entropy on whole logits": lambda: F.cross_entropy(
            F.linear(x, w).float(), y, reduction="sum"
        ),
        "summed_loss (ours), half masked": lambda: summed_loss(x, w, half),
        "F.linear_cross_entropy, half masked": lambda: chunked(half),
    }
    if torch.__version__ < (2, 13):
        print("F.linear_cross_entropy is left out: it is compared from torch 2.13 on")
        losses = {name: loss for name, loss in losses.items() if not name.startswith("F.linear")}
    report(
        f"loss, N={N} C={C} V={V}",
        medians({k: lambda f=f: f().backward() for k, f in losses.items()}, config.rounds, ranks.device),
        N,
        "tok/s",
    )
    for name, loss in losses.items():
        with LargestTensor() as largest:
            loss().backward()
        print(f"  {name:44} {largest.bytes / 2**20:9.1f} MiB in its largest tensor")


def their_model(config: Config, device: torch.device) -> torch.nn.Module:
    """Hugging Face's model of the same shape: a Qwen3."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = model_of(config, torch.device("meta")).config.to_hf()
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).to(device)


def step_of(model: torch.nn.Module, config: Config, ranks: Ranks) -> Callable[[], None]:
    """What makes a training step of a model, ours or Hugging Face's, on random tokens."""
    B, T = config.micro_batch_size, config.context_length
    ids = torch.randint(config.vocab_size, (B, T + 1), device=ranks.device)
    optimizer = optimizer_of(model, config.optimizer, config, ranks)
    set_learning_rate(optimizer, 1.0)
    if isinstance(model, GPTModel):
        batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}
        return partial(training_step, model, optimizer, [batch], lr_scale=1.0, ranks=ranks)

    def their_step() -> None:
        with ranks.autocast():
            loss = model(input_ids=ids[:, :-1], labels=ids[:, :-1]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return their_step


def bench_step(config: Config, ranks: Ranks) -> None:
    """A training step, against Hugging Face's Qwen3 of the same shape with the same optimizer, and the share
    of the device's peak that each reaches."""
    B, T = config.micro_batch_size, config.context_length
    ours, compiled = (model_of(config, ranks.device) for _ in range(2))
    compiled.compile_blocks()
    models = {"GPTModel": ours, "GPTModel, compiled": compiled}
    models["transformers Qwen3"] = their_model(config, ranks.device)
    candidates = {name: step_of(model, config, ranks) for name, model in models.items()}
    if config.nanogpt and ranks.device.type == "cpu":
        import bench_time  # which imports this file

        candidates |= bench_time.nanogpt_steps(config, ranks)
    title = f"step of {ours.num_parameters():,} parameters, B={B} T={T}, {config.optimizer}"
    seconds = medians(candidates, config.rounds, ranks.device)
    report(title, seconds, B * T, "tok/s")
    peak = peak_flops(ranks, ranks.dtype)
    for name, each in seconds.items() if peak else ():
        if name not in models:
            continue  # of another shape
        print(f"  {name:44} {100 * B * T * flops_per_token(ours.config, T) / each / peak:9.1f}% MFU")


def most_memory(run: Callable[[], None], device: torch.device) -> int:
    """The most bytes that tensors take while something runs, as torch's allocator counts them."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler tells when it starts and stops
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiled:
        run()
    changes = [e.nbytes() for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(max(np.cumsum(changes)))


def bench_memory(config: Config, ranks: Ranks) -> None:
    """The memory of a training step: weights, gradients, the optimizer's state and activations, against
    Hugging Face's Qwen3 of the same shape with the same optimizer."""
    B, T = config.micro_batch_size, config.context_length

    def two_steps(make: Callable, checkpoint_activations: bool = False) -> None:
        model = make(config, ranks.device)
        model.checkpoint_activations = checkpoint_activations
        step = step_of(model, config, ranks)
        step()
        step()  # with the optimizer's state from its beginning on

    print(f"\nmemory of a step, B={B} T={T} V={config.vocab_size}, {config.optimizer}")
    candidates = {
        "transformers Qwen3": partial(two_steps, their_model),
        "GPTModel": partial(two_steps, model_of),
        "GPTModel, activations computed again": partial(two_steps, model_of, True),
    }
    memory = {name: most_memory(run, ranks.device) for name, run in candidates.items()}
    for name, most in memory.items():
        print(f"  {name:44} {most / 1e9:9.2f} GB  {most / memory['transformers Qwen3']:5.2f} x the memory")


def bench_optimizer(config: Config, ranks: Ranks) -> None:
    """An update of all parameters."""
    candidates = {}
    for kind in ("adamw", "muon"):
        model = model_of(config, ranks.device)
        optimizer = optimizer_of(model, kind, config, ranks)
        set_learning_rate(optimizer, 1.0)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        candidates[kind] = optimizer.step
    report(
        "optimizer update",
        medians(candidates, config.rounds, ranks.device),
        model.num_parameters(),
        "parameters/s",
    )


def bench_generate(config: Config, ranks: Ranks) -> None:
    """Greedy generation, alone and in a batch, against transformers' generate, in each type that this device
    multiplies fast; on a CPU also from int8 weights, and what they cost in loss."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    on_cpu, theirs = ranks.device.type == "cpu", {}
    kinds = ["float32", *(["bfloat16"] if not on_cpu or has_bf16() else [])]
    with tempfile.TemporaryDirectory() as name:
        folder = config.model and model_directory(find_model(config.model))
        if not folder:
            model_of(config, torch.device("cpu")).save_pretrained(name)
        ours = GPTModel.from_pretrained(folder or name).to(ranks.device)
        for kind in kinds:
            theirs[kind] = AutoModelForCausalLM.from_pretrained(folder or name, dtype=getattr(torch, kind))
            theirs[kind].to(ranks.device)
    n = min(128, ours.config.max_position_embeddings // 2)
    ours.graph_decoding, ours.kept_weights = True, {}  # as in a chat

    def our_generate(prompts: list[list[int]], kind: str, int8: bool) -> None:
        settle_precision(ranks, kind)
        ours.int8_decoding = int8
        with ranks.autocast():
            for _ in ours.generate(prompts, n):
                pass

    def their_generate(prompts: torch.Tensor, kind: str) -> None:
        torch.set_float32_matmul_precision("highest")
        options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        theirs[kind].generate(prompts, attention_mask=torch.ones_like(prompts), **options)

    for batch in (1, 16):
        prompts = torch.ones(batch, 8, dtype=torch.long, device=ranks.device)
        candidates = {f"transformers, {kind}": partial(their_generate, prompts, kind) for kind in kinds}
        rows = prompts.tolist()
        candidates |= {
            f"GPTModel.generate, {kind}": partial(our_generate, rows, kind, False) for kind in kinds
        }
        if on_cpu:
            candidates["GPTModel.generate, int8"] = partial(our_generate, rows, kinds[-1], True)
        title = f"generation of {n} tokens, {batch} prompts, {ours.num_parameters():,} parameters"
        report(title, medians(candidates, config.rounds, ranks.device), n * batch, "tok/s")
    if on_cpu and folder:
        report_int8_loss(ours, AutoTokenizer.from_pretrained(folder), config, ranks)


def report_int8_loss(model: GPTModel, tokenizer, config: Config, ranks: Ranks) -> None:
    """What a model loses on conversations when its matrices are rounded as int8 decoding does."""
    rows = (messages for messages, _ in sft_gpt.conversations(sft_gpt.Config(data=config.data)))
    rows = [messages for messages in rows if why_unusable(messages) is None]
    rows = render_batch(rows[:: max(1, len(rows) // 200)], tokenizer)
    T = model.config.max_position_embeddings
    rows = [[(np.array(ids), np.array(labels))] for ids, labels in rows if len(ids) <= min(T, 512)]
    settle_precision(ranks, "float32")

    def loss() -> float:
        batches = [
            collate(rows[i : i + 8], max(len(r[0][0]) for r in rows[i : i + 8]))
            for i in range(0, len(rows), 8)
        ]
        nats, _, targets = evaluate(model, batches, ranks)
        return nats / targets

    exact = loss()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            rounded = Int8Matrix.rounded(module.weight.detach(), torch.float32)
            module.weight = torch.nn.Parameter(rounded.numbers * rounded.scales[:, None])
    print(f"  loss on {len(rows)} conversations of {config.data}: {exact:.4f} nats/token, int8 {loss():.4f}")


def bench_save(config: Config, ranks: Ranks) -> None:
    """What a checkpoint costs a training run, the slower steps while it is written included; with AdamW,
    whose state is the largest."""
    B, T = config.micro_batch_size, config.context_length
    model = model_of(config, ranks.device)
    optimizer = optimizer_of(model, "adamw", config, ranks)
    ids = torch.randint(config.vocab_size, (B, T + 1), device=ranks.device)
    batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}
    with tempfile.TemporaryDirectory() as folder:
        metrics = Metrics(folder, start=0, max_steps=0, step_tokens=B * T, log_every=1, ranks=ranks)
        checkpoints = Checkpoints(
            folder, ranks, tokenizer=None, identity={}, settings={}, origin="", keep_last=1, keep_every=0
        )

        def save() -> None:
            checkpoints.save(0, model, optimizer, history=StepHistory(0.0, ranks), metrics=metrics)

        def steps(n: int) -> None:
            for _ in range(n):
                training_step(module, optimizer, [batch], lr_scale=0.01, ranks=ranks)

        def save_and_steps(n: int) -> None:
            began = time.perf_counter()
            save()
            stalls.append(time.perf_counter() - began)
            steps(n)
            assert checkpoints.writing.done(), "a checkpoint takes longer to write than these steps"

        module, stalls = wrap(model, ranks, "auto"), []
        step = medians({"step": lambda: steps(1)}, config.rounds, ranks.device)["step"]
        began = time.perf_counter()
        save()
        checkpoints.wait()
        n = math.ceil(3 * (time.perf_counter() - began) / step)
        alone, saving = f"{n} steps", f"{n} steps, a checkpoint written meanwhile"
        candidates = {alone: lambda: steps(n), saving: lambda: save_and_steps(n)}
        stalls.clear()
        seconds = medians(candidates, config.rounds, ranks.device)
    report(f"saving {model.num_parameters():,} parameters, B={B} T={T}", seconds, n * B * T, "tok/s")
    cost, speed = seconds[saving] - seconds[alone], n * B * T / seconds[alone]
    print(f"  save() returns after {1000 * statistics.median(stalls):.0f} ms; in all it costs {cost:.2f} s")
    for script, defaults in (("pretrain_gpt.py", pretrain_gpt.Config()), ("sft_gpt.py", sft_gpt.Config())):
        between = defaults.save_every * defaults.batch_tokens / speed
        print(
            f"  {100 * cost / between:.4f}% of the {between:,.0f} s that {defaults.save_every} steps of "
            f"{defaults.batch_tokens:,} tokens take at this speed, the defaults of {script}"
        )


def bench_sft(config: Config, ranks: Ranks) -> None:
    """Fine-tuning for an epoch, against TRL's SFTTrainer."""
    import bench_sft  # which imports this file

    bench_sft.compare(config, ranks)


def bench_time_to_loss(config: Config, ranks: Ranks) -> None:
    """Seconds that pretraining takes to nanoGPT's last loss."""
    import bench_time  # which imports this file

    bench_time.compare(config, ranks)


def bench_roofline(config: Config, ranks: Ranks) -> None:
    """A step's costs on a GPU of a kind, counted on tensors without values: this takes a process of its own,
    see fake_cuda.py. On a GPU a step is measured, too."""
    flags = [f"--{name}={value}" for name, value in asdict(config).items()]
    done = subprocess.run([sys.executable, Path(__file__).with_name("roofline.py"), *flags])
    if done.returncode:
        raise SystemExit(done.returncode)  # it has told why
    if ranks.device.type == "cuda":
        bench_step(config, ranks)


BENCHMARKS = {
    "loss": bench_loss,
    "step": bench_step,
    "memory": bench_memory,
    "optimizer": bench_optimizer,
    "generate": bench_generate,
    "save": bench_save,
    "sft": bench_sft,
    "roofline": bench_roofline,
    "time_to_loss": bench_time_to_loss,
}
APART = ("roofline", "time_to_loss")  # all the others are run by --only=all


def main(config: Config) -> None:
    check_choice("only", config.only, ("all", *BENCHMARKS))
    check_choice("dtype", config.dtype, DTYPES)
    ranks = join_ranks(config.device)
    settle_precision(ranks, config.dtype)
    threads = f", {torch.get_num_threads()} threads" if ranks.device.type == "cpu" else ""
    print(
        f"torch {torch.__version__}, {ranks.device}{threads}, {ranks.precision}, medians of {config.rounds}"
    )
    for name, benchmark in BENCHMARKS.items():
        if config.only == name or (config.only == "all" and name not in APART):
            benchmark(config, ranks)


if __name__ == "__main__":
    run_script(main, Config)
