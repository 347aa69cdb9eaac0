"""What the tests of the FP8 kernels share: a cut, and the comparison of quantised tensors."""

import torch

from monkey_patch.kernels.scatter_moe.quantize import E4M3, E8M0
from monkey_patch.kernels.scatter_moe.triton.tiles import Tiles

CUT = Tiles(block_m=32, block_n=128, block_k=128, num_warps=4, num_stages=1, tma=True)


def assert_same_bits(got, expected):
    """Values and scales; a NaN may have any bits."""
    for a, e in zip(got[:2], expected[:2], strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        whole_number = torch.uint8 if a.dtype in (E4M3, E8M0) else torch.int32
        is_nan = e.float().isnan()
        assert torch.equal(a.float().isnan(), is_nan)
        assert torch.equal(a.view(whole_number)[~is_nan], e.view(whole_number)[~is_nan])
