"""`bench/gpu.sh --fake`: the same steps at tiny size on a CPU, and what is asked for in them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.bench.gpu_script import HOUR, RUNGS, SCRIPT, STEPS, TUNE, Hour, all_of
from tests.support.source_tree import ROOT


@pytest.mark.parametrize("out", ["bench/results", "bench/results/gpu", "bench/../bench/results/x"])
def test_a_fake_is_not_kept_with_measurements(tmp_path, out):
    hour = Hour(tmp_path, "", "--fake", OUT=out)
    assert hour.wait() == 2
    assert "--fake needs OUT=FOLDER" in hour.printed
    assert not hour.log.exists()
    assert not (ROOT / out / "fake").exists()


def test_a_fake_by_default_is_refused_and_so_is_what_is_no_argument(tmp_path):
    command = ["env", "-u", "OUT", "bash", SCRIPT, "--fake"]
    assert subprocess.run(command, capture_output=True).returncode == 2
    assert Hour(tmp_path, "", "--fast").wait() == 2


@pytest.mark.parametrize("variable", ["HOUR", "STEPS"])
@pytest.mark.parametrize("fake", [(), ("--fake",)])
def test_a_run_takes_the_options_of_its_steps(tmp_path, monkeypatch, variable, fake):
    """Those of the 30B model and those of a CPU: parsed, and resolved as a run would do it."""
    hour = Hour(tmp_path, "", *fake, **{variable: "1"})
    assert hour.wait() == 0, hour.printed
    monkeypatch.syspath_prepend(ROOT / "bench")
    step, ladder, seen = import_module("step"), import_module("ladder"), []

    def note(rows):
        seen.extend(rows.values())
        yield {"results": []}

    def climb(options, names, folder, seconds):
        seen.extend(chosen for rung, chosen in ladder.ladder(options) if rung.name in names)
        return []

    monkeypatch.setattr(step, "report", note)
    monkeypatch.setattr(ladder, "climb", climb)
    modules = {"bench/step.py": step, "bench/ladder.py": ladder}
    for name in hour.calls():
        script, *words = hour.log.with_name(f"calls.{name}").read_text().split("\0")[:-1]
        if script in modules:
            modules[script].main(words)
    assert {one.model for one in seen} == {"demo" if fake else "30b"}
    resolve = import_module("parts.step.measure").resolve
    for one in seen:
        resolve(one, tmp_path)
    assert len(seen) == {"HOUR": 1, "STEPS": 3 + 2 + (2 if fake else len(RUNGS))}[variable]


def fake(folder, **environment):
    """Run `--fake` with this Python; return its folder of results."""
    hour = Hour(folder, "", "--fake", PYTHON=sys.executable, TOTAL="1800", OMP_NUM_THREADS="1",
                **environment)  # fmt: skip
    printed, _ = hour.process.communicate(timeout=1500)
    assert hour.process.returncode == 0, printed
    assert "missing: nothing" in printed
    assert {path.name for path in hour.out.iterdir()} == {"fake"}
    return hour.out / "fake"


def marks(folder):
    """The mark of each result file."""
    found = {}
    for file in sorted(folder.rglob("*")):
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        if file.suffix == ".json" and file.name != "tiles.json":
            found[file.name] = json.loads(text)["mark"]
        elif file.suffix in (".xml", ".md"):
            found[file.name] = re.search('fake: [^"*]+', text)[0]
    return found


@pytest.mark.long
@pytest.mark.parametrize("part", ["HOUR", "STEPS", "TUNE"])
def test_the_whole_hour_on_a_cpu(tmp_path, part):
    found = marks(fake(tmp_path, **({part: "1"} if part != "HOUR" else {})))
    wanted = {"HOUR": HOUR, "STEPS": STEPS, "TUNE": TUNE}[part]
    left_out = ("fp8_measured.json", "tiles.json")
    names = {Path(name).name for name in all_of(wanted)} - set(left_out)
    assert set(found) >= names - {f"{name}.json" for name in RUNGS}
    assert all(mark.startswith("fake: ") for mark in found.values())
