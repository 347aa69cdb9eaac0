"""A real trainer on a tiny model and made-up documents, for the tests of the training loop."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PrinterCallback

import monkey_patch
from qwen3_sft.distributed.engine import Engine
from qwen3_sft.model.activation_checkpointing import enable_checkpointing
from qwen3_sft.options.train_args import TrainArguments
from qwen3_sft.packing.collator import PackedCollator
from qwen3_sft.packing.passes import Passes
from qwen3_sft.packing.rows import PackedDataset
from qwen3_sft.records.step_lines import StepLines
from qwen3_sft.training.callbacks import EpochCallback
from qwen3_sft.training.metrics import Metrics
from qwen3_sft.training.trainer import SftTrainer

PATCHES = ("scatter_moe", "varlen_attention", "router_aux_loss", "linear_cross_entropy")
ROW = 64  # tokens in a packed row


class Documents:
    """Random documents of 5 to 40 tokens, the first half of each without labels."""

    def __init__(self, number: int, vocabulary: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.documents = []
        for length in rng.integers(5, 40, number).tolist():
            ids = rng.integers(0, vocabulary, length).astype(np.int32)
            self.documents.append((ids, np.arange(length) >= length // 2))
        self.lengths = np.array([len(ids) for ids, _ in self.documents])

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.documents[index]


def make_trainer(
    model: PreTrainedModel,
    tokenizer: Any,
    folder: Path,
    *,
    documents: Documents | None = None,
    eval_documents: Documents | dict[str, Documents] | None = None,
    repeats: Sequence[float] | None = None,
    callbacks: tuple = (),
    aux: float = 0.0,
    patches: Sequence[str] = PATCHES,
    packing: bool = True,
    **arguments: Any,
) -> SftTrainer:
    """Patch a copy of `model` and wrap it in the trainer that a run would use.

    With `repeats` the documents come in turn from as many sources, passed over so often.
    """
    values: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "max_grad_norm": 0.0,
        "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "seed": 1,
    }  # fmt: skip
    args = TrainArguments(**(values | arguments))
    model = copy.deepcopy(model)
    model.config.use_cache = False
    monkey_patch.apply_patches(model, patches)
    statistics = monkey_patch.router_statistics(model)
    statistics.coefficient = aux
    vocabulary = model.config.vocab_size
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    documents = documents or Documents(24, vocabulary)
    passes = repeats and Passes(
        documents.lengths, np.arange(len(documents)) % len(repeats), repeats, args.seed
    )
    rows = PackedDataset(
        documents, ROW, packing=packing, seed=args.seed, rows_multiple_of=per_step,
        passes=passes,
    )  # fmt: skip
    trainer = SftTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        data_collator=PackedCollator(ROW, tokenizer.pad_token_id),
        train_dataset=rows,
        eval_dataset=_packed(eval_documents),
        callbacks=[EpochCallback(rows), *callbacks],
        engine=Engine("single"),
        metrics=Metrics(
            args, model.config, router_statistics=statistics,
            file=StepLines(folder / "metrics.jsonl"),
        ),
        run_facts={"identity": {}},
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    enable_checkpointing(model, {args.checkpointing: model.config.num_hidden_layers})
    return trainer


def _packed(documents: Documents | dict[str, Documents] | None) -> Any:
    if isinstance(documents, dict):
        return {name: PackedDataset(part, ROW) for name, part in documents.items()}
    return documents and PackedDataset(documents, ROW)


def nll_sum(model: PreTrainedModel, documents: Documents) -> tuple[torch.Tensor, int]:
    """Return the sum over labels of -log p and their number, by the unpatched model, one by one."""
    total, count = torch.zeros(()), 0
    for ids, trained in documents.documents:
        tokens = torch.from_numpy(ids.astype(np.int64))[None]
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
        labelled = torch.from_numpy(trained[1:])
        total = total + F.cross_entropy(logits[labelled], tokens[0, 1:][labelled], reduction="sum")
        count += int(labelled.sum())
    return total, count


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return a detached copy of every parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}
