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
from conftest import (
    ALONE,
    SMALL,
    assert_recovered,
    dpo_config,
    losses,
    pretrain_config,
    refused,
    sft_config,
    text,
    weights,
    write_jsonl,
)

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
from tokenization import train_tokenizer


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
    assert losses(tmp_path / "branch") == losses(tmp_path / "straight")


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


@pytest.mark.parametrize("counter", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_start_by_torchrun_or_slurm_after_the_first_goes_on_whatever_was_said_at_first(
    counter, base_run, monkeypatch
):
    monkeypatch.setenv(counter, "0")
    for choice, message in (("none", "holds checkpoints already"), (str(base_run / "step_0000002"), "other")):
        with pytest.raises(InputError, match=message):
            resume.find_resumable(base_run, choice)
        monkeypatch.setenv(counter, "1")
        assert resume.find_resumable(base_run, choice).name == "step_0000006"
        monkeypatch.setenv(counter, "0")


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
    fewer = pretrain_config(data_dir, tmp_path, max_steps=4, lr=1e-3, force=True)
    refused("step_0000005 is at step 5 already, beyond the last one, 4", pretrain_gpt.main, fewer)


def test_a_run_whose_rows_are_rendered_otherwise_by_now_needs_force(base_run, chats, tmp_path, monkeypatch):
    split = sft_config(base_run, chats, tmp_path, max_steps=2, overlong="split")
    sft_gpt.main(split)
    monkeypatch.setattr(sft_gpt, "SPLIT_RENDERING", 3)
    refused("rendering 2 → 3.*--force", sft_gpt.main, split)
    sft_gpt.main(dataclasses.replace(split, force=True))


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


@pytest.mark.parametrize("left", ["its checkpoints", "all of it"])
def test_a_run_goes_on_when_the_model_it_began_with_was_deleted_and_still_tells_its_name(
    left, base_run, chats, tmp_path
):
    base = shutil.copytree(base_run, tmp_path / "base")
    config = sft_config(base, chats, tmp_path / "run")
    sft_gpt.main(config)
    before = weights(tmp_path / "run", 4)
    shutil.rmtree(tmp_path / "run" / "step_0000004")
    for folder in [base] if left == "all of it" else list(base.glob("step_*")):
        shutil.rmtree(folder)
    sft_gpt.main(config)
    assert weights(tmp_path / "run", 4) == before
    assert "\nFine-tuned from base on " in (tmp_path / "run" / "step_0000004" / "README.md").read_text()


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


def optimizer_state(out_dir: Path, step: int) -> dict:
    return torch.load(out_dir / f"step_{step:07d}" / "training_state.pt", weights_only=True)["optimizer"]


def phase_config(base, data, out_dir, **changes):
    """A phase to which no shape is given, but for the changes."""
    given = dict(pretrain_config(data, out_dir, init_from=str(base), context_length=64).given)
    for name in pretrain_gpt.SHAPE_FLAGS:
        given.pop(name, None)
    return pretrain_gpt.Config(**given | changes)


@pytest.fixture(scope="session")
def other_data(tokenizer_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other_data")
    source = write_jsonl(folder / "texts.jsonl", ({"text": text(i + 5000)} for i in range(200)))
    places = {"source": str(source), "tokenizer": str(tokenizer_dir), "out_dir": str(folder / "shards")}
    prepare_data.main(prepare_data.Config(**places, val_fraction=0.1))
    return folder / "shards"


def test_a_new_phase_begins_with_the_weights_and_optimizer_of_the_old_at_step_zero(
    base_run, other_data, tmp_path, capsys
):
    """At a learning rate of zero nothing but the moments change, so the beginning shows at the end."""
    still = {"max_steps": 1, "lr": 0.0, "matrix_lr": 0.0, "eval_every": 100}
    pretrain_gpt.main(phase_config(base_run, other_data, tmp_path / "still", **still))
    assert f"starting from {base_run}/step_0000006 with its optimizer state" in capsys.readouterr().out
    assert weights(tmp_path / "still", 1) == weights(base_run, 6)
    before, after = optimizer_state(base_run, 6), optimizer_state(tmp_path / "still", 1)
    assert before["lm_head.weight"]["step"] == 6 and after["lm_head.weight"]["step"] == 7
    unused = other_tokens(other_data, before)  # rows of tokens without a gradient: their moment only shrinks
    for key, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.95)):
        old, new = (state["model.embed_tokens.weight"][key][unused] for state in (before, after))
        torch.testing.assert_close(new, old * beta)
    assert before["model.embed_tokens.weight"]["exp_avg"][unused].any()

    # A shorter run's schedule and data order begin at their beginning.
    pretrain_gpt.main(phase_config(f"{base_run}/step_0000004", other_data, tmp_path / "moved", lr=1e-3))
    rows = read_records(tmp_path / "moved" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(7)) and rows[1]["lr"] == 5e-4  # warm-up of two steps
    first = next(row for row in read_records(base_run / "metrics.jsonl") if row["step"] == 0)
    assert rows[0]["val_loss"] < first["val_loss"] - 0.1  # not from random weights
    card = (tmp_path / "moved" / "step_0000006" / "README.md").read_text()
    assert "Pretrained from step_0000004 on text files: texts.jsonl." in card


