"""A LLaMA-shaped decoder whose checkpoints *are* Hugging Face models: nothing is converted, ever.

RMSNorm before attention and MLP, rotary positions, grouped-query causal attention, SwiGLU, no biases, no
dropout. Parameter names and config fields are those of Hugging Face's `LlamaForCausalLM` or, with QK-norm,
`Qwen3ForCausalLM`.

    model = GPTModel(GPTConfig(vocab_size=4096, hidden_size=256, num_hidden_layers=6, num_attention_heads=4))
    logits = model(input_ids)                  # (B, T, V)
    loss = model(input_ids, targets)           # summed over the targets that are not -100
    model = GPTModel.from_pretrained("out/base/step_0000300")

B batch, T positions, C hidden size, H query heads, G key/value heads, D dimensions of a head, V vocabulary.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import varlen
from torch.utils.checkpoint import checkpoint

from rope import apply_rope, rope_cache

LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**26, "mps": 2**24}  # in the loss: 16 MB stay in a CPU's cache
ROWS_AT_LEAST = 512  # at once: below, adding up the head's gradient costs more than computing it
IGNORE = -100  # a target with this value is not trained on; PyTorch's and Hugging Face's convention
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
DEFAULTS = {  # what transformers takes for fields that a config.json leaves out
    "llama": {"max_position_embeddings": 2048},
    "qwen3": {"max_position_embeddings": 32768, "head_dim": 128, "num_key_value_heads": 32},
}
SUPPORTED = {  # fields of config.json and of its rope_scaling whose value this model must agree with
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
NEUTRAL = set(  # fields that leave the logits alone, by why they do
    "architectures transformers_version _name_or_path _model_name_or_path is_llama_config "  # names
    "transformers.js_config finetuning_task task_specific_params problem_type id2label label2id "
    "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id "  # tokens
    "tokenizer_class prefix dtype torch_dtype use_bfloat16 torchscript chunk_size_feed_forward "  # storage
    "is_decoder pruned_heads tf_legacy_loss "  # for other kinds of models
    "use_cache return_dict output_attentions output_hidden_states output_scores "  # what a call returns
    "initializer_range attention_dropout "  # the start of training, and training
    "sliding_window max_window_layers layer_types "  # nothing without use_sliding_window; types are looked at
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature "
    "top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids "
    "encoder_no_repeat_ngram_size num_return_sequences return_dict_in_generate forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens "  # generation, as transformers 4 wrote it into every full config
    "rope_theta rope_scaling rope_parameters".split()  # read
)
ROPE = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class InputError(ValueError):
    """A mistake in what the user gave, told in one sentence; scripts print it and exit with status 1."""


def refuse(name: str, value, supported: str):
    """InputError for a field of config.json."""
    raise InputError(f"config.json has {name}={value!r}; supported: {supported}")


@dataclass
class GPTConfig:
    """The shape of a model, in the field names of Hugging Face's config.json; qk_norm decides its type."""

    vocab_size: int = 49152
    hidden_size: int = 512
    intermediate_size: int | None = None  # width of the SwiGLU; None: 8/3 hidden_size, up to a multiple of 64
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 1024  # the longest context, in tokens
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3.1's, see rope.py
    tie_word_embeddings: bool = False
    qk_norm: bool = True  # RMSNorm on each query and key head before RoPE, as in Qwen3

    def __post_init__(self):
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise InputError(
                    f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                    f"{self.num_attention_heads}; change one of them, or give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise InputError(f"head_dim is {self.head_dim}; rotary embedding needs an even one")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_key_value_heads "
                f"{self.num_key_value_heads}; each key/value head serves equally many query heads"
            )
        if self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size * 8 // 3 // 64) * 64

    @classmethod
    def from_hf(cls, fields: dict) -> "GPTConfig":
        """From the fields of a config.json, of which null means what a missing one does.

        Raises InputError, which names field and value, for what this model cannot represent or does not know.
        """
        fields = {name: value for name, value in fields.items() if value is not None}
        rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            refuse("rope_scaling", rope, "an object")
        rope = {{"type": "rope_type"}.get(k, k): v for k, v in rope.items()}
        names = cls.__dataclass_fields__.keys() - {"qk_norm"}
        types = [("layer_type", kind) for kind in fields.get("layer_types", [])]
        for name, value in [("model_type", fields.get("model_type")), *fields.items(), *rope.items(), *types]:
            if name not in SUPPORTED.keys() | NEUTRAL | names | set(ROPE):
                refuse(name, value, "the fields of Llama and Qwen3")
            if name in SUPPORTED and value not in SUPPORTED[name]:
                refuse(name, value, " or ".join(map(str, SUPPORTED[name])))
        fields = DEFAULTS[fields["model_type"]] | fields
        llama3 = rope.get("rope_type") == "llama3"
        rope.setdefault("original_max_position_embeddings", fields.get("max_position_embeddings"))
        lacking = [name for name in REQUIRED if name not in fields]
        lacking += [f"rope_scaling's {name}" for name in ROPE[1:] if llama3 and name not in rope]
        if lacking:
            raise InputError(f"config.json lacks {', '.join(lacking)}")
        fields["rope_theta"] = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
        own = {name: value for name, value in fields.items() if name in names and name != "rope_scaling"}
        for name, value in own.items():
            if name == "tie_word_embeddings" and not isinstance(value, bool):
                refuse(name, value, "true or false")
            kind = float | int if name in ("rope_theta", "rms_norm_eps") else int
            if not isinstance(value, kind) or (name != "tie_word_embeddings" and value <= 0):
                refuse(name, value, "a number above zero")
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"} if llama3 else None
        return cls(**own, rope_scaling=scaling, qk_norm=fields["model_type"] == "qwen3")

    def to_hf(self) -> dict:
        """The fields of config.json, readable by transformers 4 and 5 and by what reads their files."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "qk_norm"}
        kind = ("qwen3", "Qwen3ForCausalLM") if self.qk_norm else ("llama", "LlamaForCausalLM")
        fixed = {
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "torch_dtype": "float32",
        }
        return {"architectures": [kind[1]], "model_type": kind[0]} | own | fixed


class KVCache:
    """Keys and values of every layer, (B, G, S, D) each, allocated once for S positions."""

    def __init__(
        self, config: GPTConfig, batch: int, positions: int, device: torch.device, dtype: torch.dtype
    ):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, positions, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor):
        """Store k and v (B, G, T, D) at positions (B, T); returns all of the layer's, (B, G, S, D)."""
        index = positions[:, None, :, None].expand_as(k)
        return self.keys[layer].scatter_(2, index, k), self.values[layer].scatter_(2, index, v)


