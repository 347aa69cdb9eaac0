"""Imports go downward only, no import has an effect, and optional packages stay optional."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.support.source_tree import ROOT, imports_of, is_type_checking, modules, place, tree_of

# One line per wing or floor of wings, the highest first. A module may import from its own line, as
# long as no circle arises, and from the lines below.
LAYERS = (
    "cli",
    "commands",
    "launch",
    "train run dry_run build",
    "decisions start_checks",
    "training export",
    "checkpoints plan",
    "model optimizers",
    "data packing distributed demo",
    "chat options families records",
    "errors logs hardware",
)

MAY_IMPORT_MONKEY_PATCH = {
    "build", "decisions", "dry_run", "model.attention", "model.attention_trial", "model.fp8",
    "model.patches", "plan.planner", "run",
}  # fmt: skip
ARCHITECTURES = "monkey_patch.architectures"
COMPILED = "monkey_patch.compiled"  # torch.compile for all, and nothing of the patches
KERNELS_MAY_IMPORT = {"torch", "triton", "numpy"}
NEVER_AT_TOP_LEVEL = {"deepspeed", "liger_kernel", "flash_attn", "wandb"}

# What a module-level assignment may call: constructors of values that nothing else sees.
PURE_CALLS = {
    "logging.getLogger", "re.compile", "frozenset", "object", "map", "get_args", "tuple", "dict",
    "set", "sorted", "Path", "'|'.join", "_XML_HEAD.format", "_XML_TAIL.format",
    "functools.partial", "partial", "replace", "field", "TypeVar", "Path(__file__).with_name",
    "dataclasses.fields", "dict.fromkeys",
    "_at_least", "_one_of",  # options/values.py: rules
    "_no", "_ours", "_works", "JUDGED.items",  # options/judged_options.py: rows of the table
    "_REQUIRED.values", "_NAMES.items", "Fillers", "Reading", "Dropped",  # data: tables
}  # fmt: skip

RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}
SFT = {name: path for name, path in modules().items() if name.startswith("qwen3_sft.")}
PATCHES = {name: path for name, path in modules().items() if name.startswith("monkey_patch")}


def wing_of(name: str) -> str:
    """The folder, or the file beside the folders, that a module is in: `plan` of `plan.advice`."""
    return name.removeprefix("qwen3_sft.").split(".")[0]


def own_imports(name: str) -> list[tuple[str, ast.stmt]]:
    """The project's modules that one module imports."""
    return [(m, node) for m, node in imports_of(tree_of(modules()[name])) if m in modules()]


def test_every_wing_has_one_layer():
    listed = [name for names in LAYERS for name in names.split()]
    there = {wing_of(name) for name in SFT}
    assert len(listed) == len(set(listed)), "a wing stands in two lines of LAYERS"
    assert not there - set(listed), (
        f"new wings {sorted(there - set(listed))}: add each to a line of LAYERS in "
        f"{place(ROOT / 'tests/house/test_layering.py')}, the lowest that is above all it imports"
    )
    assert not set(listed) - there, f"LAYERS lists {sorted(set(listed) - there)}, which are gone"


@pytest.mark.parametrize("name", sorted(SFT))
def test_imports_go_downward(name):
    upward = [
        f"{place(SFT[name], node)} imports {imported}, which is above"
        for imported, node in own_imports(name)
        if imported in SFT and RANKS[wing_of(imported)] < RANKS[wing_of(name)]
    ]
    assert not upward, "\n".join(upward)


