"""Which functions of torch and others our code calls, how, and what each version takes.

`python -m tests.house.called_signatures` writes the table of the installed versions; a test
compares every call with every table. Calls of methods are not seen: their objects are not known
before the code runs.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "tests" / "house" / "signatures"
SOURCES = ("qwen3_sft", "monkey_patch", "bench")
PACKAGES = ("torch", "triton", "torchao", "liger_kernel", "transformers", "accelerate")
_Kind = inspect.Parameter
# What torch's functions that make tensors take in Python beside their schemas.
_OF_TENSORS = ("device", "dtype", "layout", "out", "pin_memory", "requires_grad")


@dataclass(frozen=True)
class Call:
    """A call in our code.

    Attributes:
        place: FILE:LINE.
        name: dotted, as it is imported.
        positional: number of arguments without a name.
        keywords: names of the others.
        is_open: whether * or ** hides some.
    """

    place: str
    name: str
    positional: int
    keywords: tuple[str, ...]
    is_open: bool


def calls() -> Iterator[Call]:
    """Yield every call into `PACKAGES` whose function is named by an import."""
    for source in SOURCES:
        for path in sorted((ROOT / source).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = _imported(tree)
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and (name := _dotted(node.func, names)):
                    yield Call(
                        f"{path.relative_to(ROOT)}:{node.lineno}",
                        name,
                        sum(not isinstance(word, ast.Starred) for word in node.args),
                        tuple(word.arg for word in node.keywords if word.arg),
                        any(isinstance(word, ast.Starred) for word in node.args)
                        or any(word.arg is None for word in node.keywords),
                    )


def table() -> dict[str, Any]:
    """Return what the installed versions take, by the name of each function that is called.

    An entry is None where the function has no signature to ask for, "missing" where it is not
    there, else its parameters' names, how many may come without a name (None: any number), and
    whether it takes names beside these.
    """
    return {name: _signature(name) for name in sorted({call.name for call in calls()})}


def problems(call: Call, taken: dict[str, Any]) -> list[str]:
    """Return what is wrong with a call by a table, in words."""
    entry = taken.get(call.name, "not in the table: run `make oldest`, then this module")
    if entry is None:
        return []
    if isinstance(entry, str):
        return [entry]
    found = []
    if not entry["any"]:
        found += [f"has no argument {key}" for key in call.keywords if key not in entry["names"]]
    if entry["positional"] is not None and call.positional > entry["positional"]:
        found.append(f"takes {entry['positional']} arguments without names")
    return found


def _imported(tree: ast.AST) -> dict[str, str]:
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.split(".")[0]
                names[bound] = alias.name if alias.asname else bound
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return {key: name for key, name in names.items() if name.split(".")[0] in PACKAGES}


def _dotted(node: ast.expr, names: dict[str, str]) -> str | None:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in names:
        return None
    return ".".join([names[node.id], *reversed(parts)])


def _signature(name: str) -> Any:
    try:
        function = _find(name)
    except (ImportError, AttributeError):
        return "missing"
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return _schemas(name.rpartition(".")[2])
    kinds = [parameter.kind for parameter in parameters]
    free = sum(k in (_Kind.POSITIONAL_ONLY, _Kind.POSITIONAL_OR_KEYWORD) for k in kinds)
    takes_any = _Kind.VAR_KEYWORD in kinds
    # Nothing but **kwargs is what a decorator of transformers' says of anything.
    is_free = _Kind.VAR_POSITIONAL in kinds or (takes_any and not free)
    return {
        "names": [p.name for p in parameters if p.kind is not _Kind.POSITIONAL_ONLY],
        "positional": None if is_free else free,
        "any": takes_any,
    }


def _schemas(name: str) -> dict[str, Any] | None:
    """Return the names that the overloads of torch's own operators take, None of what is none."""
    import torch

    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}")
    names = {argument.name for schema in schemas for argument in schema.arguments}
    if not names:
        return None
    return {"names": sorted({*names, *_OF_TENSORS}), "positional": None, "any": False}


def _find(name: str) -> Any:
    """Return what a dotted name stands for; its longest part that is a module is imported."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if not ".".join(parts[:end]).startswith(str(error.name)):
                raise
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def main() -> None:
    """Write the table."""
    TABLES.mkdir(exist_ok=True)
    path = TABLES / f"torch-{version('torch').split('+')[0]}.json"
    versions = {package: version(package.replace("_", "-")) for package in PACKAGES}
    content = {"versions": versions, "python": sys.version.split()[0], "signatures": table()}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
