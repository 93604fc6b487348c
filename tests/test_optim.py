"""Muon, AdamW and the learning-rate schedule."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import ALONE, small_model
from test_distributed import in_ranks

import optim
from distributed import Ranks
from optim import (
    MOMENTUM,
    OPTIMIZERS,
    Muon,
    divide,
    make_optimizer,
    orthogonalize,
    schedule,
    set_learning_rate,
)

RATES = {"lr": 3e-3, "matrix_lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1}


def beginning(kind: str, ranks: Ranks = ALONE, **changes):
    """A model and its optimizer at its peak rates."""
    model = small_model(**changes)
    optimizer = make_optimizer(model, kind, ranks=ranks, **RATES)
    set_learning_rate(optimizer, 1.0)
    return model, optimizer


def set_gradients(model, seed: int) -> None:
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p)


def numbers(model, optimizer) -> dict[str, torch.Tensor]:
    """A copy of all weights and all of the optimizer's state."""
    found = {}
    for name, p in model.named_parameters():
        found[name] = p.detach().clone()
        found |= {f"{name} {key}": value.clone() for key, value in optimizer.state.get(p, {}).items()}
    return found


def differing(a: dict, b: dict) -> list[str]:
    """Where two of these have other bytes; 0.0 and -0.0 are not the same."""
    assert a.keys() == b.keys()
    return [name for name in a if a[name].numpy().tobytes() != b[name].numpy().tobytes()]


def test_the_schedule_rises_stays_and_falls_to_zero_over_just_the_run():
    scales = [schedule(step, 100, warmup_steps=10, decay_steps=40) for step in range(101)]
    assert scales[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert scales[10:61] == [1.0] * 51
    assert scales[60:] == pytest.approx([1 - i / 40 for i in range(41)])
    assert scales[99] > 0 and scales[100] == 0
    assert [schedule(step, 3, warmup_steps=0, decay_steps=0) for step in range(3)] == [1.0] * 3


def test_orthogonalize_in_bf16_is_near_that_in_fp64():
    """Within 1.8 %: with each term of a sum rounded before it is added it would be 2.5 %."""
    torch.manual_seed(0)
    g = torch.randn(4, 128, 128)
    exact = orthogonalize(g.double(), torch.float64)
    assert (orthogonalize(g, torch.bfloat16) - exact).norm() < 0.018 * exact.norm()


def test_orthogonalize_keeps_singular_vectors_and_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((1, 32, 32), (3, 64, 16), (1, 16, 64)):
        g = torch.randn(shape)
        u, _, vt = torch.linalg.svd(g, full_matrices=False)
        inner = u.mT @ orthogonalize(g, torch.float32) @ vt.mT  # diagonal, with the new singular values
        values = inner.diagonal(dim1=-2, dim2=-1)
        assert (inner - torch.diag_embed(values)).abs().max() < 1e-3
        assert values.min() > 0.3 and values.max() < 1.3


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_is_in_one_group_and_only_the_blocks_matrices_decay(optimizer):
    model = small_model()
    groups = make_optimizer(model, optimizer, ranks=ALONE, **RATES).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [[names[id(p)] for p in group["params"]] for group in groups]
    assert sorted(name for group in grouped for name in group) == sorted(names.values())
    assert [group["weight_decay"] for group in groups] == [0.1, 0, 0, 0]
    assert all("_proj" in name for name in grouped[0]) and len(grouped[0]) == 14
    assert grouped[1:3] == [["model.embed_tokens.weight"], ["lm_head.weight"]]


def test_adamw_equals_torchs():
    ours, theirs = small_model(), small_model()
    optimizers = [
        make_optimizer(ours, "adamw", ranks=ALONE, **RATES | {"lr": 1e-2, "weight_decay": 0.0}),
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
    """torch.optim.Muon orthogonalizes in bf16, ours here in fp32."""
    torch.manual_seed(0)
    p, q = (torch.nn.Parameter(torch.ones(48, 32)) for _ in range(2))

    group = {"params": [p], "muon": True, "lr": 0.02, "weight_decay": 0.1}
    ours = Muon([group], momentum=MOMENTUM, betas=(0.9, 0.95), ranks=ALONE)
    theirs = torch.optim.Muon([q], lr=0.02, weight_decay=0.1, momentum=MOMENTUM, nesterov=True)
    for _ in range(3):
        p.grad = torch.randn(48, 32)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert (p - q).norm() < 0.02 * (p - 1).norm()


def test_the_rate_of_every_group_is_its_peak_times_the_scale_and_adamws_is_returned():
    optimizer = make_optimizer(small_model(), "muon", ranks=ALONE, **RATES)
    assert set_learning_rate(optimizer, 0.5) == 1.5e-3
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 1.5e-3, 1.5e-3, 1.5e-3]


@pytest.mark.parametrize("tied", [False, True])
def test_the_embedding_and_the_head_may_have_rates_of_their_own(tied):
    model = small_model(tie_word_embeddings=tied)
    optimizer = make_optimizer(model, "muon", ranks=ALONE, **RATES, embedding_lr=0.1, head_lr=0.01)
    assert set_learning_rate(optimizer, 0.5) == 1.5e-3
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.05, 0.005, 1.5e-3]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_gradients(model, 0)
    optimizer.step()  # of a tied model no matrix is the head's
    for name, rate in ("model.embed_tokens.weight", 0.05), ("lm_head.weight", 0.005):
        if name in before:  # AdamW's first step is the rate, up or down
            change = (dict(model.named_parameters())[name] - before[name]).abs()
            torch.testing.assert_close(change, torch.full_like(change, rate), rtol=1e-3, atol=0)
    assert ("lm_head.weight" in before) == (not tied)


