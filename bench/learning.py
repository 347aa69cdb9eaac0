"""Does low-bit training learn as float32 does? `python bench/learning.py [--seeds N --again]`.

A small Qwen3-MoE learns the demo's question and answer pairs from random weights, with the trainer
and the patches of a real run. Each variant sees the same documents in the same order; the final
loss is the mean over the last 20 steps. Runs on a CPU, where the arithmetic of the optimizer is
the same; the experts and the attention compute in the weights' dtype.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from parts.result_file import provenance, write
from transformers import PreTrainedTokenizerBase

from qwen3_sft.demo.build import build_demo
from qwen3_sft.demo.model import tiny_config, tiny_model
from qwen3_sft.model.loading import load_tokenizer
from tests.support.training import ROW, Documents, make_trainer

_LOW_BIT = {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}
_PER_TENSOR = {"optimizer_in_backward": True, "clip": "per_tensor"}
_DELAYED = {"optimizer_in_backward": True, "clip": "delayed"}
_STEPS = 200
# 0.7 million parameters: small enough for hundreds of steps on a CPU.
SIZES = {
    "num_hidden_layers": 2, "hidden_size": 64, "moe_intermediate_size": 48, "num_experts": 8,
    "head_dim": 16,
}  # fmt: skip
# name -> (dtype of the weights, arguments)
VARIANTS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32 AdamW": (torch.float32, {"optim": "adamw_torch"}),
    "fp32 AdamW, in backward, per tensor": (torch.float32, {"optim": "adamw_torch", **_PER_TENSOR}),
    "bf16 AdamW8bit, rounded to nearest": (
        torch.bfloat16,
        {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=False"},
    ),
    "bf16 AdamW8bit": (torch.bfloat16, _LOW_BIT),
    "bf16 AdamW8bit, in backward, per tensor": (torch.bfloat16, {**_LOW_BIT, **_PER_TENSOR}),
    "bf16 AdamW8bit, in backward, delayed": (torch.bfloat16, {**_LOW_BIT, **_DELAYED}),
    "bf16 AdamW8bit, in backward, per tensor, rounded to nearest": (
        torch.bfloat16,
        {**_LOW_BIT, **_PER_TENSOR, "optim_args": "bf16_stochastic_round=False"},
    ),
    "bf16 AdamWFp8, in backward, per tensor": (
        torch.bfloat16,
        {**_LOW_BIT, **_PER_TENSOR, "optim_args": "states=fp8,bf16_stochastic_round=True"},
    ),
    "bf16 Adafactor, in backward, per tensor": (
        torch.bfloat16,
        {"optim": "adafactor", **_PER_TENSOR},
    ),
    "bf16 AdamW4bit, in backward, per tensor": (
        torch.bfloat16,
        {**_LOW_BIT, **_PER_TENSOR, "optim": "adamw_torch_4bit"},
    ),
}


class Pairs(Documents):
    """Question and answer as tokens, cut to one row; the answer carries the labels."""

    def __init__(self, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> None:
        self.documents = []
        for row in rows:
            question, answer = (message["content"] for message in row["messages"][:2])
            head = tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
            tail = tokenizer(f"{answer}<|im_end|>\n")
            ids = np.array(head.input_ids + tail.input_ids, dtype=np.int32)[:ROW]
            self.documents.append((ids, np.arange(len(ids)) >= len(head.input_ids)))
        self.lengths = np.array([len(ids) for ids, _ in self.documents])


def demo_pairs(folder: Path) -> tuple[Pairs, PreTrainedTokenizerBase]:
    """Build the demo's data in `folder` and read it."""
    model, data = build_demo(folder)
    tokenizer = load_tokenizer(model)
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    return Pairs(rows, tokenizer), tokenizer


def train(
    name: str,
    pairs: Pairs,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    seed: int,
    steps: int,
    rows: int = 16,
    learning_rate: float = 1e-3,
) -> dict[str, Any]:
    """Train one variant from random weights.

    Args:
        name: of `VARIANTS`.
        pairs: training data.
        tokenizer: its own.
        folder: for metrics.
        seed: of weights and data order.
        steps: optimizer steps.
        rows: packed rows of `ROW` tokens in a step.
        learning_rate: at its peak, after 10 steps; then linearly to 0.

    Returns:
        first_loss: before any update.
        loss: mean over the last 20 steps.
        lost_update_fraction, lost_update_mass: means over the steps, None if not measured.
        seconds: of training.
    """
    dtype, arguments = VARIANTS[name]
    model: Any = tiny_model(tiny_config(len(tokenizer), **SIZES), seed)
    values: dict[str, Any] = {
        "max_grad_norm": 1.0, "learning_rate": learning_rate, "lr_scheduler_type": "linear",
        "warmup_steps": 10, "weight_decay": 0.01,
    }  # fmt: skip
    trainer = make_trainer(
        model.to(dtype), tokenizer, folder, documents=pairs, max_steps=steps, seed=seed,
        per_device_train_batch_size=rows, **(values | arguments),
    )  # fmt: skip
    started = time.perf_counter()
    # torchao's classic step would be compiled once per shape, at 13 s each on two cores.
    with torch.compiler.set_stance("force_eager"):
        trainer.train()
    seconds = time.perf_counter() - started
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    result: dict[str, Any] = {
        "first_loss": records[0]["loss"],
        "loss": fmean(record["loss"] for record in records[-20:]),
    }
    for key in ("lost_update_fraction", "lost_update_mass"):
        found = [record[key] for record in records if record.get(key) is not None]
        result[key] = fmean(found) if found else None
    return result | {"seconds": round(seconds, 1)}


def missing(results: list[dict[str, Any]], seeds: int) -> Iterator[tuple[int, str]]:
    """Yield what has no result yet, whole seeds first."""
    done = {(result["seed"], result["variant"]) for result in results}
    for case in itertools.product(range(seeds), VARIANTS):
        if case not in done:
            yield case


def main() -> None:
    """Train every variant with every seed and write `bench/results/low_bit_learning_cpu.json`.

    The file is written after each run and a later call goes on from it.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="forget earlier results")
    options = parser.parse_args()
    target = Path(__file__).parent / "results" / "low_bit_learning_cpu.json"
    results = []
    if target.exists() and not options.again:
        results = json.loads(target.read_text(encoding="utf-8"))["results"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pairs, tokenizer = demo_pairs(folder / "demo")
        for seed, name in list(missing(results, options.seeds)):
            found = train(name, pairs, tokenizer, folder / "run", seed=seed, steps=_STEPS)
            results.append({"variant": name, "seed": seed, **found})
            print(f"seed {seed}  {name:60s} loss {found['loss']:.4f}", flush=True)
            report = {
                "benchmark": "low_bit_learning",
                **provenance(),
                "steps": _STEPS,
                "tokens_per_step": 16 * ROW,
                "learning_rate": 1e-3,
                "results": results,
            }
            write(target, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
