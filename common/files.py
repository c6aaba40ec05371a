"""Files that appear whole or not at all, JSON as typed values, and how a command ends."""

import contextlib
import json
import os
import secrets
import shutil
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

from safetensors import SafetensorError


@contextlib.contextmanager
def one_line(program: str, after_stop: str = "") -> Iterator[None]:
    """Around a whole command: an error that its user can cause becomes one line, exit code 1.

    after_stop: what Ctrl-C leaves behind, for the line that is then printed.
    """
    try:
        yield
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"{program}: {error}")
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
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `path` when the block ends, and removed if it fails.

    Raises FileExistsError where `path` exists: nothing is ever replaced. The files are on the disk
    before the rename, so that `path` is complete even if the power fails.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} is there already; remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with writing(path):
            yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            flush(file)
        temporary.rename(path)
        flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary file that replaces `path` when the block ends, and is removed if it fails."""
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.tmp{path.suffix}")
    try:
        with writing(path):
            yield temporary
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write or replace a text file in one step: if that fails, the old file stays."""
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
    missing = [key for key in (*keys, *kinds) if key not in value]
    if missing:
        raise ValueError(f"{path}: {missing[0]!r} is missing")
    return value | {key: parse_value(f"{path}: {key}", value[key], kinds[key]) for key in kinds}


def parse_value(where: str, value, kind):
    """A value from JSON or TOML as type `kind`. Raises ValueError that begins with `where`.

    kind: a class, a dataclass, list[...], tuple[...], dict[str, ...], or a union of these. An int
    is accepted as a float, a list as a tuple, a table as a dataclass. Nothing else is converted.
    """
    for option in typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,):
        origin, inner = typing.get_origin(option) or option, typing.get_args(option)
        if is_dataclass(option) and (isinstance(value, dict) or option is kind):
            return parse_dataclass(option, value, where)
        if origin is dict and isinstance(value, dict):
            of = inner[1] if inner else object
            return {key: parse_value(f"{where}.{key}", v, of) for key, v in value.items()}
        is_list = origin in (list, tuple) and isinstance(value, list | tuple)
        if is_list and (origin is list or inner[-1] is ... or len(inner) == len(value)):
            return origin(parse_value(f"{where}[{n}]", v, inner[0]) for n, v in enumerate(value))
        if type(value) is option or option is object:
            return value
        if option is float and type(value) is int and abs(value) < 2**53:
            return float(value)
    wanted = kind.__name__ if isinstance(kind, type) else kind
    raise ValueError(f"{where} = {value!r}: expected {wanted}")


def parse_dataclass(kind, values: dict, where: str = ""):
    """A dataclass from a table. Raises ValueError for an unknown, missing or impossible value."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} = {values!r}: expected a table")
    hints = typing.get_type_hints(kind)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        place, known = f" in {where}" if where else "", ", ".join(sorted(hints))
        raise ValueError(f"unknown key {unknown[0]!r}{place}; known: {known}")
    given = {key: parse_value(f"{where}.{key}".lstrip("."), value, hints[key])
             for key, value in values.items()}
    try:
        return kind(**given)
    except TypeError as error:
        message = str(error).replace(f"{kind.__name__}.__init__()", where or "the config")
        raise ValueError(message) from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None
