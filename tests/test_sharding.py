"""Models that are split over ranks (FSDP2) train as whole ones do."""

import torch
from conftest import small_model
from test_distributed import in_ranks

from distributed import Ranks, shard_model, whole, wrap
from optim import make_optimizer, set_learning_rate
from training import StepHistory, forward_backward


def batches(ranks: Ranks, step: int) -> list[dict]:
    """A rank's share of a global batch of eight rows with unequal numbers of targets."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 320, (8, 33), generator=generator)
    targets = ids[:, 1:].clone()
    for row in range(8):
        targets[row, : 4 * row] = -100
    own = slice(ranks.rank, None, ranks.world)
    return [{"input_ids": i[None, :-1], "targets": t[None]} for i, t in zip(ids[own], targets[own])]


def train(ranks: Ranks, kind: str, steps: int = 4) -> dict:
    model = small_model()
    shard_model(model, ranks)
    optimizer = make_optimizer(model, kind, lr=1e-3, matrix_lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    module, history, losses, first = wrap(model, ranks, "false"), StepHistory(0.0, ranks), [], {}
    for step in range(steps):
        targets = 8 * 32 - sum(4 * row for row in range(8))
        loss_sum, norm = forward_backward(
            module, batches(ranks, step), targets=targets, max_grad_norm=1.0, ranks=ranks
        )
        if not first:
            first = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
        lr = set_learning_rate(optimizer, 1.0)
        bad = history.record(step, loss_sum=loss_sum, grad_norm=norm, targets=targets, lr=lr, stop=False)
        optimizer.step(skip=bad)
        optimizer.zero_grad(set_to_none=True)
        losses += [outcome.numbers["loss"] for outcome in history.outcomes(step)]
    return {
        "losses": losses,
        "gradients": first,
        "weights": {n: whole(p).detach() for n, p in model.named_parameters()},
    }


def sharded(ranks: Ranks, folder) -> None:
    ranks.shard = "full"
    for kind in ("adamw",):
        result = train(ranks, kind)
        if ranks.is_main:
            torch.save(result, folder / f"{kind}.pt")
    ranks.leave()


def test_a_split_model_trains_as_a_whole_one(tmp_path):
    assert in_ranks(sharded, tmp_path, world=2) == [0, 0]
    for kind in ("adamw",):
        alone = train(Ranks(0, 1, torch.device("cpu")), kind)
        split = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
        for name, gradient in alone["gradients"].items():
            assert (split["gradients"][name] - gradient).norm() <= 1e-6 * gradient.norm(), name
        print(alone["losses"], split["losses"])
        for a, b in zip(alone["losses"], split["losses"], strict=True):
            assert abs(a - b) <= 1e-5 * a
