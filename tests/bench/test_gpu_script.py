"""bench/gpu.sh, the hour that nobody watches: whatever a step does, the others run and it is told.

The script is tested, not what it starts: its python is the stub of `tests/bench/gpu_script.py`.
"""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.bench.gpu_script import HOUR, RUNGS, SCRIPT, STEPS, TUNE, Hour, all_of
from tests.support.source_tree import ROOT


@pytest.mark.parametrize(
    ("plan", "variable"), [(HOUR, {}), (STEPS, {"STEPS": "1"}), (TUNE, {"TUNE": "1"})]
)
def test_all_is_well(tmp_path, plan, variable):
    hour = Hour(tmp_path, **variable)
    assert hour.wait() == 0, hour.printed
    assert list(hour.calls()) == list(plan), "in the order of their worth"
    assert hour.lines() == {name: f"written {name}" for name in all_of(plan)}
    assert hour.summary().endswith("missing: nothing\n")
    assert hour.printed.endswith(hour.summary())
    logs = [*hour.out.glob("gpu*.log"), *hour.out.glob("summary*.txt")]
    there = {str(f.relative_to(hour.out)) for f in hour.out.rglob("*") if f.is_file()}
    assert there == {*all_of(plan), *(log.name for log in logs)}


def check_one(hour, broken, state, exit_code=1):
    """All others are there; the broken step's files are told as `state`, a format of the name."""
    assert hour.wait() == exit_code, hour.printed
    assert list(hour.calls()) == list(HOUR), "a step that breaks ends no other"
    lines, missing = hour.lines(), HOUR[broken]
    for name in all_of(HOUR):
        if name in missing:
            assert re.fullmatch(state.format(name, broken), lines[name]), lines[name]
            assert not (hour.out / name).exists()
        else:
            assert lines[name] == f"written {name}"
            assert (hour.out / name).is_file()
    assert f"missing: {' '.join(missing)}; failed: {broken}\n" in hour.summary() + "\n"
    marks = set(list(hour.calls().values())[1:])
    assert marks == ({"the kernels' check did not pass before this"} if broken == "check" else {""})


def test_each_step_fails_in_turn(tmp_path):
    hours = {name: Hour(tmp_path / name, f"{name}=fail") for name in HOUR}
    for name, hour in hours.items():
        check_one(hour, name, r"failed {0}: {1} failed \(exit 1 after \d+ s\): {1} broke")


def test_each_step_hangs_in_turn(tmp_path):
    hours = {name: Hour(tmp_path / name, f"{name}=hang", TOTAL="24") for name in HOUR}
    for name, hour in hours.items():
        check_one(hour, name, r"failed {0}: {1} hung, ended after \d s: {1} waits")
        assert not hour.left_over()


def test_deaths_silence_and_what_clings(tmp_path):
    hours = {fault: Hour(tmp_path / fault, f"headline_4096={fault}", TOTAL="20")
             for fault in ("die", "silent", "cling", "partial")}  # fmt: skip
    check_one(hours["die"], "headline_4096", r"failed {0}: {1} failed \(exit 137 .*")
    check_one(hours["cling"], "headline_4096", r"failed {0}: {1} hung, ended after 4 s:.*")
    assert not hours["cling"].left_over(), "neither what ignores signals nor another session"
    assert hours["silent"].wait() == 1
    assert hours["silent"].lines()["headline_4096.json"].endswith("ended well without it")
    assert hours["partial"].wait() == 1
    said = r"written headline_4096.json, but headline_4096 failed \(exit 3 .*: .* broke late"
    assert re.fullmatch(said, hours["partial"].lines()["headline_4096.json"])
    assert hours["partial"].summary().endswith("missing: nothing; failed: headline_4096\n")


def test_everything_breaks_and_time_ends(tmp_path):
    faults = {fault: " ".join(f"{name}={fault}" for name in HOUR) for fault in ("fail", "hang")}
    fails, hangs = (Hour(tmp_path / f, words, TOTAL="12") for f, words in faults.items())
    without = Hour(tmp_path / "without", TOTAL="0")
    assert (fails.wait(), without.wait()) == (1, 1)
    assert list(fails.calls()) == list(HOUR)
    assert all(line.startswith("failed ") for line in fails.lines().values())
    assert f"missing: {' '.join(all_of(HOUR))}; failed: {' '.join(HOUR)}\n" in fails.summary()
    assert without.lines() == {name: f"not run {name}: out of time" for name in all_of(HOUR)}
    began = time.monotonic()
    assert hangs.wait() == 1
    assert time.monotonic() - began < 60
    for name, files in HOUR.items():
        for line in map(hangs.lines().get, files):
            assert "hung, ended" in line if name in hangs.calls() else "out of time" in line
    assert list(hangs.calls())[:3] == list(HOUR)[:3]


