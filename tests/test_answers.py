"""A model's own answers."""

import json
import math
from dataclasses import replace

from conftest import ALONE, sentence, sft_config, small_model
from test_distributed import in_ranks

import answers
import sft_gpt
from answers import FIXED_QUESTIONS
from common import read_records
from distributed import shard_model
from gpt import GPTModel
from tokenization import load_tokenizer


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
    monkeypatch.setattr(answers, "SLOTS", 120)
    given = answers.generate_answers(model, tokenizer, questions, max_new_tokens=8, ranks=ALONE)
    assert [row["question"] for row in given.values()] == questions[:12]  # the last fills the context
    assert list(given) == list(range(12)) and len(sizes) > 3 and max(sizes) <= 120


def answer_together(ranks, folder) -> None:
    """Every rank has the same model. The batches are of four questions."""
    answers.ROWS = 4
    tokenizer = load_tokenizer(folder)
    asked = [sentence(i)[:12] for i in range(2)]
    for name, questions, shard in (("many", asked, "none"), ("none", [], "none"), ("split", asked, "full")):
        ranks = replace(ranks, shard=shard)
        (folder / name / str(ranks.world)).mkdir(parents=True, exist_ok=True)
        found = answers.record_answers(
            folder / name / str(ranks.world),
            5,
            shard_model(small_model(num_key_value_heads=2), ranks),
            tokenizer=tokenizer,
            questions=questions,
            max_new_tokens=8,
            ranks=ranks,
        )
        if ranks.is_main:
            assert 0 <= found[0]["stopped"] <= 1 if questions else math.isnan(found[0]["stopped"])
            assert len(found[1]) == len(FIXED_QUESTIONS)
        else:
            assert found == ({}, [])
    ranks.leave()


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
