"""Start-up proof that packed documents do not see each other, on the first real row.

The row is run three times: as it is, and with every other document replaced by different tokens of
the same number, the even ones and the odd ones. A document that was kept has to give the logits it
gave: all shapes and boundaries are equal, so that products round alike, and no router flips that
got the same input. Run alone instead, in other shapes, a document's logits move in bfloat16 by
rounding and by flips of 48 routers, which nobody can tell from a leak by a fixed threshold. What
noise is left comes from experts, whose rows differ in number; attention is causal, so the first
document tells how much it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from qwen3_sft.errors import LeakError, ModelError
from qwen3_sft.packing.collator import PackedCollator
from qwen3_sft.packing.rows import Document

# Least RMS ratio taken for a leak. Without any, 2 and 48 layers gave 0 in bfloat16, up to 7e-7 in
# float32, on a CPU; with one it is 0.1 and more. bfloat16 rounds at 4e-3 per operation.
_FLOOR = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
_MARGIN = 10.0
_MAX_DOCUMENTS = 8
_MAX_POSITIONS = 256  # of each document, its first: there a leak is strongest, and logits are large


@dataclass(frozen=True)
class LeakReport:
    """What the self-test saw.

    Attributes:
        documents: how many were compared; fewer than 2 prove nothing.
        noise: RMS ratio of the first document's logits, which nothing can leak into.
        worst: largest RMS ratio of the others.
        loss: mean NLL per label over the compared positions.
        loss_replaced: the same, each document beside others than its own neighbours.
    """

    documents: int
    noise: float
    worst: float
    loss: float
    loss_replaced: float

    def __str__(self) -> str:
        """Return the line for the log."""
        return (
            f"packing self-test: {self.documents} documents, with other neighbours their logits "
            f"differ by {self.worst:.1e} (noise {self.noise:.1e}), loss {self.loss:.6f} and "
            f"{self.loss_replaced:.6f}"
        )


@torch.no_grad()
def check_isolation(
    model: PreTrainedModel,
    row: Sequence[Document],
    max_length: int,
    pad_token_id: int,
    autocast: torch.dtype | None = None,
) -> LeakReport:
    """Compare logits and loss of the row's first documents beside different neighbours.

    Args:
        model: patched and on its device. Where it is sharded every rank must check the same row.
        row: the (ids, trained) documents of one packed row.
        max_length: tokens in a row.
        pad_token_id: fills the rest.
        autocast: dtype of the run's autocast, None without.

    Raises:
        LeakError: documents see each other; training would be wrong.
        ModelError: the model gives NaN or Inf.
    """
    was_training = model.training
    model.eval()
    row = list(row)[:_MAX_DOCUMENTS]
    with torch.autocast(model.device.type, autocast, enabled=autocast is not None):
        logits = _logits(model, row, max_length, pad_token_id)
        with_others = [
            _logits(model, _replaced(model, row, parity), max_length, pad_token_id)
            for parity in (1, 0)
        ]
    model.train(was_training)
    if not all(part.isfinite().all() for part in logits):
        raise ModelError(_not_finite(model))
    replaced = [with_others[number % 2][number] for number in range(len(row))]
    ratios = [_ratio(r, p) for r, p in zip(replaced, logits, strict=True)]
    report = LeakReport(
        documents=len(row),
        noise=ratios[0],
        worst=max(ratios[1:], default=0.0),
        loss=_loss(logits, row),
        loss_replaced=_loss(replaced, row),
    )
    floor = _FLOOR[autocast or model.dtype]
    limit = max(_MARGIN * report.noise, floor)
    if not (report.worst <= limit and ratios[0] <= floor):
        raise LeakError(
            f"{report}: more than {limit:.1e}. Documents of one row influence each other; choose "
            "another --attn_implementation or switch packing off with --no_packing"
        )
    return report


def _replaced(model: PreTrainedModel, row: Sequence[Document], parity: int) -> list[Document]:
    """Return the row with its documents of even (0) or odd (1) number made of other tokens."""
    vocabulary = model.config.get_text_config().vocab_size
    return [
        ((ids + vocabulary // 2) % vocabulary, trained) if number % 2 == parity else (ids, trained)
        for number, (ids, trained) in enumerate(row)
    ]


def _not_finite(model: PreTrainedModel) -> str:
    """Say which weight is to blame, if it is one that lies in this process."""
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        count = int((~local.isfinite()).sum()) if local.is_floating_point() else 0
        if count:
            return (
                f"{name} holds {count:,} values that are NaN or Inf: the base model is damaged or "
                "comes from a run that diverged; take another copy or an earlier checkpoint of it"
            )
    return (
        "the base model gives NaN or Inf for the first documents of the data, and its weights are "
        "finite here: set --dtype float32, or look whether it was made for another precision"
    )


def _logits(
    model: PreTrainedModel, row: Sequence[Document], max_length: int, pad_token_id: int
) -> list[Tensor]:
    """Return float32 logits on the CPU of each document's first positions, (<= 256, V).

    One forward of the whole model: engines that shard it gather weights from its root down.
    """
    batch = PackedCollator(max_length, pad_token_id)([list(row)])
    keep = {"input_ids", "position_ids"} | {k for k in batch if k.startswith(("cu_", "max_length"))}
    inputs = {
        k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items() if k in keep
    }
    lengths = [len(ids) for ids, _ in row]
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    counts = [min(length, _MAX_POSITIONS) for length in lengths]
    positions = torch.cat(
        [torch.arange(start, start + n) for start, n in zip(starts, counts, strict=True)]
    )
    outputs = model(**inputs, use_cache=False, logits_to_keep=positions.to(model.device))
    return [part.float().cpu() for part in outputs.logits[0].split(counts)]


def _ratio(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


def _loss(logits: Sequence[Tensor], row: Sequence[Document]) -> float:
    total, count = 0.0, 0
    for scores, (ids, trained) in zip(logits, row, strict=True):
        predicted = slice(1, len(scores) + 1)
        targets = torch.from_numpy(ids[predicted].astype(np.int64))
        labelled = torch.from_numpy(trained[predicted].copy())
        nll = F.cross_entropy(scores[: len(targets)], targets, reduction="none")[labelled]
        total, count = total + nll.sum().item(), count + nll.numel()
    return total / max(count, 1)
