"""Hugging Face's files: config.json, safetensors, the hub; what of others' fields is supported or refused.

Nothing here knows the model. Configurations are dicts, weights are named tensors.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType

import torch
from torch import nn

from common import InputError, one_line, patiently, read_json

NUMBER = int | float
HF_SHAPE_FIELDS = {  # fields of config.json that decide the model's shape, with their types
    "vocab_size": int,
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "head_dim": int,
    "max_position_embeddings": int,
    "rms_norm_eps": NUMBER,
    "rope_theta": NUMBER,
    "tie_word_embeddings": bool,
}
HF_REQUIRED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
HF_DEFAULTS = {  # what transformers takes for fields that a config.json leaves out
    "llama": {"max_position_embeddings": 2048},
    "qwen3": {"max_position_embeddings": 32768, "head_dim": 128, "num_key_value_heads": 32},
}
HF_ROPE_FIELDS = (  # of rope_scaling or rope_parameters
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
HF_SUPPORTED_VALUES = {  # fields of config.json and its rope_scaling whose value this model must agree with
    "model_type": ("llama", "qwen3"),
    "quantization_config": ("null",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "layer_type": ("full_attention",),
    "rope_type": ("default", "llama3"),
    "rope_interleaved": (False,),  # nanotron's; True mixes the halves of a head otherwise
    "partial_rotary_factor": (1,),
    "pretraining_tp": (1,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
}
HF_IGNORED_FIELDS = set(  # fields that leave the logits alone, by why they do
    "architectures transformers_version _name_or_path _model_name_or_path is_llama_config "  # names
    "transformers.js_config finetuning_task task_specific_params problem_type id2label label2id "
    "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id "  # tokens
    "tokenizer_class prefix dtype torch_dtype use_bfloat16 torchscript chunk_size_feed_forward "  # storage
    "is_decoder pruned_heads tf_legacy_loss "  # for other kinds of models
    "use_cache return_dict output_attentions output_hidden_states output_scores "  # what a call returns
    "initializer_range attention_dropout "  # the start of training, and training
    "sliding_window max_window_layers layer_types "  # without use_sliding_window; each type is checked
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature "
    "top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids "
    "encoder_no_repeat_ngram_size num_return_sequences return_dict_in_generate forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens "  # generation, as transformers 4 wrote it into every full config
    "rope_theta rope_scaling rope_parameters".split()  # read apart
)

# -- config.json ---------------------------------------------------------------------------------------------


def refuse(name: str, value, supported: str):
    """Raise InputError for a field of config.json."""
    raise InputError(f"config.json has {name}={value!r:.100}; supported: {supported}")


def config_from_hf(fields: dict) -> dict:
    """GPTConfig's arguments from the fields of a config.json. A null counts as missing.

    Raises InputError, which names field and value, for what this model cannot represent or does not know.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        refuse("rope_scaling", rope, "an object")
    rope = {{"type": "rope_type"}.get(name, name): v for name, v in rope.items() if v is not None}
    if not isinstance(fields.get("layer_types", []), list):
        refuse("layer_types", fields["layer_types"], "a list")
    layer_types = [("layer_type", value) for value in fields.get("layer_types", [])]
    check_fields([("model_type", fields.get("model_type")), *fields.items(), *rope.items(), *layer_types])
    fields = HF_DEFAULTS[fields["model_type"]] | fields
    llama3 = rope.get("rope_type") == "llama3"
    rope.setdefault("original_max_position_embeddings", fields.get("max_position_embeddings"))
    lacking = [name for name in HF_REQUIRED_FIELDS if name not in fields]
    lacking += [f"rope_scaling's {name}" for name in HF_ROPE_FIELDS[1:] if llama3 and name not in rope]
    if lacking:
        raise InputError(f"config.json lacks {', '.join(lacking)}; copy or download it again")
    fields["rope_theta"] = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    shape = {name: value for name, value in fields.items() if name in HF_SHAPE_FIELDS}
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"} if llama3 else None
    numbers = {name: rope[name] for name in HF_ROPE_FIELDS[1:]} if llama3 else {}
    for name, value in (shape | numbers).items():
        check_type(name, value, HF_SHAPE_FIELDS.get(name, NUMBER))
    if llama3 and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        refuse("low_freq_factor", rope["low_freq_factor"], "less than the high_freq_factor")
    return shape | {"rope_scaling": scaling, "qk_norm": fields["model_type"] == "qwen3"}


