"""Foreign checkpoint files: their tensors by name, read a slab at a time.

A `Source` knows the names and shapes of all its tensors at once and reads rows of one when asked,
so that converting a checkpoint of any size needs memory for one tensor. No code in a file runs:
torch's files are opened with `weights_only`; of a TorchScript archive only the tensors are taken,
and one that would run code as it is read is refused.
"""

import importlib
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

SLAB_VALUES = 16 * 2**20  # 64 MB in fp32


class Named(dict):
    """A dict whose missing keys are the user's error, not ours: ValueError with the name."""

    def __missing__(self, name: str):
        raise ValueError(f"{name} is missing")


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
                         "pip install -r requirements-demo.txt") from None


class Source:
    """Tensors by name: their shapes are known at once, values are read when asked for."""

    shapes: Named

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor in its own dtype, perhaps a view of a mapped file: copy and let go."""
        raise NotImplementedError

    def read_into(self, name: str, out: Tensor) -> Tensor:
        """Copy a tensor to `out` by slabs: memory holds only one, pages of mappings included."""
        step = max(1, SLAB_VALUES * len(out) // out.numel())
        for start in range(0, len(out), step):
            stop = min(start + step, len(out))
            out[start:stop] = self.rows(name, start, stop)
        return out

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A whole tensor."""
        return self.read_into(name, torch.empty(self.shapes[name], dtype=dtype))


class Memory(Source):
    """Tensors that are in memory already: small checkpoints."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors
        self.shapes = Named((name, tuple(tensor.shape)) for name, tensor in tensors.items())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name][start:stop]


def torch_file(path: Path) -> dict[str, Tensor]:
    """The state dict of a file of torch.save, mapped and not read; no code in it runs."""
    with reading(path):
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path}: holds something else than names and tensors")
    return tensors


def file_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a file of safetensors or torch.save."""
    if path.suffix != ".safetensors":
        return {name: tuple(tensor.shape) for name, tensor in torch_file(path).items()}
    with reading(path), safe_open(path, "pt") as file:
        names = file.keys()
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}


def file_rows(path: Path, name: str, start: int, stop: int) -> Tensor:
    """Rows of a tensor in a file opened for this alone: pages read count as ours while mapped."""
    if path.suffix != ".safetensors":
        return torch_file(path)[name][start:stop]
    with reading(path), safe_open(path, "pt") as file:
        return file.get_slice(name)[start:stop]


class Files(Source):
    """Hugging Face's layout: each tensor whole, in one of several files."""

    def __init__(self, paths: list[Path]):
        self.shapes, self.home = Named(), {}
        for path in paths:
            for name, shape in file_shapes(path).items():
                if name in self.home:
                    raise ValueError(f"{path}: {name} is already in {self.home[name].name}")
                self.shapes[name], self.home[name] = shape, path

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return file_rows(self.home[name], name, start, stop)


class MetaShards(Source):
    """Meta's layout: each file holds a slice of every matrix, by output row or by input column."""

    BY_ROW = ("wq", "wk", "wv", "w1", "w3", "output")
    BY_COLUMN = ("wo", "w2")

    def __init__(self, paths: list[Path]):
        self.paths, self.piece = paths, Named(file_shapes(paths[0]))
        for path in paths[1:]:
            shapes = file_shapes(path)
            for name in {**self.piece, **shapes}:
                here, there = self.piece.get(name), shapes.get(name)
                if here != there:
                    raise ValueError(f"{name} is {here} in {paths[0]}, {there} in {path}")
        self.dims = {name: self.split_dim(name) for name in self.piece}
        self.shapes = Named()
        for name, shape in self.piece.items():
            split = self.dims[name]
            sizes = (n * len(paths) if d == split else n for d, n in enumerate(shape))
            self.shapes[name] = tuple(sizes)

    def split_dim(self, name: str) -> int | None:
        """The dimension along which files hold slices; None where each holds the whole."""
        matrix = name.removesuffix(".weight").split(".")[-1]
        if matrix == "tok_embeddings":  # split in width by Llama 1 and 2, in vocabulary by Llama 3
            return 0 if self.piece[name][1:] == self.piece["norm.weight"] else 1
        return 0 if matrix in self.BY_ROW else 1 if matrix in self.BY_COLUMN else None

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if self.dims[name] is None:
            return file_rows(self.paths[0], name, start, stop)
        if self.dims[name] == 1:
            return torch.cat([file_rows(path, name, start, stop) for path in self.paths], 1)
        size = self.piece[name][0]
        homes = range(start // size, (stop - 1) // size + 1)
        return torch.cat([file_rows(self.paths[n], name, max(0, start - n * size),
                                    min(size, stop - n * size)) for n in homes])


class Gguf(Source):
    """llama.cpp's format: the package gguf finds tensors and dequantises, a slab at a time."""

    TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")

    def __init__(self, path: Path):
        gguf = optional("gguf")
        self.path, self.dequantize = path, gguf.dequantize
        with reading(path):
            reader = gguf.GGUFReader(path)
        self.fields = Named((name, field.contents()) for name, field in reader.fields.items())
        self.shapes, self.tensors = Named(), {}
        for t in reader.tensors:
            if t.tensor_type.name not in self.TYPES:
                raise ValueError(f"{path}: {t.name} is {t.tensor_type.name}; "
                                 f"types that are read: {', '.join(self.TYPES)}")
            self.shapes[t.name] = tuple(int(n) for n in reversed(t.shape))
            self.tensors[t.name] = t.tensor_type, int(t.data_offset), int(t.n_bytes)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        kind, offset, size = self.tensors[name]
        stride = size // self.shapes[name][0]  # bytes a row
        offset += start * stride
        raw = np.fromfile(self.path, np.uint8, (stop - start) * stride, offset=offset)
        values = self.dequantize(raw.reshape(-1, stride), kind)
        return torch.from_numpy(values).view(-1, *self.shapes[name][1:])


def open_onnx(path: Path) -> Memory:
    """The weights in an ONNX graph; those that the exporter left nameless are named by their user:

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
    return Memory(tensors)


def open_pt(path: Path) -> Source:
    """A `.pt` file: a TorchScript archive, of which only the tensors are taken, or a state dict."""
    with reading(path), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        scripted = any(name.endswith("/constants.pkl") for name in names)
        # To read it, torch runs the code that some classes bring to unpack themselves.
        active = any(name.endswith("model.json") or "__setstate__" in name
                     or "code/" in name and b"__setstate__" in archive.read(name) for name in names)
    if not scripted:
        return Files([path])
    if active:
        raise ValueError(f"{path}: to read it would run code that it brings along: refused")
    with reading(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated
        return Memory(torch.jit.load(path, map_location="cpu").state_dict())
