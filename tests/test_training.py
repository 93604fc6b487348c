"""One step's gradients, bad steps, evaluation."""

import json
import math
import threading
from dataclasses import replace

import pytest
import torch
from conftest import ALONE, sentence, sft_config, small_model
from test_distributed import in_ranks

import sft_gpt
import training
from common import IGNORE, read_records
from gpt import GPTModel
from sharding import shard_model
from tokenization import load_tokenizer
from training import FIXED_QUESTIONS, Outcome, Prefetcher, StepHistory, forward_backward


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
        loss_sum, grad_norm = forward_backward(model, batches, targets=count, max_grad_norm=0.0, ranks=ALONE)
        expected = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), targets.flatten())
        assert loss_sum.item() / count == pytest.approx(expected.item(), rel=1e-5)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        assert grad_norm.item() == pytest.approx(norm, rel=1e-5)
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


def recorded(history: StepHistory, *, loss: float, grad_norm: float) -> Outcome:
    """What came of a step of two targets that has this loss and norm."""
    values = {"loss_sum": torch.tensor(2 * loss), "grad_norm": torch.tensor(grad_norm)}
    bad = history.record(1, **values, targets=2, tokens=4, lr=0.1, stop=False)
    (outcome,) = history.outcomes(1)
    assert bool(bad) == bool(outcome.numbers["skipped"]) and outcome.numbers["targets"] == 2
    return outcome


def test_a_step_is_bad_when_not_finite_or_far_above_the_last_128_and_good_ones_reset_the_count():
    history = StepHistory(6.0, ALONE)

    def reason(loss: float, grad_norm: float) -> tuple[str | None, int]:
        outcome = recorded(history, loss=loss, grad_norm=grad_norm)
        return outcome.numbers["skipped"], outcome.bad_steps

    assert reason(math.nan, 1.0) == ("its loss is nan", 1)
    assert reason(1.0, math.inf) == ("its grad_norm is inf", 2)
    for i in range(64):
        assert reason(1.0 + 0.01 * (i % 2), 1.0 + 0.1 * (i % 2)) == (None, 0)
    assert reason(1.1, 1.0)[0].startswith("its loss of 1.100 is a spike, above 1.0")
    why, count = reason(1.0, 2.0)
    assert why.startswith("its grad_norm of 2.000 is a spike, above 1.3") and count == 2


def test_a_spike_is_one_by_the_mean_and_deviation_of_the_last_128():
    values = torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    history = StepHistory(2.0, ALONE)
    for i, value in enumerate(values.tolist()):
        past = values[max(0, i - 128) : i]
        limit = past.mean() + 2.0 * past.std() if i >= 64 else math.inf
        record = {"grad_norm": torch.tensor(1.0), "targets": 1, "tokens": 1, "lr": 0.1, "stop": False}
        assert bool(history.record(i, loss_sum=values[i], **record)) == (value > limit)


def test_the_history_goes_on_from_its_state_and_no_spike_is_seen_with_sigma_zero():
    history, calm = StepHistory(6.0, ALONE), StepHistory(0.0, ALONE)
    for i in range(200):
        recorded(history, loss=float(i % 3), grad_norm=float(i % 5))
        recorded(calm, loss=float(i % 3), grad_norm=float(i % 5))
    again = StepHistory(6.0, ALONE, state={"history": json.loads(json.dumps(history.state()))})
    assert again.state() == history.state() and len(again.state()["loss"]) == StepHistory.LENGTH
    for loss in (1.0, 50.0, 1.5):
        assert recorded(again, loss=loss, grad_norm=1.0) == recorded(history, loss=loss, grad_norm=1.0)
        assert recorded(calm, loss=loss, grad_norm=1.0).numbers["skipped"] is None


def test_a_gpus_newest_step_is_read_after_the_next_and_all_are_read_at_a_pause_or_stop():
    history = StepHistory(0.0, ALONE, read_all=lambda step: step == 4)
    history.lag = 1  # as on a GPU
    read = []
    for step in range(1, 8):
        values = {"loss_sum": torch.tensor(1.0), "grad_norm": torch.tensor(1.0)}
        history.record(step, **values, targets=1, tokens=1, lr=0.1, stop=step == 6)
        read.append([outcome.step for outcome in history.outcomes(step)])
    assert read == [[], [1], [2], [3, 4], [], [5], [6, 7]]


def test_the_next_steps_batches_are_made_while_this_one_computes_and_no_more_than_these():
    made, gate = [], threading.Event()

    def make(step: int) -> tuple:
        if step == 3:
            gate.wait(60)
        made.append(step)
        return (step, [{"step": step}])

    upcoming = Prefetcher(make, 2, 5)
    assert upcoming.batches(2) == (2, [{"step": 2}]) and made == [2]  # 3 is being made
    gate.set()
    assert upcoming.batches(3)[0] == 3 and upcoming.batches(4)[0] == 4
    upcoming.close()
    assert made == [2, 3, 4]


