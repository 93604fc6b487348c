"""What the loops are made of: the check of their settings, one step's gradients, bad steps, evaluation."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn

from checkpoint import Checkpoints
from common import IGNORE, InputError, check_choice, check_numbers
from distributed import COMPILE, Ranks, StopSignals
from metrics import WANDB, Metrics
from optim import OPTIMIZERS


def check_settings(settings: dict, positive: Sequence[str]) -> None:
    """Raise InputError for a setting of a training script that can mean nothing, before anything is read.

    `positive` names the script's own numbers that must be above zero; those of all scripts are added.
    """
    common = "micro_batch_size max_bad_steps log_every eval_every save_every timeout_minutes".split()
    check_numbers(settings, [*positive, *common])
    for name, choices in (("optimizer", OPTIMIZERS), ("wandb", WANDB), ("compile", COMPILE)):
        check_choice(name, settings[name], choices)
    if settings["keep_every"] % settings["save_every"]:
        raise InputError(
            f"--keep_every={settings['keep_every']} is no multiple of --save_every={settings['save_every']}; "
            f"only a checkpoint that is saved can be kept"
        )


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
    unit: str = "nats/token",
) -> tuple["StepHistory", Metrics, Checkpoints, StopSignals]:
    """What records a run and what can stop it: its history, metrics, checkpoints and signals.

    `settings` are the script's, which metrics and checkpoints keep. The others are described at the classes.
    """
    history = StepHistory(settings["spike_sigma"], state)
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
    )
    return history, metrics, checkpoints, StopSignals(ranks)


def targets_in(batch: dict) -> torch.Tensor:
    """How many of a micro-batch's targets are trained on."""
    return (batch["targets"] != IGNORE).sum()


def forward_backward(
    module: nn.Module, micro_batches: Sequence[dict], *, targets: int, max_grad_norm: float, ranks: Ranks
) -> tuple[float, float]:
    """Gradients of one global batch, of which `micro_batches` are this rank's share, each the keyword
    arguments of the module's forward.

    The module gives a micro-batch's loss as a sum over its targets. It is divided once, by the `targets` of
    all micro-batches of all ranks: any split of the same global batch gives the same gradients up to
    rounding. They are scaled down to max_grad_norm (0: never). Returns the loss per target in nats and the
    gradients' norm before clipping, the same on all ranks.
    """
    assert targets > 0, "a global batch without targets; the loaders never give one"
    loss_sum = torch.zeros((), device=ranks.device)
    for i, batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1  # ranks exchange their gradients once, in the last backward
        with nullcontext() if last or ranks.world == 1 else module.no_sync():
            with ranks.autocast():
                loss = module(**ranks.to_device(batch))
            (loss * (ranks.world / targets)).backward()  # DDP averages over ranks: world times that is a sum
        loss_sum += loss.detach()
    grad_norm = nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm or math.inf)
    # The norm is the same on all ranks, so the sum of its shares is the norm again.
    loss_sum, grad_norm = ranks.sum(loss_sum, grad_norm / ranks.world)
    return loss_sum / targets, grad_norm


class StepHistory:
    """The last losses and gradient norms. They decide which step is bad, so they belong to a run's state.

    A step is bad if its loss or gradient norm is not finite or is a spike: more than spike_sigma standard
    deviations above the mean of the last 128 (0: no step is a spike). The 128, and that half of them must be
    there, are those of OLMo-core's SkipStepOptimizer (https://github.com/allenai/OLMo-core). All ranks
    record the same numbers and so decide alike.
    """

    LENGTH = 128

    def __init__(self, spike_sigma: float, state: dict | None = None):
        saved = state["history"] if state else {"loss": [], "grad_norm": [], "bad_steps": 0}
        self.spike_sigma = spike_sigma
        self.values = {name: deque(saved[name], self.LENGTH) for name in ("loss", "grad_norm")}
        self.bad_steps = saved["bad_steps"]  # in a row

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {name: list(values) for name, values in self.values.items()} | {"bad_steps": self.bad_steps}

    def record(self, *, loss: float, grad_norm: float) -> str | None:
        """Record a step; returns why it is bad, or None."""
        reasons = [self.record_one("loss", loss), self.record_one("grad_norm", grad_norm)]
        why_bad = next((reason for reason in reasons if reason), None)
        self.bad_steps = self.bad_steps + 1 if why_bad else 0
        return why_bad

    def record_one(self, name: str, value: float) -> str | None:
        if not math.isfinite(value):
            return f"its {name} is {value}"
        past, limit = self.values[name], math.inf
        if self.spike_sigma and len(past) >= self.LENGTH // 2:
            limit = np.mean(past) + self.spike_sigma * np.std(past, ddof=1)
        past.append(value)
        return f"its {name} of {value:.3f} is a spike, above {limit:.3f}" if value > limit else None


@torch.no_grad()
def evaluate(
    module: nn.Module, micro_batches: Iterable[dict], ranks: Ranks, count: Callable[[dict], int] = targets_in
) -> tuple[float, float, int]:
    """Summed loss in nats, how many targets were the likeliest token, and the number of targets, over the
    micro-batches of all ranks; or a module's own idea of the first two with a `count` to match."""
    sums, targets = [torch.zeros(2, device=ranks.device)], 0  # they stay on the device until the end
    for batch in micro_batches:
        ranks.at("an evaluation")
        with ranks.autocast():
            losses, hits = module(**ranks.to_device(batch), per_token=True)
        sums.append(torch.stack([losses.sum(), hits.sum().float()]))
        targets += count(batch)
    loss, correct, targets = ranks.sum(*torch.stack(sums).cpu().double().sum(0), targets)
    return loss, correct, int(targets)


class Prefetcher:
    """Makes the batches of the next step in a thread, while this step computes."""

    def __init__(self, make: Callable[[int], list[dict]], start: int, max_steps: int):
        self.make, self.max_steps = make, max_steps
        self.thread = ThreadPoolExecutor(1)
        self.upcoming = self.thread.submit(make, start) if start < max_steps else None

    def batches(self, step: int) -> list[dict]:
        """The batches of this step; steps are asked for one after the other. Raises what `make` raised."""
        batches = self.upcoming.result()
        self.upcoming = self.thread.submit(self.make, step + 1) if step + 1 < self.max_steps else None
        return batches

    def close(self) -> None:
        self.thread.shutdown()
