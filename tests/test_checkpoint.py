"""Writing checkpoints, telling whole from damaged ones, finding models."""

import json
import shutil

import planted
import pytest
import torch
from conftest import ALONE, SMALL, dpo_config, pretrain_config, sft_config, small_model, weights
from huggingface_hub import ModelCard

import checkpoint
import dpo_gpt
import pretrain_gpt
import sft_gpt
from checkpoint import (
    SPARE,
    Checkpoints,
    checkpoint_bytes,
    damage,
    find_model,
    kept,
    lacking_room,
    list_checkpoints,
    most_checkpoints,
    newest_checkpoint,
    step_of,
    told_name,
)
from common import InputError, read_json, read_records
from gpt import GPTConfig, GPTModel
from optim import make_optimizer
from resume import load_resumable


@pytest.mark.parametrize(
    "name", ["model.safetensors", "training_state.pt", "config.json", "checkpoint.json", "tokenizer.json"]
)
@pytest.mark.parametrize("cut", [True, False], ids=["cut short", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(name, cut, base_run, tmp_path, capsys):
    shutil.copytree(base_run, tmp_path / "run")
    file = tmp_path / "run" / "step_0000006" / name
    file.write_bytes(file.read_bytes()[:-10]) if cut else file.unlink()
    assert newest_checkpoint(tmp_path / "run").name == "step_0000004"
    assert f"passing over {file.parent}: {name}" in capsys.readouterr().err
    with pytest.raises(InputError, match=f"cannot be resumed: {name}"):
        load_resumable(tmp_path / "run", str(file.parent), ALONE)


def test_a_crash_while_saving_leaves_the_checkpoint_before(data_dir, tmp_path, monkeypatch):
    original, calls = checkpoint.torch.save, []

    def crash_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(*arguments)

    pretrain_gpt.main(pretrain_config(data_dir, tmp_path / "straight"))
    monkeypatch.setattr(checkpoint.torch, "save", crash_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        pretrain_gpt.main(pretrain_config(data_dir, tmp_path / "run"))
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step_0000002"]
    monkeypatch.undo()
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path / "run"))
    assert weights(tmp_path / "run", 6) == weights(tmp_path / "straight", 6)
    assert not list((tmp_path / "run").glob("*.partial"))


def test_a_damaged_newer_checkpoint_never_displaces_a_whole_one(data_dir, tmp_path):
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path, keep_last=2))
    (tmp_path / "step_0000006" / "model.safetensors").write_bytes(b"")
    config = pretrain_config(data_dir, tmp_path, keep_last=1, save_every=1)
    original = Checkpoints.save

    def crash_after_step_5(checkpoints, *arguments, **named):
        original(checkpoints, *arguments, **named)
        checkpoints.wait()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", crash_after_step_5)
        pretrain_gpt.main(config)
    assert newest_checkpoint(tmp_path).name == "step_0000005"
    pretrain_gpt.main(config)
    assert newest_checkpoint(tmp_path).name == "step_0000006"


def test_old_checkpoints_are_deleted_once_the_new_one_is_whole(data_dir, tmp_path):
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path, keep_last=2))
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_0000004", "step_0000006"]


def test_a_full_disk_is_told_before_anything_is_written(data_dir, tmp_path, monkeypatch):
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: real._replace(free=10_000_000))
    with pytest.raises(InputError, match=r"a checkpoint needs 0\.05 GB and .* has 0\.01 GB free"):
        pretrain_gpt.main(pretrain_config(data_dir, tmp_path))
    assert not list(tmp_path.glob("*step_*"))