def test_no_circle():
    graph = {name: {imported for imported, _ in own_imports(name)} - {name} for name in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import one another in a circle: {' -> '.join(error.args[1])}")


def test_only_few_modules_know_the_patches():
    imports = [
        (name.removeprefix("qwen3_sft."), place(path, node))
        for name, path in SFT.items()
        for imported, node in imports_of(tree_of(path))
        if imported.split(".")[0] == "monkey_patch"
        # A family brings the names of its modules along; it knows nothing of the patches.
        and not (wing_of(name) == "families" and imported.startswith(ARCHITECTURES))
        and not imported.startswith(COMPILED)
    ]
    outside = [where for name, where in imports if name not in MAY_IMPORT_MONKEY_PATCH]
    assert not outside, f"only {sorted(MAY_IMPORT_MONKEY_PATCH)} import monkey_patch: {outside}"
    knowing = {name for name, _ in imports}
    assert knowing == MAY_IMPORT_MONKEY_PATCH, "permitted, and no longer needed"


def test_families_and_architectures_need_little():
    """Every wing and patch may ask them, and a new family is one file."""
    ours = (ARCHITECTURES, "qwen3_sft.families", "qwen3_sft.errors", "qwen3_sft.hardware")
    for name, path in modules().items():
        if name != ARCHITECTURES and wing_of(name) != "families":
            continue
        for imported, node in imports_of(tree_of(path), top_level_only=True):
            is_known = imported.split(".")[0] in sys.stdlib_module_names or imported == "qwen3_sft"
            assert is_known or imported.startswith(ours), f"{place(path, node)} imports {imported}"


@pytest.mark.parametrize("name", sorted(PATCHES))
def test_monkey_patch_stands_alone(name):
    """A patch uses the engine and the kernels; the kernels use torch and triton."""
    is_kernel = name.startswith("monkey_patch.kernels")
    for imported, node in imports_of(tree_of(PATCHES[name])):
        where, root = place(PATCHES[name], node), imported.split(".")[0]
        assert root not in ("qwen3_sft", "trl"), f"{where} imports {root}"
        if root == "monkey_patch":
            below = ("monkey_patch.kernels",)
            if not is_kernel:
                below += ("monkey_patch.core", "monkey_patch.fp8_selection", ARCHITECTURES)
                below += (COMPILED,)
            if name == "monkey_patch.experts_fp8":
                below += ("monkey_patch.scatter_moe",)
            if name == "monkey_patch.core":
                below = ()
            is_package = name == "monkey_patch" or imported == "monkey_patch"
            assert is_package or imported.startswith(below), f"{where} imports {imported}"
        elif is_kernel:
            allowed = KERNELS_MAY_IMPORT | sys.stdlib_module_names
            assert root in allowed, f"{where}: kernels may not import {root}"


@pytest.mark.parametrize("name", sorted(modules()))
def test_no_relative_and_no_optional_import_at_top_level(name):
    path = modules()[name]
    relative = [place(path, node) for m, node in imports_of(tree_of(path)) if m.startswith(".")]
    assert not relative, f"relative imports: {relative}"
    eager = [
        f"{place(path, node)} imports {imported}"
        for imported, node in imports_of(tree_of(path), top_level_only=True)
        if imported.split(".")[0] in NEVER_AT_TOP_LEVEL
    ]
    assert not eager, f"import inside the function that needs it: {eager}"


def _effect(node: ast.stmt) -> str | None:
    """What a module-level statement does beyond defining names, or None."""
    match node:
        case ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.ClassDef():
            return None
        case ast.Expr(value=ast.Constant(value=str())):
            return None
        # The rest of the definition of an operator of ours, in torch's registry.
        case ast.Expr(value=ast.Call(func=ast.Attribute(attr="register_autograd"))):
            return None
        case ast.If() if is_type_checking(node):
            return next((e for n in (*node.body, *node.orelse) if (e := _effect(n))), None)
        case ast.If() if ast.unparse(node.test) == "__name__ == '__main__'":
            return None
        case ast.Assign(targets=targets, value=value):
            return _assignment_effect(targets, value)
        case ast.AnnAssign(target=target, value=value):
            return _assignment_effect([target], value)
    return f"`{ast.unparse(node).splitlines()[0][:60]}` runs at import"


def _assignment_effect(targets: list[ast.expr], value: ast.expr | None) -> str | None:
    names = [t for target in targets for t in getattr(target, "elts", [target])]
    if not all(isinstance(name, ast.Name) for name in names):
        return f"`{ast.unparse(targets[0])} = ...` changes an object at import"
    for node in ast.walk(value) if value is not None else ():
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            is_class = called.split(".")[-1].lstrip("_")[:1].isupper()
            if not is_class and called not in PURE_CALLS:
                return f"`{called}(...)` runs at import (harmless? add it to PURE_CALLS)"
    return None


@pytest.mark.parametrize("name", sorted(modules()))
def test_module_level_only_defines(name):
    path = modules()[name]
    effects = [f"{place(path, n)}: {e}" for n in tree_of(path).body if (e := _effect(n))]
    assert not effects, "\n".join(effects)


@pytest.mark.parametrize(
    "statement",
    [
        "os.environ['A'] = '1'", "logging.basicConfig()", "x = logging.basicConfig()",
        "module.attribute = f", "for a in b: pass", "torch.set_num_threads(1)", "del x",
        "a, b.c = 1, 2", "if TYPE_CHECKING:\n import a\nelse:\n f()", "x += [1]",
    ],
)  # fmt: skip
def test_an_effect_is_found(statement):
    assert _effect(ast.parse(statement).body[0])


_SNAPSHOT = """
import hashlib, json, logging, os, sys
import torch, transformers, transformers.trainer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe
import accelerate, datasets, huggingface_hub, torchao, yaml

def state():
    classes = [c for c in vars(qwen3_moe).values() if isinstance(c, type)]
    attributes = sorted(f"{c.__name__}.{k}={id(v)}" for c in classes for k, v in vars(c).items())
    registries = (ALL_EXPERTS_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS, ALL_ATTENTION_FUNCTIONS)
    return {
        "environment": dict(os.environ),
        "registries": [sorted(registry.valid_keys()) for registry in registries],
        "model classes": hashlib.sha1(str(attributes).encode()).hexdigest(),
        "logging": [str(logging.root.handlers), logging.root.level],
        "torch": [str(torch.get_default_dtype()), torch.get_num_threads(),
                  torch.is_grad_enabled(), torch.initial_seed()],
        "optional packages": sorted({m.split(".")[0] for m in sys.modules} & set(OPTIONAL)),
    }

OPTIONAL = json.loads(sys.argv[1])
before = state()
for name in json.loads(sys.argv[2]):
    __import__(name)
after = state()
print(json.dumps({k: [before[k], after[k]] for k in before if before[k] != after[k]}))
"""


def test_importing_everything_changes_nothing():
    """What the syntax cannot show: environment, registries, classes, logging, torch's state."""
    lists = json.dumps(sorted(NEVER_AT_TOP_LEVEL)), json.dumps(sorted(modules()))
    command = [sys.executable, "-W", "ignore", "-c", _SNAPSHOT, *lists]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}
