"""Our own code loads nothing that runs (pickles, a model's code, text) and prints no secrets."""

import ast

import pytest

from tests.support.source_tree import ROOT, place, project_files, tree_of

FORBIDDEN_CALLS = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec", "os.system", "os.popen",
    "torch.jit.load", "torch.hub.load", "yaml.unsafe_load", "yaml.full_load", "marshal.loads",
    "shelve.open", "importlib.reload", "joblib.load",
}  # fmt: skip


def _faults(call: ast.Call):
    function = ast.unparse(call.func)
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
    if function in FORBIDDEN_CALLS or function.endswith("register_for_checkpointing"):
        yield f"calls {function}"
    if function == "torch.load" and given.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if function == "yaml.load" and "_UniqueKeys" not in ast.unparse(call):  # a SafeLoader
        yield "yaml.load"
    for name, fine in (
        ("trust_remote_code", "False"),
        ("shell", "False"),
        ("allow_pickle", "False"),
    ):
        if given.get(name, fine) != fine:
            yield f"{name}={given[name]}"
    is_auto = function.startswith("Auto") and function.endswith(".from_pretrained")
    if is_auto and given.get("trust_remote_code") != "False":
        yield f"{function} without trust_remote_code=False"


def test_our_own_code_loads_nothing_that_runs():
    found = [
        f"{place(path, node)}: {fault}"
        for path in project_files(".py")
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] != "tests"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call)
        for fault in _faults(node)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(f)", "torch.load(f, weights_only=False)", "pickle.load(f)", "eval(x)",
        "AutoConfig.from_pretrained(f)", "run(c, shell=True)", "np.load(f, allow_pickle=True)",
        "M.from_pretrained(f, trust_remote_code=True)", "yaml.load(t, yaml.Loader)",
        "accelerator.register_for_checkpointing(x)",
    ],
)  # fmt: skip
def test_what_would_run_code_is_found(code):
    assert list(_faults(ast.parse(code, mode="eval").body))


def test_every_printed_command_is_masked():
    printed = [
        place(path, node)
        for path in project_files(".py")
        if path.is_relative_to(ROOT / "qwen3_sft")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "shlex.join"
        and not ast.unparse(node.args[0]).startswith("masked(")
    ]  # fmt: skip
    assert not printed
