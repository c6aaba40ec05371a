"""The source's shape: imports, lengths of functions and lines, docstrings, README's file table."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = {  # of ours, by file: the design
    "lean": set(),
    "llama": {"lean"},
    "clip": set(),
    "files": set(),
    "mixed": {"llama"},
    "iaa": {"clip", "llama", "mixed"},
    "generate": {"iaa", "llama"},
    "storage": {"clip", "files", "iaa", "llama"},
    "tokenizer": {"files"},
    "chat": {"tokenizer"},
    "data": {"chat", "tokenizer"},
    "config": {"files", "iaa"},
    "train": {
        "budget", "checkpoint", "clip", "config", "data", "features", "files", "iaa", "lean",
        "llama", "parts", "plan", "ranks", "stages", "storage", "tokenizer", "zero"},
    "stages": {"chat", "checkpoint", "config", "files", "plan", "storage", "tokenizer"},
    "features": {"files"},
    "packing": {"llama"},
    "sample": {"clip", "data", "dialogue", "files", "iaa"},
    "dialogue": {
        "chat", "clip", "data", "generate", "iaa", "llama", "packing", "storage", "tokenizer"},
    "eval": {
        "ask", "benchmarks", "files", "harness", "iaa", "packing", "ranks", "retention",
        "scoring", "storage", "tokenizer"},
    "ask": {"chat", "clip", "iaa", "llama", "tokenizer"},
    "scoring": {"data"},
    "benchmarks": {"ask", "chat", "data", "data_files", "mmbench", "scoring"},
    "mmbench": {"ask", "data", "files", "scoring"},
    "retention": {"generate", "iaa", "scoring", "storage", "tokenizer"},
    "harness": {"chat", "generate", "iaa", "tokenizer"},
    "parts": {"iaa"},
    "ranks": {"files"},
    "zero": set(),
    "checkpoint": {"files", "ranks", "zero"},
    "budget": {"config", "iaa", "lean", "llama", "parts", "zero"},
    "plan": {"budget", "clip", "config", "data", "iaa", "llama", "storage", "tokenizer"},
    "ablate": {
        "ask", "benchmarks", "config", "eval", "files", "lean", "storage", "tokenizer", "train"},
    "memory": {"clip", "files", "iaa", "llama"},
    "plot": {"files"},
    "bench_cases": {
        "bench_peer", "costs", "data", "generate", "iaa", "lean", "packing", "storage"},
    "bench": {"bench_cases", "costs", "files", "iaa", "retention", "tokenizer"},
    "costs": {"llama"},
    "bench_peer": {"iaa"},
    "bench_zero": {
        "bench_cases", "clip", "config", "data", "files", "iaa", "llama", "plan", "ranks",
        "train"},
    "checkpoint_files": set(),
    "weight_tables": {"clip", "llama"},
    "convert_weights": {
        "checkpoint_files", "clip", "files", "iaa", "llama", "storage", "tokenizer",
        "weight_tables"},
    "data_files": set(),
    "data_rows": {"chat", "data", "data_files"},
    "data_writing": {"clip", "data", "data_rows", "files"},
    "data_sources": {"chat", "data", "data_files", "data_rows", "files"},
    "box_sources": {"data", "data_files", "data_rows"},
    "demo_data": {"clip", "data", "data_rows", "files"},
    "convert_data": {"box_sources", "data", "data_sources", "data_writing", "demo_data", "files"},
}
CORE = ("lean", "llama", "clip", "files", "iaa", "mixed", "generate", "storage", "packing",
        "tokenizer", "chat", "data", "config", "parts", "ranks", "zero", "checkpoint", "budget",
        "plan", "features", "stages", "train", "dialogue", "sample")  # the core
MODULE_OF = {"pillow": "PIL"}  # a distribution's module where the names differ
FILES = [ROOT / f"{name}.py" for name in IMPORTS]
HARMLESS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
TESTS = sorted((ROOT / "tests").glob("*.py"))
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
    """A new file at the top level takes a row in IMPORTS first; one that goes takes it along."""
    assert {path.stem for path in ROOT.glob("*.py")} == IMPORTS.keys()


def test_the_readme_lists_every_file():
    """README.md's table of files names each at the top level once, with its number of lines."""
    head = r"^## Files\n[^#]*?^\| *file *\| *holds *\| *lines *\|\n"
    table = re.search(head + r"((?:\|.*\n)+)", (ROOT / "README.md").read_text(), re.M)
    assert table, "README.md: no table with the columns file, holds, lines under '## Files'"
    rows = re.findall(r"^\|[^|]*?(\w+\.py)[^|]*\|.*\| *([\d,]+) *\|$", table[1], re.M)
    listed = sorted((name, int(lines.replace(",", ""))) for name, lines in rows)
    assert listed == sorted((path.name, len(path.read_text().splitlines())) for path in FILES)


