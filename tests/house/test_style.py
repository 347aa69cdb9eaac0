"""Rules that ruff has no name for, over every Python file that is or would be tracked."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.source_tree import ROOT, place, project_files, tree_of

MAX_FUNCTION_LINES = 60

# Where any exception of a reporter or of a kernel has to become words: the whole purpose.
CATCHES_EVERYTHING = {
    "qwen3_sft/training/reporters.py": 1, "qwen3_sft/model/attention_trial.py": 1
}  # fmt: skip

FILES = [path for path in project_files(".py") if path.name != "setup.py"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def violations(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Yield (node, what is wrong with it)."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=func, keywords=keywords):
                if message := _bad_call(ast.unparse(func), keywords):
                    yield node, message
            case ast.ExceptHandler(type=kind, body=body):
                if kind is None or _catches_everything(kind):
                    yield node, "catches everything; name the exceptions that can be handled"
                elif _is_empty(body):
                    yield node, "swallows an error; handle it or let it pass"
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                lines = (node.end_lineno or 0) - node.lineno + 1 - _docstring_lines(node)
                if lines > MAX_FUNCTION_LINES:
                    yield (
                        node,
                        f"{node.name} has {lines} lines of code, at most {MAX_FUNCTION_LINES}",
                    )


def _bad_call(name: str, keywords: list[ast.keyword]) -> str | None:
    given = {k.arg: k.value for k in keywords}
    if name in ("exec", "eval", "builtins.exec", "builtins.eval"):
        return f"{name}() runs text as code"
    if name in ("importlib.reload", "reload"):
        return "a reloaded module exists twice"
    if name == "torch.load" and not _is_true(given.get("weights_only")):
        return "torch.load without weights_only=True runs code from the file"
    if "trust_remote_code" in given and not _is_false(given["trust_remote_code"]):
        return "trust_remote_code runs code from the hub"
    return None


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    if ast.get_docstring(node) is None:
        return 0
    return (node.body[0].end_lineno or 0) - node.body[0].lineno + 1


def _is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _catches_everything(kind: ast.expr) -> bool:
    names = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(ast.unparse(name) in ("Exception", "BaseException") for name in names)


def _is_empty(body: list[ast.stmt]) -> bool:
    is_ellipsis = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    return len(body) == 1 and (isinstance(body[0], ast.Pass) or is_ellipsis)


def test_files_are_found():
    assert {"qwen3_sft", "monkey_patch", "tests"} <= {p.relative_to(ROOT).parts[0] for p in FILES}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_rules(path):
    found = [f"{place(path, node)}: {message}" for node, message in violations(tree_of(path))]
    assert len(found) == CATCHES_EVERYTHING.get(name_of(path), 0), "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "exec('a')",
        "x = eval(y)",
        "importlib.reload(m)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "AutoModel.from_pretrained(m, trust_remote_code=True)",
        "AutoModel.from_pretrained(m, trust_remote_code=flag)",
        "try: f()\nexcept: g()",
        "try: f()\nexcept Exception as e: raise E from e",
        "try: f()\nexcept (KeyError, BaseException): g()",
        "try: f()\nexcept KeyError: pass",
        "try: f()\nexcept KeyError: ...",
        "def f():\n" + "    x = 1\n" * 60,
    ],
)
def test_a_violation_is_found(source):
    assert len(list(violations(ast.parse(source)))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "torch.load(f, weights_only=True)",
        "AutoModel.from_pretrained(m, trust_remote_code=False)",
        "try: f()\nexcept KeyError: g()",
        "try: f()\nexcept KeyError:\n    continue_ = 1",
        "def f():\n" + "    x = 1\n" * 59,
        "def f():\n    '''a\n\n\nb'''\n" + "    x = 1\n" * 59,
    ],
)
def test_what_is_fine_is_not_found(source):
    assert not list(violations(ast.parse(source)))
