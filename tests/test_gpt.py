"""The model and its generation, against Hugging Face's and against themselves."""

import gc
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import SWITCHES, random_ids, small_model
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import generation
from attention import has_varlen
from common import InputError
from generation import Decoding, Int8Matrix, can_pack, joined, product, sample
from gpt import AttentionInputs, GPTConfig, GPTModel, RMSNorm
from rope import apply_rope, rope_cache


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_logits_and_gradients_equal_hugging_faces(switches, tmp_path):
    model = small_model(**switches)
    model.save_pretrained(tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if switches["qk_norm"] else "LlamaForCausalLM")
    ids = random_ids(2, 48)
    ours, expected = model(ids), theirs(ids).logits
    assert (ours - expected).abs().max() <= 1e-5
    ours.square().sum().backward()
    expected.square().sum().backward()
    gradients = dict(model.named_parameters())
    for name, p in theirs.named_parameters():
        assert (gradients[name].grad - p.grad).norm() <= 1e-5 * p.grad.norm(), name


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_greedy_generation_equals_hugging_faces(switches, tmp_path):
    model = small_model(**switches, max_position_embeddings=128)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = random_ids(1, 20)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, **options)
    assert [i for (i,) in model.generate(prompt.tolist(), 64)] == expected[0, 20:].tolist()


@pytest.mark.parametrize("switches", SWITCHES[:12], ids=str)
def test_shapes_of_every_switch(switches):
    model = GPTModel(
        GPTConfig(vocab_size=192, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, **switches)
    )
    assert model(random_ids(2, 5) % 192).shape == (2, 5, 192)
    assert model(random_ids(2, 5) % 192, random_ids(2, 5) % 192).shape == ()
    assert model.config.intermediate_size == 128  # 8/3 of 32, up to a multiple of 64
    tables = 192 * 32 * (1 if switches["tie_word_embeddings"] else 2)
    assert model.num_parameters() == tables + sum(p.numel() for p in model.model.layers.parameters()) + 32


def test_a_later_token_never_changes_an_earlier_logit():
    model, ids = small_model(), random_ids(1, 32)
    before = model(ids)
    for t in (1, 15, 31):
        changed = ids.clone()
        changed[0, t:] = (changed[0, t:] + 1) % 320
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=0, rtol=0)
        assert (after[:, t:] != before[:, t:]).any()


