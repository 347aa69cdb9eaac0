"""Load balancing of a top-k router: its statistics, its loss and the gradient of that loss."""

from monkey_patch.kernels.router.op import add_balance_gradient, routed_counts, routing_sums

__all__ = ["add_balance_gradient", "routed_counts", "routing_sums"]
