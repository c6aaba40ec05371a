"""The house: which files there are, who imports whom, and the shape of every file."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SEVEN = ("iaa", "llama", "clip", "train", "sample", "data", "convert_weights")  # the user's card
MAY_IMPORT = {  # room or file -> what it may import of ours, beside itself
    "llama": "", "clip": "", "common": "",
    "tokenization": "common",
    "iaa": "llama clip common",
    "data": "tokenization common",
    "conversion": "llama clip tokenization common",
    "training": "iaa llama clip data tokenization common",
    "train": "training iaa llama clip data tokenization common",
    "sample": "iaa llama clip data tokenization common",
    "convert_weights": "conversion iaa llama clip tokenization common",
}
TOOLS = ("prepare_data", "evaluation", "speed", "web")  # may import everything; nobody imports them
# Within a function: weights in the processor's layout, or int8.
ALLOWED = {("sample", "speed"), ("train", "speed"), ("training", "speed")}
CORE = (*SEVEN, "common", "tokenization", "training")  # these need requirements.txt only
LIBRARIES = {"torch", "numpy", "sentencepiece", "tiktoken", "safetensors", "PIL", "readline"}
OPTIONAL = {("training/plot.py", "matplotlib")}
FILES = sorted(p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in
               (".venv", "tests", "runs", "weights", "data"))
OURS = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES}
each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


def imported(path: Path) -> set[str]:
    """The first part of the name of every module that a file imports, wherever in the file."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


def room(path: Path) -> str:
    """The folder of a file, or its own name where it stands at the top."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_the_top_level_is_the_card():
    """Seven Python files at the top, no more."""
    assert {path.stem for path in ROOT.glob("*.py")} == set(SEVEN)


def test_the_house_is_small():
    """400 lines a file; 7,677 in all, on the way to 6,600."""
    lines = {path: len(path.read_text().splitlines()) for path in FILES}
    assert sum(lines.values()) <= 7_677
    assert not {str(path): count for path, count in lines.items() if count > 400}


@each_file
def test_imports_go_downwards(path):
    """A file imports of ours what its room may, and the core nothing beyond requirements.txt."""
    here, found = room(path), imported(path)
    if here not in TOOLS:
        above = (found & OURS) - {here, *MAY_IMPORT[here].split()}
        assert {(here, name) for name in above} <= ALLOWED
    if here in CORE and path.name not in ("convert_weights.py",):
        foreign = found - OURS - LIBRARIES - set(sys.stdlib_module_names)
        assert {(str(path.relative_to(ROOT)), name) for name in foreign} <= OPTIONAL


def test_training_and_asking_take_few_files():
    """train.py and sample.py together pull in at most 14 of our files."""
    todo, seen = [ROOT / "train.py", ROOT / "sample.py"], set()
    while todo:
        path = todo.pop()
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OURS - {*TOOLS}:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                inner = [ROOT / (name.replace(".", "/") + ".py") for name in names]
                todo += [path for path in inner if path.is_file() and path not in seen]
    assert len(seen) <= 14, sorted(str(path.relative_to(ROOT)) for path in seen)


@each_file
def test_the_shape_of_a_file(path):
    """Functions under 60 lines, lines of 100 columns, docstrings on all that is public."""
    text, where = path.read_text(), str(path.relative_to(ROOT))
    for number, line in enumerate(text.splitlines(), 1):
        assert len(line) <= 100 and line == line.rstrip() and "\t" not in line, f"{where}:{number}"
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not text
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 < 60, f"{where}:{node.lineno} {node.name}"
    public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    assert not [n.name for n in public if not n.name.startswith("_") and not ast.get_docstring(n)]


@each_file
def test_nothing_dangerous(path):
    """No bare except, no eval or exec, nothing unpickled but tensors with weights_only=True."""
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.ExceptHandler) or node.type is not None, where
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        assert called not in ("eval", "exec", "__import__", "torch.jit.load"), where
        assert not re.fullmatch(r"(pickle|marshal|dill)\.loads?", called), where
        if called == "torch.load":
            settings = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert settings.get("weights_only") == "True", where


@pytest.mark.parametrize("name", SEVEN)
def test_the_seven_are_plain_torch(name):
    """No custom autograd, no private operator of torch, no ctypes in the seven."""
    text = (ROOT / f"{name}.py").read_text()
    assert not re.search(r"torch\.ops|torch\._|\baten\b|autograd\.Function|ctypes", text)