def test_muon_alone_equals_its_definition_bit_for_bit():
    """All matrices of a shape in one stack, of the quick start's width and depth."""
    model, optimizer = beginning("muon", hidden_size=256, num_hidden_layers=3)
    rate, decay = RATES["matrix_lr"], RATES["matrix_lr"] * RATES["weight_decay"]
    weights = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    momenta = [torch.zeros_like(w) for w in weights]
    for seed in range(3):
        set_gradients(model, seed)
        grads = [p.grad for p in optimizer.param_groups[0]["params"]]
        optimizer.step()
        for shape in {w.shape for w in weights}:
            alike = [i for i, w in enumerate(weights) if w.shape == shape]
            for i in alike:
                momenta[i].lerp_(grads[i], 1 - MOMENTUM)
            nesterov = torch.stack([grads[i].lerp(momenta[i], MOMENTUM) for i in alike])
            updates = orthogonalize(nesterov, torch.float32)
            for i, update in zip(alike, updates):
                scale = max(1, shape[0] / shape[1]) ** 0.5
                weights[i].mul_(1 - decay).add_(update, alpha=-rate * scale)
    assert len(weights) == 21
    for p, w, momentum in zip(optimizer.param_groups[0]["params"], weights, momenta):
        assert torch.equal(p, w) and torch.equal(optimizer.state[p]["momentum"], momentum)


def test_a_stack_is_bounded_and_a_larger_matrix_is_alone(monkeypatch):
    model, optimizer = beginning("muon")
    set_gradients(model, 0)
    optimizer.step()
    whole, sizes = numbers(model, optimizer), Counter()

    def noted(g, dtype):
        sizes[tuple(g.shape)] += 1
        return orthogonalize(g, dtype)

    monkeypatch.setattr(optim, "STACK", 3 * 32 * 32)
    monkeypatch.setattr(optim, "orthogonalize", noted)
    model, optimizer = beginning("muon")
    set_gradients(model, 0)
    optimizer.step()
    assert sizes == {(3, 32, 32): 2, (2, 32, 32): 1, (1, 128, 32): 4, (1, 32, 128): 2}
    for name, value in numbers(model, optimizer).items():
        torch.testing.assert_close(value, whole[name])


