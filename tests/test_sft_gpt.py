"""Whole fine-tuning runs."""

import dataclasses
import multiprocessing
import time

import pytest
from conftest import sft_config

import sft
import sft_gpt
from common import InputError
from tokenization import load_tokenizer


def test_mistakes_in_a_fine_tuning_run_are_told(base_run, chats, tmp_path):
    for change, message in (
        ({"max_length": 1000}, "--max_length=1000 is beyond the model's context of 64"),
        ({"batch_tokens": 32}, "are 0 rows of 64"),
        ({"data": str(tmp_path / "none.jsonl")}, "none.jsonl does not exist"),
        ({"val_fraction": 0.0}, "rows is held out for validation; raise --val_fraction, for example to 0.0"),
        ({"timeout_minutes": 90}, "--timeout_minutes=90: expected at most 55"),
        ({"val_fraction": 1.0}, "--val_fraction=1: all rows are held out; lower --val_fraction"),
        ({"val_fraction": 0.999}, "all of 120 rows are held out; lower --val_fraction"),
    ):
        with pytest.raises(InputError, match=message):
            sft_gpt.main(dataclasses.replace(sft_config(base_run, chats, tmp_path / "run"), **change))


def test_a_second_run_finds_the_rendered_conversations_wherever_its_folder_and_the_data_are(
    base_run, chats, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sft_gpt.main(sft_config(base_run, chats, tmp_path / "a", max_steps=1, cache_dir=""))
    moved = tmp_path / "moved" / chats.name
    moved.parent.mkdir()
    moved.write_bytes(chats.read_bytes())
    monkeypatch.setattr(sft, "write_splits", None)  # not called again
    sft_gpt.main(sft_config(base_run, moved, tmp_path / "b", max_steps=1, cache_dir=""))
    assert len(list((tmp_path / "cache").glob("*/data-*/report.json"))) == 1
    assert not list(tmp_path.glob("[ab]/data-*"))


def test_conversations_rendered_with_more_bad_rows_than_a_run_allows_do_not_serve_it(
    base_run, chats, tmp_path
):
    data = tmp_path / "data.jsonl"
    data.write_text(chats.read_text() + '{"messages": null}\n')
    config = sft_config(base_run, data, tmp_path / "a", max_steps=1, cache_dir=str(tmp_path / "cache"))
    sft_gpt.main(dataclasses.replace(config, max_bad_rows=0.5))
    strict = dataclasses.replace(config, out_dir=str(tmp_path / "b"), max_bad_rows=0.0)
    with pytest.raises(InputError, match=r"1 of .* rows cannot be used"):
        sft_gpt.main(strict)


def render(folder, chats, tokenizer_dir, entered, barrier) -> None:
    def slow():
        entered.set()
        for conversation in sft_gpt.conversations(sft_gpt.Config(data=str(chats))):
            time.sleep(0.005)
            yield conversation

    tokenizer = load_tokenizer(tokenizer_dir)
    barrier.wait(240)
    sft.prepare_conversations(folder, slow(), tokenizer, max_length=64, val_fraction=0.2)


@pytest.mark.slow
def test_two_runs_that_want_the_same_data_render_it_once(chats, tokenizer_dir, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    entered, barrier = [spawn.Event(), spawn.Event()], spawn.Barrier(2)
    runs = [
        spawn.Process(target=render, args=(tmp_path / "data", chats, tokenizer_dir, event, barrier))
        for event in entered
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join(300)
    assert [run.exitcode for run in runs] == [0, 0]
    assert [event.is_set() for event in entered].count(True) == 1  # the second waited, and read nothing
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"data"}
