"""A ratchet: the public names of both packages stand in public_names.txt, each is documented.

`python -m tests.house.test_public_names` rewrites the list.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.source_tree import modules, place, tree_of

LIST = Path(__file__).with_name("public_names.txt")


def definitions(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """Functions, classes and UPPER_CASE constants at top level, without a leading underscore."""
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names = [name]
            case ast.ClassDef(name=name):
                names = [name]
            case ast.Assign(targets=targets):
                names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
                names = [name for name in names if name.isupper()]
            case ast.AnnAssign(target=ast.Name(id=name)):
                names = [name] if name.isupper() else []
            case _:
                continue
        yield from ((name, node) for name in names if not name.startswith("_"))


def public_names() -> list[str]:
    found = {
        f"{m}.{name}" for m, path in modules().items() for name, _ in definitions(tree_of(path))
    }
    return sorted(found)


def test_public_names_are_the_listed_ones():
    listed, found = LIST.read_text(encoding="utf-8").split(), public_names()
    lines = [f"+ {name}" for name in sorted(set(found) - set(listed))]
    lines += [f"- {name}" for name in sorted(set(listed) - set(found))]
    assert not lines, (
        "public names have changed:\n" + "\n".join(lines) + "\nIf that is meant, mention it in "
        "CHANGELOG.md and run `python -m tests.house.test_public_names`; else give the name an "
        "underscore"
    )
    assert listed == found, "the list is not sorted: run `python -m tests.house.test_public_names`"


@pytest.mark.parametrize("name", sorted(modules()))
def test_public_names_are_documented(name):
    path = modules()[name]
    tree = tree_of(path)
    assert ast.get_docstring(tree), f"{place(path)} has no docstring"
    documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    nodes = [node for _, node in definitions(tree) if isinstance(node, documented)]
    for owner in [node for node in nodes if isinstance(node, ast.ClassDef)]:
        nodes += [n for n in owner.body if isinstance(n, documented) and n.name[0] != "_"]
    silent = [f"{place(path, node)} {node.name}" for node in nodes if not ast.get_docstring(node)]
    assert not silent, f"no docstring: {silent}"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def f(): ...\nasync def g(): ...\nclass C: ...", ["f", "g", "C"]),
        ("A = 1\nB: int = 2\nC, D = 3, 4", ["A", "B", "C", "D"]),
        ("def _f(): ...\nclass _C: ...\n_A = 1\nlogger = 1", []),
        ("if x:\n    def f(): ...\nimport os\nfrom a import B", []),
    ],
)
def test_what_counts_as_public(source, names):
    assert [name for name, _ in definitions(ast.parse(source))] == names


if __name__ == "__main__":
    LIST.write_text("\n".join(public_names()) + "\n", encoding="utf-8")
    sys.stdout.write(f"{LIST}: {len(public_names())} names\n")
