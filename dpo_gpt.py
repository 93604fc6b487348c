"""Tune a chat model on which of two answers is preferred: direct preference optimization.

    python dpo_gpt.py --model=out/chat --data=preferences.jsonl --out_dir=out/dpo
    torchrun --standalone --nproc_per_node=8 dpo_gpt.py --model=out/chat --out_dir=out/dpo

A row of the data has `chosen` and `rejected`, two lists of messages that differ in the last, the assistant's;
or only these two answers, as messages or as texts, and the messages before them, or a question, as `prompt`.
Every field of Config is a flag. The same command, started again, continues from the newest checkpoint.
"""

import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from checkpoint import find_model, open_model, told_name, told_stop, too_many_bad_steps
from common import RESUMABLE, InputError, cache_folder, fingerprint, run_script
from distributed import Ranks, join_ranks
from dpo import PreferenceModel, micro_batches, pairs_in, prepare_pairs, read_reference, reference_log_probs
from huggingface import model_directory
from metrics import flops_per_token, mean_context
from optim import make_optimizer, schedule, set_learning_rate
from order import batch_order
from packing import row_length
from report import report_end
from resume import lock_and_resume, settle_commits, start_with, starting_point
from sft import PAIR_RENDERING, SFTDataset, cached_as, preparation_notes
from sharding import wrap
from sources import folder_notes, source_rows
from training import (
    Prefetcher,
    check_settings,
    evaluate,
    forward_backward,
    open_records,
    record_answers,
    side_by_side,
)


@dataclass
class Config:
    # The recipe of SmolLM2-Instruct (Allal et al. 2025, and recipes/smollm2/dpo of the alignment-handbook):
    # ultrafeedback_binarized, beta 0.5, lr 1e-6, 128 pairs a step, max_length 1024, 2 epochs (1.7B: 3).

    # data
    model: str = "out/chat"  # a run's folder (its newest checkpoint), a model directory, or a hub id
    data: str = "HuggingFaceH4/ultrafeedback_binarized"  # a hub dataset's id, or files and folders: a,b
    data_config: str = ""  # the hub dataset's configuration; empty for its default
    data_split: str = "train_prefs"  # the hub dataset's split
    max_bad_rows: float = 0.1  # share of the rows that may be unusable; they are skipped and counted
    val_fraction: float = 0.01  # share of the pairs held out, by a hash of their first question
    out_dir: str = "out/dpo"  # folder for checkpoints, metrics.jsonl, loss.png and answers.jsonl
    # optimization
    beta: float = 0.5  # how strongly the loss keeps the model near the one it starts from
    max_length: int = 0  # tokens of a conversation, longer answers are cut; 0 for the model's context
    epochs: float = 2.0  # passes over the data
    max_steps: int = 0  # optimizer steps; 0 for as many as the epochs need
    batch_pairs: int = 128  # pairs in an optimizer step, over all ranks and micro-batches
    micro_batch_size: int = 2  # pairs that go through the model at once, on each rank
    optimizer: str = "adamw"  # muon (for the blocks' matrices, AdamW for the rest) or adamw
    lr: float = 1e-6  # AdamW's peak learning rate
    matrix_lr: float = 5e-6  # Muon's peak learning rate
    warmup_fraction: float = 0.1  # share of the steps in which the rate rises
    weight_decay: float = 0.0  # on matrices, per unit of learning rate
    beta1: float = 0.9  # AdamW's averaging of gradients
    beta2: float = 0.99  # AdamW's averaging of squared gradients
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0 for no limit
    spike_sigma: float = 6.0  # skip steps this many deviations above the mean of the last 128; 0: none
    max_bad_steps: int = 10  # steps skipped in a row that stop the run
    seed: int = 0  # of the data order
    # reporting
    log_every: int = 10  # steps between two lines
    eval_every: int = 100  # steps between two validations
    eval_questions: int = 100  # held-out questions answered each time; 0 skips the fixed ones, too
    max_new_tokens: int = 200  # of an answer in the evaluation; a longer one has not stopped
    save_every: int = 100  # steps between two checkpoints
    keep_last: int = 2  # checkpoints that are kept; 0 for all
    keep_every: int = 0  # steps between two checkpoints that are never deleted; 0 for none
    wandb: str = "auto"  # auto (if a key is set up), online, offline or off
    profile: int = 0  # steps that are traced into out_dir/profile, after five others; 0 for none
    # machine
    cache_dir: str = ""  # folder for rendered data, shared by runs and machines; empty: in the user's cache
    resume: str = "auto"  # auto (newest checkpoint in out_dir), none, or a checkpoint's path
    force: bool = False  # resume although settings that change the result differ
    timeout_minutes: float = 30.0  # a rank without progress for this long ends the run
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # of matrix products: float32, bfloat16, or auto for the faster one; a run keeps its
    compile: str = "auto"  # torch.compile: true, false, or auto for only on CUDA
    checkpoint_activations: bool = False  # keep each block's input only, compute the rest again: less memory
    shard: str = "none"  # split the model over the ranks: full, hybrid (within each machine) or none