def test_grouped_query_attention_equals_repeated_heads():
    grouped, full = small_model(num_key_value_heads=2), small_model()
    state = grouped.state_dict()
    for name in list(state):
        if "k_proj" in name or "v_proj" in name:
            heads = state[name].view(2, 8, 32)
            state[name] = heads.repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(state)
    ids = random_ids(2, 20)
    torch.testing.assert_close(grouped(ids), full(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocab_size, hidden_size", [(4096, 256), (512, 64), (49152, 512)])
def test_the_first_loss_is_ln_v(tied, vocab_size, hidden_size):
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=1, tie_word_embeddings=tied
    )
    ids = torch.randint(0, vocab_size, (2, 129))
    with torch.no_grad():
        loss = GPTModel(config)(ids[:, :-1], ids[:, 1:]) / 256
    assert abs(loss / math.log(vocab_size) - 1) < 0.02


def test_blocks_start_as_the_identity_and_the_ffn_has_its_full_width():
    model = GPTModel(GPTConfig(vocab_size=128, hidden_size=512, num_hidden_layers=1))
    x, update = torch.randn(2, 1, 4, 512)
    inputs = AttentionInputs((model.rope_cos[:4], model.rope_sin[:4]))
    stream, after = model.model.layers[0](x, update, inputs)
    assert torch.equal(stream + after, x + update)
    assert model.model.layers[0].mlp.gate_proj.weight.shape == (1408, 512)


def test_a_small_model_overfits_one_batch():
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(0, 64, (4, 33))
    for _ in range(80):
        loss = model(ids[:, :-1], ids[:, 1:]) / 128
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def packed_batch() -> dict:
    """Two rows of two sequences each, as keyword arguments of the model's forward."""
    ids = random_ids(2, 17)
    positions = torch.cat([torch.arange(10), torch.arange(6)]).expand(2, -1)
    cu_seqlens = torch.tensor([0, 10, 16, 26, 32], dtype=torch.int32)
    return {"input_ids": ids[:, :-1], "targets": ids[:, 1:], "positions": positions, "cu_seqlens": cu_seqlens}


def loss_and_gradients(module, model) -> tuple[float, list[torch.Tensor]]:
    loss = module(**packed_batch())
    loss.backward()
    whole = (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters())
    return loss.item(), [g.clone() for g in whole]


def assert_the_same(results, expected) -> None:
    assert results[0] == pytest.approx(expected[0], rel=1e-6)
    for g, other in zip(expected[1], results[1], strict=True):
        assert (other - g).norm() <= 1e-5 * g.norm()


@pytest.fixture
def process_group(tmp_path):
    """A process group of one."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
def test_attention_inputs_travel_through_data_parallel_and_sharded_models(engine, process_group):
    expected = loss_and_gradients(*[small_model()] * 2)
    model = small_model()
    if engine == "DDP":
        module = torch.nn.parallel.DistributedDataParallel(model)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        module = fully_shard(model)
    assert_the_same(loss_and_gradients(module, model), expected)


@pytest.mark.slow
def test_attention_inputs_travel_through_compiled_models():
    expected = loss_and_gradients(*[small_model()] * 2)
    model = small_model()
    assert_the_same(loss_and_gradients(torch.compile(model, dynamic=False), model), expected)


def uncached(model: GPTModel, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("groups", [4, 2])
def test_cached_generation_equals_uncached_alone_and_in_a_batch(groups):
    model = small_model(num_key_value_heads=groups)
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (1, 17, 30, 5)]
    alone = [[i for (i,) in model.generate([prompt], 30)] for prompt in prompts]
    assert alone == [uncached(model, prompt, 30) for prompt in prompts]
    assert [list(row) for row in zip(*model.generate(prompts, 30))] == alone


def test_a_call_sees_the_weights_as_they_are_and_keeps_nothing():
    model, prompt = small_model(num_key_value_heads=2), random_ids(1, 9)[0].tolist()
    before = [i for (i,) in model.generate([prompt], 20)]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    steps = model.generate([prompt], 20)
    after = [next(steps)[0]]
    assert sum(type(o) is Decoding for o in gc.get_objects()) == 1
    after += [i for (i,) in steps]
    assert after == uncached(model, prompt, 20) != before
    assert not any(type(o) is Decoding for o in gc.get_objects())


def test_kept_weights_are_made_once_and_answer_alike():
    model, prompt = small_model(), random_ids(1, 9)[0].tolist()
    before = [i for (i,) in model.generate([prompt], 20)]
    model.kept_weights = {}
    assert [i for (i,) in model.generate([prompt], 20)] == before
    ((layers, head),) = model.kept_weights.values()
    assert [i for (i,) in model.generate([prompt], 20)] == before
    assert [made[1] for made in model.kept_weights.values()] == [head] and len(layers) == 2


@pytest.mark.parametrize("rows", [1, 3])
def test_decoding_in_int8_multiplies_by_rounded_matrices_and_leaves_odd_ones_alone(rows, monkeypatch):
    """A model whose matrices are rounded beforehand gives the same ids in int8 with fp32 factors."""
    monkeypatch.setattr(generation, "INT8_FACTOR", torch.float32)
    model = small_model(hidden_size=128, intermediate_size=192, vocab_size=325)  # no multiple of 64
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                step = p.abs().amax(1, keepdim=True) / 127
                p.copy_((p / step).round() * step)
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (5, 9, 17)[:rows]]
    expected = list(model.generate(prompts, 30))
    model.int8_decoding, model.kept_weights = True, {}
    assert list(model.generate(prompts, 30)) == expected
    ((layers, head),) = model.kept_weights.values()
    assert all(isinstance(m, Int8Matrix) for w in layers for m in (w.qkv, w.o, w.gate_up, w.down))
    assert isinstance(head, torch.Tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_with_an_int8_matrix_is_within_half_a_step_a_factor(dtype):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(3, 128, generator=generator).to(dtype), torch.randn(192, 128, generator=generator)
    w[5] = 0
    found = product(x.float(), Int8Matrix.rounded(w, dtype))
    assert found.dtype == torch.float32
    bound = (w.abs().amax(1) / 127 / 2) * x.float().abs().sum(1, keepdim=True)
    rounding = (
        0
        if dtype == torch.float32
        else 2**-7 * (x.float() @ w.T).abs() + 2**-8 * (x.abs() @ w.abs().T.to(dtype))
    )
    assert ((found - x.float() @ w.T).abs() <= bound + rounding + 1e-5).all()
    assert not found[:, 5].any()


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_product_with_packed_weights_is_that_of_the_weights(dtype, rows):
    """Of any sizes; in a type that oneDNN does not pack here they stay as they are."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 37, generator=generator).to(dtype)
    parts = [torch.randn(n, 37, generator=generator) for n in (61, 3)]
    matrix = joined(*parts, dtype=dtype, packed=can_pack(dtype), int8=False)
    assert matrix.is_mkldnn == can_pack(dtype) and (dtype != torch.float64 or not matrix.is_mkldnn)
    expected = x.double() @ torch.cat(parts).to(dtype).double().T
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(product(x, matrix).double(), expected, atol=tolerance, rtol=0)


def test_a_row_draws_by_its_own_seed_whatever_it_is_batched_with():
    model = small_model()
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (3, 12, 12)]
    prompts.append(prompts[0])

    def draw(prompts, seed, n=30):
        rows = zip(*model.generate(prompts, n, temperature=1.0, top_k=50, seed=seed))
        return [list(row) for row in rows]

    together = draw(prompts, 5)
    assert together == [draw([prompt], 5 + i)[0] for i, prompt in enumerate(prompts)]
    assert draw(prompts[::-1], [8, 7, 6, 5], n=10) == [row[:10] for row in together[::-1]]
    assert together[0] != together[3]  # the same prompt


