"""Preference pairs, their loss, and whole runs."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALONE, dpo_config, losses, preference, small_model, weights, write_jsonl
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dpo_gpt
import sft
from checkpoint import newest_checkpoint
from common import IGNORE, InputError, file_sha256, read_json, read_records
from distributed import Ranks
from dpo import (
    PreferenceModel,
    collate,
    conversations,
    micro_batches,
    pair_batches,
    prepare_pairs,
    reference_log_probs,
)
from gpt import GPTModel
from sources import source_rows
from tokenization import TURN_END, chat_template, load_tokenizer


def pairs_of(rows, tokenizer, folder, max_length: int = 64):
    """The prepared datasets of some rows and what was found."""
    folder.mkdir(exist_ok=True)
    source = write_jsonl(folder / "pairs.jsonl", rows)
    rows = source_rows(str(source), "", "")
    found = prepare_pairs(folder / "data", rows, tokenizer, max_length=max_length, val_fraction=0.5)
    return [sft.SFTDataset(folder / "data" / split) for split in ("train", "val")], found


QUESTION = {"role": "user", "content": "Why?"}


YES, NO = ({"role": "assistant", "content": text} for text in ("Yes.", "No."))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
        {"chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
        {"prompt": "Why?", "chosen": [YES], "rejected": [NO]},
        {"prompt": [QUESTION], "chosen": [YES], "rejected": [NO]},
        {"prompt": "Why?", "chosen": "Yes.", "rejected": "No."},
    ],
    ids=["ultrafeedback", "no prompt", "text as prompt", "messages as prompt", "texts"],
)
def test_all_spellings_of_a_pair_are_the_same_conversations(row):
    assert conversations(row) == [[QUESTION, YES], [QUESTION, NO]]


@pytest.mark.parametrize("prompt", [[{"role": "system", "content": "Be short."}], [QUESTION], "Why?"])
def test_a_prompt_comes_before_answers_of_several_messages(prompt):
    first = [QUESTION] if prompt == "Why?" else prompt
    between = [YES, {"role": "tool", "content": "It rains."}]
    row = {"prompt": prompt, "chosen": [*between, YES], "rejected": [*between, NO]}
    whole = [[*first, *between, YES], [*first, *between, NO]]
    assert conversations(row) == whole
    assert conversations({"prompt": prompt, "chosen": whole[0], "rejected": whole[1]}) == whole


SYSTEM = {"role": "system", "content": "Be short."}
SAME = QUESTION | {"name": None, "content": "Why? "}  # the same question, noted otherwise


@pytest.mark.parametrize(
    ("prompt", "side", "whole"),
    [
        ([QUESTION], [SAME, YES], [SAME, YES]),
        ([QUESTION], [SYSTEM, QUESTION, YES], [SYSTEM, QUESTION, YES]),
        ([SYSTEM, QUESTION], [QUESTION, YES], [SYSTEM, QUESTION, YES]),
        ([SYSTEM], [SYSTEM, QUESTION, YES], [SYSTEM, QUESTION, YES]),
        ("Why?", [SYSTEM, SAME, YES], [SYSTEM, SAME, YES]),
        ("Why?", [YES, QUESTION, YES], [QUESTION, YES, QUESTION, YES]),  # an answer, a question after it
        ([QUESTION, YES, QUESTION], [YES], [QUESTION, YES, QUESTION, YES]),
        ([], [QUESTION, YES], [QUESTION, YES]),
    ],
)
def test_a_prompt_is_repeated_by_no_side_and_lost_from_none(prompt, side, whole):
    assert conversations({"prompt": prompt, "chosen": side, "rejected": side}) == [whole, whole]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": [QUESTION, YES]}, "in rejected, there is no such column, only chosen"),
        ({"chosen": 1, "rejected": "No."}, "in chosen, messages is no list"),
        ({"chosen": "Yes.", "rejected": "No."}, "chosen is not a question and"),
        ({"chosen": [YES], "rejected": [NO]}, "chosen is not a question and an assistant's answer to it"),
        ({"chosen": [QUESTION, YES, QUESTION], "rejected": [QUESTION, NO]}, "chosen is not a question and"),
        ({"prompt": "", "chosen": [QUESTION, YES], "rejected": [NO, NO]}, "differ before the answer"),
        ({"chosen": [QUESTION, YES], "rejected": [QUESTION, YES]}, "chosen and rejected are the same"),
        ({"chosen": [QUESTION, YES], "rejected": [{**QUESTION, "role": "x"}, NO]}, "the role 'x' is none of"),
        ({"prompt": 3, "chosen": [YES], "rejected": [NO]}, "in chosen, messages is no list"),
    ],
)
def test_a_pair_that_cannot_be_compared_is_skipped_and_named(row, reason, tokenizer, tmp_path):
    (train, val), found = pairs_of([*map(preference, range(20)), row], tokenizer, tmp_path)
    assert len(train) + len(val) == 40 and found["examples"] == 20
    (skipped,) = found["skipped"]
    assert reason in skipped["reason"] and skipped["count"] == 1 and "21" in skipped["first"]


def test_what_else_is_noted_of_messages_makes_no_pairs_differ(tokenizer, tmp_path):
    """Both sides follow the chosen one's prompt, also if the other's differs in spaces around it."""
    rows = []
    for i in range(20):
        row = preference(i)
        first = row["rejected"][0]
        row["rejected"] = [first | {"id": i, "content": first["content"] + " "}, *row["rejected"][1:]]
        row["chosen"] = [message | {"score": 1.0} for message in row["chosen"]]
        rows.append(row)
    (train, val), found = pairs_of(rows, tokenizer, tmp_path)
    assert len(train) + len(val) == 40 and not found["skipped"]
    for a, b in ((train[i], train[i + 1]) for i in range(0, len(train), 2)):
        start = int(np.argmax(a[1] != IGNORE))
        assert (a[0][:start] == b[0][:start]).all()


def test_only_the_last_answers_count_and_both_follow_the_same_prompt(tokenizer, tmp_path):
    rows = []
    for i in range(20):
        earlier = [{"role": "user", "content": f"Why {i}?"}, YES]
        rows.append({name: [*earlier, *preference(i)[name]] for name in ("chosen", "rejected")})
    (train, _), _ = pairs_of(rows, tokenizer, tmp_path, max_length=200)
    end = tokenizer.convert_tokens_to_ids(TURN_END)
    for a, b in zip(range(0, len(train), 2), range(1, len(train), 2)):
        sides = [train[a], train[b]]
        starts = [int(np.argmax(labels != IGNORE)) for _, labels in sides]
        assert starts[0] == starts[1] and (sides[0][0][: starts[0]] == sides[1][0][: starts[0]]).all()
        for (ids, labels), start in zip(sides, starts):
            kept = labels != IGNORE
            assert kept[start:-1].all() and not kept[-1]  # all but the newline after the turn
            assert labels[-2] == end and (labels[kept] == ids[kept]).all()


def test_a_longer_answer_is_cut_and_a_pair_without_answers_is_left_out(tokenizer, tmp_path):
    def row(prompt: str, chosen: str, rejected: str) -> dict:
        answers = {"chosen": chosen, "rejected": rejected}
        return {"prompt": prompt} | {
            name: [{"role": "assistant", "content": content}] for name, content in answers.items()
        }

    rows = [*map(preference, range(20)), row("Go on", "one " * 100, "two"), row("one " * 100, "a", "b")]
    rows.append(row("Same", "one " * 100 + "a", "one " * 100 + "b"))
    (train, val), found = pairs_of(rows, tokenizer, tmp_path)
    assert found["examples"] == 21 and found["cut"] == 1 and found["lost_tokens"] > 20
    assert max(train.lengths().max(), val.lengths().max()) == 64
    assert {s["reason"] for s in found["skipped"]} == {
        "no answer begins within 64 tokens",
        "chosen and rejected are the same within 64 tokens",
    }


def test_every_pair_is_dealt_once_whatever_the_ranks(tokenizer, tmp_path):
    (train, _), _ = pairs_of(map(preference, range(40)), tokenizer, tmp_path)
    pairs = range(len(train) // 2)
    for world, size in ((1, 4), (3, 2), (4, 3)):
        dealt = [
            answers
            for rank in range(world)
            for answers in pair_batches(train, pairs, size, Ranks(rank, world, torch.device("cpu")))
        ]
        assert sorted(answer for part in dealt for answer in part) == list(range(len(train)))
        assert all(a % 2 == 0 and b == a + 1 for part in dealt for a, b in zip(part[::2], part[1::2]))


def log_prob(model, ids, labels) -> torch.Tensor:
    """Of one conversation's answer, from whole logits in fp64."""
    logits = model(torch.from_numpy(ids.astype(np.int64))[None])[0].double().log_softmax(-1)
    return sum(logits[i - 1, label] for i, label in enumerate(labels) if label != IGNORE)


