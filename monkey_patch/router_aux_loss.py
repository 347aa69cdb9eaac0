"""Balance the experts: a per-layer, per-row load-balancing loss and its statistics.

Transformers pools all layers before it multiplies counts and probabilities, so layers that collapse
on different experts look balanced, and Trainer multiplies the term by accumulation steps and world
size. Here each router adds the gradient of its own loss in the backward pass, weighted by real
tokens over the global number of tokens, so that the sum over micro-batches and ranks does not
depend on how the batch is cut. The model's outputs, its loss value included, are upstream's.

    statistics = router_statistics(model)
    statistics.begin(token_mask, num_rows=1, weight=loss_scale / num_global_tokens)
    model(...).loss.backward()          # one begin() before each training forward
    metrics = statistics.drain()        # at logging steps

A loop one does not own can call begin() from `model.register_forward_pre_hook`. The backward of one
forward has to be over before the next begin(): recomputed layers read its mask and weight again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from monkey_patch.architectures import softmax_routers
from monkey_patch.core import Patch, PatchError, Replacement, class_name
from monkey_patch.kernels.router.op import Balance, route

NAME = "router_aux_loss"
# What transformers calls modules that choose experts.
_ROUTER_NAMES = ("TopKRouter", "TopkRouter", "Router", "MoEGate", "MoeGate", "TopKGating")


class LayerStatistics:
    """Device accumulators of one router, fed without a host synchronisation.

    Attributes:
        tokens_per_expert: (E,) int64, real (token, k) pairs.
        sums: (3,) float64 of `routing_sums`.
        fresh: 0-dim, 1 from begin() until the layer has counted its tokens. A layer that is
            recomputed in the backward pass finds 0 and adds nothing. A tensor, not a flag, so that
            compiled layers have nothing to branch on.
    """

    def __init__(self, num_experts: int):
        self.tokens_per_expert = torch.zeros(num_experts, dtype=torch.int64)
        self.sums = torch.zeros(3, dtype=torch.float64)
        self.fresh = torch.zeros((), dtype=torch.int64)

    def begin(self, device: torch.device) -> None:
        """Move to `device` and expect one forward."""
        self.tokens_per_expert = self.tokens_per_expert.to(device)
        self.sums = self.sums.to(device)
        self.fresh = torch.ones((), dtype=torch.int64, device=device)

    def add(self, tokens_per_expert: torch.Tensor, sums: torch.Tensor) -> None:
        """Accumulate one forward's numbers unless they are a recomputation's.

        In place and by method: torch.compile takes a checkpointed region that writes to a tensor,
        but none that assigns to an attribute, which `+=` does.
        """
        self.tokens_per_expert.add_(tokens_per_expert * self.fresh)
        self.sums.add_(sums * self.fresh)
        self.fresh.zero_()

    def reset(self) -> None:
        """Forget what was accumulated."""
        self.tokens_per_expert.zero_()
        self.sums.zero_()


class RouterStatistics:
    """Load-balancing state shared by the routers of one model.

    Attributes:
        coefficient: factor of the balance loss; config.router_aux_loss_coef to begin with.
        layers: one `LayerStatistics` per router, first layer first.
    """

    def __init__(self, coefficient: float):
        self.coefficient = coefficient
        self.layers: list[LayerStatistics] = []
        self.token_mask: torch.Tensor | None = None
        self.num_rows = 0
        self.weight: torch.Tensor | None = None

    @property
    def tokens_per_expert(self) -> torch.Tensor:
        """(L, E) int64, real (token, k) pairs since the last drain."""
        return torch.stack([layer.tokens_per_expert for layer in self.layers])

    def begin(self, token_mask: torch.Tensor | None, num_rows: int, weight: torch.Tensor) -> None:
        """Announce the next training forward.

        Args:
            token_mask: bool, as many elements as the forward has tokens, True at real ones; None
                when there is no padding.
            num_rows: the equally long rows the tokens consist of; each is balanced on its own.
            weight: 0-dim device tensor, loss scale over the real tokens of the whole step.
        """
        self.token_mask = None if token_mask is None else token_mask.reshape(-1)
        self.num_rows = num_rows
        self.weight = weight
        for layer in self.layers:
            layer.begin(weight.device)

    def drain(
        self, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> dict[str, float]:
        """Return the metrics since the last drain and start over; synchronises with the host.

        Args:
            reduce: adds a tensor up over ranks, such as `accelerator.reduce`; called once.

        Returns:
            `aux_loss` (mean over layers and real tokens, without the coefficient),
            `router_entropy` (the same mean, nats) and `expert_load_max_over_mean` (of the layer
            where it is highest). Empty if no token has been counted.
        """
        sums = torch.stack([layer.sums for layer in self.layers])
        packed = torch.cat([sums, self.tokens_per_expert.double()], dim=1)
        packed = (packed if reduce is None else reduce(packed)).cpu()
        for layer in self.layers:
            layer.reset()
        entropy, aux_loss, tokens = packed[:, :3].sum(dim=0).tolist()
        if tokens == 0:
            return {}
        load = packed[:, 3:]
        return {
            "aux_loss": aux_loss / tokens,
            "router_entropy": entropy / tokens,
            "expert_load_max_over_mean": (load.amax(dim=1) / load.mean(dim=1)).max().item(),
        }


class RouterForward:
    """A router's forward that also counts and balances.

    Its bound method becomes an instance attribute of the router, so that hooks still fire. Not a
    callable object: torch.compile would guard on its identity and recompile for every layer.
    """

    def __init__(self, router: Any, statistics: RouterStatistics):
        self.router = router
        self.statistics = statistics
        self.layer = LayerStatistics(router.num_experts)
        statistics.layers.append(self.layer)

    def forward(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return upstream's logits (T, E), weights (T, K) and expert indices (T, K)."""
        router = self.router
        logits = F.linear(hidden_states.reshape(-1, router.hidden_dim), router.weight)
        routed = route(
            logits,
            router.top_k,
            # Qwen3-VL-MoE has no such attribute and always renormalises.
            renormalize=getattr(router, "norm_topk_prob", True),
            balance=self._balance(len(logits)) if router.training else None,
        )
        if routed.counts is not None and routed.sums is not None:
            self.layer.add(routed.counts.sum(dim=0), routed.sums)
        return logits, routed.weights, routed.index

    def _balance(self, num_tokens: int) -> Balance | None:
        stats = self.statistics
        if stats.weight is None:
            if stats.coefficient == 0:
                return None
            raise PatchError(
                "training forward before RouterStatistics.begin(): call router_statistics(model)"
                ".begin(token_mask, num_rows, weight) before each one, or set .coefficient to 0"
            )
        self._check_tokens(num_tokens)
        factor = stats.coefficient * self.router.num_experts / len(stats.layers)
        return Balance(stats.token_mask, stats.num_rows, stats.weight * factor)

    def _check_tokens(self, num_tokens: int) -> None:
        mask, num_rows = self.statistics.token_mask, self.statistics.num_rows
        if num_tokens % num_rows or (mask is not None and mask.numel() != num_tokens):
            masked = "no mask" if mask is None else f"a mask of {mask.numel()}"
            raise PatchError(
                f"the router sees {num_tokens} tokens but RouterStatistics.begin() announced "
                f"{num_rows} rows and {masked}; call begin() before each training forward"
            )


