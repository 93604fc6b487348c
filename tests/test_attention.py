"""Attention: what is written here for CPUs against torch's, in double precision."""

import os

import pytest
import torch
import torch.nn.functional as F

import attention
from attention import attend, blocked_attention, varlen_attention


def results(function, q, k, v, dtype=None) -> list[torch.Tensor]:
    """The values and the gradients of a weighted sum of them, in double precision."""
    q, k, v = (x.to(dtype or torch.float64).detach().requires_grad_() for x in (q, k, v))
    found = function(q, k, v)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found.backward(weights.to(found.dtype))
    return [x.double() for x in (found.detach(), q.grad, k.grad, v.grad)]


def torchs(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))


def random_heads(T: int, groups: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(T)
    return [torch.randn(2, n, T, 8, generator=generator) * 2 for n in (4, groups, groups)]


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
def test_causal_attention_by_blocks_and_its_gradients_are_torch_s(T, groups):
    inputs = random_heads(T, groups)
    for found, expected in zip(results(blocked_attention, *inputs), results(torchs, *inputs)):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)


def test_blocks_are_for_short_rows_on_a_cpu_whose_products_are_fast(monkeypatch):
    monkeypatch.setattr(attention, "blocked_attention", lambda q, k, v: torch.empty(0))

    def blocked(T, dtype, kind=torch.float32):
        q, k, v = random_heads(T)
        return not attend(q.to(kind), k.to(kind), v.to(dtype)).numel()

    longest = attention.BLOCKED_UP_TO
    assert blocked(longest, torch.bfloat16) and not blocked(longest + 1, torch.bfloat16)
    assert not blocked(8, torch.bfloat16, torch.bfloat16)  # scores would be rounded
    for name, fast in [("highest", False), ("medium", True)]:
        torch.set_float32_matmul_precision(name)
        assert blocked(8, torch.float32) == fast


def test_a_second_derivative_is_refused():
    q, k, v = (x.requires_grad_() for x in random_heads(8))
    (grad,) = torch.autograd.grad(blocked_attention(q, k, v).pow(2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_under_autocast_scores_stay_in_fp32_and_nothing_is_less_exact_than_torch_s():
    """Queries and keys come from the rotation in fp32, values from a product in bf16."""
    q, k, v = random_heads(200)
    exact = results(torchs, q, k, v)

    def mixed(function):
        def call(q, k, v):
            with torch.autocast("cpu", torch.bfloat16):
                return function(q, k, v.bfloat16())

        return results(call, q, k, v, torch.float32)

    def errors(found):
        return [((x - y).norm() / y.norm()).item() for x, y in zip(found, exact)]

    ours, theirs = errors(mixed(attend)), errors(mixed(lambda q, k, v: torchs(q.bfloat16(), k.bfloat16(), v)))
    assert all(a < b for a, b in zip(ours, theirs)) and max(ours) < 0.01, (ours, theirs)


@pytest.mark.parametrize("blocked", [True, False])
def test_packed_sequences_do_not_see_each_other(blocked, monkeypatch):
    """By blocks, across whose borders sequences reach, and one by one."""
    monkeypatch.setattr(attention, "is_blocked", lambda *_: blocked)
    lengths = [1, 62, 2, 90, 45, 64, 136]  # two rows of 200
    starts = torch.tensor([0, *lengths, 0]).cumsum(0)  # the last one is empty, as in a batch of fixed size

    def packed(q, k, v):
        return varlen_attention(q, k, v, starts).transpose(1, 2)

    def alone(q, k, v):
        rows = [torchs(*part) for part in zip(*(flat(x).split(lengths, dim=2) for x in (q, k, v)))]
        return torch.cat(rows, dim=2).unflatten(2, (2, 200))[0].transpose(0, 1)

    def flat(x):  # (2, H, 200, D) as one row (1, H, 400, D)
        return x.transpose(0, 1).flatten(1, 2)[None]

    inputs = random_heads(200, groups=2)
    for found, expected in zip(results(packed, *inputs), results(alone, *inputs)):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.slow
def test_a_compiled_block_attends_alike():
    def mixed(function):
        return lambda q, k, v: function(q, k, v.bfloat16())

    inputs, whole = random_heads(100), not os.environ.get("TYPES")  # whose checks cannot be compiled
    compiled = results(mixed(torch.compile(attend, dynamic=False, fullgraph=whole)), *inputs, torch.float32)
    for found, expected in zip(compiled, results(mixed(attend), *inputs, torch.float32)):
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0.02)
