"""Generation: the model reads the prompts once; then a plain step makes one token after another.

The step works on tensors that stay where they are: a cache, the newest ids, and the slot they go to. On CUDA,
in a chat or a compiled model, a step is recorded as a graph after it ran once. Each further token is then one
launch and one read.

B rows, T tokens in the longest prompt, S slots in the cache, N new tokens, C hidden size, H query heads, G
key/value heads, D dimensions of a head, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule

from common import InputError
from sharding import whole

SAMPLING = {"temperature": 0.7, "top_k": 50, "top_p": 0.95}  # of an answer, in chat.py and in evaluations


class KVCache:
    """Keys and values of every layer, (B, G, S, D) each, allocated once.

    All prompts end in slot T - 1; a shorter one starts later. So a step writes the same slot in each row.
    """

    def __init__(self, config, lengths: Sequence[int], slots: int, *, dtype: torch.dtype, device):
        T = max(lengths)
        shape = (len(lengths), config.num_key_value_heads, slots, config.head_dim)
        both = (config.num_hidden_layers, 2, *shape)
        self.layers = [layer.unbind() for layer in torch.zeros(both, dtype=dtype, device=device)]
        self.starts = T - torch.tensor(lengths, device=device)  # (B,)
        self.order = (torch.arange(T, device=device) - self.starts[:, None]) % T  # (B, T)

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keep a layer's k and v (B, G, T, D) of prompts that are padded on the right."""
        order = self.order[:, None, :, None].expand_as(k)
        for kept, new in zip(self.layers[layer], (k, v)):
            kept[:, :, : k.size(2)] = new.gather(2, order)


INT8_FACTOR = torch.bfloat16  # what is multiplied by int8 weights; in fp32 torch's kernel is far slower


@dataclass(slots=True)
class Int8Matrix:
    """A matrix (out, in) whose rows are rounded to 255 steps, from minus to plus their largest number."""

    numbers: torch.Tensor  # (out, in), from -127 to 127
    scales: torch.Tensor  # (out,), what a step is worth

    @classmethod
    def rounded(cls, matrix: torch.Tensor, dtype: torch.dtype) -> "Int8Matrix":
        """The nearest one, with scales in the type of the factors."""
        scales = (matrix.float().abs().amax(1) / 127).clamp(min=1e-12).to(dtype)
        steps = (matrix / scales.float()[:, None]).round().clamp(-127, 127)
        return cls(steps.to(torch.int8), scales)


@dataclass(slots=True)
class LayerWeights:
    """A block's weights as a step multiplies by them: what is multiplied by the same factor is one matrix."""

    attention_norm: torch.Tensor  # (C,)
    qkv: torch.Tensor | Int8Matrix  # ((H + 2G) D, C)
    qk_norm: torch.Tensor | None  # (H + G, D)
    o: torch.Tensor | Int8Matrix  # (C, H D)
    mlp_norm: torch.Tensor  # (C,)
    gate_up: torch.Tensor | Int8Matrix  # (2 I, C) for a SwiGLU of width I
    down: torch.Tensor | Int8Matrix  # (C, I)


def product(x: torch.Tensor, matrix: torch.Tensor | Int8Matrix) -> torch.Tensor:
    """x (B, in) times the transpose of a matrix (out, in)."""
    if isinstance(matrix, Int8Matrix):
        return torch._weight_int8pack_mm(x.to(matrix.scales.dtype), matrix.numbers, matrix.scales).to(x.dtype)
    if matrix.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], "")
    return F.linear(x, matrix)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether matrices can be packed for oneDNN here, in this type. This is known to work on x86 only."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    bf16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bf16 or dtype == torch.float32


def joined(*weights: torch.Tensor, dtype: torch.dtype, packed: bool, int8: bool) -> torch.Tensor | Int8Matrix:
    """Matrices (out, in) concatenated by rows. A single one in the right type and layout is not copied.

    `packed`: in oneDNN's own layout, in which few rows take about half of the time. `int8`: a quarter of
    the bytes. torch's int8 kernel needs both sizes to be multiples of 64; other matrices are not rounded.
    """
    matrices = [whole(weight) for weight in weights]
    matrix = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
    if int8 and not matrix.size(0) % 64 and not matrix.size(1) % 64:
        return Int8Matrix.rounded(matrix, INT8_FACTOR)
    matrix = matrix.to(dtype)
    return torch.ops.mkldnn._reorder_linear_weight(matrix, 16) if packed else matrix


