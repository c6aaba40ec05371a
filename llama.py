"""Llama 3 in one file. The only trace of IAA is one explicit hook after each layer.

Where it differs from a textbook Llama:
- The query, key and value projections are one matrix, and so are SwiGLU's gate and up projections.
  One large matrix product is faster than several small ones.
- `after_layer(i, x_in, x_out)`, the hook, runs after layer i. Its result is the input of layer
  i + 1. IAA puts its insertion layers there (iaa.py).
- The caller creates the KV cache and passes it in. Each layer takes the next slot of the cache, in
  the order in which layers run.
- A linear layer casts its weight to the dtype of its input. A trained weight stays in fp32: it is
  its own master weight, and the model still computes in bf16. A frozen bf16 weight needs no cast.
  ZeRO 1 to 3 keep the master weights elsewhere (training/zero.py).

Letters: B batch, T tokens, S tokens so far (cache included), D width, H query heads, K key/value
heads, G = H / K, E head size, F feed-forward width, V vocabulary, L layers.
Sources: Llama 3 (meta-llama/llama3), Llama 3.1's rotary scaling (meta-llama/llama-models),
GQA (arXiv 2305.13245).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

AfterLayer = Callable[[int, Tensor, Tensor], Tensor]
Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 slows down the low rotary frequencies for long contexts. Lengths in tokens."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama. Raises ValueError where they contradict each other."""

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
    tied: bool = False  # the LM head is the embedding

    def __post_init__(self):
        parts = [self] if self.rope_scaling is None else [self, self.rope_scaling]
        for size, value in [(f, getattr(part, f.name)) for part in parts for f in fields(part)]:
            if size.type is int and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{size.name} = {value!r}: must be a whole number, 1 or more")
            if isinstance(value, float) and not 0 < value < math.inf:  # NaN is refused too
                raise ValueError(f"{size.name} = {value!r}: must be above 0, and finite")
        if self.heads % self.kv_heads or self.head_size % 2:
            raise ValueError(f"heads = {self.heads} must be a multiple of kv_heads = "
                             f"{self.kv_heads}, and head_size = {self.head_size} an even number")


SIZES = {
    "3-8B": LlamaConfig(128256, 4096, 32, 32, 8, 128, 14336, 8192),
    "3.1-8B": LlamaConfig(128256, 4096, 32, 32, 8, 128, 14336, 131072, 5e5, RopeScaling(8.0)),
    "3.2-1B": LlamaConfig(128256, 2048, 16, 32, 8, 64, 8192, 131072,
                          rope_scaling=RopeScaling(32.0), tied=True),
    "3.2-3B": LlamaConfig(128256, 3072, 28, 24, 8, 128, 8192, 131072,
                          rope_scaling=RopeScaling(32.0), tied=True),
}


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input. No bias unless asked for."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__(inputs, outputs, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs), in x's dtype."""
        # A trained weight is its own fp32 master: the backward pass of the cast returns fp32.
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def new_embedding(vocab_size: int, width: int) -> nn.Embedding:
    """A random embedding (V, D)."""
    weight = torch.empty(vocab_size, width)
    if not weight.is_meta:  # `normal_` on meta imports torch's compiler, which takes a second
        weight.normal_()
    return nn.Embedding.from_pretrained(weight, freeze=False)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension. The norm is in fp32, the result in x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight.to(x.dtype)