def test_generation_stops_at_a_stop_id_which_it_yields_and_then_gives_none():
    model = small_model()
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (4, 9)]
    free = [list(row) for row in zip(*model.generate(prompts, 20))]
    stop = free[0][5]
    stopped = [list(row) for row in zip(*model.generate(prompts, 20, stop_ids=[stop]))]
    for before, after in zip(free, stopped):
        end = before.index(stop) + 1 if stop in before else 20
        assert after == (before[:end] + [None] * 20)[: len(after)]
    lengths = [row.index(stop) + 1 if stop in row else 20 for row in free]
    assert len(stopped[0]) == max(lengths)


def test_generation_ends_when_the_context_is_full():
    model = small_model()  # of 64 positions
    rows = list(zip(*model.generate([[1] * 60, [1] * 50], 100)))
    assert [sum(i is not None for i in row) for row in rows] == [
        5,
        15,
    ]  # the last id fills no position any more
    assert list(rows[0][:5]) == uncached(model, [1] * 60, 5)
    with pytest.raises(InputError, match="from 1 to 63"):
        next(model.generate([[1] * 64]))
    with pytest.raises(InputError, match="from 1 to 63"):
        next(model.generate([[]]))


def test_sampling_is_repeatable_with_a_seed_and_keeps_to_top_k_and_top_p():
    model, prompt = small_model(), [1, 2, 3]

    def draw(**options):
        return [i for (i,) in model.generate([prompt], 40, temperature=1.0, **options)]

    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    for options in (
        {"temperature": -1.0},
        {"temperature": 1e-45},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ):
        with pytest.raises(
            InputError, match=r"temperature is .*; expected 0|expected at least 1, and above 0 up to 1"
        ):
            next(model.generate([prompt], 40, **options))
    assert draw(seed=1, top_k=1) == draw(seed=1, top_p=1e-9) == [i for (i,) in model.generate([prompt], 40)]


def test_sample_draws_each_id_as_often_as_its_probability_says():
    probs = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    noise = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    rows = probs.log().expand(20_000, -1)

    def frequencies(temperature=1.0, **options):
        return sample(rows, noise, temperature=temperature, **options).bincount(minlength=5) / 20_000

    squared = probs.square() / probs.square().sum()
    for drawn, expected in (
        (frequencies(), probs),
        (frequencies(top_k=2), torch.tensor([2 / 3, 1 / 3, 0, 0, 0])),
        (frequencies(top_p=0.8), torch.tensor([4, 2, 1, 0, 0]) / 7),
        (frequencies(0.5), squared),
    ):
        torch.testing.assert_close(drawn, expected, atol=0.015, rtol=0)


def test_sample_of_logits_that_are_nan_is_an_id():
    drawn = sample(torch.full((2, 5), torch.nan), torch.tensor([0.0, 0.9]), temperature=1.0, top_k=3)
    assert all(0 <= id < 5 for id in drawn.tolist())


