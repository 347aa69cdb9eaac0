"""The stages with their operands in FP8, in plain torch: what FP8 computes, without the hardware.

The four products with a weight (hidden, y, d_act, d_x) multiply e4m3 values times their scales, in
float32; both weight gradients stay in the dtype of the activations. So does everything that is
kept between the passes, hence the bytes per token are those without FP8.

The interface is that of the other stages, except for what passes between two of them, which is
chosen so that kernels can quantise where they have the values in registers:

- `quantize_weight`: once per pass from the parameter in its own dtype, in the layouts that the pass
  needs. Reads it once, writes one byte per value and layout.
- `up` quantises x before it is gathered: T * D values instead of T * K * D, and the gather moves
  one byte per value. It emits hidden in the dtype of x and act as `QuantizedRows`: act is never
  stored in 16 bit, and a tile of 128 columns is one block.
- `down` reads act at one byte per value and returns y in the dtype of x.
- `activation_gradient` quantises d_out once per token, like x, and emits d_hidden twice
  (`HiddenGradient`, 2 + 1 bytes per value) and weight * act in the dtype of x.
- `input_gradient` reads the FP8 half of d_hidden, `gate_up_gradient` the other.

What is quantised between stages is the value rounded to the dtype of x. A kernel may quantise in
its epilogue or in a pass of its own, as it must rowwise or where a tile crosses from gate to up
(F no multiple of 128): the bits are the same.
"""

from __future__ import annotations

import torch

from monkey_patch.kernels.scatter_moe.plain import CommonStages, silu_and_multiply
from monkey_patch.kernels.scatter_moe.quantize import (
    HiddenGradient,
    Quantized,
    QuantizedRows,
    QuantizedWeight,
    Scaling,
    dequantize,
    quantize_rows,
    quantize_weight_layouts,
)


class PlainFp8Stages(CommonStages):
    """The stages of one pass over one routing, blockwise."""

    scaling: Scaling = "blockwise"

    def quantize_weight(
        self, weight_EMK: torch.Tensor, *, forward: bool, backward: bool
    ) -> QuantizedWeight:
        """Quantise a weight for `up` or `down` (forward), for a gradient (backward), or both."""
        return quantize_weight_layouts(weight_EMK, self.scaling, forward=forward, backward=backward)

    def quantize_rows(self, rows_MK: torch.Tensor) -> QuantizedRows:
        """Quantise rows along the contraction."""
        return QuantizedRows(*quantize_rows(rows_MK, self.scaling), rows_MK.dtype)

    def up(
        self, x_TD: torch.Tensor, gate_up_proj: QuantizedWeight, *, hidden: bool, act: bool
    ) -> tuple[torch.Tensor | None, QuantizedRows | None]:
        """Return hidden (T * K, 2F) and act (T * K, F), None for one that is not wanted."""
        wide_N2F = self._forward(self._gathered(x_TD), gate_up_proj)
        hidden_N2F = wide_N2F.to(x_TD.dtype)
        act_NF = self.quantize_rows(silu_and_multiply(hidden_N2F)) if act else None
        return hidden_N2F if hidden else None, act_NF

    def down(self, act_NF: QuantizedRows, down_proj: QuantizedWeight) -> torch.Tensor:
        """Return act @ down[e].T, (T * K, D)."""
        return self._forward(act_NF, down_proj).to(act_NF.dtype)

    def input_gradient(
        self, d_hidden: HiddenGradient, gate_up_proj: QuantizedWeight
    ) -> torch.Tensor:
        """Return d_hidden @ gate_up[e], (T * K, D)."""
        rows_N2F = d_hidden.quantized
        return self._backward(rows_N2F, gate_up_proj).to(rows_N2F.dtype)

    def activation_gradient(
        self,
        d_out_TD: torch.Tensor,
        down_proj: QuantizedWeight,
        hidden_N2F: torch.Tensor,
        weights_TK: torch.Tensor,
        *,
        act: bool,
        overwrite: bool,
    ) -> tuple[HiddenGradient, torch.Tensor | None, torch.Tensor]:
        """Return d_hidden (T * K, 2F), weight * act (T * K, F) or None, d_weights (T, K).

        With `overwrite` the full d_hidden takes the memory of `hidden_N2F`.
        """
        d_act_NF = self._backward(self._gathered(d_out_TD), down_proj)
        d_hidden_N2F, scaled_act_NF, d_weights_TK = self.swiglu_gradient(
            d_act_NF, hidden_N2F, weights_TK, act=act, overwrite=overwrite
        )
        both = HiddenGradient(d_hidden_N2F, self.quantize_rows(d_hidden_N2F))
        return both, scaled_act_NF, d_weights_TK

    def gate_up_gradient(
        self, d_hidden: HiddenGradient, x_TD: torch.Tensor, out: torch.Tensor, *, accumulate: bool
    ) -> None:
        """Write d_hidden[e].T @ x[e] to `out` (E, 2F, D), or add it."""
        self._expert_gradient(d_hidden.full, x_TD[self.token], out, accumulate)

    def _gathered(self, x_TD: torch.Tensor) -> QuantizedRows:
        values_TD, scales_TB, dtype = self.quantize_rows(x_TD)
        return QuantizedRows(values_TD[self.token], scales_TB[self.token], dtype)

    def _forward(self, rows: QuantizedRows, weight: QuantizedWeight) -> torch.Tensor:
        assert weight.forward is not None
        return self._fp8_product(rows, weight.forward)

    def _backward(self, rows: QuantizedRows, weight: QuantizedWeight) -> torch.Tensor:
        assert weight.backward is not None
        return self._fp8_product(rows, weight.backward)

    def _fp8_product(self, rows: QuantizedRows, weight_EMK: Quantized) -> torch.Tensor:
        """Return rows @ W[e].T in float32, (T * K, M)."""
        rows_NK = dequantize(rows.values, rows.scales)
        return self._product(rows_NK, dequantize(*weight_EMK).transpose(1, 2))


class PlainRowwiseFp8Stages(PlainFp8Stages):
    """The same with one scale per row."""

    scaling = "rowwise"


class PlainMxFp8Stages(PlainFp8Stages):
    """The same with a power of two for every 32 neighbours along a contraction."""

    scaling = "mxfp8"
