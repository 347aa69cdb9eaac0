"""Cross entropy of a linear head without the (N, V) logits.

`op.py` goes through the positions in chunks (`chunk.py`); `triton/` turns the logits of one into
their gradient in place.
"""

from monkey_patch.kernels.linear_cross_entropy.op import linear_cross_entropy_sum

__all__ = ["linear_cross_entropy_sum"]
