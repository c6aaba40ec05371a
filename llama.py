"""Llama 3 in one file, with one explicit hook after each layer, which is all that it knows of IAA.

How it departs from the textbook:
- Query, key and value weights are one matrix, and so are SwiGLU's gate and up: one read, not three.
- `after_layer(i, x_in, x_out)` runs after layer i and returns what the next layer takes.
- The cache is a value: made by the caller, passed in, filled slot by slot in the order of layers.
- A linear layer casts its weight to its input's dtype: trained weights stay in fp32 (their own
  master copy) while the model computes in bf16, and a frozen bf16 weight is used as it is.

Letters: B batch, T tokens, S tokens so far (cache included), D width, H query heads, K key/value
heads, G = H / K, E head size, F feed-forward width, V vocabulary, L layers.
Sources: Llama 3 (meta-llama/llama3), Llama 3.1's rotary scaling (meta-llama/llama-models),
GQA (arXiv 2305.13245).
"""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lean import SwiGLU, attend_on_cpu

AfterLayer = Callable[[int, Tensor, Tensor], Tensor]
Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of the slow rotary frequencies; lengths in tokens."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama. Raises ValueError where they contradict each other."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    context: int
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied: bool = False  # the head is the embedding

    def __post_init__(self):
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_size",
                     "ffn", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be 1 or more")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads = {self.heads} is not a multiple of "
                             f"kv_heads = {self.kv_heads}")
        if self.head_size % 2:
            raise ValueError(f"head_size = {self.head_size}: rotary positions need an even number")


SIZES = {
    "3-8B": LlamaConfig(128256, 4096, 32, 32, 8, 128, 14336, 8192),
    "3.1-8B": LlamaConfig(128256, 4096, 32, 32, 8, 128, 14336, 131072,
                          rope_scaling=RopeScaling(8.0)),
    "3.2-1B": LlamaConfig(128256, 2048, 16, 32, 8, 64, 8192, 131072,
                          rope_scaling=RopeScaling(32.0), tied=True),
    "3.2-3B": LlamaConfig(128256, 3072, 28, 24, 8, 128, 8192, 131072,
                          rope_scaling=RopeScaling(32.0), tied=True),
    "tiny": LlamaConfig(512, 48, 4, 6, 2, 8, 112, 256),
    "tiny-tied": LlamaConfig(512, 48, 4, 6, 2, 8, 112, 256,
                             rope_scaling=RopeScaling(8.0, original_context=64), tied=True),
}


