"""Foreign checkpoint files as a `Source`: by name, functions that return tensors.

All files but ONNX are mapped into memory: the system reads a page when a tensor is used and drops
it when memory is short. No code in a file runs: safetensors, GGUF and ONNX hold none, and torch's
files are opened with `weights_only=True`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor


class Named(dict):
    """A dict whose missing keys are the user's error: ValueError with the name."""

    def __missing__(self, name: str):
        raise ValueError(f"{name} is missing")


Source = dict[str, Callable[[], Tensor]]  # name -> function that reads it, in its stored dtype


def in_memory(tensors: dict[str, Tensor]) -> Source:
    """Tensors that are mapped or in memory already."""
    return Named((name, lambda tensor=tensor: tensor) for name, tensor in tensors.items())


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a foreign reader raises for a damaged file into one line that names the file.

    It may be anything: a flipped bit in a pickle gave KeyError. So nothing of ours belongs inside.
    """
    try:
        yield
    except ImportError as error:  # gguf and onnx are not in requirements.txt
        raise ValueError(f"{path}: needs a package: pip install {error.name}") from None
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: broken, cut short, or no file of its kind ({reason})") from None


def open_files(folder: Path, *patterns: str) -> list[dict[str, Tensor]]:
    """Each file of the first pattern that `folder` has: safetensors or torch.save, mapped."""
    paths = next(filter(None, (sorted(folder.glob(pattern)) for pattern in patterns)), [])
    if not paths:
        raise FileNotFoundError(f"{folder}: no {' and no '.join(patterns)} in it")
    files = []
    for path in paths:
        with reading(path):
            file = (load_file(path) if path.suffix == ".safetensors" else
                    torch.load(path, map_location="cpu", mmap=True, weights_only=True))
        if not isinstance(file, dict) or not all(isinstance(t, Tensor) for t in file.values()):
            raise ValueError(f"{path}: holds something else than names and tensors")
        files.append(file)
    return files


def open_hf_files(folder: Path) -> Source:
    """Hugging Face's layout: each tensor whole, in one of several files."""
    tensors = {}
    for file in open_files(folder, "model*.safetensors", "pytorch_model*.bin"):
        if twice := tensors.keys() & file.keys():
            raise ValueError(f"{folder}: two files hold {min(twice)}")
        tensors |= file
    return in_memory(tensors)


def open_meta_files(folder: Path) -> Source:
    """Meta's layout: each file holds a slice of every matrix, by output row or by input column."""
    files = open_files(folder, "consolidated.*.pth")

    def read(name: str) -> Tensor:
        matrix, dim = name.removesuffix(".weight").split(".")[-1], None
        if matrix in ("wq", "wk", "wv", "w1", "w3", "output"):
            dim = 0
        elif matrix in ("wo", "w2"):
            dim = 1
        elif matrix == "tok_embeddings":  # cut in width by Llama 2, in vocabulary by Llama 3
            dim = 0 if files[0][name].shape[1:] == files[0]["norm.weight"].shape else 1
        if dim is None or len(files) == 1:
            return files[0][name]
        with reading(folder):
            return torch.cat([file[name] for file in files], dim)

    return Named((name, partial(read, name)) for name in files[0])


def open_gguf(path: Path) -> tuple[Source, Named]:
    """llama.cpp's format, and its metadata by name. The package gguf dequantises all its types."""
    with reading(path):
        import gguf

        reader = gguf.GGUFReader(path)
        fields = Named((name, field.contents()) for name, field in reader.fields.items())

    def read(tensor: "gguf.ReaderTensor") -> Tensor:
        with reading(path):
            return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))

    return Named((tensor.name, partial(read, tensor)) for tensor in reader.tensors), fields


def open_onnx(path: Path) -> Source:
    """The weights in an ONNX graph. Those that the exporter left nameless get their user's name:

    `<module>.weight`, transposed, where that is a matrix product, else `<module>.<operator>`.
    """
    with reading(path):
        import onnx

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
