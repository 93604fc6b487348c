"""gpt.py and rope.py: against Hugging Face's models, against plain formulas, and against themselves."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run, sft_config, small_model, text
from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import chat
import gpt
import sft_gpt
from gpt import IGNORE, GPTConfig, GPTModel, InputError
from rope import apply_rope, rope_cache

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3_WIDE = {"head_dim": 16, "rope_theta": 5e5, "rope_scaling": LLAMA3}
SWITCHES = [
    {"tie_word_embeddings": tied, "num_key_value_heads": groups, "qk_norm": qk_norm, **rest}
    for tied, groups, qk_norm, rest in itertools.product(
        (False, True),
        (4, 2, 1),
        (False, True),
        ({}, {"head_dim": 16, "rope_theta": 5e5}, {"rope_scaling": LLAMA3}, LLAMA3_WIDE),
    )
]


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 320, shape, generator=torch.Generator().manual_seed(seed))


# -- rotary positions ----------------------------------------------------------------------------------------


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


# -- the model -----------------------------------------------------------------------------------------------


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
    x = torch.randn(1, 4, 512)
    assert torch.equal(model.model.layers[0](x, (model.rope_cos[:4], model.rope_sin[:4])), x)
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


# -- the loss ------------------------------------------------------------------------------------------------


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
    for logits_at_once in (gpt.LOGITS_AT_ONCE["cpu"], 320 * 7, 1):  # one chunk, ragged ones, one row each
        monkeypatch.setitem(gpt.LOGITS_AT_ONCE, "cpu", logits_at_once)
        monkeypatch.setattr(gpt, "ROWS_AT_LEAST", 1)
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

    model, ids = small_model(vocab_size=4096, max_position_embeddings=256), random_ids(8, 257)
    monkeypatch.setitem(gpt.LOGITS_AT_ONCE, "cpu", 2**18)
    monkeypatch.setattr(gpt, "ROWS_AT_LEAST", 1)
    with Watch():
        model(ids[:, :-1], ids[:, 1:]).backward()
    assert largest <= 2**18 < 8 * 256 * 4096 / 16


def test_a_batch_without_targets_has_loss_zero_and_zero_gradients():
    model = small_model()
    loss = model(random_ids(2, 8), torch.full((2, 8), IGNORE))
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_validation_computes_no_gradient():
    model, ids = small_model(), random_ids(2, 9)
    seen = []
    original = gpt.SummedCrossEntropy.apply
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gpt.SummedCrossEntropy,
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


# -- generation ----------------------------------------------------------------------------------------------


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
    for options in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(InputError, match="expected a temperature"):
            next(model.generate([prompt], 40, **options))
    assert draw(seed=1, top_k=1) == draw(seed=1, top_p=1e-9) == [i for (i,) in model.generate([prompt], 40)]


def test_sample_draws_each_id_as_often_as_its_probability_says():
    probs = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    generator = torch.Generator().manual_seed(0)
    rows = probs.log().expand(20_000, -1)

    def frequencies(*options):
        return gpt.sample(rows, *options, generator).bincount(minlength=5) / 20_000

    torch.testing.assert_close(frequencies(1.0, None, None), probs, atol=0.015, rtol=0)
    torch.testing.assert_close(
        frequencies(1.0, 2, None), torch.tensor([2 / 3, 1 / 3, 0, 0, 0]), atol=0.015, rtol=0
    )
    torch.testing.assert_close(
        frequencies(1.0, None, 0.8), torch.tensor([4, 2, 1, 0, 0]) / 7, atol=0.015, rtol=0
    )
    squared = probs.square() / probs.square().sum()
    torch.testing.assert_close(frequencies(0.5, None, None), squared, atol=0.015, rtol=0)


# -- loading and saving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_save_load_save_gives_the_same_bytes(switches, tmp_path, tokenizer):
    small_model(**switches).save_pretrained(tmp_path / "a", tokenizer)
    GPTModel.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b", tokenizer)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"} <= set(names)
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_sharded_weights_of_others_are_read(dtype, tmp_path):
    theirs = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
        )
    ).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ids = random_ids(1, 16)
    torch.testing.assert_close(
        GPTModel.from_pretrained(tmp_path)(ids), theirs.float()(ids).logits, atol=1e-5, rtol=1e-5
    )


PEAK = """
import re, sys, threading, time
from pathlib import Path
import safetensors, torch
from gpt import GPTConfig, GPTModel

def anonymous() -> int:  # bytes of memory that are no file's pages
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def watch():
    while True:
        seen.append(anonymous())
        time.sleep(0.001)

