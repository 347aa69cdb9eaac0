"""Mixture-of-experts feed-forward: gather by expert, two grouped products, weighted scatter.

Choosing a token's experts is `kernels/router/`, changing a model `monkey_patch/scatter_moe.py`.
"""

from monkey_patch.kernels.scatter_moe.op import scatter_moe

__all__ = ["scatter_moe"]
