"""Names for the parts of a model in a profile: a range around each module's forward.

A hook opens the range and another closes it, also where a recomputed forward is left half-way
because all that it had to restore is there. The attention function is no module; its registry entry
is wrapped instead, so that rotary embedding and kernel, which both lie in `self_attn`, part.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

from torch import nn
from torch.profiler import record_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_moe import modeling_qwen3_moe

PREFIX = "bench::"
COMPONENTS = (
    "attention",  # the attention function and what is done for its mask
    "projections",  # q, k, v and o
    "experts",
    "router",
    "dense",  # MLP of layers without experts
    "norms_rope",  # norms, rotary embedding, residual additions
    "embedding",
    "cross_entropy",  # with the lm_head
    "optimizer",  # clipping, update and accumulation of gradients
    "other",
)
ALL = f"{PREFIX}all"

# Last part of a module's name -> component. What a module does outside of its children counts too:
# a decoder's own work is its mask, a layer's its residual additions, an attention's the embedding
# of positions, a causal LM's the choice of labelled positions.
_BY_NAME = {
    "q_proj": "projections", "k_proj": "projections", "v_proj": "projections",
    "o_proj": "projections", "self_attn": "norms_rope", "q_norm": "norms_rope",
    "k_norm": "norms_rope", "norm": "norms_rope", "input_layernorm": "norms_rope",
    "post_attention_layernorm": "norms_rope", "rotary_emb": "norms_rope", "gate": "router",
    "experts": "experts", "embed_tokens": "embedding", "lm_head": "cross_entropy",
    "model": "attention", "": "cross_entropy",
}  # fmt: skip


def component_of(name: str, module: nn.Module) -> str | None:
    """Return the component of a module of a Qwen3-MoE by its name, None for those without one."""
    last = name.rsplit(".", 1)[-1]
    if last == "mlp":
        return "experts" if "experts" in dict(module.named_children()) else "dense"
    if last.isdecimal():
        return "norms_rope"
    return _BY_NAME.get(last)


class Ranges:
    """Ranges on a model, its trainer's clipping and the attention function, until `close`."""

    def __init__(self, model: Any, accelerator: Any) -> None:
        self._stack = ExitStack()
        for name, module in model.named_modules():
            if component := component_of(name, module):
                self._on_module(module, component)
        attention = model.config._attn_implementation
        if attention == "eager":
            self._replace(modeling_qwen3_moe, "eager_attention_forward", "attention")
        else:
            function = ALL_ATTENTION_FUNCTIONS[attention]
            ALL_ATTENTION_FUNCTIONS[attention] = ranged("attention", function)
            # A local entry hides the one that all models share.
            self._stack.callback(ALL_ATTENTION_FUNCTIONS.__delitem__, attention)
        self._replace(accelerator, "clip_grad_norm_", "optimizer")

    def close(self) -> None:
        """Take all of them away."""
        self._stack.close()

    def _replace(self, owner: Any, name: str, component: str) -> None:
        original = getattr(owner, name)
        is_own = name in vars(owner)
        setattr(owner, name, ranged(component, original))
        if is_own:
            self._stack.callback(setattr, owner, name, original)
        else:
            self._stack.callback(delattr, owner, name)

    def _on_module(self, module: nn.Module, component: str) -> None:
        open_ranges: list[record_function] = []

        def enter(*_: Any) -> None:
            open_ranges.append(record_function(PREFIX + component))
            open_ranges[-1].__enter__()

        def leave(*_: Any) -> None:
            open_ranges.pop().__exit__(None, None, None)

        before = module.register_forward_pre_hook(enter)
        after = module.register_forward_hook(leave, always_call=True)
        self._stack.callback(before.remove)
        self._stack.callback(after.remove)


def ranged(component: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` inside a range of its own."""

    @wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + component):
            return function(*args, **kwargs)

    return inside