def other_tokens(data: Path, state: dict) -> torch.Tensor:
    """The tokens that the first step of a phase does not read."""
    loader = TokenLoader(data, "train", 64, 320)
    ids, _ = loader.read(loader.step_windows(0, 0, 4))
    seen = torch.zeros(len(state["model.embed_tokens.weight"]["exp_avg"]), dtype=torch.bool)
    seen[ids.flatten()] = True
    return ~seen


def test_a_phase_that_was_stopped_goes_on_from_its_own_checkpoints_without_the_old_run(
    base_run, other_data, tmp_path
):
    base = shutil.copytree(base_run, tmp_path / "base")
    config = phase_config(base, other_data, tmp_path / "straight")
    pretrain_gpt.main(config)
    twice = tmp_path / "twice"
    shutil.copytree(tmp_path / "straight", twice)
    for step in (4, 6):
        shutil.rmtree(twice / f"step_{step:07d}")
    moved = base.rename(tmp_path / "moved")  # the same weights elsewhere
    pretrain_gpt.main(phase_config(moved, other_data, twice, max_steps=6))
    assert weights(twice, 6) == weights(tmp_path / "straight", 6)
    assert losses(twice) == losses(tmp_path / "straight")
    shutil.rmtree(moved)
    for step in (4, 6):
        shutil.rmtree(twice / f"step_{step:07d}")
    pretrain_gpt.main(phase_config(base, other_data, twice))
    assert weights(twice, 6) == weights(tmp_path / "straight", 6)
    pretrain_gpt.main(phase_config(f"{base_run}/step_0000006", other_data, twice))  # the same weights again
    with pytest.raises(InputError, match=r"with other settings \(init_from .*weights "):
        pretrain_gpt.main(phase_config(f"{base_run}/step_0000004", other_data, twice))
    with pytest.raises(InputError, match=r"with other settings \(.*init_from None → .*weights "):
        pretrain_gpt.main(phase_config(base_run, other_data, scratch(other_data, tmp_path)))


def scratch(data: Path, tmp_path: Path) -> Path:
    """A finished run of the phase's shape that began from random weights."""
    pretrain_gpt.main(pretrain_config(data, tmp_path / "scratch", context_length=64))
    return tmp_path / "scratch"


@pytest.mark.parametrize(
    "world, shard",
    [(1, "none"), (2, "none"), (3, "none"), (2, "full")],
    ids=["one rank", "two ranks", "three ranks", "split over two"],
)
def test_a_killed_phase_ends_in_the_same_bytes_as_an_undisturbed_one(
    world, shard, base_run, other_data, tmp_path, fresh
):
    changes = {"micro_batch_size": 1, "shard": shard}
    straight, killed = (phase_config(base_run, other_data, tmp_path / name, **changes) for name in "ab")
    assert not any(fresh.submit(planted.forked, "pretrain_gpt", straight, world).result(90)[0])
    for step in (1, 5):  # the second checkpoint was begun, so the first is whole
        codes, _, _ = fresh.submit(
            planted.forked, "pretrain_gpt", killed, world, (f"SIGKILL:{step}:0",)
        ).result(90)
        assert -9 in codes
    codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", killed, world).result(90)
    assert not any(codes) and "continuing from" in log and "starting from" not in log, log
    assert_recovered(tmp_path / "b", tmp_path / "a", 2)


