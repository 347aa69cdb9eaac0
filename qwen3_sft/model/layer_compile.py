"""Each decoder layer compiled by itself, and one compiled graph for all layers of a kind.

The whole model as one graph would compile 48 copies of the same layer, take minutes and be
compiled again for any change. A layer is the largest part that repeats. What differs between two
calls of it is the packing: how many documents lie in a row and how long the longest is. Both are
symbols in the graph, so that no batch makes a second one.

Checkpointing decides where the compiled region lies:
- none: the layer is the region.
- full: the checkpoint is around the region. Forward and recomputation are then the same compiled
  code with the same bits. Within the region the compiler would fuse the recomputation with the
  backward, and a router logit that differs in its last bit can choose another expert.
- selective: the checkpoint is within the region, because a policy sees no operator inside compiled
  code. The compiler honours it: what it keeps, the routing with it, is not in the backward's graph.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState

from monkey_patch.compiled import compiled
from qwen3_sft.distributed.engine import Engine
from qwen3_sft.errors import UsageError
from qwen3_sft.families.family import family_of
from qwen3_sft.options.model_args import EXPERT_PATCHES
from qwen3_sft.options.recipe import Options

logger = logging.getLogger(__name__)

# Attention that was compiled without a break in the graph here; FlashAttention's packages were not.
_WITHOUT_BREAKS = ("torch_varlen", "sdpa")
# CUDA graphs are recorded anew for every number of documents.
_MODES = (None, "default", "max-autotune-no-cudagraphs")
# Graphs before torch gives up and runs the layer as it is; a run needs one per kind of layer.
_MAX_GRAPHS = 64
_SETTLED_AFTER = 20  # steps in which a run may still meet something new


def check_compile(options: Options, engine: Engine) -> None:
    """Refuse what compiled layers do not go with.

    Args:
        options: of the run.
        engine: what spreads the run over processes.

    Raises:
        UsageError: naming the option and what to set instead.
    """
    train, model = options.train, options.model
    if not train.torch_compile:
        return
    name = "--torch_compile true"
    if engine.kind not in ("single", "ddp"):
        raise UsageError(
            f"{name} is for whole weights and this is {engine}: sharded weights are gathered and "
            "freed by hooks inside a layer, which is not tested here; leave it out"
        )
    if model.use_liger:
        raise UsageError(
            f"{name} with --use_liger true: the compiler fuses norms and RoPE with what is around "
            "them and cannot look into Liger's kernels; set one of the two"
        )
    if model.experts_implementation not in EXPERT_PATCHES:
        raise UsageError(
            f"{name} with --experts_implementation {model.experts_implementation}: only "
            f"{' and '.join(EXPERT_PATCHES)} are one operator to the compiler; use one of them"
        )
    if model.attn_implementation == "eager":
        raise UsageError(f"{name} with --attn_implementation eager is not tested; use auto")
    policy = train.activation_checkpointing
    if train.activation_offload and policy in ("selective", "auto"):
        raise UsageError(
            f"{name} with --activation_checkpointing {policy} keeps activations within compiled "
            "code, where --activation_offload cannot move them: set --activation_checkpointing "
            "full, or leave one of the three out"
        )


def compile_layers(model: PreTrainedModel, *, mode: str | None = None, backend: Any = None) -> int:
    """Compile every decoder layer of `model` in place, lazily, for training.

    Call it after the patches and after `enable_checkpointing`, before the model is wrapped for
    DDP. Names of weights, modules and classes stay as they are. Evaluation and generation, whose
    shapes differ, run uncompiled.

    Args:
        model: of a family.
        mode: as in `torch.compile`, without CUDA graphs.
        backend: as in `torch.compile`; inductor by default.

    Returns:
        The number of kinds of layers, each of which becomes one graph.

    Raises:
        ValueError: an unknown mode, or no decoder layer.
        ModelError: no family has the model's `model_type`.
    """
    if mode not in _MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {_MODES}")
    architecture = family_of(model.config).architecture
    layers = architecture.layers_in(model).values()
    if not layers:
        names = " or ".join(architecture.layers)
        raise ValueError(f"{type(model).__name__} has no layer called {names}")
    attention = model.config.get_text_config()._attn_implementation
    # It would cut a layer where a bucket of gradients ends; layers are small enough to overlap.
    torch._dynamo.config.optimize_ddp = False
    run = compiled(
        _run, _MAX_GRAPHS, fullgraph=attention in _WITHOUT_BREAKS, mode=mode,
        backend=backend or "inductor",
    )  # fmt: skip
    for layer in layers:
        setattr(layer, "forward", _CompiledForward(layer, run).forward)  # noqa: B010
    kinds = len({_kind(layer) for layer in layers})
    logger.info("compiling %d layers of %d kinds in the first step", len(layers), kinds)
    return kinds


class _CompiledForward:
    """A decoder layer's forward; its bound method becomes an attribute of the layer."""

    def __init__(self, layer: nn.Module, compiled: Callable[..., Any]) -> None:
        self.layer = layer
        self.compiled = compiled
        self.is_selective = _is_selective(layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the compiled layer in training and the layer as it is elsewhere."""
        layer: Any = self.layer
        forward = type(layer).forward
        if not layer.training:
            return forward(layer, *args, **kwargs)
        if not self.is_selective:
            # transformers wraps the forward of a layer class in one that checkpoints.
            forward = inspect.unwrap(forward)
        run = partial(self.compiled, forward, layer, _longest(kwargs), kwargs)
        if layer.gradient_checkpointing and not self.is_selective:
            return layer._gradient_checkpointing_func(run, *args)
        return run(*args)


def _run(
    forward: Callable[..., Any],
    layer: nn.Module,
    longest: Tensor | None,
    kwargs: dict[str, Any],
    *args: Any,
) -> Any:
    """Run a layer: what is compiled."""
    if longest is not None:
        kwargs = {**kwargs, "max_length_q": longest.shape[0], "max_length_k": longest.shape[0]}
    return forward(layer, *args, **kwargs)


def _longest(kwargs: dict[str, Any]) -> Tensor | None:
    """Take the lengths of the longest document out of `kwargs` and return them as a size.

    A number is a constant of the graph, at least at first; a size can be marked as one that
    changes. The tensor has no elements.
    """
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if isinstance(kwargs.get(name), Tensor):
            torch._dynamo.maybe_mark_dynamic(kwargs[name], 0)
    lengths = [kwargs.pop(name, None) for name in ("max_length_q", "max_length_k")]
    if not all(isinstance(length, int) for length in lengths):
        return None
    longest = torch.empty(max(lengths), 0)
    torch._dynamo.maybe_mark_dynamic(longest, 0)
    return longest


def _is_selective(layer: Any) -> bool:
    """Tell whether a layer's checkpoint function has a policy, which torch calls `context_fn`."""
    function = layer._gradient_checkpointing_func if layer.gradient_checkpointing else None
    while isinstance(function, partial):
        if "context_fn" in function.keywords:
            return True
        function = function.args[0] if function.args else function.func
    return False


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """Return what makes two layers different graphs."""
    shapes = ((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    return type(layer), *shapes, _is_selective(layer)


class RecompileWatch(TrainerCallback):
    """Counts what torch compiles and warns about what it compiles again once a run has settled.

    Attributes:
        compiles_total: functions compiled since training began, the optimizer's and repeated
            compilations included.
        recompiles: of these, the repeated ones.
    """

    def __init__(self) -> None:
        """Begin to count when training begins."""
        self.compiles_total = 0
        self.recompiles = 0
        self._last: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Leave out what was compiled before."""
        self.compiles_total = self.recompiles = 0
        self._new()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Count this step's compilations, and name each repeated one after the first steps."""
        for metrics in self._new():
            self.compiles_total += 1
            reason = metrics.recompile_reason
            if reason is None:
                continue
            self.recompiles += 1
            if state.global_step > _SETTLED_AFTER:
                logger.warning(
                    "step %d: %s was compiled again, which takes seconds to minutes, because of %s "
                    "(%d recompilations so far; TORCH_LOGS=recompiles tells more)",
                    state.global_step, metrics.co_name, reason.splitlines()[0], self.recompiles,
                )  # fmt: skip

    def _new(self) -> list[Any]:
        """Return the compilations since the last call; torch keeps the last 64 of a process."""
        metrics = torch._dynamo.utils.get_compilation_metrics()
        known = next((i for i, m in enumerate(metrics) if m is self._last), -1)
        self._last = metrics[-1] if metrics else None
        return [m for m in metrics[known + 1 :] if m.is_forward and m.fail_type is None]