def check(config: Config) -> None:
    """Raise InputError for invalid settings, before anything is read."""
    check_settings(asdict(config), positive=("beta", "epochs", "batch_pairs", "max_new_tokens"))
    if config.val_fraction == 1:
        raise InputError("--val_fraction=1: all rows are held out; lower --val_fraction")


def step_pairs(pairs: int, ranks: int) -> int:
    """The pairs of a step; InputError for fewer than ranks."""
    if pairs < ranks:
        raise InputError(
            f"a step of {pairs} pairs is too few for {ranks} ranks, as each needs one; raise --batch_pairs"
        )
    return pairs


def told_data(data: str) -> str:
    """What a model was tuned on, for somebody who finds its card."""
    return "the preferences of " + told_name(data, "https://huggingface.co/datasets/")


def prepare(config: Config, tokenizer, *, T: int, content: dict, ranks: Ranks) -> tuple[Path, dict]:
    """The folder of rendered pairs and its report. Rank 0 renders what is not in the cache."""
    files = settle_commits(content, [config.data], cache_dir=config.cache_dir, ranks=ranks)[0]
    source = [files, config.data_config, config.data_split]
    settings = ["pairs", PAIR_RENDERING, config.val_fraction, T, config.max_bad_rows]
    folder = cache_folder(config.cache_dir) / cached_as(source, settings, tokenizer)
    commit = content["commits"].get(config.data)
    rows = source_rows(config.data, config.data_config, config.data_split, commit=commit)
    report = ranks.from_main(
        lambda: prepare_pairs(
            folder,
            rows,
            tokenizer,
            max_length=T,
            val_fraction=config.val_fraction,
            max_bad_rows=config.max_bad_rows,
        )
    )
    ranks.require_shared(folder / "report.json")
    return folder, report


