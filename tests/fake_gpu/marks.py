"""Which places are executed: each has a call put before it while its module is imported.

A tracer would see the same, and slow every Python function of torch down threefold.
"""

from __future__ import annotations

import ast
import builtins
from collections import defaultdict
from collections.abc import Iterable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from tests.fake_gpu.cuda_only import Place, place_of

MARK = "_cuda_only_place_"


def watch(places: Iterable[Place], root: Path) -> set[Place]:
    """Have modules that are imported from now on say which of their places they execute.

    Returns:
        The places executed so far, which grows.
    """
    numbered, executed = [*places], set()
    by_file: dict[str, dict[Place, int]] = defaultdict(dict)
    for number, place in enumerate(numbered):
        by_file[str(root / place.file)][place] = number
    setattr(builtins, MARK, lambda number: executed.add(numbered[number]))
    read = SourceFileLoader.get_code

    def get_code(loader: SourceFileLoader, name: str) -> Any:
        if (marks := by_file.get(loader.path)) is None:
            return read(loader, name)
        tree = ast.parse(Path(loader.path).read_text(encoding="utf-8"))
        marked = _Marks(str(Path(loader.path).relative_to(root)), marks).visit(tree)
        return compile(ast.fix_missing_locations(marked), loader.path, "exec")

    SourceFileLoader.get_code = get_code
    return executed


class _Marks(ast.NodeTransformer):
    """Puts the calls in; lines stay where they are."""

    def __init__(self, file: str, marks: dict[Place, int]) -> None:
        self._file, self._marks = file, marks

    def visit(self, node: ast.AST) -> Any:
        is_part = isinstance(node, ast.stmt | ast.expr)
        number = self._marks.get(place_of(self._file, node)) if is_part else None
        done: Any = self.generic_visit(node)
        if number is None:
            return done
        call = ast.Call(ast.Name(MARK, ast.Load()), [ast.Constant(number)], [])
        if isinstance(node, ast.stmt):
            return [ast.copy_location(ast.Expr(call), node), done]
        both = ast.Tuple([call, done], ast.Load())
        return ast.copy_location(ast.Subscript(both, ast.Constant(1), ast.Load()), node)
