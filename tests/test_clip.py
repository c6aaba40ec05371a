"""clip.py: parity with OpenAI's and Hugging Face's towers (golden files), every kind of picture."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLIP
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from clip import SIZES, Clip, ClipConfig, open_image, preprocess, to_rgb
from common.files import load_frozen, read_frozen

GOLDEN = Path(__file__).parent / "golden"
TOWER = ClipConfig(16, 3, 2, 64, 4, 12)  # as in make_golden.py
LEVEL = 1 / 255  # one step of an 8-bit picture, in pixel units 0..1
PIXELS = load_file(GOLDEN / "pixels.safetensors")  # "name box" -> (3, 40, 40) uint8


def golden_tower(**changes) -> tuple[Clip, dict[str, Tensor]]:
    """Our tower with the weights of OpenAI's, options changed, and the peers' results."""
    tensors = load_file(GOLDEN / "clip.safetensors")
    peer = {key.removeprefix("weight."): t for key, t in tensors.items() if "weight." in key}
    state = {"class_token": peer["class_embedding"], "positions": peer["positional_embedding"],
             "patches.weight": peer["conv1.weight"]}
    names = {"ln_1.": "attention_norm.", "attn.in_proj_": "qkv.", "attn.out_proj.": "out.",
             "ln_2.": "ffn_norm.", "mlp.c_fc.": "up.", "mlp.c_proj.": "down."}
    for part in ("weight", "bias"):
        state[f"pre_norm.{part}"] = peer[f"ln_pre.{part}"]
        for i in range(TOWER.layers):
            for theirs, ours in names.items():
                source = f"transformer.resblocks.{i}.{theirs}{part}"
                state[f"layers.{i}.{ours}{part}"] = peer[source]
    model = Clip(dataclasses.replace(TOWER, **changes)).eval()
    model.load_state_dict(state)
    return model, tensors


# The tower


@torch.no_grad()
@pytest.mark.parametrize(("peer", "changes"), [
    ("openai.-2", {}), ("openai.-1", {"feature_layer": -1}), ("quick_gelu.-2", {}),
    ("gelu.-2", {"activation": "gelu"})])
def test_features_equal_the_peers(peer, changes):
    """fp32 features within 1e-4 of OpenAI's own code (two layers) and of CLIPVisionModel."""
    model, wanted = golden_tower(**changes)
    features = model(wanted["images"])
    assert features.shape == (2, 9, 16)
    torch.testing.assert_close(features, wanted[peer], atol=1e-4, rtol=0)
    assert wanted[peer].std() > 0.1  # far from constant: the comparison means something
    assert not torch.allclose(wanted["gelu.-2"], wanted["quick_gelu.-2"], atol=1e-3)


@torch.no_grad()
def test_options_of_dinov2():
    """Without pre_norm the embedding goes straight to the first layer; feature_norm ends it."""
    model = Clip(dataclasses.replace(CLIP, pre_norm=False, activation="gelu", feature_norm=True))
    weight, bias = (p.normal_() for p in model.feature_norm.parameters())
    images = torch.randn(2, 3, 18, 18)
    cut = images.unfold(2, 6, 6).unfold(3, 6, 6)  # (N, 3, rows, columns, p, p)
    cut = cut.permute(0, 2, 3, 1, 4, 5).reshape(2, 9, 108)  # (N, P, 3 p p)
    patches = cut @ model.patches.weight.reshape(40, 108).T
    x = torch.cat((model.class_token.expand(2, 1, -1), patches), 1) + model.positions
    for layer in model.layers[:2]:
        x = layer(x)
    wanted = torch.nn.functional.layer_norm(x[:, 1:], (40,), weight, bias, CLIP.norm_eps)
    torch.testing.assert_close(model(images), wanted, atol=1e-5, rtol=1e-5)


def test_named_sizes():
    """Tokens of each named size; parameters of ViT-L/14-336, last norm and projection aside."""
    assert {name: config.patches for name, config in SIZES.items()} == {
        "ViT-L/14-336": 576, "ViT-L/14": 256}
    with torch.device("meta"):
        model = Clip(SIZES["ViT-L/14-336"])
    assert sum(p.numel() for p in model.parameters()) == 303_505_408


