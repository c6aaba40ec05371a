"""clip.py: parity with OpenAI's and Hugging Face's towers (golden files), every kind of picture."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clip import SIZES, Clip, ClipConfig, open_image, pad_to_square, preprocess, to_rgb

GOLDEN = Path(__file__).parent / "golden"
TOWER = ClipConfig(16, 3, 2, 64, 4, 12)  # as in make_golden.py
TINY = SIZES["tiny"]
LEVEL = 1 / 255  # one step of an 8-bit picture, in pixel units 0..1


def from_openai(weights: dict[str, torch.Tensor], config: ClipConfig) -> Clip:
    """Our tower with the weights of OpenAI's VisionTransformer."""
    state = {"class_token": weights["class_embedding"],
             "positions": weights["positional_embedding"],
             "patches.weight": weights["conv1.weight"]}
    names = {"ln_1.": "attention_norm.", "attn.in_proj_": "qkv.", "attn.out_proj.": "out.",
             "ln_2.": "ffn_norm.", "mlp.c_fc.": "up.", "mlp.c_proj.": "down."}
    for part in ("weight", "bias"):
        state[f"pre_norm.{part}"] = weights[f"ln_pre.{part}"]
        for i in range(config.layers):
            for theirs, ours in names.items():
                source = f"transformer.resblocks.{i}.{theirs}{part}"
                state[f"layers.{i}.{ours}{part}"] = weights[source]
    model = Clip(config)
    model.load_state_dict(state, strict=True)
    return model.eval()


def golden_tower(**changes) -> tuple[Clip, dict[str, torch.Tensor]]:
    """The golden tower, with options changed, and the peers' results."""
    tensors = load_file(GOLDEN / "clip.safetensors")
    weights = {name.removeprefix("weight."): t
               for name, t in tensors.items() if name.startswith("weight.")}
    return from_openai(weights, dataclasses.replace(TOWER, **changes)), tensors


def pixels(image: Image.Image, config: ClipConfig) -> torch.Tensor:
    """`preprocess` before normalisation: (3, S, S) in 0..1."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean, config.std))
    return preprocess(image, config) * std + mean


@torch.no_grad()
@pytest.mark.parametrize(
    ("peer", "changes"),
    [
        ("openai.-2", {}),
        ("openai.-1", {"feature_layer": -1}),
        ("quick_gelu.-2", {}),
        ("gelu.-2", {"activation": "gelu"}),
    ],
)
def test_features_equal_the_peers(peer, changes):
    """fp32 features within 1e-4 of OpenAI's own code (two layers) and of CLIPVisionModel."""
    model, wanted = golden_tower(**changes)
    features = model(wanted["images"])
    assert features.shape == (2, 9, 16)
    torch.testing.assert_close(features, wanted[peer], atol=1e-4, rtol=0)
    assert wanted[peer].std() > 0.1  # far from constant: the comparison means something
    assert not torch.allclose(wanted["gelu.-2"], wanted["quick_gelu.-2"], atol=1e-3)


