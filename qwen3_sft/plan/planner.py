"""The plan of one run, from its options and a model on the meta device.

`--activation_checkpointing auto` is decided here: the fewest layers compute again with which the
plan fits.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from monkey_patch.kernels.linear_cross_entropy.chunk import tokens_per_chunk
from monkey_patch.kernels.varlen_attention.op import takes_groups
from qwen3_sft.distributed.engine import Engine, deepspeed_config
from qwen3_sft.errors import UsageError
from qwen3_sft.model.activation_checkpointing import Policy
from qwen3_sft.model.loading import weights_dtype
from qwen3_sft.model.sizes import Sizes
from qwen3_sft.optimizers.choice import choose_optimizer
from qwen3_sft.options.batch import accumulation_steps
from qwen3_sft.options.model_args import EXPERT_PATCHES
from qwen3_sft.options.recipe import Options
from qwen3_sft.plan.activations import ActivationPlan, activation_plan
from qwen3_sft.plan.expert_casts import expert_cast_bytes
from qwen3_sft.plan.optimizer_states import moved_bytes
from qwen3_sft.plan.plan import Gpu, RunPlan
from qwen3_sft.plan.step_time import StepTime, step_time
from qwen3_sft.plan.weights import GIB, Row, memory_plan

# What `auto` leaves free, of activations and temporaries: those are counted from what operators
# save, not measured. Weights and states are known to the byte.
AUTO_MARGIN = 0.1
# And at least this share of the GPU, 6 GiB of an H200: for what is counted nowhere.
FREE_SHARE = 0.043


def plan_run(
    model: PreTrainedModel,
    options: Options,
    engine: Engine,
    gpu: Gpu | None,
    compute: torch.dtype,
    environment: Mapping[str, str] | None = None,
) -> RunPlan:
    """Plan a run.

    Args:
        model: on the meta device, unpatched.
        options: of the run; unchanged.
        engine: what spreads it over processes.
        gpu: what it runs on, None if that is not known.
        compute: dtype of the products.
        environment: what accelerate's launcher sets; the process's own by default.

    Raises:
        UsageError: `auto` with experts whose memory is not counted.
    """
    env = os.environ if environment is None else environment
    builder = _Builder(model, options, engine, gpu, compute, env)
    wanted: Any = options.train.activation_checkpointing
    count = model.config.get_text_config().num_hidden_layers
    if wanted != "auto":
        return builder.plan({wanted: count})
    if not builder.counts_activations:
        raise UsageError(
            "--activation_checkpointing auto knows only the memory of --experts_implementation "
            f"scatter_moe, not of {options.model.experts_implementation}: set none, selective or "
            "full"
        )
    # Without a GPU there is no memory to fill.
    return builder.plan({"none": count}) if gpu is None else builder.lightest(count, gpu)


class _Builder:
    """Plans of one run under different policies; what does not depend on them is counted once."""

    def __init__(
        self,
        model: PreTrainedModel,
        options: Options,
        engine: Engine,
        gpu: Gpu | None,
        compute: torch.dtype,
        env: Mapping[str, str],
    ) -> None:
        self.config = model.config.get_text_config()
        self.options, self.engine, self.gpu, self.compute = options, engine, gpu, compute
        self.processes = int(env.get("WORLD_SIZE", "1"))
        self.weights = weights_dtype(options.model, engine, compute)
        self.optimizer = choose_optimizer(options, engine)
        self.accumulation = accumulation_steps(options.train, self.processes)
        shards = env.get("PARALLELISM_CONFIG_DP_SHARD_SIZE", "1")
        self.memory = memory_plan(
            model, engine, weights=self.weights, compute=compute, world_size=self.processes,
            gpus_per_node=int(env.get("LOCAL_WORLD_SIZE", self.processes)),
            shards=int(shards) if shards not in ("1", "None") else None,
            deepspeed=deepspeed_config(env) if engine.layout == "zero" else None,
            optimizer=self.optimizer, accumulates=self.accumulation > 1,
        )  # fmt: skip
        sizes = Sizes.of(model)
        self.experts, self.has_fp8 = sizes.experts, options.model.fp8 in ("experts", "all")
        if self.has_fp8:
            # Quantised once per pass, as products with the weight and with its transpose ask for.
            size = 2 * sizes.layer_experts // engine.ep_size
            row = Row("temporaries", "experts of one layer in FP8, both layouts", size)
            self.memory = dataclasses.replace(self.memory, rows=(*self.memory.rows, row))
        shapes = [tuple(p.shape) for p in model.parameters()]
        self.moved = moved_bytes(shapes, self.optimizer, self.weights)
        self.tokens = options.train.per_device_train_batch_size * options.data.max_length
        self.counts_activations = options.model.experts_implementation in EXPERT_PATCHES

    def plan(self, layers: Mapping[Policy, int]) -> RunPlan:
        return RunPlan(
            engine=self.engine, processes=self.processes, memory=self.memory,
            activations=self._activations(layers) if self.counts_activations else None,
            layers=layers, tokens=self.tokens, row=self.options.data.max_length, gpu=self.gpu,
            expected=self._expected(layers), cast_bytes=self._cast_bytes(layers),
        )  # fmt: skip

    def lightest(self, count: int, gpu: Gpu) -> RunPlan:
        """Return the fastest plan with room to spare, or the leanest."""
        steps: list[tuple[Policy, Policy]] = [("selective", "none"), ("full", "selective")]
        ladder: list[dict[Policy, int]] = [{"none": count}]
        for dear, cheap in steps:
            ladder += [{dear: n, cheap: count - n} for n in range(1, count)] + [{dear: count}]
        plans = map(self.plan, ladder)
        return next((p for p in plans if _has_room(p, gpu)), self.plan({"full": count}))

    def _activations(self, layers: Mapping[Policy, int]) -> ActivationPlan:
        is_whole = self.engine.layout == "whole"
        return activation_plan(
            self.config,
            layers,
            compute_bytes=self.compute.itemsize,
            residual_bytes=(self.weights if is_whole else self.compute).itemsize,
            keeps_hidden=self._keeps_hidden(layers),
            chunk_tokens=tokens_per_chunk(self.config.vocab_size, self.compute.itemsize),
            offload=self.options.train.activation_offload,
            repeats_groups=not takes_groups()
            and self.options.model.attn_implementation in ("auto", "torch_varlen"),
        )

    def _keeps_hidden(self, layers: Mapping[Policy, int]) -> bool:
        return experts_for(self.options.model.experts_implementation, layers) == "scatter_moe"

    def _cast_bytes(self, layers: Mapping[Policy, int]) -> int:
        """Count our experts': weights in shards are gathered in the dtype of the products."""
        is_cast = self.engine.layout == "whole" and self.counts_activations and not self.has_fp8
        return is_cast * expert_cast_bytes(
            self.experts, layers, keeps_hidden=self._keeps_hidden(layers),
            weights=self.weights, compute=self.compute,
        )  # fmt: skip

    def _expected(self, layers: Mapping[Policy, int]) -> StepTime | None:
        if self.gpu is None:
            return None
        shards = self.memory.shards if self.engine.shards_weights else 1
        return step_time(
            self.config, self.gpu.name, tokens=self.tokens,
            mean_length=self.options.data.max_length, layers=layers,
            keeps_hidden=self._keeps_hidden(layers), optimizer_bytes=self.moved,
            accumulation=self.accumulation, shards=shards, cast_bytes=self._cast_bytes(layers),
            reduced_bytes=4 if self.engine.kind == "native" else self.compute.itemsize,
        )  # fmt: skip


def _has_room(plan: RunPlan, gpu: Gpu) -> bool:
    parts = plan.components()
    margin = AUTO_MARGIN * (parts["activations"] + parts["temporaries"]) / GIB
    return plan.total_gib + max(margin, FREE_SHARE * gpu.memory_gib) <= gpu.memory_gib


def experts_for(experts: Any, layers: Mapping[Policy, int]) -> Any:
    """Return the experts implementation that goes with the policies.

    Selective checkpointing keeps the experts' output, so their first product must not be kept.
    """
    return (
        "scatter_moe_recompute" if experts == "scatter_moe" and layers.get("selective") else experts
    )
