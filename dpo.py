"""Direct preference optimization: pairs of answers, the loss, and the reference's log-probabilities.

P pairs in a micro-batch, T tokens.
"""

import itertools
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import IGNORE, replace_file
from distributed import Ranks
from gpt import GPTModel
from sft import (
    HEAD,
    Example,
    SFTDataset,
    batched,
    cut_to_length,
    first_question,
    render_batch,
    trained_tokens,
    user_turn,
    why_unusable,
    write_examples,
)
from tokenization import TURN_END, TURN_START


def said(turns: Sequence) -> list[tuple]:
    """Who says what in each turn, whatever else is noted of it."""
    turns = [turn if isinstance(turn, dict) else {} for turn in turns]
    return [(turn.get("role"), str(turn.get("content")).strip()) for turn in turns]


def after_prompt(prompt: list, side: list, *, text: bool) -> list:
    """A side as a conversation: behind its prompt, unless it begins with the prompt's turns. A system or
    developer message that only one of them has is kept. Of a prompt that is a text it is enough that the side
    begins with a user's turn."""
    heads = [
        next((i for i, (role, _) in enumerate(turns) if role not in HEAD), len(turns))
        for turns in (said(prompt), said(side))
    ]
    asked, begins = said(prompt[heads[0] :]), said(side[heads[1] :])
    if asked and (begins[: len(asked)] == asked or (text and begins and begins[0][0] == "user")):
        return (side[: heads[1]] or prompt[: heads[0]]) + side[heads[1] :]
    return side if not asked and said(side[: len(prompt)]) == said(prompt) else prompt + side


def conversations(row) -> list:
    """The chosen and the rejected conversation of a row, each from its first message to the answer."""
    if not isinstance(row, dict):
        return [row, row]
    prompt, sides = row.get("prompt") or [], []
    text = isinstance(prompt, str)
    prompt = user_turn(prompt) if text else prompt
    if not isinstance(prompt, list):
        return [prompt, prompt]
    for name in ("chosen", "rejected"):
        side = row.get(name, ValueError(f"there is no such column, only {', '.join(map(str, row))}"))
        side = [{"role": "assistant", "content": side}] if isinstance(side, str) else side
        sides.append(after_prompt(prompt, side, text=text) if isinstance(side, list) else side)
    return sides


def why_incomparable(chosen, rejected) -> str | None:
    """What keeps two conversations from being compared, or None."""
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if reason := why_unusable(messages):
            return f"in {name}, {reason}"
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            return f"{name} is not a question and an assistant's answer to it"
    if said(chosen[:-1]) != said(rejected[:-1]):
        return "chosen and rejected differ before the answer"
    same = chosen[-1]["content"] == rejected[-1]["content"]
    return "chosen and rejected are the same" if same else None


def prepare_pairs(
    folder: Path,
    rows: Iterator,
    tokenizer,
    *,
    max_length: int,
    val_fraction: float,
    max_bad_rows: float = 1.0,
) -> dict:
    """Render (row, where it was found) into the datasets of sft.write_examples, each pair as two
    conversations, the chosen first; of both only the last answer counts, cut at max_length."""
    turns = tokenizer.convert_tokens_to_ids([TURN_START, TURN_END])

    def last_answer(ids: list[int], labels: list[int]) -> list[int]:
        header = len(ids) - 1 - ids[::-1].index(turns[0])  # of the last message
        return [IGNORE] * header + labels[header:]

    def examples(start: int) -> Iterator[Example]:
        for batch in batched(itertools.islice(rows, start, None)):
            pairs = [conversations(row) for row, _ in batch]
            reasons = [why_incomparable(*pair) for pair in pairs]
            usable = [pair for pair, reason in zip(pairs, reasons) if reason is None]
            sides = [side for a, b in usable for side in (a, a[:-1] + b[-1:])]  # behind one prompt
            rendered = iter(render_batch(sides, tokenizer))
            for (chosen, _), (_, where), reason in zip(pairs, batch, reasons):
                if reason:
                    yield Example(where, reason, unusable=True)
                    continue
                sides = [(ids, last_answer(ids, labels)) for ids, labels in (next(rendered), next(rendered))]
                pieces = [
                    piece
                    for ids, labels in sides
                    for piece in cut_to_length(
                        ids, labels, max_length, overlong="truncate", prefix=0, turns=turns
                    )
                ]
                if len(pieces) < 2:
                    reason = f"no answer begins within {max_length} tokens"
                elif pieces[0] == pieces[1]:
                    reason = f"chosen and rejected are the same within {max_length} tokens"
                answer_tokens = sum(trained_tokens(labels) for _, labels in sides)
                yield Example(
                    where,
                    reason,
                    question=first_question(chosen),
                    pieces=[] if reason else pieces,
                    answer_tokens=answer_tokens,
                )

    return write_examples(folder, examples, val_fraction, max_bad_rows)


