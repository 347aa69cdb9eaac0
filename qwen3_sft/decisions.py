"""What a run will be, decided once, before anything heavy: no weights, no data, no process group.

A run, its dry run, `qwen3-sft plan` and the launcher ask here, so that what one of them says is
what another does. Everything that follows from options, model, machine and launcher belongs here;
what follows from the data or a checkpoint does not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import monkey_patch
from monkey_patch.core import Patch
from monkey_patch.fp8_selection import Selection, describe
from qwen3_sft.distributed.engine import Engine, check_experts, deepspeed_config, detect
from qwen3_sft.errors import ModelError
from qwen3_sft.families.family import Family, require
from qwen3_sft.families.flops import head_dim
from qwen3_sft.model.attention import check_attention, choose_attention
from qwen3_sft.model.fp8 import NO_FP8, Fp8Choice, choose_fp8
from qwen3_sft.model.loading import weights_dtype
from qwen3_sft.model.patches import choose_patches, fp8_selection
from qwen3_sft.optimizers.choice import OptimizerChoice, choose_optimizer
from qwen3_sft.options.draft import TrainDraft
from qwen3_sft.options.recipe import Options
from qwen3_sft.plan.advice import describe_advice, nearest
from qwen3_sft.plan.disk import DiskUse
from qwen3_sft.plan.plan import Gpu, RunPlan
from qwen3_sft.plan.planner import experts_for, plan_run
from qwen3_sft.plan.zero3_units import Unit, check_zero3
from qwen3_sft.plan.zero3_units import describe as describe_units
from qwen3_sft.training.arguments import check_packages, completed
from qwen3_sft.training.upstream_checks import check_arguments, check_optimizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Machine:
    """What a run computes on.

    Attributes:
        gpu: the kind, None without one or where it is not known.
        device: of this process; None for GPUs that are not here.
    """

    gpu: Gpu | None
    device: torch.device | None = None

    @classmethod
    def here(cls, train: TrainDraft) -> Machine:
        """Return this machine as the options use it."""
        if torch.cuda.is_available() and not train.use_cpu:
            return cls(Gpu.here(), torch.device("cuda"))
        return cls(None, torch.device("cpu"))

    @property
    def has_bf16(self) -> bool:
        """Whether it multiplies in bfloat16; GPUs that are not here do."""
        if self.device is None:
            return True
        return self.device.type == "cuda" and torch.cuda.is_bf16_supported()


@dataclass(frozen=True)
class Decisions:
    """One run.

    Attributes:
        family: of the model.
        options: with everything filled in that was left open.
        engine: what spreads it over processes.
        optimizer: which one, with its arguments.
        plan: memory, layers' policies and expected speed.
        advice: the nearest setting that fits, None if none does or none is needed.
        attention: what computes it and why; None for GPUs that are not here.
        fp8: which halves of a layer multiply in FP8.
        selection: which modules those are, None without.
        units: what ZeRO-3 gathers as one piece, on this machine; empty elsewhere.
        identity: what a checkpoint says of data and schedule; known once the data is.
        checkpoint: what the run goes on from; known once its processes have met.
    """

    family: Family
    options: Options
    engine: Engine
    optimizer: OptimizerChoice
    plan: RunPlan
    advice: tuple[str, RunPlan] | None
    attention: tuple[str, str] | None = None
    fp8: Fp8Choice = NO_FP8
    selection: Selection | None = None
    units: tuple[Unit, ...] = ()
    identity: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None

    @property
    def compute(self) -> torch.dtype:
        """The dtype of the products."""
        return compute_dtype(self.options)

    @property
    def weights(self) -> torch.dtype:
        """The dtype that the trained weights are kept in."""
        return weights_dtype(self.options.model, self.engine, self.compute)

    @property
    def attention_name(self) -> str:
        """The implementation; none where it is not decided."""
        return self.attention[0] if self.attention else ""

    @property
    def patches(self) -> list[Patch | str]:
        """What is applied to the loaded model."""
        return choose_patches(self.options.model, self.attention_name, self.fp8)

    def lines(self) -> Iterator[str]:
        """Yield what to print before a run."""
        if self.attention is not None:
            yield "attention: {} ({})".format(*self.attention)
        if self.units:
            yield describe_units(list(self.units))
        if self.selection is not None:
            yield describe(self.selection)
        yield from self.plan.lines()

    @property
    def advice_line(self) -> str | None:
        """What to set where the plan does not fit."""
        return describe_advice(self.advice) if self.plan.fits is False else None


def decide(
    options: Options,
    model: PreTrainedModel,
    machine: Machine,
    environment: Mapping[str, str] | None = None,
) -> Decisions:
    """Decide what a run will be.

    Args:
        options: as they were given.
        model: on the meta device, unpatched.
        machine: what it computes on.
        environment: what accelerate's launcher sets; the process's own by default.

    Raises:
        UsageError: options that contradict each other, the model, the engine or the device.
        ModelError: the family is not trained, or the attention asked for cannot run here.
        PatchError: nothing can be converted to FP8, or a pattern to keep matches nothing.
    """
    env = os.environ if environment is None else environment
    processes = int(env.get("WORLD_SIZE", "1"))
    family = require("train", model.config, options.model.model_name_or_path)
    engine = detect(options.model, options.data, env)
    check_experts(engine, model.config.get_text_config().num_experts)
    # Several processes are planned for GPUs, whatever is here.
    assumes_gpus = machine.gpu is None and engine.kind != "single"

    def plan_of(wanted: Options) -> RunPlan:
        full = completed(wanted, engine, processes, has_bf16=machine.has_bf16 or assumes_gpus)
        return plan_run(model, wanted, engine, machine.gpu, compute_dtype(full), env)

    full = completed(options, engine, processes, has_bf16=machine.has_bf16)
    plan = plan_of(options)
    decisions = Decisions(
        family=family,
        options=full,
        engine=engine,
        optimizer=choose_optimizer(options, engine),
        plan=plan,
        advice=nearest(options, engine, processes, plan_of) if plan.fits is False else None,
    )
    decisions = with_plan(decisions, plan)
    if machine.device is None:
        return decisions
    return _for_device(decisions, model, machine.device, env)


def check_options(
    options: Options, machine: Machine, environment: Mapping[str, str] | None = None
) -> None:
    """Refuse what needs no model to be refused, before one is downloaded.

    `decide` comes after it; it asks for packages no second time.

    Args:
        options: as they were given.
        machine: this one.
        environment: what accelerate's launcher sets; the process's own by default.

    Raises:
        UsageError: options that contradict each other, the engine or the device, or a package is
            not installed.
        ModelError: the attention asked for cannot run here.
    """
    env = os.environ if environment is None else environment
    engine = detect(options.model, options.data, env)
    check_packages(options.train, engine)
    processes = int(env.get("WORLD_SIZE", "1"))
    full = completed(options, engine, processes, has_bf16=machine.has_bf16)
    check_arguments(full.train, has_evaluation=options.data.has_evaluation)
    device = machine.device or torch.device("cpu")
    check_attention(options.model.attn_implementation, device, compute_dtype(full))


def check_model(decisions: Decisions, model: PreTrainedModel) -> None:
    """Refuse a model that the patches or the optimizer would refuse once its weights are here.

    Args:
        decisions: for this model.
        model: on the meta device; not changed.

    Raises:
        ModelError: a patch does not fit.
        UsageError: the optimizer cannot be built.
    """
    name = decisions.options.model.model_name_or_path
    if not decisions.family.architecture.experts_in(model):
        raise ModelError(
            f"{name}: no layer has experts, as mlp_only_layers and decoder_sparse_step of "
            "config.json say; only mixtures of experts are trained"
        )
    try:
        monkey_patch.check_patches(model, decisions.patches)
    except monkey_patch.PatchError as error:
        raise ModelError(f"{name}: {error}") from error
    check_optimizer(decisions.options.train, decisions.optimizer, model)
    length, known = decisions.options.data.max_length, _positions(model)
    if known is not None and length > known and os.environ.get("RANK", "0") == "0":
        logger.warning(
            "--max_length %d: the model was made for %d positions (max_position_embeddings of "
            "config.json); documents beyond them are trained where it knows nothing, unless "
            "rope_parameters extends it", length, known,
        )  # fmt: skip


def _positions(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_disk(decisions: Decisions, model: PreTrainedModel) -> None:
    """Refuse a disk that is certain to be full before the run has ended; for the first rank.

    Args:
        decisions: of the run.
        model: on the meta device.

    Raises:
        UsageError: with the bytes needed and free.
    """
    use = DiskUse.of(
        decisions.options, model, decisions.optimizer, decisions.weights,
        has_masters=decisions.engine.layout == "zero",
    )  # fmt: skip
    use.check(Path(decisions.options.output_dir))


def _for_device(
    decisions: Decisions, model: PreTrainedModel, device: torch.device, env: Mapping[str, str]
) -> Decisions:
    """Decide what depends on this machine's device and packages."""
    options, engine = decisions.options, decisions.engine
    wanted = options.model.attn_implementation
    fp8 = choose_fp8(options.model, device, packing=options.data.packing)
    is_zero3, text = engine.kind == "zero3", model.config.get_text_config()
    return replace(
        decisions,
        attention=choose_attention(wanted, device, decisions.compute, head_dim(text)),
        fp8=fp8,
        selection=fp8_selection(model, options.model, fp8),
        units=tuple(check_zero3(model, deepspeed_config(env))) if is_zero3 else (),
    )


def with_plan(decisions: Decisions, plan: RunPlan) -> Decisions:
    """Return the decisions with a plan, such as that of rank 0, and the experts that go with it."""
    experts = experts_for(decisions.options.model.experts_implementation, plan.layers)
    options = decisions.options.replaced(experts_implementation=experts)
    return replace(decisions, plan=plan, options=options)


def compute_dtype(options: Options) -> torch.dtype:
    """Return the dtype of the products of completed options."""
    is_bf16 = options.model.dtype == "bfloat16" or options.train.bf16
    return torch.bfloat16 if is_bf16 else torch.float32