def layer_weights(block: nn.Module, **layout) -> LayerWeights:
    """Of a TransformerBlock; layout as in joined."""
    attention, mlp = block.self_attn, block.mlp
    H, G = (proj.out_features // attention.head_dim for proj in (attention.q_proj, attention.k_proj))
    norms = None
    if isinstance(attention.q_norm, nn.RMSNorm):
        q_norm, k_norm = whole(attention.q_norm.weight), whole(attention.k_norm.weight)
        norms = torch.cat((q_norm.expand(H, -1), k_norm.expand(G, -1)))
    return LayerWeights(
        attention_norm=whole(block.input_layernorm.weight),
        qkv=joined(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight, **layout),
        qk_norm=norms,
        o=joined(attention.o_proj.weight, **layout),
        mlp_norm=whole(block.post_attention_layernorm.weight),
        gate_up=joined(mlp.gate_proj.weight, mlp.up_proj.weight, **layout),
        down=joined(mlp.down_proj.weight, **layout),
    )


def step_weights(model: nn.Module, **layout) -> tuple[list[LayerWeights], torch.Tensor | Int8Matrix]:
    """The weights of all layers and of the head; layout as in joined. model.kept_weights keeps them if it
    is a dict; else they are made anew."""
    kept, key = model.kept_weights, tuple(layout.items())
    if kept is not None and key in kept:
        return kept[key]
    made = (
        [layer_weights(block, **layout) for block in model.model.layers],
        joined(model.lm_head.weight, **layout),
    )
    if kept is not None:
        kept[key] = made
    return made


class Decoding:
    """B rows that are continued, token by token; `ids` (B,) are the newest.

    Products and the cache are in autocast's type, or without autocast in the weights' type. Besides the cache
    it holds copies of matrices: of all if they are packed or that type is not the weights', else of the
    joined ones. If the model is split over ranks, each rank has a whole copy of all matrices, and the ranks
    make and read it together.
    """

    def __init__(self, model: nn.Module, lengths: Sequence[int], steps: int, *, choose: Callable):
        c, device = model.config, model.lm_head.weight.device
        self.model, self.choose, self.T = model, choose, max(lengths)
        self.on_cuda, self.ragged = device.type == "cuda", min(lengths) < self.T
        autocast = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type) if autocast else model.lm_head.weight.dtype
        self.S = -(-(self.T + steps) // 8) * 8  # CUDA wants a mask's rows aligned
        self.cache = KVCache(c, lengths, self.S, dtype=self.dtype, device=device)
        if isinstance(model, FSDPModule):
            model.reshard()  # what an evaluation left whole is in bf16
        on_cpu = device.type == "cpu"
        layout = {"dtype": self.dtype, "packed": on_cpu and can_pack(self.dtype)}
        layout["int8"] = model.int8_decoding and on_cpu
        self.layers, self.head = step_weights(model, **layout)
        self.table, self.norm = whole(model.model.embed_tokens.weight), whole(model.model.norm.weight)
        self.sin = model.rope_sin.clone()
        self.sin[:, : c.head_dim // 2].neg_()  # rotate_half(x) sin = roll(x) (-sin, sin)
        # What a step changes.
        self.ids = torch.zeros(len(lengths), dtype=torch.long, device=device)
        self.slot = torch.full((1,), self.T - 1, device=device)  # the last one that is filled
        slots = torch.arange(self.S, device=device)
        unseen = (slots < self.cache.starts[:, None]) | (slots >= self.T)  # (B, S)
        mask = torch.zeros(unseen.shape, dtype=self.dtype, device=device).masked_fill_(unseen, -torch.inf)
        self.mask = mask[:, None, None]  # (B, 1, 1, S), added to the scores
        self.filled, self.replay = self.T, None

    def read(self, prompts: torch.Tensor) -> None:
        """Fill the cache with prompts (B, T), padded on the right, and choose the next ids."""
        with torch.compiler.set_stance("force_eager"):  # shapes change with every prompt
            logits = self.model.next_logits(prompts, self.T - 1 - self.cache.starts, cache=self.cache)
        self.ids.copy_(self.choose(logits, self.slot - (self.T - 1)))

    def step(self, window: int) -> None:
        """Put `ids` into the next slot and choose those after them, with a cache of `window` slots."""
        c = self.model.config
        B, H, G, D = len(self.ids), c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.slot.add_(1)
        self.mask.index_fill_(3, self.slot, 0.0)
        mask = self.mask[..., :window] if self.ragged or self.on_cuda else None
        positions = (self.slot - self.cache.starts).clamp(max=c.max_position_embeddings - 1)
        cos, sin = self.model.rope_cos[positions][:, None], self.sin[positions][:, None]  # (B, 1, D)
        x = self.table[self.ids]  # (B, C)
        for layer, (keys, values) in zip(self.layers, self.cache.layers):
            y = F.rms_norm(x, x.shape[-1:], layer.attention_norm, c.rms_norm_eps).to(self.dtype)
            y = product(y, layer.qkv).view(B, H + 2 * G, D)
            qk = y[:, : H + G]
            if layer.qk_norm is not None:
                qk = F.rms_norm(qk.to(cos.dtype), (D,), eps=c.rms_norm_eps) * layer.qk_norm
            qk = (qk * cos + qk.roll(D // 2, -1) * sin).to(self.dtype)
            keys.index_copy_(2, self.slot, qk[:, H:, None])
            values.index_copy_(2, self.slot, y[:, H + G :, None])
            # The queries of a group are rows of one product: no key is repeated.
            q, k, v = qk[:, :H].view(B, G, H // G, D), keys[:, :, :window], values[:, :, :window]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + product(y.reshape(B, -1), layer.o)
            y = F.rms_norm(x, x.shape[-1:], layer.mlp_norm, c.rms_norm_eps).to(self.dtype)
            gate, up = product(y, layer.gate_up).chunk(2, -1)
            x = x + product(F.silu(gate) * up, layer.down)
        y = F.rms_norm(x, x.shape[-1:], self.norm, c.rms_norm_eps).to(self.dtype)
        self.ids.copy_(self.choose(product(y, self.head), self.slot - (self.T - 1)))

    def advance(self) -> None:
        """One step. On CUDA it always reads the whole cache, masked, so that one graph serves all."""
        self.filled += 1
        if self.replay is not None:
            self.replay()
            return
        self.step(self.S if self.on_cuda else self.filled)
        if self.on_cuda and self.model.graph_decoding:
            self.replay = recorded(lambda: self.step(self.S))


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of the step: what it returns does all its work again, in one launch.

    The step has to have run once, so that its kernels are loaded. While it is recorded this thread may not
    wait for the GPU; another one may, to save a checkpoint.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | Sequence[int] | None,
    stop_ids: Sequence[int],
) -> Iterator[list[int | None]]:
    """See GPTModel.generate."""
    check_sampling(temperature, top_k, top_p)
    limit, device = model.config.max_position_embeddings, model.lm_head.weight.device
    ids, lengths = pad_prompts(prompts, limit)
    rooms = [limit + 1 - length for length in lengths]  # the last id fills no position any more
    steps = min(max_new_tokens, max(rooms))
    noise = uniform_noise(seed, len(prompts), steps).to(device)

    def choose(logits: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        drawn = noise.index_select(1, number)[:, 0]
        return sample(logits, drawn, temperature=temperature, top_k=top_k, top_p=top_p)

    decoding, done = Decoding(model, lengths, steps, choose=choose), [False] * len(prompts)
    for number in range(1, steps + 1):
        if number == 1:
            decoding.read(ids.to(device))
        else:
            decoding.advance()
        new = decoding.ids.tolist()  # here Python waits for the device
        yield [None if over else id for id, over in zip(new, done)]
        done = [over or id in stop_ids or number == room for id, over, room in zip(new, done, rooms)]
        if all(done):
            return


# -- sampling ------------------------------------------------------------------------------------------------


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise InputError for numbers that describe no sampling."""
    if not 0 <= temperature < float("inf") or 0 < temperature < 1e-6:
        raise InputError(f"temperature is {temperature}; expected 0 (the likeliest token) or at least 1e-6")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise InputError(f"top_k is {top_k}, top_p {top_p}; expected at least 1, and above 0 up to 1")


def pad_prompts(prompts: Sequence[Sequence[int]], limit: int) -> tuple[torch.Tensor, list[int]]:
    """Prompts as ids (B, T), padded on the right, and their lengths.

    Raises InputError for one that is empty or fills the context.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1 or max(lengths) >= limit:
        raise InputError(
            f"prompts of {lengths} tokens: each must have from 1 to {limit - 1}, to leave room in the "
            f"context of {limit}"
        )
    ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
    for row, prompt in zip(ids, prompts):
        row[: len(prompt)] = torch.as_tensor(prompt)
    return ids, lengths


def uniform_noise(seed: int | Sequence[int] | None, rows: int, steps: int) -> torch.Tensor:
    """Numbers (rows, steps) in [0, 1), one for each token. With an integer seed row i has the
    seed `seed + i`, with several its own. So its numbers depend on no other row. None: random."""
    if seed is None:
        return torch.rand(rows, steps)
    seeds = [seed + row for row in range(rows)] if isinstance(seed, int) else seed
    generators = [torch.Generator().manual_seed(own) for own in seeds]
    return torch.stack([torch.rand(steps, generator=generator) for generator in generators])


def sample(
    logits: torch.Tensor,
    noise: torch.Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> torch.Tensor:
    """Ids (B,) drawn from logits (B, V): of the top_k likeliest, the fewest that reach probability top_p.

    noise (B,), uniform in [0, 1), decides: a row's id is where the sum of the probabilities so far passes it.
    """
    if temperature == 0:
        return logits.max(-1).indices  # the first of equal ones; argmax is slower in bf16 on a CPU
    V = logits.size(-1)
    logits, order = (logits.float() / temperature).topk(min(top_k or V, V))  # falling
    probs = logits.softmax(-1)
    if top_p is not None:
        probs[probs.cumsum(-1) - probs >= top_p] = 0  # the more likely ones reach top_p without this one
    sums = probs.cumsum(-1)
    passed = (sums <= noise[:, None] * sums[:, -1:]).sum(-1)
    last = ((probs > 0).sum(-1) - 1).clamp(min=0)  # where rounding would lead past it; of NaN none is > 0
    return order.gather(1, torch.minimum(passed, last)[:, None])[:, 0]
