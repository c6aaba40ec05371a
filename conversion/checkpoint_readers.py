"""Foreign checkpoint files as a `Source`: the shapes of all tensors at once, values when asked for.

Files of safetensors and torch are mapped and GGUF tensors are read one at a time, so memory does
not grow with the checkpoint. No code in a file runs: safetensors, GGUF and ONNX hold none, and
torch's files are opened with `weights_only=True`.
"""

import importlib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from common.files import read_json


class Named(dict):
    """A dict whose missing keys are the user's error, not ours: ValueError with the name."""

    def __missing__(self, name: str):
        raise ValueError(f"{name} is missing")


@dataclass
class Source:
    """The tensors of a checkpoint by name; `read` returns one, in the dtype in which it is stored.
    """

    shapes: Named  # name -> tuple of sizes
    read: Callable[[str], Tensor]


def in_memory(tensors: dict[str, Tensor]) -> Source:
    """Tensors that are mapped or in memory already."""
    shapes = Named((name, tuple(tensor.shape)) for name, tensor in tensors.items())
    return Source(shapes, tensors.__getitem__)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a foreign reader raises for a damaged file into one line that names the file.

    It may be anything: a flipped bit in a pickle gave KeyError. So nothing of ours belongs inside.
    """
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: broken, cut short, or no file of its kind ({reason})") from None


def optional(name: str) -> ModuleType:
    """A package that only some formats need. Raises ValueError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"this format is read by the package {name}: "
                         f"pip install {name}") from None


def open_file(path: Path) -> Source:
    """One file of safetensors, or of torch.save (`.bin`, `.pth`)."""
    if path.suffix != ".safetensors":
        with reading(path):
            mapped = zipfile.is_zipfile(path)  # before torch 1.6 it was none: read as a whole
            tensors = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
        if not isinstance(tensors, dict) or not all(isinstance(t, Tensor)
                                                    for t in tensors.values()):
            raise ValueError(f"{path}: holds something else than names and tensors")
        return in_memory(tensors)

    def read(name: str) -> Tensor:
        # Opened for this tensor alone: pages read count as ours for as long as they are mapped.
        with reading(path), safe_open(path, "pt") as file:
            return file.get_tensor(name)

    with reading(path), safe_open(path, "pt") as file:
        names = file.keys()
        shapes = Named((name, tuple(file.get_slice(name).get_shape())) for name in names)
    return Source(shapes, read)


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


def open_hf_files(folder: Path) -> Source:
    """Hugging Face's layout: each tensor whole, in one of several files."""
    shapes, home = Named(), {}
    for path in hf_paths(folder):
        file = open_file(path)
        twice = shapes.keys() & file.shapes.keys()
        if twice:
            raise ValueError(f"{path}: {min(twice)} is in another file too")
        shapes |= file.shapes
        home |= dict.fromkeys(file.shapes, file)
    return Source(shapes, lambda name: home[name].read(name))


def open_meta_files(folder: Path) -> Source:
    """Meta's layout: each file holds a slice of every matrix, by output row or by input column."""
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no consolidated.*.pth in it")
    files = [open_file(path) for path in paths]
    slices = files[0].shapes
    for path, file in zip(paths, files, strict=True):
        odd = [name for name in slices | file.shapes if slices.get(name) != file.shapes.get(name)]
        if odd:
            raise ValueError(f"{path}: {odd[0]} is not of the shape that it has in {paths[0]}")

    def split_dim(name: str) -> int | None:
        """The dimension along which a tensor is cut; None where each file holds the whole."""
        matrix = name.removesuffix(".weight").split(".")[-1]
        if matrix == "tok_embeddings":  # cut in width by Llama 1 and 2, in vocabulary by Llama 3
            return 0 if slices[name][1:] == slices["norm.weight"] else 1
        by_row, by_column = ("wq", "wk", "wv", "w1", "w3", "output"), ("wo", "w2")
        return 0 if matrix in by_row else 1 if matrix in by_column else None

    def shape(name: str) -> tuple[int, ...]:
        cut = split_dim(name)
        return tuple(n * len(files) if d == cut else n for d, n in enumerate(slices[name]))

    def read(name: str) -> Tensor:
        cut = split_dim(name)
        if cut is None:
            return files[0].read(name)
        return torch.cat([file.read(name) for file in files], cut)

    return Source(Named((name, shape(name)) for name in slices), read)


def open_gguf(path: Path) -> tuple[Source, Named]:
    """llama.cpp's format, and its metadata by name. The package gguf dequantises all its types."""
    gguf = optional("gguf")
    with reading(path):
        reader = gguf.GGUFReader(path)
        fields = Named((name, field.contents()) for name, field in reader.fields.items())
    if fields.get("split.count", 1) > 1:
        raise ValueError(f"{path}: one of {fields['split.count']} parts; join them first by "
                         "llama.cpp's llama-gguf-split --merge")
    shapes = Named((t.name, tuple(int(n) for n in reversed(t.shape))) for t in reader.tensors)
    places = {t.name: (t.tensor_type, t.n_bytes, int(t.data_offset)) for t in reader.tensors}

    def read(name: str) -> Tensor:
        kind, size, offset = places[name]
        with reading(path):
            raw = np.fromfile(path, np.uint8, size, offset=offset)
            values = gguf.dequantize(raw.reshape(shapes[name][0], -1), kind)  # fp32
        return torch.from_numpy(values).view(shapes[name])

    return Source(shapes, read), fields


def open_onnx(path: Path) -> Source:
    """The weights in an ONNX graph. Those that the exporter left nameless get their user's name:

    `<module>.weight`, transposed, where that is a matrix product, else `<module>.<operator>`.
    """
    onnx = optional("onnx")
    with reading(path):
        graph, read = onnx.load(path).graph, onnx.numpy_helper.to_array
        tensors = {t.name: torch.from_numpy(read(t).copy()) for t in graph.initializer}
    for node in graph.node:
        for name in node.input:
            if name.startswith("onnx::") and name in tensors:
                module, tensor = ".".join(node.name.strip("/").split("/")[:-1]), tensors.pop(name)
                if node.op_type == "MatMul":
                    tensors[f"{module}.weight"] = tensor.T
                else:
                    tensors[f"{module}.{node.op_type}"] = tensor
    return in_memory(tensors)
