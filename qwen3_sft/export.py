"""Write a trained model as a hub checkpoint and prove that it loads as it was trained.

transformers writes the hub's per-expert names by itself. Added here: `num_experts` in config.json
(it writes only `num_local_experts`; readers that look for the other name fall back to the class
default of 128), the base model's own tokenizer, template and generation files, and a reload that
compares every tensor and the logits of a probe before the folder gets its final name.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from qwen3_sft.checkpoint import publish
from qwen3_sft.export_check import Expected, ExportError, check_export, digest, probe
from qwen3_sft.logs import progress_bars
from qwen3_sft.model import TOKENIZER_FILES

logger = logging.getLogger(__name__)


def export_model(model: Any, base: Path, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Export `model` to `folder` in hub layout, verified.

    Args:
        model: the trained model, unwrapped; its parameters stay as they are.
        base: the checkpoint it started from; its tokenizer and generation files are copied.
        folder: replaced if it exists, and only after the new one is verified.
        dtype: of the written weights; None takes the base model's.

    Raises:
        ExportError: a key, shape, dtype, value or the probe's logits differ after reloading.
    """
    dtype = base_dtype(base) if dtype is None else dtype
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    logger.info("exporting to %s: writing, reloading, comparing", folder)
    cast = {name: tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items()}
    with progress_bars(sum(tensor.nbytes for tensor in cast.values())):
        model.save_pretrained(staging, state_dict=cast)
    _write_config(staging, dtype)
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (base / name).is_file():
            shutil.copyfile(base / name, staging / name)
    expected = Expected({name: digest(tensor) for name, tensor in cast.items()}, probe(model))
    del cast  # the check loads a second copy
    verify(staging, expected, is_isolated=model.device.type != "cpu")
    publish(staging, folder)
    logger.info(
        "exported %s (%s, %d tensors, reloaded and compared)", folder, dtype, len(expected.digests)
    )


def verify(folder: Path, expected: Expected, *, is_isolated: bool) -> None:
    """Reload `folder` and compare.

    Args:
        folder: the written checkpoint.
        expected: what the live model holds and says.
        is_isolated: in a fresh process on the CPU, as somebody else would load it. Needed where a
            GPU has no room for a second copy or Liger has replaced classes of transformers.

    Raises:
        ExportError: what differs.
    """
    if not is_isolated:
        check_export(folder, expected)
        return
    notes = folder / ".expected"
    expected.save(notes)
    command = [sys.executable, "-m", "qwen3_sft.export_check", str(folder), str(notes)]
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    shutil.rmtree(notes)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise ExportError(lines[-1] if lines else f"{folder}: the check ended without a word")


def base_dtype(base: Path) -> torch.dtype:
    """Return the dtype a checkpoint's config names; float32 if it names none."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return getattr(torch, str(name).removeprefix("torch."))


def _write_config(folder: Path, dtype: torch.dtype) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    experts = config.get("num_experts", config.get("num_local_experts"))
    config |= {
        "num_experts": experts,
        "num_local_experts": experts,
        "dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
