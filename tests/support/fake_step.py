"""One training step at full width without memory: every allocation of a GPU's operators is seen.

FakeTensors have shapes and storages but no bytes, so a step of a model as wide as the 30B takes a
second. Kernels are launched on nothing: only the allocations around them happen, those of this
project's operators included, which are entered. Liger's norms and rotary embedding and torch's
variable-length attention run as on a GPU. Not seen is what ATen and FlashAttention allocate inside
one operator, but for log-sum-exp, whose temporary is added.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

import monkey_patch
from monkey_patch.kernels import launch
from monkey_patch.kernels.scatter_moe.block import expert_backward, expert_forward
from monkey_patch.kernels.scatter_moe.routing import Routing
from monkey_patch.kernels.varlen_attention import op as attention
from qwen3_sft.model.activation_checkpointing import enable_checkpointing
from qwen3_sft.model.meta_model import model_on_meta
from tests.support import interpreter


class Allocations(TorchDispatchMode):
    """Adds up the bytes of all storages that are alive, after every operator.

    Attributes:
        alive: bytes now.
        peak: most bytes since `restart`.
        peak_op: the operator at whose end they were alive.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.peak_op = ""
        self._known: dict[int, StorageWeakRef] = {}
        self._see([p.data for p in model.parameters()])

    def restart(self) -> None:
        """Look for a new peak."""
        self.peak = self.alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = _INSIDE.get(str(func))
        if inside is None:
            out = func(*args, **(kwargs or {}))
        else:
            with self:
                out = inside(*args)
        self._see(tree_leaves(out))
        temporary = args[0].nbytes if str(func) == "aten.logsumexp.default" else 0
        if self.alive + temporary > self.peak:
            self.peak, self.peak_op = self.alive + temporary, str(func)
        return out

    def _see(self, leaves: list[Any]) -> None:
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                continue
            storage = leaf.untyped_storage()
            known = self._known.get(storage._cdata)
            if known is None or known.expired():
                self._known[storage._cdata] = StorageWeakRef(storage)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self.alive -= size


def _experts(
    x: Any, gate_up: Any, down: Any, index: Any, weights: Any, recompute: bool, _: bool,
    fp8: str = "off",
) -> Any:  # fmt: skip
    out, hidden, routing = expert_forward(
        x, gate_up, down, index, weights, keep_hidden=not recompute, fp8=fp8
    )
    return out, x.new_empty(0) if hidden is None else hidden, *routing


def _experts_backward(
    d_out: Any, x: Any, gate_up: Any, down: Any, weights: Any, hidden: Any, offsets: Any,
    slots: Any, rows: Any, needs: Any, fp8: str = "off",
) -> Any:  # fmt: skip
    return expert_backward(
        d_out, x, gate_up, down, weights, hidden if hidden.numel() else None,
        Routing(offsets, slots, rows), needs=needs, fp8=fp8,
    )  # fmt: skip


_INSIDE: dict[str, Callable[..., Any]] = {
    "monkey_patch.scatter_moe.default": _experts,
    "monkey_patch.scatter_moe_backward.default": _experts_backward,
}


class _NoKernel:
    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Choose the operators of a GPU, and launch none of their kernels."""
    from liger_kernel.ops import rms_norm, rope
    from liger_kernel.transformers.rope import liger_rotary_pos_emb
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    def flash(q: Any, k: Any, v: Any, cu_seq_lens: Any, scale: float) -> Any:
        return attention._flash(q, k, v, cu_seq_lens, q.shape[1], scale)

    with pytest.MonkeyPatch.context() as patch:
        interpreter.use_kernels(patch)
        patch.setattr(launch.Launch, "run", lambda self: None)
        patch.setattr(attention, "_per_document", flash)
        for module in (rms_norm, rope):
            for name in vars(module):
                if name.endswith("_kernel") or name == "_triton_rope":
                    patch.setattr(module, name, _NoKernel())
        patch.setattr(modeling_qwen3_moe, "apply_rotary_pos_emb", liger_rotary_pos_emb)
        yield


def make_model(
    config: Any,
    dtype: torch.dtype,
    experts: Any,
    layers: dict[Any, int],
    device: str = "cpu",
    others: Sequence[Any] = (),
) -> PreTrainedModel:
    """Return a patched model of fake tensors; call it under a FakeTensorMode.

    `experts` and `others` are patches, beside those that every run has.
    """
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    model = model_on_meta(config)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=dtype, device=device)
                module._parameters[name] = torch.nn.Parameter(fake)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        if type(module).__name__ == "Qwen3MoeRMSNorm":
            module.forward = lambda x, norm=module: LigerRMSNormFunction.apply(
                x, norm.weight, norm.variance_epsilon, 0.0, "llama", True, None
            )
    model.config.use_cache = False
    names = ("varlen_attention", "router_aux_loss", "linear_cross_entropy")
    monkey_patch.apply_patches(model.train(), (experts, *names, *others))
    enable_checkpointing(model, layers)
    return model


def forward(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    """Return the loss of one packed row, all of it labelled."""
    with model.device:
        ids, flat = torch.zeros(1, tokens, dtype=torch.long), torch.zeros(tokens, dtype=torch.long)
        ends = torch.zeros(3, dtype=torch.int32)
        mask, weight = torch.ones(1, tokens, dtype=torch.bool), torch.ones(())
    statistics: Any = monkey_patch.router_statistics(model)
    statistics.begin(mask, num_rows=1, weight=weight)
    return model(
        input_ids=ids, position_ids=ids, cu_seq_lens_q=ends, cu_seq_lens_k=ends,
        max_length_q=tokens, max_length_k=tokens, label_positions=flat, label_targets=flat,
        num_items_in_batch=tokens,
    ).loss  # fmt: skip
