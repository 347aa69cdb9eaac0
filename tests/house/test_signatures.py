"""Our calls into torch, Triton and others against every version that setup.py promises."""

import json

import pytest

from tests.house.called_signatures import TABLES, Call, calls, problems

FILES = sorted(TABLES.glob("torch-*.json"))


def test_the_oldest_and_the_pinned_versions_have_a_table():
    assert [file.stem for file in FILES] == ["torch-2.11.0", "torch-2.13.0"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_call_is_taken(file):
    taken = json.loads(file.read_text())["signatures"]
    found = [
        f"{call.place} {call.name}: {problem}"
        for call in calls()
        for problem in problems(call, taken)
    ]
    assert not found, "\n".join(found)


def test_what_an_old_version_does_not_take_is_found():
    taken = {
        "torch.compile": {"names": ["model", "fullgraph"], "positional": 1, "any": False},
        "torch.new": "missing", "torch.zeros": None,
        "triton.jit": {"names": ["fn"], "positional": None, "any": True},
    }  # fmt: skip

    def of(name, *keywords, positional=0):
        return problems(Call("f:1", name, positional, keywords, is_open=False), taken)

    assert of("torch.compile", "fullgraph", positional=1) == []
    assert of("torch.compile", "recompile_limit") == ["has no argument recompile_limit"]
    assert of("torch.compile", positional=2) == ["takes 1 arguments without names"]
    assert of("torch.new") == ["missing"]
    assert of("torch.zeros", "anything") == []
    assert of("triton.jit", "anything", positional=9) == []
    assert of("torch.unheard")[0].startswith("not in the table")
