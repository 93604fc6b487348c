"""Pretrain a language model on the token shards of prepare_data.py.

    python pretrain_gpt.py --data_dir=data/embedded --out_dir=out/base
    torchrun --standalone --nproc_per_node=8 pretrain_gpt.py --data_dir=data/fineweb-edu --out_dir=out/base
    python pretrain_gpt.py --init_from=out/base --data_dir=data/web:0.6,data/math:0.4 --out_dir=out/annealed

Every field of Config is a flag. The same command, started again, continues from the newest checkpoint.

B windows in a micro-batch, T tokens in a window.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from checkpoint import open_weights, told_name, told_stop, too_many_bad_steps
from common import RESUMABLE, InputError, run_script
from data import TokenLoader, verified_manifests
from distributed import join_ranks
from gpt import GPTConfig, GPTModel, padded
from metrics import flops_per_token
from optim import make_optimizer, schedule, set_learning_rate
from order import PIECES, mean_length, parse_sources, validation_numbers, window_pieces
from report import report_end
from resume import lock_and_resume, new_phase, phase_start
from sharding import shard_model, wrap
from tasks import read_questions, score
from tokenization import load_tokenizer, tokenizer_fingerprint, vocabulary_size
from training import Prefetcher, check_settings, evaluate, forward_backward, open_records, step_size


@dataclass
class Config:
    # data
    data_dir: str = "data/fineweb-edu"  # token shards: a folder, a joint a,b, or a mix by tokens a:0.7,b:0.3
    tokenizer: str = ""  # hub id or directory; empty for the one in data_dir
    out_dir: str = "out/base"  # folder for checkpoints, metrics.jsonl and loss.png
    # model
    depth: int = 0  # one dial: blocks; width, batch, steps and rates follow if not set; 0: off
    init_from: str = ""  # run, checkpoint or model whose weights, shape and optimizer state a new phase takes
    num_hidden_layers: int = 12  # blocks
    hidden_size: int = 512  # width of the residual stream
    num_attention_heads: int = 8  # query heads
    num_key_value_heads: int = 0  # key and value heads; 0 for as many as query heads
    intermediate_size: int = 0  # width of the SwiGLU; 0 for 8/3 of hidden_size
    context_length: int = 1024  # tokens in a window
    length_warmup_fraction: float = 0.0  # share of the steps, at the start, with windows in 8, 4, 2 pieces
    rope_theta: float = 10000.0  # base of the rotary frequencies
    qk_norm: bool = True  # normalize queries and keys, as in Qwen3; without it the model is a Llama
    tie_word_embeddings: bool = False  # one matrix for input and output embedding
    # optimization
    max_steps: int = 2000  # optimizer steps
    batch_tokens: int = 524_288  # tokens in an optimizer step, over all ranks and micro-batches
    micro_batch_size: int = 16  # windows that go through the model at once, on each rank
    optimizer: str = "muon"  # muon (for the blocks' matrices, AdamW for the rest) or adamw
    lr: float = 3e-3  # AdamW's peak learning rate
    matrix_lr: float = 0.02  # Muon's peak learning rate
    embedding_lr: float = 0.0  # the input embedding's peak learning rate; 0 for lr
    head_lr: float = 0.0  # the output embedding's peak learning rate, unless it is tied; 0 for lr
    warmup_steps: int = 100  # of linear rise to the peak
    decay_fraction: float = 0.4  # share of the steps, at the end, in which the rate falls linearly to zero
    weight_decay: float = 0.1  # on matrices, per unit of learning rate
    beta1: float = 0.9  # AdamW's averaging of gradients
    beta2: float = 0.95  # AdamW's averaging of squared gradients
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0 for no limit
    spike_sigma: float = 6.0  # skip steps this many deviations above the mean of the last 128; 0: none
    max_bad_steps: int = 10  # steps skipped in a row that stop the run
    seed: int = 0  # of the initial weights and the data order
    # reporting
    log_every: int = 10  # steps between two lines
    eval_every: int = 250  # steps between two validations
    eval_tokens: int = 2_000_000  # tokens of the validation split that are read each time; 0 for all
    eval_tasks: str = ""  # benchmarks that are scored on the way, as hellaswag,piqa; empty for none
    eval_task_every: int = 1000  # steps between two scorings
    eval_task_questions: int = 500  # of each benchmark, always the same ones; 0 for all
    samples: bool = True  # continue a few prompts after each validation
    save_every: int = 500  # steps between two checkpoints
    keep_last: int = 3  # checkpoints that are kept; 0 for all
    keep_every: int = 0  # steps between two checkpoints that are never deleted; 0 for none
    wandb: str = "auto"  # auto (if a key is set up), online, offline or off
    profile: int = 0  # steps that are traced into out_dir/profile, after five others; 0 for none
    # machine
    resume: str = "auto"  # auto (newest checkpoint in out_dir), none, or a checkpoint's path
    force: bool = False  # resume although settings that change the result differ
    timeout_minutes: float = 30.0  # a rank without progress for this long ends the run
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # of matrix products: float32, bfloat16, or auto for the faster one; a run keeps its
    compile: str = "auto"  # torch.compile: true, false, or auto for only on CUDA
    checkpoint_activations: bool = False  # keep each block's input only, compute the rest again: less memory
    shard: str = "none"  # split the model over the ranks: full, hybrid (within each machine) or none

    def __new__(cls, *_, **given):
        config = super().__new__(cls)
        config.given = given  # what somebody sets, be it the default
        return config

    def __post_init__(self):
        if self.depth > 0:
            vars(self).update(by_depth(self.depth, self.given))


SHAPE_FLAGS = (  # taken from init_from's model if they are not given
    "num_hidden_layers hidden_size num_attention_heads num_key_value_heads intermediate_size qk_norm "
    "tie_word_embeddings"
).split()
HEAD_DIM = 64  # of a model by depth, whose width is as many times its depth
PEAK_RATES = {"matrix_lr": 0.02, "embedding_lr": 0.15, "head_lr": 0.0075, "lr": 0.025}
# Tokens of a run of depth 12, and of its step as modded-nanogpt and nanochat have it. In shorter runs the
# best step grows as measured here, in longer ones as in Bergsma et al. 2025, https://arxiv.org/abs/2505.13738.
KNOWN_RUN, KNOWN_BATCH, SHORTER_EXPONENT, LONGER_EXPONENT = 1.7e9, 2**19, 0.775, 0.383
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022, https://arxiv.org/abs/2203.15556; of the blocks' parameters
PROMPTS = ("The history of", "The most important", "Water is")  # of the samples


def check(config: Config) -> None:
    """Raise InputError for invalid settings, before anything is read."""
    shape_fields = ("num_hidden_layers", "hidden_size", "num_attention_heads", "context_length")
    check_settings(
        asdict(config), positive=("max_steps", "batch_tokens", "eval_task_every", "rope_theta", *shape_fields)
    )
    if config.length_warmup_fraction and config.context_length % PIECES[0]:
        raise InputError(
            f"--length_warmup_fraction={config.length_warmup_fraction:g} cuts windows into {PIECES[0]}, and "
            f"--context_length={config.context_length} is no multiple of that; change one of the two"
        )
    if config.depth and config.init_from:
        raise InputError(
            f"--depth={config.depth} shapes a new model, but --init_from={config.init_from} has its shape; "
            f"use one of the two"
        )
    if config.depth and config.optimizer != "muon":
        raise InputError(
            f"--depth={config.depth} sets rates for Muon, not for --optimizer={config.optimizer}; use "
            f"--optimizer=muon, or set shape, steps, batch and rates yourself"
        )


def by_depth(depth: int, given: dict) -> dict:
    """Settings of a run by the number of its blocks: shape, steps, batch, rates and their schedule. What is
    `given` stays, and the others follow it.

    The best batch is a power of the run's tokens. The peak rates are the same for all depths. Another batch
    scales them by sqrt(batch / best batch). docs/measured.md tells at which sizes this was tried. Larger ones
    are extrapolated.
    """
    layers = max(1, given.get("num_hidden_layers", depth))
    width = max(1, given.get("hidden_size", HEAD_DIM * depth))
    tokens = TOKENS_PER_PARAMETER * 12 * layers * width**2  # of a block: attention 4 width², SwiGLU 8
    longer = math.log2(tokens) - math.log2(KNOWN_RUN)  # than the known run, as a power of two
    exponent = SHORTER_EXPONENT if longer < 0 else LONGER_EXPONENT
    best_batch = 2 ** round(math.log2(KNOWN_BATCH) + exponent * longer)
    batch = max(1, given.get("batch_tokens", best_batch))
    steps = given.get("max_steps", -(-tokens // batch))
    scale = 2 ** ((math.log2(batch) - math.log2(best_batch)) / 2)
    rates = {name: round(scale * rate, 5) for name, rate in PEAK_RATES.items()}
    if given.get("tie_word_embeddings"):  # it is the head too, and takes the head's lower rate
        rates["embedding_lr"] = rates["head_lr"]
    ruled = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": max(1, width // HEAD_DIM),
        "batch_tokens": batch,
        "max_steps": steps,
        "warmup_steps": max(10, steps // 40),
        "decay_fraction": 0.7,
        **rates,
        "beta1": 0.8,
        "beta2": 0.97,
    }
    return {name: given.get(name, value) for name, value in ruled.items()}


def model_config(config: Config, vocab_size: int) -> GPTConfig:
    return GPTConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        rope_theta=config.rope_theta,
        intermediate_size=config.intermediate_size or None,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads or None,
        max_position_embeddings=config.context_length,
        qk_norm=config.qk_norm,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def given_flags(config: Config, names: Sequence[str]) -> dict:
    """Those of some fields that somebody set, be it to their default. A number of 0 sets nothing."""
    asked = {name: value for name, value in config.given.items() if value or value is False}
    return {name: value for name, value in asked.items() if name in names}


def told_source(manifest: dict) -> str:
    """What a model was trained on, for somebody who finds its card."""
    source, settings = manifest.get("source"), manifest.get("settings", {})
    if source is None:
        return "token shards without a manifest"
    if source == "embedded":
        return "English summaries of Wikipedia, State of the Union addresses and the World Factbook"
    if settings.get("source_files"):
        return "text files: " + ", ".join(sorted(name for name, _ in settings["source_files"])[:20])
    config = f" ({settings['config']})" if settings.get("config") else ""
    return told_name(source, "https://huggingface.co/datasets/") + config


def told_origin(init_from: str, manifests: Sequence[dict], shares: Sequence[float]) -> str:
    """A model's origin, as a sentence for its card."""
    start = f" from {told_name(init_from)}" if init_from else ""
    told = [told_source(manifest) for manifest in manifests]
    if len(told) > 1:
        told = [f"{share:.2%} {source}" for share, source in zip(shares, told) if share]
    return f"Pretrained{start} on {'; '.join(told)}."


