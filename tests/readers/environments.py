"""Environments of their own for the readers of exports, made once and kept.

They lie in `$QWEN3_SFT_READERS`, by default `~/.cache/qwen3_sft/readers`; each holds what its row
below names, from the package index, and a stamp that says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(os.environ.get("QWEN3_SFT_READERS", "~/.cache/qwen3_sft/readers")).expanduser()
LLAMA_CPP_PYTHON = "llama_cpp_python-0.3.36"

PACKAGES = {
    "transformers4": ("torch==2.13.0", "transformers==4.57.3"),
    "llama_cpp": (
        "torch==2.13.0", "transformers==4.57.6", "gguf==0.19.0", "sentencepiece==0.2.3", "protobuf",
    ),
    "mlx": ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"),
}  # fmt: skip


def python_of(name: str) -> Path:
    """Return the Python of an environment, which is made if it is not there as its row says."""
    folder, wanted = ROOT / name, "\n".join(PACKAGES[name])
    stamp = folder / "packages.txt"
    if not stamp.is_file() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", *PACKAGES[name]]
        subprocess.run(pip, check=True)
        stamp.write_text(wanted)
    return folder / "bin" / "python"


def llama_cpp_source() -> Path:
    """Return llama.cpp's own Python, as the source of llama-cpp-python carries it."""
    source = ROOT / LLAMA_CPP_PYTHON / "vendor" / "llama.cpp"
    if not (source / "convert_hf_to_gguf.py").is_file():
        requirement = LLAMA_CPP_PYTHON.replace("_", "-", 2).replace("-0.", "==0.", 1)
        pip = [python_of("llama_cpp"), "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--no-binary", ":all:", requirement, "-d", ROOT], check=True)
        with tarfile.open(ROOT / f"{LLAMA_CPP_PYTHON}.tar.gz") as archive:
            inside = f"{LLAMA_CPP_PYTHON}/vendor/llama.cpp/"
            wanted = [m for m in archive.getmembers() if is_python_of(m.name, inside)]
            archive.extractall(ROOT, wanted, filter="data")
    return source


def is_python_of(name: str, folder: str) -> bool:
    """Whether a file of the archive belongs to the converter."""
    parts = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/")
    return name.startswith(tuple(folder + part for part in parts))


def run_in(name: str, *words: str | Path) -> None:
    """Run Python of an environment, without anything of ours in its way."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python_of(name), *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
