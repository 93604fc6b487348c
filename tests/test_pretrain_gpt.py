"""Whole pretraining runs."""

import copy
import math
import pickle
import shutil
import signal
from dataclasses import asdict, replace

import pytest
import torch
from conftest import dpo_config, flags, losses, pretrain_config, run, sft_config, weights

import chat
import dpo_gpt
import pretrain_gpt
import sft_gpt
from checkpoint import newest_checkpoint
from common import InputError, parse_config, read_records
from gpt import GPTModel
from metrics import Metrics
from pretrain_gpt import Config, model_config
from tokenization import load_tokenizer


def test_the_loss_of_a_run_is_token_weighted_validation_included(data_dir, tmp_path):
    """Validation in micro-batches of 3 windows, the last one smaller, equals one pass over all."""
    for name, size in (("a", 3), ("b", 16)):
        pretrain_gpt.main(pretrain_config(data_dir, tmp_path / name, micro_batch_size=size, max_steps=1))
    a, b = ([row[2] for row in losses(tmp_path / name) if row[2]] for name in "ab")
    assert a == pytest.approx(b, rel=1e-6)


def test_bits_per_byte_follow_from_the_bytes_of_the_text(data_dir, base_run):
    row = next(row for row in read_records(base_run / "metrics.jsonl") if "val_loss" in row)
    loader = pretrain_gpt.TokenLoader(data_dir, "val", 64, 320)
    tokenizer = load_tokenizer(data_dir / "tokenizer")
    text = "".join(tokenizer.decode(loader.read([w])[1][0]).replace("<|endoftext|>", "") for w in range(8))
    assert row["val_bpb"] == pytest.approx(row["val_loss"] * 512 / math.log(2) / len(text.encode()))