def test_a_disk_that_fills_up_while_saving_leaves_the_checkpoint_before(data_dir, tmp_path, monkeypatch):
    """Libraries tell of a full disk each in their own way: torch.save by a RuntimeError."""
    real, original, calls = shutil.disk_usage(tmp_path), torch.save, []

    def full_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: real._replace(free=1_000_000))
            raise RuntimeError("PytorchStreamWriter failed writing file data/0")
        original(*arguments)

    monkeypatch.setattr(checkpoint.torch, "save", full_at_the_second)
    with pytest.raises(InputError, match=r"a checkpoint needs 0\.05 GB and .* has 0\.00 GB free"):
        pretrain_gpt.main(pretrain_config(data_dir, tmp_path))
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_0000002"]
    assert not list(tmp_path.glob(".step_*"))
    monkeypatch.undo()
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path))
    assert newest_checkpoint(tmp_path).name == "step_0000006"


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_written_checkpoint_has_the_bytes_that_its_shape_tells(optimizer, tied, data_dir, tmp_path):
    config = pretrain_config(data_dir, tmp_path, max_steps=1, optimizer=optimizer, tie_word_embeddings=tied)
    config.hidden_size, config.eval_tokens = 256, 64
    pretrain_gpt.main(config)
    (folder,) = list_checkpoints(tmp_path)
    with torch.device("meta"):
        model = GPTModel(GPTConfig.from_hf(read_json(folder / "config.json")))
    rates = {"lr": 1e-3, "matrix_lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    told = checkpoint_bytes(make_optimizer(model, optimizer, ranks=ALONE, **rates))
    written = sum(path.stat().st_size for path in folder.iterdir())
    assert written > 10e6 and told == pytest.approx(written, rel=0.01)


def written(out_dir, keep_every: int = 0, **rules) -> Checkpoints:
    about = {"tokenizer": None, "identity": {}, "settings": {}, "origin": ""}
    return Checkpoints(out_dir, ALONE, **about, keep_every=keep_every, **rules)


@pytest.mark.parametrize(
    "max_steps, keep_last, keep_every",
    [(20, 0, 0), (2, 3, 0), (19, 1, 0), (20, 2, 0), (24, 2, 6), (25, 3, 4)],
)
def test_the_most_checkpoints_are_those_that_lie_there_while_one_is_written(
    max_steps, keep_last, keep_every, tmp_path
):
    rules, held = {"keep_last": keep_last, "keep_every": keep_every}, []
    checkpoints = written(tmp_path, **rules)

    def write_files(folder):
        folder.mkdir()
        held.append(len(list(tmp_path.iterdir())))

    steps = [*range(2, max_steps, 2), max_steps]
    for i, step in enumerate(steps):
        existing = [step_of(path) for path in list_checkpoints(tmp_path)]
        checkpoints.write(step, write_files, 0)
        if i == len(steps) // 2:
            halfway = existing, len(held) - 1
    assert most_checkpoints(max_steps, save_every=2, **rules) == max(held)
    existing, begin = halfway
    assert most_checkpoints(max_steps, save_every=2, existing=existing, **rules) == max(held[begin:])
    there = [step_of(path) for path in list_checkpoints(tmp_path)]
    assert there == kept(steps, **rules)
    assert most_checkpoints(max_steps, save_every=2, existing=there, **rules) == len(there)


def test_room_is_asked_for_what_is_not_there_yet(tmp_path, monkeypatch):
    real, asked = shutil.disk_usage(tmp_path), []

    def disk_usage(folder):
        asked.append(folder)
        return real._replace(free=2 * 10**9 + SPARE)

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", disk_usage)
    settings = {"max_steps": 50, "save_every": 10, "keep_last": 2, "keep_every": 0}
    run = tmp_path / "out" / "run"
    assert "at most 3 of 1.00 GB at a time, need 3.05 GB more" in lacking_room(run, 10**9, **settings)
    assert asked == [tmp_path]  # the folder is made later
    assert lacking_room(run, 10**9, **settings | {"keep_last": 1}) is None
    (run / "step_0000010").mkdir(parents=True)
    assert lacking_room(run, 10**9, **settings) is None and asked[-1] == run
    told = lacking_room(run, 3 * 10**9, **settings)
    assert "at most 3 of 3.00 GB at a time, 1 of them there already, need 6.05 GB more" in told
    (run / ".step_0000020.partial").mkdir()  # of a killed run; the next saving deletes it first
    with open(run / ".step_0000020.partial" / "model.safetensors", "wb") as file:
        file.truncate(7 * 10**9)  # a sparse file
    assert lacking_room(run, 3 * 10**9, **settings) is None
    (run / "step_0000010").rename(run / "step_0000050")
    assert lacking_room(run, 10**12, **settings) is None  # the run is finished


def test_the_model_card_tells_origin_size_and_losses(base_run):
    card = (base_run / "step_0000006" / "README.md").read_text()
    found = ModelCard.load(base_run / "step_0000006" / "README.md", ignore_metadata_errors=False)
    assert found.data.to_dict() == {"library_name": "transformers", "pipeline_tag": "text-generation"}
    rows = read_records(base_run / "metrics.jsonl")
    assert card.startswith("---\nlibrary_name: transformers\n") and "texts.jsonl" in card
    assert "1,536 tokens in 6 steps" in card and "Qwen3ForCausalLM" in card and "max_steps: 6" in card
    assert "hidden_size: 32\n" in card and "rope_theta: 10000.0\n" in card
    assert f"step 6, val bpb: {rows[6]['val_bpb']:.4f} bits/byte" in card
    assert f"step 6, val loss: {rows[6]['val_loss']:.4f} nats/token" in card
    assert f"step 6, loss: {rows[6]['loss']:.4f} nats/token" in card


def test_a_checkpoints_state_holds_no_code(base_run):
    state = torch.load(base_run / "step_0000006" / "training_state.pt", weights_only=True)
    assert state["step"] == 6 and set(state["optimizer"]) == set(dict(small_model().named_parameters()))


def test_a_model_is_found_by_its_runs_folder(base_run, tmp_path):
    assert find_model(str(base_run)) == base_run / "step_0000006"
    assert find_model("someone/model") == "someone/model"
    assert find_model(str(base_run / "step_0000004")) == str(base_run / "step_0000004")
    with pytest.raises(InputError, match="holds neither a model"):
        find_model(str(tmp_path))


def test_old_checkpoints_go_but_for_the_newest_and_every_nth(data_dir, tmp_path, fresh):
    config = pretrain_config(
        data_dir, tmp_path, **SMALL | {"max_steps": 11}, save_every=1, keep_last=2, keep_every=3
    )
    assert fresh.submit(planted.forked, "pretrain_gpt", config).result(90)[0] == [0]
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [3, 6, 9, 10, 11]


def test_checkpoints_are_in_the_order_of_their_steps_beyond_seven_digits(tmp_path):
    for step in (10_000_000, 9_999_999, 100_000_000, 5):
        (tmp_path / f"step_{step:07d}").mkdir()
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [5, 9_999_999, 10_000_000, 100_000_000]


def test_a_model_card_may_be_edited_and_a_damaged_optimizer_state_stops_no_chat(base_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(base_run, run)
    newest = run / "step_0000006"
    (newest / "README.md").write_text("mine")
    assert damage(newest, for_resuming=True) is None
    (newest / "training_state.pt").write_bytes(b"cut")
    assert damage(newest, for_resuming=True) == "training_state.pt is not what was saved"
    assert find_model(str(run)) == newest and newest_checkpoint(run).name == "step_0000004"
    (newest / "config.json").write_text("{}")
    assert find_model(str(run)).name == "step_0000004"
    assert "passing over" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["/dev/zero", "../x", "..", "", "a/b", "x" * 300, "a\0b"])
def test_a_manifest_that_names_other_places_is_damaged_and_nothing_there_is_read(
    name, base_run, tmp_path, monkeypatch
):
    shutil.copytree(base_run / "step_0000006", tmp_path / "run")
    (tmp_path / "x").write_text("secret")
    manifest = json.loads((tmp_path / "run" / "checkpoint.json").read_text())
    manifest["files"] = {name: {"bytes": 6, "sha256": ""}}
    (tmp_path / "run" / "checkpoint.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(checkpoint, "file_sha256", None)  # never called
    assert damage(tmp_path / "run", for_resuming=True)


def test_an_old_checkpoint_that_cannot_be_deleted_is_told_and_the_others_go(tmp_path, capsys):
    for step in (1, 3, 4):
        (tmp_path / f"step_{step:07d}").mkdir()
    (tmp_path / "step_0000002").symlink_to(tmp_path / "step_0000004")
    checkpoints = Checkpoints(
        tmp_path,
        ALONE,
        tokenizer=None,
        identity={},
        settings={},
        origin="",
        keep_last=1,
        keep_every=0,
        start=4,
    )
    checkpoints.delete_old()
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [2, 4]
    assert f"warning: {tmp_path}/step_0000002 could not be deleted" in capsys.readouterr().err


def test_a_damaged_checkpoint_takes_no_whole_one_s_place(tmp_path):
    for step in (1, 2, 3):
        (tmp_path / f"step_{step:07d}").mkdir()
    checkpoints = written(tmp_path, keep_last=2, start=2)  # if step 3 were whole, the run would go on from it
    found = []
    for step in (3, 4, 5):
        checkpoints.write(step, lambda folder: folder.mkdir(), 0)
        found.append([step_of(path) for path in list_checkpoints(tmp_path)])
        if step == 3:  # the damaged one was written anew
            checkpoints.damaged.append(tmp_path / "step_0000003")
    assert found == [[2, 3], [2, 3, 4], [4, 5]]


def test_cards_tell_a_stranger_what_a_model_was_made_from(base_run, tmp_path):
    (tmp_path / "mine.jsonl").write_text("{}\n")
    paths = f"{tmp_path}/mine.jsonl,{base_run}"
    hub = "[HuggingFaceTB/smol](https://huggingface.co/datasets/HuggingFaceTB/smol)"
    assert told_name(paths) == f"mine.jsonl, {base_run.name}"  # no path of this machine
    assert told_name("HuggingFaceTB/x") == "[HuggingFaceTB/x](https://huggingface.co/HuggingFaceTB/x)"
    assert sft_gpt.told_data("HuggingFaceTB/smol") == f"the conversations of {hub}"
    assert dpo_gpt.told_data(f"{tmp_path}/mine.jsonl") == "the preferences of mine.jsonl"
    assert dpo_gpt.told_data("HuggingFaceTB/smol") == f"the preferences of {hub}"
    told = [
        pretrain_gpt.told_source({"source": "embedded"}),
        sft_gpt.told_data("embedded"),
        pretrain_gpt.told_source({"source": "a/b", "settings": {"config": "sample"}}),
        pretrain_gpt.told_source({"source": "x", "settings": {"source_files": [["b.txt", 1], ["a.txt", 2]]}}),
        pretrain_gpt.told_source({}),
    ]
    assert told == [
        "English summaries of Wikipedia, State of the Union addresses and the World Factbook",
        "short conversations on facts of Wikipedia's summaries and the World Factbook, and small talk",
        "[a/b](https://huggingface.co/datasets/a/b) (sample)",
        "text files: a.txt, b.txt",
        "token shards without a manifest",
    ]


@pytest.mark.parametrize("script", ["sft_gpt", "dpo_gpt"])
def test_the_last_card_of_a_tuned_model_tells_the_last_validation_and_its_origin(
    script, base_run, chats, preferences, tmp_path
):
    module, config = {
        "sft_gpt": (sft_gpt, sft_config(base_run, chats, tmp_path)),
        "dpo_gpt": (dpo_gpt, dpo_config(base_run, preferences, tmp_path)),
    }[script]
    module.main(config)
    card = (tmp_path / "step_0000004" / "README.md").read_text()
    (last,) = [row for row in read_records(tmp_path / "metrics.jsonl") if row["step"] == 4]
    assert f"step 4, val loss: {last['val_loss']:.4f} nats/" in card
    assert f"uned from {base_run.name} on the " in card


def test_a_run_stopped_before_it_saved_promises_no_checkpoint(tmp_path):
    assert "before anything was saved; the same command starts anew" in checkpoint.told_stop(tmp_path)
    (tmp_path / "step_0000003").mkdir()
    assert f"the same command continues from {tmp_path}'s checkpoint" in checkpoint.told_stop(tmp_path)
