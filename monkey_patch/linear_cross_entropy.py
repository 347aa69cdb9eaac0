"""Compute the loss on labelled positions only, and never the (T, V) logits.

With `label_positions` and `label_targets` in the batch the causal LM selects those hidden states
and asks its `lm_head` for the summed cross entropy; without them it behaves as upstream does. The
loss is computed inside the head module, so that the parameter-gathering hooks of FSDP and ZeRO fire
for it as for any other forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from monkey_patch.architectures import architecture_of
from monkey_patch.core import Patch, PatchError, Replacement, class_name
from monkey_patch.kernels.linear_cross_entropy.op import linear_cross_entropy_sum

if TYPE_CHECKING:
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast

NAME = "linear_cross_entropy"


class HeadForward:
    """An `lm_head`'s forward that returns logits, or the summed cross entropy with targets.

    Its bound method becomes an instance attribute of the head, so that the module, its Parameter
    and the hooks on it (those of FSDP and ZeRO among them) stay what they are.
    """

    def __init__(self, head: nn.Linear):
        self.head = head

    def forward(self, input: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits (..., V), or for input (N, D) and targets (N,) the loss sum, a scalar."""
        if targets is None:
            return F.linear(input, self.head.weight)
        return linear_cross_entropy_sum(input, self.head.weight, targets)


class LabelledForward:
    """The causal LM's forward with a branch for labelled positions; set on the instance.

    Keeps upstream's signature and adds its own names to it, because generate() and Trainer look
    arguments up there.
    """

    def __init__(self, model: Any):
        self.model = model
        self.original: Callable[..., MoeCausalLMOutputWithPast] = model.forward

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.original)
        known = list(signature.parameters.values())
        mine = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in ("label_positions", "label_targets", "num_items_in_batch")
        ]
        return signature.replace(parameters=[*known[:-1], *mine, known[-1]])

    def __call__(
        self,
        *args: torch.Tensor,
        label_positions: torch.Tensor | None = None,
        label_targets: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple[torch.Tensor, ...]:
        """Run the model; with labelled positions return the loss and no logits.

        Args:
            *args: as upstream; with labelled positions at most `input_ids`.
            label_positions: (N,) int64 into the flattened (B * T) hidden states.
            label_targets: (N,) int64, the token that each of those states has to predict. The
                shift by one is the caller's.
            **kwargs: as upstream; `labels` is ignored when positions are given, and
                `num_items_in_batch` divides the summed loss (the number of targets by default).

        Raises:
            ValueError: only one of positions and targets is given, or router logits are asked for.
        """
        if (label_positions is None) != (label_targets is None):
            raise ValueError("give label_positions and label_targets together, or neither")
        if label_positions is None or label_targets is None:
            return self.original(*args, **kwargs)
        return self._labelled(label_positions, label_targets, *args, **kwargs)

    def _labelled(
        self,
        positions: torch.Tensor,
        targets: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        *,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_dict: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple[torch.Tensor, ...]:
        from transformers.modeling_outputs import MoeCausalLMOutputWithPast

        wants_router = self.model.config.get_text_config().output_router_logits
        if wants_router if output_router_logits is None else output_router_logits:
            raise ValueError(
                "with label_positions the router aux loss is not computed from router logits; set "
                "output_router_logits=False and apply the patch router_aux_loss"
            )
        outputs = self.model.model(input_ids=input_ids, **kwargs)
        hidden_TD = outputs.last_hidden_state.flatten(0, 1)
        loss_sum = self.model.lm_head(hidden_TD.index_select(0, positions), targets=targets)
        count = max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch
        if isinstance(count, torch.Tensor):
            count = count.to(loss_sum.device)
        result = MoeCausalLMOutputWithPast(
            loss=loss_sum / count,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result.to_tuple() if return_dict is False else result


def plan(model: nn.Module) -> Iterator[Replacement]:
    """Yield the head and the forward of every causal LM inside `model` that it knows."""
    causal_lms = architecture_of(model).causal_lms
    for name, module in model.named_modules():
        if class_name(module) not in causal_lms:
            continue
        where = name or class_name(module)
        head: Any = module.lm_head
        if problem := _unsupported(head):
            raise PatchError(f"patch {NAME!r}: {where}.lm_head {problem}")
        yield Replacement(head, "forward", HeadForward(head).forward, f"{where}.lm_head")
        yield Replacement(module, "forward", LabelledForward(module), where)


def _unsupported(head: nn.Module) -> str | None:
    kind = type(head)
    if kind.forward is not nn.Linear.forward:  # FSDP2 subclasses nn.Linear and keeps its forward
        return (
            f"is {kind.__module__}.{kind.__qualname__}, not nn.Linear; leave it out of LoRA's "
            "target_modules and of quantisation"
        )
    if head.bias is not None:
        return "has a bias"
    if "forward" in vars(head):
        return "has a replaced forward already"
    return None


LINEAR_CROSS_ENTROPY = Patch(
    name=NAME,
    summary="cross entropy on labelled positions in chunks, without logits",
    requires=("transformers>=5.23,<6", "torch>=2.10"),
    plan=plan,
    tolerance=5e-6,
    upstream="transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeForCausalLM.forward",
)
