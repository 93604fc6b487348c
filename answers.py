"""A model's own answers: to held-out questions and to a few fixed ones, before, during and after a run."""

import itertools
import math
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common import read_records, write_records
from distributed import Ranks
from gpt import GPTModel
from sft import prompt_ids, user_turn
from tokenization import TURN_END

SAMPLING = {"temperature": 0.7, "top_k": 50, "top_p": 0.95}  # of an answer, in chat.py and in evaluations
FIXED_QUESTIONS = (  # every evaluation asks them
    "Hello!",
    "What is water?",
    "What is the capital of France?",
    "Who was Albert Einstein?",
    "Tell me about the Moon.",
    "What is mathematics?",
)


def generate_answers(
    model: GPTModel, tokenizer, questions: list[str], *, max_new_tokens: int, ranks: Ranks
) -> dict[int, dict] | None:
    """By a question's place: its answer, sampled as in chat.py, and whether it stopped by itself. On rank 0;
    the others get None.

    Questions that fill the context are left out. Those of like length are answered together, and the ranks
    divide these batches; of a model that is split over them they compute all together. A question's place is
    the seed of its answer. So the answers are always the same, on any number of ranks.
    """
    stop, context = tokenizer.convert_tokens_to_ids(TURN_END), model.config.max_position_embeddings
    prompts = [prompt_ids(user_turn(question), tokenizer) for question in questions]
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < context]
    batches = slot_batches(sorted(fitting, key=lambda i: len(prompts[i])), prompts, max_new_tokens)
    mine, first, stride = {}, *((0, 1) if ranks.sharded else (ranks.rank, ranks.world))
    for batch in itertools.islice(batches, first, None, stride):
        ranks.at(f"answering questions {batch}")
        some = [prompts[i] for i in batch]
        steps = model.generate(some, max_new_tokens, **SAMPLING, seed=batch, stop_ids=[stop])
        for i, ids in zip(batch, zip(*steps)):
            ids = [id for id in ids if id is not None]
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            mine[i] = {"question": questions[i], "answer": text, "stopped": stop in ids}
    given = ranks.gather(mine)
    if given is None:
        return None
    results = {i: answer for answers in given for i, answer in answers.items()}
    return {i: results[i] for i in fitting}


SLOTS, ROWS = 2**14, 32  # of one batch of answers, at most: positions in its cache, and questions


def slot_batches(order: list[int], prompts: list[list[int]], max_new_tokens: int) -> Iterator[list[int]]:
    """Prompts, from short to long, in batches of at most ROWS and SLOTS positions; at least one prompt each.

    A GPU takes as long for one as for ROWS, so that smaller batches gain nothing, and larger ones could not
    be divided over ranks.
    """
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == ROWS or (len(batch) + 1) * (len(prompts[i]) + max_new_tokens) > SLOTS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def record_answers(
    out_dir: str | Path,
    step: int,
    model: GPTModel,
    *,
    tokenizer,
    questions: list[str],
    max_new_tokens: int,
    ranks: Ranks,
) -> tuple[dict[str, float], list[str]]:
    """Answer FIXED_QUESTIONS and held-out ones, all ranks together; rank 0 writes out_dir/answers.jsonl.

    Returns `stopped`, the share of the held-out ones whose answers stop by themselves, and a line for each
    fixed one; on the other ranks nothing.
    """
    asked = [*FIXED_QUESTIONS, *questions]
    answers = generate_answers(model, tokenizer, asked, max_new_tokens=max_new_tokens, ranks=ranks)
    if answers is None:
        return {}, []
    path = Path(out_dir) / "answers.jsonl"
    earlier = [row for row in read_records(path) if row["step"] < step]
    write_records(path, earlier + [{"step": step, **answer} for answer in answers.values()])
    fixed, held_out = (
        [answers[i] for i in answers if (i < len(FIXED_QUESTIONS)) == side] for side in (True, False)
    )
    lines = [textwrap.shorten(f"{row['question']} {row['answer']}", 106) for row in fixed]
    stopped = float(np.mean([answer["stopped"] for answer in held_out])) if held_out else math.nan
    return {"stopped": stopped}, [f"  | {line}" for line in lines]


def side_by_side(out_dir: str | Path) -> str:
    """The fixed questions with the first and the last answers that a run recorded, in two columns."""
    rows = read_records(Path(out_dir) / "answers.jsonl")
    before, after = (
        {row["question"]: row["answer"] for row in rows if row["step"] == rows[i]["step"]} for i in (0, -1)
    )
    lines = [f"  {'before':48} | after"]
    for question in (q for q in FIXED_QUESTIONS if q in before and q in after):
        columns = [
            textwrap.wrap(side[question], 48, max_lines=6) or ["(nothing)"] for side in (before, after)
        ]
        pairs = itertools.zip_longest(*columns, fillvalue="")
        lines += ["", question, *(f"  {a:48} | {b}" for a, b in pairs)]
    return "\n".join(lines)
