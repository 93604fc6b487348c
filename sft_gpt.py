"""Fine-tune a model to chat, on conversations rendered as masked ChatML and packed into rows.

    python sft_gpt.py --model=out/base --data=embedded --out_dir=out/chat
    torchrun --standalone --nproc_per_node=8 sft_gpt.py --model=out/base --out_dir=out/chat

Every field of Config is a flag. The same command, started again, continues from the newest checkpoint.

B rows in a micro-batch, T tokens in a row.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import sft
import training
from data import column_of, source_rows, tokenizer_fingerprint
from gpt import InputError, has_varlen
from optim import load_state_by_name, make_optimizer, schedule


@dataclass
class Config:
    # Recipes of SmolLM2 (Allal et al. 2025), 2 epochs each:
    #     up to 360M parameters  --data=HuggingFaceTB/smol-smoltalk --lr=1e-3
    #     1.7B                   --data=HuggingFaceTB/smoltalk --data_config=all --lr=3e-4
    # With Muon, as the quick start does: --optimizer=muon --lr=3e-3 --matrix_lr=0.01
    # Their context is 8,192 tokens: lower --micro_batch_size and raise --batch_tokens, or cut: --max_length.

    # data
    model: str = "out/base"  # a run's folder (its newest checkpoint), a model directory, or a hub id
    data: str = "HuggingFaceTB/smol-smoltalk"  # embedded, a hub dataset's id, or files and folders: a,b
    data_config: str = ""  # the hub dataset's configuration; empty for its default
    data_split: str = "train"  # the hub dataset's split
    column: str = "messages"  # the column or JSON key with the list of messages
    val_fraction: float = 0.01  # share of the conversations held out, by a hash of their first question
    out_dir: str = "out/chat"  # folder for checkpoints, metrics.jsonl, loss.png and answers.jsonl
    # optimization
    max_length: int = 0  # tokens in a row; 0 for the model's context
    overlong: str = "truncate"  # what happens to longer conversations: truncate, split or drop
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
    spike_sigma: float = 6.0  # a loss or norm so many deviations above the last 128 is skipped; 0 for none
    max_bad_steps: int = 10  # steps skipped in a row that stop the run
    seed: int = 0  # of the data order
    # reporting
    log_every: int = 10  # steps between two lines
    eval_every: int = 250  # steps between two validations
    eval_tokens: int = 2_000_000  # tokens of the held-out rows that are read each time; 0 for all
    eval_questions: int = 100  # held-out questions that are answered each time; 0 for none
    max_new_tokens: int = 200  # of an answer in the evaluation; a longer one has not stopped
    save_every: int = 250  # steps between two checkpoints
    keep_last: int = 2  # checkpoints that are kept; 0 for all
    keep_every: int = 0  # steps between two that are kept for good; 0 for none
    wandb: str = "auto"  # auto (if a key is set up), online, offline or off
    # machine
    resume: str = "auto"  # auto (newest checkpoint in out_dir), none, or a checkpoint's path
    force: bool = False  # go on although settings that change the result are others than before
    timeout_minutes: float = 30.0  # a rank without progress for so long ends the run
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    compile: str = "auto"  # torch.compile: true, false, or auto for only on CUDA


def conversations(config: Config) -> Iterator[tuple[list[dict], str]]:
    """Messages of the source, each with the place it was found."""
    if config.data == "embedded":
        import embedded

        for number, row in enumerate(embedded.conversations(), 1):
            yield row["messages"], f"embedded conversation {number}"
        return
    for row, where in source_rows(config.data, config.data_config, config.data_split):
        yield column_of(row, config.column, object, where), where


def step_noise(config: Config, step: int, T: int, C: int) -> Callable | None:
    """What makes the noise on a row of a step's global batch; None if none is wanted."""
    if not config.neftune_alpha:
        return None
    seed = int(training.fingerprint([config.seed, step]), 16) % 2**40
    return lambda row, lengths: sft.neftune_noise(lengths, T, C, config.neftune_alpha, seed + row)


