"""Which places of the code only a CUDA device reaches, read off the code itself.

A place is a statement, the head of a compound one, an arm of a conditional expression or the rest
of an `and` or `or`. It is CUDA-only if a question about CUDA decides that it runs, if it calls into
`torch.cuda`, or if it stands in a function that only such places name.
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# What any machine may be asked.
_QUESTIONS = ("is_available", "device_count")
_ENDS = (ast.Return, ast.Raise, ast.Continue, ast.Break)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, order=True)
class Place:
    """A stretch of a file, ends included as `ast` counts them: lines from 1, columns from 0."""

    file: str
    line: int
    column: int
    end_line: int
    end_column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def cuda_only_places(sources: Mapping[str, str]) -> list[Place]:
    """Return the places of all files, in order.

    Args:
        sources: text by file.
    """
    trees = {file: ast.parse(text) for file, text in sources.items()}
    everywhere: Counter[str] = Counter()
    functions = defaultdict(list)
    for file, tree in trees.items():
        nodes = list(ast.walk(tree))
        everywhere.update(_names(nodes))
        for node in nodes:
            if isinstance(node, _FUNCTIONS):
                functions[node.name].append((file, node))
    found: dict[str, set[ast.AST]] = {}
    reached: set[ast.AST] = set()  # functions that only CUDA-only places name
    changed = {file for file, text in sources.items() if "cuda" in text or '"cpu"' in text}
    while changed:
        found |= {file: _Finder(trees[file], reached).nodes for file in changed}
        there = Counter(name for nodes in found.values() for name in _names(_inside(nodes)))
        grown = [
            (file, node)
            for name, count in there.items() if count == everywhere[name]
            for file, node in functions[name] if node not in reached
        ]  # fmt: skip
        reached.update(node for _, node in grown)
        changed = {file for file, _ in grown}
    return sorted({place_of(file, node) for file, nodes in found.items() for node in nodes})


def _inside(nodes: Iterable[ast.AST]) -> set[ast.AST]:
    heads = (head for n in nodes for head in (_heads(n) if isinstance(n, ast.stmt) else (n,)))
    return {part for head in heads for part in ast.walk(head)}


def _names(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Yield every name and attribute that is read."""
    for node in nodes:
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.id if isinstance(node, ast.Name) else node.attr


def place_of(file: str, node: ast.AST) -> Place:
    """Return where a statement or an expression stands."""
    ends: list[Any] = [node]
    if isinstance(node, ast.stmt) and getattr(node, "body", None):  # its head alone
        ends = list(_heads(node)) or ends
    first, last = ends[0], ends[-1]
    return Place(file, first.lineno, first.col_offset, last.end_lineno, last.end_col_offset)


