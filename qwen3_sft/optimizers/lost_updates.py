"""How much of the optimizer's update survives rounding to bf16: a meter on a rotating sample.

Rounded to nearest, an update below half a unit in the last place is lost for good, and at the
learning rates of fine-tuning most are. Rounded stochastically, as many weights stay where they
are in one step, but the mean arrives. So there are two figures: the share of weights that did not
move, and the share of the whole update that did not arrive.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TENSORS_PER_STEP = 4
_ELEMENTS = 1 << 16  # of each tensor


class LostUpdates:
    """Sums over the steps since the last `drain`, kept on the device."""

    def __init__(self, num_tensors: int, device: torch.device) -> None:
        """Begin with the first tensors.

        Args:
            num_tensors: how many tensors take turns.
            device: of the sums.
        """
        self._num_tensors = num_tensors
        self._first = 0
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    def next_step(self) -> None:
        """Turn to the next tensors."""
        self._first = (self._first + _TENSORS_PER_STEP) % max(self._num_tensors, 1)

    def takes(self, index: int) -> bool:
        """Tell whether the tensor is in this step's sample."""
        return (index - self._first) % self._num_tensors < _TENSORS_PER_STEP

    def window(self, parameter: Tensor) -> tuple[int, int]:
        """Return the elements to look at: the middle of the flat tensor, by whole blocks."""
        begin = max(0, (parameter.numel() - _ELEMENTS) // 2 // 256 * 256)
        return begin, min(parameter.numel(), begin + _ELEMENTS)

    def add(self, before: Tensor, exact: Tensor, after: Tensor) -> None:
        """Count one sample.

        Args:
            before: (N,) float32, the stored weights before the step.
            exact: (N,) float32, what the step computed.
            after: (N,) float32, the stored weights after it.
        """
        wanted, got = (exact - before).double(), (after - before).double()
        has_update = wanted != 0
        self._sums += torch.stack(
            [
                (has_update & (got == 0)).sum().double(),
                has_update.sum().double(),
                (wanted * got).sum(),
                (wanted * wanted).sum(),
            ]
        )

    def drain(self) -> dict[str, float | None]:
        """Return both figures since the last call; None where nothing was measured.

        Returns:
            lost_update_fraction: share of weights with an update that stayed where they were.
            lost_update_mass: 1 - <update wanted, update stored> / <update wanted, itself>; 0 means
                that rounding takes nothing away on average, 1 that it takes everything.
        """
        stayed, counted, got, wanted = self._sums.tolist()
        self._sums.zero_()
        return {
            "lost_update_fraction": stayed / counted if counted else None,
            "lost_update_mass": 1 - got / wanted if wanted else None,
        }
