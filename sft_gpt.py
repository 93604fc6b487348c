"""Fine-tune a model to chat, on conversations rendered as masked ChatML and packed into rows.

    python sft_gpt.py --model=out/base --data=embedded --out_dir=out/chat
    torchrun --standalone --nproc_per_node=8 sft_gpt.py --model=out/base --out_dir=out/chat

Every field of Config is a flag. The same command, started again, continues from the newest checkpoint.

B rows in a micro-batch, T tokens in a row.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from attention import has_varlen
from checkpoint import open_model, told_name, told_stop, too_many_bad_steps
from common import RESUMABLE, InputError, cache_folder, check_choice, file_sha256, fingerprint, run_script
from distributed import Ranks, join_ranks
from metrics import flops_per_token, mean_context
from optim import make_optimizer, schedule, set_learning_rate
from order import (
    CYCLE,
    Source,
    data_sources,
    epochs_read,
    for_each,
    mix_report,
    source_seeds,
    taken,
    validation_numbers,
)
from packing import MixedLoader, PackedLoader, row_length
from report import report_end
from resume import lock_and_resume, settle_commits, starting_point
from sft import OVERLONG, SPLIT_RENDERING, SFTDataset, cached_as, preparation_notes, prepare_conversations
from sharding import wrap
from sources import column_of, folder_notes, source_rows
from tasks import read_questions, score
from tokenization import REASONING, TRAIN_ON, chat_template
from training import (
    Prefetcher,
    check_settings,
    evaluate,
    forward_backward,
    open_records,
    record_answers,
    side_by_side,
    step_size,
)


@dataclass
class Config:
    # Recipes of SmolLM2 (Allal et al. 2025), 2 epochs each:
    #     up to 360M parameters  --data=HuggingFaceTB/smol-smoltalk --lr=1e-3
    #     1.7B                   --data=HuggingFaceTB/smoltalk --data_config=all --lr=3e-4
    # With Muon, as the quick start does: --optimizer=muon --lr=3e-3 --matrix_lr=0.01
    # Their context is 8,192 tokens: lower --micro_batch_size and raise --batch_tokens, or cut: --max_length.

    # data
    model: str = "out/base"  # a run's folder (its newest checkpoint), a model directory, or a hub id
    data: str = "HuggingFaceTB/smol-smoltalk"  # embedded, a hub id, files and folders a,b, or a mix a:3,b:1
    data_config: str = ""  # the hub dataset's configuration; empty: its default; in a mix one each: a,b
    data_split: str = "train"  # the hub dataset's split; of a mix one for all, or one for each: train,test
    column: str = "messages"  # the column or JSON key with the list of messages; of a mix as data_split
    max_bad_rows: float = 0.1  # share of the rows that may be unusable; they are skipped and counted
    val_fraction: float = 0.01  # share of the conversations held out, by a hash of their first question
    out_dir: str = "out/chat"  # folder for checkpoints, metrics.jsonl, loss.png and answers.jsonl
    # optimization
    max_length: int = 0  # tokens in a row; 0 for the model's context
    overlong: str = "truncate"  # what happens to longer conversations: truncate, split or drop
    train_on: str = "all"  # the answers of a conversation that are trained on: all or last
    reasoning: str = "keep"  # drop leaves <think>…</think> out of earlier answers; an example a question
    epochs: float = 2.0  # passes over the data
    max_steps: int = 0  # optimizer steps; 0 for as many as the epochs need
    batch_tokens: int = 65_536  # tokens in an optimizer step, over all ranks and micro-batches
    micro_batch_size: int = 8  # rows that go through the model at once, on each rank
    optimizer: str = "adamw"  # muon (for the blocks' matrices, AdamW for the rest) or adamw
    lr: float = 1e-3  # AdamW's peak learning rate
    matrix_lr: float = 0.005  # Muon's peak learning rate
    warmup_fraction: float = 0.1  # share of the steps in which the rate rises
    weight_decay: float = 0.0  # on matrices, per unit of learning rate
    beta1: float = 0.9  # AdamW's averaging of gradients
    beta2: float = 0.99  # AdamW's averaging of squared gradients
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0 for no limit
    neftune_alpha: float = 0.0  # noise on the embeddings in training, 5 in the paper; 0 for none
    spike_sigma: float = 6.0  # skip steps this many deviations above the mean of the last 128; 0: none
    max_bad_steps: int = 10  # steps skipped in a row that stop the run
    seed: int = 0  # of the data order
    # reporting
    log_every: int = 10  # steps between two lines
    eval_every: int = 250  # steps between two validations
    eval_tokens: int = 2_000_000  # tokens of the held-out rows that are read each time; 0 for all
    eval_questions: int = 100  # held-out questions answered each time; 0 skips the fixed ones, too
    max_new_tokens: int = 200  # of an answer in the evaluation; a longer one has not stopped
    eval_tasks: str = ""  # benchmarks that are scored on the way, as hellaswag,piqa; empty for none
    eval_task_every: int = 1000  # steps between two scorings
    eval_task_questions: int = 500  # of each benchmark, always the same ones; 0 for all
    save_every: int = 250  # steps between two checkpoints
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
    check_settings(asdict(config), positive=("epochs", "batch_tokens", "max_new_tokens", "eval_task_every"))
    for name, choices in (("overlong", OVERLONG), ("train_on", TRAIN_ON), ("reasoning", REASONING)):
        check_choice(name, getattr(config, name), choices)
    if config.val_fraction == 1:
        raise InputError("--val_fraction=1: all rows are held out; lower --val_fraction")


def conversations(config: Config, commit: str | None = None) -> Iterator[tuple[object, str]]:
    """Messages of the source, or why a row has none, each with the place it was found; a commit is one of a
    hub dataset's."""
    if config.data == "embedded":
        import embedded

        for number, row in enumerate(embedded.conversations(), 1):
            yield row["messages"], f"embedded conversation {number}"
        return
    for row, where in source_rows(config.data, config.data_config, config.data_split, commit=commit):
        try:
            yield column_of(row, config.column), where
        except ValueError as error:
            yield error, where


