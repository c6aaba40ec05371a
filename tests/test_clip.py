"""clip.py: parity with OpenAI's tower (golden files), every kind of picture."""

import dataclasses
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLIP
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from clip import Clip, ClipConfig, open_image, preprocess, to_rgb

GOLDEN = Path(__file__).parent / "golden"
TOWER = ClipConfig(16, 3, 2, 64, 4, 12)  # as in make_golden.py
OPENAI = {"weight.": "", "class_embedding": "class_token", "positional_embedding": "positions",
          "conv1": "patches", "ln_pre": "pre_norm", "transformer.resblocks": "layers",
          "ln_1": "attention_norm", "attn.in_proj_": "qkv.", "attn.out_proj": "out",
          "ln_2": "ffn_norm", "mlp.c_fc": "up", "mlp.c_proj": "down"}
LEVEL = 1 / 255  # one step of an 8-bit picture, in pixel units 0..1
PIXELS = load_file(GOLDEN / "pixels.safetensors")  # "name box" -> (3, 40, 40) uint8


def golden_tower(**changes) -> tuple[Clip, dict[str, Tensor]]:
    """Our tower with the weights of OpenAI's, options changed, and the peers' results."""
    tensors = load_file(GOLDEN / "clip.safetensors")
    model = Clip(dataclasses.replace(TOWER, **changes)).eval()
    state = {}
    for name, tensor in tensors.items():
        for theirs, ours in OPENAI.items():
            name = name.replace(theirs, ours)
        state |= {name: tensor} if name in model.state_dict() else {}
    model.load_state_dict(state)
    return model, tensors


@torch.no_grad()
@pytest.mark.parametrize(("peer", "changes"), [
    ("quick_gelu.-2", {}), ("quick_gelu.-1", {"feature_layer": -1}),
    ("gelu.-2", {"activation": "gelu"})])
def test_features_equal_the_peers(peer, changes):
    """fp32 features within 1e-4 of OpenAI's own code, of two layers and with both activations."""
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


@pytest.mark.parametrize("key", PIXELS)
def test_pixels_equal_clip_image_processor(key):
    """Photographs, padded as LLaVA does: within 1/255 everywhere and 1e-3 on average, of 0..1."""
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


def test_sixteen_bits(tmp_path):
    """A 16-bit grey picture is scaled to 8 bits, not cut off."""
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / "grey.png")
    assert np.array(open_image(tmp_path / "grey.png"))[0, :, 0].tolist() == [0, 100, 255]
    grey = np.array([[0, 1000, 257 * 100]], ">u2")  # no white in it
    Image.frombytes("I;16B", (3, 1), grey.tobytes()).save(tmp_path / "grey.tif")
    (tmp_path / "grey.pgm").write_bytes(b"P5 3 1 65535\n" + grey.tobytes())
    for name in ("grey.tif", "grey.pgm"):
        assert np.array(open_image(tmp_path / name))[0, :, 0].tolist() == [0, 4, 100]
    for content, levels in ((tiff(12, 1, b"\xff\xff\xff"), [255, 255]),  # 12 bits; 0 is white
                            (tiff(16, 0, b"\0\0\xff\xff"), [255, 0])):
        (tmp_path / "grey.tif").write_bytes(content)
        assert np.array(open_image(tmp_path / "grey.tif"))[0, :, 0].tolist() == levels


def test_grey_of_any_range(tmp_path):
    """Floats and 32-bit numbers by their own range; what is not finite is refused."""
    path, ramp = tmp_path / "a.tif", np.linspace(0, 1, 256)[None].repeat(2, 0)
    for values, kind in ((ramp, "f4"), (255 * ramp, "f4"), (2 * ramp - 1, "f4"), (ramp - 2, "f4"),
                         (255 * ramp, "i4"), (65535 * ramp, "i4"), (2e9 * ramp, "i4")):
        Image.fromarray(values.round(6).astype(kind)).save(path)
        assert np.array(open_image(path))[1, :, 2].tolist() == [*range(256)]
    for value in (0, -5):  # no range at all: black
        Image.fromarray(np.full((2, 2), value, "i4")).save(path)
        assert not np.array(open_image(path)).any()
    for wrong in (np.nan, np.inf):
        ramp[1, 7] = wrong
        Image.fromarray(ramp.astype("f4")).save(path)
        with pytest.raises(ValueError, match="a.tif: not a readable picture .its values are not"):
            open_image(path)


