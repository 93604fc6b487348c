"""What of a run will certainly fail: one sentence each, from settings, names, sizes and headers alone."""

import shutil
import sys

import pytest
import torch
from conftest import dpo_config, flags, pretrain_config, refused, run, sft_config

import checks
import pretrain_gpt
from checks import check_data, check_downloaded, find_run, room_problem
from common import parse_config, write_json
from gpt import GPTConfig, GPTModel
from sources import commit_note


def test_what_a_run_starts_from_gives_its_shape_steps_and_lengths(base_run, data_dir, chats, preferences):
    known = find_run(pretrain_config(data_dir, "out", batch_tokens=256), 8)
    assert (known.T, known.unit, known.step, known.max_steps) == (32, "windows", 8, 6)
    shape = GPTModel.from_pretrained(base_run / "step_0000006").config
    assert known.shape.vocab_size == shape.vocab_size and known.shape.hidden_size == shape.hidden_size
    tuned = find_run(sft_config(base_run, chats, "out", max_length=0, batch_tokens=512), 8)
    assert (tuned.shape, tuned.T, tuned.unit, tuned.step) == (shape, 64, "rows", 8)
    preferred = find_run(dpo_config(base_run, preferences, "out", max_length=48), 8)
    assert (preferred.shape, preferred.T, preferred.unit, preferred.step) == (shape, 48, "pairs", 8)
    phase = pretrain_gpt.Config(init_from=str(base_run), context_length=128)
    assert find_run(phase, 8).shape.hidden_size == shape.hidden_size
    assert find_run(phase, 8).shape.max_position_embeddings == 128


def test_settings_that_contradict_each_other_or_the_model_are_one_sentence(
    base_run, data_dir, chats, tmp_path
):
    pretraining, out = pretrain_config(data_dir, tmp_path), tmp_path / "out"
    refused("are 8 windows of 32, fewer than the 9 ranks", find_run, pretraining, 9)
    refused("is no multiple of --save_every", find_run, pretrain_config(data_dir, out, keep_every=3), 1)
    refused("not divisible by num_att", find_run, pretrain_config(data_dir, out, hidden_size=33), 1)
    phase = pretrain_gpt.Config(init_from=str(base_run), num_hidden_layers=5, context_length=64)
    refused("another shape than the flags ask for", find_run, phase, 1)
    refused("are 8 rows of 64, fewer than the 16 ranks", find_run, sft_config(base_run, chats, out), 16)
    refused("beyond the model's context", find_run, sft_config(base_run, chats, out, max_length=65), 1)
    refused("--overlong=cut", find_run, sft_config(base_run, chats, out, overlong="cut"), 1)
    refused("a step of 8 pairs is too few for 9", find_run, dpo_config(base_run, chats, out), 9)


