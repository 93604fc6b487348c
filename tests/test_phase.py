"""A new phase begins where another run stands."""

import dataclasses
import shutil
from pathlib import Path

import planted
import pytest
import torch
from conftest import assert_recovered, losses, pretrain_config, text, weights, write_jsonl

import prepare_data
import pretrain_gpt
from checkpoint import newest_checkpoint
from common import InputError, read_records
from data import TokenLoader
from gpt import GPTModel
from tokenization import train_tokenizer


def optimizer_state(out_dir: Path, step: int) -> dict:
    return torch.load(out_dir / f"step_{step:07d}" / "training_state.pt", weights_only=True)["optimizer"]


def phase_config(base, data, out_dir, **changes):
    """A phase whose shape flags are at their default; none is base_run's."""
    shape = {name: getattr(pretrain_gpt.Config(), name) for name in pretrain_gpt.SHAPE_FLAGS}
    return pretrain_config(data, out_dir, init_from=str(base), **{**shape, "context_length": 64, **changes})


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
    pretrain_gpt.main(dataclasses.replace(config, out_dir=str(twice), init_from=str(moved), max_steps=6))
    assert weights(twice, 6) == weights(tmp_path / "straight", 6)
    assert losses(twice) == losses(tmp_path / "straight")
    shutil.rmtree(moved)
    for step in (4, 6):
        shutil.rmtree(twice / f"step_{step:07d}")
    pretrain_gpt.main(dataclasses.replace(config, out_dir=str(twice)))
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
    "world, shard", [(1, "none"), (2, "none"), (2, "full")], ids=["one rank", "two ranks", "split over two"]
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
    ):
        with pytest.raises(InputError, match=f"another shape than the flags ask for .*{message}"):
            pretrain_gpt.main(phase_config(base_run, tmp_path / "unread", tmp_path / "run", **changes))
    agree = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "max_steps": 1}
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
