"""bench/gpu.sh, the hour that nobody watches: whatever a step does, the others run and it is told.

The script is tested, not what it starts: its python is a stub that writes the files it is asked for
and fails, hangs, dies or ends silently in the steps named in STUB_FAULTS.
"""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from tests.support.source_tree import ROOT

SCRIPT = ROOT / "bench" / "gpu.sh"
# By part: its steps in their order, with the files that each is to write.
RUNGS = ("baseline", "liger", "packing", "scatter_moe", "router", "selective", "compile",
         "attention", "fp8")  # fmt: skip
HOUR = {
    "check": ["check.xml"], "headline_4096": ["headline_4096.json"],
    "ops": ["ops.json", "ops.md"], "tests": ["tests.xml"], "demo_run": ["demo_run.json"],
}  # fmt: skip
STEPS = {
    "check": ["check.xml"], "headline_packed": ["headline_packed.json"],
    "headline_32k": ["headline_32k.json"], "headline_128k": ["headline_128k.json"],
    "ladder": [f"ladder/{name}.json" for name in RUNGS],
    "fp8": ["fp8.json", "fp8_measured.json"], "step_breakdown": ["step_breakdown.json"],
}  # fmt: skip
TUNE = {"check": ["check.xml"], "tune": ["tune_scatter_moe.json", "tiles.json"]}
STUB = r"""#!/usr/bin/env bash
case "$1" in
  -c) if [[ "$2" == *mem_get_info* ]]; then echo "${STUB_GIB:-139}"; fi; exit 0 ;;
  -) cat >/dev/null; exit 0 ;;
esac
name="${BENCH_STEP##*/}"
echo "$name $BENCH_MARK" >>"$STUB_LOG"
printf '%s\0' "$@" >"$STUB_LOG.$name"
paths=() rows=() option=""
for word in "$@"; do
  case "$word" in --*) option="$word"; continue ;; esac
  case "$option" in
    --out | --table | --write | --junitxml) paths+=("$word"); option="" ;;
    --folder) folder="$word"; option="" ;;
    --rows) rows+=("$word") ;;
  esac
done
if [[ "$1" == *ladder.py ]]; then
  for row in "${rows[@]}"; do paths+=("$folder/$row.json"); done
fi
make_files() {
  for path in "${paths[@]}"; do
    mkdir -p "$(dirname "$path")"
    echo "$name" >"$path"
  done
}
for fault in $STUB_FAULTS; do
  if [ "${fault%=*}" != "$name" ]; then continue; fi
  case "${fault#*=}" in
    fail) echo "$name broke"; echo; exit 1 ;;
    partial) make_files; echo "$name broke late"; exit 3 ;;
    silent) exit 0 ;;
    die) kill -KILL $$ ;;
    hang) echo "$name waits"; exec sleep 600 ;;
    cling) trap '' INT TERM; setsid sleep 600 & while :; do sleep 600; done ;;
  esac
done
make_files
"""


class Hour:
    """One run of the script in the background, with the stub."""

    def __init__(self, folder: Path, faults: str = "", *arguments: str, **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stub = folder / "python"
        stub.write_text(STUB, encoding="utf-8")
        stub.chmod(0o755)
        self.out, self.log = folder / "out", folder / "calls"
        hidden = ("STEPS", "TUNE", "BUNDLE", "TOTAL", "BENCH_MARK")
        inherited = {k: v for k, v in os.environ.items() if k not in hidden}
        own = {"PYTHON": str(stub), "OUT": str(self.out), "STUB_LOG": str(self.log),
               "STUB_FAULTS": faults, "TOTAL": "585"}  # fmt: skip
        self.process = subprocess.Popen(
            ["bash", SCRIPT, *arguments], env=inherited | own | environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def wait(self) -> int:
        self.printed, _ = self.process.communicate(timeout=120)
        return self.process.returncode

    def summary(self) -> str:
        (file,) = self.out.glob("summary*.txt")
        return file.read_text(encoding="utf-8")

    def lines(self) -> dict[str, str]:
        """What the summary says of each file."""
        lines = [line.split(maxsplit=1) for line in self.summary().splitlines()[1:]]
        said = {"written", "failed", "running", "not"}
        pairs = [(rest.removeprefix("run").strip(), f"{word} {rest}") for word, rest in lines
                 if word in said]  # fmt: skip
        return {re.split("[:,]", name)[0]: " ".join(line.split()) for name, line in pairs}

    def calls(self) -> dict[str, str]:
        """The steps that began, in their order, each with the mark that it was given."""
        calls = [line.partition(" ") for line in self.log.read_text().splitlines()]
        return {name: mark for name, _, mark in calls if name != "compiling"}

    def left_over(self) -> list[int]:
        """The processes that the run has left."""
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"STUB_LOG={self.log}\0".encode() in environ.read_bytes():
                    found.append(int(environ.parent.name))
            except OSError:  # gone, or not ours
                continue
        return found


def all_of(plan):
    return [name for files in plan.values() for name in files]


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
