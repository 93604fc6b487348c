"""Muon and AdamW, the parameter groups they work on, and the learning-rate schedule."""

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.adamw import adamw as adamw_update

from distributed import Ranks
from sharding import own_numbers, own_part, own_rows

MOMENTUM = 0.95  # of Muon, as in Jordan et al. 2024
STACK = 2**24  # numbers in the matrices that are orthogonalized together, at most: 64 MiB in fp32

# Since torch 2.13 the second name is deprecated; before, there was no other.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def orthogonalize(g: torch.Tensor, dtype: torch.dtype, steps: int = 5) -> torch.Tensor:
    """Nearly orthogonal matrices with the singular vectors of g (n, M, N): U Vᵀ of its SVD, singular values
    near 1; computed in a type.

    A quintic Newton–Schulz iteration with the coefficients of Jordan et al. 2024
    (https://kellerjordan.github.io/posts/muon/). Sums are made in the kernels that multiply, and so rounded
    once.
    """
    x = g.to(dtype)
    tall = g.size(-2) > g.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x.mT if tall else x


def divide(matrices: Sequence[torch.Tensor], world: int) -> list[list[torch.Tensor]]:
    """A share of the matrices for each rank, nearly equal in work. Their shapes alone decide, so all ranks
    divide alike.

    The most expensive matrix goes first, each to the rank that has the least work so far (Graham 1969).
    """

    def work(matrix) -> int:
        """Multiplications in one iteration: (m, n) (n, m), (m, m) (m, m) and (m, m) (m, n)."""
        m, n = sorted(matrix.shape)
        return m * m * (2 * n + m)

    shares, loads = [[] for _ in range(world)], [(0, rank) for rank in range(world)]
    for matrix in sorted(matrices, key=work, reverse=True):
        load, rank = loads[0]  # the least
        shares[rank].append(matrix)
        heapq.heapreplace(loads, (load + work(matrix), rank))
    return shares