def main(config: Config) -> None:
    check(config)
    ranks = join_ranks(config.device, config.out_dir, shard=config.shard, compile=config.compile)

    # The newest checkpoint of this run, if it was interrupted; else the model to start from.
    base, content = ranks.from_main(lambda: starting_point(config.out_dir, config.model, config.data))
    content["rendering"] = PAIR_RENDERING
    lock, state, identity = lock_and_resume(
        asdict(config), asdict(Config()), fixed={"optimizer": config.optimizer}, content=content, ranks=ranks
    )
    model, tokenizer = open_model(state["path"] if state else base, ranks)
    if not state and identity["content"]["weights"] is None:  # a model of the hub, known by its commit
        identity["content"]["weights"] = model_directory(base).name
    model.checkpoint_activations = config.checkpoint_activations
    T = row_length(config.max_length, model.config.max_position_embeddings)

    # Data: pairs of answers, so many a step.
    folder, report = prepare(config, tokenizer, T=T, content=identity["content"], ranks=ranks)
    train, val = SFTDataset(folder / "train"), SFTDataset(folder / "val")
    pairs = len(train) // 2
    pairs_per_step = step_pairs(min(config.batch_pairs, pairs), ranks.world)
    questions = report["questions"][: config.eval_questions]
    max_steps = config.max_steps or math.ceil(config.epochs * pairs / pairs_per_step)

    # Optimizer, new or from the checkpoint.
    optimizer = make_optimizer(
        model,
        config.optimizer,
        ranks=ranks,
        lr=config.lr,
        matrix_lr=config.matrix_lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        state=state,
    )
    module = wrap(PreferenceModel(model, config.beta), ranks, config.compile)
    tokens = round(pairs_per_step * train.lengths().sum() / pairs)  # of a step, on average
    ranks.print(
        f"{model.num_parameters():,} parameters; {pairs:,} pairs and {len(val) // 2:,} held out; "
        f"{max_steps} steps of {pairs_per_step} pairs, {max_steps * pairs_per_step / pairs:.2f} epochs; "
        f"{ranks.world} x {ranks.device}, {ranks.precision}"
    )
    on_files = ranks.from_main(lambda: folder_notes(config.data))
    for note in (*on_files, *preparation_notes(report, T)):
        ranks.print(note)

    # What the starting model makes of the answers; a resumed run has to open it again if this is lost.
    ranks.watch(config.timeout_minutes)
    weights = identity["content"]["weights"]  # of a model of the hub their commit
    made_by = fingerprint([weights or config.model, asdict(model.config), ranks.precision])
    paths = {split: folder / f"reference-{split}-{made_by}.npy" for split in ("train", "val")}
    starting_model = module
    if state and ranks.any(
        read_reference(paths["train"], train) is None or read_reference(paths["val"], val) is None
    ):
        base = ranks.from_main(lambda: start_with(config.model, weights) if weights else base)
        ranks.from_main(lambda: str(model_directory(find_model(base), commit=weights)))  # rank 0 downloads
        starting_model = PreferenceModel(
            open_model(model_directory(base, commit=weights), ranks)[0], config.beta
        )
    train_reference, val_reference = (
        reference_log_probs(
            paths[split], starting_model, dataset, T=T, size=config.micro_batch_size, ranks=ranks
        )
        for split, dataset in (("train", train), ("val", val))
    )
    del starting_model

    # What records the run, and what can stop it.
    start, stopped = state["step"] if state else 0, False
    warmup_steps = round(config.warmup_fraction * max_steps)
    history, metrics, checkpoints, signals, profiler = open_records(
        asdict(config),
        start=start,
        max_steps=max_steps,
        step_tokens=tokens,
        tokenizer=tokenizer,
        identity=identity,
        origin=f"Tuned from {told_name(config.model)} on {told_data(config.data)}.",
        state=state,
        ranks=ranks,
        flops_per_token=flops_per_token(model.config, mean_context(train.lengths())),
        unit="nats/pair",
    )

    # A step's pairs depend on the seed and the step only.
    def step_batches(step: int) -> tuple[int, int, list[dict]]:
        chosen, size = batch_order(config.seed, step, pairs_per_step, pairs), config.micro_batch_size
        tokens = int(train.lengths().reshape(-1, 2)[chosen].sum())
        batches = micro_batches(train, train_reference, chosen.tolist(), T=T, size=size, ranks=ranks)
        return len(chosen), tokens, list(batches)

    record = partial(
        record_answers,
        config.out_dir,
        model=model,
        tokenizer=tokenizer,
        questions=questions,
        max_new_tokens=config.max_new_tokens,
        ranks=ranks,
    )
    upcoming = Prefetcher(step_batches, start, max_steps)

    for step in range(start, max_steps + 1):  # `step` counts completed optimizer steps
        done = step == max_steps

        # Obey a signal before a validation; obey one that comes during it right after.
        pause = done or step % config.eval_every == 0
        stopped = stopped or (pause and ranks.any(bool(signals.seen)))

        # Once in a while: the loss on held-out pairs, and the model's answers. A stopped run is in a hurry.
        if pause and not stopped and not metrics.has(step, "val_loss"):
            batches = micro_batches(
                val, val_reference, range(len(val) // 2), T=T, size=config.micro_batch_size, ranks=ranks
            )
            nats, correct, count = evaluate(module, batches, ranks, pairs_in)
            numbers, lines = {"val_loss": nats / count, "val_accuracy": correct / count}, []
            if config.eval_questions:
                answered, lines = record(step)
                numbers |= answered
            metrics.validated(step, **numbers)
            metrics.print(lines)

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
        lr_scale = schedule(step, max_steps, warmup_steps=warmup_steps, decay_steps=max_steps - warmup_steps)
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
    if ranks.is_main and (Path(config.out_dir) / "answers.jsonl").exists():
        print(side_by_side(config.out_dir))
    if ranks.is_main:
        report_end(config.out_dir)
    ranks.print(f"\nTalk to it: python chat.py --model={config.out_dir}")


if __name__ == "__main__":
    run_script(main, Config)
