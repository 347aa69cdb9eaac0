"""Every CUDA-only place of the code is executed without a GPU, or named with the reason why not.

`python -m tests.invariant.test_cuda_only` runs the exercises of tests/fake_gpu and writes the table
of docs/cuda_only.md.
"""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.fake_gpu.cuda_only import cuda_only_places
from tests.fake_gpu.marks import MARK, watch
from tests.support.source_tree import ROOT

DOCUMENT = ROOT / "docs" / "cuda_only.md"
LEAST = 0.9

# source of a place that is not executed -> why
REASONS: dict[str, str] = {}


def run_exercises(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.fake_gpu", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "executed.json").read_text(encoding="utf-8"))


def document(found: dict[str, Any]) -> str:
    """The page's text behind its first paragraphs."""
    files = {place: place.split(":")[0] for place in found}
    everything = Counter(files.values())
    executed = Counter(files[place] for place, facts in found.items() if facts["executed"])
    total = sum(executed.values())
    rows = [f"| `{file}` | {count} | {executed[file]} |" for file, count in everything.items()]
    missing = [
        f"- `{files[place]}`: `{facts['source']}`: {REASONS[facts['source']]}"
        for place, facts in found.items() if not facts["executed"]
    ]  # fmt: skip
    return "\n".join(
        [
            f"**{total} of {len(found)} places are executed ({total / len(found):.0%}).**", "",
            "| file | places | executed |", "|---|---|---|", *rows, "",
            "Not executed:" if missing else "None is left out.", *missing, "",
        ]
    )  # fmt: skip


@pytest.mark.skipif(torch.version.cuda is not None, reason="the stand-in is for a torch of CPUs")
def test_places_are_executed_and_the_page_says_how_many(tmp_path):
    found = run_exercises(tmp_path)
    missing = [
        f"{place} {facts['source']}" for place, facts in found.items() if not facts["executed"]
    ]
    assert len(missing) <= (1 - LEAST) * len(found), missing
    unexplained = [line for line in missing if line.split(" ", 1)[1] not in REASONS]
    assert not unexplained, "execute it in tests/fake_gpu, or say in REASONS why that is impossible"
    said = DOCUMENT.read_text(encoding="utf-8")
    assert said.endswith(document(found)), "python -m tests.invariant.test_cuda_only"


MADE_UP = {
    "questions.py": """
        import torch
        def f(x, device, n):
            if x.is_cuda and n:
                both()
            else:
                not_known()
            if not x.is_cuda:
                return on_cpu()
            rest()
        def g(x, device):
            is_cuda = device.type == "cuda"
            size = on_gpu if is_cuda else on_cpu
            if device.type == "cpu":
                on_cpu()
            else:
                on_gpu()
            return is_cuda and or_not
        def h(device):
            if device != "cuda":
                raise ValueError
            '''Said, not executed.'''
            with on_gpu():
                inside()
        def unguarded(x):
            '''A docstring.'''
            torch.cuda.synchronize()
            torch.cuda.is_available()
            peak = torch.cuda.peak() if x.is_cuda else None
    """,
    "answers.py": """
        import torch
        def _is_half(device, dtype):
            return device.type == "cuda" and dtype
        def f(device, dtype):
            half = _is_half(device, dtype)
            if not half:
                return on_cpu()
            gpus = torch.cuda.device_count()
            if gpus:
                return helper()
        def helper():
            return deeper()
        def deeper():
            return torch
        def shared():
            return 1
        def other():
            shared()
    """,
}
EXPECTED = {
    "questions.py": [
        "n", "both()", "rest()", "on_gpu", "on_gpu()", "or_not", "on_gpu()", "inside()",
        "torch.cuda.synchronize()", "torch.cuda.peak()",
    ],
    "answers.py": [
        "dtype", "gpus = torch.cuda.device_count()", "gpus", "return helper()", "return deeper()",
        "return torch",
    ],
}  # fmt: skip


def written(place, text):
    return text.splitlines()[place.line - 1][place.column : place.end_column]


def test_what_is_cuda_only():
    sources = {file: textwrap.dedent(text).lstrip() for file, text in MADE_UP.items()}
    found: dict[str, list[str]] = {file: [] for file in sources}
    for place in cuda_only_places(sources):
        found[place.file].append(written(place, sources[place.file]))
    assert found == EXPECTED


def test_a_mark_says_what_was_executed(monkeypatch, tmp_path):
    source = "def f(x):\n    return (1 if x.is_cuda else 2) + (0 if not x.is_cuda else 3)\n"
    file = tmp_path / "made_up.py"
    file.write_text(source, encoding="utf-8")
    monkeypatch.setattr(SourceFileLoader, "get_code", SourceFileLoader.get_code)
    monkeypatch.setattr(builtins, MARK, None, raising=False)
    executed = watch(cuda_only_places({file.name: source}), tmp_path)
    spec = spec_from_file_location("made_up", file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.f(torch.empty(0)) == 2 + 0
    assert not executed
    assert module.f(SimpleNamespace(is_cuda=True)) == 1 + 3
    assert sorted(written(place, source) for place in executed) == ["1", "3"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = run_exercises(Path(folder))
    heading, _, _ = DOCUMENT.read_text(encoding="utf-8").partition("**")
    DOCUMENT.write_text(heading + document(found), encoding="utf-8")


if __name__ == "__main__":
    main()
