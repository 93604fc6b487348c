"""Tune a chat model on which of two answers is preferred: direct preference optimization.

    python dpo_gpt.py --model=out/chat --data=preferences.jsonl --out_dir=out/dpo
    torchrun --standalone --nproc_per_node=8 dpo_gpt.py --model=out/chat --out_dir=out/dpo

A row of the data has `chosen` and `rejected`, two lists of messages that differ in the last, the assistant's;
or only these two answers, as messages or as texts, and the messages before them, or a question, as `prompt`.
Every field of Config is a flag. The same command, started again, continues from the newest checkpoint.

P pairs in a micro-batch, T tokens.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import sft
import training
from data import TURN_END, TURN_START, batch_order, source_rows, tokenizer_fingerprint
from gpt import IGNORE, GPTModel, InputError
from optim import load_state_by_name, make_optimizer, schedule


@dataclass
class Config:
    # The recipe of SmolLM2-Instruct (Allal et al. 2025, and recipes/smollm2/dpo of the alignment-handbook):
    # ultrafeedback_binarized, beta 0.5, lr 1e-6, 128 pairs a step, max_length 1024, 2 epochs (1.7B: 3).

    # data
    model: str = "out/chat"  # a run's folder (its newest checkpoint), a model directory, or a hub id
    data: str = "HuggingFaceH4/ultrafeedback_binarized"  # a hub dataset's id, or files and folders: a,b
    data_config: str = ""  # the hub dataset's configuration; empty for its default
    data_split: str = "train_prefs"  # the hub dataset's split
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
    spike_sigma: float = 6.0  # a loss or norm so many deviations above the last 128 is skipped; 0 for none
    max_bad_steps: int = 10  # steps skipped in a row that stop the run
    seed: int = 0  # of the data order
    # reporting
    log_every: int = 10  # steps between two lines
    eval_every: int = 100  # steps between two validations
    eval_questions: int = 100  # held-out questions that are answered each time; 0 for none
    max_new_tokens: int = 200  # of an answer in the evaluation; a longer one has not stopped
    save_every: int = 100  # steps between two checkpoints
    keep_last: int = 2  # checkpoints that are kept; 0 for all
    keep_every: int = 0  # steps between two that are kept for good; 0 for none
    wandb: str = "auto"  # auto (if a key is set up), online, offline or off
    # machine
    resume: str = "auto"  # auto (newest checkpoint in out_dir), none, or a checkpoint's path
    force: bool = False  # go on although settings that change the result are others than before
    timeout_minutes: float = 30.0  # a rank without progress for so long ends the run
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    compile: str = "auto"  # torch.compile: true, false, or auto for only on CUDA


# -- pairs ---------------------------------------------------------------------------------------------------


def conversations(row: dict) -> list:
    """The chosen and the rejected conversation of a row, each from its first message to the answer."""
    prompt, sides = row.get("prompt") or [], []
    prompt = sft.user_turn(prompt) if isinstance(prompt, str) else prompt
    for name in ("chosen", "rejected"):
        side = row.get(name)
        side = [{"role": "assistant", "content": side}] if isinstance(side, str) else side
        alone = isinstance(side, list) and len(side) == 1 and isinstance(prompt, list)
        sides.append([*prompt, *side] if alone else side)
    return sides


def problem(chosen, rejected) -> str | None:
    """What keeps two conversations from being compared, or None."""
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if reason := sft.problem(messages):
            return f"in {name}, {reason}"
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            return f"{name} is not a question and an assistant's answer to it"
    if chosen[:-1] != rejected[:-1]:
        return "chosen and rejected differ before the answer"
    return "chosen and rejected are the same" if chosen == rejected else None


def prepare_pairs(folder: Path, config: Config, tokenizer, max_length: int) -> dict:
    """Render the source into the datasets of sft.write_examples, each pair as two conversations, the chosen
    first; of both only the last answer counts, cut at max_length."""
    turns = tokenizer.convert_tokens_to_ids([TURN_START, TURN_END])

    def examples() -> Iterator[sft.Example]:
        for rows in sft.batched(source_rows(config.data, config.data_config, config.data_split)):
            pairs = [conversations(row) for row, _ in rows]
            reasons = [problem(*pair) for pair in pairs]
            usable = [side for pair, reason in zip(pairs, reasons) if reason is None for side in pair]
            rendered = iter(sft.render_batch(usable, tokenizer))
            for (chosen, _), (_, where), reason in zip(pairs, rows, reasons):
                if reason:
                    yield sft.Example(where, reason)
                    continue
                pieces, answer_tokens = [], 0
                for ids, labels in (next(rendered), next(rendered)):
                    header = len(ids) - 1 - ids[::-1].index(turns[0])  # of the last message
                    labels = [IGNORE] * header + labels[header:]
                    answer_tokens += sft.trained_tokens(labels)
                    pieces += sft.fit(ids, labels, max_length, "truncate", 0, turns)
                if len(pieces) < 2:
                    reason = f"no answer begins within {max_length} tokens"
                elif pieces[0] == pieces[1]:
                    reason = f"chosen and rejected are the same within {max_length} tokens"
                question = sft.first_question(chosen)
                yield sft.Example(where, reason, question, [] if reason else pieces, answer_tokens)

    return sft.write_examples(folder, examples(), config.val_fraction)


def deal(dataset: sft.SFTDataset, pairs: Sequence[int], size: int, ranks) -> Iterator[list[int]]:
    """A rank's share of some pairs, `size` at a time, each as its two answers' places in the dataset. The
    longest come first, so that those of like length meet."""
    lengths = dataset.lengths().reshape(-1, 2).max(1)
    own = sorted(pairs, key=lambda pair: -lengths[pair])[ranks.rank :: ranks.world]
    for i in range(0, len(own), size):
        yield [answer for pair in own[i : i + size] for answer in (2 * pair, 2 * pair + 1)]


def collate(dataset: sft.SFTDataset, answers: Sequence[int], T: int, device: torch.device) -> dict:
    """Conversations as input_ids and targets, padded to one of four lengths up to T; each length is compiled
    anew. Padding is on the right, where causality hides it."""
    rows = [dataset[answer] for answer in answers]
    quarter, longest = -(-T // 4), max(len(ids) for ids, _ in rows)
    width = min(T, -(-longest // quarter) * quarter)
    input_ids = np.zeros((len(rows), width), np.int64)
    targets = np.full((len(rows), width), IGNORE, np.int64)
    for b, (ids, labels) in enumerate(rows):
        input_ids[b, : len(ids)], targets[b, : len(ids) - 1] = ids, labels[1:]
    batch = {"input_ids": input_ids, "targets": targets}
    return {name: torch.from_numpy(array).to(device) for name, array in batch.items()}


def micro_batches(
    dataset: sft.SFTDataset, reference: np.ndarray, pairs: Sequence[int], T: int, size: int, ranks
) -> Iterator[dict]:
    """A rank's share of some pairs, as the keyword arguments of PreferenceModel's forward."""
    for answers in deal(dataset, pairs, size, ranks):
        known = torch.from_numpy(reference[answers]).to(ranks.device)
        yield collate(dataset, answers, T, ranks.device) | {"reference": known}


def pairs_in(batch: dict) -> int:
    return len(batch["targets"]) // 2


# -- the loss ------------------------------------------------------------------------------------------------


class PreferenceModel(nn.Module):
    """A language model as direct preference optimization trains it (Rafailov et al. 2023, equation 7,
    https://arxiv.org/abs/2305.18290).

    With the answers y to a question x, w the preferred and l the other, the loss of a pair is

        -log σ(beta (log π(w|x) - log ref(w|x) - log π(l|x) + log ref(l|x)))
    """

    def __init__(self, policy: GPTModel, beta: float):
        super().__init__()
        self.policy, self.beta = policy, beta

    def forward(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor,
        reference: torch.Tensor | None = None,
        per_token: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (2P,) of the answers in rows (2P, T), chosen and rejected in turn; or, with those
        of the reference (2P,), the pairs' summed loss in nats; with per_token, named as in GPTModel, each
        pair's loss (P,) and whether the chosen answer gained more on the reference than the other (P,)."""
        log_probs = -self.policy(input_ids, targets, per_token=True)[0].sum(1)
        if reference is None:
            return log_probs
        gains = log_probs - reference
        margins = self.beta * (gains[0::2] - gains[1::2])
        losses = -F.logsigmoid(margins)
        return (losses, margins > 0) if per_token else losses.sum()


def read_reference(path: Path, dataset: sft.SFTDataset) -> np.ndarray | None:
    """What reference_log_probs has kept, or None if there is nothing whole."""
    try:
        found = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == (len(dataset),) else None


@torch.no_grad()
def reference_log_probs(
    path: Path, module: nn.Module, dataset: sft.SFTDataset, T: int, size: int, ranks
) -> np.ndarray:
    """Log-probabilities (answers,) by the model that training starts from, fp32: computed once, on all ranks,
    and kept in a file."""
    if not ranks.sum(ranks.main and read_reference(path, dataset) is not None)[0]:
        ranks.print(f"computing the reference log-probabilities of {len(dataset):,} answers")
        found = torch.zeros(len(dataset), device=ranks.device)
        for answers in deal(dataset, range(len(dataset) // 2), size, ranks):
            ranks.at("the reference log-probabilities")
            with ranks.autocast():
                found[answers] = module(**collate(dataset, answers, T, ranks.device))
        (found,) = ranks.sum(found)
        if ranks.main:
            partial = path.with_suffix(".partial")
            with open(partial, "wb") as file:
                np.save(file, np.array(found, np.float32))
            training.sync_to_disk(partial)
            partial.replace(path)
        ranks.barrier()
    return read_reference(path, dataset)


def main(config: Config) -> None:
    # Set-up: ranks, model or that of an interrupted run, data
    training.check_numbers(config, "beta", "epochs", "batch_pairs", "max_new_tokens")
    ranks = training.set_up(config.device)
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    identity = training.starting_point(config)
    state = training.resume(config, identity, ranks)
    model, tokenizer = training.open_model(state["path"] if state else config.model, ranks)
    T = training.row_length(config, model)
    files = identity["content"]["data_files"]
    source = [config.data, config.data_config, config.data_split, files]
    key = training.fingerprint([source, config.val_fraction, T, tokenizer_fingerprint(tokenizer)])
    folder = Path(config.out_dir) / f"data-{key}"
    with ranks.main_first():
        ranks.require_shared(folder / "report.json")
        found = prepare_pairs(folder, config, tokenizer, T)
    train, val = sft.SFTDataset(folder / "train"), sft.SFTDataset(folder / "val")
    pairs = len(train) // 2
    batch = min(config.batch_pairs, pairs)
    if batch < ranks.world:
        raise InputError(f"a step of {batch} pairs is too few for {ranks.world} ranks; each needs a pair")
    questions = found["questions"][: config.eval_questions]
    max_steps = config.max_steps or math.ceil(config.epochs * pairs / batch)

    # Optimizer, and what the starting model makes of the data
    optimizer = make_optimizer(model, config)
    if state:
        load_state_by_name(model, optimizer, state["optimizer"])
    module = training.wrap(PreferenceModel(model, config.beta), ranks, config.compile)
    start = state["step"] if state else 0
    tokens = round(batch * train.lengths().sum() / pairs)  # of a step, on average
    ranks.print(
        f"{model.num_parameters():,} parameters; {pairs:,} pairs and {len(val) // 2:,} held out; "
        f"{max_steps} steps of {batch} pairs, {max_steps * batch / pairs:.2f} epochs; "
        f"{ranks.world} x {ranks.device}"
    )
    for note in sft.preparation_notes(found, T):
        ranks.print(note)
    weights = identity["content"]["weights"] or training.fingerprint(config.model)
    paths = [folder / f"reference-{split}-{weights}.npy" for split in ("train", "val")]
    splits = list(zip(paths, (train, val)))
    lacking = any(read_reference(*split) is None for split in splits)
    judge = module
    if state and ranks.sum(lacking)[0]:
        judge = PreferenceModel(training.open_model(config.model, ranks)[0], config.beta)
    ranks.watch(config.timeout_minutes)
    references = [
        reference_log_probs(path, judge, dataset, T, config.micro_batch_size, ranks)
        for path, dataset in splits
    ]
    del judge
    metrics = training.Metrics(config, start, max_steps, tokens, ranks, state, unit="nats/pair")
    origin = f"Tuned from {config.model} on the preferences of {config.data}."
    warmup_steps = round(config.warmup_fraction * max_steps)
    history = training.StepHistory(config, state)
    saves = training.Checkpoints(
        config, model, tokenizer, optimizer, history, identity, origin, metrics, ranks
    )

    signals = training.StopSignals(ranks)
    for step in range(start, max_steps + 1):  # so many optimizer steps are done
        last = step == max_steps
        if (step % config.eval_every == 0 or last) and not metrics.has(step, "val_loss"):
            held_out = range(len(val) // 2)
            batches = micro_batches(val, references[1], held_out, T, config.micro_batch_size, ranks)
            nats, right, count = training.evaluate(module, batches, ranks, pairs_in)
            numbers, samples = {"val_loss": nats / count, "val_accuracy": right / count}, []
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
        chosen = batch_order(config.seed, step, batch, pairs).tolist()
        batches = list(micro_batches(train, references[0], chosen, T, config.micro_batch_size, ranks))
        result = training.train_step(
            module, optimizer, batches, share, config.max_grad_norm, history, ranks, pairs_in
        )
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
