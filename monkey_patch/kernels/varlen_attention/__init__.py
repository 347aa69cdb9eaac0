"""Causal attention over documents packed into one row.

It calls torch's kernels; there is none of our own.
"""

from monkey_patch.kernels.varlen_attention.op import varlen_attention

__all__ = ["varlen_attention"]