@torch.compiler.disable
def attend_one_by_one(q, k, v, starts, ends, longest_q, longest_k, window_size, enable_gqa):
    """What varlen.varlen_attn does on CUDA, in its arguments, sequence by sequence."""
    lengths = [n for n in starts.diff().tolist() if n]
    parts = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v)))  # (1, H or G, n, D) each
    done = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=enable_gqa) for part in parts]
    return torch.cat(done, dim=2)[0].transpose(0, 1)


VARLEN = {"cuda": varlen.varlen_attn, "cpu": attend_one_by_one}


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: torch.Tensor
) -> torch.Tensor:
    """Causal attention (B, T, H, D) within each of the sequences that begin at these places of B x T tokens.

    As a mask would do it, but nothing is computed across sequences.
    """
    T, H = q.size(2), q.size(1)
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(v.dtype) for x in (q, k, v))  # (B T, H or G, D)
    y = VARLEN[q.device.type](
        q, k, v, sequences, sequences, T, T, window_size=(-1, 0), enable_gqa=k.size(1) != H
    )
    return y.reshape(-1, T, *y.shape[1:])


def has_varlen(device: torch.device, head_dim: int) -> bool:
    """Whether varlen_attention runs there: on CPUs, and on GPUs from Ampere on for what the kernel is built
    for."""
    if device.type != "cuda":
        return device.type in VARLEN
    return torch.cuda.get_device_capability(device) >= (8, 0) and head_dim % 8 == 0 and head_dim <= 256


class MultiHeadAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.layer, self.head_dim = layer, D
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, G * D, bias=False)
        self.v_proj = nn.Linear(C, G * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        self.q_norm = nn.RMSNorm(D, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(D, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, mask=None, sequences=None, cache=None, positions=None):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, G, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v, positions)
        if sequences is not None:
            y = varlen_attention(q, k, v, sequences)
            return self.o_proj(y.reshape(B, T, -1))
        if mask is not None and T > 1 and k.size(1) != q.size(1):  # no fused kernel takes a mask and groups
            k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.size(1) != k.size(1)
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TransformerBlock(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = MultiHeadAttention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x, rope, mask=None, sequences=None, cache=None, positions=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, sequences, cache, positions)
        return x + self.mlp(self.post_attention_layernorm(x))


class SummedCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(x Wᵀ)[target] in fp32, never holding more than a chunk of the (N, V) logits.

    The gradients are at hand as soon as a chunk's logits are, so the forward pass computes them and the
    backward pass only scales them: no logits are kept, and none are computed twice.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, chunk):  # x (N, C), weight (V, C), targets (N,)
        w = weight.to(x.dtype)
        loss = x.new_zeros((), dtype=torch.float32)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for i in range(0, len(x), chunk):
            xs, ys = x[i : i + chunk], targets[i : i + chunk, None]
            kept, ys = (ys != IGNORE).float(), ys.clamp(min=0)
            logits = (xs @ w.T).float()
            top = logits.amax(1, keepdim=True)
            right = logits.gather(1, ys) - top
            probs = logits.sub_(top).exp_()
            total = probs.sum(1, keepdim=True)
            loss += ((total.log() - right) * kept).sum()
            if dx is not None or dw is not None:  # d loss / d logits = softmax - one-hot
                probs = probs.mul_(kept / total).scatter_add_(1, ys, -kept).to(x.dtype)
            if dx is not None:
                dx[i : i + chunk] = probs @ w
            if dw is not None:
                dw += probs.T @ xs
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return None if dx is None else dx * grad, None if dw is None else dw * grad, None, None


