"""Files that appear whole or not at all, JSON as typed values, frozen models, a command's end."""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import types
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn


@contextlib.contextmanager
def one_line(program: str, after_stop: str = "") -> Iterator[None]:
    """Around a whole command: an error that its user can cause becomes one line, exit code 1.

    after_stop: what Ctrl-C leaves behind, for the line that is then printed.
    """
    try:
        yield
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"{program}: {error}")
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
    if path.exists():
        raise FileExistsError(f"{path} is there already; remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as new:
        new.mkdir()
        yield new


def write_text(path: Path, text: str) -> None:
    """Write or replace a text file in one step."""
    with new_file(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: Path, value: dict) -> None:
    """Write or replace a JSON file in one step."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, *keys: str, **kinds) -> dict:
    """The JSON object in a file. Raises FileNotFoundError, or ValueError naming the fault.

    keys must be there. So must the names of `kinds`, each with a value of that type
    (`parse_value`).
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected")
    for key in (*keys, *kinds):
        if key not in value:
            raise ValueError(f"{path}: {key!r} is missing")
    return value | {key: parse_value(f"{path}: {key}", value[key], kinds[key]) for key in kinds}


def read_frozen(kind: type, folder: str | Path) -> tuple:
    """The sizes of the frozen model in `folder`, of class `kind`, and its SHA-256.

    Raises FileNotFoundError, or ValueError naming the file.
    """
    path, wanted = Path(folder, "config.json"), kind.__name__.removesuffix("Config").lower()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; convert_weights.py writes it")
    meta = read_json(path, "config", kind=str, sha256=str)
    if meta["kind"] != wanted:
        raise ValueError(f"{path}: a model of kind {meta['kind']!r}, not {wanted!r}")
    return parse_value(f"{path}: config", meta["config"], kind), meta["sha256"]


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
    tensors, file = {}, folder
    try:
        for file in sorted(Path(folder).glob("model-*.safetensors")):
            tensors |= load_file(file, str(device))
        stored = next((tensor.dtype for tensor in tensors.values()), dtype)
        tensors = {name: tensor.to(dtype or stored) for name, tensor in tensors.items()}
        model.load_state_dict(tensors, assign=True)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())[:500]}") from None
    model.sha256, model.stored_dtype = sha256, stored
    return model.eval().requires_grad_(False)


def check_frozen(kind: type[nn.Module], folder: str | Path) -> None:
    """Raise ValueError where the frozen model in `folder` is not as convert_weights.py wrote it.

    kind: Llama or Clip. The SHA-256 of all tensors is computed; memory holds one tensor at a time.
    """
    config, sha256 = read_frozen(kind.config_class, folder)
    written = read_json(Path(folder, "config.json"))["config"]  # it is hashed, too
    digest = hashlib.sha256(json.dumps(written).encode())
    with torch.device("meta"):
        names = kind(config).state_dict()
    try:
        files = [safe_open(file, "pt") for file in sorted(Path(folder).glob("model-*.safetensors"))]
        file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        for name in names:
            tensor = file_of[name].get_slice(name)
            digest.update(f"{name} {tensor.get_dtype()} {tensor.get_shape()}\n".encode())
            digest.update(tensor[:].reshape(-1).view(torch.uint8).numpy().data)
    except (KeyError, SafetensorError) as error:
        raise ValueError(f"{folder}: {error}") from None
    if digest.hexdigest() != sha256:
        raise ValueError(f"{folder}: the weights do not have the SHA-256 of its config.json: a "
                         "file has changed since the conversion; convert the model again")


def parse_value(where: str, value, kind):
    """A value from JSON or TOML as type `kind`. Raises ValueError that begins with `where`.

    kind: a class, a dataclass, list[...], tuple[...], dict[str, ...], or a union of these. An int
    is accepted as a float, a list as a tuple, a table as a dataclass. Nothing else is converted.
    """
    for option in typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,):
        origin, inner = typing.get_origin(option) or option, typing.get_args(option)
        if is_dataclass(option) and isinstance(value, dict):
            return parse_dataclass(option, value, where)
        if origin is dict and isinstance(value, dict):
            return {key: parse_value(f"{where}.{key}", v, inner[1]) for key, v in value.items()}
        if origin in (list, tuple) and isinstance(value, list | tuple):
            return origin(parse_value(f"{where}[{n}]", v, inner[0]) for n, v in enumerate(value))
        if type(value) is option:  # not isinstance: True is an int
            return value
        if option is float and type(value) is int:
            return float(value)
    wanted = kind.__name__ if isinstance(kind, type) else kind
    raise ValueError(f"{where} = {value!r}: expected {wanted}")


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
