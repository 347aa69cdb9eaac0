"""The fused router as a GPU runs it, against plain torch in float64."""

import pytest
import torch

from monkey_patch.kernels.router.op import Balance, routed_counts, routing_sums
from tests.monkey_patch.kernels.router.router_inputs import (
    make_balance,
    random_logits,
    run,
    truth_of,
)
from tests.support.oracle import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "num_rows", "experts", "top_k"),
    [(32768, 1, 128, 8), (8192, 2, 128, 8), (999, 3, 60, 4), (77, 1, 512, 10), (7, 1, 5, 5)],
)
def test_agrees_with_the_definition(tokens, num_rows, experts, top_k, dtype, renormalize):
    logits = random_logits(tokens, experts, dtype)
    balance = make_balance(logits, num_rows)
    on_gpu = Balance(balance.mask.cuda(), num_rows, balance.scale.cuda())
    routed, gradient = run(logits.cuda(), top_k, renormalize, on_gpu)
    weights, index, probs, expected = truth_of(logits, top_k, renormalize, balance)
    # Neighbours that the kernel's exponential makes equal may change places.
    same = (routed.index.cpu() == index).all(dim=1)
    assert same.float().mean() > 0.999
    assert_close(routed.weights.cpu()[same], weights[same], name="weights")
    assert_close(gradient.cpu()[same], expected[same], name="d_logits")
    counts = routed_counts(routed.index.cpu(), balance.mask, num_rows, experts)
    assert torch.equal(routed.counts.cpu(), counts)
    sums = routing_sums(probs.detach(), balance.mask, counts)
    assert_close(routed.sums.cpu(), sums, rms=1e-5)
    again, gradient_again = run(logits.cuda(), top_k, renormalize, on_gpu)
    assert torch.equal(routed.weights, again.weights)
    assert torch.equal(gradient, gradient_again)
