"""The loss per labelled token, of a training step and of an evaluation.

It is the sum of cross entropy over labelled tokens divided by their number over all ranks, in
training of the whole step with its accumulation; no micro-batch waits for the device.

Remove when transformers evaluates by the loss per label: eval_losses and SftTrainer.evaluate
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qwen3_sft.distributed.process_group import sum_over_ranks
from qwen3_sft.packing.collator import BatchStats
from qwen3_sft.training.metrics import Metrics


class StepLoss:
    """The loss of one optimizer step, micro-batch by micro-batch.

    Attributes:
        total: this rank's share of the step's loss so far, 0-dim float32, times the ranks.
    """

    def __init__(self, args: Any, metrics: Metrics) -> None:
        """Begin with no step; `metrics` counts what is computed."""
        self._args, self._metrics = args, metrics
        self.total = torch.zeros((), device=args.device)
        self._tokens = torch.ones((), device=args.device)

    def draw(
        self, batches: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """Return one step's micro-batches and its labels over all ranks, 0-dim; collective."""
        drawn = list(itertools.islice(batches, num_batches))
        stats = sum((b["stats"] for b in drawn), BatchStats(0, 0, 0, 0, 0))
        # From pinned memory: a copy from elsewhere waits for all that the device has to do.
        counts = torch.tensor(
            [stats.label_tokens, stats.tokens], pin_memory=torch.device(device).type == "cuda"
        ).to(device, non_blocking=True)
        label_tokens, self._tokens = sum_over_ranks(counts).clamp_min(1)
        self.total = torch.zeros((), device=device)
        return drawn, label_tokens

    def add(
        self, model: nn.Module, inputs: dict[str, Any], label_tokens: Tensor | int | None
    ) -> tuple[Tensor, Any, float]:
        """Compute one micro-batch of a step that has so many labels.

        Returns:
            This rank's share of the step's loss, times the ranks that DDP averages over; the
            model's outputs; the FLOPs of training on this micro-batch.
        """
        stats, token_mask = inputs.pop("stats"), inputs.pop("token_mask")
        flops = self._metrics.count(stats)
        scale = self._args.world_size
        if self._metrics.router_statistics is not None:
            self._metrics.router_statistics.begin(
                token_mask, num_rows=self._args.per_device_train_batch_size,
                weight=scale / self._tokens,
            )  # fmt: skip
        outputs = model(**inputs, num_items_in_batch=label_tokens)
        loss = outputs.loss * scale
        self.total += loss.detach()
        return loss, outputs, flops


def eval_losses(trainer: Any, datasets: Any, prefix: str) -> dict[str, float]:
    """Evaluate, and return the loss per label and the labels: of all, and of each of several.

    Args:
        trainer: with its own `eval_dataset`, rows by the name of their source.
        datasets: in place of that, or None.
        prefix: of the metrics: `eval_loss`, `eval_math_loss`.
    """
    chosen = trainer.eval_dataset if datasets is None else datasets
    parts = chosen if isinstance(chosen, dict) else {"": chosen}
    batches = {name: trainer.get_eval_dataloader(rows) for name, rows in parts.items()}
    sums = torch.stack([loss_sums(trainer, batches[name]) for name in parts])
    of_parts = dict(zip(parts, sum_over_ranks(sums).tolist(), strict=True))
    loss_sum, num_labels = (sum(column) for column in zip(*of_parts.values(), strict=True))
    metrics = _per_label(prefix, loss_sum, num_labels)
    for name, part in of_parts.items() if len(of_parts) > 1 else ():
        metrics |= _per_label(f"{prefix}_{name}", *part)
    return metrics


def _per_label(prefix: str, loss_sum: float, num_labels: float) -> dict[str, float]:
    return {f"{prefix}_loss": loss_sum / max(num_labels, 1), f"{prefix}_label_tokens": num_labels}


def losses_in_words(metrics: dict[str, float]) -> str:
    """Return `eval loss 1.2345, eval_math loss 1.3` of what `eval_losses` found."""
    losses = {
        name.removesuffix("_loss"): v for name, v in metrics.items() if name.endswith("_loss")
    }
    return ", ".join(f"{name} loss {value:.4f}" for name, value in losses.items())


def loss_sums(trainer: Any, batches: Iterable[dict[str, Any]]) -> Tensor:
    """Return the summed loss over this rank's batches and their labels, (2,) float64."""
    model = trainer.model
    sums = torch.zeros(2, dtype=torch.float64, device=trainer.args.device)
    model.eval()
    for batch in batches:
        inputs: dict[str, Any] = trainer._prepare_inputs(batch)
        label_tokens = inputs.pop("stats").label_tokens
        del inputs["token_mask"]
        with torch.no_grad(), trainer.compute_loss_context_manager():
            outputs = model(**inputs, num_items_in_batch=1)
        sums += torch.stack([outputs.loss.double(), sums.new_tensor(label_tokens)])
    model.train()
    return sums
