"""Files that appear whole or not at all, JSON and typed values whose errors say where, a lock;
and how a command ends.
"""

import contextlib
import fcntl
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
def one_line(program: str, stopped: str = "") -> Iterator[None]:
    """A whole command: what its user can cause is one line on stderr, and exit code 1.

    stopped: how things stand after Ctrl-C.
    """
    try:
        yield
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"{program}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\n{program}: stopped; {stopped}".removesuffix("; "))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Have what goes wrong in the block, such as a full disk, name what was to be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: not written ({error})") from None


def flush(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's list of names, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that takes its name once the block ends, and is removed on failure.

    Raises FileExistsError where there is something at `path`: nothing is ever replaced.
    Its files are fsynced before the rename: what is at `path` is complete, whenever the power goes.
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


def read_json(path: Path, *keys: str, **kinds) -> dict:
    """The JSON object at `path`. Raises FileNotFoundError or ValueError.

    keys must be there; so must the names of `kinds`, each with a value of its kind (`checked`).
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected")
    missing = [key for key in (*keys, *kinds) if key not in value]
    if missing:
        raise ValueError(f"{path}: {missing[0]!r} is missing")
    return value | {key: checked(f"{path}: {key}", value[key], kinds[key]) for key in kinds}


def checked(where: str, value, kind):
    """A value from JSON or TOML as `kind`. Raises ValueError that says where it stands.

    kind: a class, dataclass, list[...], tuple[...], dict[str, ...] or a union of these. An int
    counts as a float, a list as a tuple, a table as a dataclass; nothing else is converted.
    """
    for option in typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,):
        origin, inner = typing.get_origin(option) or option, typing.get_args(option)
        if is_dataclass(option) and (isinstance(value, dict) or option is kind):
            return build(option, value, where)
        if origin is dict and isinstance(value, dict):
            of = inner[1] if inner else object
            return {key: checked(f"{where}.{key}", v, of) for key, v in value.items()}
        many = origin in (list, tuple) and isinstance(value, list | tuple)
        if many and (origin is list or inner[-1] is ... or len(inner) == len(value)):
            return origin(checked(f"{where}[{n}]", v, inner[0]) for n, v in enumerate(value))
        if type(value) is option or option is object:
            return value
        if option is float and type(value) is int and abs(value) < 2**53:
            return float(value)
    wanted = kind.__name__ if isinstance(kind, type) else kind
    raise ValueError(f"{where} = {value!r}: expected {wanted}")


def build(kind, values: dict, where: str = ""):
    """A dataclass from a table. Raises ValueError for what is unknown, missing or impossible."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} = {values!r}: expected a table")
    hints = typing.get_type_hints(kind)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        place, known = f" in {where}" if where else "", ", ".join(sorted(hints))
        raise ValueError(f"unknown key {unknown[0]!r}{place}; known: {known}")
    given = {key: checked(f"{where}.{key}".lstrip("."), value, hints[key])
             for key, value in values.items()}
    try:
        return kind(**given)
    except TypeError as error:
        message = str(error).replace(f"{kind.__name__}.__init__()", where or "the config")
        raise ValueError(message) from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place once the block ends, and is removed on failure.

    Its name is unlike any other's: several processes, on several machines, may write one `path`.
    """
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_same(made: str | Path, was: dict, now: dict, remedy: str) -> None:
    """Raise ValueError where what lies at `made`, of settings `was`, would be made of others `now`.

    was: as JSON gives them back. A setting that only one of the two has counts as another.
    """
    now, missing = json.loads(json.dumps(now)), object()
    changed = [key for key in now | was if was.get(key, missing) != now.get(key, missing)]
    if changed:
        raise ValueError(f"{made} was made with another {', '.join(changed)}: {remedy}")


def replace_text(path: Path, text: str) -> None:
    """Write a text file, or replace it, in one step: the old one stays where that fails."""
    with writing(path):
        with new_file(path) as new:
            new.write_text(text)
            flush(new)
        flush(path.parent)


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file, or replace it, in one step."""
    replace_text(path, json.dumps(value, indent=2) + "\n")


class InUse(ValueError):
    """Another process has the folder."""


@contextlib.contextmanager
def lock(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Keep `folder` for this process. Raises InUse where another one has it, by a file `name`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # no child inherits it
        except BlockingIOError:
            file.seek(0)
            raise InUse(f"{folder} is in use by another run (process {file.read()})") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