def test_stopped_from_outside(tmp_path):
    hours = {number: Hour(tmp_path / str(number), "ops=cling")
             for number in (signal.SIGTERM, signal.SIGKILL)}  # fmt: skip
    for number, hour in hours.items():
        deadline = time.monotonic() + 60
        while not hour.log.exists() or "ops" not in hour.calls():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        hour.process.send_signal(number)
        hour.process.stdout.close()
        code = hour.process.wait(timeout=60)
        lines = hour.lines()
        assert lines["headline_4096.json"] == "written headline_4096.json"
        assert lines["tests.xml"] == "not run tests.xml: not reached"
        if number == signal.SIGTERM:
            assert code == 143
            assert lines["ops.json"] == "failed ops.json: ops was stopped from outside"
            assert not hour.left_over()
        else:  # nothing can be done then, but what is known lies there already
            assert lines["ops.json"] == "running ops.json: ops"
            for process in hour.left_over():
                os.kill(process, signal.SIGKILL)


def test_files_of_an_earlier_run_are_not_this_ones(tmp_path):
    old = tmp_path / "out" / "headline_4096.json"
    old.parent.mkdir()
    old.write_text("{}")
    hour = Hour(tmp_path, "headline_4096=fail")
    assert hour.wait() == 1
    assert hour.lines()["headline_4096.json"].startswith("failed ")
    assert old.read_text() == "{}"


def test_a_smaller_gpu_and_one_that_is_not_there(tmp_path):
    small, none = Hour(tmp_path / "s", STUB_GIB="79"), Hour(tmp_path / "n", PYTHON="/bin/false")
    assert small.wait() == 0
    said = "not run headline_4096.json: the 30B model at full depth needs 130 GiB, this GPU has 79"
    assert small.lines()["headline_4096.json"] == said
    assert none.wait() == 3
    assert "no CUDA GPU" in none.printed
    assert not none.out.exists()


def test_a_bundle_is_one_file(tmp_path):
    hour = Hour(tmp_path, "ladder=partial", STEPS="1", BUNDLE="1")
    assert hour.wait() == 1
    assert {file.name for file in hour.out.iterdir()} == {
        "results.tar.gz", "summary_steps.txt", "gpu_steps.log"
    }  # fmt: skip
    listed = subprocess.run(
        ["tar", "-tzf", hour.out / "results.tar.gz"], capture_output=True, text=True, check=True
    )
    names = {name.removeprefix("./") for name in listed.stdout.split() if not name.endswith("/")}
    assert names == set(all_of(STEPS))


def test_every_file_that_it_names_is_there():
    text = SCRIPT.read_text(encoding="utf-8")
    folders = "tests|bench|config|qwen3_sft|monkey_patch"
    words = [w.rstrip(".") for w in re.findall(rf"(?<![\w./$])((?:{folders})/[\w./]+)", text)]
    made = ("bench/results", "bench/results/gpu")
    assert len(words) > 15
    assert [word for word in words if word not in made and not (ROOT / word).exists()] == []
    for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    is_marked = re.compile(r"pytest\.mark\.gpu\b")
    marked = [path for path in tests if is_marked.search(path.read_text(encoding="utf-8"))]
    named = [ROOT / word for word in words if word.startswith("tests/")]
    assert len(marked) > 5
    for path in marked:
        assert any(path == word or word in path.parents for word in named), path


def test_it_measures_what_is_recommended_and_the_whole_ladder(monkeypatch):
    """The headline keeps of each layer what the recipe of one GPU keeps."""
    text = SCRIPT.read_text(encoding="utf-8")
    full, selective = re.search(r'cut="full=(\d+),selective=(\d+)" rungs', text).groups()
    recipe = (ROOT / "config/recipe/qwen3_30b_a3b_1gpu.yaml").read_text(encoding="utf-8")
    assert f"full in {full} of 48 layers, selective in {selective} of 48 layers" in recipe
    monkeypatch.syspath_prepend(ROOT / "bench")
    from ladder import LADDER

    assert [rung.name for rung in LADDER] == list(RUNGS)


def test_its_limits_are_under_ten_minutes():
    text = SCRIPT.read_text(encoding="utf-8")
    limits = {
        name: int(seconds)
        for name, seconds in re.findall(r"^  (?:step|full_depth) (\w+) (\d+) ", text, re.MULTILINE)
    }
    for plan in (HOUR, STEPS, TUNE):
        spent = sum(limits[name] for name in plan)
        assert spent + 3 * len(plan) <= 585, "and a hung step has three seconds to end by itself"
