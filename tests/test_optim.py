"""Muon, AdamW and the learning-rate schedule."""

import pytest
import torch
from conftest import small_model

from optim import MOMENTUM, Muon, make_optimizer, orthogonalize, schedule, set_learning_rate

RATES = {"lr": 3e-3, "matrix_lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1}


def test_the_schedule_rises_stays_and_falls_to_zero_over_just_the_run():
    scales = [schedule(step, 100, warmup_steps=10, decay_steps=40) for step in range(101)]
    assert scales[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert scales[10:61] == [1.0] * 51
    assert scales[60:] == pytest.approx([1 - i / 40 for i in range(41)])
    assert scales[99] > 0 and scales[100] == 0
    assert [schedule(step, 3, warmup_steps=0, decay_steps=0) for step in range(3)] == [1.0] * 3


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
    groups = make_optimizer(model, optimizer, **RATES).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [[names[id(p)] for p in group["params"]] for group in groups]
    assert sorted(name for group in grouped for name in group) == sorted(names.values())
    assert [group["weight_decay"] for group in groups] == [0.1, 0, 0]
    assert all("_proj" in name for name in grouped[0]) and len(grouped[0]) == 14
    assert grouped[1] == ["model.embed_tokens.weight", "lm_head.weight"]


def test_adamw_equals_torchs():
    ours, theirs = small_model(), small_model()
    optimizers = [
        make_optimizer(ours, "adamw", **RATES | {"lr": 1e-2, "weight_decay": 0.0}),
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

    ours = Muon(
        [{"params": [p], "muon": True, "lr": 0.02, "weight_decay": 0.1}], momentum=MOMENTUM, betas=(0.9, 0.95)
    )
    theirs = torch.optim.Muon([q], lr=0.02, weight_decay=0.1, momentum=MOMENTUM, nesterov=True)
    for _ in range(3):
        p.grad = torch.randn(48, 32)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert (p - q).norm() < 0.02 * (p - 1).norm()


def test_the_rate_of_every_group_is_its_peak_times_the_scale_and_adamws_is_returned():
    optimizer = make_optimizer(small_model(), "muon", **RATES)
    assert set_learning_rate(optimizer, 0.5) == 1.5e-3
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 1.5e-3, 1.5e-3]