def test_at_the_start_of_a_length_warmup_no_token_sees_beyond_its_piece_and_validation_sees_all(
    data_dir, tmp_path
):
    config = pretrain_config(
        data_dir, tmp_path, max_steps=3, length_warmup_fraction=1.0, lr=0.0, matrix_lr=0.0
    )
    pretrain_gpt.main(config)
    torch.manual_seed(config.seed)
    model, T = GPTModel(model_config(config, 320)), config.context_length
    loader, count = pretrain_gpt.TokenLoader(data_dir, "train", T, 320), config.batch_tokens // T
    for step, pieces in enumerate((8, 4, 2)):
        inputs, targets = loader.read(loader.step_windows(config.seed, step, count))
        nats = model(*(ids.reshape(-1, T // pieces) for ids in (inputs, targets))).detach()
        loss = float(nats) / targets.numel()
        row = next(row for row in read_records(tmp_path / "metrics.jsonl") if row["step"] == step + 1)
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
    plain = replace(config, out_dir=str(tmp_path / "plain"), length_warmup_fraction=0.0)
    pretrain_gpt.main(plain)
    assert [row[2] for row in losses(tmp_path)] == [row[2] for row in losses(tmp_path / "plain")]


def test_a_sample_is_text_and_always_the_same(base_run):
    model, tokenizer = chat.load(str(base_run))
    samples = pretrain_gpt.sample_text(model, tokenizer, seed=0)
    assert samples == pretrain_gpt.sample_text(model, tokenizer, seed=0)
    assert all(text.startswith(prompt) for text, prompt in zip(samples, pretrain_gpt.PROMPTS))


@pytest.mark.parametrize("moment", ["before", "within"])
def test_a_signal_before_a_validation_or_within_it_is_obeyed_without_a_further_step(
    moment, data_dir, tmp_path, monkeypatch
):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    evaluate, step, calls = pretrain_gpt.evaluate, Metrics.step, []

    def evaluate_with_signal(*arguments):
        calls.append(arguments)
        if moment == "within" and len(calls) == 2:
            signal.raise_signal(signal.SIGUSR1)
        return evaluate(*arguments)

    def step_with_signal(self, number, *arguments, **named):
        step(self, number, *arguments, **named)
        if moment == "before" and number == 3:
            signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(pretrain_gpt, "evaluate", evaluate_with_signal)
    monkeypatch.setattr(Metrics, "step", step_with_signal)
    try:
        with pytest.raises(SystemExit) as left:
            pretrain_gpt.main(pretrain_config(data_dir, tmp_path, save_every=100))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert left.value.code == 75 and newest_checkpoint(tmp_path).name == "step_0000003"
    rows = read_records(tmp_path / "metrics.jsonl")
    assert max(row["step"] for row in rows) == 3
    assert ("val_loss" in rows[-1]) == (moment == "within") and len(calls) == (2 if moment == "within" else 1)


def test_mistakes_in_a_pretraining_run_are_told(data_dir, tmp_path):
    for change, message in (
        ({"hidden_size": 33}, "hidden_size 33 is not divisible by num_attention_heads 2"),
        ({"context_length": 100_000, "batch_tokens": 200_000}, "too few for one window of 100001"),
        ({"batch_tokens": 16}, "are 0 windows of 32"),
        ({"device": "cuda"}, "no CUDA device is visible"),
        ({"compile": "maybe"}, "--compile=maybe is unknown; choose auto, true, false"),
        ({"optimizer": "sgd"}, "--optimizer=sgd is unknown; choose muon, adamw"),
        ({"wandb": "on"}, "--wandb=on is unknown; choose auto, online, offline, off"),
        ({"keep_every": 3}, "--keep_every=3 is no multiple of --save_every=2"),
        ({"resume": str(tmp_path / "nothing")}, "cannot be resumed: checkpoint.json is missing"),
        ({"device": "abacus"}, "--device=abacus cannot be used here"),
        ({"rope_theta": 0.0}, "--rope_theta=0.0: expected a number above zero"),
        ({"length_warmup_fraction": 1.5}, "--length_warmup_fraction=1.5: expected a share, from 0 to 1"),
        ({"length_warmup_fraction": 0.5, "context_length": 12}, "into 8, and --context_length=12 is no mult"),
        ({"depth": -1}, "--depth=-1: expected a number from zero up"),
        ({"depth": 4, "batch_tokens": 0}, "--batch_tokens=0: expected a number above zero"),
        ({"depth": 2, "optimizer": "adamw"}, "--depth=2 sets rates for Muon, not for --optimizer=adamw"),
        ({"depth": 2, "init_from": "out/base"}, "--depth=2 shapes a new model, but --init_from=out/base has"),
        ({"eval_every": 0}, "--eval_every=0: expected a number above zero"),
        ({"micro_batch_size": -1}, "--micro_batch_size=-1: expected a number above zero"),
    ):
        if not (change.get("device") and torch.cuda.is_available()):
            with pytest.raises(InputError, match=message):
                pretrain_gpt.main(pretrain_config(data_dir, tmp_path / "run", **change))


@pytest.mark.parametrize("depth", [1, 4, 12, 32])
def test_a_depth_gives_a_shape_and_the_steps_that_read_its_tokens(depth):
    config = Config(depth=depth)
    width = 64 * depth
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (depth, width, depth)
    tokens = 20 * 12 * depth * width**2
    assert 0 <= config.max_steps * config.batch_tokens - tokens < config.batch_tokens
    assert config.batch_tokens.bit_count() == 1 and config.warmup_steps < config.max_steps
    with torch.device("meta"):
        blocks = GPTModel(model_config(config, 64)).num_parameters() - 2 * 64 * width
    assert blocks == pytest.approx(12 * depth * width**2, rel=0.1)  # the SwiGLU's width is rounded up


def test_what_is_given_beside_a_depth_stays_even_at_its_default_and_the_rest_follows_it():
    config = Config(depth=8)
    assert config == Config(**asdict(config)) and Config(depth=0) == Config()
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    own = Config(depth=8, max_steps=200, lr=3e-3, num_attention_heads=4, hidden_size=512)
    assert (own.max_steps, own.lr, own.num_attention_heads, own.hidden_size) == (200, 3e-3, 4, 512)
    assert (own.warmup_steps, own.matrix_lr) == (10, config.matrix_lr)
    usual = Config().batch_tokens
    assert config.batch_tokens != usual == Config(depth=8, batch_tokens=usual).batch_tokens
    wide = Config(depth=8, hidden_size=1024)
    assert wide.num_attention_heads == 16
    assert wide.max_steps * wide.batch_tokens == pytest.approx(4 * 20 * 12 * 8 * 512**2, rel=0.01)
    large = parse_config(Config, ["--depth=8", f"--batch_tokens={4 * config.batch_tokens}"])
    assert large.max_steps == -(-config.max_steps // 4)
    for name in ("lr", "matrix_lr", "embedding_lr", "head_lr"):
        assert getattr(large, name) == pytest.approx(2 * getattr(config, name))
    assert Config(depth=8, tie_word_embeddings=True).embedding_lr == config.head_lr < config.embedding_lr


def test_a_run_of_a_depth_tells_its_settings_and_goes_on_by_them_as_by_the_same_command(
    data_dir, tmp_path, capfd
):
    settings = ["--context_length=32", "--batch_tokens=256", "--micro_batch_size=4", "--max_steps=3"]
    settings += ["--samples=false", "--wandb=off", "--save_every=1", "--keep_last=0", "--dtype=float32"]
    settings += [f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--eval_tokens=512", "--device=cpu"]
    pretrain_gpt.main(parse_config(Config, [*settings, "--depth=1"]))
    line = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("--depth=1 gives "))
    told = line.removeprefix("--depth=1 gives ").split()
    assert told[:2] == ["--num_hidden_layers=1", "--hidden_size=64"]
    once = weights(tmp_path, 3)
    for again in (["--depth=1"], told):
        shutil.rmtree(tmp_path / "step_0000003")
        pretrain_gpt.main(parse_config(Config, [*settings, *again]))
        assert weights(tmp_path, 3) == once


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(data_dir, tmp_path):
    for name in ("true", "false"):
        pretrain_gpt.main(pretrain_config(data_dir, tmp_path / name, compile=name, max_steps=2))
    for a, b in zip(losses(tmp_path / "true"), losses(tmp_path / "false")):
        assert all(x == y or math.isclose(x, y, rel_tol=1e-4) for x, y in zip(a, b))


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "full"])
@pytest.mark.parametrize("script", ["pretrain_gpt.py", "sft_gpt.py", "dpo_gpt.py"])
def test_two_and_three_ranks_over_gloo_equal_one_process(
    script, shard, data_dir, base_run, chats, preferences, tmp_path
):
    """Whole models, and split ones, whose ranks need equally many micro-batches."""

    def config(name):
        if script == "pretrain_gpt.py":  # 7 windows: 3, 2 and 2 on three ranks
            fields = {"batch_tokens": 7 * 32, "max_steps": 4, "micro_batch_size": 2, "samples": True}
            return pretrain_config(data_dir, tmp_path / name, shard=shard, **fields)
        if script == "dpo_gpt.py":
            return dpo_config(base_run, preferences, tmp_path / name, batch_pairs=5, shard=shard)
        return sft_config(
            base_run, chats, tmp_path / name, batch_tokens=5 * 64, micro_batch_size=2, shard=shard
        )

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


def test_a_context_too_short_for_the_samples_prompts_leaves_them_out(data_dir, tmp_path):
    pretrain_gpt.main(pretrain_config(data_dir, tmp_path, context_length=4, samples=True, max_steps=1))
    assert newest_checkpoint(tmp_path).name == "step_0000001"


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_an_out_dir_that_cannot_be_a_folder_is_one_sentence(place, data_dir, tmp_path):
    (tmp_path / "file").write_text("mine")
    out_dir = tmp_path / "file" if place == "a file" else tmp_path / "file" / "run"
    with pytest.raises(InputError, match=f"{out_dir} cannot be made a folder"):
        pretrain_gpt.main(pretrain_config(data_dir, out_dir))
    assert (tmp_path / "file").read_text() == "mine"