def neftune_noise(lengths: Sequence[int], T: int, C: int, *, alpha: float, seed: int) -> torch.Tensor:
    """Noise (T, C) for the embeddings of a row of conversations: uniform in ± alpha / sqrt(L C) for one of L
    tokens (Jain et al. 2023, https://arxiv.org/abs/2310.05914), the same wherever the row is trained."""
    noise = torch.rand(T, C, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    scale = torch.zeros(T, 1)
    scale[: sum(lengths), 0] = torch.tensor(
        [(length * C) ** -0.5 for length in lengths for _ in range(length)]
    )
    return noise * (alpha * scale)


def step_noise(config: Config, step: int, T: int, C: int) -> Callable | None:
    """What makes the noise on a row of a step's global batch; None if none is wanted."""
    if not config.neftune_alpha:
        return None
    seed = int(fingerprint([config.seed, step]), 16) % 2**40
    return lambda row, lengths: neftune_noise(lengths, T, C, alpha=config.neftune_alpha, seed=seed + row)


def told_data(data: str) -> str:
    """What a model was tuned on, for somebody who finds its card."""
    if data == "embedded":
        return "short conversations on facts of Wikipedia's summaries and the World Factbook, and small talk"
    return "the conversations of " + told_name(data, "https://huggingface.co/datasets/")


def told_sources(sources: Sequence[Source], shares: Sequence[float]) -> str:
    """The same for a mix."""
    if len(sources) == 1:
        return told_data(sources[0].path)
    told = ((share, told_data(source.path)) for source, share in zip(sources, shares) if share)
    return "; ".join(f"{share:.2%} {data}" for share, data in told)


def source_configs(config: Config, sources: Sequence[Source]) -> list[Config]:
    """The settings of each source of a mix. One of weight 0 is held out whole."""
    flags = ("data_config", "data_split", "column")
    values = [for_each(flag, getattr(config, flag), len(sources)) for flag in flags]
    own = [dict(zip(flags, some)) for some in zip(*values)]
    own = [some if source.share != 0 else some | {"val_fraction": 1.0} for source, some in zip(sources, own)]
    return [replace(config, data=source.path, **some) for source, some in zip(sources, own)]


def prepare(config: Config, tokenizer, *, T: int, files: str | list, ranks: Ranks) -> tuple[Path, dict]:
    """The folder of a source's rendered conversations and its report. `files` is what settle_commits knows it
    by. Rank 0 renders what is not in the cache."""
    if config.data == "embedded":  # what it says belongs to this project
        files = fingerprint(
            [file_sha256(Path(__file__).parent / f"embedded.{kind}") for kind in ("py", "yaml")]
        )
    source = [files, config.data_config, config.data_split, config.column]
    settings = [config.val_fraction, T, config.overlong, config.max_bad_rows]
    settings += [SPLIT_RENDERING] if config.overlong == "split" else []
    folder = cache_folder(config.cache_dir) / cached_as(source, settings, tokenizer)
    report = ranks.from_main(
        lambda: prepare_conversations(
            folder,
            conversations(config, files[1] if isinstance(files, list) else None),
            tokenizer,
            max_length=T,
            val_fraction=config.val_fraction,
            overlong=config.overlong,
            max_bad_rows=config.max_bad_rows,
        )
    )
    ranks.require_shared(folder / "report.json")
    return folder, report


def main(config: Config) -> None:
    check(config)
    sources = data_sources(config.data)
    parts, shares = (
        source_configs(config, sources),
        [CYCLE if source.share is None else source.share for source in sources],
    )
    ranks = join_ranks(config.device, config.out_dir, shard=config.shard, compile=config.compile)
    asked = ranks.from_main(lambda: read_questions(config.eval_tasks, config.eval_task_questions))

    # The newest checkpoint of this run, if it was interrupted; else the model to start from.
    base, content = ranks.from_main(
        lambda: starting_point(config.out_dir, config.model, *[part.data for part in parts])
    )
    content |= {"shares": shares} if len(parts) > 1 else {}
    content |= {"rendering": SPLIT_RENDERING} if config.overlong == "split" else {}
    lock, state, identity = lock_and_resume(
        asdict(config), asdict(Config()), fixed={"optimizer": config.optimizer}, content=content, ranks=ranks
    )
    model, tokenizer = open_model(state["path"] if state else base, ranks)
    tokenizer.chat_template = chat_template(config.train_on, config.reasoning)
    model.checkpoint_activations = config.checkpoint_activations
    T = row_length(config.max_length, model.config.max_position_embeddings)

    # Data: conversations packed into rows, so many a step and so many a validation.
    rows_per_step = step_size(config.batch_tokens, T, ranks.world, unit="rows", flag="max_length")
    files = settle_commits(
        identity["content"], [part.data for part in parts], cache_dir=config.cache_dir, ranks=ranks
    )
    folders, reports = zip(
        *(prepare(part, tokenizer, T=T, files=found, ranks=ranks) for part, found in zip(parts, files))
    )
    varlen = has_varlen(ranks.device, model.config.head_dim, ranks.dtype)

    def loader(number: int, split: str, seed: int) -> PackedLoader:
        data = SFTDataset(folders[number] / split)
        return PackedLoader(data, row_length=T, rows_per_step=rows_per_step, seed=seed, varlen=varlen)

    # A source of weight 0 is validated only. It changes nothing in training, and its questions are not asked.
    names, weights = [source.name for source in sources], [share / CYCLE for share in shares]
    trained = source_seeds(config.seed, shares)
    loaders = [loader(i, "train", seed) for i, seed in trained.items()]
    train = loaders[0]
    if len(trained) > 1:
        train = MixedLoader(loaders, [shares[i] for i in trained], rows_per_step)
    rows_read = dict(zip(trained, train.sizes))  # in an epoch, by source
    sizes = [rows_read.get(i, 0) for i in range(len(parts))]
    context = sum(weights[i] * mean_context(part.dataset.lengths()) for i, part in zip(trained, loaders))
    val = [loader(i, "val", 0) for i in range(len(parts))]
    most = config.eval_tokens and max(1, config.eval_tokens // T)
    val_counts = taken(weights, [len(part.rows) for part in val], most)
    held_out = [reports[i]["questions"] for i in trained]
    wanted = taken([weights[i] for i in trained], list(map(len, held_out)), config.eval_questions)
    questions = [question for some, n in zip(held_out, wanted) for question in some[:n]]
    questions = questions[: config.eval_questions]
    max_steps = config.max_steps or math.ceil(config.epochs * train.steps_per_epoch)
    step_tokens = round(train.rows_per_step * T * train.fill())  # on average

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
    module = wrap(model, ranks, config.compile)
    ranks.print(
        f"{model.num_parameters():,} parameters; {sum(reports[i]['train'] for i in trained):,} "
        f"examples, {sum(part.dataset.offsets[-1] for part in loaders):,} tokens in "
        f"{sum(train.sizes):,} rows of {T}; "
        f"{max_steps} steps of {step_tokens:,} tokens, "
        f"{max_steps / train.steps_per_epoch:.2f} epochs; {ranks.world} x {ranks.device}, {ranks.precision}"
    )
    for line in mix_report(names, weights, sizes, read=max_steps * train.rows_per_step, unit="rows"):
        ranks.print(line)
    on_files = ranks.from_main(lambda: [folder_notes(part.data) for part in parts])
    for name, report, notes in zip(names, reports, on_files):
        for note in (*notes, *preparation_notes(report, T)):
            ranks.print(f"{name}: {note}" if len(reports) > 1 else note)

    # What records the run, and what can stop it.
    start, stopped = state["step"] if state else 0, False
    warmup_steps = round(config.warmup_fraction * max_steps)
    history, metrics, checkpoints, signals, profiler = open_records(
        asdict(config),
        start=start,
        max_steps=max_steps,
        step_tokens=step_tokens,
        tokenizer=tokenizer,
        identity=identity,
        origin=f"Fine-tuned from {told_name(config.model)} on {told_sources(sources, weights)}.",
        state=state,
        ranks=ranks,
        flops_per_token=flops_per_token(model.config, context),
    )
    ranks.watch(config.timeout_minutes)

    # A step's rows, and the noise on them, depend on the seed and the step only.
    def step_batches(step: int) -> tuple[int, int, list[dict]]:
        rows, noise = train.step_rows(step), step_noise(config, step, T, model.config.hidden_size)
        batches = list(train.micro_batches(rows, config.micro_batch_size, ranks, noise))
        tokens, targets = train.count(rows)
        return targets, tokens, batches

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

        # Once in a while: the loss on held-out conversations, and the model's answers. A stopped run is in a
        # hurry.
        if pause and not stopped and not metrics.has(step, "val_loss"):
            batches = (
                part.micro_batches(part.rows[:count], config.micro_batch_size, ranks)
                for part, count in zip(val, val_counts)
            )
            sums = [evaluate(module, part, ranks) for part in batches]
            numbers, lines = validation_numbers(names, weights, val_counts, sums), []
            if config.eval_questions:
                answered, lines = record(step)
                numbers |= answered
            metrics.log(step, **epochs_read(names, weights, sizes, step * train.rows_per_step))
            metrics.validated(step, **numbers)
            metrics.print(lines)

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
