"""Causal attention over documents packed into one row."""

from monkey_patch.kernels.varlen_attention.op import varlen_attention

__all__ = ["varlen_attention"]