def test_a_longer_context_grows_the_model_s_and_a_shorter_one_leaves_it(
    base_run, other_data, tmp_path, capsys
):
    for context, known, theta in ((128, 128, 5e4), (32, 64, 1e4)):
        out_dir = tmp_path / str(context)
        pretrain_gpt.main(
            phase_config(base_run, other_data, out_dir, context_length=context, rope_theta=theta, max_steps=2)
        )
        grown = "its context grows from 64 to 128 tokens" in capsys.readouterr().out
        model = GPTModel.from_pretrained(out_dir / "step_0000002")
        assert grown == (known > 64) and model.config.max_position_embeddings == known
        assert model.config.rope_theta == theta
        ids = TokenLoader(other_data, "val", known, 320).read([0])[0]
        assert model(ids).shape == (1, known, 320)
        # The validation before the first step: the old weights, at the new positions and base.
        old = GPTModel.from_pretrained(newest_checkpoint(base_run))
        old.config.max_position_embeddings, old.config.rope_theta = known, theta
        old.init_rope()
        ids, targets = TokenLoader(other_data, "val", context, 320).read(range(512 // context))
        first = read_records(out_dir / "metrics.jsonl")[0]
        assert first["val_loss"] == pytest.approx(old(ids, targets).item() / targets.numel(), rel=1e-5)
        pretrain_gpt.main(  # it is finished
            phase_config(base_run, other_data, out_dir, context_length=context, rope_theta=theta, max_steps=2)
        )


def test_shape_flags_that_differ_from_the_model_s_are_refused_and_those_that_agree_are_not(
    base_run, other_data, tmp_path
):
    for changes, message in (
        ({"hidden_size": 64}, r"\(--hidden_size=64, it has 32\); leave these flags out"),
        (
            {"num_hidden_layers": 3, "qk_norm": False},
            r"num_hidden_layers=3, it has 2; --qk_norm=False, it has T",
        ),
        ({"num_hidden_layers": 12}, r"\(--num_hidden_layers=12, it has 2\)"),  # given, though the default
    ):
        with pytest.raises(InputError, match=f"another shape than the flags ask for .*{message}"):
            pretrain_gpt.main(phase_config(base_run, tmp_path / "unread", tmp_path / "run", **changes))
    agree = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "max_steps": 1}
    agree |= {"num_key_value_heads": 0, "intermediate_size": 0, "qk_norm": True}  # 0 asks for nothing
    pretrain_gpt.main(phase_config(base_run, other_data, tmp_path / "run", **agree))


def test_a_model_without_training_state_or_of_another_optimizer_starts_with_a_fresh_one_and_says_so(
    base_run, other_data, tmp_path, capsys
):
    plain = tmp_path / "plain"
    shutil.copytree(base_run / "step_0000006", plain)
    for name in ("training_state.pt", "checkpoint.json"):
        (plain / name).unlink()
    for base, optimizer, why in (
        (plain, "muon", "for it is no checkpoint with a training_state.pt"),
        (base_run, "adamw", "for its own was muon"),
    ):
        out_dir = tmp_path / optimizer
        pretrain_gpt.main(phase_config(base, other_data, out_dir, optimizer=optimizer, max_steps=1))
        assert f"with a fresh optimizer, {why}" in capsys.readouterr().out
        assert optimizer_state(out_dir, 1)["lm_head.weight"]["step"] == 1


def test_a_phase_from_what_is_no_model_or_damaged_or_has_another_tokenizer_is_refused(
    base_run, other_data, tmp_path
):
    def refuse(base, message):
        with pytest.raises(InputError, match=message):
            pretrain_gpt.main(phase_config(base, other_data, tmp_path / "run"))

    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", r"holds neither a model \(config.json\) nor a whole checkpoint")
    damaged = shutil.copytree(base_run / "step_0000006", tmp_path / "damaged")
    state = (damaged / "training_state.pt").read_bytes()
    (damaged / "training_state.pt").write_bytes(state[:-1])
    refuse(damaged, r"training_state.pt is not what was saved; delete .* to start with a fresh optimizer")
    other = shutil.copytree(base_run / "step_0000006", tmp_path / "other")
    (other / "checkpoint.json").unlink()
    train_tokenizer((text(i) for i in range(50)), 300).save_pretrained(other)
    refuse(other, r"has another tokenizer .* than the data .*; prepare the data with --tokenizer=")
