"""Rotary positions, against Hugging Face's and against themselves."""

import pytest
import torch
from conftest import LLAMA3
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from rope import apply_rope, rope_cache


@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_rope_equals_hugging_faces(scaling):
    rope = {"rope_theta": 5e5, **(scaling or {"rope_type": "default"})}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=512, rope_parameters=rope
    )
    q, k = torch.randn(2, 3, 512, 32), torch.randn(2, 3, 512, 32)
    cos, sin = rope_cache(32, 512, 5e5, scaling)
    expected = apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(config)(q, torch.arange(512)[None]))
    for x, y in zip((q, k), expected):
        torch.testing.assert_close(apply_rope(x, cos, sin), y, atol=2e-6, rtol=0)


def test_scores_depend_on_relative_positions_only():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    cos, sin = (x.double() for x in rope_cache(16, 200))
    score = [
        (apply_rope(q.double(), cos[p], sin[p]) * apply_rope(k.double(), cos[p + 7], sin[p + 7])).sum()
        for p in (0, 1, 50, 192)
    ]
    torch.testing.assert_close(torch.stack(score), score[0].expand(4), atol=1e-4, rtol=0)
    other = (apply_rope(q.double(), cos[0], sin[0]) * apply_rope(k.double(), cos[8], sin[8])).sum()
    assert abs(other - score[0]) > 1e-3


def test_rotation_keeps_lengths():
    x = torch.randn(2, 2, 64, 32)
    torch.testing.assert_close(apply_rope(x, *rope_cache(32, 64)).norm(dim=-1), x.norm(dim=-1))


def test_on_a_cpu_a_rotation_is_the_formulas_to_the_bit_and_its_gradient_is_exact():
    x, grad = torch.randn(2, 3, 64, 32, requires_grad=True), torch.randn(2, 3, 64, 32)
    cos, sin = rope_cache(32, 64)
    y = apply_rope(x, cos, sin)
    x1, x2 = x.chunk(2, dim=-1)
    assert torch.equal(y, x * cos + torch.cat((-x2, x1), dim=-1) * sin)
    (found,) = torch.autograd.grad(y, x, grad)
    exact = x.detach().double().requires_grad_()
    x1, x2 = exact.chunk(2, dim=-1)
    y = exact * cos.double() + torch.cat((-x2, x1), dim=-1) * sin.double()
    (right,) = torch.autograd.grad(y, exact, grad.double())
    torch.testing.assert_close(found.double(), right, rtol=0, atol=1e-6)
