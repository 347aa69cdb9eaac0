"""The public mixture-of-experts op: sort the routed rows by expert, two grouped products, combine.

Plain torch around `F.grouped_mm`, without a host synchronisation. Rows whose index is E or more
(sentinels of expert parallelism) sort to the tail, past the last group. grouped_mm leaves their
rows of its output and of its input gradient uninitialised, hence the two masks: one on the gathered
rows (its backward clears the input gradient), one before the weighted sum. In between, tail rows
are only ever read by a product that skips them.

Memory: autograd keeps the gathered rows and both products, and F.grouped_mm keeps views of the
weights, never copies. Under autocast with float32 weights a cast copy of them is kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from monkey_patch.kernels.scatter_moe.reference import scatter_moe_reference

# What F.grouped_mm takes (torch 2.13): at least one row, row strides that are multiples of 16 bytes
# and these dtypes, of which torch.compile knows the shapes of bf16 results only.
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT_BYTES = 16


def scatter_moe(
    x_TD: torch.Tensor,
    gate_up_proj_E2FD: torch.Tensor,
    down_proj_EDF: torch.Tensor,
    top_k_index_TK: torch.Tensor,
    top_k_weights_TK: torch.Tensor,
) -> torch.Tensor:
    """Route each token through its K experts (SwiGLU) and add the results with their weights.

    Differentiable in all arguments but the index. Deterministic: stable sort, one writer per
    element, fixed order over K. Float64, widths D or F whose rows are not multiples of 16 bytes,
    and dtypes other than bf16 under torch.compile take the dense definition in `reference` (E / K
    times the work) instead of grouped products.

    Args:
        x_TD: (T, D) hidden states, T >= 0.
        gate_up_proj_E2FD: (E, 2F, D), the dtype of `x_TD`; any dtype under autocast.
        down_proj_EDF: (E, D, F), likewise.
        top_k_index_TK: (T, K) integers >= 0; E or more contributes nothing and gets no gradient.
        top_k_weights_TK: (T, K) routing weights, any float dtype.

    Returns:
        (T, D) in the dtype of `x_TD`; under autocast computed in the autocast dtype.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    _check(x_TD, gate_up_proj_E2FD, down_proj_EDF, top_k_index_TK, top_k_weights_TK)
    device = x_TD.device.type
    out_dtype, dtype = x_TD.dtype, x_TD.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    x_TD, gate_up, down = (t.to(dtype) for t in (x_TD, gate_up_proj_E2FD, down_proj_EDF))
    with torch.autocast(device, enabled=False):
        run = _grouped if _is_groupable(x_TD, down) else scatter_moe_reference
        return run(x_TD, gate_up, down, top_k_index_TK, top_k_weights_TK).to(out_dtype)


def _grouped(
    x_TD: torch.Tensor,
    gate_up_proj_E2FD: torch.Tensor,
    down_proj_EDF: torch.Tensor,
    top_k_index_TK: torch.Tensor,
    top_k_weights_TK: torch.Tensor,
) -> torch.Tensor:
    num_experts, (num_tokens, top_k) = gate_up_proj_E2FD.shape[0], top_k_index_TK.shape
    expert_N, order_N = torch.sort(top_k_index_TK.reshape(-1), stable=True)
    experts_E = torch.arange(num_experts, device=x_TD.device, dtype=expert_N.dtype)
    ends_E = torch.searchsorted(expert_N, experts_E, right=True, out_int32=True)
    is_tail_N1 = (expert_N >= num_experts)[:, None]

    rows_ND = x_TD[order_N // top_k].masked_fill(is_tail_N1, 0)
    hidden_N2F = F.grouped_mm(rows_ND, gate_up_proj_E2FD.transpose(1, 2), offs=ends_E)
    gate_NF, up_NF = hidden_N2F.chunk(2, dim=-1)
    y_ND = F.grouped_mm(F.silu(gate_NF) * up_NF, down_proj_EDF.transpose(1, 2), offs=ends_E)
    y_ND = y_ND.masked_fill(is_tail_N1, 0)

    y_TKD = y_ND[torch.argsort(order_N)].view(num_tokens, top_k, -1)
    # A batched product accumulates over K in float32 and rounds once, without a float32 copy of y.
    weights_T1K = top_k_weights_TK.to(y_TKD.dtype)[:, None, :]
    return torch.bmm(weights_T1K, y_TKD)[:, 0]


def _is_groupable(x_TD: torch.Tensor, down_proj_EDF: torch.Tensor) -> bool:
    widths = (x_TD.shape[1], down_proj_EDF.shape[2])
    is_aligned = all(w * x_TD.element_size() % _ALIGNMENT_BYTES == 0 for w in widths)
    dtypes = (torch.bfloat16,) if torch.compiler.is_compiling() else _GROUPED_DTYPES
    return x_TD.shape[0] > 0 and x_TD.dtype in dtypes and is_aligned


def _check(
    x_TD: torch.Tensor,
    gate_up_proj_E2FD: torch.Tensor,
    down_proj_EDF: torch.Tensor,
    top_k_index_TK: torch.Tensor,
    top_k_weights_TK: torch.Tensor,
) -> None:
    num_experts, hidden, intermediate = down_proj_EDF.shape
    if gate_up_proj_E2FD.shape != (num_experts, 2 * intermediate, hidden):
        raise ValueError(
            f"gate_up_proj has shape {tuple(gate_up_proj_E2FD.shape)}, expected (E, 2F, D) = "
            f"{(num_experts, 2 * intermediate, hidden)} for down_proj (E, D, F) = "
            f"{tuple(down_proj_EDF.shape)}"
        )
    if x_TD.ndim != 2 or x_TD.shape[1] != hidden:
        raise ValueError(f"x has shape {tuple(x_TD.shape)}, expected (T, {hidden})")
    if top_k_index_TK.ndim != 2 or top_k_index_TK.shape[0] != x_TD.shape[0]:
        raise ValueError(
            f"top_k_index has shape {tuple(top_k_index_TK.shape)}, expected ({x_TD.shape[0]}, K)"
        )
    if top_k_weights_TK.shape != top_k_index_TK.shape:
        raise ValueError(
            f"top_k_weights has shape {tuple(top_k_weights_TK.shape)}, top_k_index "
            f"{tuple(top_k_index_TK.shape)}; they must agree"
        )
    dtypes = {x_TD.dtype, gate_up_proj_E2FD.dtype, down_proj_EDF.dtype}
    if len(dtypes) > 1 and not torch.is_autocast_enabled(x_TD.device.type):
        raise ValueError(
            f"x is {x_TD.dtype} but gate_up_proj {gate_up_proj_E2FD.dtype} and down_proj "
            f"{down_proj_EDF.dtype}; cast them to one dtype or run under torch.autocast"
        )
