"""training.py and optim.py, and what the scripts promise: equal for any split, exact after any stop."""

import dataclasses
import errno
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import dpo_config, flags, pretrain_config, run, sft_config, small_model
from huggingface_hub import ModelCard

import chat
import dpo_gpt
import prepare_data
import pretrain_gpt
import sft_gpt
import training
from gpt import IGNORE, InputError
from optim import make_optimizer, orthogonalize, schedule
from training import Ranks, StepHistory, parse_config, read_jsonl, train_step

ALONE = Ranks(0, 1, torch.device("cpu"))
SCRIPTS = {
    script.__name__ + ".py": script.Config for script in (prepare_data, pretrain_gpt, sft_gpt, dpo_gpt, chat)
}


def weights(out_dir, step: int) -> bytes:
    return (out_dir / f"step_{step:07d}" / "model.safetensors").read_bytes()


def losses(out_dir) -> list[tuple]:
    """All that was recorded but speeds."""
    return [
        (row["step"], row.get("loss"), row.get("val_loss"), row.get("grad_norm"))
        for row in read_jsonl(out_dir / "metrics.jsonl")
    ]


# -- the command line ----------------------------------------------------------------------------------------


def test_flags_override_fields_of_every_type():
    config = parse_config(
        pretrain_gpt.Config, ["--max_steps=1e3", "--batch_tokens=1_024", "--lr=2e-4", "--qk_norm=false"]
    )
    assert (config.max_steps, config.batch_tokens, config.lr, config.qk_norm) == (1000, 1024, 2e-4, False)
    assert config == dataclasses.replace(
        pretrain_gpt.Config(), max_steps=1000, batch_tokens=1024, lr=2e-4, qk_norm=False
    )


@pytest.mark.parametrize("argument", ["--learning_rate=1", "max_steps=1", "--max_steps 3"])
def test_an_unknown_flag_is_refused_with_what_exists(argument):
    with pytest.raises(InputError, match=r"is not understood(.|\n)*--max_steps=2000(.|\n)*optimizer steps"):
        parse_config(pretrain_gpt.Config, [argument])


def test_a_flag_without_its_value_is_told_how_it_is_written():
    with pytest.raises(InputError, match=r"^--max_steps has no value; write --max_steps=value \(optimizer"):
        parse_config(pretrain_gpt.Config, ["--max_steps", "3"])


@pytest.mark.parametrize(
    "argument", ["--max_steps=many", "--max_steps=1.5", "--max_steps=inf", "--lr=", "--qk_norm=yes"]
)
def test_a_value_of_the_wrong_type_is_refused(argument):
    with pytest.raises(InputError, match=r"is not of type (int|float|bool)"):
        parse_config(pretrain_gpt.Config, [argument])


