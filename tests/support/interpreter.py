"""Triton's interpreter for this test process, with bfloat16 and e4m3 made right.

The interpreter is chosen when kernels are decorated, Triton's own helpers included, so the variable
has to be set before the first import of triton. It is taken back afterwards: the public functions
look at it at each call and use the kernels on CPU tensors only while it is set (see
`use_kernels`). Triton 3.7.1 multiplies the bit patterns of bfloat16, truncates instead of rounding
when it casts to it and gets its denormals wrong; its casts to e4m3 round ties away from zero and
are off among denormals, and its products in e4m3 take NaN for 480. All of this is mended here.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import pytest
import torch

VARIABLE = "TRITON_INTERPRET"
KERNEL_MODULES = (
    "monkey_patch.kernels.interpreter_check",
    "monkey_patch.kernels.scatter_moe.triton.fp8.stages",
    "monkey_patch.kernels.router.triton.stages",
    "monkey_patch.kernels.linear_cross_entropy.triton.rows",
)


def enable() -> None:
    """Import triton and the project's kernels in interpreted form."""
    if torch.cuda.is_available() and os.environ.get(VARIABLE) != "1":
        return
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before tests.support.interpreter.enable()")
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    _mend_index()
    _mend_bfloat16()
    _mend_e4m3()
    for name in KERNEL_MODULES:
        __import__(name)
    if before is None:
        del os.environ[VARIABLE]


def use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send CPU tensors through the interpreted kernels for the rest of the test."""
    if torch.cuda.is_available():
        pytest.skip("Triton compiles in this process; tests/gpu runs the kernels themselves")
    monkeypatch.setenv(VARIABLE, "1")


def _mend_index() -> None:
    """Let a scalar be a bound of a loop although numpy 2.5 makes no number of an array of one.

    Remove when setup.py asks for Triton 3.7: this function
    """
    from triton.runtime import interpreter

    plain = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def _mend_bfloat16() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl

    def widen(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return plain_dot(self, widen(a), widen(b), d, *options)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) == (tl.bfloat16, tl.float32):
            return widen(src)
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return plain_cast(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
        data = rounded.view(torch.uint16).numpy().reshape(src.data.shape)
        return interpreter.TensorHandle(data, tl.bfloat16)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def _mend_e4m3() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    plain_dot, plain_cast = builder.create_dot, builder.create_fp_to_fp

    def widen(handle: Any) -> Any:
        if handle.dtype.scalar != tl.float8e4nv:
            return handle
        values = torch.from_numpy(np.ascontiguousarray(handle.data)).view(torch.float8_e4m3fn)
        return interpreter.TensorHandle(values.float().numpy(), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return plain_dot(self, widen(a), widen(b), d, *options)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.float8e4nv):
            return plain_cast(self, src, dst_type, rounding_mode)
        # The cast of every GPU that has one: to the nearest, ties to even, 448 at most.
        clamped = torch.from_numpy(np.ascontiguousarray(src.data)).clamp(-448, 448)
        data = clamped.to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(src.data.shape)
        return interpreter.TensorHandle(data, tl.float8e4nv)

    builder.create_dot, builder.create_fp_to_fp = create_dot, create_fp_to_fp
