"""Files that appear whole or not at all, JSON whose errors name the file, a lock on a folder."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


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
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            flush(file)
        temporary.rename(path)
        flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json(path: Path, *keys: str) -> dict:
    """The JSON object at `path`. Raises FileNotFoundError or ValueError, also for a missing key."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected")
    missing = [key for key in keys if key not in value]
    if missing:
        raise ValueError(f"{path}: {missing[0]!r} is missing")
    return value


def replace_text(path: Path, text: str) -> None:
    """Write a text file, or replace it, in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file, or replace it, in one step."""
    replace_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep `folder` for this process. Raises ValueError where another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"{folder} is in use by another run (process {file.read()})") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
