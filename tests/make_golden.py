"""Golden values for the parity tests, from the peers themselves: `python tests/make_golden.py`.

Needs requirements/dev.txt and the two packages named at its head; the files it writes into
tests/golden are committed, so the tests need neither. Models are tiny and random, from a fixed
seed, with weights large enough that a wrong formula shows. Photographs: tests/golden/README.md.
"""

import runpy
from importlib.metadata import distribution
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

GOLDEN = Path(__file__).parent / "golden"
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}
PADDING = 7  # columns of padding on the left of the second row
PREFIX = 17  # tokens run before the cached steps
SIDE = 40  # pixels: the golden pictures' side


def randomise(model: nn.Module, seed: int) -> None:
    """Fill every parameter from N(0, 0.2), norms' weights around 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.data.copy_(values + (1 if "norm" in name and name.endswith("weight") else 0))


@torch.no_grad()
def llama(name: str, tied: bool, rope: dict, seed: int) -> None:
    """Logits of a whole batch, of the same left-padded, and of token after token with a cache."""
    config = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=26, head_dim=10, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256,
        rope_parameters={"rope_theta": 100.0, **rope}, rms_norm_eps=1e-5,
        tie_word_embeddings=tied, attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    randomise(model, seed)
    tokens = torch.randint(0, 61, (2, 23), generator=torch.Generator().manual_seed(seed))
    visible = torch.ones_like(tokens)
    visible[1, :PADDING] = 0
    positions = (visible.cumsum(-1) - 1).clamp(min=0)
    full = model(tokens).logits
    padded = model(tokens, attention_mask=visible, position_ids=positions).logits
    state = model(tokens[:, :PREFIX], use_cache=True)
    cached = []
    for t in range(PREFIX, tokens.shape[1]):
        state = model(tokens[:, t : t + 1], past_key_values=state.past_key_values, use_cache=True)
        cached.append(state.logits)
    weights = {f"weight.{name}": tensor.clone() for name, tensor in model.state_dict().items()
               if not (tied and name == "lm_head.weight")}
    results = {"tokens": tokens, "full": full, "padded": padded, "cached": torch.cat(cached, 1)}
    save_file({**weights, **results}, GOLDEN / f"llama_{name}.safetensors")


@torch.no_grad()
def clip(seed: int) -> None:
    """Patch features of the last layers by OpenAI's own code; also with GELU for its own."""
    width, heads, layers, patch, side = 16, 2, 3, 4, 12
    # The module alone: its package needs torchvision.
    code = runpy.run_path(str(distribution("clip-anytorch").locate_file("clip/model.py")))
    tower = code["VisionTransformer"](side, patch, width, layers, heads, 8).eval()
    randomise(tower, seed)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))
    seen = []
    for block in tower.transformer.resblocks:
        block.register_forward_hook(
            lambda _, __, y: seen.append(y.permute(1, 0, 2)[:, 1:].contiguous()))
    tower(images)
    for block in tower.transformer.resblocks:
        block.mlp.gelu = nn.GELU()
    tower(images)
    weights = {f"weight.{name}": tensor.clone() for name, tensor in tower.state_dict().items()}
    results = {"images": images, "quick_gelu.-1": seen[2], "quick_gelu.-2": seen[1],
               "gelu.-2": seen[4]}
    save_file({**weights, **results}, GOLDEN / "clip.safetensors")


@torch.no_grad()
def llava(seed: int) -> None:
    """A LLaVA folder in bf16; logits of rows with a picture, with none, and with two, one last."""
    config = LlavaConfig(
        text_config={
            "model_type": "llama", "vocab_size": 704, "hidden_size": 24, "intermediate_size": 26,
            "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
            "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 100.0, **SCALING}},
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 32,
            "num_hidden_layers": 3, "image_size": 12, "patch_size": 4},
        image_token_index=700, attn_implementation="eager")
    model = LlavaForConditionalGeneration(config).eval()
    randomise(model, seed)
    for parameter in model.parameters():
        parameter.data = parameter.bfloat16().float()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(6, 700, (2, 14), generator=generator)
    images, words = torch.randn(2, 3, 12, 12, generator=generator), tokens[:1].clone()
    tokens[0, 2:11], tokens[1, 5:14] = 700, 700
    pair = tokens.reshape(1, -1)  # a picture near the start, a picture at the end
    seen, read, both = (model(*inputs).logits for inputs in (
        (tokens, images), (words,), (pair, images)))
    save_file({"images": images, "tokens": tokens, "words": words, "seen": seen, "read": read,
               "both": both}, GOLDEN / "llava.safetensors")
    model.bfloat16().save_pretrained(GOLDEN / "llava")  # the rotary table is rounded too, so last


def pixels() -> None:
    """What CLIPImageProcessor makes of the photographs and odd cut-outs, padded to squares."""
    hopper = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    cat = distribution("scikit-image").locate_file("skimage/data/chelsea.png")
    pictures = {}
    for name, path, size in (("hopper", hopper, (97, 113)), ("cat", cat, (131, 83))):
        picture = Image.open(path).convert("RGB").resize(size, Image.Resampling.LANCZOS)
        picture.save(GOLDEN / f"{name}.png", optimize=True)
        pictures[name] = picture
    cuts = {"hopper": None, "hopper 7x5": (40, 30, 47, 35), "hopper 3x113": (50, 0, 53, 113),
            "cat": None, "cat 1x1": (60, 40, 61, 41), "cat 131x9": (0, 40, 131, 49),
            "cat 40x40": (9, 7, 49, 47)}
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE},
                                      crop_size={"height": SIDE, "width": SIDE})
    colour = tuple(int(255 * m) for m in processor.image_mean)
    mean, std = (np.array(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    out = {}
    for name, box in cuts.items():
        picture = pictures[name.split()[0]]
        picture = picture if box is None else picture.crop(box)
        side = max(picture.size)
        square = Image.new("RGB", (side, side), colour)  # LLaVA's expand2square
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        values = processor(square, return_tensors="np")["pixel_values"][0]
        key = f"{name} {','.join(map(str, box or (0, 0, *picture.size)))}"
        out[key] = torch.from_numpy(((values * std + mean) * 255).round().astype(np.uint8))
    save_file(out, GOLDEN / "pixels.safetensors")


def main() -> None:
    """Write every golden file."""
    GOLDEN.mkdir(exist_ok=True)
    llama("gqa", False, {"rope_type": "default"}, 1)
    llama("tied_scaled", True, SCALING, 2)
    clip(3)
    llava(4)
    pixels()


if __name__ == "__main__":
    main()
