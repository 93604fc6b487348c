"""A stopped run goes on as if nothing had happened, or is refused with the reason."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import planted
import pytest
import torch
from conftest import ALONE, SMALL, dpo_config, losses, pretrain_config, sft_config, text, weights, write_jsonl

import checkpoint
import dpo_gpt
import prepare_data
import pretrain_gpt
import resume
import sft_gpt
from checkpoint import damage, newest_checkpoint
from common import InputError, file_sha256, read_records
from data import TokenLoader
from gpt import GPTModel
from optim import load_state_by_name, make_optimizer
from resume import FREE_FIELDS, load_resumable


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_resumed_pretraining_equals_an_undisturbed_one_bit_for_bit(optimizer, data_dir, tmp_path):
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path / "straight", optimizer=optimizer))
    shutil.copytree(tmp_path / "straight", tmp_path / "twice")
    for kept in (4, 2):  # as if it had died after these steps, one after the other
        for step in (4, 6):
            if step > kept:
                shutil.rmtree(tmp_path / "twice" / f"step_{step:07d}")
        pretrain_gpt.main(pretrain_config(data_dir, tmp_path / "twice", optimizer=optimizer))
        for step in (2, 4, 6):
            assert weights(tmp_path / "twice", step) == weights(tmp_path / "straight", step)
        assert losses(tmp_path / "twice") == losses(tmp_path / "straight")
    path = tmp_path / "straight" / "step_0000002"
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path / "branch", optimizer=optimizer, resume=str(path)))
    assert weights(tmp_path / "branch", 6) == weights(tmp_path / "straight", 6)


def test_a_resumed_fine_tuning_equals_an_undisturbed_one_bit_for_bit(base_run, chats, tmp_path):
    sft_gpt.main(sft_config(base_run, chats, tmp_path / "straight"))
    shutil.copytree(tmp_path / "straight", tmp_path / "twice")
    shutil.rmtree(tmp_path / "twice" / "step_0000004")
    sft_gpt.main(sft_config(base_run, chats, tmp_path / "twice"))
    assert weights(tmp_path / "twice", 4) == weights(tmp_path / "straight", 4)
    assert losses(tmp_path / "twice") == losses(tmp_path / "straight")
    answers = [read_records(tmp_path / name / "answers.jsonl") for name in ("straight", "twice")]
    assert answers[0] == answers[1]


def test_a_resumed_run_reads_no_window_twice(data_dir, tmp_path, monkeypatch):
    """nanoGPT draws the same batches again after a resume; here every step has its own."""
    read = []
    original = TokenLoader.step_windows
    monkeypatch.setattr(
        TokenLoader, "step_windows", lambda *a: read.append(original(*a).tolist()) or original(*a)
    )
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path))
    shutil.rmtree(tmp_path / "step_0000006")
    shutil.rmtree(tmp_path / "step_0000004")
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path))
    assert read[:6] == read[:2] + read[6:]
    windows = [w for batch in read[:6] for w in batch]
    assert len(windows) == len(set(windows))


def test_going_back_to_an_earlier_checkpoint_needs_a_folder_without_later_ones(data_dir, base_run, tmp_path):
    path = base_run / "step_0000002"
    for out_dir in (base_run, tmp_path):
        (tmp_path / "step_0000001").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=r"holds other checkpoints \(step_.*--resume=auto"):
            pretrain_gpt.main(pretrain_config(data_dir, out_dir, context_length=64, resume=str(path)))


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"qk_norm": False}, {"optimizer": "adamw"}])
def test_a_folder_with_another_runs_checkpoints_is_refused(change, data_dir, base_run):
    before = sorted(base_run.rglob("*"))
    (name,) = change
    for force in (False, True):
        with pytest.raises(InputError, match=rf"belongs to another run .*{name}"):
            pretrain_gpt.main(pretrain_config(data_dir, base_run, context_length=64, force=force, **change))
    with pytest.raises(InputError, match="holds checkpoints already"):
        pretrain_gpt.main(pretrain_config(data_dir, base_run, context_length=64, resume="none"))
    assert sorted(base_run.rglob("*")) == before


def test_changed_settings_are_listed_and_those_that_break_exactness_need_force(data_dir, tmp_path, capsys):
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path, max_steps=3))
    free = {"micro_batch_size": 8, "log_every": 2}
    with pytest.raises(InputError, match=r"other settings \(max_steps 3 → 5, lr 0.003 → 0.001\); take those"):
        pretrain_gpt.main(pretrain_config(data_dir, tmp_path, max_steps=5, lr=1e-3, **free))
    assert newest_checkpoint(tmp_path).name == "step_0000003"
    capsys.readouterr()
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path, max_steps=5, lr=1e-3, force=True, **free))
    printed = capsys.readouterr().out
    assert f"changed since {tmp_path}/step_0000003: max_steps 3 → 5, lr 0.003 → 0.001, micro" in printed
    assert "log_every 1 → 2" in printed and newest_checkpoint(tmp_path).name == "step_0000005"
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path, max_steps=5, lr=1e-3, keep_every=2))
    assert "changed since" in (printed := capsys.readouterr().out) and "is finished" in printed


def test_every_free_field_is_a_field_of_a_script():
    known = {
        f.name for c in (pretrain_gpt.Config, sft_gpt.Config, dpo_gpt.Config) for f in dataclasses.fields(c)
    }
    assert set(FREE_FIELDS) <= known


def test_shards_that_changed_since_the_run_began_are_refused(data_dir, base_run, tmp_path, tokenizer_dir):
    source = write_jsonl(tmp_path / "other.jsonl", ({"text": text(i + 1000)} for i in range(400)))
    places = {"source": str(source), "tokenizer": str(tokenizer_dir), "out_dir": str(tmp_path / "data")}
    prepare_data.main(prepare_data.Config(**places, val_fraction=0.1))
    with pytest.raises(InputError, match=r"with other settings \(data '.*--force to go on"):
        pretrain_gpt.main(pretrain_config(tmp_path / "data", base_run, context_length=64))


def test_a_fine_tuning_run_is_another_when_its_model_or_data_change(base_run, chats, data_dir, tmp_path):
    base, data = tmp_path / "base", tmp_path / "chats.jsonl"
    shutil.copytree(base_run, base)
    shutil.copy(chats, data)
    sft_gpt.main(sft_config(base, data, tmp_path / "run"))
    sft_gpt.main(sft_config(f"{base}/", data, tmp_path / "run"))  # the same, however it is spelled
    data.write_text("".join(data.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(InputError, match=r"with other settings \(data_files"):
        sft_gpt.main(sft_config(base, data, tmp_path / "run"))
    shutil.copy(chats, data)
    shutil.rmtree(base)
    pretrain_gpt.main(pretrain_config(data_dir, base, context_length=64, seed=1))
    with pytest.raises(InputError, match=r"with other settings \(weights"):
        sft_gpt.main(sft_config(base, data, tmp_path / "run"))


@pytest.fixture(scope="session")
def sharded(tokenizer_dir, tmp_path_factory):
    """Training tokens in six shards, of which all but the last have the same size."""
    folder = tmp_path_factory.mktemp("sharded")
    source = write_jsonl(folder / "texts.jsonl", ({"text": text(i)} for i in range(400)))
    places = {"source": str(source), "tokenizer": str(tokenizer_dir), "out_dir": str(folder / "data")}
    prepare_data.main(prepare_data.Config(**places, val_fraction=0.1, shard_tokens=5000))
    return folder / "data"


def swap(data: Path) -> None:
    a, b, other = (data / f"train_00000{i}.bin" for i in (0, 1, 9))
    for old, new in ((a, other), (b, a), (other, b)):
        old.rename(new)


def change_a_token(data: Path) -> None:
    with open(data / "train_000001.bin", "r+b") as file:
        file.seek(3000)
        file.write(b"\7\0")


def add_a_shard(data: Path) -> None:
    shutil.copy(data / "train_000001.bin", data / "train_000007.bin")


@pytest.mark.parametrize("manifest", [True, False], ids=["with a manifest", "without one"])
@pytest.mark.parametrize("change", [swap, change_a_token, add_a_shard])
def test_shards_changed_since_the_run_began_are_refused(
    change, manifest, sharded, tokenizer_dir, tmp_path, capsys
):
    data = tmp_path / "data"
    shutil.copytree(sharded, data)
    if not manifest:
        (data / "manifest.json").unlink()
    config = pretrain_config(data, tmp_path / "run", **SMALL | {"max_steps": 2}, tokenizer=str(tokenizer_dir))
    pretrain_gpt.main(config)
    change(data)
    if manifest and change is add_a_shard:  # it is not among the manifest's, and is not read
        return pretrain_gpt.main(config)
    with pytest.raises(InputError, match=r"SHA-256 differs|other settings .*(data|windows) "):
        pretrain_gpt.main(config)
    if manifest:
        return  # they are not even what was prepared
    capsys.readouterr()
    pretrain_gpt.main(dataclasses.replace(config, force=True))
    printed = capsys.readouterr().out
    assert re.search(rf"changed since {tmp_path}/run/step_0000002: .*(data|windows) \S+ → ", printed), printed


def test_a_checkpoint_from_a_stranger_runs_no_code(data_dir, tmp_path, fresh):
    """Its manifest is right, so that only the loading itself can refuse it."""
    config = pretrain_config(data_dir, tmp_path / "run", **SMALL)
    assert fresh.submit(planted.forked, "pretrain_gpt", config).result(90)[0] == [0]
    path, mark = tmp_path / "run" / "step_0000006", tmp_path / "code ran"
    state = torch.load(path / "training_state.pt", weights_only=True)
    torch.save(state | {"history": Evil(mark)}, path / "training_state.pt")
    manifest = json.loads((path / "checkpoint.json").read_text())
    file = path / "training_state.pt"
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    (path / "checkpoint.json").write_text(json.dumps(manifest))
    assert damage(path, for_resuming=True) is None
    codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config).result(90)
    assert codes == [1] and not mark.exists(), log
    assert f"error: {file} holds more than tensors, numbers and text" in log, log
    torch.load(file, weights_only=False)
    assert mark.exists()  # the trap works


class Evil:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_model_or_data_that_only_moved_is_the_same(base_run, chats, tmp_path):
    base, data = tmp_path / "base", tmp_path / "data" / chats.name
    sft_gpt.main(sft_config(base_run, chats, tmp_path / "run"))
    shutil.copytree(base_run, base)
    data.parent.mkdir()
    shutil.copy(chats, data)
    sft_gpt.main(sft_config(base, data, tmp_path / "run"))
    data.write_text(data.read_text().replace("stone", "store"))
    with pytest.raises(InputError, match=r"with other settings \(data_files .*, data "):
        sft_gpt.main(sft_config(base, data, tmp_path / "run"))


def test_a_start_reads_each_file_once_to_verify_it_and_a_base_models_optimizer_state_never(
    base_run, chats, tmp_path, monkeypatch
):
    hashed = []

    def counting(path):
        hashed.append(path)
        return file_sha256(path)

    for room in (checkpoint, resume):
        monkeypatch.setattr(room, "file_sha256", counting)
    base = base_run / "step_0000006"
    sft_gpt.main(sft_config(base_run, chats, tmp_path / "run", max_steps=2))
    of_base = [path.name for path in hashed if path.parent == base]
    assert "model.safetensors" in of_base and len(of_base) == len(set(of_base))
    assert "training_state.pt" not in of_base
    hashed.clear()
    sft_gpt.main(sft_config(base_run, chats, tmp_path / "run", max_steps=2))
    assert len(hashed) == len(set(hashed))
    assert tmp_path / "run" / "step_0000002" / "training_state.pt" in hashed


def test_the_optimizers_state_is_not_kept_twice(base_run):
    state = load_resumable(base_run, "auto", ALONE)
    model = GPTModel.from_pretrained(state["path"])
    rates = {"lr": 0.1, "matrix_lr": 0.1, "betas": (0.9, 0.9), "weight_decay": 0.0}
    optimizer = make_optimizer(model, "muon", ranks=ALONE, **rates)
    loaded = state.pop("optimizer")
    load_state_by_name(model, optimizer, loaded)
    for name, p in model.named_parameters():
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, loaded[name][key])
            assert value.data_ptr() != loaded[name][key].data_ptr()  # a copy: the file's pages may go


def mapped(path: Path) -> bool:
    """Whether this process has a file mapped into its memory."""
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("script", ["pretrain_gpt", "sft_gpt", "dpo_gpt"])
def test_a_loaded_state_is_mapped_not_read_and_let_go_before_the_first_step(
    script, data_dir, base_run, chats, preferences, tmp_path, monkeypatch
):
    module, config = {
        "pretrain_gpt": (pretrain_gpt, pretrain_config(data_dir, tmp_path, max_steps=4)),
        "sft_gpt": (sft_gpt, sft_config(base_run, chats, tmp_path)),
        "dpo_gpt": (dpo_gpt, dpo_config(base_run, preferences, tmp_path)),
    }[script]
    module.main(config)
    shutil.rmtree(tmp_path / "step_0000004")
    state, seen = tmp_path / "step_0000002" / "training_state.pt", []
    load, forward_backward = resume.load_state, module.forward_backward

    def loading(path):
        loaded = load(path)
        seen.append(("loaded", mapped(state)))
        return loaded

    def step(*arguments, **named):
        seen.append(("step", mapped(state)))
        return forward_backward(*arguments, **named)

    monkeypatch.setattr(resume, "load_state", loading)
    monkeypatch.setattr(module, "forward_backward", step)
    module.main(config)
    assert seen == [("loaded", True), ("step", False), ("step", False)]
