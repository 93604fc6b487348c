"""One step's gradients, bad steps, evaluation."""

import json
import math
import threading

import pytest
import torch
from conftest import ALONE, small_model

from common import IGNORE
from training import Prefetcher, StepHistory, forward_backward


def test_any_split_into_micro_batches_gives_the_same_gradients():
    ids = torch.randint(0, 320, (8, 33), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    for row in range(8):
        targets[row, : 4 * row] = IGNORE  # unequal numbers of targets: a mean of means would differ
    reference = None
    for size in (8, 4, 1):
        model = small_model()
        batches = [
            {"input_ids": ids[i : i + size, :-1], "targets": targets[i : i + size]} for i in range(0, 8, size)
        ]
        count = int((targets != IGNORE).sum())
        loss, grad_norm = forward_backward(model, batches, targets=count, max_grad_norm=0.0, ranks=ALONE)
        expected = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), targets.flatten())
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        assert grad_norm == pytest.approx(norm, rel=1e-5)
        reference = reference or gradients
        for name, gradient in gradients.items():
            assert (gradient - reference[name]).norm() <= 1e-6 * reference[name].norm()


@pytest.mark.parametrize("limit", [0.1, 1e9])
def test_gradients_are_scaled_down_to_the_limit_and_never_up(limit):
    ids = torch.randint(0, 320, (2, 33), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}
    model, free = small_model(), small_model()
    _, before = forward_backward(model, [batch], targets=64, max_grad_norm=limit, ranks=ALONE)
    forward_backward(free, [batch], targets=64, max_grad_norm=0.0, ranks=ALONE)
    assert before > 0.1
    for p, q in zip(model.parameters(), free.parameters()):
        torch.testing.assert_close(p.grad, q.grad * min(1.0, limit / before))


def test_a_step_is_bad_when_not_finite_or_far_above_the_last_128_and_good_ones_reset_the_count():
    history = StepHistory(6.0)
    assert history.record(loss=math.nan, grad_norm=1.0) == "its loss is nan" and history.bad_steps == 1
    assert history.record(loss=1.0, grad_norm=math.inf) == "its grad_norm is inf" and history.bad_steps == 2
    for i in range(64):
        assert history.record(loss=1.0 + 0.01 * (i % 2), grad_norm=1.0 + 0.1 * (i % 2)) is None
    assert history.bad_steps == 0
    assert history.record(loss=1.1, grad_norm=1.0).startswith("its loss of 1.100 is a spike, above 1.0")
    assert history.record(loss=1.0, grad_norm=2.0).startswith("its grad_norm of 2.000 is a spike, above 1.3")
    assert history.bad_steps == 2


def test_the_history_goes_on_from_its_state_and_no_spike_is_seen_with_sigma_zero():
    history, calm = StepHistory(6.0), StepHistory(0.0)
    for i in range(200):
        history.record(loss=float(i % 3), grad_norm=float(i % 5))
    again = StepHistory(6.0, {"history": json.loads(json.dumps(history.state()))})
    assert again.state() == history.state() and len(again.state()["loss"]) == StepHistory.LENGTH
    for loss in (1.0, 50.0, 1.5):
        assert again.record(loss=loss, grad_norm=1.0) == history.record(loss=loss, grad_norm=1.0)
        assert calm.record(loss=loss, grad_norm=1.0) is None


def test_the_next_steps_batches_are_made_while_this_one_computes_and_no_more_than_these():
    made, gate = [], threading.Event()

    def make(step: int) -> list[dict]:
        if step == 3:
            gate.wait(60)
        made.append(step)
        return [{"step": step}]

    upcoming = Prefetcher(make, 2, 5)
    assert upcoming.batches(2) == [{"step": 2}] and made == [2]  # 3 is being made
    gate.set()
    assert upcoming.batches(3) == [{"step": 3}] and upcoming.batches(4) == [{"step": 4}]
    upcoming.close()
    assert made == [2, 3, 4]


def test_what_goes_wrong_with_the_next_batches_is_raised_where_they_are_asked_for():
    def make(step: int):
        raise ValueError(f"step {step}")

    upcoming = Prefetcher(make, 0, 2)
    with pytest.raises(ValueError, match="step 0"):
        upcoming.batches(0)
    upcoming.close()