@pytest.mark.parametrize("config_class", SCRIPTS.values(), ids=SCRIPTS)
def test_help_gives_every_field_with_its_default_and_meaning(config_class, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(config_class, ["--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    for field in dataclasses.fields(config_class):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"  --{field.name}=")]
        assert f"={field.default}" in line and len(line.split("  ")[-1]) > 5, line


@pytest.mark.parametrize(
    ("script", "arguments", "sentence"),
    [
        ("prepare_data.py", ["--source=missing.jsonl"], "missing.jsonl does not exist"),
        (
            "pretrain_gpt.py",
            ["--data_dir=missing"],
            "missing holds no token shards; make them with prepare_data.py",
        ),
        ("sft_gpt.py", ["--model=no/model"], "no directory no/model"),
        ("chat.py", ["--temprature=1"], "--temprature=1 is not understood"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_status_1(script, arguments, sentence, tmp_path):
    result = run(script, *arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert f"error: {sentence}" in result.stderr and "Traceback" not in result.stderr


# -- the optimizer -------------------------------------------------------------------------------------------


def test_the_schedule_rises_stays_and_falls_to_zero_over_just_the_run():
    shares = [schedule(step, 100, 10, 40) for step in range(101)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert shares[10:61] == [1.0] * 51
    assert shares[60:] == pytest.approx([1 - i / 40 for i in range(41)])
    assert shares[99] > 0 and shares[100] == 0
    assert [schedule(step, 3, 0, 0) for step in range(3)] == [1.0] * 3


def test_orthogonalize_keeps_singular_vectors_and_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((32, 32), (3, 64, 16), (16, 64)):
        g = torch.randn(shape)
        u, _, vt = torch.linalg.svd(g, full_matrices=False)
        inner = u.mT @ orthogonalize(g) @ vt.mT  # diagonal, with the new singular values
        values = inner.diagonal(dim1=-2, dim2=-1)
        assert (inner - torch.diag_embed(values)).abs().max() < 1e-3
        assert values.min() > 0.3 and values.max() < 1.3


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_is_in_one_group_and_only_the_blocks_matrices_decay(optimizer):
    model = small_model()
    groups = make_optimizer(model, pretrain_gpt.Config(optimizer=optimizer)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [[names[id(p)] for p in group["params"]] for group in groups]
    assert sorted(name for group in grouped for name in group) == sorted(names.values())
    assert [group["weight_decay"] for group in groups] == [0.1, 0, 0]
    assert all("_proj" in name for name in grouped[0]) and len(grouped[0]) == 14
    assert grouped[1] == ["model.embed_tokens.weight", "lm_head.weight"]


def test_adamw_equals_torchs():
    ours, theirs = small_model(), small_model()
    config = pretrain_gpt.Config(optimizer="adamw", lr=1e-2, weight_decay=0.0)
    optimizers = [
        make_optimizer(ours, config),
        torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    ids = torch.randint(0, 320, (2, 17))
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2
            optimizer.zero_grad()
            (model(ids[:, :-1], ids[:, 1:]) / 32).backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(p, q)


def test_muon_equals_torchs_but_for_its_bf16():
    """torch.optim.Muon orthogonalizes in bf16; so does ours here, by a stand-in, and then both agree."""
    torch.manual_seed(0)
    p, q = (torch.nn.Parameter(torch.ones(48, 32)) for _ in range(2))
    from optim import MOMENTUM, Muon

    ours = Muon([{"params": [p], "muon": True, "lr": 0.02, "weight_decay": 0.1}], MOMENTUM, (0.9, 0.95))
    theirs = torch.optim.Muon([q], lr=0.02, weight_decay=0.1, momentum=MOMENTUM, nesterov=True)
    for _ in range(3):
        p.grad = torch.randn(48, 32)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert (p - q).norm() < 0.02 * (p - 1).norm()


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(InputError, match="--optimizer=sgd is unknown; choose muon or adamw"):
        make_optimizer(small_model(), pretrain_gpt.Config(optimizer="sgd"))


# -- one step ------------------------------------------------------------------------------------------------


def test_any_split_into_micro_batches_gives_the_same_gradients():
    ids = torch.randint(0, 320, (8, 33), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    for row in range(8):
        targets[row, : 4 * row] = IGNORE  # unequal numbers of targets: a mean of means would differ
    reference = None
    for size in (8, 4, 1):
        model, seen = small_model(), {}
        optimizer = torch.optim.SGD(model.parameters())
        optimizer.param_groups[0]["peak_lr"] = 0.0
        optimizer.register_step_pre_hook(
            lambda *_, m=model, s=seen: s.update({n: p.grad.clone() for n, p in m.named_parameters()})
        )
        batches = [
            {"input_ids": ids[i : i + size, :-1], "targets": targets[i : i + size]} for i in range(0, 8, size)
        ]
        history = StepHistory(pretrain_gpt.Config(), None)
        result = train_step(model, optimizer, batches, 1.0, 0.0, history, ALONE)
        expected = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), targets.flatten())
        assert result["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert result["targets"] == (targets != IGNORE).sum()
        reference = reference or seen
        for name in seen:
            assert (seen[name] - reference[name]).norm() <= 1e-6 * reference[name].norm()


@pytest.mark.parametrize("script", ["pretrain_gpt.py", "sft_gpt.py", "dpo_gpt.py"])
def test_two_and_three_ranks_over_gloo_equal_one_process(
    script, data_dir, base_run, chats, preferences, tmp_path
):
    def config(name):
        if script == "pretrain_gpt.py":  # 7 windows: 3, 2 and 2 on three ranks
            return pretrain_config(data_dir, tmp_path / name, batch_tokens=7 * 32, max_steps=4)
        if script == "dpo_gpt.py":
            return dpo_config(base_run, preferences, tmp_path / name, batch_pairs=5)
        return sft_config(base_run, chats, tmp_path / name, batch_tokens=5 * 64)

    {"pretrain_gpt.py": pretrain_gpt, "sft_gpt.py": sft_gpt, "dpo_gpt.py": dpo_gpt}[script].main(
        config("one")
    )
    ranks = 3 if script == "pretrain_gpt.py" else 2
    (data_dir / ".verified.json").unlink(missing_ok=True)  # rank 0 hashes the shards, the others see it
    result = run(script, *flags(config("two")), ranks=ranks)
    assert result.returncode == 0, result.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two)
    for a, b in zip(one, two):
        assert all(x == y or math.isclose(x, y, rel_tol=2e-4) for x, y in zip(a, b)), (a, b)


def test_the_loss_of_a_run_is_token_weighted_validation_included(data_dir, tmp_path):
    """Validation in micro-batches of 3 windows, the last one smaller, equals one pass over all."""
    for name, size in (("a", 3), ("b", 16)):
        pretrain_gpt.main(pretrain_config(data_dir, tmp_path / name, micro_batch_size=size, max_steps=1))
    a, b = ([row[2] for row in losses(tmp_path / name) if row[2]] for name in "ab")
    assert a == pytest.approx(b, rel=1e-6)


# -- checkpoints and resuming --------------------------------------------------------------------------------


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
    answers = [read_jsonl(tmp_path / name / "answers.jsonl") for name in ("straight", "twice")]
    assert answers[0] == answers[1]


def test_a_resumed_run_reads_no_window_twice(data_dir, tmp_path, monkeypatch):
    """nanoGPT draws the same batches again after a resume; here every step has its own."""
    read = []
    original = pretrain_gpt.batch_order
    monkeypatch.setattr(
        pretrain_gpt, "batch_order", lambda *a: read.append(original(*a).tolist()) or original(*a)
    )
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path))
    shutil.rmtree(tmp_path / "step_0000006")
    shutil.rmtree(tmp_path / "step_0000004")
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path))
    assert read[:6] == read[:2] + read[6:]
    windows = [w for batch in read[:6] for w in batch]
    assert len(windows) == len(set(windows))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "training_state.pt", "config.json", "checkpoint.json", "tokenizer.json"]
)
@pytest.mark.parametrize("cut", [True, False], ids=["cut short", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(name, cut, base_run, tmp_path, capsys):
    shutil.copytree(base_run, tmp_path / "run")
    file = tmp_path / "run" / "step_0000006" / name
    file.write_bytes(file.read_bytes()[:-10]) if cut else file.unlink()
    assert training.newest_checkpoint(tmp_path / "run").name == "step_0000004"
    assert f"passing over {file.parent}: {name}" in capsys.readouterr().err
    with pytest.raises(InputError, match=f"cannot be resumed: {name}"):
        training.resume(pretrain_config("", tmp_path / "run", resume=str(file.parent)), {}, ALONE)


def test_a_crash_while_saving_leaves_the_checkpoint_before(data_dir, tmp_path, monkeypatch):
    original, calls = training.torch.save, []

    def crash_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(*arguments)

    pretrain_gpt.main(pretrain_config(data_dir, tmp_path / "straight"))
    monkeypatch.setattr(training.torch, "save", crash_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        pretrain_gpt.main(pretrain_config(data_dir, tmp_path / "run"))
    assert [p.name for p in training.checkpoints(tmp_path / "run")] == ["step_0000002"]
    monkeypatch.undo()
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path / "run"))
    assert weights(tmp_path / "run", 6) == weights(tmp_path / "straight", 6)
    assert not list((tmp_path / "run").glob("*.partial"))


def test_a_damaged_newer_checkpoint_never_displaces_a_whole_one(data_dir, tmp_path):
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path, keep_last=2))
    (tmp_path / "step_0000006" / "model.safetensors").write_bytes(b"")
    config = pretrain_config(data_dir, tmp_path, keep_last=1, save_every=1)
    original = training.Checkpoints.save

    def crash_after_step_5(saves, step):
        original(saves, step)
        saves.wait()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Checkpoints, "save", crash_after_step_5)
        pretrain_gpt.main(config)
    assert training.newest_checkpoint(tmp_path).name == "step_0000005"
    pretrain_gpt.main(config)
    assert training.newest_checkpoint(tmp_path).name == "step_0000006"


def test_going_back_to_an_earlier_checkpoint_needs_a_folder_without_later_ones(data_dir, base_run, tmp_path):
    path = base_run / "step_0000002"
    for out_dir in (base_run, tmp_path):
        (tmp_path / "step_0000001").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=r"holds other checkpoints \(step_.*--resume=auto"):
            pretrain_gpt.main(pretrain_config(data_dir, out_dir, context_length=64, resume=str(path)))


