"""Atomic file writes, JSON as typed values, loading of frozen models, one-line errors."""

import contextlib
import hashlib
import json
import os
import reprlib
import sys
import tempfile
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # as safetensors


@contextlib.contextmanager
def one_line(program: str, after_stop: str = "") -> Iterator[None]:
    """Around a whole command: an error that its user can cause becomes one line, exit code 1.

    after_stop: what Ctrl-C leaves behind, for the line that is then printed.
    """
    try:
        yield
    except (ValueError, OSError, OverflowError, SafetensorError, MemoryError,
            torch.OutOfMemoryError) as error:
        text = str(error) or "out of memory"  # a MemoryError may say nothing
        sys.exit(f"{program}: {text}".replace("\n", " "))  # libraries write several lines
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # of the CPU, for which torch has no kind
            raise
        sys.exit(f"{program}: out of memory")
    except ModuleNotFoundError as error:
        sys.exit(f"{program}: {error}; the files in requirements/ say which packages it needs")
    except KeyboardInterrupt:
        sys.exit(f"\n{program}: stopped; {after_stop}".removesuffix("; "))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around code that writes `path`: its errors, such as a full disk, name the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: not written ({error})") from None


def flush(path: Path) -> None:
    """Wait until the disk holds a file's bytes, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path for a new file (or folder) that replaces `path` when the block ends.

    It is in a temporary folder, which is removed also if the block fails. All bytes are on the disk
    before the rename, so that `path` is complete even if the power fails.
    """
    place = {"prefix": f".{path.name}.", "suffix": ".tmp", "dir": path.parent}  # on the same disk
    with writing(path), tempfile.TemporaryDirectory(**place, ignore_cleanup_errors=True) as folder:
        new = Path(folder, path.name)
        yield new
        for file in [*new.rglob("*"), new]:
            flush(file)
        new.replace(path)
        flush(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder that is renamed to `path` when the block ends, and removed if it fails.

    Raises FileExistsError where `path` exists: a folder is never replaced.
    """
    if os.path.lexists(path):  # also a link to nowhere, which the rename would not replace
        raise FileExistsError(f"{path} is there already; remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as new:
        new.mkdir()
        yield new
        for file in new.rglob("*.safetensors"):  # the library lets only their owner read them
            file.chmod(new.stat().st_mode & 0o666)


def write_text(path: Path, text: str) -> None:
    """Write or replace a text file in one step."""
    with new_file(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: Path, value: dict) -> None:
    """Write or replace a JSON file in one step."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, **kinds) -> dict:
    """The JSON object in a file. The names of `kinds` must be in it, with values of those types.

    Raises FileNotFoundError, or ValueError naming the fault. kinds: as `parse_value` takes them.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected")
    for key, kind in kinds.items():
        if key not in value:
            raise ValueError(f"{path}: {key!r} is missing")
        value[key] = parse_value(f"{path}: {key}", value[key], kind)
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped: the disk is read where a value is used.

    Raises FileNotFoundError, or ValueError naming the file.
    """
    if not path.is_file():  # a pipe would block whoever opens it
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None


def fill(model: nn.Module, tensors: dict[str, Tensor], where: Path, strict: bool = True):
    """`load_state_dict`, without a copy. Raises ValueError that begins with `where`."""
    try:
        return model.load_state_dict(tensors, strict, assign=True)
    except RuntimeError as error:  # of several lines, one for each tensor
        raise ValueError(f"{where}: {' '.join(str(error).split())[:500]}") from None


def sha256_of(settings: dict, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of JSON values and of tensors on the CPU, in this order: 64 hexadecimal digits."""
    # Settings are hashed too: a vision tower's feature_layer changes the features and no tensor.
    sha = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in tensors:
        sha.update(f"{name} {CODES.get(tensor.dtype)} {list(tensor.shape)}\n".encode())
        sha.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def read_frozen(kind: type, folder: str | Path) -> tuple:
    """The sizes of the frozen model in `folder`, of class `kind`, and its SHA-256.

    Raises FileNotFoundError, or ValueError naming the file.
    """
    path, wanted = Path(folder, "config.json"), kind.__name__.removesuffix("Config").lower()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; convert_weights.py makes such a folder")
    meta = read_json(path, config=dict, kind=str, sha256=str)
    if meta["kind"] != wanted:
        raise ValueError(f"{path}: a model of kind {meta['kind']!r}, not {wanted!r}")
    config = parse_value(f"{path}: config", meta["config"], kind)
    # A damaged size must not take memory or time. Every size but the context is a side of a matrix
    # whose other side is `width` or longer. A layer has a matrix of width x ffn. Its tensors' names
    # take 256 bytes and more.
    sizes = [size for name, size in asdict(config).items()
             if type(size) is int and name != "context"]
    least = config.width * max(*sizes, config.layers * config.ffn) + 256 * config.layers
    stored = sum(file.stat().st_size for file in weight_files(folder))
    if least > stored:
        raise ValueError(f"{path}: these sizes need {least} bytes of weights at least, and "
                         f"model-*.safetensors beside it have {stored}")
    return config, meta["sha256"]


def weight_files(folder: str | Path) -> list[Path]:
    """The files with the tensors of a frozen model, in order."""
    return sorted(Path(folder).glob("model-*.safetensors"))


def load_frozen(
    kind: type[nn.Module],  # Llama or Clip
    folder: str | Path,
    dtype: torch.dtype | None = None,  # None: the files' own
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The frozen model that convert_weights.py wrote to `folder`, in eval mode.

    Raises FileNotFoundError, or ValueError naming the file or tensor that is wrong.
    """
    config, sha256 = read_frozen(kind.config_class, folder)
    with torch.device("meta"):  # shapes without storage: the values come from the files
        model = kind(config)
    tensors = {}
    for file in weight_files(folder):
        tensors |= read_tensors(file)
    fill(model, tensors, Path(folder, "model-*.safetensors"))
    model.sha256, model.stored_dtype = sha256, next(model.parameters()).dtype
    return model.to(device, dtype).eval().requires_grad_(False)


def check_frozen(kind: type[nn.Module], folder: str | Path) -> None:
    """Read every byte of a frozen model. Raises ValueError where one has changed since conversion.

    It takes about 1 s per GB, so `load_frozen` leaves it out.
    """
    model = load_frozen(kind, folder)
    sizes = read_json(Path(folder, "config.json"))["config"]
    if sha256_of(sizes, model.state_dict().items()) != model.sha256:
        names = ", ".join(file.name for file in weight_files(folder))
        raise ValueError(f"{folder}: the weights do not have the SHA-256 of its config.json: "
                         f"{names} or config.json has changed; convert the model again")


def parse_value(where: str, value, kind):
    """A value from JSON or TOML as type `kind`. Raises ValueError that begins with `where`.

    kind: a class, a dataclass, list[...], tuple[...], dict[str, ...], or a union of these. An int
    is accepted as a float, a list as a tuple, a table as a dataclass. Nothing else is converted.
    """
    for option in typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,):
        origin, inner = typing.get_origin(option) or option, typing.get_args(option)
        if is_dataclass(option) and isinstance(value, dict):
            return parse_dataclass(option, value, where)
        if type(value) is option:  # not isinstance: True is an int
            return value
        if origin is dict and isinstance(value, dict):
            return {key: parse_value(f"{where}.{key}", v, inner[1]) for key, v in value.items()}
        if origin in (list, tuple) and isinstance(value, list | tuple):
            return origin(parse_value(f"{where}[{n}]", v, inner[0]) for n, v in enumerate(value))
        if option is float and type(value) is int:
            return float(value)
    wanted = kind.__name__ if isinstance(kind, type) else kind
    raise ValueError(f"{where} = {reprlib.repr(value)}: expected {wanted}")


def parse_dataclass(kind, values: dict, where: str = ""):
    """A dataclass from a table. Raises ValueError for an unknown, missing or impossible value."""
    hints = typing.get_type_hints(kind)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        place, known = f" in {where}" if where else "", ", ".join(sorted(hints))
        raise ValueError(f"unknown key {unknown[0]!r}{place}; known: {known}")
    given = {key: parse_value(f"{where}.{key}".lstrip("."), value, hints[key])
             for key, value in values.items()}
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:  # a value is missing, or the class refuses it
        message = str(error).removeprefix(f"{kind.__name__}.__init__() ")
        raise ValueError(f"{where}: {message}".removeprefix(": ")) from None
