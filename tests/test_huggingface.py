"""Files of Hugging Face models: ours in transformers, others' here, and what is refused."""

import copy
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import ALONE, LLAMA3, ROOT, SWITCHES, random_ids, refused, sft_config, small_model, text
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

import chat
import huggingface
import sft_gpt
from checkpoint import open_model
from common import InputError, read_json
from gpt import GPTConfig, GPTModel
from tokenization import SPECIALS, chat_template, load_tokenizer


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_save_load_save_gives_the_same_bytes(switches, tmp_path, tokenizer):
    small_model(**switches).save_pretrained(tmp_path / "a", tokenizer)
    GPTModel.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b", tokenizer)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"} <= set(names)
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_head_in_the_files_of_a_tied_model_must_be_its_embedding(tmp_path):
    """transformers uses a head of other values, whatever config.json says."""
    model = small_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    head = stored["model.embed_tokens.weight"].clone()
    save_file(stored | {"lm_head.weight": head}, file, {"format": "pt"})
    ids = random_ids(1, 9)
    assert torch.equal(GPTModel.from_pretrained(tmp_path)(ids), model(ids))
    head[7, 3] += 1
    save_file(stored | {"lm_head.weight": head}, file, {"format": "pt"})
    refused("lm_head.weight of its own.*set it to false", GPTModel.from_pretrained, tmp_path)


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


@pytest.mark.slow
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
    ({"hidden_size": "32"}, "hidden_size='32'", "a whole number above zero"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0", "a whole number above zero"),
    ({"num_hidden_layers": True}, "num_hidden_layers=True", "a whole number above zero"),
    ({"vocab_size": 320.5}, "vocab_size=320.5", "a whole number above zero"),
    ({"vocab_size": 1e30}, r"vocab_size=1e\+30", "a whole number above zero"),
    ({"max_position_embeddings": 10**30}, "max_position_embeddings=10{30}", "a whole number above zero"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan", "a number above zero"),
    ({"rope_theta": math.inf}, "rope_theta=inf", "a number above zero"),
    ({"rope_theta": True}, "rope_theta=True", "a number above zero"),
    ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta='1e4'", "a number above zero"),
    ({"rope_scaling": LLAMA3 | {"factor": "8"}}, "factor='8'", "a number above zero"),
    ({"rope_scaling": LLAMA3 | {"factor": -8.0}}, "factor=-8.0", "a number above zero"),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor=4.0", "less than the high_freq"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'", "true or false"),
    ({"layer_types": 5}, "layer_types=5", "a list"),
    ({"layer_types": "full_attention"}, "layer_types='full_attention'", "a list"),
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


ABSURD = [  # fields of a config.json beside the weights of a small model, and what the sentence says
    ({"num_hidden_layers": 3_000_000}, "num_hidden_layers=3000000, but the weight files"),
    ({"vocab_size": 10**18}, "vocab_size=10{18}, but the weight files"),
    ({"hidden_size": 2**40}, "hidden_size=1099511627776, but"),
    ({"intermediate_size": 2**50}, "intermediate_size=1125899906842624, but"),
    ({"head_dim": 2**60}, "num_attention_heads x head_dim=4611686018427387904, but"),
    ({"max_position_embeddings": 10**11}, "a context of 100000000000 positions is too long"),
]


@pytest.mark.parametrize(("fields", "words"), ABSURD, ids=[str(f) for f, _ in ABSURD])
def test_a_config_of_absurd_size_is_refused_before_anything_is_built(fields, words, tmp_path, monkeypatch):
    model = small_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_hf() | fields))
    real = torch.arange  # of what rope_cache allocates

    def arange(*args, **kwargs):
        assert max(a for a in args if isinstance(a, int)) < 10**6, args
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "arange", arange)
    if "max_position_embeddings" not in fields:
        monkeypatch.setattr(GPTModel, "__init__", None)
    with pytest.raises(InputError, match=words):
        GPTModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"lm_head.weight": "../model.safetensors"},
        {"lm_head.weight": "/tmp/model.safetensors"},
        {"lm_head.weight": "below/model.safetensors"},
        {"lm_head.weight": ".."},
        {"lm_head.weight": ""},
        {"lm_head.weight": 5},
        {"lm_head.weight": ["model.safetensors"]},
        ["model.safetensors"],
        None,
    ],
    ids=str,
)
def test_an_index_may_only_name_files_beside_it(weight_map, tmp_path):
    folder = tmp_path / "model"
    small_model().save_pretrained(folder)
    for place in (tmp_path, folder / "below"):
        place.mkdir(exist_ok=True)
        (place / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match="as a weight file; expected a weight_map with names of"):
        GPTModel.from_pretrained(folder)