def stacks(matrices: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Matrices of one shape at a time, of at most STACK numbers."""
    by_shape = defaultdict(list)
    for matrix in matrices:
        by_shape[matrix.shape].append(matrix)
    for shape, alike in by_shape.items():
        n = max(1, STACK // shape.numel())
        yield from (alike[i : i + n] for i in range(0, len(alike), n))


def places(share: Sequence[torch.Tensor], row: torch.Tensor) -> Iterator[tuple[list, torch.Tensor]]:
    """Each stack of a rank's share, and the (n, M, N) numbers in the rank's row that belong to it."""
    for stack in stacks(share):
        size = len(stack) * stack[0].numel()
        yield stack, row[:size].view(len(stack), *stack[0].shape)
        row = row[size:]


def masked(updates: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
    """Zeros if `skip`: a weight minus the rate times 0 is the weight."""
    return updates if skip is None else updates.masked_fill_(skip, 0)


def flat(tensors: Sequence[torch.Tensor], like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Tensors, perhaps none, one behind the other, in a type."""
    return torch.cat([own_numbers(like).new_empty(0), *(t.flatten() for t in tensors)]).to(dtype)


def exchange(
    sent: Sequence[torch.Tensor], sizes: Sequence[int], among: dist.ProcessGroup
) -> Sequence[torch.Tensor]:
    """All-to-all: send each rank of a group its tensor; return what each sent here, of these `sizes`."""
    got = sent[0].new_empty(sum(sizes))
    dist.all_to_all_single(got, torch.cat(list(sent)), list(sizes), [len(t) for t in sent], group=among)
    return got.split(list(sizes))


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized (Jordan et al. 2024), for groups marked `muon`; AdamW for the
    others.

    The update is scaled by sqrt(max(1, M/N)), so that its effect on the activations does not depend on a
    matrix's shape. Weights, gradients and all state are whole on every rank, and every rank updates all of
    them. Only the orthogonalization is divided: each rank does its share of the matrices, in stacks of one
    shape. One all-gather then sends all updates to all ranks, in the type that they were computed in. It is
    an all-reduce if the gathered tensor would be mostly padding. So all ranks keep the same weights, bit for
    bit.

    With FSDP2 each rank holds some rows of every matrix and its state. One all-to-all gives each rank the
    whole matrices of its share. A second one returns the rows of their updates.
    """

    def __init__(self, groups: list[dict], *, momentum: float, betas: tuple[float, float], ranks: Ranks):
        super().__init__(groups, {"momentum": momentum, "betas": betas})
        self.ranks = ranks

    def step(self, skip: torch.Tensor | None = None) -> None:
        """Update all weights, or none if `skip` is true: a bool of no dimensions, the same on all ranks.

        On a CPU it is read at once. On a GPU nobody waits for it: the device computes the update and masks
        it, also if gradients are not finite.
        """
        if skip is not None and skip.device.type == "cpu":
            if skip:
                return
            skip = None
        self.update(skip)

    @torch.no_grad()
    def update(self, skip: torch.Tensor | None) -> None:
        """All groups' update. A true `skip` masks it: not one bit of weights and state changes."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self.muon_step if group["muon"] else self.adamw_step)(params, group, skip)

    def muon_step(self, params: list[nn.Parameter], group: dict, skip: torch.Tensor | None) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [own_numbers(self.state[p]["momentum"]) for p in params]
        grads = [own_numbers(p.grad) for p in params]
        decay = 1 - group["lr"] * group["weight_decay"]
        if skip is None:
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        else:
            decay = torch.where(skip, 1.0, decay)
            for old, grad in zip(momenta, grads):
                torch.where(skip, old, old.lerp(grad, 1 - group["momentum"]), out=old)
        torch._foreach_mul_([own_numbers(p) for p in params], decay)
        all_updates = self.updates_of_rows if self.ranks.sharded else self.all_updates
        for matrices, updates in all_updates(params, group, skip):
            M, N = matrices[0].shape
            weights = [own_numbers(p) for p in matrices]
            torch._foreach_add_(weights, list(updates), alpha=-group["lr"] * max(1, M / N) ** 0.5)

    def all_updates(
        self, params: list[nn.Parameter], group: dict, skip: torch.Tensor | None
    ) -> Iterator[tuple]:
        """Stacks of matrices, each with its updates (n, M, N), from this rank and the others."""
        if self.ranks.world == 1:
            yield from ((stack, self.own_updates(stack, group, skip)) for stack in stacks(params))
            return
        shares, rank = divide(params, self.ranks.world), self.ranks.rank
        sizes, kind = [sum(p.numel() for p in share) for share in shares], self.ranks.dtype
        padded = self.ranks.world * max(sizes)
        gathered = padded <= 2 * sum(sizes)  # with more ranks than matrices most of it would be padding
        if gathered:
            numbers = params[0].new_empty(padded, dtype=kind)
            rows = numbers.split(max(sizes))
        else:
            numbers = params[0].new_zeros(sum(sizes), dtype=kind)
            rows = numbers.split(sizes)
        for stack, place in places(shares[rank], rows[rank]):
            place.copy_(self.own_updates(stack, group, skip))
        if gathered:
            all_gather(numbers, rows[rank])  # in place: each rank has filled its row
        else:
            dist.all_reduce(numbers)  # of each number and zeros
        for share, row in zip(shares, rows):
            yield from places(share, row)

    def own_updates(self, stack: list[nn.Parameter], group: dict, skip: torch.Tensor | None) -> torch.Tensor:
        """Nesterov's momentum of matrices of one shape, orthogonalized: (n, M, N); zeros if `skip`."""
        return masked(orthogonalize(torch.stack(self.nesterov(stack, group)), self.ranks.dtype), skip)

    def nesterov(self, params: list[nn.Parameter], group: dict) -> Sequence[torch.Tensor]:
        """What of each matrix's Nesterov momentum lies on this rank."""
        momenta = [own_numbers(self.state[p]["momentum"]) for p in params]
        return torch._foreach_lerp([own_numbers(p.grad) for p in params], momenta, group["momentum"])

    def updates_of_rows(
        self, params: list[nn.Parameter], group: dict, skip: torch.Tensor | None
    ) -> Iterator[tuple]:
        """Each matrix, alone, with the update (1, m, N) of the m rows that this rank has of it."""
        mesh = params[0].device_mesh
        among, rank, world = mesh.get_group("shard"), mesh.get_local_rank("shard"), mesh.size(-1)
        shares, kind = divide(params, world), self.ranks.dtype
        rows = dict(zip(params, self.nesterov(params, group)))
        spans = [[own_rows(p.size(0), r, world) for p in shares[rank]] for r in range(world)]

        # Each matrix is put together on the rank whose share it belongs to.
        sent = [flat([rows[p] for p in share], params[0], kind) for share in shares]
        sizes = [[(stop - start) * p.size(1) for p, (start, stop) in zip(shares[rank], of)] for of in spans]
        got = exchange(sent, [sum(of) for of in sizes], among)
        pieces = zip(*(numbers.split(of) for numbers, of in zip(got, sizes)))
        updates = {p: torch.cat(parts).view(p.shape) for p, parts in zip(shares[rank], pieces)}
        for stack in stacks(shares[rank]):
            done = masked(orthogonalize(torch.stack([updates[p] for p in stack]), kind), skip)
            updates.update(zip(stack, done))

        # Each rank gets back its own rows of all updates.
        sent = [
            flat([updates[p][slice(*span)] for p, span in zip(shares[rank], of)], params[0], kind)
            for of in spans
        ]
        sizes = [[rows[p].numel() for p in share] for share in shares]
        got = exchange(sent, [sum(of) for of in sizes], among)
        for share, numbers, of in zip(shares, got, sizes):
            for p, update in zip(share, numbers.split(of)):
                yield [p], update.view(1, *rows[p].shape)

    def adamw_step(self, params: list[nn.Parameter], group: dict, skip: torch.Tensor | None) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p].update(
                    step=torch.zeros((), device=p.device),
                    exp_avg=torch.zeros_like(p),
                    exp_avg_sq=torch.zeros_like(p),
                )
        moments, squares, steps = (
            [own_numbers(self.state[p][k]) for p in params] for k in ("exp_avg", "exp_avg_sq", "step")
        )
        adamw_update(
            [own_numbers(p) for p in params],
            [own_numbers(p.grad) for p in params],
            moments,
            squares,
            [],
            steps,
            fused=True,
            found_inf=None if skip is None else skip.float(),  # masks the kernel and the step counts
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
    ranks: Ranks,
    lr: float,
    matrix_lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    embedding_lr: float = 0.0,
    head_lr: float = 0.0,
    state: dict | None = None,
) -> Muon:
    """Muon (with AdamW for what is no matrix of a block), or AdamW for all (Loshchilov and Hutter 2019).

    There are four groups: the blocks' matrices, the embedding, the head, the norms. `lr` is AdamW's peak
    rate, `matrix_lr` Muon's; the embedding (tied to the head or not) and the head have their own, or 0 for
    lr. Only the blocks' matrices decay: rows of the embedding seldom get a gradient, but would always shrink.
    A run's `state`, if given, is the start: its optimizer part is loaded and removed.
    """
    matrices, embedding, head, vectors = [], [], [], []
    for name, p in model.named_parameters():
        table = head if name == "lm_head.weight" else embedding
        (vectors if p.dim() != 2 else matrices if ".layers." in name else table).append(p)
    muon = kind == "muon"
    peak_lr = matrix_lr if muon else lr
    rest = {"muon": False, "weight_decay": 0.0}
    groups = [
        {"params": matrices, "muon": muon, "peak_lr": peak_lr, "weight_decay": weight_decay},
        {"params": embedding, "peak_lr": embedding_lr or lr, **rest},
        {"params": head, "peak_lr": head_lr or lr, **rest},
        {"params": vectors, "peak_lr": lr, **rest},
    ]
    optimizer = Muon(groups, momentum=MOMENTUM, betas=betas, ranks=ranks)
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
