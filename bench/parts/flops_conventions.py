"""FLOPs per token as other projects count them, so that their published figures compare with ours.

Recomputation counts nowhere. TorchTitan counts all l^2 pairs of a row for attention, so that its
figure for one and the same run is 1.2x ours at 4,096 tokens and 1.9x at 131,072.
"""

from __future__ import annotations

from typing import Any

from qwen3_sft.families.flops import ModelFlops, num_parameters


def torchtitan_flops_per_token(config: Any, seq: int) -> int:
    """Forward and backward FLOPs per token as TorchTitan's log counts them.

    Six per active parameter outside the input embedding (norms included), plus full, not causal,
    attention over rows of `seq` tokens. Source: `get_moe_model_nparams_and_flops` in
    torchtitan/models/utils.py of pytorch/torchtitan, commit 76dd118b.
    """
    input_embedding = 0 if config.tie_word_embeddings else config.hidden_size * config.vocab_size
    active = num_parameters(config).active - input_embedding
    return 6 * active + 3 * ModelFlops.from_config(config).scores * seq


def nvidia_flops_per_token(config: Any, seq: int) -> float:
    """Forward and backward FLOPs per token as NeMo Automodel and Megatron-Core count them.

    Causal attention over rows of `seq` tokens and no router; every layer is taken for a MoE layer.
    Megatron-Bridge agrees at constant length. Source: `qwen3_flops` in
    nemo_automodel/components/utils/flops_utils.py of NVIDIA-NeMo/Automodel, commit b3711ff0.
    """
    flops, expert = (
        ModelFlops.from_config(config),
        3 * config.hidden_size * config.moe_intermediate_size,
    )
    active_experts = config.num_hidden_layers * config.num_experts_per_tok * expert
    linear = flops.attention_projections + 2 * active_experts + flops.lm_head
    return 3 * (linear + flops.scores * seq / 2)