@functools.cache  # once per device, not once per pass
def rope_frequencies(config: LlamaConfig, device: torch.device | str = "cpu") -> Tensor:
    """The angle by which each pair of dimensions turns per token, in radians: (E/2,) fp32.

    Llama 3.1's scaling counts the turns that a pair makes within the original context. Below
    low_freq_factor turns a frequency is divided by `factor`. Above high_freq_factor turns it is
    kept. In between, the two results are blended.
    """
    exponents = torch.arange(0, config.head_size, 2, device="cpu").float() / config.head_size
    freqs = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return freqs.to(device)
    turns = scaling.original_context * freqs / (2 * math.pi)  # turns within that context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return (keep * freqs + (1 - keep) * freqs / scaling.factor).to(device)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn each pair of dimensions (j, j + E/2) of x (B, heads, T, E) by its position's angle."""
    cos, signed_sin = rope  # (B, 1, T, E) each
    # The roll swaps the two halves of E. signed_sin carries the minus sign of the first half.
    return x * cos + x.roll(x.shape[-1] // 2, -1) * signed_sin


def attention_mask(
    tokens: int, past: int = 0, segments: Tensor | None = None, device=None
) -> Tensor | None:
    """Which token sees which: bool (B or 1, 1, T, S) with S = past + T, True = visible.

    None means plain causal attention, and is returned only where past = 0 or T = 1.
    segments (B, S) covers the cached tokens too. In causal order, a token sees segment 0 and its
    own segment. Padding is segment -1. A pad sees itself, so its softmax is never 0 / 0.
    """
    if segments is None and (past == 0 or tokens == 1):  # one new token sees the cache
        return None
    columns = torch.arange(past + tokens, device=device)  # (S,)
    mask = (columns <= columns[past:, None])[None]  # (1, T, S)
    if segments is not None:
        seen, own = segments[:, None], segments[:, past:, None]  # (B, 1, S), (B, T, 1)
        mask = mask & ((seen == 0) | (seen == own))
    return mask[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention: q (B, H, T, E), k and v (B, K, S, E) -> (B, H, T, E).

    mask: from `attention_mask`.
    """
    batch, heads, tokens, size = q.shape
    if tokens == 1:  # decoding: the G queries that share a key head become rows of one product
        q = q.reshape(batch, k.shape[1], -1, size)  # (B, K, G, E)
        return F.scaled_dot_product_attention(q, k, v, mask).reshape(batch, heads, 1, size)
    dtype = q.dtype
    if q.device.type == "cpu":  # bf16 attention takes up to twice as long, backward included
        q, k, v = q.float(), k.float(), v.float()
    # Fused GPU kernels support no GQA with a mask or in fp32. Repeat k and v there: the fallback
    # kernel would hold all B x H x T x S scores.
    if mask is not None or (q.dtype == torch.float32 and q.device.type != "cpu"):
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))  # (B, H, S, E)
    # is_causal in place of a mask: fused kernels then skip the half that is not visible.
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None,
                                          enable_gqa=k.shape[1] < heads).to(dtype)


class KVCache:
    """Keys and values of all layers, frozen and inserted, in one tensor (slots, 2, B, K, T_max, E).

    Each layer that runs takes the next slot, so no code computes a slot's index. With insertion
    layers after frozen layers 0 and 4, slots 0, 1, 2, ... belong to frozen 0, inserted 0, frozen 1,
    frozen 2, frozen 3, frozen 4, inserted 1, frozen 5, ...
    `Llama.forward` calls `advance` at the end of a pass. A cache belongs to one workflow.
    """

    def __init__(
        self, config: LlamaConfig, slots: int, batch: int, length: int, dtype=None, device=None
    ):
        shape = (slots, 2, batch, config.kv_heads, length, config.head_size)
        try:  # uninitialised: only stored tokens are ever read
            self.data = torch.empty(shape, dtype=dtype, device=device)
        except RuntimeError:  # torch raises no MemoryError where the CPU's is full
            raise MemoryError(f"no memory for a KV cache of {batch} x {length} tokens") from None
        self.length = 0  # tokens stored
        self.slot = 0  # next slot of the running pass

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, E) in the next slot. Return all S so far: views (B, K, S, E)."""
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

    def advance(self, tokens: int) -> None:
        """End a forward pass of `tokens` tokens. Raises ValueError where a slot was not filled."""
        if self.slot != len(self.data):
            raise ValueError(f"the cache has {len(self.data)} slots, but {self.slot} layers ran: "
                             "was it made for another workflow?")
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
        self, x: Tensor, rope: Rope, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, -1, self.head_size)  # (B, T, H + 2K, E)
        qk, v = qkv.transpose(1, 2).split((self.heads + self.kv_heads, self.kv_heads), 1)
        q, k = rotate(qk, rope).split((self.heads, self.kv_heads), 1)  # (B, H, T, E), (B, K, T, E)
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, K, S, E); keys are cached after rotation
        y = attend(q, k, v, mask)  # (B, H, T, E)
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); gate and up are the two halves of one matrix."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_up = Linear(config.width, 2 * config.ffn)
        self.down = Linear(config.ffn, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        gate, up = self.gate_up(x).chunk(2, -1)  # (B, T, F) each
        return self.down(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    """One layer of Llama; IAA's insertion layers are of this same class."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn = FeedForward(config)
        self.recompute = False  # activation checkpointing: keep only the input for backward

    def forward(
        self, x: Tensor, rope: Rope, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D); takes the cache's next slot where a cache is given."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.block, x, rope, mask, cache, use_reentrant=False)
        return self.block(x, rope, mask, cache)

    def block(self, x: Tensor, rope: Rope, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """The two residual blocks: attention, then feed-forward."""
        x = x + self.attention(self.attention_norm(x), rope, mask, cache)
        return x + self.ffn(self.ffn_norm(x))


def set_recompute(model: nn.Module, on: bool) -> None:
    """Turn activation checkpointing on or off, in all decoder layers, frozen and inserted."""
    for layer in model.modules():
        if isinstance(layer, DecoderLayer):
            layer.recompute = on


class Llama(nn.Module):
    """Embedding, decoder layers, final norm and LM head.

    A pass calls `embedding(tokens)`, `rope(positions)`, `forward` and `logits`.
    """

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embedding = new_embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tied else Linear(config.width, config.vocab_size)
        self.sha256, self.stored_dtype = "", None  # of the weights' files, set by `load_frozen`

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen weights, and so of the residual stream."""
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def rope(self, positions: Tensor, dtype: torch.dtype) -> Rope:
        """cos and signed sin of positions (B, T): two (B, 1, T, E) in `dtype`, computed in fp32."""
        # fp32, as bf16 has no 257: positions above 256 would collide.
        freqs = rope_frequencies(self.config, positions.device)  # (E/2,)
        angles = positions[:, None, :, None].float() * freqs  # (B, 1, T, E/2)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)

    def forward(
        self,
        x: Tensor,  # (B, T, D) embedded tokens
        rope: Rope,  # from `rope(positions)`
        mask: Tensor | None = None,  # from `attention_mask`; None: T = 1, or an empty cache
        cache: KVCache | None = None,  # advanced by T at the end
        after_layer: AfterLayer | None = None,
    ) -> Tensor:  # (B, T, D), before the final norm
        """Run the layers. With a hook, layer i + 1 takes `after_layer(i, x_in, x_out)`."""
        for i, layer in enumerate(self.layers):
            x_in, x = x, layer(x, rope, mask, cache)  # structure a (iaa.py) reads x_in
            if after_layer is not None:
                x = after_layer(i, x_in, x)
        if cache is not None:
            cache.advance(x.shape[1])
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and LM head: (..., D) -> (..., V), in x's dtype."""
        return self.lm_head(self.norm(x))

    def lm_head(self, x: Tensor) -> Tensor:
        """The LM head alone; a tied one is the embedding: (..., D) -> (..., V), in x's dtype."""
        return F.linear(x, self.embedding.weight.to(x.dtype)) if self.head is None else self.head(x)
