"""A step whose loss or gradient is NaN or Inf changes nothing; too many in a row end the run.

Remove when transformers leaves out the update of a step that is not finite: BadSteps
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from torch import nn

from qwen3_sft.checkpoints.manifest import Totals
from qwen3_sft.errors import NonFiniteError

logger = logging.getLogger(__name__)


class BadSteps:
    """Counts them; asked before the update of each step."""

    def __init__(self, totals: Totals, allowed: int) -> None:
        """Begin with none in a row; so many as are allowed (`--max_bad_steps`) end the run."""
        self._totals, self._allowed, self._in_a_row = totals, allowed, 0

    def check(
        self, model: nn.Module, step: int, loss: float, norm: float,
        left_out: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        """Take the gradients of a bad step away: without them the update changes nothing.

        Args:
            model: has the step's gradients.
            step: counted from 1.
            loss: of the step over all ranks.
            norm: of its gradients over all ranks.
            left_out: weights not updated by an optimizer in the backward pass, if it is one.

        Raises:
            NonFiniteError: so many in a row are not allowed.
        """
        if math.isfinite(norm) and math.isfinite(loss):
            self._in_a_row = 0
            return
        self._totals.skipped_steps += 1
        self._in_a_row += 1
        for parameter in model.parameters():
            parameter.grad = None
        logger.warning("step %d skipped: loss %s, gradient norm %s", step, loss, norm)
        kept = "The weights are those before them"
        if left_out is not None:
            kept = "Weights whose own gradient was finite were updated in them"
            logger.warning(
                "%d weights had a non-finite gradient and were left out (%s); the others were "
                "updated within the backward pass", len(left_out), ", ".join(left_out[:3]),
            )  # fmt: skip
        if self._in_a_row >= self._allowed:
            raise NonFiniteError(
                f"steps {step - self._in_a_row + 1} to {step} all had a non-finite loss "
                f"or gradient (last: loss {loss}, gradient norm {norm}). {kept} and "
                "the last checkpoint is whole. Lower --learning_rate, look at the data of these "
                "steps, or allow more with --max_bad_steps"
            )