def main(config: Config) -> None:
    # Set-up: ranks, model or that of an interrupted run, data
    training.check_numbers(config, "epochs", "batch_tokens", "max_new_tokens")
    if config.overlong not in sft.OVERLONG:
        raise InputError(f"--overlong={config.overlong} is unknown; choose {', '.join(sft.OVERLONG)}")
    ranks = training.set_up(config.device)
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    identity = training.starting_point(config)
    state = training.resume(config, identity, ranks)
    model, tokenizer = training.open_model(state["path"] if state else config.model, ranks)
    T = training.row_length(config, model)
    batch = config.batch_tokens // T  # rows in a step
    if batch < ranks.world:
        raise InputError(
            f"batch_tokens {config.batch_tokens} are {batch} rows of {T}, fewer than the "
            f"{ranks.world} ranks; raise --batch_tokens or lower --max_length"
        )
    files = identity["content"]["data_files"]
    source = [config.data, config.data_config, config.data_split, config.column, files]
    settings = [config.val_fraction, T, config.overlong]
    key = training.fingerprint([source, settings, tokenizer_fingerprint(tokenizer)])
    folder = Path(config.out_dir) / f"data-{key}"
    with ranks.main_first():
        ranks.require_shared(folder / "report.json")
        found = sft.prepare_conversations(
            folder, conversations(config), tokenizer, T, config.val_fraction, config.overlong
        )
    varlen = has_varlen(ranks.device, model.config.head_dim)
    train = sft.PackedLoader(sft.SFTDataset(folder / "train"), T, batch, config.seed, varlen)
    val = sft.PackedLoader(sft.SFTDataset(folder / "val"), T, batch, 0, varlen)
    val_rows = val.rows[: max(1, config.eval_tokens // T) if config.eval_tokens else None]
    questions = found["questions"][: config.eval_questions]
    max_steps = config.max_steps or math.ceil(config.epochs * train.steps_per_epoch)

    # Optimizer
    optimizer = make_optimizer(model, config)
    if state:
        load_state_by_name(model, optimizer, state["optimizer"])
    module = training.wrap(model, ranks, config.compile)
    start = state["step"] if state else 0
    ranks.print(
        f"{model.num_parameters():,} parameters; {found['train']:,} conversations in {len(train.rows):,} "
        f"rows of {T} tokens, {100 * train.fill():.1f}% filled; {max_steps} steps of {batch * T:,} tokens, "
        f"{max_steps / train.steps_per_epoch:.2f} epochs; {ranks.world} x {ranks.device}"
    )
    for note in sft.preparation_notes(found, T):
        ranks.print(note)
    metrics = training.Metrics(config, start, max_steps, batch * T, ranks, state)
    origin = f"Fine-tuned from {config.model} on the conversations of {config.data}."
    warmup_steps = round(config.warmup_fraction * max_steps)
    history = training.StepHistory(config, state)
    saves = training.Checkpoints(
        config, model, tokenizer, optimizer, history, identity, origin, metrics, ranks
    )

    signals = training.StopSignals(ranks)
    ranks.watch(config.timeout_minutes)
    for step in range(start, max_steps + 1):  # so many optimizer steps are done
        last = step == max_steps
        if (step % config.eval_every == 0 or last) and not metrics.has(step, "val_loss"):
            batches = val.micro_batches(val_rows, config.micro_batch_size, ranks)
            nats, right, targets = training.evaluate(module, batches, ranks)
            numbers, samples = {"val_loss": nats / targets, "val_accuracy": right / targets}, []
            if questions and ranks.main:
                numbers["stopped"], samples = sft.ask(
                    config.out_dir, step, model, tokenizer, questions, config.max_new_tokens
                )
            metrics.validated(step, **numbers)
            for line in samples:
                metrics.say(line)
        if last:
            break
        ranks.at(f"step {step + 1}")
        began = time.monotonic()
        share = schedule(step, max_steps, warmup_steps, max_steps - warmup_steps)
        rows, noise = train.step_rows(step), step_noise(config, step, T, model.config.hidden_size)
        batches = list(train.micro_batches(rows, config.micro_batch_size, ranks, noise))
        result = training.train_step(module, optimizer, batches, share, config.max_grad_norm, history, ranks)
        step += 1
        metrics.step(step, result, time.monotonic() - began)
        saves.after(step, signals.on_any_rank())
    saves.wait()
    signals.close()
    metrics.close()
    if ranks.main and (Path(config.out_dir) / "answers.jsonl").exists():
        print(sft.side_by_side(config.out_dir))
    ranks.print(f"\nTalk to it: python chat.py --model={config.out_dir}")


if __name__ == "__main__":
    training.run_script(main, Config)
