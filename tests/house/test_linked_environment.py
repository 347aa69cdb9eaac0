"""A `.venv` that is a link belongs to another clone: nothing is installed into it unasked."""

import os
import shutil
import subprocess

from tests.support.source_tree import ROOT


def test_the_environment_behind_a_link_is_left_alone(tmp_path):
    clone, other = tmp_path / "clone", tmp_path / "other"
    clone.mkdir()
    for name in ("qwen3_sft.sh", "environment.sh", "constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, clone)
    (other / "bin").mkdir(parents=True)
    python, log = other / "bin" / "python", tmp_path / "log"
    # It lacks the package: whatever is asked is an error. What is asked is written down.
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexit 1\n')
    python.chmod(0o755)
    (clone / ".venv").symlink_to(other)
    kept = ("VIRTUAL_ENV", "CONDA_PREFIX", "QWEN3_SFT_INSTALL")
    done = subprocess.run(
        ["bash", str(clone / "qwen3_sft.sh")], capture_output=True, text=True, check=False,
        stdin=subprocess.DEVNULL, env={k: v for k, v in os.environ.items() if k not in kept},
    )  # fmt: skip
    assert done.returncode == 2
    assert "Nothing was changed" in done.stderr
    assert "pip" not in log.read_text()
    assert [path.name for path in other.rglob("*")] == ["bin", "python"]
