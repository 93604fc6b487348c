"""Muon and AdamW, the parameter groups they work on, and the learning-rate schedule."""

from collections import defaultdict

import torch
from torch import nn
from torch.optim.adamw import adamw as adamw_update

from distributed import own_part

MOMENTUM = 0.95  # of Muon, as in Jordan et al. 2024


def orthogonalize(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearly orthogonal matrices with the singular vectors of g (…, M, N): U Vᵀ of its SVD, singular values
    near 1.

    A quintic Newton–Schulz iteration with the coefficients of Jordan et al. 2024
    (https://kellerjordan.github.io/posts/muon/), in bf16 on CUDA and in g's own type elsewhere.
    """
    x = g.bfloat16() if g.is_cuda else g
    tall = g.size(-2) > g.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).type_as(g)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized (Jordan et al. 2024), for groups marked `muon`; AdamW for the
    others.

    The update is scaled by sqrt(max(1, M/N)), so that its effect on the activations does not depend on a
    matrix's shape. Matrices of one shape are orthogonalized together. Not sharded: each rank computes every
    update.
    """

    def __init__(self, groups: list[dict], *, momentum: float, betas: tuple[float, float]):
        super().__init__(groups, {"momentum": momentum, "betas": betas})

    @torch.no_grad()
    def step(self, skip: torch.Tensor | None = None):
        if skip is not None and skip:
            return
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            (self.muon_step if group["muon"] else self.adamw_step)(params, group)

    def muon_step(self, params: list[nn.Parameter], group: dict) -> None:
        by_shape = defaultdict(list)
        for p in params:
            by_shape[p.shape].append(p)
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        for shape, matrices in by_shape.items():
            grads = [p.grad for p in matrices]
            momenta = [self.state[p]["momentum"] for p in matrices]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
            updates = orthogonalize(torch.stack(nesterov))
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(
                matrices, list(updates), alpha=-group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
            )

    def adamw_step(self, params: list[nn.Parameter], group: dict) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p].update(
                    step=torch.zeros((), device=p.device),
                    exp_avg=torch.zeros_like(p),
                    exp_avg_sq=torch.zeros_like(p),
                )
        moments, squares, steps = (
            [self.state[p][k] for p in params] for k in ("exp_avg", "exp_avg_sq", "step")
        )
        adamw_update(
            params,
            [p.grad for p in params],
            moments,
            squares,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )


OPTIMIZERS = ("muon", "adamw")


def make_optimizer(
    model: nn.Module,
    kind: str,
    *,
    lr: float,
    matrix_lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    state: dict | None = None,
) -> Muon:
    """Muon (with AdamW for what is no matrix of a block), or AdamW for all (Loshchilov and Hutter 2019).

    There are three groups: the blocks' matrices, the embedding and head, the norms. `lr` is AdamW's peak
    rate, `matrix_lr` Muon's. Only the blocks' matrices decay: rows of the embedding seldom get a gradient,
    but would always shrink. With a run's `state` the optimizer goes on from what it holds and takes it out.
    """
    matrices, tables, vectors = [], [], []
    for name, p in model.named_parameters():
        (vectors if p.dim() != 2 else matrices if ".layers." in name else tables).append(p)
    muon = kind == "muon"
    peak_lr = matrix_lr if muon else lr
    rest = {"muon": False, "peak_lr": lr, "weight_decay": 0.0}
    groups = [
        {"params": matrices, "muon": muon, "peak_lr": peak_lr, "weight_decay": weight_decay},
        {"params": tables, **rest},
        {"params": vectors, **rest},
    ]
    optimizer = Muon(groups, momentum=MOMENTUM, betas=betas)
    if state:
        load_state_by_name(model, optimizer, state.pop("optimizer"))
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr_scale: float) -> float:
    """Set every group's rate to this share of its peak; returns AdamW's."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * lr_scale
    return optimizer.param_groups[-1]["lr"]


def schedule(step: int, max_steps: int, *, warmup_steps: int, decay_steps: int) -> float:
    """Share of the peak learning rate in the update that follows `step` finished ones.

    Warm-up, plateau and decay to zero, all linear (Hu et al. 2024, https://arxiv.org/abs/2404.06395). The
    last update's share is above zero.
    """
    rise = (step + 1) / warmup_steps if warmup_steps else 1.0
    fall = (max_steps - step) / decay_steps if decay_steps else 1.0
    return max(0.0, min(1.0, rise, fall))


def state_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """The optimizer's state keyed by parameter name, so that it fits however the groups are arranged."""
    return {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}


def load_state_by_name(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict]) -> None:
    """Put back a copy of what state_by_name gave, on each parameter's device."""
    for name, p in model.named_parameters():
        if name in state:
            optimizer.state[p] = {
                key: own_part(value.to(p.device, copy=True), p) for key, value in state[name].items()
            }