def test_a_weight_file_that_is_a_folder_or_not_there_is_one_sentence(tmp_path):
    small_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        GPTModel.from_pretrained(tmp_path)
    index = {"weight_map": {"lm_head.weight": "a\0b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="cannot be read"):
        GPTModel.from_pretrained(tmp_path)


def test_all_files_of_a_model_have_the_mode_that_the_umask_gives(tmp_path, tokenizer, monkeypatch):
    before = os.umask(0o022)
    try:
        small_model().save_pretrained(tmp_path / "one", tokenizer)
        several = functools.partial(save_torch_state_dict, max_shard_size="40KB")
        monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", several)
        small_model().save_pretrained(tmp_path / "two", tokenizer)
    finally:
        os.umask(before)
    files = [*(tmp_path / "one").iterdir(), *(tmp_path / "two").iterdir()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 1


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


@pytest.mark.parametrize("special", [True, False])
def test_trained_rows_of_chatml_tokens_stay_whether_or_not_the_tokenizer_marks_them(
    special, plain_tokenizer, tmp_path, capsys
):
    theirs, known = small_model(vocab_size=320), copy.deepcopy(plain_tokenizer)
    known.add_tokens(["<extra>", *SPECIALS, "</extra>"], special_tokens=special)
    theirs.save_pretrained(tmp_path)
    known.save_pretrained(tmp_path)
    model, tokenizer = open_model(tmp_path, ALONE)
    assert tokenizer.convert_tokens_to_ids(list(SPECIALS)) == [301, 302, 303]
    assert "template" not in capsys.readouterr().out
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_chat_template_that_gives_way_to_chatml_is_told_and_ours_stays(plain_tokenizer, tmp_path, capsys):
    known = copy.deepcopy(plain_tokenizer)
    known.chat_template = "{% for message in messages %}[INST]{{ message.content }}{% endfor %}"
    small_model(vocab_size=320).save_pretrained(tmp_path)
    known.save_pretrained(tmp_path)
    model, tokenizer = open_model(tmp_path, ALONE)
    assert tokenizer.chat_template == chat_template()
    assert f"{tmp_path} has a chat template of its own" in capsys.readouterr().out
    tokenizer.chat_template = ours = chat_template("last", "drop")
    model.save_pretrained(tmp_path / "saved", tokenizer)
    assert open_model(tmp_path / "saved", ALONE)[1].chat_template == ours
    assert not capsys.readouterr().out


def test_a_tokenizer_with_more_specials_is_written_as_transformers_4_reads_it(plain_tokenizer, tmp_path):
    """4.57 ends at a list under extra_special_tokens, and would make token_type_ids, which no model takes."""
    known = copy.deepcopy(plain_tokenizer)
    known.add_special_tokens({"additional_special_tokens": ["<|file|>", "<|repo|>"]})
    known.save_pretrained(tmp_path / "theirs")
    small_model(vocab_size=320).save_pretrained(tmp_path / "model", load_tokenizer(tmp_path / "theirs"))
    written = read_json(tmp_path / "model/tokenizer_config.json")
    assert not isinstance(written.get("extra_special_tokens"), list)
    assert written["additional_special_tokens"] == ["<|file|>", "<|repo|>"]
    assert written["model_input_names"] == ["input_ids", "attention_mask"]
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert {"<|file|>", "<|repo|>"} <= set(again.all_special_tokens)


def test_the_shapes_fields_are_those_of_the_model():
    ours = GPTConfig.__dataclass_fields__.keys() - {"qk_norm", "rope_scaling"}
    assert huggingface.HF_SHAPE_FIELDS.keys() == ours
