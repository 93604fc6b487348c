"""What the loops are made of: the check of their settings, one step's gradients, bad steps, evaluation, and
a model's own answers: to held-out questions and to a few fixed ones, before, during and after a run."""

import gc
import itertools
import math
import textwrap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from checkpoint import Checkpoints
from common import (
    IGNORE,
    InputError,
    check_choice,
    check_numbers,
    half_surrogate,
    read_records,
    write_records,
)
from distributed import TIMEOUT, Ranks, StopSignals
from generation import SAMPLING
from gpt import GPTModel
from metrics import WANDB, Metrics, Profiler
from optim import OPTIMIZERS
from precision import DTYPES, peak_flops
from sft import prompt_ids, user_turn
from sharding import COMPILE, SHARD, gradients_exchanged, whole
from tokenization import TURN_END


def check_settings(settings: dict, positive: Sequence[str]) -> None:
    """Raise InputError for an invalid setting of a training script, before anything is read.

    `positive` names the script's own numbers that must be above zero; those of all scripts are added.
    """
    common = "micro_batch_size max_bad_steps log_every eval_every save_every timeout_minutes".split()
    check_numbers(settings, [*positive, *common])
    for name, choices in (
        ("optimizer", OPTIMIZERS),
        ("wandb", WANDB),
        ("compile", COMPILE),
        ("shard", SHARD),
        ("dtype", DTYPES),
    ):
        check_choice(name, settings[name], choices)
    if settings["timeout_minutes"] > (most := TIMEOUT.total_seconds() / 60 - 5):
        raise InputError(
            f"--timeout_minutes={settings['timeout_minutes']:g}: expected at most {most:g}, as torch itself "
            f"ends a rank that waits an hour for another"
        )
    if not settings["out_dir"].strip():
        raise InputError("--out_dir is empty; name a folder for the run, as --out_dir=out/mine")
    for name, value in settings.items():
        if isinstance(value, str) and half_surrogate(value):
            raise InputError(f"--{name}={value!a} is no UTF-8 text; choose another name")
    if settings["keep_every"] % settings["save_every"]:
        raise InputError(
            f"--keep_every={settings['keep_every']} is no multiple of --save_every={settings['save_every']}; "
            f"only a checkpoint that is saved can be kept"
        )


def step_size(batch_tokens: int, T: int, ranks: int, *, unit: str, flag: str) -> int:
    """How many windows or rows (`unit`) of T tokens a step has; InputError for fewer than ranks. `flag` is
    the one that T comes from."""
    count = batch_tokens // T
    if count < ranks:
        raise InputError(
            f"--batch_tokens={batch_tokens} are {count} {unit} of {T}, fewer than the {ranks} ranks; raise "
            f"--batch_tokens, lower --{flag}, or use fewer GPUs"
        )
    return count


def pauses(settings: dict, max_steps: int) -> Callable[[int], bool]:
    """Tells after which steps a run pauses: to log, to validate, to score, to save, or because it was the
    last."""
    intervals = [value for name, value in settings.items() if name.endswith("_every") and value]
    return lambda step: step == max_steps or any(step % every == 0 for every in intervals)


def open_records(
    settings: dict,
    *,
    start: int,
    max_steps: int,
    step_tokens: int,
    tokenizer,
    identity: dict[str, dict],
    origin: str,
    state: dict | None,
    ranks: Ranks,
    flops_per_token: float,
    unit: str = "nats/token",
) -> tuple["StepHistory", Metrics, Checkpoints, StopSignals, Profiler]:
    """What records a run and what can stop it: its history, metrics, checkpoints, signals and profiler.

    `settings` are the script's, which metrics and checkpoints keep. The others are described at the classes.
    From here on Python collects garbage at the history's pauses only, not amid a step. Raises InputError for
    a run that is beyond its last step.
    """
    if start > max_steps:
        raise InputError(
            f"{state['path']} is at step {start} already, beyond the last one, {max_steps}; give more steps, "
            f"or another --out_dir"
        )
    if state and state["content"] == identity["content"]:
        origin = state.get("origin", origin)  # what it names may be gone
    gc.freeze()
    gc.disable()
    history = StepHistory(settings["spike_sigma"], ranks, state=state, read_all=pauses(settings, max_steps))
    metrics = Metrics(
        settings["out_dir"],
        start=start,
        max_steps=max_steps,
        step_tokens=step_tokens,
        log_every=settings["log_every"],
        ranks=ranks,
        state=state,
        wandb=settings["wandb"],
        settings=settings,
        unit=unit,
        flops_per_token=flops_per_token,
        peak_flops=peak_flops(ranks, ranks.dtype),
    )
    checkpoints = Checkpoints(
        settings["out_dir"],
        ranks,
        tokenizer=tokenizer,
        identity=identity,
        settings=settings,
        origin=origin,
        keep_last=settings["keep_last"],
        keep_every=settings["keep_every"],
        start=start,
    )
    profiler = Profiler(settings["profile"], settings["out_dir"], ranks)
    return history, metrics, checkpoints, StopSignals(), profiler


def targets_in(batch: dict) -> torch.Tensor:
    """How many of a micro-batch's targets are trained on."""
    return (batch["targets"] != IGNORE).sum()