def test_the_loss_and_its_gradients_are_those_of_the_formula(tokenizer, tmp_path):
    (train, _), _ = pairs_of(map(preference, range(12)), tokenizer, tmp_path)
    model, beta = small_model().double(), 0.5
    module = PreferenceModel(model, beta)
    reference = np.linspace(-90, -30, len(train))
    (batch,) = micro_batches(train, reference, range(len(train) // 2), T=64, size=100, ranks=ALONE)
    loss = module(**batch)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    expected = 0.0
    for w in range(0, len(train), 2):
        gains = [log_prob(model, *train[i]) - reference[i] for i in (w, w + 1)]
        expected = expected - torch.log(1 / (1 + torch.exp(-beta * (gains[0] - gains[1]))))
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(ours, theirs):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_any_split_of_a_batch_gives_the_same_gradients(tokenizer, tmp_path):
    (train, _), _ = pairs_of(map(preference, range(24)), tokenizer, tmp_path)
    model = small_model().double()
    pairs, reference, seen = range(8), np.full(len(train), -50.0), []
    for size in (8, 4, 1):
        model.zero_grad()
        for batch in micro_batches(train, reference, pairs, T=64, size=size, ranks=ALONE):
            (PreferenceModel(model, 0.5)(**batch) / len(pairs)).backward()
        seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for gradient in seen[1:]:
        assert (gradient - seen[0]).norm() <= 1e-6 * seen[0].norm()


def test_padding_changes_no_log_probability(tokenizer, tmp_path):
    (train, _), _ = pairs_of(map(preference, range(12)), tokenizer, tmp_path)
    module = PreferenceModel(small_model(), 0.5)
    together = module(**collate(train, range(len(train)), 64))
    for i, value in enumerate(together.tolist()):
        assert value == pytest.approx(log_prob(module.policy, *train[i]).item(), abs=1e-3, rel=1e-5)


def test_a_run_begins_at_ln_2_and_learns_what_is_preferred(base_run, preferences, tmp_path):
    dpo_gpt.main(dpo_config(base_run, preferences, tmp_path, max_steps=12, eval_every=6))
    rows = {row["step"]: row for row in read_records(tmp_path / "metrics.jsonl")}
    assert rows[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert 0.25 <= rows[0]["val_accuracy"] <= 0.75  # ties, but for rounding
    assert rows[12]["val_loss"] < 0.3 and rows[12]["val_accuracy"] == 1.0
    assert rows[1]["targets"] == 8
    card = (tmp_path / "step_0000012" / "README.md").read_text()
    assert "Tuned from" in card and "nats/pair" in card


def test_a_step_has_no_pair_twice(base_run, preferences, tmp_path, capsys):
    dpo_gpt.main(dpo_config(base_run, preferences, tmp_path, batch_pairs=1000, max_steps=0, epochs=2.0))
    pairs = len(sft.SFTDataset(next(tmp_path.glob("data-*/train")))) // 2
    rows = read_records(tmp_path / "metrics.jsonl")
    assert [row["targets"] for row in rows if "targets" in row] == [pairs, pairs]
    assert f"{pairs} pairs and {60 - pairs} held out" in capsys.readouterr().out


def test_a_resumed_tuning_equals_an_undisturbed_one_bit_for_bit(base_run, preferences, tmp_path):
    dpo_gpt.main(dpo_config(base_run, preferences, tmp_path / "straight"))
    shutil.copytree(tmp_path / "straight", tmp_path / "twice")
    for kept in (2, 0):
        for step in (2, 4):
            if step > kept:
                shutil.rmtree(tmp_path / "twice" / f"step_{step:07d}")
        dpo_gpt.main(dpo_config(base_run, preferences, tmp_path / "twice"))
        for step in (2, 4):
            assert weights(tmp_path / "twice", step) == weights(tmp_path / "straight", step)
        assert losses(tmp_path / "twice") == losses(tmp_path / "straight")
    answers = [(tmp_path / name / "answers.jsonl").read_text() for name in ("straight", "twice")]
    assert answers[0] == answers[1]


def test_pairs_are_rendered_anew_for_another_chat_template(base_run, preferences, tmp_path):
    dropping = shutil.copytree(base_run / "step_0000006", tmp_path / "dropping")
    (dropping / "checkpoint.json").unlink()  # whose hashes would not fit
    tokenizer = load_tokenizer(dropping)
    tokenizer.chat_template = chat_template("all", "drop")
    tokenizer.save_pretrained(dropping)
    for model, out in ((base_run, "keep"), (dropping, "drop")):
        dpo_gpt.main(dpo_config(model, preferences, tmp_path / out, cache_dir=str(tmp_path / "cache")))
    assert len([*(tmp_path / "cache").glob("data-*")]) == 2


def test_the_reference_is_computed_anew_in_another_precision(base_run, preferences, tmp_path, capsys):
    for dtype, times in (("float32", 2), ("float32", 0), ("bfloat16", 2)):
        out = tmp_path / f"{dtype}{times}"
        dpo_gpt.main(dpo_config(base_run, preferences, out, dtype=dtype, cache_dir=str(tmp_path / "cache")))
        assert capsys.readouterr().out.count("computing the reference") == times


def test_the_reference_is_computed_anew_when_a_model_of_the_hub_has_changed(
    base_run, preferences, tmp_path, monkeypatch, capsys
):
    cached = tmp_path / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    for commit, step in (("a" * 40, 2), ("b" * 40, 6)):
        shutil.copytree(base_run / f"step_{step:07d}", cached / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, commit, computed in (("first", "a" * 40, 2), ("second", "b" * 40, 2), ("third", "a" * 40, 0)):
        (cached / "refs" / "main").write_text(commit)
        dpo_gpt.main(
            dpo_config("some/model", preferences, tmp_path / name, cache_dir=str(tmp_path / "cache"))
        )
        assert capsys.readouterr().out.count("computing the reference") == computed
    # A run that goes on asks the commit that it began with, although "main" has moved on.
    (cached / "refs" / "main").write_text("b" * 40)
    before = weights(tmp_path / "first", 4)
    shutil.rmtree(tmp_path / "first" / "step_0000004")
    for path in (tmp_path / "cache").glob("data-*/reference-*.npy"):
        path.unlink()
    dpo_gpt.main(dpo_config("some/model", preferences, tmp_path / "first", cache_dir=str(tmp_path / "cache")))
    assert capsys.readouterr().out.count("computing the reference") == 2
    assert weights(tmp_path / "first", 4) == before


def test_the_reference_of_the_same_weights_under_another_configuration_is_another(
    base_run, preferences, tmp_path, capsys
):
    for eps in (1e-6, 1e-3):
        model = shutil.copytree(base_run / "step_0000006", tmp_path / f"model{eps}")
        (model / "checkpoint.json").unlink()
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": eps}))
        out, cache = tmp_path / f"out{eps}", str(tmp_path / "cache")
        dpo_gpt.main(dpo_config(model, preferences, out, cache_dir=cache))
        assert capsys.readouterr().out.count("computing the reference") == 2


def test_the_reference_is_computed_once_and_always_by_the_starting_model(
    base_run, preferences, tmp_path, capsys
):
    def go_on():
        shutil.rmtree(tmp_path / "step_0000004")
        dpo_gpt.main(dpo_config(base_run, preferences, tmp_path))
        return "computing the reference" in capsys.readouterr().out

    dpo_gpt.main(dpo_config(base_run, preferences, tmp_path))
    assert capsys.readouterr().out.count("computing the reference") == 2  # of either split
    straight = weights(tmp_path, 4)
    assert not go_on() and weights(tmp_path, 4) == straight
    for damage in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-8]), Path.touch):
        for path in tmp_path.glob("data-*/reference-*.npy"):
            damage(path)
        assert go_on() == (damage is not Path.touch) and weights(tmp_path, 4) == straight


def test_a_tuning_goes_on_when_its_starting_model_is_gone(base_run, preferences, tmp_path):
    base, data = tmp_path / "base", tmp_path / "pairs.jsonl"
    shutil.copytree(base_run, base)
    shutil.copy(preferences, data)
    dpo_gpt.main(dpo_config(base, data, tmp_path / "straight"))
    shutil.copytree(tmp_path / "straight", tmp_path / "run")
    shutil.rmtree(base)
    for _ in range(2):  # what is gone is remembered by the next checkpoint, too
        shutil.rmtree(tmp_path / "run" / "step_0000004")
        dpo_gpt.main(dpo_config(base, data, tmp_path / "run"))
        assert weights(tmp_path / "run", 4) == weights(tmp_path / "straight", 4)


def test_a_run_goes_on_and_keeps_its_start_when_the_base_run_has_gone_on(base_run, preferences, tmp_path):
    """Here a lost reference is computed from the checkpoint that the run began with, not from the newest."""
    base = shutil.copytree(base_run, tmp_path / "base")
    newest = newest_checkpoint(base)
    dpo_gpt.main(dpo_config(base, preferences, tmp_path / "run"))
    straight = weights(tmp_path / "run", 4)
    later = shutil.copytree(newest, base / "step_0000099")
    file, manifest = later / "model.safetensors", read_json(later / "checkpoint.json")
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    manifest["files"][file.name] |= {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    (later / "checkpoint.json").write_text(json.dumps(manifest))
    assert newest_checkpoint(base, for_resuming=False) == later
    shutil.rmtree(tmp_path / "run/step_0000004")
    for path in (tmp_path / "run").glob("data-*/reference-*.npy"):
        path.unlink()
    dpo_gpt.main(dpo_config(base, preferences, tmp_path / "run"))
    assert weights(tmp_path / "run", 4) == straight
    with pytest.raises(InputError, match=r"with other settings .*weights"):  # no checkpoint has them any more
        shutil.rmtree(newest)
        shutil.rmtree(tmp_path / "run/step_0000004")
        dpo_gpt.main(dpo_config(base, preferences, tmp_path / "run"))


def test_a_lost_reference_is_not_computed_from_damaged_weights(base_run, preferences, tmp_path):
    base = shutil.copytree(newest_checkpoint(base_run), tmp_path / "base")
    config = dpo_config(base, preferences, tmp_path / "run")
    dpo_gpt.main(config)
    shutil.rmtree(tmp_path / "run" / "step_0000004")
    written = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(written[:-1] + bytes([written[-1] ^ 1]))
    for path in (tmp_path / "run").glob("data-*/reference-*.npy"):
        path.rename(path.with_suffix(".kept"))
    with pytest.raises(InputError, match=r"model.safetensors is not what was saved"):
        dpo_gpt.main(config)
    for path in (tmp_path / "run").glob("data-*/reference-*.kept"):
        path.rename(path.with_suffix(".npy"))
    dpo_gpt.main(config)  # which needs no starting model


def test_mistakes_in_a_tuning_run_are_told(base_run, preferences, tmp_path):
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"chosen": 1, "rejected": 2}])
    for change, message in (
        ({"beta": 0.0}, "--beta=0.0: expected a number above zero"),
        ({"max_length": 65}, "--max_length=65 is beyond the model's context of 64"),
        ({"data": str(empty)}, "nothing is left to train on .1 skipped, in chosen, messages is no list"),
        ({"batch_pairs": 0}, "--batch_pairs=0: expected a number above zero"),
        ({"val_fraction": 1.0}, "--val_fraction=1: all rows are held out; lower --val_fraction"),
        ({"val_fraction": 0.0}, "of 60 rows is held out for validation; raise --val_fraction"),
    ):
        fields = {"model": base_run, "data": preferences, "out_dir": tmp_path / "run"}
        with pytest.raises(InputError, match=message):
            dpo_gpt.main(dpo_config(**{**fields, **change}))
    assert json.loads(preferences.read_text().splitlines()[0])["chosen"]  # nothing was touched