def test_old_checkpoints_are_deleted_once_the_new_one_is_whole(data_dir, tmp_path):
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path, keep_last=2))
    assert [p.name for p in training.checkpoints(tmp_path)] == ["step_0000004", "step_0000006"]


def test_a_full_disk_is_told_before_anything_is_written(data_dir, tmp_path, monkeypatch):
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(training.shutil, "disk_usage", lambda _: real._replace(free=10_000_000))
    with pytest.raises(InputError, match=r"a checkpoint needs 0\.05 GB and .* has 0\.01 GB free"):
        pretrain_gpt.main(pretrain_config(data_dir, tmp_path))
    assert not list(tmp_path.glob("*step_*"))


def test_a_disk_that_fills_up_while_saving_leaves_the_checkpoint_before(data_dir, tmp_path, monkeypatch):
    """Libraries tell of a full disk each in their own way: torch.save by a RuntimeError."""
    real, original, calls = shutil.disk_usage(tmp_path), torch.save, []

    def full_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            monkeypatch.setattr(training.shutil, "disk_usage", lambda _: real._replace(free=1_000_000))
            raise RuntimeError("PytorchStreamWriter failed writing file data/0")
        original(*arguments)

    monkeypatch.setattr(training.torch, "save", full_at_the_second)
    with pytest.raises(InputError, match=r"a checkpoint needs 0\.05 GB and .* has 0\.00 GB free"):
        pretrain_gpt.main(pretrain_config(data_dir, tmp_path))
    assert [p.name for p in training.checkpoints(tmp_path)] == ["step_0000002"]
    assert not list(tmp_path.glob(".step_*"))
    monkeypatch.undo()
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path))
    assert training.newest_checkpoint(tmp_path).name == "step_0000006"


