"""The shape of the house: folders that can be overlooked, each with its sentence, and exit codes.

What may import what is tests/house/test_layering.py, what a line may not say test_style.py.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.support.source_tree import PACKAGES, ROOT, place, project_files, tree_of

MAX_FILES, MAX_LINES, MAX_SENTENCES = 20, 300, 3
HOUSE = (*PACKAGES, "bench", "tests")
RESULTS = ROOT / "bench" / "results"  # one file per measurement

# Longer, and allowed to be no longer than this.
LONGER = {"tests/checkpoints/test_trust.py": 307, "tests/optimizers/test_in_backward.py": 311}

FILES = [
    path
    for path in project_files(".py", ".sh", ".txt", ".json")
    if path.relative_to(ROOT).parts[0] in HOUSE and RESULTS not in path.parents
]
SFT = [path for path in FILES if path.suffix == ".py" and path.is_relative_to(ROOT / "qwen3_sft")]
# Whose functions answer with the exit code of a process.
PROGRAMS = [path for path in SFT if path.parent.name in ("qwen3_sft", "commands", "launch")]


def test_few_files_lie_side_by_side():
    counts = Counter(path.parent for path in FILES if path.name != "__init__.py")
    full = [f"{place(folder)}: {count}" for folder, count in counts.items() if count > MAX_FILES]
    assert not full, f"more than {MAX_FILES} files, which nobody overlooks: {full}"


def test_every_folder_of_the_packages_says_what_lives_there():
    folders = {path.parent for path in FILES if path.is_relative_to(ROOT / "qwen3_sft")}
    folders |= {path.parent for path in FILES if path.is_relative_to(ROOT / "monkey_patch")}
    for folder in sorted(folders):
        init = folder / "__init__.py"
        assert init.is_file(), f"{place(folder)} has no __init__.py"
        docstring = ast.get_docstring(tree_of(init))
        assert docstring, f"{place(init)} says nothing"
        count = len(sentences(docstring))
        assert 1 <= count <= MAX_SENTENCES, f"{place(init)}: {count} sentences"


def sentences(docstring: str) -> list[str]:
    """The sentences of the text; indented lines are code."""
    text = "\n".join(line for line in docstring.splitlines() if not line.startswith("    "))
    return [part for part in re.split(r"[.!?](?=\s|$)", text) if part.strip()]


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".py"], ids=place)
def test_a_file_is_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGER.get(place(path), MAX_LINES), "one idea per file"


def test_no_two_test_files_have_one_name():
    tests = [path for path in FILES if path.name.startswith("test_") and path.suffix == ".py"]
    twice = [name for name, count in Counter(path.name for path in tests).items() if count > 1]
    assert not twice, f"pytest -k and a stack trace name the file alone: {twice}"


def literal_exits(tree: ast.Module, *, is_program: bool) -> Iterator[ast.AST]:
    """Statements that end a process with a number, and functions of a program that return one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _is_exit(ast.unparse(node.func)):
            if any(_is_number(value) for argument in node.args for value in _choices(argument)):
                yield node
        elif is_program and isinstance(node, ast.FunctionDef) and _returns_int(node):
            returns = [n for n in ast.walk(node) if isinstance(n, ast.Return) and n.value]
            yield from (n for n in returns if any(_is_number(value) for value in _choices(n.value)))


def _is_exit(called: str) -> bool:
    return called in ("sys.exit", "exit", "os._exit", "SystemExit")


def _returns_int(function: ast.FunctionDef) -> bool:
    return function.returns is not None and ast.unparse(function.returns) == "int"


def _choices(value: ast.expr | None) -> list[ast.expr | None]:
    if isinstance(value, ast.IfExp):
        return [*_choices(value.body), *_choices(value.orelse)]
    return [*value.values] if isinstance(value, ast.BoolOp) else [value]


def _is_number(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and type(value.value) is int


@pytest.mark.parametrize("path", SFT, ids=place)
def test_exit_codes_have_names(path):
    found = [
        place(path, node) for node in literal_exits(tree_of(path), is_program=path in PROGRAMS)
    ]
    assert not found, f"name the exit code in qwen3_sft/errors.py: {found}"


@pytest.mark.parametrize("path", SFT, ids=place)
def test_exceptions_stand_in_one_file(path):
    if path.name == "errors.py":
        return
    found = [place(path, node) for node in ast.walk(tree_of(path)) if is_exception(node)]
    assert not found, f"exceptions, with their exit codes, belong into qwen3_sft/errors.py: {found}"


def is_exception(node: ast.AST) -> bool:
    if not isinstance(node, ast.ClassDef):
        return False
    bases = [ast.unparse(base).split(".")[-1] for base in node.bases]
    return any(base.endswith(("Error", "Exception")) or _is_builtin(base) for base in bases)


def _is_builtin(name: str) -> bool:
    found = getattr(builtins, name, None)
    return isinstance(found, type) and issubclass(found, BaseException)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("sys.exit(2)", 1),
        ("raise SystemExit(1)", 1),
        ("os._exit(DONE if a else 3)", 1),
        ("sys.exit(main())", 0),
        ("sys.exit('a message')", 0),
        ("def main() -> int:\n return 2", 1),
        ("def main() -> int:\n return a or 2", 1),
        ("def main() -> int:\n if a:\n  return 1\n return DONE", 1),
        ("def main() -> bool:\n return False", 0),
        ("def count() -> float:\n return 1", 0),
    ],
)
def test_a_literal_exit_code_is_found(source, count):
    assert len(list(literal_exits(ast.parse(source), is_program=True))) == count
    outside = list(literal_exits(ast.parse(source), is_program=False))
    assert len(outside) == (count if "def" not in source else 0)


@pytest.mark.parametrize(
    ("source", "is_one"),
    [
        ("class A(ValueError): ...", True),
        ("class A(errors.UsageError): ...", True),
        ("class A(KeyboardInterrupt): ...", True),
        ("class A(NamedTuple): ...", False),
        ("class A: ...", False),
    ],
)
def test_an_exception_is_found(source, is_one):
    assert is_exception(ast.parse(source).body[0]) == is_one
