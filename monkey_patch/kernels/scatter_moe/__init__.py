"""Mixture-of-experts feed-forward: gather by expert, two grouped products, weighted scatter."""

from monkey_patch.kernels.scatter_moe.op import scatter_moe

__all__ = ["scatter_moe"]
