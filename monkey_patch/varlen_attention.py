"""Attention over packed documents as the transformers attention "torch_varlen".

With `cu_seq_lens_q` in the batch, documents are attended to one by one and no mask is built: the
packed row neither leaks between documents nor costs (T, T) memory, whatever `position_ids` say.
Without it (generation, evaluation, a plain batch) transformers' sdpa runs with its usual causal and
padding masks; a packed row is then recognised by its position_ids as sdpa does, at the price of one
host synchronisation and a (T, T) mask per layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn

from monkey_patch.architectures import architecture_of, packed_model_types
from monkey_patch.core import Patch, PatchError, Replacement, class_name
from monkey_patch.kernels.varlen_attention.op import varlen_attention

NAME = "varlen_attention"
IMPLEMENTATION = "torch_varlen"


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention (1, T, H, C) from query (1, H, T, C); the signature transformers calls.

    Raises:
        ValueError: cu_seq_lens come with a padding mask, a batch of several rows, a KV cache,
            attention dropout or a sliding window, none of which can be honoured.
    """
    cu_seq_lens = kwargs.get("cu_seq_lens_q")
    if not isinstance(cu_seq_lens, torch.Tensor):
        return _sdpa(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    _check_packed(query, key, attention_mask, dropout, kwargs.get("sliding_window"))
    max_length = kwargs.get("max_length_q")
    max_length = max_length if isinstance(max_length, int) else query.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_THC = varlen_attention(query[0], key[0], value[0], cu_seq_lens, max_length, scale)
    return out_THC[None], None


def _check_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    sliding_window: object,
) -> None:
    if query.shape[2] != key.shape[2]:
        raise ValueError("cu_seq_lens_q with a KV cache; set use_cache=False or leave it out")
    if attention_mask is not None and attention_mask.numel() > 0:
        raise ValueError(
            "cu_seq_lens_q together with an attention_mask that hides tokens: leave the mask out "
            "and make the padding a document of its own"
        )
    if len(query) != 1:
        raise ValueError(f"cu_seq_lens_q with {len(query)} rows; flatten the batch into one row")
    if dropout or sliding_window is not None:
        raise ValueError(f"{IMPLEMENTATION} has no dropout ({dropout}) or window {sliding_window}")


def _sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    position_ids = kwargs.get("position_ids")
    is_prefill = 1 < query.shape[2] == key.shape[2]
    if attention_mask is None and is_prefill and isinstance(position_ids, torch.Tensor):
        attention_mask = _packed_mask(position_ids)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, **kwargs
    )


def _packed_mask(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Return (B, 1, T, T) bool for position_ids (B, T) that restart, None where none does."""
    from transformers.masking_utils import find_packed_sequence_indices

    document_BT = find_packed_sequence_indices(position_ids)
    if document_BT is None:
        return None
    token_T = torch.arange(document_BT.shape[1], device=document_BT.device)
    is_same_document = document_BT[:, :, None] == document_BT[:, None, :]
    return (is_same_document & (token_T[:, None] >= token_T))[:, None]


def mask_function(
    *, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """Return sdpa's mask, except for a whole row without padding, which needs none.

    Such a row is causal, or packed and isolated by `attention_forward`. A padding mask that hides
    tokens does become a mask, so that it is never dropped in silence.
    """
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(
        q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs
    )


def register() -> None:
    """Make the name "torch_varlen" known to `attn_implementation=`, with its masks."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, mask_function)


def packed_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a decoder's forward; with cu_seq_lens, without asking the device about the positions.

    Transformers looks whether position_ids restart, which waits for the device once per forward. A
    mask of four dimensions is taken as it is, so an empty one answers beforehand: nothing to build.
    """
    cu_seq_lens = kwargs.get("cu_seq_lens_q")
    has_mask = len(args) > 1 or kwargs.get("attention_mask") is not None
    if isinstance(cu_seq_lens, torch.Tensor) and not has_mask:
        kwargs["attention_mask"] = cu_seq_lens.new_empty((0, 0, 0, 0))
    return type(self).forward(self, *args, **kwargs)


def plan(model: Any) -> Iterator[Replacement]:
    """Yield the text config's name of the attention, and the forward of each decoder."""
    config = model.config.get_text_config()
    decoders = architecture_of(model).decoders
    if not decoders:
        known = ", ".join(packed_model_types())
        raise PatchError(f"patch {NAME!r}: model type {config.model_type!r}; it knows {known}")
    if getattr(config, "sliding_window", None) is not None:
        raise PatchError(
            f"patch {NAME!r}: config.sliding_window is {config.sliding_window}, which it does not "
            "know; set attn_implementation='sdpa'"
        )
    if config.attention_dropout:
        raise PatchError(
            f"patch {NAME!r}: config.attention_dropout is {config.attention_dropout}; set it to 0"
        )
    where = type(config).__name__
    yield Replacement(config, "_attn_implementation_internal", IMPLEMENTATION, where)
    for name, module in model.named_modules():
        if class_name(module) in decoders:
            yield Replacement(module, "forward", MethodType(packed_forward, module), name)


VARLEN_ATTENTION = Patch(
    name=NAME,
    summary="causal attention document by document, no mask",
    requires=("transformers>=5.23,<6", "torch>=2.11"),
    plan=plan,
    tolerance=5e-6,
    upstream="transformers.AttentionInterface, transformers.masking_utils.AttentionMaskInterface",
    register=register,
)
