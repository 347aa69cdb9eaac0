"""Write a trained model as a hub checkpoint and prove that it loads as it was trained.

transformers writes the hub's per-expert names by itself. Added here: `num_experts` in config.json
(it writes only `num_local_experts`; readers that look for the other name fall back to the class
default of 128), the base model's own tokenizer, template and generation files, and a reload that
compares every tensor and the logits of a probe before the folder gets its final name.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3_sft.checkpoint import publish
from qwen3_sft.logs import progress_bars
from qwen3_sft.model import TOKENIZER_FILES, load_strict

logger = logging.getLogger(__name__)


class ExportError(RuntimeError):
    """The exported folder does not reproduce the trained model; it was not published."""


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
    cast = {name: tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items()}
    with progress_bars(sum(tensor.nbytes for tensor in cast.values())):
        model.save_pretrained(staging, state_dict=cast)
    _write_config(staging, dtype)
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (base / name).is_file():
            shutil.copyfile(base / name, staging / name)
    _verify(staging, model, cast, dtype)
    publish(staging, folder)
    logger.info("exported %s (%s, %d tensors, reloaded and compared)", folder, dtype, len(cast))


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


def _verify(folder: Path, model: Any, expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    reloaded: Any = load_strict(folder, dtype=dtype)
    actual = reloaded.state_dict()
    if actual.keys() != expected.keys():
        differing = sorted(actual.keys() ^ expected.keys())
        raise ExportError(f"{folder}: keys differ: {', '.join(differing[:5])}")
    for name, tensor in expected.items():
        if actual[name].dtype != tensor.dtype or not torch.equal(actual[name], tensor):
            raise ExportError(f"{folder}: {name} differs after reloading")
    del expected, actual
    want, got = _probe(model), _probe(reloaded.to(model.device))
    ratio = ((got - want).square().mean() / want.square().mean()).sqrt().item()
    # The weights are equal bit by bit up to the cast, so only the cast itself may show.
    limit = 1e-4 if dtype == next(model.parameters()).dtype == torch.float32 else 0.1
    if not ratio <= limit:
        raise ExportError(f"{folder}: probe logits differ by {ratio:.2e} (RMS ratio) > {limit:.0e}")


@torch.no_grad()
def _probe(model: Any) -> Tensor:
    """Logits (1, 16, V) in float32 on fixed tokens."""
    was_training = model.training
    model.eval()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(16, device=model.device) * 7919 % vocabulary)[None]
    logits = model(input_ids=ids, use_cache=False).logits.float()
    model.train(was_training)
    return logits