def test_ranks_share_the_work_evenly():
    """12 layers of width 768 on 8 ranks. A matrix of 768 x 2048 costs 19/3 multiplications, one of 768 x 768
    costs 3, in units of 768³; together 372."""
    shapes = [shape for _ in range(12) for shape in 4 * [(768, 768)] + 2 * [(2048, 768)] + [(768, 2048)]]
    matrices = [torch.empty(shape, device="meta") for shape in shapes]
    shares = divide(matrices, 8)
    assert sorted(id(m) for share in shares for m in share) == sorted(id(m) for m in matrices)
    counts = Counter(tuple(Counter(m.numel() // 768 for m in share).values()) for share in shares)
    assert counts == {(5, 5): 4, (4, 7): 4}  # 46.7 and 46.3 units; the mean is 46.5
    again = divide([torch.empty(shape, device="meta") for shape in shapes], 8)
    assert [[m.shape for m in share] for share in shares] == [[m.shape for m in share] for share in again]
    assert [len(share) for share in divide(matrices[:2], 3)] == [1, 1, 0]


def three_updates(ranks: Ranks) -> dict[str, torch.Tensor]:
    """After two updates of all weights and one of a single matrix, of which most ranks have no share."""
    model, optimizer = beginning("muon", ranks)
    for seed in range(3):
        set_gradients(model, seed)
        if seed == 2:
            for name, p in model.named_parameters():
                p.grad = p.grad if name == "model.layers.0.mlp.up_proj.weight" else None
        optimizer.step()
    found = numbers(model, optimizer)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.update(torch.tensor(True))
    assert differing(found, numbers(model, optimizer)) == []
    return found


# How ranks compute and send: as on a CPU and as on CUDA; and how far they may be from one rank, as a share
# of what an update changes.
PRECISIONS = {"float32": 1e-4, "bfloat16": 0.02}


def update_in_ranks(ranks: Ranks, folder) -> None:
    for ranks.precision in PRECISIONS:
        torch.save(three_updates(ranks), folder / f"{ranks.precision} {ranks.rank}")
    ranks.leave()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_that_share_the_work_agree_bit_for_bit_and_with_one_rank_up_to_rounding(world, tmp_path):
    assert in_ranks(update_in_ranks, tmp_path, world=world) == [0] * world
    start = dict(small_model().named_parameters())
    for precision, tolerance in PRECISIONS.items():
        alone = three_updates(replace(ALONE, precision=precision))
        first, *others = (torch.load(tmp_path / f"{precision} {rank}") for rank in range(world))
        assert all(differing(first, other) == [] for other in others)
        assert {name.rpartition(" ")[2] for name in differing(first, alone)} <= set(start)  # state is equal
        for name in start:
            change = (alone[name] - start[name]).norm()
            assert change > 0 and (first[name] - alone[name]).norm() < tolerance * change


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_masked_update_changes_not_one_bit_whatever_the_gradients(kind, bad):
    model, optimizer = beginning(kind)
    for updates in range(2):
        with torch.no_grad():
            for p in model.parameters():
                p.view(-1)[0] = -0.0
                for value in optimizer.state[p].values():
                    if value.dim():
                        value.view(-1)[0] = -0.0
        before = numbers(model, optimizer)
        set_gradients(model, updates)
        for p in model.parameters():
            p.grad.view(-1)[::3] = bad
        optimizer.update(torch.tensor(True))
        after = numbers(model, optimizer)
        if updates == 0:  # state that was not there is zero now
            assert all(not after.pop(name).any() for name in after.keys() - before.keys())
        assert differing(before, after) == []
        set_gradients(model, updates)
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_update_that_the_mask_lets_through_has_the_bytes_of_one_without_a_mask(kind):
    (masked, with_mask), (plain, without) = beginning(kind), beginning(kind)
    for seed in range(3):
        set_gradients(masked, seed)
        set_gradients(plain, seed)
        with_mask.update(torch.tensor(False))
        without.step()
    assert differing(numbers(masked, with_mask), numbers(plain, without)) == []


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_on_a_cpu_an_update_to_skip_does_nothing_at_all(kind):
    model, optimizer = beginning(kind)
    before = numbers(model, optimizer)
    set_gradients(model, 0)
    optimizer.step(torch.tensor(True))
    assert not optimizer.state and differing(before, numbers(model, optimizer)) == []
    optimizer.step(torch.tensor(False))
    assert len(differing(before, {name: p.detach() for name, p in model.named_parameters()})) == len(before)