def test_what_goes_wrong_with_the_next_batches_is_raised_where_they_are_asked_for():
    def make(step: int):
        raise ValueError(f"step {step}")

    upcoming = Prefetcher(make, 0, 2)
    with pytest.raises(ValueError, match="step 0"):
        upcoming.batches(0)
    upcoming.close()


def test_a_fine_tuning_run_answers_before_during_and_after(base_run, chats, tmp_path, capsys):
    sft_gpt.main(sft_config(base_run, chats, tmp_path / "chat"))
    printed = capsys.readouterr().out
    assert "before" in printed and "python chat.py --model=" in printed and "What is water?" in printed
    rows = read_records(tmp_path / "chat" / "answers.jsonl")
    assert {row["step"] for row in rows} == {0, 2, 4} and len(rows) == 3 * (4 + len(FIXED_QUESTIONS))
    metrics = read_records(tmp_path / "chat" / "metrics.jsonl")
    validations = [row for row in metrics if "val_loss" in row]
    losses = [row["val_loss"] for row in validations]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert all(0 <= row["val_accuracy"] < 1 and 0 <= row["stopped"] <= 1 for row in validations)
    assert printed.count("  | What is water?") == 3
    assert all(row["targets"] > 0 for row in metrics if "targets" in row)
    sft_gpt.main(
        sft_config(base_run, chats, tmp_path / "chat")
    )  # again: finished, the answers are shown from the file
    assert "is finished" in (again := capsys.readouterr().out) and "What is water?" in again
    assert json.loads((tmp_path / "chat" / "step_0000004" / "generation_config.json").read_text())[
        "eos_token_id"
    ] == [2, 0]


def test_answers_come_in_the_order_of_the_questions_in_batches_of_a_bounded_size(tokenizer, monkeypatch):
    model, questions = small_model(), [sentence(i)[: 5 + 7 * (i * 5 % 4)] for i in range(12)] + ["x" * 500]
    sizes, original = [], GPTModel.generate

    def generate(self, prompts, max_new_tokens, **options):
        sizes.append(len(prompts) * (max(map(len, prompts)) + max_new_tokens))
        return original(self, prompts, max_new_tokens, **options)

    monkeypatch.setattr(GPTModel, "generate", generate)
    monkeypatch.setattr(training, "ANSWER_SLOTS", 120)
    given = training.generate_answers(model, tokenizer, questions, max_new_tokens=8, ranks=ALONE)
    assert [row["question"] for row in given.values()] == questions[:12]  # the last fills the context
    assert list(given) == list(range(12)) and len(sizes) > 3 and max(sizes) <= 120


def answer_together(ranks, folder) -> None:
    """Every rank has the same model. The batches are of four questions."""
    training.ANSWER_ROWS = 4
    tokenizer = load_tokenizer(folder)
    asked = [sentence(i)[:12] for i in range(2)]
    for name, questions, shard in (("many", asked, "none"), ("none", [], "none"), ("split", asked, "full")):
        ranks = replace(ranks, shard=shard)
        (folder / name / str(ranks.world)).mkdir(parents=True, exist_ok=True)
        found = training.record_answers(
            folder / name / str(ranks.world),
            5,
            shard_model(small_model(num_key_value_heads=2), ranks),
            tokenizer=tokenizer,
            questions=questions,
            max_new_tokens=8,
            ranks=ranks,
        )
        if ranks.is_main:
            assert 0 <= found[0]["stopped"] <= 1 if questions else found[0] == {}
            assert len(found[1]) == len(FIXED_QUESTIONS)
        else:
            assert found == ({}, [])
    ranks.leave()


@pytest.mark.slow
def test_answers_do_not_depend_on_the_ranks_nor_on_splitting_the_model_and_a_rank_without_any_does_not_hang(
    tokenizer, tmp_path
):
    tokenizer.save_pretrained(tmp_path)
    answer_together(ALONE, tmp_path)
    rows = read_records(tmp_path / "many" / "1" / "answers.jsonl")
    assert len(rows) == len(FIXED_QUESTIONS) + 2 and len({row["answer"] for row in rows}) > 4
    assert in_ranks(answer_together, tmp_path, world=3) == [0, 0, 0]  # two batches: the third rank has none
    for name in ("many", "none", "split"):
        paths = [tmp_path / name / n / "answers.jsonl" for n in ("1", "3")]
        assert paths[0].read_text() == paths[1].read_text()
