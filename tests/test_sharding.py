"""Models that are split over ranks (FSDP2) train as whole ones do, and leave the same checkpoints."""

import dataclasses
import os
from functools import partial

import planted
import pytest
import torch
from conftest import SMALL, losses, pretrain_config, refused, small_model
from safetensors.torch import load_file
from test_distributed import in_ranks

import sharding
from checkpoint import newest_checkpoint, open_weights
from distributed import Ranks
from optim import make_optimizer, set_learning_rate
from sharding import own_numbers, own_rows, shard_model, whole, wrap
from training import StepHistory, forward_backward

TARGETS = 8 * 32 - sum(4 * row for row in range(8))


def batches(ranks: Ranks, step: int, packed: bool) -> list[dict]:
    """A rank's share of a global batch of eight rows with unequal numbers of targets, one row at a time; each
    row whole, or two sequences that are packed."""
    ids = torch.randint(0, 320, (8, 33), generator=torch.Generator().manual_seed(step))
    targets = ids[:, 1:].clone()
    for row in range(8):
        targets[row, : 4 * row] = -100
    extra = {}
    if packed:
        extra["positions"] = torch.cat([torch.arange(20), torch.arange(12)])[None]
        extra["cu_seqlens"] = torch.tensor([0, 20, 32]).int()
    nothing = torch.full_like(targets[0], -100)
    return [
        {
            "input_ids": ids[row or 0, None, :-1],
            "targets": (nothing if row is None else targets[row])[None],
            **extra,
        }
        for (row,) in ranks.share(range(8), 1)  # each rank computes as often as the others
    ]


def train(
    ranks: Ranks,
    kind: str,
    *,
    packed: bool = False,
    compile: str = "false",
    checkpointed: bool = False,
    steps: int = 4,
    **shape,
) -> dict:
    """Some steps; losses, and the first step's gradients and the last weights, all of them whole."""
    model = shard_model(small_model(**shape), ranks)
    model.checkpoint_activations = checkpointed
    rates = {"lr": 1e-3, "matrix_lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer = make_optimizer(model, kind, ranks=ranks, **rates)
    module, history, found = wrap(model, ranks, compile), StepHistory(0.0, ranks), {"losses": []}
    for step in range(steps):
        loss_sum, norm = forward_backward(
            module, batches(ranks, step, packed), targets=TARGETS, max_grad_norm=1.0, ranks=ranks
        )
        if not step:
            found["gradients"] = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
        values = {"loss_sum": loss_sum, "grad_norm": norm, "targets": TARGETS, "tokens": 256}
        bad = history.record(step, **values, lr=set_learning_rate(optimizer, 1.0), stop=False)
        optimizer.step(skip=bad)
        optimizer.zero_grad(set_to_none=True)
        found["losses"] += [outcome.numbers["loss"] for outcome in history.outcomes(step)]
    found["weights"] = {name: whole(p).detach() for name, p in model.named_parameters()}
    return found


CASES = [
    (shard, kind, changes)
    for shard in ("none", "full")
    for kind in ("adamw", "muon")
    for changes in ({}, {"packed": True, "tie_word_embeddings": True, "num_key_value_heads": 2})
]


COMPILED = [
    (shard, "muon", {**changes, "compile": "true"})
    for shard in ("none", "full")
    for changes in ({}, {"packed": True}, {"checkpointed": True})
]


def all_cases(ranks: Ranks, folder, cases=CASES) -> None:
    for i, (shard, kind, changes) in enumerate(cases):
        ranks.shard, ranks.even_batches = shard, shard == "full"
        torch.save(train(ranks, kind, **changes), folder / f"{i}-{ranks.rank}.pt")
    ranks.leave()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_whole_and_split_models_train_as_on_one_rank(world, tmp_path):
    """Gradients to 1e-6, losses to 1e-5, on whole and packed rows. Three ranks cannot split 32 evenly."""
    assert in_ranks(all_cases, tmp_path, world=world, seconds=240) == [0] * world
    assert_as_alone(CASES, world, tmp_path)


@pytest.mark.slow
def test_compiled_blocks_train_on_two_ranks_whole_or_split_as_plain_ones_do_on_one(tmp_path):
    """As on a cluster, where compiling is the default. Activations are kept or computed again."""
    assert in_ranks(partial(all_cases, cases=COMPILED), tmp_path, seconds=600) == [0, 0]
    assert_as_alone(COMPILED, 2, tmp_path)


def assert_as_alone(cases, world: int, tmp_path) -> None:
    """What the ranks saved of each case is what one rank computes without compiling."""
    for i, (_, kind, changes) in enumerate(cases):
        changes = {**changes, "compile": "false"}
        alone = train(Ranks(0, 1, torch.device("cpu")), kind, **changes)
        split = torch.load(tmp_path / f"{i}-0.pt", weights_only=True)
        away = {name: (split["gradients"][name] - g).norm() for name, g in alone["gradients"].items()}
        norms = {name: g.norm() for name, g in alone["gradients"].items()}
        assert torch.stack([*away.values()]).norm() <= 1e-6 * torch.stack([*norms.values()]).norm()
        assert all(away[name] <= 1e-5 * norms[name] for name in norms)
        assert split["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for rank in range(1, world):
            other = torch.load(tmp_path / f"{i}-{rank}.pt", weights_only=True)["weights"]
            assert all(torch.equal(other[name], weight) for name, weight in split["weights"].items())


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_without_a_compiler_compiling_is_refused(kind, monkeypatch):
    ranks, model = Ranks(0, 1, torch.device(kind)), small_model()
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(model, "compile_blocks", lambda: None)
    monkeypatch.setattr(sharding.shutil, "which", lambda name: None)
    refused("needs a compiler on each machine, .* or use --compile=false", wrap, model, ranks, "true")
    assert wrap(model, ranks, "false") is model
    monkeypatch.setenv("CC" if kind == "cuda" else "CXX", "mine")
    assert wrap(model, ranks, "true") is model


def test_the_rows_of_a_rank_are_those_that_torch_chunk_gives():
    for rows in (1, 2, 3, 7, 8, 32):
        for world in (1, 2, 3, 5):
            chunks = torch.arange(rows).chunk(world)
            for rank in range(world):
                expected = chunks[rank].tolist() if rank < len(chunks) else []
                assert [*range(*own_rows(rows, rank, world))] == expected


def open_in_parts(ranks: Ranks, folder) -> None:
    ranks.shard = "full"
    model = open_weights(folder / "model", ranks)
    expected = load_file(folder / "model" / "model.safetensors")
    for name, p in model.stored_state().items():
        part = slice(*own_rows(len(p), ranks.rank, ranks.world))
        assert torch.equal(own_numbers(p), expected[name][part]), name
    ranks.leave()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_rank_opens_its_part_of_a_checkpoint(tied, tmp_path):
    small_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "model")
    assert in_ranks(open_in_parts, tmp_path, world=3) == [0, 0, 0]


def residual_types(ranks: Ranks, folder) -> None:
    ranks.shard, ranks.precision = "full", "bfloat16"
    model = shard_model(small_model(), ranks)
    types = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, inputs: types.append(inputs[0].dtype))
    module = wrap(model, ranks, "false")
    forward_backward(module, batches(ranks, 0, False), targets=TARGETS, max_grad_norm=1.0, ranks=ranks)
    assert types and set(types) == {torch.float32}, types
    ranks.leave()


