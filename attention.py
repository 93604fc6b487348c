"""Attention of queries to keys, causal or masked, and inside the sequences of packed rows.

B rows, T positions, S keys, H query heads, G key/value heads, D dimensions of a head.
"""

import inspect

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention import varlen

BLOCK = 64  # queries that BlockedAttention multiplies at once
BLOCKED_UP_TO = 512  # positions; what it keeps grows with their square


class BlockedAttention(torch.autograd.Function):
    """Causal attention on a CPU. It multiplies a block of queries at a time with the keys up to the block's
    end. In packed rows a query sees its own sequence only.

    The probabilities are kept for the backward pass, in the values' type. torch's kernel computes them again,
    in small pieces. Where products are fast ours takes about half of its time. With fp32 queries and keys
    scores are fp32, and the result in bf16 is a little more exact, too.
    """

    @staticmethod
    def forward(ctx, q, k, v, sequences):  # (B, H, T, D) each; None or the numbers of sequences (B, T)
        shape, (B, _, T, D) = q.shape, q.shape
        q, k, v = (x.reshape(-1, T, D) for x in (q * D**-0.5, k, v))
        later = torch.full((BLOCK, BLOCK), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
        out, kept = torch.empty_like(v), []
        for a in range(0, T, BLOCK):
            b = min(a + BLOCK, T)
            scores = q[:, a:b] @ k[:, :b].mT
            scores[:, :, a:] += later[: b - a, : b - a]
            if sequences is not None:
                apart = sequences[:, a:b, None] != sequences[:, None, :b]
                scores.view(B, -1, b - a, b).masked_fill_(apart[:, None], -torch.inf)
            probs = scores.softmax(-1).to(v.dtype)
            out[:, a:b] = probs @ v[:, :b]
            if any(ctx.needs_input_grad):
                kept.append(probs)
        ctx.dtype, ctx.shape = q.dtype, shape
        ctx.save_for_backward(q.to(v.dtype), k.to(v.dtype), v, *kept)
        return out.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, *kept = ctx.saved_tensors
        T, D = q.shape[1:]
        grad = grad.reshape(v.shape)
        dq = torch.empty_like(q, dtype=ctx.dtype)
        dk, dv = (torch.zeros_like(x, dtype=ctx.dtype) for x in (k, v))
        for a, probs in zip(range(0, T, BLOCK), kept):
            b = min(a + BLOCK, T)
            dv[:, :b] += probs.mT @ grad[:, a:b]
            scores = torch._softmax_backward_data(grad[:, a:b] @ v[:, :b].mT, probs, -1, probs.dtype)
            dk[:, :b] += scores.mT @ q[:, a:b]
            dq[:, a:b] = scores @ k[:, :b]
        return *(x.view(ctx.shape) for x in (dq.mul_(D**-0.5), dk, dv.to(v.dtype))), None


def is_blocked(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether causal attention is BlockedAttention: on a CPU, up to BLOCKED_UP_TO positions, if products are
    in bf16 or in fp32 by oneDNN. By MKL whole rows would gain a little, but packed short ones would lose."""
    if q.device.type != "cpu" or q.size(2) > BLOCKED_UP_TO or q.dtype != torch.float32:
        return False
    return v.dtype == torch.bfloat16 or torch.get_float32_matmul_precision() != "highest"


def repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values (B, G, S, D), once for each query head."""
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), dim=1)


def blocked_attention(q, k, v, sequences: torch.Tensor | None = None) -> torch.Tensor:
    """BlockedAttention with fewer key heads, inside autocast, too."""
    with torch.autocast("cpu", enabled=False):
        return BlockedAttention.apply(q, repeated(k, q.size(1)), repeated(v, q.size(1)), sequences)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention (B, H, T, D) of queries (B, H, T, D) to keys and values (B, G, S, D). A mask (B, 1, T, S) is
    True where a query may see a key. Without one, attention is causal."""
    if mask is None and is_blocked(q, v):
        return blocked_attention(q, k, v)
    q, k = q.to(v.dtype), k.to(v.dtype)
    # No fused kernel takes fewer key heads together with a mask or, on a GPU, with fp32.
    if mask is not None or (q.is_cuda and v.dtype == torch.float32):
        k, v = repeated(k, q.size(1)), repeated(v, q.size(1))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.size(1) != k.size(1)
    )


@torch.compiler.disable
def attend_one_by_one(q, k, v, cu_seqlens, _, longest_q, longest_k, *, window_size, enable_gqa):
    """What attend_at_once does on CUDA, sequence by sequence."""
    lengths = [n for n in cu_seqlens.diff().tolist() if n]
    parts = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v)))  # (1, H or G, n, D) each
    done = [attend(*part) for part in parts]
    return torch.cat(done, dim=2)[0].transpose(0, 1)


# torch 2.11's varlen_attn lacks this argument and always takes fewer key than query heads.
ASKS_FOR_GROUPS = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


def attend_at_once(q, k, v, *sequences, window_size, enable_gqa):
    """varlen.varlen_attn in any version."""
    groups = {"enable_gqa": enable_gqa} if ASKS_FOR_GROUPS else {}
    return varlen.varlen_attn(q.to(v.dtype), k.to(v.dtype), v, *sequences, window_size=window_size, **groups)


VARLEN = {"cuda": attend_at_once, "cpu": attend_one_by_one}


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """Causal attention (B, T, H, D) inside each packed sequence, as AttentionInputs has them. The result is
    that of a block mask. The masked part is not computed, except where is_blocked is true."""
    B, H, T, _ = q.shape
    if is_blocked(q, v):
        places = torch.arange(B * T, device=q.device)
        sequences = torch.bucketize(places, cu_seqlens, right=True).view(B, T)
        return blocked_attention(q, k, v, sequences).transpose(1, 2)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B T, H or G, D)
    y = VARLEN[q.device.type](
        q, k, v, cu_seqlens, cu_seqlens, T, T, window_size=(-1, 0), enable_gqa=k.size(1) != H
    )
    return y.reshape(-1, T, *y.shape[1:])


def has_varlen(device: torch.device, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether varlen_attention runs: on CPUs, and from Ampere on in bf16 if head_dim is a multiple of 8 up to
    256."""
    if device.type != "cuda":
        return device.type in VARLEN
    recent = torch.cuda.get_device_capability(device) >= (8, 0)
    return recent and dtype == torch.bfloat16 and head_dim % 8 == 0 and head_dim <= 256
