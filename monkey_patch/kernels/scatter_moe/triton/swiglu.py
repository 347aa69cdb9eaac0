"""SwiGLU inside a kernel, value and gradient, and the halves of a tile that epilogues work on."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def halves(x):
    """Split the columns without moving anything: a thread holds columns of both halves."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def whole(left, right):
    """Undo `halves`."""
    return tl.join(left, right).permute(0, 2, 1).reshape(left.shape[0], 2 * left.shape[1])


@triton.jit
def swiglu(gate, up, rows, columns, mask, hidden_ptr, F: tl.constexpr, STORE_HIDDEN: tl.constexpr):
    """Return silu(gate) * up in float32, and store both in (N, 2F) if STORE_HIDDEN.

    Rows are (M, 1) int64, columns (1, N), the mask tells what is stored. `hidden_ptr` gives the
    dtype to round to even where nothing is stored.
    """
    # The backward pass computes act again from the stored hidden: round before, not after.
    gate = gate.to(hidden_ptr.dtype.element_ty)
    up = up.to(hidden_ptr.dtype.element_ty)
    if STORE_HIDDEN:
        hidden_ptrs = hidden_ptr + rows * (2 * F) + columns
        tl.store(hidden_ptrs, gate, mask=mask)
        tl.store(hidden_ptrs + F, up, mask=mask)
    gate = gate.to(tl.float32)
    return gate * tl.sigmoid(gate) * up.to(tl.float32)


@triton.jit
def swiglu_gradient(
    d_act,
    factor,
    rows,
    columns,
    mask,
    hidden_ptr,
    d_hidden_ptr,
    scaled_act_ptr,
    F: tl.constexpr,
    STORE_ACT: tl.constexpr,
):
    """Store the gradients of gate and up, and factor * act if STORE_ACT.

    `d_act` is the (M, N) float32 gradient of factor * act, rows (M, 1) int64, columns (1, N), the
    mask tells what exists. Hidden and d_hidden are (N, 2F), gate before up, and may be the same
    memory; scaled_act is (N, F).

    Returns:
        <d_act, act> of every row, and the gradients of gate and up as stored.
    """
    places = rows * (2 * F) + columns
    gate = tl.load(hidden_ptr + places, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(hidden_ptr + places + F, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    act = silu * up
    factor = factor[:, None]
    if STORE_ACT:
        scaled = (act * factor).to(scaled_act_ptr.dtype.element_ty)
        tl.store(scaled_act_ptr + rows * F + columns, scaled, mask=mask)
    d_factor = tl.sum(tl.where(mask, d_act * act, 0.0), axis=1)
    d_act *= factor
    d_gate = d_act * up * (sigmoid + silu * (1.0 - sigmoid))
    d_gate = d_gate.to(d_hidden_ptr.dtype.element_ty)
    tl.store(d_hidden_ptr + places, d_gate, mask=mask)
    d_up = (d_act * silu).to(d_hidden_ptr.dtype.element_ty)
    tl.store(d_hidden_ptr + places + F, d_up, mask=mask)
    return d_factor, d_gate, d_up