def test_a_disk_that_fills_up_while_writing_is_one_sentence(monkeypatch, capsys):
    def main(_):
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py"])
    with pytest.raises(SystemExit, match="1"):
        training.run_script(main, pretrain_gpt.Config)
    message = capsys.readouterr().err
    assert "the disk is full" in message and "model.safetensors" in message and "it continues" in message


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
    assert training.newest_checkpoint(tmp_path).name == "step_0000003"
    capsys.readouterr()
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path, max_steps=5, lr=1e-3, force=True, **free))
    printed = capsys.readouterr().out
    assert f"changed since {tmp_path}/step_0000003: max_steps 3 → 5, lr 0.003 → 0.001, micro" in printed
    assert "log_every 1 → 2" in printed and training.newest_checkpoint(tmp_path).name == "step_0000005"
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path, max_steps=5, lr=1e-3, keep_every=2))
    assert "changed since" in (printed := capsys.readouterr().out) and "is finished" in printed


def test_every_free_field_is_a_field_of_a_script():
    known = {
        f.name for c in (pretrain_gpt.Config, sft_gpt.Config, dpo_gpt.Config) for f in dataclasses.fields(c)
    }
    assert set(training.FREE_FIELDS) <= known


def test_shards_that_changed_since_the_run_began_are_refused(data_dir, base_run, tmp_path, tokenizer_dir):
    source = tmp_path / "other.txt"
    source.write_text("Some other text about rivers. " * 2000)
    prepare_data.main(
        prepare_data.Config(
            source=str(source), tokenizer=str(tokenizer_dir), out_dir=str(tmp_path / "data"), val_fraction=0.0
        )
    )
    shutil.copy(data_dir / "val_000000.bin", tmp_path / "data")
    with pytest.raises(InputError, match=r"with other settings \(data '.*--force to go on"):
        pretrain_gpt.main(pretrain_config(tmp_path / "data", base_run, context_length=64))


