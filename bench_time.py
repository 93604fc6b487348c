"""Seconds to a loss: pretraining with the quick start's recipe beside nanoGPT, on the same tokens.

    git clone https://github.com/karpathy/nanoGPT
    python bench.py --only=time_to_loss --nanogpt=nanoGPT --data_dir=data/mine

nanoGPT trains at each of four rates: as shipped; under bf16 autocast, if the CPU has bf16; and in our model's
shape. The best last loss of each kind is a target. Ours then looks for the fewest steps that reach it. Only
steps are timed: the median seconds of a step times the number of steps, without evaluations. It runs on a
CPU, and takes a quarter of an hour or more for each dataset.
"""

import contextlib
import importlib.util
import io
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import pretrain_gpt
from bench import Config
from common import InputError, read_records
from data import TokenLoader, read_manifest, read_shard
from distributed import Ranks
from precision import has_bf16, settle_precision

QUICK_START = pretrain_gpt.Config(  # see quickstart.sh
    num_hidden_layers=3, hidden_size=256, num_attention_heads=4, context_length=256,
    batch_tokens=4096, micro_batch_size=16, warmup_steps=10, decay_fraction=0.7,
    lr=0.025, embedding_lr=0.15, head_lr=0.0075, beta1=0.8, beta2=0.97,
)  # fmt: skip
# For a tenth of its steps: a smaller model, and rates, momentum and windows for a short run.
RECIPE = replace(
    QUICK_START, num_hidden_layers=1, hidden_size=128, num_attention_heads=2, rope_theta=1000.0,
    length_warmup_fraction=0.75, warmup_steps=4, beta1=0.4, lr=0.05, matrix_lr=0.03, head_lr=0.012,
)  # fmt: skip
# nanoGPT's shape is the quick start's with a layer more. The best rate counts. The rest is from its
# config/train_shakespeare_char.py, but without dropout, because few tokens are seen twice.
SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 256}
BATCH = 8  # windows in a step
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
WARMUP, BETAS, DECAY = 100, (0.9, 0.99), 0.1
GRAIN = 10  # steps by which runs of ours differ


def nanogpt(folder: str):
    """The module model.py of a checkout."""
    path = Path(folder) / "model.py"
    if not folder or not path.is_file():
        raise InputError(
            f"--nanogpt={folder} has no model.py; git clone https://github.com/karpathy/nanoGPT and name it"
        )
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cosine(step: int, steps: int, rate: float) -> float:
    """nanoGPT's schedule: a linear warm-up, then a cosine from the rate to a tenth of it."""
    if step < WARMUP:
        return rate * (step + 1) / (WARMUP + 1)
    share = (step - WARMUP) / (steps - WARMUP)
    return rate * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


def nanogpt_model(theirs, shape: dict, *, context: int, vocab_size: int, rate: float) -> tuple:
    """A model of theirs and its optimizer."""
    torch.manual_seed(0)
    fields = {**shape, "block_size": context, "vocab_size": vocab_size, "dropout": 0.0, "bias": False}
    with contextlib.redirect_stdout(io.StringIO()):
        model = theirs.GPT(theirs.GPTConfig(**fields))
        return model, model.configure_optimizers(DECAY, rate, BETAS, "cpu")


def nanogpt_step(model, optimizer, rows: torch.Tensor, ranks: Ranks) -> None:
    """A step as train.py makes it, on rows (B, T + 1)."""
    with ranks.autocast():  # anew each step: it keeps the weights that it has cast
        loss = model(rows[:, :-1], rows[:, 1:].contiguous())[1]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def nanogpt_steps(config: Config, ranks: Ranks) -> dict[str, Callable[[], None]]:
    """What makes a step of theirs in bench.py's shape: as shipped, and in our type under autocast."""
    T, V, steps = config.context_length, config.vocab_size, {}
    shape = {
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_embd": config.hidden_size,
    }
    rows = torch.randint(V, (config.micro_batch_size, T + 1))
    for precision in dict.fromkeys(("float32", ranks.precision.split()[0])):
        peer = nanogpt_model(nanogpt(config.nanogpt), shape, context=T, vocab_size=V, rate=config.lr)
        steps[f"nanoGPT, {precision}"] = partial(
            nanogpt_step, *peer, rows, replace(ranks, precision=precision)
        )
    return steps


def train_nanogpt(
    theirs, *, config: Config, shape: dict, rate: float, tokens: np.ndarray, vocab_size: int, ranks: Ranks
) -> tuple:
    """A model of theirs, trained as train.py does, and the median seconds of a step."""
    T = RECIPE.context_length
    model, optimizer = nanogpt_model(theirs, shape, context=T, vocab_size=vocab_size, rate=rate)
    seconds = []
    for step in range(config.their_steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, config.their_steps, rate)
        starts = torch.randint(len(tokens) - T, (BATCH,)).tolist()
        rows = torch.from_numpy(np.stack([tokens[i : i + T + 1].astype(np.int64) for i in starts]))
        nanogpt_step(model, optimizer, rows, ranks)
        seconds.append(time.perf_counter() - began)
    return model, statistics.median(seconds)