def sample_text(model: GPTModel, tokenizer, seed: int) -> list[str]:
    """A few lines of text that the model continues, one for each prompt."""
    prompts = [
        [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False).input_ids] for text in PROMPTS
    ]
    prompts = [prompt for prompt in prompts if len(prompt) < model.config.max_position_embeddings]
    if not prompts:
        return []
    steps = model.generate(
        prompts, max_new_tokens=32, temperature=0.8, top_k=50, seed=seed, stop_ids=[tokenizer.eos_token_id]
    )
    rows = [prompt[1:] + [i for i in row if i is not None] for prompt, row in zip(prompts, zip(*steps))]
    return [" ".join(tokenizer.decode(row, skip_special_tokens=True).split()) for row in rows]


def main(config: Config) -> None:
    check(config)
    sources, flags = parse_sources(config.data_dir), given_flags(config, SHAPE_FLAGS)
    ranks = join_ranks(config.device, config.out_dir, shard=config.shard, compile=config.compile)
    if config.depth:
        ruled = by_depth(config.depth, asdict(config))
        ranks.print(f"--depth={config.depth} gives", *(f"--{name}={value}" for name, value in ruled.items()))
    asked = ranks.from_main(lambda: read_questions(config.eval_tasks, config.eval_task_questions))

    # Data: the tokenizer, and the windows of a step and of a validation, by source.
    base, started_from = ranks.from_main(lambda: phase_start(config.out_dir, config.init_from, flags))
    manifests = ranks.from_main(lambda: verified_manifests(config.data_dir, config.tokenizer))
    tokenizer = load_tokenizer(config.tokenizer or Path(sources[0].path) / "tokenizer")
    vocab_size, T = padded(vocabulary_size(tokenizer)), config.context_length
    train, val = (TokenLoader(config.data_dir, split, T, vocab_size) for split in ("train", "val"))
    windows_per_step = step_size(config.batch_tokens, T, ranks.world, unit="windows", flag="context_length")
    val_windows = val.first_windows(config.eval_tokens and max(1, config.eval_tokens // T), train.shares)
    val_bytes = ranks.from_main(lambda: [val.text_bytes(windows, tokenizer) for windows in val_windows])

    # The newest checkpoint of this run, if it was interrupted. A new phase has its model's shape.
    shape = None if base else model_config(config, vocab_size)
    lock, state, identity = lock_and_resume(
        asdict(config),
        asdict(Config()),
        fixed={
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "optimizer": config.optimizer,
            **(asdict(shape) if shape else dict.fromkeys(field.name for field in fields(GPTConfig))),
        },
        content=train.content(manifests) | started_from,
        ranks=ranks,
    )

    # Model and optimizer: from this run's checkpoint, from another run, or new.
    torch.manual_seed(config.seed)
    learned = state  # what the optimizer goes on from
    if state:
        model = open_weights(state["path"], ranks)
    elif base:
        model, learned = new_phase(
            base,
            flags=flags,
            context_length=T,
            rope_theta=given_flags(config, ["rope_theta"]).get("rope_theta"),
            optimizer=config.optimizer,
            tokenizer=tokenizer,
            ranks=ranks,
        )
        identity["fixed"] |= asdict(model.config)
    else:
        model = shard_model(GPTModel(shape), ranks).to(ranks.device)
    model.checkpoint_activations = config.checkpoint_activations
    optimizer = make_optimizer(
        model,
        config.optimizer,
        ranks=ranks,
        lr=config.lr,
        matrix_lr=config.matrix_lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        embedding_lr=config.embedding_lr,
        head_lr=config.head_lr,
        state=learned,
    )
    module = wrap(model, ranks, config.compile)
    ranks.print(
        f"{model.num_parameters():,} parameters; {train.windows_trained_on:,} windows of {T} tokens; "
        f"{config.max_steps} steps of {windows_per_step * T:,} tokens, "
        f"{config.max_steps * windows_per_step / train.windows_trained_on:.2f} epochs; "
        f"{ranks.world} x {ranks.device}, {ranks.precision}"
    )
    for line in train.report(config.max_steps * windows_per_step):
        ranks.print(line)

    # What records the run, and what can stop it.
    start, stopped = state["step"] if state else 0, False
    decay_steps = round(config.decay_fraction * config.max_steps)
    short_steps = round(config.length_warmup_fraction * config.max_steps)
    history, metrics, checkpoints, signals, profiler = open_records(
        asdict(config),
        start=start,
        max_steps=config.max_steps,
        step_tokens=windows_per_step * T,
        tokenizer=tokenizer,
        identity=identity,
        origin=told_origin(config.init_from, manifests, train.shares),
        state=state,
        ranks=ranks,
        flops_per_token=flops_per_token(model.config, mean_length(T, config.length_warmup_fraction)),
    )
    ranks.watch(config.timeout_minutes)

    # A step's windows depend on the seed and the step only, so a resumed run reads none twice.
    def step_batches(step: int) -> tuple[int, int, list[dict]]:
        windows, tokens = train.step_windows(config.seed, step, windows_per_step), windows_per_step * T
        pieces = window_pieces(step, short_steps)
        return tokens, tokens, list(train.micro_batches(windows, config.micro_batch_size, ranks, pieces))

    upcoming = Prefetcher(step_batches, start, config.max_steps)

    for step in range(start, config.max_steps + 1):  # `step` counts completed optimizer steps
        done = step == config.max_steps

        # Obey a signal before a validation; obey one that comes during it right after.
        pause = done or step % config.eval_every == 0
        stopped = stopped or (pause and ranks.any(bool(signals.seen)))

        # Once in a while: the loss on held-out text, and what the model writes. A stopped run is in a hurry.
        if pause and not stopped and not metrics.has(step, "val_loss"):
            batches = (val.micro_batches(part, config.micro_batch_size, ranks) for part in val_windows)
            sums = [evaluate(module, part, ranks) for part in batches]
            metrics.log(step, **train.epochs(step * windows_per_step))
            counts = [len(part) for part in val_windows]
            numbers = validation_numbers(train.names, train.shares, counts, sums, text_bytes=val_bytes)
            metrics.validated(step, **numbers)
            if config.samples and (ranks.is_main or ranks.sharded):
                with ranks.autocast():
                    texts = sample_text(model, tokenizer, config.seed)
                metrics.samples(step, texts)

        # Once in a while: benchmarks.
        due = asked and (done or step % config.eval_task_every == 0) and not stopped
        if due and not metrics.has(step, *(f"acc/{name}" for name in asked)):
            size = config.micro_batch_size * T
            metrics.scored(step, score(model, tokenizer, asked, batch_tokens=size, ranks=ranks))

        stopped = stopped or (pause and not done and ranks.any(bool(signals.seen)))

        # Once in a while: a checkpoint, written beside the next steps. If that went wrong, the run ends here.
        checkpoints.raise_errors()
        if step > start and (done or stopped or step % config.save_every == 0):
            seconds = checkpoints.save(step, model, optimizer, history=history, metrics=metrics)
            metrics.saved(step, seconds)
        if done or stopped:
            break

        # This step's batches; those of the next are read meanwhile.
        ranks.at(f"step {step + 1}")
        if not history.unread:
            began = time.monotonic()  # validating and saving are not part of the steps' time
        ranks.own_work.begin()
        targets, tokens, batches = upcoming.batches(step)

        # Forward and backward over all micro-batches and ranks; the gradients are clipped.
        loss_sum, grad_norm = forward_backward(
            module, batches, targets=targets, max_grad_norm=config.max_grad_norm, ranks=ranks
        )

        # The update, at this step's learning rate. A bad step changes nothing: see StepHistory.
        lr_scale = schedule(step, config.max_steps, warmup_steps=config.warmup_steps, decay_steps=decay_steps)
        lr = set_learning_rate(optimizer, lr_scale)
        bad = history.record(
            step + 1,
            loss_sum=loss_sum,
            grad_norm=grad_norm,
            targets=targets,
            tokens=tokens,
            lr=lr,
            stop=bool(signals.seen),
        )
        optimizer.step(skip=bad)
        optimizer.zero_grad(set_to_none=True)

        # What came of it; a GPU's newest step is read after the next. Too many bad ones in a row: give up.
        for outcome in history.outcomes(step + 1):
            if outcome.bad_steps >= config.max_bad_steps:
                checkpoints.wait()
                raise too_many_bad_steps(config.out_dir, outcome.bad_steps, outcome.numbers["skipped"])
            metrics.step(outcome.step, outcome.numbers, seconds=time.monotonic() - began)
            began, stopped = time.monotonic(), stopped or outcome.stopped
        profiler.step()

    # The end: the last checkpoint is on the disk, all ranks leave together, the folder is free.
    for part in (upcoming, checkpoints, profiler, metrics):
        part.close()
    signals.close(stopped)
    del module  # before its process group, see leave
    ranks.leave()
    if lock:
        lock.close()
    if stopped:
        ranks.print(told_stop(config.out_dir))
        raise SystemExit(RESUMABLE)
    if ranks.is_main:
        report_end(config.out_dir)


if __name__ == "__main__":
    run_script(main, Config)