@pytest.mark.slow
def test_the_loss_and_its_gradients_are_those_of_trl(base_run, tokenizer, tmp_path):
    """TRL's DPOTrainer, with a reference model beside the policy, on the same tokens."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    (train, _), _ = pairs_of(map(preference, range(12)), tokenizer, tmp_path)
    reference, policy = base_run / "step_0000006", tmp_path / "policy"
    small_model().save_pretrained(policy, tokenizer)
    options = {"output_dir": str(tmp_path / "trl"), "beta": 0.5, "report_to": "none", "use_cpu": True}
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(policy),
        AutoModelForCausalLM.from_pretrained(reference),
        trl.DPOConfig(**options, bf16=False),
        train_dataset=Dataset.from_list([preference(i) for i in range(12)]).remove_columns("prompt"),
        processing_class=tokenizer,
    )
    order = [*range(0, len(train), 2), *range(1, len(train), 2)]  # first all chosen, then all rejected
    rows = collate(train, order, 64)
    lengths = torch.tensor([len(train[i][0]) for i in order])[:, None]
    seen = torch.arange(rows["input_ids"].size(1)) < lengths
    completion = torch.zeros_like(rows["targets"])
    completion[:, 1:] = rows["targets"][:, :-1] != IGNORE
    inputs = {"input_ids": rows["input_ids"], "attention_mask": seen.long(), "completion_mask": completion}
    theirs = trainer.compute_loss(trainer.model, inputs)
    theirs.backward()

    judge, module = (PreferenceModel(GPTModel.from_pretrained(path), 0.5) for path in (reference, policy))
    known = reference_log_probs(tmp_path / "reference.npy", judge, train, T=64, size=4, ranks=ALONE)
    (batch,) = micro_batches(train, known, range(len(train) // 2), T=64, size=100, ranks=ALONE)
    ours = module(**batch) / dpo_gpt.pairs_in(batch)
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    gradients = dict(trainer.model.named_parameters())
    for name, p in module.policy.named_parameters():
        assert (p.grad - gradients[name].grad).norm() <= 1e-4 * p.grad.norm()


def test_a_tie_counts_half_in_the_accuracy(tokenizer, tmp_path):
    (train, _), _ = pairs_of(map(preference, range(12)), tokenizer, tmp_path)
    module = PreferenceModel(small_model(), 0.5)
    batch = collate(train, range(6), 64)
    known = module(**batch).detach()
    for change, expected in ((0.0, 0.5), (-1.0, 1.0), (1.0, 0.0)):
        reference = known.clone()
        reference[0::2] += change
        _, preferred = module(**batch, reference=reference, per_token=True)
        assert preferred.tolist() == [expected] * 3