def check_type(name: str, value, kind: type | UnionType) -> None:
    """Raise InputError for a field's value of another kind, or a number that is not above zero and finite."""
    if kind is bool:
        if not isinstance(value, bool):
            refuse(name, value, "true or false")
    elif isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < 2**63:
        refuse(name, value, "a whole number above zero" if kind is int else "a number above zero")


def check_fields(fields: list[tuple]) -> None:
    """Raise InputError for a field that nobody knows or whose value is not supported."""
    known = HF_SUPPORTED_VALUES.keys() | HF_SHAPE_FIELDS.keys() | HF_IGNORED_FIELDS | set(HF_ROPE_FIELDS)
    for name, value in fields:
        if name not in known:
            refuse(name, value, "the fields of Llama and Qwen3")
        if name in HF_SUPPORTED_VALUES and value not in HF_SUPPORTED_VALUES[name]:
            refuse(name, value, " or ".join(map(str, HF_SUPPORTED_VALUES[name])))


def config_to_hf(shape: dict) -> dict:
    """The fields of config.json for GPTConfig's; transformers 4 and 5 and other readers know them."""
    qwen3 = shape["qk_norm"]
    return {
        "architectures": ["Qwen3ForCausalLM" if qwen3 else "LlamaForCausalLM"],
        "model_type": "qwen3" if qwen3 else "llama",
        **{name: value for name, value in shape.items() if name != "qk_norm"},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "torch_dtype": "float32",
    }


# -- reading -------------------------------------------------------------------------------------------------


def model_directory(name: str | Path, commit: str | None = None) -> Path:
    """A local directory as it is; a hub id as the directory of its downloaded snapshot, the newest or at a
    commit."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import httpx

    def fetch(*patterns: str) -> Path:
        return Path(
            patiently(lambda: snapshot_download(str(name), revision=commit, allow_patterns=[*patterns]))
        )

    try:
        path = fetch("*.json", "*.jinja", "*.model", "*.txt")
        config_from_hf(read_json(path / "config.json"))  # before gigabytes are downloaded
        return fetch("*.safetensors")
    except InputError:
        raise
    except (OSError, ValueError, httpx.HTTPError) as error:  # the hub's errors are of these kinds
        raise InputError(
            f"no directory {name}, and no model of that name could be had from the hub: "
            f"{one_line(error)}; name a folder with a config.json, or a hub id that can be reached"
        ) from error


def weight_files(path: Path) -> list[Path]:
    """A directory's safetensors: one file, or those that an index names. No index may name other folders."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return [path / "model.safetensors"]
    places = read_json(index).get("weight_map")
    names = places.values() if isinstance(places, dict) else [places]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f"{index} names {name!r:.100} as a weight file; expected a weight_map with names of "
                f".safetensors files beside it; copy or download it again"
            )
    return [path / name for name in sorted(set(names))]


def read_tensors(path: Path, read: Callable) -> Iterator[tuple]:
    """Each tensor's name in a directory's weight files, and read(file, name). The files are memory-mapped."""
    from safetensors import SafetensorError, safe_open

    for file in weight_files(path):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no dict
                    yield name, read(tensors, name)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(
                f"{file} cannot be read ({one_line(error)}); copy or download it again"
            ) from error


def check_size(path: Path, shape: dict) -> None:
    """Raise InputError for a config.json that asks for larger tensors, or more layers, than the files hold.

    It reads the files' headers only, so an absurd number is told before a model of that size is built.
    """
    shapes = [s for _, s in read_tensors(path, lambda file, name: file.get_slice(name).get_shape())]
    longest = max((max(s, default=1) for s in shapes if 0 not in s), default=0)
    asked = {name: shape[name] for name in ("vocab_size", "hidden_size", "intermediate_size")}
    asked["num_attention_heads x head_dim"] = shape["num_attention_heads"] * shape["head_dim"]
    layers = {"num_hidden_layers": shape["num_hidden_layers"]}
    for fields, limit in ((asked, longest), (layers, len(shapes))):
        for name, value in fields.items():
            if value > limit:
                raise InputError(
                    f"config.json has {name}={value}, but the weight files in {path} hold {len(shapes)} "
                    f"tensors with at most {longest} rows or columns; copy or download them again"
                )