@pytest.mark.parametrize(("change", "message"), [
    ({"image_px": 20}, "image_px = 20 is not a multiple of patch = 6"),
    ({"patch": 0}, "patch = 0: must be a whole number, 1 or more"),
    ({"heads": 3}, "width = 40 is not a multiple of heads = 3"),
    ({"activation": "relu"}, "'relu': quick_gelu or gelu"),
    ({"aspect": "crop"}, "'crop': pad"),
    ({"feature_layer": 2}, "feature_layer = 2: -3 to -1"),
    ({"feature_layer": -4}, "feature_layer = -4"),
])
def test_impossible_config_raises(change, message):
    """A config that contradicts itself names the key, the value and what is accepted."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CLIP, **change)


def test_written_and_loaded_again(tmp_path, write_base):
    """Sizes, hash and tensors come back, frozen, in the files' dtype or the one asked for."""
    model = Clip(dataclasses.replace(CLIP, mean=(0.1, 0.2, 0.3)))
    write_base(tmp_path / "vision", model, "cd" * 32)
    assert read_frozen(ClipConfig, tmp_path / "vision") == (model.config, "cd" * 32)
    loaded = load_frozen(Clip, tmp_path / "vision", torch.bfloat16)
    assert loaded.sha256 == "cd" * 32 and loaded.stored_dtype == torch.float32
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    for name, tensor in load_frozen(Clip, tmp_path / "vision").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
        assert torch.equal(tensor.bfloat16(), loaded.state_dict()[name])


# Pictures


@pytest.mark.parametrize("key", PIXELS)
def test_pixels_equal_clip_image_processor(key):
    """Photographs (portrait, landscape, tiny, thin, exact size), padded as LLaVA does.

    Against CLIPImageProcessor: within 1/255 everywhere and 1e-3 on average, in pixel units 0..1
    before normalisation.
    """
    name, *_, box = key.split()
    image = Image.open(GOLDEN / f"{name}.png").crop([int(n) for n in box.split(",")])
    config = dataclasses.replace(CLIP, patch=4, image_px=40)
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean, config.std))
    difference = (preprocess(image, config) * std + mean - PIXELS[key].float() / 255).abs()
    assert difference.max() <= LEVEL + 1e-5 and difference.mean() <= 1e-3


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (2, 3), (1, 300_000)])
def test_any_size_gives_one_shape(size):
    """However small or long, a picture becomes finite (3, S, S), and quickly."""
    out = preprocess(Image.new("RGB", size, (10, 200, 30)), CLIP)
    assert out.shape == (3, 18, 18) and out.dtype == torch.float32 and out.isfinite().all()


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "PA", "YCbCr", "HSV"])
def test_any_mode_becomes_rgb(mode):
    """Whatever the mode, black stays black and white stays white."""
    for grey in (0, 255):
        image = Image.new("L", (2, 3), grey)
        if mode in ("I;16", "I"):
            dtype = np.uint16 if mode == "I;16" else np.int32
            image = Image.fromarray(np.full((3, 2), 257 * grey, dtype))
        elif mode == "PA":
            image = image.convert("P").convert("PA")
        else:
            image = Image.merge("RGB", [image] * 3).convert(mode)
        assert image.mode == mode
        rgb = to_rgb(image)
        assert rgb.mode == "RGB" and np.array(rgb).tolist() == [[[grey] * 3] * 2] * 3


def test_transparency_becomes_white(tmp_path):
    """Clear pixels are white, half-clear ones half-white: RGBA, LA, a palette's clear entry."""
    assert to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("LA", (1, 1), (0, 128))).getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    image = open_image(tmp_path / "p.png")
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 100, 50)]


def test_sixteen_bits_and_exif(tmp_path):
    """A 16-bit grey PNG is scaled to 8 bits, not cut off; a picture marked as turned is upright."""
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / "grey.png")
    assert np.array(open_image(tmp_path / "grey.png"))[0, :, 0].tolist() == [0, 100, 255]
    image = Image.new("RGB", (32, 16), "red")
    image.paste("blue", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    image.save(tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)
    upright = open_image(tmp_path / "turned.jpg")
    assert upright.size == (16, 32)
    assert upright.getpixel((8, 4))[2] > 200 and upright.getpixel((8, 28))[0] > 200  # blue on top


def test_broken_pictures_are_one_line(tmp_path):
    """Cut short, no picture, too large to decode, missing: a line that names the file."""
    for kind in ("png", "jpg", "gif", "webp", "bmp"):  # never a grey half
        path = tmp_path / f"cut.{kind}"
        Image.open(GOLDEN / "cat.png").save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "letters.ppm").write_text("P3 1 1 255 1 2 x")  # Pillow: ValueError without a path
    (tmp_path / "folder.png").mkdir()
    Image.new("1", (20_000, 9_000)).save(tmp_path / "bomb.png")  # refused before it is decoded
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=f"{path.name}: not a readable picture") as error:
            open_image(path)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="none.png: no such file"):
        open_image(tmp_path / "none.png")