GPTModel(GPTConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1))  # what torch loads at first use
seen = [anonymous()]
threading.Thread(target=watch, daemon=True).start()
model = GPTModel.from_pretrained(sys.argv[1])
print((max(*seen, anonymous()) - seen[0]) / (4 * model.num_parameters()), len(seen))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's count of memory")
@pytest.mark.parametrize(
    ("dtype", "shard"), [(torch.float32, "5GB"), (torch.float16, "60MB"), (torch.bfloat16, "60MB")]
)
def test_loading_takes_the_memory_of_one_copy_of_the_weights(dtype, shard, tmp_path):
    config = GPTConfig(vocab_size=4096, hidden_size=1024, num_hidden_layers=6)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in GPTModel(config).stored_state().items()}
    state = {name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items()}
    assert 4 * sum(t.numel() for t in state.values()) > 300e6
    save_torch_state_dict(state, tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "60MB")
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    copies, samples = map(float, result.stdout.split())
    assert samples > 20 and 0.99 <= copies <= 1.1, result


YARN = {"rope_type": "yarn", "factor": 2.0}
REFUSED = [  # fields of a config.json, what the sentence says of them, and what it says is supported
    ({"model_type": "gpt2"}, "model_type='gpt2'", "llama or qwen3"),
    ({"model_type": "qwen3_moe", "num_experts": 8}, "model_type='qwen3_moe'", "llama or qwen3"),
    ({"num_experts": 8}, "num_experts=8", "the fields of Llama and Qwen3"),
    ({"use_qk_norm": True}, "use_qk_norm=True", "the fields of Llama and Qwen3"),
    ({"qk_norm": True}, "qk_norm=True", "the fields of Llama and Qwen3"),
    ({"logit_scale": 0.5}, "logit_scale=0.5", "the fields of Llama and Qwen3"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'", "silu"),
    ({"attention_bias": True}, "attention_bias=True", "False"),
    ({"mlp_bias": True}, "mlp_bias=True", "False"),
    ({"use_sliding_window": True}, "use_sliding_window=True", "False"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'", "full_attention"),
    ({"rope_interleaved": True}, "rope_interleaved=True", "False"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5", "1"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5", "1"),
    ({"rope_scaling": YARN}, "rope_type='yarn'", "default or llama3"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'", "default or llama3"),
    ({"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, r"mrope_section=\[1\]", "the fields"),
    ({"rope_scaling": "linear"}, "rope_scaling='linear'", "an object"),
    ({"pretraining_tp": 2}, "pretraining_tp=2", "1"),
    ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}", "null"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder=True", "False"),
    ({"hidden_size": "32"}, "hidden_size='32'", "a number above zero"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0", "a number above zero"),
    ({"vocab_size": 320.5}, "vocab_size=320.5", "a number above zero"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'", "true or false"),
]


@pytest.mark.parametrize(("fields", "found", "supported"), REFUSED, ids=[r[1] for r in REFUSED])
def test_what_cannot_be_represented_is_refused_by_name_before_weights_are_read(
    fields, found, supported, tmp_path
):
    config = small_model(qk_norm=False).config.to_hf() | fields
    (tmp_path / "config.json").write_text(json.dumps(config))  # and no weights
    with pytest.raises(InputError, match=f"config.json has .*{found}; supported: {supported}"):
        GPTModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config])
def test_every_field_that_transformers_writes_is_known(config_class):
    ours = small_model(qk_norm=config_class is Qwen3Config, num_key_value_heads=2, head_dim=8).config
    theirs = config_class(**ours.to_hf())
    written = theirs.to_dict()
    assert GPTConfig.from_hf(written) == GPTConfig.from_hf(theirs.to_diff_dict()) == ours
    assert GPTConfig.from_hf(written | TRANSFORMERS_4) == ours


# What transformers 4.57 writes beyond the fields that 5 does, with a full config.
TRANSFORMERS_4 = {
    **dict.fromkeys("add_cross_attention do_sample early_stopping is_decoder output_scores".split(), False),
    **dict.fromkeys(
        "remove_invalid_values return_dict_in_generate tf_legacy_loss torchscript".split(), False
    ),
    **dict.fromkeys("tie_encoder_decoder use_bfloat16 use_sliding_window".split(), False),
    **dict.fromkeys(
        "bad_words_ids begin_suppress_tokens cross_attention_hidden_size finetuning_task".split()
    ),
    **dict.fromkeys("forced_bos_token_id forced_eos_token_id prefix sep_token_id suppress_tokens".split()),
    **dict.fromkeys("exponential_decay_length_penalty task_specific_params tokenizer_class".split()),
    **{"diversity_penalty": 0.0, "length_penalty": 1.0, "repetition_penalty": 1.0, "temperature": 1.0},
    **{"encoder_no_repeat_ngram_size": 0, "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0},
    **{"num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1, "pruned_heads": {}, "top_k": 50},
    **{"top_p": 1.0, "typical_p": 1.0, "transformers_version": "4.57.6", "rope_theta": 10000.0},
}


def test_the_config_of_smollm2_opens():
    """As HuggingFaceTB/SmolLM2-135M-Instruct has it."""
    config = GPTConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 576,
            "initializer_range": 0.041666666666666664,
            "intermediate_size": 1536,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pad_token_id": 2,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
            "transformers_version": "4.42.3",
            "use_cache": True,
            "vocab_size": 49152,
        }
    )
    assert (config.head_dim, config.rope_theta, config.qk_norm, config.rms_norm_eps) == (64, 1e5, False, 1e-5)
    assert config.tie_word_embeddings and config.num_key_value_heads == 3 and config.rope_scaling is None


def test_llama_3_scaling_without_one_of_its_numbers_is_refused_by_name():
    fields = small_model(qk_norm=False).config.to_hf()
    scaling = {name: value for name, value in LLAMA3.items() if name != "low_freq_factor"}
    with pytest.raises(InputError, match=r"config\.json lacks rope_scaling's low_freq_factor"):
        GPTConfig.from_hf(fields | {"rope_scaling": scaling})


def test_a_damaged_model_directory_is_one_sentence(tmp_path):
    small_model().save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        GPTModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        GPTModel.from_pretrained(tmp_path)
    small_model(hidden_size=64).save_pretrained(tmp_path / "wide")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "wide" / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"of shape .*64.*asks for shape .*32"):
        GPTModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        GPTModel.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="no directory nowhere"):
        GPTModel.from_pretrained("nowhere")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change_config(**fields):
    return lambda path: path.write_text(json.dumps(gpt.read_json(path) | fields))


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("config.json", Path.unlink, "holds neither a model (config.json) nor a whole checkpoint"),
        ("config.json", change_config(num_experts=8), "config.json has num_experts=8"),
        ("config.json", change_config(intermediate_size=64), "asks for shape (32, 64)"),
        ("model.safetensors", Path.unlink, "model.safetensors cannot be read"),
        ("model.safetensors", cut, "model.safetensors cannot be read"),
        ("tokenizer.json", Path.unlink, "holds no tokenizer; expected a tokenizer.json"),
        ("tokenizer.json", cut, "no tokenizer could be loaded"),
    ],
)
def test_chat_tells_a_bad_directory_in_one_sentence_with_status_1(file, damage, words, tmp_path, tokenizer):
    small_model().save_pretrained(tmp_path, tokenizer)
    damage(tmp_path / file)
    result = run("chat.py", f"--model={tmp_path}", "--prompt=What is water?")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and words in result.stderr