def test_a_shape_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="hidden_size 100 is not divisible by num_attention_heads 8"):
        GPTConfig(hidden_size=100)
    with pytest.raises(InputError, match="num_key_value_heads 3"):
        GPTConfig(num_key_value_heads=3)


def test_a_grown_vocabulary_keeps_the_old_logits_and_starts_new_rows_at_the_mean():
    for tied in (False, True):
        model, ids = small_model(tie_word_embeddings=tied), random_ids(1, 9)
        before, mean = model(ids), model.lm_head.weight.mean(0)
        model.resize_vocabulary(322)
        assert model.config.vocab_size == 384 and model(ids).shape[-1] == 384
        torch.testing.assert_close(model(ids)[..., :320], before)
        torch.testing.assert_close(model.lm_head.weight[320:], mean.expand(64, -1))
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_only_the_rows_of_new_ids_are_touched_when_a_vocabulary_grows():
    model = small_model()
    before = model.lm_head.weight.detach().clone()
    model.resize_vocabulary(300, new_ids=[5, 299])  # 20 padding rows stay
    mean = before[[i for i in range(300) if i not in (5, 299)]].mean(0)
    after = model.lm_head.weight.detach()
    for i in range(320):
        torch.testing.assert_close(after[i], mean if i in (5, 299) else before[i])


def kept_bytes(model, ids) -> tuple[int, dict]:
    """What autograd keeps of a forward pass for the backward pass, in bytes, and the gradients."""
    seen = {}

    def note(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return sum(seen.values()), {name: p.grad for name, p in model.named_parameters()}


def test_an_mlp_keeps_its_input_gate_and_up_alone_and_its_gradients_are_those_of_the_formula():
    mlp, x = small_model().model.layers[0].mlp, torch.randn(2, 50, 32, requires_grad=True)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = mlp(x)
    for parameter in mlp.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    inner = 100 * mlp.gate_proj.out_features
    assert sorted(kept.values()) == [x.numel(), inner, inner]
    found = torch.autograd.grad(y.sum(), [x, *mlp.parameters()])
    gate, up = F.linear(x, mlp.gate_proj.weight), F.linear(x, mlp.up_proj.weight)
    y = F.linear(F.silu(gate) * up, mlp.down_proj.weight)
    for one, other in zip(found, torch.autograd.grad(y.sum(), [x, *mlp.parameters()])):
        assert torch.equal(one, other)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_checkpointed_activations_keep_less_and_give_the_same_gradients(compiled):
    ids, found = random_ids(2, 49), {}
    for checkpointed in (False, True):
        model = small_model(num_hidden_layers=4)
        model.checkpoint_activations = checkpointed
        if compiled:
            model.compile_blocks()
        found[checkpointed] = kept_bytes(model, ids)
    (bytes_kept, gradients), (fewer, same) = found[False], found[True]
    assert fewer < bytes_kept
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-5, atol=1e-6)


def test_on_a_gpu_variable_length_attention_is_for_bf16_on_recent_ones(monkeypatch):
    gpu, found = torch.device("cuda", 0), (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    assert has_varlen(gpu, 64, torch.bfloat16) and not has_varlen(gpu, 64, torch.float32)
    assert not has_varlen(gpu, 60) and not has_varlen(gpu, 264)
    found = (7, 5)
    assert not has_varlen(gpu, 64)


@pytest.mark.parametrize("shape", [(2, 9, 64), (2, 5, 3, 16)])
def test_a_norm_is_torchs_to_the_bit_and_its_gradients_are_as_exact(shape):
    norm, x, grad = RMSNorm(shape[-1], eps=1e-6), 3 * torch.randn(shape), torch.randn(shape)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    x.requires_grad_()
    y = norm(x)
    assert torch.equal(y, F.rms_norm(x, shape[-1:], norm.weight, 1e-6))
    found = torch.autograd.grad(y, (x, norm.weight), grad)
    exact, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    y = F.rms_norm(exact, shape[-1:], weight, 1e-6)
    for mine, right in zip(found, torch.autograd.grad(y, (exact, weight), grad.double()), strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=0, atol=2e-6 * right.abs().max().item())


def test_a_norm_and_a_rotation_keep_less_than_torchs():
    kept = []
    x = torch.randn(2, 8, 4, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        RMSNorm(64, eps=1e-6)(x)
        apply_rope(x.transpose(1, 2), *rope_cache(64, 8))
    assert sum(size >= x.numel() for size in kept) == 1  # the norm's input