def test_the_model_card_tells_origin_size_and_losses(base_run):
    card = (base_run / "step_0000006" / "README.md").read_text()
    found = ModelCard.load(base_run / "step_0000006" / "README.md", ignore_metadata_errors=False)
    assert found.data.to_dict() == {"library_name": "transformers", "pipeline_tag": "text-generation"}
    rows = read_jsonl(base_run / "metrics.jsonl")
    assert card.startswith("---\nlibrary_name: transformers\n") and "texts.jsonl" in card
    assert "1,536 tokens in 6 steps" in card and "Qwen3ForCausalLM" in card and "max_steps: 6" in card
    assert "hidden_size: 32\n" in card and "rope_theta: 10000.0\n" in card
    assert f"step 3, val bpb: {rows[3]['val_bpb']:.4f} bits/byte" in card
    assert f"step 6, loss: {rows[6]['loss']:.4f} nats/token" in card
    assert (
        f"step 3, val loss: {rows[3]['val_loss']:.4f} nats/token" in card
    )  # saved before the last validation


def test_a_checkpoints_state_holds_no_code(base_run):
    state = torch.load(base_run / "step_0000006" / "training_state.pt", weights_only=True)
    assert state["step"] == 6 and set(state["optimizer"]) == set(dict(small_model().named_parameters()))


# -- metrics and samples -------------------------------------------------------------------------------------


def test_a_run_records_its_numbers(base_run):
    rows = read_jsonl(base_run / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert {"lr", "grad_norm", "tokens_per_second", "targets"} <= set(steps[0])
    validations = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in validations] == [0, 3, 6]
    assert all(0 < row["val_bpb"] < row["val_loss"] for row in validations)
    assert (base_run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_bits_per_byte_follow_from_the_bytes_of_the_text(data_dir, base_run):
    row = next(row for row in read_jsonl(base_run / "metrics.jsonl") if "val_loss" in row)
    loader = pretrain_gpt.TokenLoader(data_dir, "val", 64)
    _, tokenizer = pretrain_gpt.open_data(data_dir)
    text = "".join(
        tokenizer.decode(loader.batch([w], 320)[1][0]).replace("<|endoftext|>", "") for w in range(8)
    )
    assert row["val_bpb"] == pytest.approx(row["val_loss"] * 512 / math.log(2) / len(text.encode()))


def test_a_sample_is_text_and_always_the_same(base_run):
    model, tokenizer = chat.load(str(base_run))
    samples = pretrain_gpt.sample_text(model, tokenizer, seed=0)
    assert samples == pretrain_gpt.sample_text(model, tokenizer, seed=0)
    assert all(text.startswith(prompt) for text, prompt in zip(samples, pretrain_gpt.PROMPTS))


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1}]
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_wandb_needs_no_key_no_server_and_no_answer(monkeypatch, tmp_path, capsys):
    import wandb

    config = pretrain_config("", tmp_path)
    calls = []

    def init(mode, **options):
        calls.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no route to host")
        return mode

    monkeypatch.setattr(wandb, "init", init)
    for key, mode, expected in (
        (False, "auto", []),
        (False, "off", []),
        (False, "online", ["offline"]),
        (False, "offline", ["offline"]),
        (True, "auto", ["online", "offline"]),
        (True, "offline", ["offline"]),
    ):
        calls.clear()
        monkeypatch.setattr(training, "has_wandb_key", lambda key=key: key)
        result = training.start_wandb(dataclasses.replace(config, wandb=mode), None)
        assert calls == expected and result == (expected[-1] if expected else None)
    assert "wandb cannot be reached (no route to host)" in capsys.readouterr().err
    with pytest.raises(InputError, match="--wandb=maybe is unknown"):
        training.start_wandb(dataclasses.replace(config, wandb="maybe"), None)