def test_a_model_that_is_not_there_is_told_unless_the_hub_may_have_it(base_run, chats, tmp_path, monkeypatch):
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    refused("neither a model", find_run, sft_config(empty, chats, out), 1)
    refused("no model directory /nowhere/at/all", find_run, sft_config("/nowhere/at/all", chats, out), 1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE=1 forbids it", find_run, sft_config("some/model", chats, out), 1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert find_run(sft_config("some/model", chats, out), 1) is None


def test_a_downloaded_model_of_the_hub_has_its_shape(base_run, chats, tmp_path, monkeypatch):
    cached = tmp_path / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    shutil.copytree(base_run / "step_0000006", cached / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert find_run(sft_config("some/model", chats, tmp_path / "out"), 1).shape.hidden_size == 32


def test_a_run_that_goes_on_needs_the_model_no_more_that_it_started_from(base_run, chats, tmp_path):
    config = sft_config("/gone", chats, tmp_path)
    refused("no model directory /gone", find_run, config, 1)
    shutil.copytree(base_run / "step_0000006", tmp_path / "step_0000002")
    assert find_run(config, 1).shape.hidden_size == 32
    (tmp_path / "step_0000002" / "checkpoint.json").unlink()  # it was not written to the end
    refused("no model directory /gone", find_run, config, 1)


def test_data_that_are_missing_too_few_or_do_not_fit_are_one_sentence(
    base_run, data_dir, chats, preferences, tmp_path
):
    check_data(pretrain_config(data_dir, "out"))
    refused("holds no token shards; make", check_data, pretrain_config(tmp_path / "no", "out"))
    refused("too few for one window", check_data, pretrain_config(data_dir, "out", context_length=10**6))
    refused("names a folder twice", check_data, pretrain_config(f"{data_dir},{data_dir}", "out"))
    unknown = pretrain_config(data_dir, "out", tokenizer=str(tmp_path / "no"))
    refused("no tokenizer could be loaded from", check_data, unknown)
    other = shutil.copytree(data_dir, tmp_path / "other")
    manifest = checks.read_manifest(other)
    write_json(other / "manifest.json", manifest | {"tokenizer_fingerprint": "another"})
    refused("different tokenizers", check_data, pretrain_config(f"{data_dir},{other}", "out"))
    (other / "manifest.json").unlink()
    refused("no manifest.json to name the tokenizer", check_data, pretrain_config(other, "out"))
    for config in (sft_config, dpo_config):
        check_data(config(base_run, chats, "out"))
        check_data(config(base_run, "some/dataset", "out"))
        refused("does not exist", check_data, config(base_run, tmp_path / "no.jsonl", "out"))
    mixed = f"{chats}:1,{tmp_path}/no.jsonl:2"
    refused("does not exist", check_data, sft_config(base_run, mixed, "out"))
    refused("2 values for 2|3 values for 2", check_data, sft_config(base_run, mixed, "out", column="a,b,c"))


def test_a_disk_that_lacks_room_is_told_with_the_checkpoints_real_size(
    base_run, chats, tmp_path, monkeypatch
):
    real, config = shutil.disk_usage(tmp_path), sft_config(base_run, chats, tmp_path)
    asked = find_run(config, 1)
    one = checks.checkpoint_size(asked.shape, "adamw")
    assert one == 12 * GPTModel.from_pretrained(base_run / "step_0000006").num_parameters()
    free = real._replace(free=one + 50_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    assert "at most 2 of" in room_problem(config, asked)
    asked.max_steps = 0  # so many that the data tell; one has to fit
    assert room_problem(config, asked) is None
    free = real._replace(free=one + 49_999_999)
    assert "at most 1 of" in room_problem(config, asked)
    config.max_steps = 2
    refused("at most 1 of", checks.main, config)


@pytest.mark.slow
@pytest.mark.parametrize("script", checks.SCRIPTS)
def test_each_script_is_checked_by_its_name_and_flags_and_nothing_is_written(
    script, base_run, data_dir, chats, preferences, tmp_path
):
    config = {
        "pretrain_gpt.py": pretrain_config(data_dir, tmp_path / "out"),
        "sft_gpt.py": sft_config(base_run, chats, tmp_path / "out"),
        "dpo_gpt.py": dpo_config(base_run, preferences, tmp_path / "out"),
    }[script]
    done = run("checks.py", script, *flags(config))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    wrong = run("checks.py", script, *flags(config), "--keep_every=3")
    assert (
        wrong.returncode == 1
        and wrong.stderr.startswith("error: --keep_every=3")
        and not list(tmp_path.iterdir())
    )


def test_without_a_name_it_is_pretraining_and_no_tokenizer_is_loaded(data_dir, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["checks.py", "--lr=1"])
    assert checks.take_script() is pretrain_gpt and sys.argv == ["checks.py", "--lr=1"]
    monkeypatch.setattr(sys, "argv", ["checks.py", "dpo_gpt.py", "--lr=1"])
    assert checks.take_script().__name__ == "dpo_gpt" and sys.argv == ["checks.py", "--lr=1"]
    config = parse_config(pretrain_gpt.Config, [f"--data_dir={data_dir}"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert find_run(config, 1).shape.vocab_size == 320


def test_the_size_of_a_model_that_no_machine_holds_is_told():
    shape = GPTConfig(hidden_size=2**16, num_hidden_layers=100, num_attention_heads=2**9)
    assert checks.checkpoint_size(shape, "muon") > 4e13 and torch.empty(0).device.type == "cpu"


def test_a_dataset_of_the_hub_that_was_never_read_is_told_where_there_is_no_network(
    base_run, tmp_path, monkeypatch
):
    config = sft_config(base_run, "some/chats:0.5,other/chats:0.5", tmp_path / "out")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    check_downloaded(config)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("some/chats is a dataset of the hub.*--local-dir=data/chats", check_downloaded, config)
    for name in ("some/chats", "other/chats"):  # as newest_commit notes it where a run has read it
        write_json(commit_note(name, tmp_path / "out"), {"dataset": name, "commit": "abc"})
    check_downloaded(config)
