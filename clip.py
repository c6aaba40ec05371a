"""CLIP's vision transformer: patch features of one layer, and how a picture becomes its input.

Where it differs from OpenAI's CLIP:
- Only what IAA reads is here. There is no text tower and no pooled output. Layers above
  `feature_layer` do not run.
- DINOv2 runs in the same tower. Conversion folds its LayerScale into the projections and its patch
  bias into the positions, and turns `pre_norm` off. Its final norm applies to the features of the
  chosen layer (`feature_norm`), as in its authors' `get_intermediate_layers`.

Letters: N images, S image side in pixels, p patch side, P patches, D width, H heads, E head size.
Sources: openai/CLIP, LLaVA-1.5 (arXiv 2310.03744: last layer but one, patches only, pad to square).
"""

import io
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base as Tag
from torch import Tensor, nn

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# None of these decoders starts a program (EPS's starts Ghostscript). "JPEG" opens MPO too.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
# A small file may claim more than memory holds. These limits keep a picture to about 1 GB and 10 s.
MAX_PIXELS = 70_000_000  # A3 at 600 dpi
LESS_PIXELS = {"JPEG2000": 25_000_000, "WEBP": 35_000_000, "AVIF": 35_000_000}  # costly decoders
MAX_BYTES, MAX_SCANS = 2**29, 100  # per file; per JPEG, whose scans may each decode all pixels
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is higher, and warns in lines of its own
MAX_SIDE = 8192  # pixels; a longer picture is scaled to this before it is padded to a square


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of a vision tower, and its input's format. Raises ValueError where they conflict."""

    width: int
    layers: int
    heads: int
    ffn: int
    patch: int  # pixels
    image_px: int
    activation: str = "quick_gelu"  # or "gelu"
    norm_eps: float = 1e-5
    pre_norm: bool = True  # a norm before the first layer
    feature_norm: bool = False  # a norm after the feature layer, as DINOv2 has
    feature_layer: int = -2  # -1 the last layer's output, -2 the one before
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    aspect: str = "pad"  # to a square; nothing else is implemented

    def __post_init__(self):
        for name in ("width", "layers", "heads", "ffn", "patch", "image_px"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value!r}: must be a whole number, 1 or more")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(map(math.isfinite, self.mean)):
            raise ValueError(f"mean, std = {self.mean}, {self.std}: three finite numbers each")
        if not all(0 < value < math.inf for value in (*self.std, self.norm_eps)):
            raise ValueError(f"std = {self.std}, norm_eps = {self.norm_eps}: above 0, and finite")
        for whole, part in (("image_px", "patch"), ("width", "heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{whole} = {getattr(self, whole)} is not a multiple of "
                                 f"{part} = {getattr(self, part)}")
        if self.activation not in ("quick_gelu", "gelu"):
            raise ValueError(f"activation = {self.activation!r}: quick_gelu or gelu")
        if self.aspect != "pad":
            raise ValueError(f"aspect = {self.aspect!r}: pad, as LLaVA and IAA do")
        if not -self.layers <= self.feature_layer <= -1:
            raise ValueError(f"feature_layer = {self.feature_layer}: -{self.layers} to -1")

    @property
    def patches(self) -> int:
        """P: the tokens of an image."""
        return (self.image_px // self.patch) ** 2


SIZES = {
    "ViT-L/14-336": ClipConfig(1024, 24, 16, 4096, 14, 336),
    "ViT-L/14": ClipConfig(1024, 24, 16, 4096, 14, 224),
}


class ClipLayer(nn.Module):
    """Pre-norm transformer layer: full self-attention and a two-layer MLP."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.heads = config.heads
        self.quick = config.activation == "quick_gelu"
        self.attention_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.ffn_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.up = nn.Linear(config.width, config.ffn)
        self.down = nn.Linear(config.ffn, config.width)

    def attention(self, x: Tensor) -> Tensor:
        """(N, 1 + P, D) -> (N, 1 + P, D), each position sees all."""
        images, tokens, width = x.shape
        qkv = self.qkv(x).view(images, tokens, 3, self.heads, -1)  # (N, 1 + P, 3, H, E)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, H, 1 + P, E) each
        y = F.scaled_dot_product_attention(q, k, v)  # no mask: attention is not causal
        return self.out(y.transpose(1, 2).reshape(images, tokens, width))

    def feed_forward(self, x: Tensor) -> Tensor:
        """The MLP; OpenAI's weights were trained with x * sigmoid(1.702 x) in place of GELU."""
        x = self.up(x)
        x = x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x)
        return self.down(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1 + P, D) -> (N, 1 + P, D)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Clip(nn.Module):
    """The tower: pixels -> patch features of `feature_layer`."""

    config_class = ClipConfig

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config, width = config, config.width
        self.patches = nn.Conv2d(3, width, config.patch, config.patch, bias=False)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(1 + config.patches, width))
        self.pre_norm = nn.LayerNorm(width, config.norm_eps) if config.pre_norm else nn.Identity()
        self.layers = nn.ModuleList(ClipLayer(config) for _ in range(config.layers))
        norm = nn.LayerNorm(width, config.norm_eps) if config.feature_norm else nn.Identity()
        self.feature_norm = norm
        self.sha256, self.stored_dtype = "", None  # of the weights' files, set by `load_frozen`

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) from `preprocess` -> (N, P, D): the patches, without the class token."""
        x = self.patches(images.to(self.positions.dtype))  # (N, D, S/p, S/p)
        x = x.flatten(2).transpose(1, 2)  # (N, P, D)
        # The class token is dropped at the end, but patches attend to it in every layer.
        class_token = self.class_token.expand(len(x), 1, -1)  # (N, 1, D)
        x = torch.cat((class_token, x), 1) + self.positions  # (N, 1 + P, D)
        x = self.pre_norm(x)
        # feature_layer -1 runs all layers, -2 all but the last.
        for layer in self.layers[: self.config.layers + self.config.feature_layer + 1]:
            x = layer(x)
        return self.feature_norm(x[:, 1:])


def open_image(path, size: tuple[int, int] | None = None) -> Image.Image:
    """The picture at `path`, upright, in RGB. size: the (width, height) that its boxes assume.

    FileNotFoundError; ValueError if it is unreadable, or not of that size. Any other OSError: the
    disk or the memory failed, and the picture may be sound.
    """
    if not os.path.isfile(path):  # a pipe would block whoever reads it
        raise FileNotFoundError(f"{path}: no such file, or no regular one")
    if os.path.getsize(path) > MAX_BYTES:
        raise ValueError(f"{path}: over {MAX_BYTES} bytes")
    content = Path(path).read_bytes()  # read first: errors below are then the picture's
    try:
        with Image.open(io.BytesIO(pixel_chunks(content)), formats=FORMATS) as file:
            limit, tags = LESS_PIXELS.get(file.format, MAX_PIXELS), getattr(file, "tag_v2", {})
            if file.width * file.height > limit or file.height > 10**6:  # 20 bytes a row
                raise ValueError(f"{file.width} x {file.height}: over {limit} pixels or 10^6 rows")
            tile = tags.get(Tag.TileWidth, 0) * tags.get(Tag.TileLength, 0)  # of a TIFF
            scans = file.format in ("JPEG", "MPO") and content.count(b"\xff\xda\0")
            if tile > MAX_PIXELS // 4 or scans > MAX_SCANS:
                raise ValueError("its tiles are too large, or its scans too many")
            image = to_rgb(file)
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not a readable picture ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
            raise OSError(f"{path}: not enough memory to decode it") from None
        raise ValueError(f"{path}: not a readable picture ({error})") from None
    if size not in (None, image.size):
        raise ValueError(f"{path}: upright it has {image.width} x {image.height} pixels, "
                         f"its boxes are for {size[0]} x {size[1]}")
    return image


def pixel_chunks(content: bytes) -> bytes:
    """A PNG without the chunks that its pixels do not need, some of which may be broken.

    The EXIF chunk, which has the orientation, stays. Other files are returned as they are.
    """
    if not content.startswith(b"\x89PNG"):
        return content
    chunks, place = [content[:8]], 8
    while place + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, place)
        chunk = content[place : place + length + 12]
        # A critical chunk's name begins with a capital. Pillow refuses a wrong checksum of EXIF.
        if name[:1].isupper() or name == b"tRNS" or (
                name == b"eXIf" and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])):
            chunks.append(chunk)
        place += length + 12
    return b"".join(chunks)


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB, without metadata, from any mode; transparency is white. Turns `image` too."""
    image.load()
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # broken metadata raises many kinds; the pixels may be sound
        pass
    if image.mode[0] in "IF":
        image = to_grey(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        clear = ImageChops.invert(image.getchannel("A"))
        image = image.convert("RGB")
        image.paste("white", mask=clear)
    if image.mode != "RGB" or image.info:
        image = image.convert("RGB")  # always a copy
        image.info.clear()  # an orientation left behind would turn it a second time
    return image


def to_grey(image: Image.Image) -> Image.Image:
    """8-bit grey from 16-bit, 32-bit or float grey.

    16 bits: 0 becomes black and 65535 white (in a TIFF of 12 bits 4095). Other modes: the
    picture's maximum becomes white, and 0 becomes black, or the minimum where that is below 0.
    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF; Pillow ignores the two that are read below
    white = 4095 if tags.get(Tag.BitsPerSample) == (12,) else 65535
    # Pillow scales a PPM to 16 bits, in the 32-bit mode "I". It finds no extrema in mode "I;16B".
    is_16_bit = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")
    low, high = (0, white) if is_16_bit else image.getextrema()
    if low < 0 and tags.get(Tag.SampleFormat) == (1,):  # Pillow reads unsigned values as signed
        raise ValueError("unsigned 32-bit values from 2^31 on are not supported")
    low = min(0, low)
    grey = Image.new("L", image.size)
    for top in range(0, image.height, 256):  # in strips, as floats take four times the memory
        strip = image.crop((0, top, image.width, min(top + 256, image.height)))
        values = np.asarray(strip, np.float32)
        if not np.isfinite(values).all():
            raise ValueError("its values are not finite")
        levels = (values - low) * (255 / (high - low or 1))
        if tags.get(Tag.PhotometricInterpretation) == 0:  # 0 is white
            levels = 255 - levels
        grey.paste(Image.fromarray(levels.clip(0, 255).round().astype(np.uint8)), (0, top))
    return grey


def preprocess(image: Image.Image, config: ClipConfig) -> Tensor:
    """A picture as the tower takes it: (3, S, S) fp32, normalised by `mean` and `std`.

    The picture is padded to a square with the mean colour, so nothing is cut off. Boxes are
    fractions of that square (data.py). Source: LLaVA's process_images, CLIPImageProcessor.
    """
    image, side = to_rgb(image), config.image_px
    if max(image.size) > MAX_SIDE:  # else a long strip becomes a huge square
        scale = MAX_SIDE / max(image.size)
        image = image.resize([max(1, round(scale * length)) for length in image.size],
                             Image.Resampling.BICUBIC, reducing_gap=2)
    # Centred on a square of its longer side, as by LLaVA's expand2square.
    square = Image.new("RGB", (max(image.size),) * 2, tuple(int(255 * m) for m in config.mean))
    square.paste(image, tuple((square.width - length) // 2 for length in image.size))
    square = square.resize((side, side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255  # (3, S, S)
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean, config.std))  # (3, 1, 1)
    return (pixels - mean) / std
