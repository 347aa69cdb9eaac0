"""bench/gpu.sh with a python that is a stub: what it was asked for, and what became of it.

The stub writes the files that it is asked for and fails, hangs, dies or ends silently in the steps
named in STUB_FAULTS.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

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
