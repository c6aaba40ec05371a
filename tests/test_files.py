"""common/files.py: typed values from JSON, whose errors say where and what is right; new files."""

import hashlib
import json
import os
from dataclasses import dataclass

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from common import files
from common.files import new_file, new_folder, one_line, parse_dataclass, read_json


@dataclass(frozen=True)
class Inner:
    """A table within a table."""

    share: float = 0.5

    def __post_init__(self):
        if self.share > 1:
            raise ValueError(f"share = {self.share}: at most 1")


@dataclass(frozen=True)
class Outer:
    """Every kind of value."""

    size: int
    places: tuple[int, ...] = ()
    mean: tuple[float, float] = (0.0, 0.0)
    inner: Inner | None = None
    names: list[str] = ()


def test_values_become_what_is_declared():
    """An int counts as a float, a list as a tuple, a table as a dataclass; null is None."""
    values = {"size": 3, "places": [1, 2], "mean": [1, 0.5], "inner": {"share": 1}, "names": ["a"]}
    assert parse_dataclass(Outer, values) == Outer(3, (1, 2), (1.0, 0.5), Inner(1.0), ["a"])
    assert parse_dataclass(Outer, {"size": 3, "inner": None}) == Outer(3)


@pytest.mark.parametrize(("values", "message"), [
    ({"size": "3"}, "here.size = '3': expected int"),
    ({"size": True}, "here.size = True: expected int"),
    ({"size": 3, "places": [1, "2"]}, "here.places[1] = '2': expected int"),
    ({"size": 3, "places": {"1": 2}}, "here.places = {'1': 2}: expected tuple[int, ...]"),
    ({"size": 3, "inner": {"share": "all"}}, "here.inner.share = 'all': expected float"),
    ({"size": 3, "inner": {"share": 2}}, "here.inner: share = 2.0: at most 1"),
    ({"size": "9" * 10**6}, "here.size = '999999999999...9999999999999': expected int"),
    ({"size": 3, "sise": 4}, "unknown key 'sise' in here; known: inner, mean, names, places, size"),
    ({}, "here: missing 1 required positional argument: 'size'")])
def test_wrong_values_are_named(values, message):
    """One line: where the value stands, what it is, what was expected."""
    with pytest.raises(ValueError) as error:
        parse_dataclass(Outer, values, "here")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_json_of_the_wrong_kind(tmp_path):
    """Missing, not JSON, no object, a key missing, a value of another kind: all name the file."""
    path = tmp_path / "x.json"
    with pytest.raises(FileNotFoundError, match=r"x.json: no such file"):
        read_json(path)
    for text, message in (('{"a": 1', "not JSON"), ("[" * 100_000, "not JSON"), ("{}", "'a' is"),
                          ("[1]", "a JSON object is"), ('{"a": "1"}', "a = '1': expected int")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"x.json: {message}"):
            read_json(path, a=int)
    path.write_text(json.dumps({"a": 1, "b": {"c": None}, "d": {"e": 2}, "f": []}))
    assert read_json(path, a=float, b=dict[str, str | None], d=dict) == {
        "a": 1.0, "b": {"c": None}, "d": {"e": 2}, "f": []}


def test_sha256_literal():
    """Settings as JSON, then name, dtype, shape and bytes of each tensor."""
    tensors = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[1.0]], dtype=torch.bfloat16)}
    text = b'{"x": [1, null]}a F32 [2]\n\0\0\x80?\0\0\0@b BF16 [1, 1]\n\x80?'
    digest = hashlib.sha256(text).hexdigest()
    assert files.sha256_of({"x": (1, None)}, tensors.items()) == digest


def test_files_of_tensors_that_claim_too_much(tmp_path):
    """A header longer than the file, a tensor of 2^62 values, a pipe, nothing: one line at once."""
    path, pipe = tmp_path / "x.safetensors", tmp_path / "pipe"
    claim = b'{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (2**62, 2**64 - 1)
    for damaged in (b"", b"\xff" * 7 + b"\0{}", len(claim).to_bytes(8, "little") + claim + b"1234"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="x.safetensors: ") as error:
            files.read_tensors(path)
        assert "\n" not in str(error.value)
    os.mkfifo(pipe)
    with pytest.raises(FileNotFoundError, match="pipe: no such file"):
        files.read_tensors(pipe)


def test_new_files_and_folders_are_whole(tmp_path):
    """Two writers of one path have a file each. A stop or a full disk leaves what was there, and
    the latter is named. A folder is never replaced."""
    path, folder = tmp_path / "x.json", tmp_path / "runs" / "mm"
    with new_file(path) as one, new_file(path) as two:
        assert one != two and one.suffix == ".json"
        one.write_text("one"), two.write_text("two")
        assert not path.exists()
    with new_folder(folder) as new:
        (new / "one").write_text("one")
        save_file({"x": torch.zeros(1)}, new / "x.safetensors")
        assert not folder.exists()
    modes = {file.stat().st_mode for file in folder.iterdir()}  # others may read all, or nothing
    assert len(modes) == 1
    (folder / "x.safetensors").unlink()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError), new_folder(tmp_path / "link"):
        raise AssertionError("not reached")
    (tmp_path / "link").unlink()
    full = OSError(28, "No space left on device")
    for writer, target in ((new_file, path), (new_folder, tmp_path / "runs" / "other")):
        for fault in (KeyboardInterrupt(), full):
            with pytest.raises(type(fault)) as error, writer(target) as new:
                (new / "half" if new.is_dir() else new).write_text("half")
                raise fault
            assert fault is not full or f"{target}: not written (" in str(error.value)
    with pytest.raises(FileExistsError, match="mm is there already"), new_folder(folder):
        raise AssertionError("not reached")
    assert path.read_text() == "one"
    assert {*tmp_path.rglob("*")} == {path, folder.parent, folder, folder / "one"}


@pytest.mark.parametrize(("error", "stopped", "said"), [
    (ValueError("bad"), "", "x.py: bad"), (OSError("gone"), "", "x.py: gone"),
    (SafetensorError("cut\nhere"), "", "x.py: cut here"),
    (MemoryError(), "", "x.py: out of memory"),
    (torch.OutOfMemoryError("4 GiB\ntoo many"), "", "x.py: 4 GiB too many"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "", "x.py: out of memory"),
    (KeyboardInterrupt(), "", "\nx.py: stopped"),
    (KeyboardInterrupt(), "go on", "\nx.py: stopped; go on")])
def test_a_command_ends_in_one_line(error, stopped, said):
    """What a user can cause; an error of ours keeps its traceback."""
    with pytest.raises(SystemExit) as end, one_line("x.py", stopped):
        raise error
    assert end.value.code == said
    with pytest.raises(RuntimeError), one_line("x.py"):
        raise RuntimeError("ours")
