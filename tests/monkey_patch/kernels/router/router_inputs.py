"""Logits, a balance loss, and what the router makes of them: fused, and by definition."""

import torch

from monkey_patch.kernels.router.op import Balance, route
from monkey_patch.kernels.router.reference import balance_loss_reference, route_reference

COEFFICIENT, GLOBAL_TOKENS = 40.0, 100


def random_logits(tokens, experts, dtype=torch.float32):
    return (2 * torch.randn(tokens, experts)).to(dtype)


def make_balance(logits, num_rows, masked=True):
    tokens, experts = logits.shape
    mask = torch.rand(tokens) > 0.3 if masked else None
    return Balance(mask, num_rows, torch.tensor(COEFFICIENT * experts / GLOBAL_TOKENS))


def direction_of(weights):
    """A gradient that every dtype here represents exactly; the same for the same shape."""
    seeded = torch.Generator().manual_seed(1)
    return torch.randint(-64, 65, weights.shape, generator=seeded).to(weights.dtype) / 32


def run(logits, top_k, renormalize, balance=None, function=route):
    """Return what `function` routes, and the gradient of the logits."""
    logits = logits.detach().requires_grad_()
    routed = function(logits, top_k, renormalize=renormalize, balance=balance)
    (gradient,) = torch.autograd.grad(routed.weights, logits, direction_of(routed.weights))
    return routed, gradient


def truth_of(logits, top_k, renormalize, balance=None):
    """Return weights, index, probabilities and the gradient of the logits in float64."""
    logits = logits.detach().double().requires_grad_()
    weights, index, probs = route_reference(logits, top_k, renormalize=renormalize)
    loss = (weights * direction_of(weights)).sum()
    if balance is not None:
        mask = torch.ones(len(logits), dtype=torch.bool) if balance.mask is None else balance.mask
        rows = (balance.num_rows, len(logits) // balance.num_rows)
        loss = loss + COEFFICIENT * balance_loss_reference(
            probs.view(*rows, -1), index.view(*rows, -1), mask.view(rows), GLOBAL_TOKENS
        )
    (gradient,) = torch.autograd.grad(loss, logits)
    return weights, index, probs, gradient
