"""A LLaMA-shaped decoder whose checkpoints *are* Hugging Face models: nothing is converted, ever.

RMSNorm before attention and MLP, rotary positions, grouped-query causal attention, SwiGLU, no biases, no
dropout. Parameter names and config fields are those of Hugging Face's `LlamaForCausalLM` or, with QK-norm,
`Qwen3ForCausalLM`.

    model = GPTModel(GPTConfig(vocab_size=4096, hidden_size=256, num_hidden_layers=6, num_attention_heads=4))
    logits = model(input_ids)                  # (B, T, V)
    loss = model(input_ids, targets)           # summed over the targets that are not -100
    model = GPTModel.from_pretrained("out/base/step_0000300")

B batch, T positions, S keys, C hidden size, H query heads, G key/value heads, D dimensions of a head, V
vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from attention import attend, varlen_attention
from common import InputError, read_json
from generation import KVCache, generate
from huggingface import check_size, config_from_hf, config_to_hf, load_weights, model_directory, write_model
from loss import fused_nats_and_gradient, nats_and_gradient, product_type, summed_loss, token_losses
from rope import apply_rope, rope_cache


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
            raise InputError(
                f"head_dim, by default hidden_size / num_attention_heads, is {self.head_dim}; rotary "
                f"embedding needs an even one, so change one of them"
            )
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_key_value_heads "
                f"{self.num_key_value_heads}; change one of them, so that each key/value head "
                f"serves equally many query heads"
            )
        if self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size * 8 // 3 // 64) * 64

    @classmethod
    def from_hf(cls, fields: dict) -> "GPTConfig":
        """From the fields of a config.json; InputError for what this model cannot represent."""
        return cls(**config_from_hf(fields))

    def to_hf(self) -> dict:
        """The fields of config.json."""
        return config_to_hf(asdict(self))


def padded(vocabulary: int) -> int:
    """Rows of an embedding for so many ids: a multiple of 64, with which a GPU is faster."""
    return -(-vocabulary // 64) * 64


def for_products(x: torch.Tensor) -> torch.Tensor:
    """x in the type that autocast multiplies in: converted once, not by each of several products."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


# -- norms ---------------------------------------------------------------------------------------------------


class RootMeanSquareNorm(torch.autograd.Function):
    """x / sqrt(mean(x²) + eps), times a weight (D,), over the last D numbers of x.

    torch has no kernel of it for CPUs. Its formula's backward pass takes three times as long as this one, and
    keeps another tensor like x. The result is torch's, bit for bit.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = x.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        weighted = grad * unit
        along = (weighted @ weight)[..., None].div_(-x.size(-1))  # a change along x changes no direction
        dx = (grad * weight).addcmul_(unit, along).mul_(scale)
        return dx, weighted.flatten(0, -2).sum(0), None


class RMSNorm(nn.RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fp32 = x.dtype == self.weight.dtype == torch.float32  # FSDP2 may have the weight in bf16
        if x.device.type == "cpu" and fp32 and not torch.compiler.is_compiling():
            return RootMeanSquareNorm.apply(x, self.weight, self.eps)
        return super().forward(x)


# -- attention -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class AttentionInputs:
    """What attention takes besides the hidden states. Without mask and cu_seqlens it is causal."""

    rope: tuple[torch.Tensor, torch.Tensor]  # cos and sin, (T, D) or (B, 1, T, D)
    mask: torch.Tensor | None = None  # (B, 1, T, S), True where a query may see a key
    # Where each sequence begins in the B x T tokens, and their end. No sequence reaches into another row.
    cu_seqlens: torch.Tensor | None = None
    cache: KVCache | None = None  # what keeps the keys and values


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
        self.q_norm = RMSNorm(D, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: torch.Tensor, inputs: AttentionInputs) -> torch.Tensor:
        B, T, _ = x.shape
        x, kind = for_products(x), inputs.rope[0].dtype  # norms and rotation are in fp32
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim).to(kind)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim).to(kind)).transpose(1, 2)  # (B, G, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = apply_rope(q, *inputs.rope), apply_rope(k, *inputs.rope)
        if inputs.cache is not None:
            inputs.cache.store(self.layer, k, v)
        if inputs.cu_seqlens is not None:
            y = varlen_attention(q, k, v, inputs.cu_seqlens)
            return self.o_proj(y.reshape(B, T, -1))
        y = attend(q, k, v, inputs.mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = for_products(x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self.gated(gate, up)
        # Backward computes silu(gate) and the product again. Kept, they would double an MLP's memory.
        return checkpoint(self.gated, gate, up, use_reentrant=False, preserve_rng_state=False)

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The output (B, T, C) of the gate and what passes it, (B, T, I) each."""
        return self.down_proj(F.silu(gate) * up)