def pair_batches(
    dataset: SFTDataset, pairs: Sequence[int], micro_batch_size: int, ranks: Ranks
) -> Iterator[list[int | None]]:
    """A rank's share of some pairs, micro_batch_size at a time, each pair as its two answers' places in the
    dataset, None for padding. Longest first, so similar lengths share a batch."""
    lengths = dataset.lengths().reshape(-1, 2).max(1)
    for some in ranks.share(sorted(pairs, key=lambda pair: -lengths[pair]), micro_batch_size):
        yield [None if pair is None else 2 * pair + side for pair in some for side in (0, 1)]


def collate(dataset: SFTDataset | Sequence, answers: Sequence[int | None], T: int) -> dict:
    """Conversations as input_ids and targets, padded to one of four lengths up to T, as each length is
    compiled anew. Padding is on the right, where causality hides it; None is a row of it."""
    rows = [([], []) if answer is None else dataset[answer] for answer in answers]
    quarter, longest = -(-T // 4), max(len(ids) for ids, _ in rows)
    width = min(T, max(1, -(-longest // quarter)) * quarter)
    input_ids = np.zeros((len(rows), width), np.int64)
    targets = np.full((len(rows), width), IGNORE, np.int64)
    for b, (ids, labels) in enumerate(rows):
        input_ids[b, : len(ids)], targets[b, : max(0, len(ids) - 1)] = ids, labels[1:]
    batch = {"input_ids": input_ids, "targets": targets}
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def micro_batches(
    dataset: SFTDataset, reference: np.ndarray, pairs: Sequence[int], *, T: int, size: int, ranks: Ranks
) -> Iterator[dict]:
    """A rank's share of some pairs, `size` at a time, as the keyword arguments of PreferenceModel's
    forward."""
    for answers in pair_batches(dataset, pairs, size, ranks):
        known = torch.tensor([0.0 if answer is None else reference[answer] for answer in answers])
        yield ranks.pin(collate(dataset, answers, T) | {"reference": known})


def is_pair(targets: torch.Tensor) -> torch.Tensor:
    """Which of the pairs in targets (2P, T) are no padding, (P,)."""
    return (targets != IGNORE).any(1)[0::2]


def pairs_in(batch: dict) -> torch.Tensor:
    return is_pair(batch["targets"]).sum()


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

    def compile_blocks(self) -> None:
        self.policy.compile_blocks()

    def forward(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor,
        *,
        reference: torch.Tensor | None = None,
        per_token: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (2P,) of the answers in rows (2P, T), chosen and rejected in turn.

        With the reference's (2P,): the pairs' summed loss in nats. With per_token, named as in GPTModel, too:
        each pair's loss (P,), and whether the chosen answer gained more on the reference than the rejected
        one (P,): 1, 0, or ½ for a tie.
        """
        log_probs = -self.policy(input_ids, targets, per_token=True)[0].sum(1)
        if reference is None:
            return log_probs
        gains = log_probs - reference
        margins, kept = self.beta * (gains[0::2] - gains[1::2]), is_pair(targets)
        losses = -F.logsigmoid(margins) * kept
        preferred = 0.5 * (margins.sign() + 1) * kept  # a tie counts half
        return (losses, preferred) if per_token else losses.sum()


def read_reference(path: Path, dataset: SFTDataset) -> np.ndarray | None:
    """What reference_log_probs has kept, or None if there is nothing whole."""
    try:
        log_probs = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    return log_probs if log_probs.shape == (len(dataset),) else None


@torch.no_grad()
def reference_log_probs(
    path: Path, module: nn.Module, dataset: SFTDataset, *, T: int, size: int, ranks: Ranks
) -> np.ndarray:
    """Log-probabilities (answers,) by the model that training starts from, fp32: computed once, on all ranks,
    and kept in a file."""
    if not ranks.any(ranks.is_main and read_reference(path, dataset) is not None):
        ranks.print(f"computing the reference log-probabilities of {len(dataset):,} answers")
        own = torch.zeros(len(dataset), device=ranks.device)  # zero for the answers of other ranks
        for answers in pair_batches(dataset, range(len(dataset) // 2), size, ranks):
            ranks.at("the reference log-probabilities")
            batch = collate(dataset, answers, T)
            real = [answer for answer in answers if answer is not None]
            with ranks.autocast():
                found = module(**ranks.to_device(batch))
            own[real] = found[: len(real)]  # padding comes last
        log_probs = np.array(ranks.sum(own)[0], np.float32)
        if ranks.is_main:
            content = BytesIO()
            np.save(content, log_probs)
            replace_file(path, content.getvalue())
        ranks.barrier()
        return log_probs
    ranks.require_shared(path)
    return read_reference(path, dataset)