def exif(*tags: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block: of each tag number, kind, count, value."""
    entries = b"".join(struct.pack("<HHI4s", *values) for values in tags)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


def tiff(bits: int, zero: int, pixels: bytes, **tags: int) -> bytes:
    """A grey TIFF of 2 x 1 pixels."""
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: zero, 273: 0, 277: 1, 278: 1,
            279: len(pixels)} | {int(tag[1:]): value for tag, value in tags.items()}
    tags[273] = 14 + 12 * len(tags)  # the place of the pixels: behind the tags
    return exif(*((tag, 4, 1, struct.pack("<I", value)) for tag, value in tags.items()))[
        6:] + pixels


TURNED = (0x0112, 3, 1, b"\6")  # orientation 6
UPRIGHT, AS_STORED = (16, 32), (32, 16)  # size where the orientation can be read, and where not
BROKEN_METADATA = {
    "garbage": ("jpg", AS_STORED, b"Exif\0\0of no known kind"),
    "cut": ("jpg", AS_STORED, exif(TURNED)[:20]),
    "header twice": ("jpg", UPRIGHT, b"Exif\0\0" + exif(TURNED)),
    "text for a number": ("jpg", UPRIGHT, exif((0x0100, 2, 4, b"abc"), TURNED)),
    "division by zero": ("jpg", UPRIGHT, exif(TURNED, (0x829A, 5, 1, b"\x20")) + bytes(16)),
    "pointer to nowhere": ("jpg", UPRIGHT, exif(TURNED, (0x8825, 4, 1, b"\xff\xff\1"))),
    "orientation is a text": ("jpg", AS_STORED, exif((0x0112, 2, 2, b"6"))),
    "orientation is 9": ("jpg", AS_STORED, exif((0x0112, 3, 1, b"\x09"))),
    "PNG, garbage": ("png", AS_STORED, chunk(b"eXIf", b"junkjunk")),
    "PNG, turned": ("png", UPRIGHT, chunk(b"eXIf", exif(TURNED)[6:])),
    "PNG, bad EXIF checksum": ("png", AS_STORED, chunk(b"eXIf", exif(TURNED)[6:])[:-4] + bytes(4)),
    "PNG, bad checksum": ("png", AS_STORED, chunk(b"tEXt", b"a\0b")[:-4] + bytes(4)),
    "PNG, long text": ("png", AS_STORED, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21)))),
    "PNG, short chunk": ("png", AS_STORED, chunk(b"pHYs", b"\0")),
    "WebP, garbage": ("webp", AS_STORED, b"Exif\0\0junkjunk"),
}


@pytest.mark.parametrize("name", BROKEN_METADATA)
def test_sound_pixels_with_broken_metadata(tmp_path, name):
    """The picture is read, and is upright wherever its orientation can be read."""
    kind, size, metadata = BROKEN_METADATA[name]
    path, image = tmp_path / f"a.{kind}", Image.new("RGB", (32, 16), "red")
    image.paste("blue", (0, 0, 16, 16))  # left, and on top once it is turned clockwise
    image.save(path, **{} if kind == "png" else {"exif": metadata})
    if kind == "png":  # behind the header, and again behind the pixels
        content = path.read_bytes()
        path.write_bytes(content[:33] + metadata + content[33:-12] + metadata + content[-12:])
    opened = open_image(path)
    assert opened.size == size
    assert opened.getpixel((4, 4))[2] > 200 < opened.getpixel((size[0] - 4, size[1] - 4))[0]
    assert to_rgb(opened).size == size  # turned once, not again


def test_an_eps_starts_no_program(tmp_path, monkeypatch):
    """Whatever its name is: Pillow would hand it to Ghostscript."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args: pytest.fail("started"))
    for name in ("a.eps", "a.png"):
        (tmp_path / name).write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
        with pytest.raises(ValueError, match=f"{name}: not a readable picture .JPEG, PNG, WEBP,"):
            open_image(tmp_path / name)


def test_memory_is_bounded_by_what_is_read(tmp_path):
    """A 16-bit PNG takes the memory of its pixels; one of too many is refused at its header."""
    code = ("import resource, sys; sys.path.insert(0, sys.argv[2]); from clip import *; "
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak(); "
            "preprocess(open_image(sys.argv[1]), SIZES['ViT-L/14']); print(peak() - before)")
    for width, said in ((5000, ""), (13_376, "13376 x 13376: over 70000000 pixels")):
        pixels = zlib.compress(bytes(width * (1 + 2 * width)) if not said else b"")
        header = struct.pack(">IIBBBBB", width, width, 16, 0, 0, 0, 0)
        content = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
        command = [sys.executable, "-c", code, tmp_path / "a.png", GOLDEN.parent.parent]
        done = subprocess.run(command, capture_output=True, text=True)
        assert said in done.stderr and int(done.stdout or 0) < 250_000  # KB: 50 MB as stored


def test_broken_pictures_are_one_line(tmp_path):
    """Cut short, no picture, too large to decode, missing: a line that names the file."""
    for kind in ("png", "jpg", "gif", "webp", "bmp"):  # never a grey half
        path = tmp_path / f"cut.{kind}"
        Image.open(GOLDEN / "cat.png").save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "letters.ppm").write_text("P3 1 1 255 1 2 x")  # Pillow: ValueError without a path
    Image.new("1", (20_000, 9_000)).save(tmp_path / "bomb.png")  # refused before it is decoded
    Image.new("1", (1, 1_000_001)).save(tmp_path / "rows.png")  # Pillow's cost of a row is high
    (tmp_path / "unsigned.tif").write_bytes(tiff(32, 1, b"\0\0\0\x80\xff\xff\xff\xff", _339=1))
    (tmp_path / "tile.tif").write_bytes(tiff(8, 1, b"ab", _322=46_336, _323=46_336))
    Image.new("RGB", (99, 99), (255, 218, 0)).save(tmp_path / "yellow.ppm")
    assert open_image(tmp_path / "yellow.ppm").size == (99, 99)  # its pixels are a scan's mark
    (tmp_path / "yellow.ppm").rename(tmp_path / "cut.ppm")
    os.truncate(tmp_path / "cut.ppm", 9999)
    scans = tmp_path / "scans.jpg"
    Image.new("L", (9, 9)).save(scans)
    scans.write_bytes(scans.read_bytes() + b"\xff\xda\0" * 100)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=f"{path.name}: not a readable picture") as error:
            open_image(path)
        assert "\n" not in str(error.value)
    (tmp_path / "sparse.png").touch()
    os.truncate(tmp_path / "sparse.png", 2**40)
    with pytest.raises(ValueError, match="sparse.png: over 536870912 bytes"):
        open_image(tmp_path / "sparse.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("none.png", "folder.png", "pipe.png"):
        with pytest.raises(FileNotFoundError, match=f"{name}: no such file, or no regular one"):
            open_image(tmp_path / name)
