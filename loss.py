"""The language model's loss: cross-entropy from hidden states, without ever holding all logits.

B batch, T positions, C hidden size, V vocabulary, N rows.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import IGNORE

LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**28, "mps": 2**24}  # 16 MB stay in a CPU's cache; 1 GB on a GPU
# Minimum rows per chunk; smaller chunks spend more on accumulating the head's gradient than on computing it.
ROWS_AT_LEAST = 512


def product_type(x: torch.Tensor) -> torch.dtype:
    """The type that products of x are computed in: autocast's, or without it that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The matrix product in fp32. A GPU keeps the fp32 sums of bf16 factors; elsewhere they are rounded."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


class DifferentiableProduct(torch.autograd.Function):
    """a bᵀ in fp32. torch.mm has no derivative where its output has another type, so it is written here."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return product(a, b.T)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        grad = grad.to(a.dtype)
        return grad @ b, grad.T @ a


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a matrix product to an fp32 total. A GPU adds bf16 factors' product in the kernel that makes it."""
    if total.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += product(a, b)


def nats_and_gradient(logits: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype):
    """The summed cross-entropy of fp32 logits (N, V) against targets (N, 1), and its gradient on the logits,
    softmax - one-hot, in a type. Written over the logits; for torch.compile see fused_nats_and_gradient."""
    kept, targets = (targets != IGNORE).float(), targets.clamp(min=0)
    top = logits.amax(1, keepdim=True)
    right = logits.gather(1, targets) - top
    probs = logits.sub_(top).exp_()
    total = probs.sum(1, keepdim=True)
    nats = ((total.log() - right) * kept).sum()
    return nats, probs.mul_(kept / total).scatter_add_(1, targets, -kept).to(dtype)


def fused_nats_and_gradient(logits: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype):
    """nats_and_gradient, so written that a compiler makes one kernel of it: all of its sums are by row."""
    kept = (targets != IGNORE).float()
    is_target = torch.arange(logits.size(1), device=logits.device) == targets
    log_total = logits.logsumexp(1, keepdim=True)
    right = torch.where(is_target, logits, 0.0).sum(1, keepdim=True)
    nats = ((log_total - right) * kept).sum()
    return nats, (((logits - log_total).exp() - is_target.float()) * kept).to(dtype)


class SummedCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(x Wᵀ)[target] in fp32, never holding more than a chunk of the (N, V) logits.

    The gradients are at hand as soon as a chunk's logits are, so the forward pass computes them and the
    backward pass only scales them: no logits are kept, and none are computed twice.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, chunk, softmax):  # x (N, C), weight (V, C), targets (N,)
        w = weight.to(x.dtype)
        loss = x.new_zeros((), dtype=torch.float32)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for i in range(0, len(x), chunk):
            xs, ys = x[i : i + chunk], targets[i : i + chunk, None]
            nats, gradient = softmax(product(xs, w.T), ys, x.dtype)
            loss += nats
            if dx is not None:
                dx[i : i + chunk] = gradient @ w
            if dw is not None:
                add_product(dw, gradient.T, xs)
        ctx.save_for_backward(dx, dw)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        dw = None if dw is None else (dw * grad).to(ctx.weight_dtype)
        return None if dx is None else dx * grad, dw, None, None, None


@torch.compiler.disable
def summed_loss(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softmax: Callable = nats_and_gradient
) -> torch.Tensor:
    """Summed fp32 cross-entropy of hidden states (B, T, C) against the targets (B, T) that are not IGNORE.

    `softmax` may be a compiled fused_nats_and_gradient.
    """
    kind, x = x.device.type, x.to(product_type(x))
    if not torch.is_grad_enabled():
        weight = weight.detach()  # or its gradient would be computed
    x, targets = x.flatten(0, -2), targets.flatten()
    if kind == "cpu":  # skip ignored rows; on a GPU, finding them would wait for all earlier work
        keep = targets != IGNORE
        x, targets = x[keep], targets[keep]
    with torch.autocast(kind, enabled=False):
        chunk = max(ROWS_AT_LEAST, LOGITS_AT_ONCE[kind] // len(weight))
        if kind != "cpu":  # chunks of one size, as each size is compiled anew
            chunk = max(1, -(-len(x) // -(-len(x) // chunk)))
        return SummedCrossEntropy.apply(x, weight, targets, chunk, softmax)


@torch.compiler.disable
def token_losses(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fp32 cross-entropy (B, T) of each target, 0 for IGNORE, and whether it was the likeliest (B, T).

    As in summed_loss, no more than a chunk of the logits is ever held. The losses may be weighted later, so
    the backward pass computes each chunk's logits again. A CPU skips the rows that are ignored.
    """
    kind, x = x.device.type, x.to(product_type(x))
    y = targets.flatten()
    rows = (y != IGNORE).nonzero()[:, 0] if kind == "cpu" else torch.arange(len(y), device=x.device)

    def chunk(x, weight, y):
        logits = DifferentiableProduct.apply(x, weight.to(x.dtype))
        return F.cross_entropy(logits, y, reduction="none", ignore_index=IGNORE), logits.argmax(1) == y

    losses = torch.zeros(y.shape, device=x.device)
    right = torch.zeros(y.shape, dtype=torch.bool, device=x.device)
    with torch.autocast(kind, enabled=False):
        for part in rows.split(max(ROWS_AT_LEAST, LOGITS_AT_ONCE[kind] // len(weight))):
            nats, likeliest = checkpoint(chunk, x.flatten(0, -2)[part], weight, y[part], use_reentrant=False)
            losses, right[part] = losses.index_put((part,), nats), likeliest
    # A copy, as FSDP2 warns of a model that returns a view.
    return losses.view(targets.shape).clone(), right.view(targets.shape)
