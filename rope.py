"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), half-split convention.

Each attention head's D dimensions form D/2 planes; at position t, plane i is turned by the angle t *
theta^(-2i/D). A query's score with a key then depends on the distance between them only. Plane i joins
dimensions i and i + D/2, as in Hugging Face's `rotate_half` and every Llama checkpoint; the paper joins 2i
and 2i + 1, which is the same up to a permutation of the dimensions, and mixing the two is silently wrong.

B batch, H heads, T positions, D dimensions of a head.
"""

import math

import torch
from torch.autograd.function import once_differentiable

from common import InputError

MOST_ANGLES = 2**28  # positions x D of a cache; its cos and sin then take 2 GB


def rope_cache(
    head_dim: int, length: int, theta: float = 10000.0, scaling: dict | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for positions 0 … length-1, each (length, D) in fp32.

    `scaling` is `rope_scaling` of a Llama-3.1 `config.json` (rope_type "llama3"): planes that turn less than
    `low_freq_factor` times within the original context are slowed by `factor`, those that turn more than
    `high_freq_factor` times are kept, and those between are blended linearly.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; rotary embedding needs an even one")
    if length * head_dim > MOST_ANGLES:
        raise InputError(
            f"a context of {length} positions is too long; with heads of {head_dim} dimensions at most "
            f"{MOST_ANGLES // head_dim}: lower max_position_embeddings (--context_length)"
        )
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / theta**exponents  # (D/2,), rounded as Hugging Face rounds it
    if scaling is not None:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        context = scaling["original_max_position_embeddings"]
        turns = context * inv_freq / (2 * math.pi)  # within the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / scaling["factor"]
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inv_freq)  # (length, D/2)
    angles = torch.cat((angles, angles), dim=-1)  # (length, D)
    return angles.cos(), angles.sin()


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x, each plane turned: x cos + (-x2, x1) sin, where x1 and x2 are the halves of x."""
    half = x.size(-1) // 2
    y = x * cos
    y[..., :half] -= x[..., half:] * sin[..., :half]
    y[..., half:] += x[..., :half] * sin[..., half:]
    return y


class Rotation(torch.autograd.Function):
    """What apply_rope does, in fewer passes over memory. Its gradient is the gradient, turned back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return turned(grad, cos, -sin), None, None


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys x (B, H, T, D) by their positions' cos and sin, (T, D) or (B, 1, T, D)."""
    if x.device.type == "cpu" and x.dtype == cos.dtype and not torch.compiler.is_compiling():
        return Rotation.apply(x, cos, sin)
    x1, x2 = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-x2, x1), dim=-1) * sin).type_as(x)