@torch.compiler.disable
def summed_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed fp32 cross-entropy of hidden states (B, T, C) against the targets (B, T) that are not IGNORE."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    if not torch.is_grad_enabled():
        weight = weight.detach()  # or its gradient would be computed
    x, targets = x.flatten(0, -2), targets.flatten()
    if kind == "cpu":  # leave the ignored out; on a GPU, to find them would wait for all work before
        keep = targets != IGNORE
        x, targets = x[keep], targets[keep]
    with torch.autocast(kind, enabled=False):
        chunk = max(ROWS_AT_LEAST, LOGITS_AT_ONCE[kind] // len(weight))
        return SummedCrossEntropy.apply(x, weight, targets, chunk)


@torch.compiler.disable
def token_losses(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fp32 cross-entropy (B, T) of each target, 0 for IGNORE, and whether it was the likeliest (B, T).

    As frugal as summed_loss, but as losses may be weighted later, a chunk's logits are computed again for
    their gradients.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    y, rows = targets.flatten(), (targets.flatten() != IGNORE).nonzero()[:, 0]

    def chunk(x, weight, y):
        logits = (x @ weight.to(x.dtype).T).float()
        return F.cross_entropy(logits, y, reduction="none"), logits.argmax(1) == y

    losses = torch.zeros(y.shape, device=x.device)
    right = torch.zeros(y.shape, dtype=torch.bool, device=x.device)
    with torch.autocast(kind, enabled=False):
        for part in rows.split(max(ROWS_AT_LEAST, LOGITS_AT_ONCE[kind] // len(weight))):
            found = checkpoint(chunk, x.flatten(0, -2)[part], weight, y[part], use_reentrant=False)
            losses, right[part] = losses.index_put((part,), found[0]), found[1]
    return losses.view(targets.shape), right.view(targets.shape)


class Decoder(nn.Module):
    """Embedding, blocks and final norm; named as Hugging Face's inner `model`."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TransformerBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class GPTModel(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.init_rope()
        self.init_weights()

    def init_rope(self):
        c = self.config
        cos, sin = rope_cache(c.head_dim, c.max_position_embeddings, c.rope_theta, c.rope_scaling)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self):
        """Every matrix's distribution; the first loss is then ln V.

        | parameter              | deviation | because                                                      |
        | ---------------------- | --------- | ------------------------------------------------------------ |
        | o_proj, down_proj      | 0         | each block starts as the identity                            |
        | q, k, v, gate, up      | C^-1/2    | unit variance in gives unit variance out                     |
        | embed_tokens, untied   | 0.02      | as in GPT-2; the first norm removes the scale                |
        | embed_tokens, tied     | C^-3/4    | a token's logit for itself is C times this, and must be small |
        | lm_head, untied        | 0.001     | near-uniform predictions                                     |
        """
        C, tied = self.config.hidden_size, self.config.tie_word_embeddings
        for name, p in self.named_parameters():
            if name.endswith("norm.weight"):
                p.fill_(1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                p.zero_()
            elif name == "model.embed_tokens.weight":
                p.normal_(std=C**-0.75 if tied else 0.02)
            elif name == "lm_head.weight":
                p.normal_(std=0.001)
            else:
                p.normal_(std=C**-0.5)

    def hidden(self, input_ids, positions=None, mask=None, sequences=None, cache=None, noise=None):
        """Final hidden states (B, T, C)."""
        if input_ids.size(1) > self.config.max_position_embeddings:
            raise InputError(
                f"{input_ids.size(1)} tokens are more than the context of "
                f"{self.config.max_position_embeddings}; shorten the input"
            )
        cos, sin = self.rope_cos[: input_ids.size(1)], self.rope_sin[: input_ids.size(1)]
        if positions is not None:
            cos, sin = self.rope_cos[positions][:, None], self.rope_sin[positions][:, None]  # (B, 1, T, D)
        x = self.model.embed_tokens(input_ids)
        x = x if noise is None else x + noise
        for layer in self.model.layers:
            x = layer(x, (cos, sin), mask, sequences, cache, positions)
        return self.model.norm(x)

    def forward(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        sequences: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        per_token: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, T, V), or with targets (B, T) their summed cross-entropy in nats, fp32, a scalar; with
        per_token that of each (B, T), and whether the target was the likeliest token (B, T).

        positions (B, T) default to 0 … T-1 and mask (B, 1, T, T), True where a query may see a key, to
        causal; packed rows give both, or on CUDA sequences instead of the mask: where in the B x T tokens
        each begins, and the end. noise (B, T, C) is added to the embeddings.
        """
        x = self.hidden(input_ids, positions, mask, sequences, noise=noise)
        if targets is None:
            return self.lm_head(x)
        return (token_losses if per_token else summed_loss)(x, self.lm_head.weight, targets)

    def num_parameters(self) -> int:
        """How many numbers the model is made of; tied embeddings count once."""
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def resize_vocabulary(self, tokens: int, new: int = 0) -> None:
        """Make room for a tokenizer's ids, if need be up to a multiple of 64.

        New rows are the mean of the old; so are the rows of the last `new` ids, which padding may hold.
        """
        old, known = self.config.vocab_size, min(tokens - new, self.config.vocab_size)
        size = old if tokens <= old else -(-tokens // 64) * 64
        self.config.vocab_size = size
        for module in (self.model.embed_tokens, self.lm_head):
            mean = module.weight[:known].mean(0, keepdim=True)
            weight = torch.cat([module.weight, mean.expand(size - old, -1)])
            weight[known:tokens] = mean
            module.weight = nn.Parameter(weight)
        self.model.embed_tokens.num_embeddings = self.lm_head.out_features = size
        self.tie_weights()

    # -- generation ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_ids: Sequence[int] = (),
    ) -> Iterator[list[int | None]]:
        """Continue prompts, of any lengths, together; yields for each step a list with each prompt's next id.

        A prompt that has given one of stop_ids (which is yielded) or whose context is full gives None from
        then on; the generator ends when all have, or after max_new_tokens. temperature 0 is greedy. A seed
        makes sampling repeatable. Raises InputError for an empty prompt and for one that leaves no room in
        the context.

            ids = [id for (id,) in model.generate([prompt], stop_ids=[2])]
        """
        if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
            raise InputError(
                f"temperature {temperature}, top_k {top_k}, top_p {top_p}: expected a temperature from "
                f"0 up, a top_k of at least 1, a top_p above 0 and at most 1"
            )
        lengths = [len(p) for p in prompts]
        limit = self.config.max_position_embeddings
        if not lengths or min(lengths) < 1 or max(lengths) >= limit:
            raise InputError(
                f"prompts of {lengths} tokens: each must have from 1 to {limit - 1}, to leave room in the "
                f"context of {limit}"
            )
        device, B, longest = self.lm_head.weight.device, len(prompts), max(lengths)
        generator = torch.Generator(device).manual_seed(seed) if seed is not None else None
        # Rows are padded on the right: causality alone keeps the padding from being seen, and each row's next
        # token overwrites it in the cache.
        ids = torch.zeros(B, longest, dtype=torch.long, device=device)
        for row, prompt in zip(ids, prompts):
            row[: len(prompt)] = torch.as_tensor(prompt)
        filled = torch.tensor(lengths, device=device)  # (B,) tokens so far
        cache = KVCache(
            self.config, B, min(longest + max_new_tokens, limit), device, self.lm_head.weight.dtype
        )
        slots = torch.arange(cache.keys.size(3), device=device)
        positions = slots[None, :longest].expand(B, -1)
        done = torch.zeros(B, dtype=torch.bool, device=device)
        stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
        for _ in range(max_new_tokens):
            x = self.hidden(
                ids, positions, slots <= positions[:, None, :, None], cache=cache
            )  # mask (B, 1, T, S)
            last = (filled - 1 - positions[:, 0]).clamp(max=ids.size(1) - 1)
            next_ids = sample(
                self.lm_head(x[torch.arange(B, device=device), last]), temperature, top_k, top_p, generator
            )
            yield [None if d else i for i, d in zip(next_ids.tolist(), done.tolist())]
            done |= torch.isin(next_ids, stops) | (filled >= limit)
            if done.all():
                return
            ids, positions = next_ids[:, None], filled.clamp(max=len(slots) - 1)[:, None]
            filled = filled + ~done

    # -- loading and saving ----------------------------------------------------------------------------------

    def stored_state(self) -> dict[str, torch.Tensor]:
        """The weights as a file holds them: tied ones once."""
        state = self.state_dict()
        if self.config.tie_word_embeddings:
            del state["lm_head.weight"]
        return state

    def save_pretrained(self, path: str | Path, tokenizer=None, state_dict: dict | None = None) -> None:
        """Write a Hugging Face model directory: config.json, safetensors (sharded above 5 GB), and with a
        tokenizer its files and a generation_config.json whose stop ids are <|im_end|> and <|endoftext|>.

        state_dict is an earlier stored_state; without it the weights are as they are now.
        """
        from huggingface_hub import save_torch_state_dict

        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(self.stored_state() if state_dict is None else state_dict, path)
        fields = self.config.to_hf()
        if tokenizer is not None:
            end, turn_end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
            ids = {"bos_token_id": end, "eos_token_id": [turn_end, end], "pad_token_id": end}
            fields |= ids
            (path / "generation_config.json").write_text(
                json.dumps(ids | {"do_sample": False}, indent=2) + "\n"
            )
            tokenizer.save_pretrained(path)
            # transformers 5 writes a class name that transformers 4 does not know; both know this one
            file = path / "tokenizer_config.json"
            settings = read_json(file) | {"tokenizer_class": "PreTrainedTokenizerFast"}
            file.write_text(json.dumps(settings, indent=2) + "\n")
        (path / "config.json").write_text(json.dumps(fields, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "GPTModel":
        """Open a Llama- or Qwen3-shaped model, in fp32: a directory, or a hub id, which is downloaded.

        Raises InputError for what is missing, damaged, or of a kind this model cannot represent.
        """
        path = model_directory(name)
        config = GPTConfig.from_hf(read_json(path / "config.json"))
        with torch.device("meta"):  # no memory yet
            model = cls(config)
        model.init_rope()
        missing = model.stored_state()
        for key, tensor in stored_tensors(path):
            if key.endswith("rotary_emb.inv_freq") or (
                key == "lm_head.weight" and config.tie_word_embeddings
            ):
                continue  # old files store what follows from config.json
            if key not in missing or missing[key].shape != tensor.shape:
                expected = f"shape {tuple(missing[key].shape)}" if key in missing else "no such tensor"
                raise InputError(
                    f"{path} holds {key} of shape {tuple(tensor.shape)}; its config.json asks for {expected}"
                )
            if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise InputError(
                    f"{path} holds {key} as {tensor.dtype}; supported: float32, bfloat16 and float16"
                )
            module, _, attribute = key.rpartition(".")
            tensor = nn.Parameter(tensor.to(torch.float32, copy=True))  # the file's pages are not kept
            setattr(model.get_submodule(module), attribute, tensor)
            del missing[key]
        if missing:
            raise InputError(
                f"{path} lacks {len(missing)} tensors that config.json asks for: {', '.join(missing)[:200]}"
            )
        model.tie_weights()
        return model


def model_directory(name: str | Path) -> Path:
    """A local directory as it is; a hub id as the directory of its downloaded snapshot."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import httpx

    try:
        path = Path(snapshot_download(str(name), allow_patterns=["*.json", "*.jinja", "*.model", "*.txt"]))
        GPTConfig.from_hf(read_json(path / "config.json"))  # before gigabytes are downloaded
        return Path(snapshot_download(str(name), allow_patterns=["*.safetensors"]))
    except InputError:
        raise
    except (OSError, ValueError, httpx.HTTPError) as error:  # of which kinds the hub's are
        raise InputError(
            f"no directory {name}, and no model of that name could be had from the hub: {one_line(error)}"
        ) from error


def one_line(error: Exception) -> str:
    """An error's message, which may have several lines or none, in one."""
    return " ".join(str(error).split()) or type(error).__name__


def read_json(path: Path) -> dict:
    """The object in a JSON file; InputError if it is missing, cut short or something else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); expected a JSON object") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a JSON {type(found).__name__}; expected a JSON object")
    return found


def stored_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Each name and tensor in a directory's safetensors, one file or several with an index, memory-mapped."""
    from safetensors import SafetensorError, safe_open

    index, files = path / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict):
            raise InputError(f"{index} has no weight_map; copy or download it again")
        files = sorted(set(places.values()))
    for file in files:
        try:
            with safe_open(path / file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - it is no dict
                    yield key, tensors.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path / file} cannot be read ({error}); copy or download it again") from error


def sample(
    logits: torch.Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Ids (B,) drawn from logits (B, V): of the top_k likeliest, the fewest that reach probability top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        logits = logits.masked_fill(
            logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:], -torch.inf
        )
    probs = logits.softmax(-1)
    if top_p is not None:
        ordered, index = probs.sort(descending=True)
        enough = ordered.cumsum(-1) - ordered >= top_p  # the more likely ones reach top_p without this one
        ordered[enough] = 0
        probs = torch.zeros_like(probs).scatter_(1, index, ordered)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]