@torch.no_grad()
def test_without_pre_norm_the_embedding_goes_straight_in():
    """pre_norm off (DINOv2): patches, class token and positions go straight to the first layer."""
    model = Clip(dataclasses.replace(TINY, pre_norm=False, activation="gelu")).eval()
    assert not [name for name in model.state_dict() if "pre_norm" in name]
    images = torch.randn(2, 3, 18, 18)
    cut = images.unfold(2, 6, 6).unfold(3, 6, 6)  # (N, 3, rows, columns, p, p)
    cut = cut.permute(0, 2, 3, 1, 4, 5).reshape(2, 9, 108)  # (N, P, 3 p p)
    patches = cut @ model.patches.weight.reshape(40, 108).T
    x = torch.cat((model.class_token.expand(2, 1, -1), patches), 1) + model.positions
    for layer in model.layers[:2]:
        x = layer(x)
    torch.testing.assert_close(model(images), x[:, 1:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_norm_of_the_features():
    """feature_norm: DINOv2's last norm, with its weights, behind whatever layer is read."""
    plain = Clip(TINY).eval()
    model = Clip(dataclasses.replace(TINY, feature_norm=True)).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    weight, bias = (p.normal_() for p in model.feature_norm.parameters())
    images = torch.randn(2, 3, 18, 18)
    wanted = torch.nn.functional.layer_norm(plain(images), (40,), weight, bias, TINY.norm_eps)
    assert torch.equal(model(images), wanted)


@torch.no_grad()
def test_layers_above_the_features_do_not_matter():
    """With feature_layer -2 the last layer may hold anything."""
    model, images = Clip(TINY).eval(), torch.randn(1, 3, 18, 18)
    before = model(images)
    for parameter in model.layers[-1].parameters():
        parameter.fill_(float("nan"))
    assert torch.equal(model(images), before)


def test_named_sizes():
    """Tokens of each named size; parameters of ViT-L/14-336, last norm and projection aside."""
    assert {name: config.patches for name, config in SIZES.items()} == {
        "ViT-L/14-336": 576, "ViT-L/14": 256, "ViT-B/16": 196, "ViT-B/32": 49, "tiny": 9}
    with torch.device("meta"):
        model = Clip(SIZES["ViT-L/14-336"])
    assert sum(p.numel() for p in model.parameters()) == 303_505_408


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_px": 20}, "image_px = 20 is not a multiple of patch = 6"),
        ({"heads": 0}, "heads = 0: must be 1 or more"),
        ({"patch": 0}, "patch = 0: must be 1 or more"),
        ({"heads": 3}, "width = 40 is not a multiple of heads = 3"),
        ({"activation": "relu"}, "'relu': quick_gelu or gelu"),
        ({"aspect": "stretch"}, "'stretch': pad or crop"),
        ({"feature_layer": 2}, "feature_layer = 2: -3 to -1"),
        ({"feature_layer": -4}, "feature_layer = -4"),
    ],
)
def test_impossible_config_raises(change, message):
    """A config that contradicts itself names the key, the value and what is accepted."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def golden_pixels() -> dict[str, torch.Tensor]:
    """What CLIPImageProcessor made: "aspect name box" -> (3, 40, 40) uint8."""
    return load_file(GOLDEN / "pixels.safetensors")


@pytest.mark.parametrize("key", golden_pixels())
def test_pixels_equal_clip_image_processor(key):
    """Photographs (portrait, landscape, tiny, thin, exact size), cropped, or padded as LLaVA does.

    Against CLIPImageProcessor: within 1/255 everywhere and 1e-3 on average, in pixel units 0..1
    before normalisation.
    """
    aspect, name, *_, box = key.split()
    image = Image.open(GOLDEN / f"{name}.png").crop([int(n) for n in box.split(",")])
    wanted = golden_pixels()[key].float() / 255
    got = pixels(image, dataclasses.replace(TINY, patch=4, image_px=40, aspect=aspect))
    assert (got - wanted).abs().max() <= LEVEL + 1e-5
    assert (got - wanted).abs().mean() <= 1e-3


@pytest.mark.parametrize("side", [224, 336])
@pytest.mark.parametrize("size", [(512, 600), (600, 401), (333, 512), (900, 61)])
def test_pixels_equal_clip_image_processor_at_full_size(side, size):
    """The same bar at CLIP's own resolutions, where the peer and its photograph are installed."""
    module = "transformers.models.clip.image_processing_pil_clip"
    peer = pytest.importorskip(module, reason="requirements-dev.txt")
    data = pytest.importorskip("matplotlib", reason="has the photograph").get_data_path()
    image = Image.open(Path(data) / "sample_data" / "grace_hopper.jpg").resize(size)
    processor = peer.CLIPImageProcessorPil(size={"shortest_edge": side},
                                           crop_size={"height": side, "width": side})
    for aspect in ("crop", "pad"):
        config = dataclasses.replace(TINY, patch=14, image_px=side, aspect=aspect)
        shown = image if aspect == "crop" else pad_to_square(image, (122, 116, 104))
        wanted = torch.from_numpy(processor(shown, return_tensors="np")["pixel_values"][0])
        std = torch.tensor(config.std)[:, None, None]
        difference = ((preprocess(image, config) - wanted) * std).abs()
        assert difference.max() <= LEVEL + 1e-5 and difference.mean() <= 1e-3


