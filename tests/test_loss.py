"""The loss, against plain cross-entropy."""

import pytest
import torch
import torch.nn.functional as F
from conftest import random_ids, small_model

import gpt
import loss as loss_room
from common import IGNORE


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_equals_cross_entropy_on_the_logits_with_its_gradients(tied, monkeypatch):
    model, ids = small_model(tie_word_embeddings=tied), random_ids(3, 41)
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, ::2] = targets[2] = IGNORE
    expected = F.cross_entropy(
        model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    (expected * 0.01).backward()
    reference = [p.grad.clone() for p in model.parameters()]
    for logits_at_once in (
        loss_room.LOGITS_AT_ONCE["cpu"],
        320 * 7,
        1,
    ):  # one chunk, ragged ones, one row each
        monkeypatch.setitem(loss_room.LOGITS_AT_ONCE, "cpu", logits_at_once)
        monkeypatch.setattr(loss_room, "ROWS_AT_LEAST", 1)
        model.zero_grad()
        loss = model(inputs, targets)
        (loss * 0.01).backward()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        for p, g in zip(model.parameters(), reference):
            assert (p.grad - g).norm() <= 1e-5 * g.norm()


def test_the_loss_never_holds_all_logits(monkeypatch):
    """The largest tensor that a forward and backward pass allocates is far below (B·T, V)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // tensor.element_size())
            return result

    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model, ids = small_model(vocab_size=4096, max_position_embeddings=256, **heads), random_ids(8, 257)
    monkeypatch.setitem(loss_room.LOGITS_AT_ONCE, "cpu", 2**18)
    monkeypatch.setattr(loss_room, "ROWS_AT_LEAST", 1)
    with Watch():
        model(ids[:, :-1], ids[:, 1:]).backward()
    assert largest <= 2**18 < 8 * 256 * 4096 / 16


def test_the_softmax_that_is_compiled_equals_the_one_that_is_not():
    torch.manual_seed(0)
    logits, targets = 5 * torch.randn(6, 50), torch.tensor([[0], [49], [7], [IGNORE], [7], [IGNORE]])
    nats, gradient = loss_room.fused_nats_and_gradient(logits, targets, torch.float32)
    expected, wanted = loss_room.nats_and_gradient(logits.clone(), targets, torch.float32)
    torch.testing.assert_close(nats, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)
    assert not gradient[[3, 5]].any()


def test_a_batch_without_targets_has_loss_zero_and_zero_gradients():
    model = small_model()
    loss = model(random_ids(2, 8), torch.full((2, 8), IGNORE))
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_validation_computes_no_gradient():
    model, ids = small_model(), random_ids(2, 9)
    seen = []
    original = loss_room.SummedCrossEntropy.apply
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loss_room.SummedCrossEntropy,
            "apply",
            lambda *a: seen.extend(t.requires_grad for t in a[:2]) or original(*a),
        )
        model(ids[:, :-1], ids[:, 1:])
    assert seen == [False, False]


def test_under_bf16_autocast_the_loss_is_summed_in_fp32():
    model, ids = small_model(), random_ids(4, 33)
    exact = model(ids[:, :-1], ids[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss - exact) < 0.01 * exact
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_token_losses_and_their_gradients_equal_those_of_cross_entropy(chunk, monkeypatch):
    monkeypatch.setattr(loss_room, "ROWS_AT_LEAST", chunk)
    monkeypatch.setitem(loss_room.LOGITS_AT_ONCE, "cpu", 1)
    torch.manual_seed(0)
    x, weight = torch.randn(3, 10, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(50, (3, 10)).masked_fill(torch.rand(3, 10) < 0.4, IGNORE)
    share = torch.randn(3, 10)  # of each token in a loss made of them
    logits = torch.nn.functional.linear(x, weight)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    wanted = torch.autograd.grad((expected.view(3, 10) * share).sum(), (x, weight))
    losses, right = gpt.token_losses(x, weight, targets)
    torch.testing.assert_close(losses, expected.view(3, 10), rtol=1e-5, atol=1e-6)
    assert torch.equal(right, logits.argmax(-1) == targets)
    for found, gradient in zip(torch.autograd.grad((losses * share).sum(), (x, weight)), wanted):
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-5)
