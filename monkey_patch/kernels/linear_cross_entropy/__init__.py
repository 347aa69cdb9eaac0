"""Cross entropy of a linear head without the (N, V) logits.

In plain torch, chunk by chunk: there is no Triton kernel.
"""

from monkey_patch.kernels.linear_cross_entropy.op import linear_cross_entropy_sum

__all__ = ["linear_cross_entropy_sum"]
