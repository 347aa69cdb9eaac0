"""The project's own files and their syntax trees, for the tests that read source code."""

from __future__ import annotations

import ast
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("qwen3_sft", "monkey_patch")


@functools.cache
def project_files(*suffixes: str) -> tuple[Path, ...]:
    """Files that git tracks or would add, with one of the suffixes; generated ones are ignored.

    Without git (a downloaded archive) every file outside hidden folders and `runs` counts.
    """
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        names = {Path(name) for name in listed.stdout.split("\0") if name}
    else:
        found = (path.relative_to(ROOT) for path in ROOT.rglob("*"))
        names = {n for n in found if n.parts[0] != "runs" and not n.parts[0].startswith(".")}
    paths = (ROOT / name for name in sorted(names))
    return tuple(path for path in paths if path.suffix in suffixes and path.is_file())


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def place(path: Path, node: ast.AST | None = None) -> str:
    """`folder/file.py:12`, clickable in a terminal."""
    line = f":{node.lineno}" if isinstance(node, ast.stmt | ast.expr | ast.excepthandler) else ""
    return f"{path.relative_to(ROOT)}{line}"


@functools.cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, of every module of the two packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_type_checking(node: ast.AST) -> TypeGuard[ast.If]:
    return isinstance(node, ast.If) and ast.unparse(node.test) in (
        "TYPE_CHECKING",
        "typing.TYPE_CHECKING",
    )


def imports_of(tree: ast.Module, *, top_level_only: bool = False) -> Iterator[tuple[str, ast.stmt]]:
    """Every imported dotted name with its statement; what only type checkers see is left out.

    `from package import name` yields both `package` and `package.name`, because either may be
    the module that is meant.
    """
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)
        elif top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        elif is_type_checking(node):
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)