class _Finder:
    """Walks a module; `nodes` are its CUDA-only statements and expressions."""

    def __init__(self, tree: ast.Module, reached: set[ast.AST]) -> None:
        self.nodes: set[ast.AST] = set()
        self._reached = reached
        self._answers = {
            node.name: node.body[-1].value
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and _is_one_return(node)
        }
        self._block(tree.body, False, {})

    def _block(self, body: list[ast.stmt], is_cuda: bool, names: dict[str, ast.expr]) -> None:
        for node in body:
            arms = {arm for head in _heads(node) for arm in self._arms(head, names)}
            if is_cuda or _calls_cuda(node, arms):
                self._add(node)
            self.nodes |= arms
            if isinstance(node, _FUNCTIONS):
                self._block(node.body, is_cuda or node in self._reached, dict(names))
            elif isinstance(node, ast.If):
                self._if(node, is_cuda, names)
                is_cuda = is_cuda or (_ends(node.body) and self._implies(node.test, False, names))
                is_cuda = is_cuda or (_ends(node.orelse) and self._implies(node.test, True, names))
            else:
                for part in _bodies(node):
                    self._block(part, is_cuda, names)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                names[node.targets[0].id] = node.value

    def _if(self, node: ast.If, is_cuda: bool, names: dict[str, ast.expr]) -> None:
        for body, truth in ((node.body, True), (node.orelse, False)):
            if is_cuda and self._implies(node.test, not truth, names):
                continue  # for a CPU, in a function that a CPU does not reach
            self._block(body, is_cuda or self._implies(node.test, truth, names), dict(names))

    def _arms(self, head: ast.AST, names: dict[str, ast.expr]) -> Iterator[ast.AST]:
        """Yield the parts of an expression that only CUDA evaluates."""
        for node in ast.walk(head):
            if isinstance(node, ast.IfExp):
                for arm, truth in ((node.body, True), (node.orelse, False)):
                    if self._implies(node.test, truth, names):
                        yield arm
            elif isinstance(node, ast.BoolOp):
                truth = isinstance(node.op, ast.And)
                decided = [self._implies(value, truth, names) for value in node.values[:-1]]
                if True in decided:
                    yield from node.values[decided.index(True) + 1 :]

    def _add(self, node: ast.stmt) -> None:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not is_text and not isinstance(node, ast.Pass | ast.Global | ast.Nonlocal | ast.Try):
            self.nodes.add(node)

    def _implies(self, test: ast.AST, truth: bool, names: Mapping[str, ast.expr]) -> bool:
        """Whether a test that comes out as `truth` means that this is CUDA."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return self._implies(test.operand, not truth, names)
        if isinstance(test, ast.NamedExpr):
            return self._implies(test.value, truth, names)
        if isinstance(test, ast.BoolOp):
            every = all if isinstance(test.op, ast.And) != truth else any
            return every(self._implies(value, truth, names) for value in test.values)
        if isinstance(test, ast.Name) and test.id in names:
            rest = {name: value for name, value in names.items() if name != test.id}
            return self._implies(names[test.id], truth, rest)
        if isinstance(test, ast.Call) and isinstance(test.func, ast.Name):
            answer = self._answers.get(test.func.id)
            return answer is not None and self._implies(answer, truth, {})
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            return _compares(test, truth)
        return truth and _asks(test)


def _asks(test: ast.AST) -> bool:
    if isinstance(test, ast.Call):
        name = _of_cuda(test)
        return name is not None and name in _QUESTIONS
    return isinstance(test, ast.Attribute) and test.attr == "is_cuda"


def _compares(test: ast.Compare, truth: bool) -> bool:
    """`device == "cuda"`, and the two kinds of devices that are supported told by the other."""
    if not isinstance(test.ops[0], ast.Eq | ast.NotEq):
        return False
    is_equal = isinstance(test.ops[0], ast.Eq) == truth
    sides = (test.left, *test.comparators)
    named = {side.value for side in sides if isinstance(side, ast.Constant)}
    is_type = any(isinstance(side, ast.Attribute) and side.attr == "type" for side in sides)
    return "cuda" in named if is_equal else "cpu" in named and is_type


def _calls_cuda(node: ast.stmt, but_in: set[ast.AST]) -> bool:
    """Whether a statement calls into torch.cuda other than in these of its parts."""
    waiting = [head for head in _heads(node) if head not in but_in]
    while waiting:
        part = waiting.pop()
        if isinstance(part, ast.Call) and (_of_cuda(part) or "is_available") not in _QUESTIONS:
            return True
        waiting += [child for child in ast.iter_child_nodes(part) if child not in but_in]
    return False


def _of_cuda(call: ast.Call) -> str | None:
    """`synchronize` of `torch.cuda.synchronize()`."""
    match call.func:
        case ast.Attribute(ast.Attribute(ast.Name("torch"), "cuda"), name):
            return name
    return None


def _is_one_return(node: ast.FunctionDef) -> bool:
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return len(body) == 1 and isinstance(body[0], ast.Return) and body[0].value is not None


def _ends(body: list[ast.stmt]) -> bool:
    return bool(body) and isinstance(body[-1], _ENDS)


def _bodies(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        if isinstance(part := getattr(node, name, None), list):
            yield part
    for part in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
        yield part.body


def _heads(node: ast.stmt) -> Iterator[ast.AST]:
    """What of a statement is not another statement's: all of a simple one."""
    if not hasattr(node, "body"):
        yield node
        return
    for name in ("test", "subject", "target", "iter", "items", "args", "bases", "returns"):
        part = getattr(node, name, None)
        for expression in part if isinstance(part, list) else [part]:
            if isinstance(expression, ast.withitem):
                yield expression.context_expr
            elif isinstance(expression, ast.expr):
                yield expression