@torch.no_grad()
def their_loss(model: torch.nn.Module, val: TokenLoader, windows: range) -> float:
    """Nats per token of the windows."""
    model.eval()
    losses = [float(model(*val.read([window]))[1]) for window in windows]
    return statistics.fmean(losses)


def best_of_theirs(
    theirs, val: TokenLoader, *, config: Config, shape: dict, data_dir: str, ranks: Ranks
) -> tuple:
    """The loss and the seconds of the rate with the least last loss."""
    paths = sorted(Path(data_dir).glob("train_*.bin"))
    tokens = np.concatenate([read_shard(path) for path in paths])
    windows = val.first_windows(config.eval_windows, [1.0])[0]
    results = []
    for rate in RATES:
        settings = {"shape": shape, "rate": rate, "tokens": tokens, "vocab_size": val.vocab_size}
        model, seconds = train_nanogpt(theirs, config=config, ranks=ranks, **settings)
        with ranks.autocast():
            loss = their_loss(model, val, windows)
        print(f"    rate {rate:<6} {loss:.4f} nats/token, {1000 * seconds:.0f} ms a step", flush=True)
        results.append((loss, seconds * config.their_steps))
    return min(results)


def run_ours(steps: int, *, config: Config, data_dir: str, seed: int, precision: str) -> tuple[float, float]:
    """The last validation loss of a run, and the seconds of its steps."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        recipe = replace(
            RECIPE, data_dir=data_dir, out_dir=folder, max_steps=steps, seed=seed, dtype=precision,
            log_every=1, eval_every=10**9, eval_tokens=config.eval_windows * RECIPE.context_length,
            samples=False, save_every=10**9, wandb="off", device="cpu",
        )  # fmt: skip
        pretrain_gpt.main(recipe)
        rows = read_records(Path(folder) / "metrics.jsonl")
    speed = statistics.median(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
    loss = next(row["val_loss"] for row in reversed(rows) if "val_loss" in row)
    return loss, steps * RECIPE.batch_tokens / speed


def fewest_steps(reach: Callable[[int], tuple[float, float]], target: float, start: int) -> tuple:
    """The fewest steps, in grains, that reach the target, with loss and seconds. `reach` runs so many."""
    steps = start
    found = reach(steps)
    while found[0] > target:
        steps += GRAIN
        found = reach(steps)
    while steps > GRAIN and found[0] <= target:
        fewer = reach(steps - GRAIN)
        if fewer[0] > target:
            break
        steps, found = steps - GRAIN, fewer
    return steps, *found


def speedups(target: float, seconds: float, *, config: Config, **settings) -> list[float]:
    """For each seed `seconds`, nanoGPT's, divided by those in which ours reaches the target."""
    found, start = [], 6 * GRAIN
    for seed in range(config.seeds):
        reach = partial(run_ours, config=config, seed=seed, **settings)
        start, loss, ours = fewest_steps(reach, target, start)
        print(f"    seed {seed}: {loss:.4f} after {start} steps, {ours:.1f} s", flush=True)
        found.append(seconds / ours)
    return found


def compare(config: Config, ranks: Ranks) -> None:
    """Print for each dataset what both need, over several seeds of ours."""
    theirs, precision = nanogpt(config.nanogpt), ranks.precision
    if not config.data_dir:
        raise InputError("--only=time_to_loss needs --data_dir, folders of prepare_data.py, commas between")
    ours = {"n_layer": RECIPE.num_hidden_layers, "n_head": RECIPE.num_attention_heads}
    kinds = {"as shipped": ("float32", SHAPE)}
    if has_bf16():
        kinds["bf16 autocast"] = ("bfloat16", SHAPE)
    kinds["of our shape"] = (precision.split()[0], {**ours, "n_embd": RECIPE.hidden_size})
    for data_dir in config.data_dir.split(","):
        vocab_size = read_manifest(Path(data_dir))["vocab_size"]
        val = TokenLoader(data_dir, "val", RECIPE.context_length, vocab_size)
        print(f"\n{data_dir}: nanoGPT, {config.their_steps} steps of {BATCH * RECIPE.context_length} tokens")
        peers = {}
        for name, (kind, shape) in kinds.items():
            print(f"  {name}, {kind}: {shape['n_layer']} x {shape['n_embd']}")
            settle_precision(ranks, kind)
            settings = {"config": config, "shape": shape, "data_dir": data_dir, "ranks": ranks}
            peers[name] = best_of_theirs(theirs, val, **settings)
        shape = f"{RECIPE.num_hidden_layers} x {RECIPE.hidden_size}"
        print(f"  ours, {precision}: {shape}, {RECIPE.batch_tokens} tokens a step")
        for name, (target, seconds) in peers.items():
            times = speedups(target, seconds, config=config, data_dir=data_dir, precision=precision)
            spread = f" ± {statistics.stdev(times):.1f}" if len(times) > 1 else ""
            print(
                f"  nanoGPT {name}: {target:.4f} after {seconds:.1f} s; ours reaches it in 1/"
                f"{statistics.fmean(times):.1f}{spread} of the time"
            )