def test_pad_to_square_literal():
    """Centred, the odd pixel to the right and below, the border in the colour."""
    wide = np.array(pad_to_square(Image.new("RGB", (4, 1), "red"), (1, 2, 3)))
    assert wide.shape == (4, 4, 3)
    assert (wide[1] == (255, 0, 0)).all() and (wide[[0, 2, 3]] == (1, 2, 3)).all()
    tall = np.array(pad_to_square(Image.new("RGB", (2, 5), "red"), (1, 2, 3)))
    assert (tall[:, 1:3] == (255, 0, 0)).all() and (tall[:, [0, 3, 4]] == (1, 2, 3)).all()


@pytest.mark.parametrize("aspect", ["pad", "crop"])
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 5000), (5000, 1), (2, 3), (1, 300_000), (17, 18), (1000, 3)])
def test_any_size_gives_one_shape(size, aspect):
    """However small or long, a picture becomes finite (3, S, S), and quickly."""
    image = Image.new("RGB", size, (10, 200, 30))
    out = preprocess(image, dataclasses.replace(TINY, aspect=aspect))
    assert out.shape == (3, 18, 18) and out.dtype == torch.float32 and out.isfinite().all()


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "PA", "YCbCr", "HSV"])
def test_any_mode_becomes_rgb(mode):
    """Whatever the mode, black stays black and white stays white."""
    for grey, white in ((0, False), (255, True)):
        image = Image.new("L", (2, 3), grey)
        if mode in ("I;16", "I"):
            dtype = np.uint16 if mode == "I;16" else np.int32
            image = Image.fromarray(np.full((3, 2), 65535 * white, dtype))
        elif mode == "PA":
            image = image.convert("P").convert("PA")
        else:
            image = Image.merge("RGB", [image] * 3).convert(mode)
        assert image.mode == mode
        rgb = to_rgb(image)
        assert rgb.mode == "RGB" and rgb.size == (2, 3)
        assert np.array(rgb).tolist() == [[[grey] * 3] * 2] * 3


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


def test_sixteen_bit_file_keeps_its_greys(tmp_path):
    """A 16-bit grey PNG is scaled to 8 bits, not cut off."""
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / "grey.png")
    assert np.array(open_image(tmp_path / "grey.png"))[0, :, 0].tolist() == [0, 100, 255]


def test_exif_rotation_is_applied(tmp_path):
    """A picture marked as turned by 90 degrees comes upright."""
    image = Image.new("RGB", (32, 16), "red")
    image.paste("blue", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    image.save(tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)
    upright = open_image(tmp_path / "turned.jpg")
    assert upright.size == (16, 32)
    assert upright.getpixel((8, 4))[2] > 200  # blue above
    assert upright.getpixel((8, 28))[0] > 200  # red below


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "bmp"])
def test_file_cut_short_raises(tmp_path, kind):
    """Half a picture is a ValueError that names the file, never a grey half."""
    path = tmp_path / f"cut.{kind}"
    Image.open(GOLDEN / "cat.png").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"cut.{kind}"):
        open_image(path)


def test_what_is_no_picture_raises(tmp_path):
    """Text, an empty file, a folder: ValueError with the path; no file: FileNotFoundError."""
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "letters.ppm").write_text("P3 1 1 255 1 2 x")  # Pillow: ValueError without a path
    for name in ("text.jpg", "empty.png", "letters.ppm", "."):
        with pytest.raises(ValueError, match="not a readable picture"):
            open_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="none.png: no such file"):
        open_image(tmp_path / "none.png")


def test_absurdly_large_picture_raises(tmp_path):
    """A header that promises more pixels than are read is refused before anything is decoded."""
    Image.new("1", (20_000, 9_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="bomb.png"):
        open_image(tmp_path / "bomb.png")
