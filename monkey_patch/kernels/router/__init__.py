"""A top-k router: softmax, choice, load statistics, and the gradient of its balance loss.

The experts themselves are `kernels/scatter_moe/`.
"""

from monkey_patch.kernels.router.op import Balance, Routed, route

__all__ = ["Balance", "Routed", "route"]
