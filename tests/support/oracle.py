"""Independent references and the one tolerance table of the test suite."""

from __future__ import annotations

import torch

# Allowed RMS(error) / RMS(reference) per dtype. A result of n accumulated roundings of unit
# roundoff u has a relative error around u * sqrt(n); the tiny models sum some thousand terms.
# float64 u = 1.1e-16, float32 u = 6e-8, bfloat16 u = 3.9e-3, float16 u = 4.9e-4.
RMS_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
}


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, *, name: str = "tensor", rms: float | None = None
) -> None:
    """Compare by RMS(error) / RMS(expected); the message carries all that one needs to debug.

    Args:
        actual: what the code under test produced.
        expected: the reference; compared in float64 whatever its dtype.
        name: what to call it in the message.
        rms: allowed ratio; by default the entry of ``RMS_TOLERANCE`` for ``actual.dtype``.
    """
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape} != {expected.shape}"
    limit = RMS_TOLERANCE[actual.dtype] if rms is None else rms
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert torch.isfinite(a).all(), f"{name}: {int((~torch.isfinite(a)).sum())} values not finite"
    if a.numel() == 0:
        return
    error = (a - e).abs()
    ratio = ((a - e).square().mean().sqrt() / e.square().mean().sqrt().clamp_min(1e-30)).item()
    worst = int(error.argmax())
    got, wanted = a.flatten()[worst].item(), e.flatten()[worst].item()
    assert ratio <= limit, (
        f"{name}: RMS ratio {ratio:.3e} > {limit:.1e}, max abs {error.max().item():.3e} at flat "
        f"index {worst} (got {got:.6g}, expected {wanted:.6g}), "
        f"{actual.dtype} {tuple(actual.shape)}"
    )