def router_statistics(model: nn.Module) -> RouterStatistics:
    """Return the statistics of a model patched with "router_aux_loss".

    Raises:
        PatchError: the model is not patched.
    """
    for module in model.modules():
        owner = getattr(vars(module).get("forward"), "__self__", None)
        if isinstance(owner, RouterForward):
            return owner.statistics
    raise PatchError(f"{type(model).__name__} is not patched with {NAME!r}; apply it first")


def plan(model: Any) -> Iterator[Replacement]:
    """Yield the forward of every router; they share one `RouterStatistics`."""
    routers = _known_routers(model)
    if not routers:  # nor are the config's entries there that follow
        return
    config = model.config.get_text_config()
    if config.output_router_logits:
        raise PatchError(
            f"patch {NAME!r}: config.output_router_logits is True, which adds upstream's router "
            "loss as well; set it to False"
        )
    statistics = RouterStatistics(config.router_aux_loss_coef)
    for name, module in routers.items():
        yield Replacement(module, "forward", RouterForward(module, statistics).forward, name)


def _known_routers(model: nn.Module) -> dict[str, nn.Module]:
    known, found = softmax_routers(), {}
    for name, module in model.named_modules():
        kind = class_name(module)
        if kind in known:
            found[name] = module
        elif kind.endswith(_ROUTER_NAMES):
            raise PatchError(
                f"patch {NAME!r}: {name} is a {kind}, which routes in another way than softmax and "
                f"top-k, or was not compared; it knows {', '.join(known)}. Without the patch "
                "the model balances its experts as transformers has it"
            )
    return found


ROUTER_AUX_LOSS = Patch(
    name=NAME,
    summary="load balancing per layer and row, invariant to accumulation and world size",
    requires=("transformers>=5.23,<6", "torch>=2.10"),
    plan=plan,
    tolerance=0.0,
    upstream="transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeTopKRouter.forward; "
    "https://github.com/huggingface/transformers/issues/48690",
)