# -- other mistakes ------------------------------------------------------------------------------------------


def test_mistakes_in_a_pretraining_run_are_told(data_dir, tmp_path):
    for change, message in (
        ({"hidden_size": 33}, "hidden_size 33 is not divisible by num_attention_heads 2"),
        ({"context_length": 100_000, "batch_tokens": 200_000}, "too few for one window of 100001"),
        ({"batch_tokens": 16}, "are 0 windows of 32"),
        ({"device": "cuda"}, "no CUDA device is visible"),
        ({"compile": "maybe"}, "--compile=maybe is unknown"),
        ({"resume": str(tmp_path / "nothing")}, "cannot be resumed: checkpoint.json is missing"),
        ({"device": "abacus"}, "--device=abacus cannot be used here"),
        ({"eval_every": 0}, "--eval_every=0: expected a number above zero"),
        ({"micro_batch_size": -1}, "--micro_batch_size=-1: expected a number above zero"),
    ):
        if not (change.get("device") and torch.cuda.is_available()):
            with pytest.raises(InputError, match=message):
                pretrain_gpt.main(pretrain_config(data_dir, tmp_path / "run", **change))


@pytest.mark.parametrize("script", [pretrain_gpt, sft_gpt, dpo_gpt])
def test_numbers_that_can_mean_nothing_are_refused(script):
    fields = {f.name for f in dataclasses.fields(script.Config)}
    for name, value, expected in (
        ("keep_last", -1, "from zero up"),
        ("max_steps", -5, "zero"),
        ("epochs", math.nan, "above zero"),
        ("epochs", math.inf, "above zero"),
        ("warmup_fraction", 2.0, "a share"),
        ("max_grad_norm", -1.0, "from zero up"),
        ("max_length", -5, "from zero up"),
        ("beta", math.nan, "above zero"),
        ("lr", math.nan, "from zero up"),
        ("micro_batch_size", 0, "above zero"),
        ("batch_tokens", 0, "above zero"),
    ):
        if name in fields:
            with pytest.raises(InputError, match=f"--{name}={value}: expected a.* {expected.split()[-1]}"):
                script.main(script.Config(**{name: value}))


def test_a_rank_that_does_not_see_what_rank_0_wrote_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(training.time, "sleep", lambda seconds: None)
    Ranks(0, 2, torch.device("cpu")).require_shared(tmp_path / "report.json")
    with pytest.raises(InputError, match=r"rank 1 does not see .*report\.json.*one folder"):
        Ranks(1, 2, torch.device("cpu")).require_shared(tmp_path / "report.json")


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


def test_a_checkpoint_with_another_tokenizer_than_its_own_is_refused(base_run, tmp_path):
    path = tmp_path / "step_0000006"
    shutil.copytree(base_run / "step_0000006", path)
    (path / "tokenizer.json").write_text((path / "tokenizer.json").read_text() + "\n")
    with pytest.raises(InputError, match=r"tokenizer\.json is not what was saved; delete checkpoint\.json"):
        chat.load(str(path))
    (path / "checkpoint.json").unlink()
    assert chat.load(str(path))[0].num_parameters() == chat.load(str(base_run))[0].num_parameters()


def test_a_model_that_does_not_know_chatml_is_told_apart(tmp_path, tokenizer):
    model = small_model(vocab_size=256)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no ids for ChatML's tokens"):
        chat.load(str(tmp_path))


def test_a_model_is_found_by_its_runs_folder(base_run, tmp_path):
    assert training.find_model(str(base_run)) == base_run / "step_0000006"
    assert training.find_model("someone/model") == "someone/model"
    assert training.find_model(str(base_run / "step_0000004")) == str(base_run / "step_0000004")
    with pytest.raises(InputError, match="holds neither a model"):
        training.find_model(str(tmp_path))


def test_compiled_training_gives_the_same_losses(data_dir, tmp_path):
    for name in ("true", "false"):
        pretrain_gpt.main(pretrain_config(data_dir, tmp_path / name, compile=name, max_steps=2))
    for a, b in zip(losses(tmp_path / "true"), losses(tmp_path / "false")):
        assert all(x == y or math.isclose(x, y, rel_tol=1e-4) for x, y in zip(a, b))


