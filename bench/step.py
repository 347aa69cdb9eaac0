"""Time whole training steps through the trainer that a run uses.

20 steps after 5 warm-up steps, on packed documents of log-normal length (median 270 tokens), random
weights and hence nearly uniform routing. `--compare` repeats it with transformers' own experts
(`grouped_mm`) in the same process.

    python bench/step.py --model demo
    python bench/step.py --model 30b --layers 4 --max_length 8192 --out bench/results/step.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import provenance
from result_file import write
from transformers import AutoModelForCausalLM, PrinterCallback, Qwen3MoeConfig

import monkey_patch
from qwen3_sft.args import EXPERT_PATCHES, ModelArguments, TrainArguments
from qwen3_sft.collator import PackedCollator
from qwen3_sft.demo.model import tiny_config
from qwen3_sft.engine import Engine
from qwen3_sft.hardware import device_info
from qwen3_sft.known_models import KNOWN_CONFIGS
from qwen3_sft.logs import set_up_logging
from qwen3_sft.metrics import StepLines
from qwen3_sft.model import choose_attention
from qwen3_sft.packing import PackedDataset
from qwen3_sft.patches import choose_patches
from qwen3_sft.trainer import SftTrainer

WARM_UP, STEPS = 5, 20


class RandomDocuments:
    """Documents of log-normal length; two thirds of their tokens carry labels."""

    def __init__(self, tokens: int, max_length: int, vocabulary: int) -> None:
        rng = np.random.default_rng(0)
        lengths = rng.lognormal(5.6, 0.9, 4 * tokens // 270).astype(np.int64)
        lengths = np.clip(lengths, 8, max_length)
        self.lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), tokens)) + 1]
        self.vocabulary = vocabulary

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng, length = np.random.default_rng(index), int(self.lengths[index])
        ids = rng.integers(0, self.vocabulary, length, dtype=np.int32)
        return ids, np.arange(length) >= length // 3


def measure(options: argparse.Namespace, experts: str) -> dict[str, Any]:
    """Return the medians over the counted steps for one experts implementation."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainArguments(
            output_dir=folder, max_steps=WARM_UP + STEPS, save_strategy="no", disable_tqdm=True,
            per_device_train_batch_size=options.batch, bf16=options.dtype == "autocast",
            activation_checkpointing=options.activation_checkpointing, optim=options.optim,
        )  # fmt: skip
        model, attention = build_model(options, args, experts)
        rows = options.batch * args.max_steps
        documents = RandomDocuments(
            rows * options.max_length, options.max_length, model.config.vocab_size
        )
        trainer = SftTrainer(
            model=model, args=args, data_collator=PackedCollator(options.max_length, 0),
            train_dataset=PackedDataset(
                documents, options.max_length, rows_multiple_of=options.batch
            ),
            router_statistics=monkey_patch.router_statistics(model),
            peak_flops=device_info().peak_flops["fp32" if options.dtype == "float32" else "bf16"],
            metrics_file=StepLines(Path(folder) / "metrics.jsonl"), run_facts={},
            engine=Engine("single"),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines][WARM_UP:]
    names = ("step_time_s", "tokens_per_second_per_gpu", "model_tflops_per_gpu", "mfu")
    return {
        "experts_implementation": experts,
        "attn_implementation": attention,
        **{name: _median([r[name] for r in records]) for name in names},
        "tokens_per_step": _median([r["tokens"] for r in records]),
        "peak_memory_gib": max(r["peak_memory_gib"] for r in records),
        "loss_first": records[0]["loss"],
        "loss_last": records[-1]["loss"],
    }


def build_model(options: argparse.Namespace, args: TrainArguments, experts: Any) -> tuple[Any, str]:
    """Return a patched model with random weights on the device, and its attention."""
    sizes = dict(KNOWN_CONFIGS["Qwen/Qwen3-30B-A3B"])
    config = tiny_config() if options.model == "demo" else Qwen3MoeConfig(**sizes)
    if options.layers:
        config.num_hidden_layers = options.layers
    weights = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    torch.manual_seed(0)
    with args.device:
        model = AutoModelForCausalLM.from_config(config, dtype=weights)
    model.config.use_cache = False
    if experts not in EXPERT_PATCHES:
        model.set_experts_implementation(experts)
    compute = weights if options.dtype == "float32" else torch.bfloat16
    attention, _ = choose_attention(options.attn_implementation, args.device, compute)
    if attention != "torch_varlen":
        model.set_attn_implementation(attention)
    choice = ModelArguments(experts_implementation=experts)
    monkey_patch.apply_patches(model, choose_patches(choice, attention))
    return model, attention


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the JSON and write it where `--out` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("demo", "30b"), default="demo")
    parser.add_argument("--layers", type=int, help="decoder layers; default: the model's own")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1, help="rows per step")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "autocast"), default="float32")
    parser.add_argument("--optim", default="adamw_torch_fused")
    parser.add_argument("--attn_implementation", default="auto")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--compare", action="store_true", help="transformers' grouped_mm beside")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    set_up_logging()
    experts = ["scatter_moe", *(["grouped_mm"] if options.compare else [])]
    result = {
        "benchmark": "step",
        **provenance(),
        "options": {k: v for k, v in vars(options).items() if k != "out"},
        "warm_up_steps": WARM_UP,
        "counted_steps": STEPS,
        "results": [measure(options, name) for name in experts],
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        write(options.out, text + "\n")


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


if __name__ == "__main__":
    main()