@each_file
def test_imports_follow_the_table(path):
    """A file imports of ours what its row names, no more and no less."""
    assert imported(path) & IMPORTS.keys() == IMPORTS[path.stem]


@each_file
def test_the_core_imports_requirements_only(path):
    """The core takes nothing beyond the standard library and requirements.txt."""
    if path.stem not in CORE:
        pytest.skip("an optional tool: may use the optional requirements")
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = {re.split(r"[=<>\[; ]", line)[0].lower()
             for line in lines if line and not line.startswith(("#", "-"))}
    installed = {MODULE_OF.get(name, name) for name in names}
    assert imported(path) - IMPORTS.keys() - set(sys.stdlib_module_names) <= installed


@each_file
def test_functions_are_short(path):
    """Fewer than 60 lines each, docstring and signature included."""
    long = {node.name: node.end_lineno - node.lineno + 1 for node, _ in definitions(path)
            if not isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno + 1 >= 60}
    assert not long


@each_file
def test_public_names_have_docstrings(path):
    """The file, each public class and function; not `forward`, nor what a base class explains."""
    assert ast.get_docstring(tree(path))
    found = definitions(path)
    explained = {node.name for node, _ in found if ast.get_docstring(node)} | {"forward"}
    assert not [node.name for node, public in found if public and node.name not in explained]


@each_file
def test_nothing_dangerous(path):
    """No bare except, no eval or exec, no pickle, and torch.load only with weights_only=True.

    But for data_files.py, whose unpickler looks up no name.
    """
    pickles = {"pickle", "marshal", "shelve", "dill"}
    assert path.stem == "data_files" or not imported(path) & pickles
    for node in ast.walk(tree(path)):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{where}: bare except"
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        assert called not in ("eval", "exec", "__import__"), f"{where}: {called}"
        if called in ("torch.load", "pickle.load", "pickle.loads"):
            settings = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert settings.get("weights_only") == "True", f"{where}: {ast.unparse(node)}"


@each_file
def test_nothing_runs_at_import(path):
    """Top level: docstring, imports, definitions, constants, last `if __name__ == "__main__"`."""
    body = tree(path).body
    for node in body[:-1]:
        where = f"{path.name}:{node.lineno}: {ast.unparse(node)[:60]}"
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert text or isinstance(node, HARMLESS), where
    last = body[-1]
    assert not isinstance(last, ast.If) or ast.unparse(last.test) == "__name__ == '__main__'"


@pytest.mark.parametrize("path", [*FILES, *TESTS], ids=lambda path: path.name)
def test_lines_fit(path):
    """100 columns at most, no tab, no trailing space; the golden texts are as long as they are."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        where = f"{path.name}:{number}"
        excepted = path.name == "make_golden_tokens.py" and line.endswith("# noqa: E501")
        assert len(line) <= 100 or excepted, where
        assert "\t" not in line and line == line.rstrip(), where