class Linear(nn.Linear):
    """A linear layer without bias unless asked for, computed in its input's dtype."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__(inputs, outputs, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs), in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def new_embedding(words: int, width: int) -> nn.Embedding:
    """A random `nn.Embedding`; on the meta device nothing is drawn.

    Drawing there would import torch's compiler, 1.2 s of a start, for values that no one reads.
    """
    weight = torch.empty(words, width)
    if not weight.is_meta:
        weight.normal_()
    return nn.Embedding.from_pretrained(weight, freeze=False)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in fp32, returned in x's dtype."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight.to(x.dtype)


@functools.cache  # one copy to the device, not one a pass
def rope_frequencies(config: LlamaConfig, device: torch.device | str = "cpu") -> Tensor:
    """Rotation per token of each pair of dimensions, in radians: (E/2,) fp32, on `device`.

    With Llama 3.1's scaling, waves longer than the original context / low_freq_factor are slowed
    down by `factor`, waves shorter than the original context / high_freq_factor stay, and those
    between are blended.
    """
    exponents = torch.arange(0, config.head_size, 2, device="cpu").float() / config.head_size
    freqs = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return freqs.to(device)
    turns = scaling.original_context * freqs / (2 * math.pi)  # full turns within that context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return (keep * freqs + (1 - keep) * freqs / scaling.factor).to(device)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn each pair (j, j + E/2) of x (B, heads, T, E) by its position's angle."""
    cos, signed_sin = rope  # (B, 1, T, E) each
    return x * cos + x.roll(x.shape[-1] // 2, -1) * signed_sin


def attention_mask(
    tokens: int,
    past: int = 0,
    segments: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor | None:
    """Who sees whom: bool (B or 1, 1, T, S) with S = past + T, True = visible; None: plain causal.

    segments (B, S), the cache's columns included: segment 0 is seen by the whole row, any other by
    itself alone. Padding is a segment, -1, so that it sees itself: a row of a mask that sees
    nothing would have a softmax of 0 / 0, and NaN spreads.
    """
    if segments is None and (past == 0 or tokens == 1):
        return None
    columns = torch.arange(past + tokens, device=device)  # (S,)
    mask = (columns <= columns[past:, None])[None]  # (1, T, S)
    if segments is not None:
        seen, own = segments[:, None], segments[:, past:, None]  # (B, 1, S), (B, T, 1)
        mask = mask & ((seen == 0) | (seen == own))
    return mask[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of grouped heads: q (B, H, T, E), k and v (B, K, S, E) -> (B, H, T, E)."""
    batch, heads, tokens, size = q.shape
    if tokens == 1:  # the G queries of a key head are rows of one product: nothing is repeated
        q = q.reshape(batch, k.shape[1], -1, size)  # (B, K, G, E)
        return F.scaled_dot_product_attention(q, k, v, mask).reshape(batch, heads, 1, size)
    if not q.is_cuda:
        return attend_on_cpu(q, k, v, mask)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    # the fused kernel that takes a mask knows no groups
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))  # (B, H, S, E)
    return F.scaled_dot_product_attention(q, k, v, mask)


class KVCache:
    """Keys and values of all layers, frozen and inserted, in one tensor (slots, 2, B, K, T_max, E).

    Slots are taken in the order in which layers run, so nobody computes an index; `advance` ends a
    forward pass. A cache belongs to the workflow that filled its first slots.
    """

    def __init__(
        self, config: LlamaConfig, slots: int, batch: int, length: int, dtype=None, device=None
    ):
        shape = (slots, 2, batch, config.kv_heads, length, config.head_size)
        self.data = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0  # tokens stored
        self.slot = 0  # next slot of the running pass

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, E) in the next slot; return all S so far, views (B, K, S, E)."""
        end = self.length + k.shape[2]
        slots, room = len(self.data), self.data.shape[4]
        if end > room or self.slot >= slots:
            raise ValueError(f"cache is full: {slots} slots of {room} tokens, "
                             f"asked for slot {self.slot} up to token {end}")
        keys, values = self.data[self.slot]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        self.slot += 1
        return keys[:, :, :end], values[:, :, :end]

    def rows(self, rows: slice) -> "KVCache":
        """Some rows of the cache, sharing its memory, for a pass of their own layers from here."""
        part = copy.copy(self)
        part.data = self.data[:, :, rows]
        return part

    def cut(self, length: int) -> None:
        """Keep the first `length` tokens, and nothing of a pass that was broken off."""
        self.length, self.slot = length, 0

    def reserve(self, length: int, most: int) -> None:
        """Have room for `length` tokens.

        What is stored moves where there is less: then into twice as much, but for at most `most`.
        """
        *outer, room, size = self.data.shape
        if room < length:
            data = self.data.new_empty(*outer, min(2 * length, most) if room else length, size)
            data[..., : self.length, :] = self.data[..., : self.length, :]
            self.data = data

    def advance(self, tokens: int) -> None:
        """Close a forward pass of `tokens` tokens. Raises ValueError where a slot was left out."""
        if self.slot != len(self.data):
            raise ValueError(f"cache has {len(self.data)} slots, {self.slot} layers ran: "
                             "made for another workflow?")
        self.slot = 0
        self.length += tokens


class Attention(nn.Module):
    """Causal grouped-query self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_size = config.heads, config.kv_heads, config.head_size
        self.qkv = Linear(config.width, (config.heads + 2 * config.kv_heads) * config.head_size)
        self.out = Linear(config.heads * config.head_size, config.width)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        mask: Tensor | None,
        cache: KVCache | None,
        last_only: bool = False,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D), or (B, 1, D): only the last token asks, all are seen."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, -1, self.head_size)  # (B, T, H + 2K, E)
        qk, v = qkv.transpose(1, 2).split((self.heads + self.kv_heads, self.kv_heads), 1)
        q, k = rotate(qk, rope).split((self.heads, self.kv_heads), 1)  # (B, H, T, E), (B, K, T, E)
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, K, S, E)
        if last_only:
            q, mask = q[:, :, -1:], None if mask is None else mask[:, :, -1:]
        y = attend(q, k, v, mask)  # (B, H, T or 1, E)
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); gate and up are the two halves of one matrix."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_up = Linear(config.width, 2 * config.ffn)
        self.down = Linear(config.ffn, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        return self.down(SwiGLU.apply(self.gate_up(x)))


class DecoderLayer(nn.Module):
    """One layer of Llama; IAA's insertion layers are of this same class."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn = FeedForward(config)
        self.recompute = False  # activation checkpointing: keep the input, run again in backward

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D), or its last token (B, 1, D): all that a last layer owes."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.block, x, rope, mask, cache, last_only, use_reentrant=False)
        return self.block(x, rope, mask, cache, last_only)

    def block(
        self, x: Tensor, rope: Rope, mask: Tensor | None, cache: KVCache | None, last_only: bool
    ) -> Tensor:
        """The layer itself."""
        y = self.attention(self.attention_norm(x), rope, mask, cache, last_only)
        x = (x[:, -1:] if last_only else x) + y
        return x + self.ffn(self.ffn_norm(x))


def set_recompute(model: nn.Module, on: bool) -> None:
    """Switch activation checkpointing of all decoder layers in `model`, frozen and inserted."""
    for layer in model.modules():
        if isinstance(layer, DecoderLayer):
            layer.recompute = on


class Llama(nn.Module):
    """Embedding, decoder layers, norm and head; a pass is `embedding`, `forward`, `logits`."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embedding = new_embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tied else Linear(config.width, config.vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream."""
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def rope(self, positions: Tensor, dtype: torch.dtype) -> Rope:
        """cos and signed sin of positions (B, T): two (B, 1, T, E) in `dtype`, by way of fp32."""
        freqs = rope_frequencies(self.config, positions.device)  # (E/2,)
        angles = positions[:, None, :, None].float() * freqs  # (B, 1, T, E/2)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)

    def forward(
        self,
        x: Tensor,  # (B, T, D) embedded tokens
        rope: Rope,  # from `rope(positions)`
        mask: Tensor | None = None,  # from `attention_mask`
        cache: KVCache | None = None,  # advanced by T at the end
        after_layer: AfterLayer | None = None,
        last_only: bool = False,  # the last layer need answer for the last token alone
    ) -> Tensor:  # (B, T or 1, D), before the final norm
        """Run the layers; with a hook, `x = after_layer(i, x_in, x_out)` after layer i."""
        tokens = x.shape[1]
        for i, layer in enumerate(self.layers):
            last = last_only and i + 1 == len(self.layers)
            x_in, x = x, layer(x, rope, mask, cache, last)
            if after_layer is not None:
                x = after_layer(i, x_in, x)
        if cache is not None:
            cache.advance(tokens)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and head: (..., D) -> (..., V), in x's dtype."""
        return self.words(self.norm(x))

    def words(self, x: Tensor) -> Tensor:
        """The head alone, which may be the embedding: (..., D) -> (..., V), in x's dtype."""
        return F.linear(x, self.embedding.weight.to(x.dtype)) if self.head is None else self.head(x)