def test_the_residual_stream_of_a_split_model_is_fp32_in_bf16_too(tmp_path):
    assert in_ranks(residual_types, tmp_path) == [0, 0]


def two_ranks_a_machine(_) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "2"


@pytest.mark.slow
def test_a_run_goes_on_under_any_engine_and_number_of_ranks(data_dir, tmp_path, fresh):
    """Split over two ranks, then one rank, then split over four, then two with whole models."""
    straight = pretrain_config(data_dir, tmp_path / "straight", **SMALL)
    fresh.submit(planted.forked, "pretrain_gpt", straight).result(90)
    elastic = pretrain_config(data_dir, tmp_path / "elastic", **SMALL, samples=True)
    for world, shard, stop in ((2, "full", 2), (1, "none", 3), (4, "hybrid", 5), (2, "none", None)):
        config = dataclasses.replace(elastic, micro_batch_size=1, save_every=100, shard=shard)
        faults = [f"SIGTERM:{stop}:0"] if stop else []
        job = fresh.submit(planted.forked, "pretrain_gpt", config, world, faults, two_ranks_a_machine)
        codes, log, _ = job.result(90)
        assert set(codes) == {75 if stop else 0}, log
    for a, b in zip(losses(tmp_path / "straight"), losses(tmp_path / "elastic"), strict=True):
        for x, y in zip(a, b):
            assert x == y or abs(x - y) <= 1e-5 * abs(x), (a, b)
    ours, theirs = (
        load_file(newest_checkpoint(tmp_path / name) / "model.safetensors")
        for name in ("straight", "elastic")
    )
    assert {n: w.shape for n, w in ours.items()} == {n: w.shape for n, w in theirs.items()}