class TransformerBlock(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = MultiHeadAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self, x: torch.Tensor, update: torch.Tensor, inputs: AttentionInputs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream x and an update still to be added to it, (B, T, C) each, in and out.

        So an MLP's output is added in the kernel of the next norm. Added here, where compiled code ends, it
        would take a kernel of its own, which reads and writes the whole stream.
        """
        x = x + update
        x = x + self.self_attn(self.input_layernorm(x), inputs)
        return x, self.mlp(self.post_attention_layernorm(x))


class FinalNorm(RMSNorm):
    def forward(self, x: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        return super().forward(x + update)


# -- the model -----------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Embedding, blocks and final norm; named as Hugging Face's inner `model`."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TransformerBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = FinalNorm(config.hidden_size, eps=config.rms_norm_eps)


class GPTModel(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # keep each block's input only; compute the rest again backward
        self.softmax = nats_and_gradient
        self.graph_decoding = False  # on CUDA: generate records a CUDA graph of a step and replays it
        self.kept_weights = None  # a dict, in which generate keeps its copies of weights that do not change
        self.int8_decoding = False  # on a CPU: generate multiplies new tokens by matrices rounded to int8
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

    def hidden(
        self,
        input_ids: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        **attention,
    ) -> torch.Tensor:
        """Final hidden states (B, T, C); `attention` are fields of AttentionInputs."""
        T, context = input_ids.size(1), self.config.max_position_embeddings
        if context < T:
            raise InputError(f"{T} tokens are more than the context of {context}; shorten the input")
        rope = self.rope_cos[:T], self.rope_sin[:T]
        if positions is not None:
            rope = self.rope_cos[positions][:, None], self.rope_sin[positions][:, None]  # (B, 1, T, D)
        inputs = AttentionInputs(rope, **attention)
        x = self.model.embed_tokens(input_ids).to(self.rope_cos.dtype)  # FSDP2 has the embedding in bf16
        x = x if noise is None else x + noise
        checkpointed = self.checkpoint_activations and torch.is_grad_enabled()
        # Zeros that look like a block's update, so that the first block uses the same graph as the others.
        nothing = torch.zeros_like(x, dtype=product_type(x))
        update = nothing.requires_grad_(x.requires_grad and not checkpointed)
        for layer in self.model.layers:
            if checkpointed:  # of x and the update their sum alone is kept
                x, update = checkpoint(layer, x + update, nothing, inputs, use_reentrant=False)
            else:
                x, update = layer(x, update, inputs)
        return self.model.norm(x, update)

    def forward(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        per_token: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, T, V), or with targets (B, T) their summed cross-entropy in nats, fp32, a scalar.

        With per_token: the cross-entropy of each target (B, T), and whether it was the likeliest token
        (B, T). positions (B, T) default to 0 … T-1. Packed rows give positions and either mask or
        cu_seqlens, as AttentionInputs has them. noise (B, T, C) is added to the embeddings.
        """
        x = self.hidden(input_ids, positions=positions, noise=noise, mask=mask, cu_seqlens=cu_seqlens)
        if targets is None:
            return self.lm_head(x)
        if per_token:
            return token_losses(x, self.lm_head.weight, targets)
        return summed_loss(x, self.lm_head.weight, targets, self.softmax)

    def next_logits(self, input_ids: torch.Tensor, last: torch.Tensor, **attention) -> torch.Tensor:
        """Logits (B, V) at each row's position `last` (B,)."""
        x = self.hidden(input_ids, **attention)
        return self.lm_head(x[torch.arange(len(x), device=x.device), last])

    def compile_blocks(self) -> None:
        """Compile in place the blocks, the last norm and, on CUDA, the head's softmax. One graph serves all
        blocks. On CUDA decoding then replays a CUDA graph, too.

        By the roofline (docs/measured.md) this is as fast as one graph of the whole model. It is traced in a
        sixth of the time, and DDP does not split it.
        """
        for part in (*self.model.layers, self.model.norm):
            part.compile(dynamic=False)
        if self.lm_head.weight.is_cuda:
            self.softmax = torch.compile(fused_nats_and_gradient, dynamic=False)
            self.graph_decoding = True

    def num_parameters(self) -> int:
        """How many numbers the model is made of; tied embeddings count once."""
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def resize_vocabulary(self, tokens: int, new_ids: Sequence[int] = ()) -> None:
        """Make room for a tokenizer's ids, if need be up to a multiple of 64. New rows, and those of new_ids
        even if the model had them before as padding, start as the mean of the known ones."""
        old = self.config.vocab_size
        size = old if tokens <= old else padded(tokens)
        known = torch.zeros(size, dtype=torch.bool, device=self.lm_head.weight.device)
        known[: min(tokens, old)] = True
        known[list(new_ids)] = False
        self.config.vocab_size = size
        for module in (self.model.embed_tokens, self.lm_head):
            mean = module.weight[known[:old]].mean(0, keepdim=True)
            weight = torch.cat([module.weight, mean.expand(size - old, -1)])
            weight[list(new_ids)] = mean
            module.weight = nn.Parameter(weight)
        self.model.embed_tokens.num_embeddings = self.lm_head.out_features = size
        self.tie_weights()

    def stored_state(self) -> dict[str, torch.Tensor]:
        """The weights as a file holds them: tied ones once."""
        state = self.state_dict()
        if self.config.tie_word_embeddings:
            del state["lm_head.weight"]
        return state

    def save_pretrained(self, path: str | Path, tokenizer=None, state_dict: dict | None = None) -> None:
        """Write a Hugging Face model directory, with the tokenizer's files if it is given. state_dict is an
        earlier stored_state; without it the weights are as they are now."""
        weights = self.stored_state() if state_dict is None else state_dict
        write_model(path, config=self.config.to_hf(), weights=weights, tokenizer=tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        shard: Callable[["GPTModel"], None] | None = None,
        place: Callable = lambda tensor, parameter: tensor,
    ) -> "GPTModel":
        """Open a Llama- or Qwen3-shaped model, in fp32: a directory, or a hub id, which is downloaded.

        `shard` splits the model over ranks before it has weights; `place` then makes a rank's part of each.
        Raises InputError for what is missing, damaged, or of a kind this model cannot represent.
        """
        path = model_directory(name)
        config = GPTConfig.from_hf(read_json(path / "config.json"))
        check_size(path, asdict(config))
        with torch.device("meta"):  # no memory yet
            model = cls(config)
        expected = model.stored_state()
        if shard:
            shard(model)
        model.init_rope()
        load_weights(model, path, expected=expected, place=place)
        model.tie_weights()
        return model

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 256,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] | None = None,
        stop_ids: Sequence[int] = (),
    ) -> Iterator[list[int | None]]:
        """Continue prompts, of any lengths, together; yields for each step a list with each prompt's next id.

        A prompt is done once it has yielded one of stop_ids or its context is full; then it gives None. The
        generator ends when all are done, or after max_new_tokens. temperature 0 is greedy. A seed, or one for
        each prompt, makes sampling repeatable; the i-th prompt with seed s draws as it would alone with seed
        s + i. Raises InputError for an empty prompt and for one that leaves no room in the context.

            ids = [id for (id,) in model.generate([prompt], stop_ids=[2])]

        Under autocast products are in its type. Until the generator ends it holds a cache of 2 G D numbers
        for each layer, prompt and position, and copies of matrices: of all under autocast and on an x86 CPU,
        else of q, k, v, gate and up.
        """
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        return generate(self, prompts, max_new_tokens, **options, seed=seed, stop_ids=stop_ids)