def forward_backward(
    module: nn.Module, micro_batches: Sequence[dict], *, targets: int, max_grad_norm: float, ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of one global batch, of which `micro_batches` are this rank's share, each the keyword
    arguments of the module's forward.

    The module gives a micro-batch's loss as a sum over its targets. It is divided once, by the `targets` of
    all micro-batches of all ranks: any split of the same global batch gives the same gradients up to
    rounding. They are scaled down to max_grad_norm (0: never). Returns this rank's summed loss in nats and
    the gradients' norm before clipping, both on the device: nobody waits for them.
    """
    assert targets > 0, "a global batch without targets; the loaders never give one"
    loss_sum = torch.zeros((), device=ranks.device)
    for i, batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1  # DDP's ranks exchange their gradients once, in the last backward
        with gradients_exchanged(module, last, ranks):
            with ranks.autocast():
                loss = module(**ranks.to_device(batch))
            ranks.own_work.end()  # what comes now waits for other ranks
            (loss * (ranks.world / targets)).backward()  # ranks average: world times that is a sum
        loss_sum += loss.detach()
    return loss_sum, whole(nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm or math.inf))


@dataclass
class Outcome:
    """What came of a step, read from its device."""

    step: int  # completed optimizer steps, this one included
    numbers: dict  # loss, grad_norm, lr, targets and step_tokens; under "skipped" why it is bad, or None
    bad_steps: int  # in a row, up to this one
    stopped: bool  # whether any rank was told to stop


class StepHistory:
    """The last losses and gradient norms. They decide which step is bad, so they belong to a run's state.

    A step is bad if its loss or gradient norm is not finite or is a spike: more than spike_sigma standard
    deviations above the mean of the last 64 to 128 (0: no step is a spike). These numbers are those of
    OLMo-core's SkipStepOptimizer (https://github.com/allenai/OLMo-core). All ranks record the same sums and
    so decide alike.

    The decision is made on the device. Python reads what came of a step at once on a CPU. On a GPU it reads
    while the next step computes, so that neither waits for the other.
    """

    LENGTH = 128

    def __init__(
        self,
        spike_sigma: float,
        ranks: Ranks,
        *,
        state: dict | None = None,
        read_all: Callable[[int], bool] = lambda step: True,
    ):
        """`read_all` tells after which steps all outcomes are read, the newest one, too."""
        saved = state["history"] if state else {"loss": [], "grad_norm": [], "bad_steps": 0}
        rows = [saved[name] for name in ("loss", "grad_norm")]
        rows = [[math.nan] * (self.LENGTH - len(row)) + row for row in rows]  # NaN: not there yet
        self.spike_sigma, self.ranks, self.read_all = spike_sigma, ranks, read_all
        self.past = torch.tensor(rows, dtype=torch.float64, device=ranks.sum_device)  # (2, LENGTH)
        self.bad_steps = torch.tensor(saved["bad_steps"], device=ranks.sum_device)  # in a row
        self.lag = int(ranks.device.type == "cuda")  # how many of the newest steps may stay unread
        self.unread: deque[tuple] = deque()

    def state(self) -> dict:
        """What a checkpoint keeps."""
        loss, grad_norm = ([v for v in row if not math.isnan(v)] for row in self.past.tolist())
        return {"loss": loss, "grad_norm": grad_norm, "bad_steps": int(self.bad_steps)}

    def record(
        self,
        step: int,
        *,
        loss_sum: torch.Tensor,
        grad_norm: torch.Tensor,
        targets: int,
        tokens: int,
        lr: float,
        stop: bool,
    ) -> torch.Tensor:
        """Record a step; returns whether it is bad, a tensor on the device.

        loss_sum is this rank's, and summed over the ranks here. targets and tokens are those of all ranks.
        `stop`: this rank was told to stop.
        """
        # The norm is the same on all ranks, so the sum of its shares is the norm again.
        loss, norm, stops = self.ranks.total(loss_sum, grad_norm / self.ranks.world, stop)
        now = torch.stack([loss / targets, norm])
        limits, finite = spike_limits(self.past, self.spike_sigma), now.isfinite()
        bad = (~finite | (now > limits)).any()
        newer = torch.cat([self.past[:, 1:], now[:, None]], dim=1)
        self.past = torch.where(finite[:, None], newer, self.past)
        self.bad_steps = (self.bad_steps + 1) * bad
        told = torch.cat([now, limits, torch.stack([self.bad_steps.double(), stops])])
        self.unread.append(
            (step, {"lr": lr, "targets": targets, "step_tokens": tokens}, *self.ranks.to_host(told))
        )
        return bad

    def outcomes(self, step: int) -> list[Outcome]:
        """What came of the steps that are to be read after this one, the oldest first. A stop reads all."""
        outcomes, all_of_them = [], self.read_all(step)
        while self.unread and (all_of_them or len(self.unread) > self.lag):
            recorded, numbers, told, wait = self.unread.popleft()
            wait()
            loss, grad_norm, loss_limit, norm_limit, bad_steps, stops = told.tolist()
            reasons = [why_bad("loss", loss, loss_limit), why_bad("grad_norm", grad_norm, norm_limit)]
            skipped = next((reason for reason in reasons if reason), None)
            numbers = {"loss": loss, "grad_norm": grad_norm, **numbers, "skipped": skipped}
            outcomes.append(Outcome(recorded, numbers, int(bad_steps), stopped=stops > 0))
            all_of_them = all_of_them or stops > 0
        if all_of_them and not gc.isenabled():
            gc.collect()
        return outcomes


def spike_limits(past: torch.Tensor, spike_sigma: float) -> torch.Tensor:
    """The limits (2,) above which the next loss and gradient norm are spikes, from the `past` (2, LENGTH)."""
    count, mean = (~past.isnan()).sum(1), past.nanmean(1)
    deviation = ((past - mean[:, None]) ** 2).nansum(1).div(count - 1).sqrt()
    known = (count >= past.size(1) // 2) & (spike_sigma > 0)
    return torch.where(known, mean + spike_sigma * deviation, math.inf)


def why_bad(name: str, value: float, limit: float) -> str | None:
    """Why a step with this value is bad, or None."""
    if not math.isfinite(value):
        return f"its {name} is {value}"
    return f"its {name} of {value:.3f} is a spike, above {limit:.3f}" if value > limit else None


@torch.no_grad()
def evaluate(
    module: nn.Module, micro_batches: Iterable[dict], ranks: Ranks, count: Callable[[dict], int] = targets_in
) -> tuple[float, float, int]:
    """Summed loss in nats, how many targets were the likeliest token, and the number of targets, over the
    micro-batches of all ranks. A module may define loss and hits its own way; `count` then has to match."""
    sums, targets = [torch.zeros(2, device=ranks.device)], 0  # they stay on the device until the end
    for batch in micro_batches:
        ranks.at("an evaluation")
        with ranks.autocast():
            losses, hits = module(**ranks.to_device(batch), per_token=True)
        sums.append(torch.stack([losses.sum(), hits.sum().float()]))
        targets += count(batch)
    sums = torch.stack(sums).to(ranks.sum_device).double().sum(0)
    loss, correct, targets = ranks.sum(*sums, targets)
    return loss, correct, int(targets)


class Prefetcher:
    """Makes the batches of the next step in a thread, while this step computes."""

    def __init__(self, make: Callable[[int], tuple], start: int, max_steps: int):
        self.make, self.max_steps = make, max_steps
        self.thread = ThreadPoolExecutor(1)
        self.upcoming = self.thread.submit(make, start) if start < max_steps else None

    def batches(self, step: int) -> tuple:
        """The batches of this step; steps are asked for one after the other. Raises what `make` raised."""
        batches = self.upcoming.result()
        self.upcoming = self.thread.submit(self.make, step + 1) if step + 1 < self.max_steps else None
        return batches

    def close(self) -> None:
        self.thread.shutdown()


FIXED_QUESTIONS = (  # each validation asks them, before held-out ones
    "Hello!",
    "What is water?",
    "What is the capital of France?",
    "Who are you?",
    "Tell me about the Moon.",
    "What is mathematics?",
)


def generate_answers(
    model: GPTModel, tokenizer, questions: list[str], *, max_new_tokens: int, ranks: Ranks
) -> dict[int, dict] | None:
    """By a question's place: its answer, sampled as in chat.py, and whether it stopped by itself. On rank 0;
    the others get None.

    Questions that fill the context are left out. Questions of similar length share a batch, and the ranks
    divide the batches. With a split model all ranks compute each batch together. A question's place is
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
        with ranks.autocast():
            steps = [*model.generate(some, max_new_tokens, **SAMPLING, seed=batch, stop_ids=[stop])]
        for i, ids in zip(batch, zip(*steps)):
            ids = [id for id in ids if id is not None]
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            mine[i] = {"question": questions[i], "answer": text, "stopped": stop in ids}
    given = ranks.gather(mine)
    if given is None:
        return None
    results = {i: answer for answers in given for i, answer in answers.items()}
    return {i: results[i] for i in fitting}


ANSWER_SLOTS, ANSWER_ROWS = 2**14, 32  # of one batch, at most: positions in its cache, and questions


def slot_batches(order: list[int], prompts: list[list[int]], max_new_tokens: int) -> Iterator[list[int]]:
    """Prompts, from short to long, in batches of at most ANSWER_ROWS and ANSWER_SLOTS positions; at
    least one prompt each.

    A GPU takes as long for one as for ANSWER_ROWS, so smaller batches gain nothing. Larger ones could not be
    divided over ranks.
    """
    batch: list[int] = []
    for i in order:
        slots = (len(batch) + 1) * (len(prompts[i]) + max_new_tokens)
        if batch and (len(batch) == ANSWER_ROWS or slots > ANSWER_SLOTS):
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

    Returns `stopped`, the share of the held-out ones, if any, whose answers stop by themselves, and a line
    for each fixed one; on the other ranks nothing.
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
    numbers = {"stopped": float(np.mean([answer["stopped"] for answer in held_out]))} if held_out else {}
    return numbers, [f"  | {line}" for line in lines]


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
