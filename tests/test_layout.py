"""The source's shape, read with `ast`: imports, length of functions and lines, docstrings, no work at import."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = {  # ours that a file may import: the table of files in the design
    "llama": set(),
    "clip": set(),
    "iaa": {"llama", "clip"},
    "data": set(),
    "zero": set(),
    "train": {"llama", "clip", "iaa", "data", "zero"},
    "sample": {"iaa", "data"},
    "eval": {"iaa", "data"},
    "bench": {"iaa", "data"},
    "checkpoint_files": set(),
    "weight_tables": {"llama", "clip"},
    "convert_weights": {"llama", "clip", "iaa", "data", "checkpoint_files", "weight_tables"},
    "convert_data": {"clip", "iaa", "data"},
    "plot": set(),
}
BELOW = {"iaa": {"llama", "clip"}}  # what comes along with a file: whoever may import iaa may import these too
LEAN = ("llama", "clip", "iaa", "data", "zero", "train", "sample")  # the core: requirements.txt and nothing else
READERS = ("convert_weights", "checkpoint_files")  # of foreign files: may name pickle's errors, never load with it
MODULE_OF = {"pillow": "PIL"}  # a distribution's module where the names differ
FILES = [ROOT / f"{name}.py" for name in IMPORTS if (ROOT / f"{name}.py").is_file()]
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def tree(path: Path) -> ast.Module:
    """The file, parsed."""
    return ast.parse(path.read_text())


def imported(path: Path) -> set[str]:
    """Top-level names of all modules that the file imports, wherever in the file."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            names.add(node.module.split(".")[0])
    return names


def definitions(path: Path) -> list[tuple[ast.AST, bool]]:
    """Every class and function, with whether it is public and at the top or in a class."""
    found = []

    def visit(node: ast.AST, public: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                shown = public and not child.name.startswith("_")
                found.append((child, shown))
                visit(child, shown and isinstance(child, ast.ClassDef))
            else:
                visit(child, public)

    visit(tree(path), True)
    return found


def test_every_file_is_in_the_table():
    """A new file at the top level takes a row in IMPORTS first."""
    assert {path.stem for path in ROOT.glob("*.py")} <= IMPORTS.keys()


@each_file
def test_imports_follow_the_table(path):
    """A file imports what the design's table allows, and what those import."""
    allowed = set(IMPORTS[path.stem])
    for name in IMPORTS[path.stem]:
        allowed |= BELOW.get(name, set())
    assert imported(path) & IMPORTS.keys() <= allowed


@each_file
def test_the_core_imports_requirements_only(path):
    """The core takes nothing beyond the standard library and requirements.txt."""
    if path.stem not in LEAN:
        pytest.skip("an optional tool: may use the optional requirements")
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = {re.split(r"[=<>\[; ]", line)[0].lower() for line in lines if line and not line.startswith(("#", "-"))}
    installed = {MODULE_OF.get(name, name) for name in names}
    assert imported(path) - IMPORTS.keys() - set(sys.stdlib_module_names) <= installed


@each_file
def test_functions_are_short(path):
    """Under 60 lines each, docstring and signature included."""
    long = {node.name: node.end_lineno - node.lineno + 1 for node, _ in definitions(path)
            if not isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno + 1 >= 60}
    assert not long


@each_file
def test_public_names_have_docstrings(path):
    """The file, every public class and function; not `forward`, nor a method that a base class here explains."""
    assert ast.get_docstring(tree(path))
    explained = {node.name for node, _ in definitions(path) if ast.get_docstring(node)} | {"forward"}
    assert [node.name for node, public in definitions(path) if public and node.name not in explained] == []


@each_file
def test_nothing_dangerous(path):
    """No bare except, no eval or exec, no pickle, and torch.load only with weights_only=True."""
    assert not imported(path) & ({"pickle", "marshal", "shelve", "dill"} if path.stem not in READERS else set())
    for node in ast.walk(tree(path)):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{where}: bare except"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "__import__"), f"{where}: {node.func.id}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
            settings = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert settings.get("weights_only") == "True", f"{where}: {ast.unparse(node)}"


@each_file
def test_nothing_runs_at_import(path):
    """The top level: docstring, imports, definitions, constants, and at the end `if __name__ == "__main__"`."""
    body = tree(path).body
    for node in body[:-1]:
        allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert isinstance(node, allowed) or text, f"{path.name}:{node.lineno}: {ast.unparse(node)[:60]}"
    last = body[-1]
    assert not isinstance(last, ast.If) or ast.unparse(last.test) == "__name__ == '__main__'"


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "tests").glob("*.py"))], ids=lambda path: path.name)
def test_lines_fit(path):
    """120 columns at most, no tab, no trailing space."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert len(line) <= 120 and "\t" not in line and line == line.rstrip(), f"{path.name}:{number}"