EMBEDDING = "model.embed_tokens.weight"


def stored_tensor(path: Path, wanted: str) -> torch.Tensor:
    """One tensor of a directory's weight files; an empty one if they have none of that name."""
    tensors = read_tensors(path, lambda file, name: file.get_tensor(name) if name == wanted else None)
    return next((tensor for name, tensor in tensors if name == wanted), torch.empty(0))


def load_weights(model: nn.Module, path: Path, *, expected: dict[str, torch.Tensor], place: Callable) -> None:
    """Replace a model's parameters by those in a directory, in fp32, one at a time.

    `expected` are the names and shapes that the files must hold. place(tensor, parameter) brings a tensor to
    where the parameter is to be, or a rank's part of it. Raises InputError for a tensor that is missing,
    unknown, not finite, or of another shape or type, and for a head of its own that config.json calls tied.
    """
    # Old files also store what follows from config.json: rotary frequencies, and the head of a tied model.
    derived = () if "lm_head.weight" in expected else ("lm_head.weight",)
    missing = dict(expected)
    for name, tensor in read_tensors(path, lambda file, name: file.get_tensor(name)):
        if name in derived and not torch.equal(tensor.float(), stored_tensor(path, EMBEDDING).float()):
            raise InputError(
                f"{path} holds a {name} of its own, and its config.json says tie_word_embeddings=true; set "
                f"it to false there, as transformers understands it"
            )
        if name.endswith("rotary_emb.inv_freq") or name in derived:
            continue
        if name not in missing or missing[name].shape != tensor.shape:
            wanted = f"shape {tuple(missing[name].shape)}" if name in missing else "no such tensor"
            raise InputError(
                f"{path} holds {name} of shape {tuple(tensor.shape)}; its config.json asks for {wanted}; "
                f"copy or download both again"
            )
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise InputError(
                f"{path} holds {name} as {tensor.dtype}; supported: float32, bfloat16 and float16"
            )
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        whole = tensor.to(torch.float32, copy=True)  # the file's pages are not kept
        if not whole.sum().isfinite() and not whole.isfinite().all():  # the second takes memory
            raise InputError(f"{path} holds NaN or infinity in {name}; copy or download it again")
        setattr(module, attribute, nn.Parameter(place(whole, getattr(module, attribute))))
        del missing[name]
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} tensors that config.json asks for, as {next(iter(missing))}; copy "
            f"or download them again"
        )


# -- writing -------------------------------------------------------------------------------------------------


def write_model(path: str | Path, *, config: dict, weights: dict[str, torch.Tensor], tokenizer=None) -> None:
    """Write a Hugging Face model directory: config.json and safetensors, several files above 5 GB.

    With a tokenizer also its files, and a generation_config.json whose stop ids are <|im_end|> and
    <|endoftext|>.
    """
    from huggingface_hub import save_torch_state_dict

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(weights, path)
    if tokenizer is not None:
        end, turn_end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
        ids = {"bos_token_id": end, "eos_token_id": [turn_end, end], "pad_token_id": end}
        config = config | ids
        generation = json.dumps(ids | {"do_sample": False}, indent=2)
        (path / "generation_config.json").write_text(generation + "\n", encoding="utf-8")
        tokenizer.save_pretrained(path)
        # transformers 5 writes a class name and a list of special tokens that transformers 4 does not know.
        # Both know this class, with which 4 also makes token_type_ids unless told otherwise, and the list's
        # older name.
        file = path / "tokenizer_config.json"
        settings = read_json(file) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings["model_input_names"] = ["input_ids", "attention_mask"]
        if isinstance(settings.get("extra_special_tokens"), list):
            settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in path.glob("*.safetensors"):  # written for their owner alone
        shutil.copymode(path / "config.json", file)