def test_fields_that_a_config_leaves_out_mean_what_transformers_takes_them_for():
    from transformers import AutoConfig

    small = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
    }
    llama3 = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}
    for fields in (
        {"model_type": "llama"},
        {"model_type": "qwen3"},
        {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": llama3},
        {"model_type": "llama", "rope_parameters": {"rope_type": "default"}},
    ):
        ours, theirs = GPTConfig.from_hf(fields | small), AutoConfig.for_model(**fields | small)
        for name in ("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings"):
            assert getattr(ours, name) == getattr(theirs, name), (fields, name)
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    with pytest.raises(InputError, match=r"config\.json lacks vocab_size, intermediate_size"):
        GPTConfig.from_hf(
            {k: v for k, v in small.items() if "size" not in k or k == "hidden_size"}
            | {"model_type": "llama"}
        )


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


@pytest.fixture(scope="module")
def plain_tokenizer():
    """A foreign one, of 300 tokens, none of them special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator((text(i) for i in range(100)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("chatml", "rows", "grown", "new"),
    [(False, 300, 320, range(300, 320)), (False, 384, 384, range(300, 303)), (True, 320, 320, range(0))],
    ids=["no ChatML", "no ChatML but padding", "ChatML"],
)
def test_fine_tuning_a_foreign_model_uses_its_chatml_ids_or_adds_them_at_the_mean(
    tied, chatml, rows, grown, new, plain_tokenizer, tokenizer, chats, tmp_path
):
    theirs = small_model(vocab_size=rows, tie_word_embeddings=tied, qk_norm=False)
    theirs.save_pretrained(tmp_path / "theirs")
    given = tokenizer if chatml else plain_tokenizer
    given.save_pretrained(tmp_path / "theirs")
    if not chatml:
        with pytest.raises(InputError, match="has no ids for ChatML's tokens"):
            chat.load(str(tmp_path / "theirs"))
    sft_gpt.main(
        sft_config(tmp_path / "theirs", chats, tmp_path / "out", lr=0.0, max_steps=1)
    )  # as it starts
    folder = tmp_path / "out/step_0000001"
    model, saved = GPTModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == grown
    ids = saved.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert ids == ([0, 1, 2] if chatml else [300, 301, 302])
    for name in ("model.embed_tokens", "lm_head"):
        before, after = theirs.get_submodule(name).weight, model.get_submodule(name).weight
        kept = [i for i in range(rows) if i not in new]
        assert torch.equal(after[kept], before[kept])
        torch.testing.assert_close(after[list(new)], before[:300].mean(0).expand(len(new), -1))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
