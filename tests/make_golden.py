"""Golden values for the parity tests, from the peers themselves: `python tests/make_golden.py`.

Needs requirements/dev.txt and the two packages named at its head; the files it writes into
tests/golden are committed, so the tests need neither. Models are tiny and random, from a fixed
seed, with weights large enough that a wrong formula shows. Photographs: tests/golden/README.md.
"""

import importlib.util
from importlib.metadata import distribution
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
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


def openai_clip():
    """The module `clip/model.py` of OpenAI's package, without the package's torchvision."""
    path = distribution("clip-anytorch").locate_file("clip/model.py")
    spec = importlib.util.spec_from_file_location("openai_clip_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def to_huggingface(state: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """OpenAI's names of the vision tower -> Hugging Face's."""
    out = {
        "embeddings.class_embedding": state["class_embedding"],
        "embeddings.patch_embedding.weight": state["conv1.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
    }
    for theirs, ours in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        out |= {f"{ours}.{part}": state[f"{theirs}.{part}"] for part in ("weight", "bias")}
    parts = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
             "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for i in range(sum(name.endswith("attn.in_proj_weight") for name in state)):
        source, target = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for part in ("weight", "bias"):
            q, k, v = state[f"{source}.attn.in_proj_{part}"].split(width)
            for letter, tensor in zip("qkv", (q, k, v), strict=True):
                out[f"{target}.self_attn.{letter}_proj.{part}"] = tensor
            for old, new in parts.items():
                out[f"{target}.{new}.{part}"] = state[f"{source}.{old}.{part}"]
    return out


@torch.no_grad()
def clip(seed: int) -> None:
    """Patch features of each layer: OpenAI's own code, and Hugging Face's with both activations."""
    width, heads, layers, patch, side = 16, 2, 3, 4, 12
    tower = openai_clip().VisionTransformer(side, patch, width, layers, heads, 8).eval()
    randomise(tower, seed)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))
    seen = []
    for block in tower.transformer.resblocks:
        block.register_forward_hook(
            lambda _, __, y: seen.append(y.permute(1, 0, 2)[:, 1:].contiguous()))
    tower(images)
    state = tower.state_dict()
    weights = {f"weight.{name}": tensor.clone() for name, tensor in state.items()}
    results = {"images": images, "openai.-1": seen[-1], "openai.-2": seen[-2]}
    for activation in ("quick_gelu", "gelu"):
        config = CLIPVisionConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=heads, image_size=side, patch_size=patch, hidden_act=activation,
            attn_implementation="eager",
        )
        peer = CLIPVisionModel(config).eval()
        renamed = to_huggingface(state, width)
        if any(name.startswith("vision_model.") for name in peer.state_dict()):
            renamed = {f"vision_model.{name}": tensor for name, tensor in renamed.items()}
        problems = peer.load_state_dict(renamed, strict=False)
        assert not problems.unexpected_keys, problems
        assert all("position_ids" in name for name in problems.missing_keys), problems
        hidden = peer(images, output_hidden_states=True).hidden_states
        results[f"{activation}.-2"] = hidden[-2][:, 1:].contiguous()
    save_file({**weights, **results}, GOLDEN / "clip.safetensors")


def photographs() -> dict[str, Image.Image]:
    """Two photographs, small: a portrait and a landscape."""
    hopper = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    cat = distribution("scikit-image").locate_file("skimage/data/chelsea.png")
    sizes = {"hopper": (hopper, (97, 113)), "cat": (cat, (131, 83))}
    return {name: Image.open(path).convert("RGB").resize(size, Image.Resampling.LANCZOS)
            for name, (path, size) in sizes.items()}


def pixels() -> None:
    """What CLIPImageProcessor makes of the photographs and odd cut-outs, padded to squares."""
    pictures = photographs()
    for name, picture in pictures.items():
        picture.save(GOLDEN / f"{name}.png", optimize=True)
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
    pixels()


if __name__ == "__main__":
    main()
