"""The language model's loss: cross-entropy from hidden states, without ever holding all logits.

B batch, T positions, C hidden size, V vocabulary, N rows.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import IGNORE

LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**26, "mps": 2**24}  # 16 MB stay in a CPU's cache
# Minimum rows per chunk; smaller chunks spend more on accumulating the head's gradient than on computing it.
ROWS_AT_LEAST = 512


class SummedCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(x Wᵀ)[target] in fp32, never holding more than a chunk of the (N, V) logits.

    The gradients are at hand as soon as a chunk's logits are, so the forward pass computes them and the
    backward pass only scales them: no logits are kept, and none are computed twice.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, chunk):  # x (N, C), weight (V, C), targets (N,)
        w = weight.to(x.dtype)
        loss = x.new_zeros((), dtype=torch.float32)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for i in range(0, len(x), chunk):
            xs, ys = x[i : i + chunk], targets[i : i + chunk, None]
            kept, ys = (ys != IGNORE).float(), ys.clamp(min=0)
            logits = (xs @ w.T).float()
            top = logits.amax(1, keepdim=True)
            right = logits.gather(1, ys) - top
            probs = logits.sub_(top).exp_()
            total = probs.sum(1, keepdim=True)
            loss += ((total.log() - right) * kept).sum()
            if dx is not None or dw is not None:  # d loss / d logits = softmax - one-hot
                probs = probs.mul_(kept / total).scatter_add_(1, ys, -kept).to(x.dtype)
            if dx is not None:
                dx[i : i + chunk] = probs @ w
            if dw is not None:
                dw += probs.T @ xs
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return None if dx is None else dx * grad, None if dw is None else dw * grad, None, None


@torch.compiler.disable
def summed_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed fp32 cross-entropy of hidden states (B, T, C) against the targets (B, T) that are not IGNORE."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    if not torch.is_grad_enabled():
        weight = weight.detach()  # or its gradient would be computed
    x, targets = x.flatten(0, -2), targets.flatten()
    if kind == "cpu":  # skip ignored rows; on a GPU, finding them would wait for all earlier work
        keep = targets != IGNORE
        x, targets = x[keep], targets[keep]
    with torch.autocast(kind, enabled=False):
        chunk = max(ROWS_AT_LEAST, LOGITS_AT_ONCE[kind] // len(weight))
        return SummedCrossEntropy.apply(x, weight, targets, chunk)


@torch.compiler.disable
def token_losses(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fp32 cross-entropy (B, T) of each target, 0 for IGNORE, and whether it was the likeliest (B, T).

    As in summed_loss, no more than a chunk of the logits is ever held. The losses may be weighted later, so
    the backward pass computes each chunk's logits again.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    y, rows = targets.flatten(), (targets.flatten() != IGNORE).nonzero()[:, 0]

    def chunk(x, weight, y):
        logits = (x @ weight.to(x.dtype).T).float()
        return F.cross_entropy(logits, y, reduction="none"), logits.argmax(1) == y

    losses = torch.zeros(y.shape, device=x.device)
    right = torch.zeros(y.shape, dtype=torch.bool, device=x.device)
    with torch.autocast(kind, enabled=False):
        for part in rows.split(max(ROWS_AT_LEAST, LOGITS_AT_ONCE[kind] // len(weight))):
            nats, likeliest = checkpoint(chunk, x.flatten(0, -2)[part], weight, y[part], use_reentrant=False)
            losses, right[part] = losses.index_put((part,), nats), likeliest
    return losses.view(targets.shape), right.view(targets.shape)