# -- chat ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def talker(base_run):
    return chat.load(str(base_run))


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def test_a_full_context_drops_the_oldest_turns_and_keeps_the_system_message(talker):
    _, tokenizer = talker
    messages = [{"role": "system", "content": "be short"}, *turns("old", "reply", "newer", "reply", "newest")]
    lengths = [len(chat.prompt_ids([messages[0], *messages[k:]], tokenizer)) for k in (1, 3, 5)]
    assert chat.fit(messages, tokenizer, lengths[0]) == (messages, 0)
    assert chat.fit(messages, tokenizer, lengths[0] - 1) == ([messages[0], *messages[3:]], 2)
    assert chat.fit(messages, tokenizer, lengths[2]) == ([messages[0], messages[5]], 4)
    with pytest.raises(
        InputError, match=f"takes {lengths[2]} tokens and the context leaves it {lengths[2] - 1}"
    ):
        chat.fit(messages, tokenizer, lengths[2] - 1)


def test_the_streamed_pieces_are_the_answer(talker):
    model, tokenizer = talker
    config = chat.Config(temperature=0.0, max_new_tokens=20)
    ids = [
        i for (i,) in model.generate([chat.prompt_ids(turns("the river"), tokenizer)], 20, stop_ids=[0, 2])
    ]
    assert "".join(chat.stream(model, tokenizer, turns("the river"), config)) == tokenizer.decode(
        ids, skip_special_tokens=True
    )


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(talker, monkeypatch, capsys):
    def interrupted(*_):
        yield "so far"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream", interrupted)
    messages = chat.respond(*talker, turns("hello"), chat.Config())
    assert messages == turns("hello", "so far")
    assert "so far [stopped]" in capsys.readouterr().out


def test_a_conversation_in_the_terminal(base_run):
    result = run(
        "chat.py",
        f"--model={base_run}",
        "--max_new_tokens=8",
        "--seed=1",
        "--system=hi",
        input="the river\n\nmore\n",
    )
    assert result.returncode == 0 and result.stdout.count("> ") == 4, result.stderr
    one = run(
        "chat.py",
        f"--model={base_run}",
        "--max_new_tokens=8",
        "--seed=1",
        "--system=hi",
        "--prompt=the river",
    )
    assert one.returncode == 0 and one.stdout.strip() and one.stdout.splitlines()[0] in result.stdout


def test_the_quick_start_shrunk_to_seconds(tmp_path):
    """From raw text to a chat as a user runs it; a second time, every step finds its result."""
    import os
    import subprocess
    import sys

    from conftest import ROOT

    small = "--log_every=2 --eval_every=4 --batch_tokens=1024 --max_steps=4 --wandb=off"
    environment = os.environ | {
        "VENV": sys.prefix,
        "OUT": str(tmp_path),
        "PREPARE_FLAGS": "--max_tokens=300_000",
        "PRETRAIN_FLAGS": f"{small} --hidden_size=64 --num_hidden_layers=2 --eval_tokens=2048",
        "SFT_FLAGS": f"{small} --eval_questions=4 --max_new_tokens=8",
    }

    def quickstart() -> str:
        command = ["bash", str(ROOT / "quickstart.sh")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stderr
        return result.stdout

    printed = quickstart()
    for part in ("train: ", "val_bpb", "tok/s", "| The history of", "val_loss", "What is water?"):
        assert part in printed, part
    assert printed.rstrip().endswith(f"Talk to it: python chat.py --model={tmp_path}/chat")
    for name in (
        "data/manifest.json",
        "base/loss.png",
        "base/metrics.jsonl",
        "chat/step_0000004/model.safetensors",
    ):
        assert (tmp_path / name).exists(), name
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    assert manifest["vocab_size"] == 4096 and manifest["splits"]["val"]["documents"] > 0
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = quickstart()
    assert "is already prepared" in again and again.count("is finished") == 2
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert np.all([part in again for part in ("What is water?", "Talk to it")])
