"""Whole fine-tuning runs."""

import dataclasses

import pytest
from conftest import sft_config

import sft_gpt
from common import InputError


def test_mistakes_in_a_fine_tuning_run_are_told(base_run, chats, tmp_path):
    for change, message in (
        ({"max_length": 1000}, "--max_length=1000 is beyond the model's context of 64"),
        ({"batch_tokens": 32}, "are 0 rows of 64"),
        ({"data": str(tmp_path / "none.jsonl")}, "none.jsonl does not exist"),
        ({"val_fraction": 0.0}, "rows is held out for validation; raise --val_fraction"),
        ({"val_fraction": 1.0}, "rows are held out; lower --val_fraction"),
    ):
        with pytest.raises(InputError, match=message):
            sft_gpt.main(dataclasses.replace(sft_config(base_run, chats, tmp_path / "run"), **change))
