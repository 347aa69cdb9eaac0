"""Bytes that a model needs on each GPU and each host under an engine, activations not counted.

What every engine keeps, in bytes per parameter with float32 AdamW and bfloat16 products, N being
the processes that share one copy:

    single         4 weights, 4 gradients, 8 optimizer
    ddp            the same, and 4 for the buckets in which gradients are averaged
    native, fsdp   (4 + 4 + 8) / N
    zero2          2 weights, (2 gradients, 4 master weights, 8 optimizer) / N
    zero3          (2 + 4 + 4 + 8) / N; offloaded, all but the weights are on the host

Other optimizers keep other states (optimizer_states.py). Stepping in the backward pass leaves one
layer's gradients: autograd hands over those of both expert tensors before the first is updated.

On top comes what exists for a moment: layers gathered from their shards, gradients on their way
into shards or into a sum, temporaries of an update. The host needs most while weights are read
(transformers 5.23, `from_pretrained`), for which bench/results/load_memory_cpu.json has
measurements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from qwen3_sft.distributed.engine import Engine
from qwen3_sft.model.sizes import Sizes, local_shapes
from qwen3_sft.plan.optimizer_states import OptimizerChoice, state_bytes, update_bytes

GIB = 2**30

Component = Literal["weights", "gradients", "optimizer", "temporaries"]


class Row(NamedTuple):
    """Bytes on each GPU for one purpose.

    Attributes:
        component: what it is part of.
        what: the words to print.
        size: bytes.
        in_step: whether it exists in the optimizer's step alone, when activations are gone.
    """

    component: Component
    what: str
    size: int
    in_step: bool = False


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose.

    Attributes:
        parameters: of the whole model.
        shards: processes that share one copy of what the engine shards.
        rows: bytes on each GPU.
        host: bytes on each host, while loading or training; not all of it at the same time.
    """

    parameters: int
    shards: int
    rows: tuple[Row, ...]
    host: dict[str, int]

    @property
    def gpu(self) -> dict[str, int]:
        """Bytes on each GPU by the words of a row."""
        return {row.what: row.size for row in self.rows}

    def components(self, activations: int = 0) -> dict[str, int]:
        """Return bytes on each GPU by component; with the activations they are the peak.

        Where one backward pass makes a step, gradients appear while activations go, and the peak
        is lower than the sum by up to the smaller of the two.

        Args:
            activations: of a micro-batch. They are gone in the optimizer's step, so of what exists
                only then no more is counted than goes beyond them.
        """
        sizes = dict.fromkeys(get_args(Component), 0)
        for row in self.rows:
            sizes[row.component] += max(row.size - activations, 0) if row.in_step else row.size
        return sizes

    @property
    def gpu_gib(self) -> float:
        """The total on each GPU in GiB."""
        return sum(self.gpu.values()) / GIB

    def lines(self, gpu_memory_gib: float | None = None) -> Iterator[str]:
        """Yield the lines to print, beside what a GPU has if that is known."""
        count = f"{self.parameters / 1e9:.3f} billion parameters"
        yield f"memory per GPU, {count}, activations not counted:"
        yield from (f"  {size / GIB:10.2f} GiB  {what}" for what, size in self.gpu.items())
        yield f"  {self.gpu_gib:10.2f} GiB  in total"
        if gpu_memory_gib is not None:
            yield f"  {gpu_memory_gib:10.2f} GiB  on this GPU"
        yield "memory per host, file cache not counted:"
        yield from (f"  {size / GIB:10.2f} GiB  {what}" for what, size in self.host.items())


_FUSED_ADAMW = OptimizerChoice()


def memory_plan(
    model: nn.Module,
    engine: Engine,
    *,
    weights: torch.dtype,
    compute: torch.dtype,
    world_size: int = 1,
    gpus_per_node: int = 1,
    shards: int | None = None,
    deepspeed: Mapping[str, Any] | None = None,
    optimizer: OptimizerChoice = _FUSED_ADAMW,
    accumulates: bool = False,
) -> Plan:
    """Plan a run without loading anything.

    Args:
        model: on the meta device.
        engine: what spreads it over the processes.
        weights: dtype of the trained weights (`qwen3_sft.model.loading.weights_dtype`).
        compute: dtype of the products; under autocast not that of the weights.
        world_size: processes in all, one per GPU.
        gpus_per_node: processes on one host.
        shards: processes that share one copy under accelerate's FSDP (HSDP); default: all.
        deepspeed: the DeepSpeed configuration, for the ZeRO engines.
        optimizer: whose states and temporaries count; under ZeRO always AdamW.
        accumulates: whether gradients are summed over micro-batches.
    """
    sizes = Sizes.of(model)
    if engine.kind in ("zero2", "zero3"):
        settings = (deepspeed or {}).get("zero_optimization", {})
        shards, is_offloaded = world_size, _is_offloaded(settings)
        summed = (deepspeed or {}).get("data_types", {}).get("grad_accum_dtype")
        gradient = torch.float32 if summed == "fp32" else compute
        rows = _zero(sizes, engine, compute, gradient, shards, settings)
    else:
        shards = engine.fsdp_size if engine.kind == "native" else shards or world_size
        is_offloaded = False
        if not engine.shards_weights:
            shards = 1
            rows = _whole(sizes, engine, weights, compute, optimizer, accumulates=accumulates)
        else:
            rows = _sharded(sizes, engine, weights, compute, shards)
        rows += _optimizer(local_shapes(model, shards), optimizer, weights, shards)
    host = _loading(sizes, engine, weights, compute, shards, min(gpus_per_node, world_size))
    if is_offloaded:
        processes = min(gpus_per_node, world_size)
        host["offloaded optimizer, master weights and gradients"] = (
            processes * -(-sizes.model // shards) * (8 + 4 + 4 + compute.itemsize)
        )
    return Plan(sizes.model, shards, tuple(sorted(rows, key=_printed)), host)


def _printed(row: Row) -> int:
    return get_args(Component).index(row.component)


def _optimizer(
    shapes: Sequence[tuple[int, ...]], choice: OptimizerChoice, weights: torch.dtype, shards: int
) -> list[Row]:
    part = f", 1/{shards}" if shards > 1 else ""
    rows = [Row("optimizer", choice.describe() + part, state_bytes(shapes, choice, weights))]
    if update := update_bytes(shapes, choice, weights):
        what = "update, a slice at a time" if choice.is_sliced else "update"
        rows.append(Row("temporaries", what, update, in_step=not choice.in_backward))
    return rows


def _whole(
    sizes: Sizes,
    engine: Engine,
    weights: torch.dtype,
    compute: torch.dtype,
    optimizer: OptimizerChoice,
    *,
    accumulates: bool,
) -> list[Row]:
    layer = max(sizes.layer_experts, sizes.end, sizes.tensor) * weights.itemsize
    rows = [Row("weights", "weights", sizes.model * weights.itemsize)]
    if optimizer.in_backward:
        rows.append(Row("gradients", "gradients of one layer's experts at a time", layer))
    else:
        rows.append(Row("gradients", "gradients", sizes.model * weights.itemsize))
        if accumulates:
            rows.append(Row("temporaries", "gradients of one layer's experts, to be added", layer))
    if engine.kind == "ddp":
        # A second copy of the gradients: accelerate leaves gradient_as_bucket_view off.
        rows.append(Row("temporaries", "buckets of DDP", sizes.model * weights.itemsize))
    if compute != weights:
        # The cache of autocast holds every dense weight; experts are cast in their operator.
        copies = (sizes.dense + sizes.tensor) * compute.itemsize
        what = "autocast copies of dense weights and of the largest tensor"
        rows.append(Row("temporaries", what, copies))
    return rows


def _sharded(
    sizes: Sizes, engine: Engine, weights: torch.dtype, compute: torch.dtype, shards: int
) -> list[Row]:
    shard = -(-sizes.model // shards)
    # Expert parallelism gathers this process's experts only.
    layer = sizes.layer - sizes.layer_experts + sizes.layer_experts // engine.ep_size
    # transformers' policy sums in float32, accelerate's in the dtype of the products.
    summed = torch.float32 if engine.kind == "native" else compute
    on_the_way = layer * (compute.itemsize + summed.itemsize)
    gathered = (2 * layer + sizes.end) * compute.itemsize
    return [
        Row("weights", f"weights, 1/{shards}", shard * weights.itemsize),
        Row("gradients", f"gradients, 1/{shards}", shard * weights.itemsize),
        Row("temporaries", "two layers and the head, gathered", gathered),
        Row("temporaries", "gradients of one layer on their way", on_the_way),
    ]


def _zero(
    sizes: Sizes,
    engine: Engine,
    compute: torch.dtype,
    gradient: torch.dtype,
    shards: int,
    settings: Mapping[str, Any],
) -> list[Row]:
    size, shard = compute.itemsize, -(-sizes.model // shards)
    if engine.kind == "zero3":
        rows = [Row("weights", f"weights, 1/{shards}", shard * size)]
    else:
        rows = [Row("weights", "weights", sizes.model * size)]
    if not _is_offloaded(settings):
        # Stage 3 turns gradients to float32 group by group, stage 2 the whole shard.
        group = int(settings.get("sub_group_size", 1e9)) if engine.kind == "zero3" else shard
        rows += [
            Row("gradients", f"gradients, 1/{shards}", shard * gradient.itemsize),
            Row("optimizer", f"float32 master weights, 1/{shards}", shard * 4),
            Row("optimizer", f"optimizer (AdamW, two states), 1/{shards}", shard * 8),
            Row("temporaries", "float32 gradients of the update", min(group, shard) * 4),
        ]
    if engine.kind == "zero3":
        gathered = (2 * sizes.layer + sizes.end) * size
        rows += [
            Row("temporaries", "two layers and the head, gathered", gathered),
            Row("temporaries", "gradients of one layer on their way", 2 * sizes.layer * size),
        ]
    bucket = settings.get("reduce_bucket_size", 5e8)
    bucket = sizes.tensor if bucket == "auto" else int(bucket)
    # Stage 2 fills one bucket while the other is summed.
    count = 2 if engine.kind == "zero2" else 1
    return [*rows, Row("temporaries", "buckets of DeepSpeed", count * bucket * size)]


def _loading(
    sizes: Sizes,
    engine: Engine,
    weights: torch.dtype,
    compute: torch.dtype,
    shards: int,
    processes: int,
) -> dict[str, int]:
    # What is read, and the two halves of the tensor that is being fused from its experts.
    whole = (sizes.model + sizes.tensor) * weights.itemsize
    each = f"each of {processes} processes" if processes > 1 else "the process"
    if engine.kind == "native":
        # Straight to the GPU, slice by slice, cast on the way: read from the code, not measured.
        slices = 2 * -(-sizes.end // shards) * weights.itemsize
        return {f"loading: slices of embedding and head in {each}": processes * slices}
    if engine.kind == "fsdp":
        return {"loading: the model in the first process of a host": whole}
    if engine.kind == "zero3":
        # Rank 0 fuses, in the checkpoint's dtype, what it finds in the files' pages.
        fused = 2 * sizes.tensor * torch.bfloat16.itemsize
        # Read from deepspeed 0.19.8, `defragment` in runtime/zero/utils.py, not measured.
        flat = processes * -(-sizes.model // shards) * compute.itemsize
        return {
            "loading: a tensor fused from its experts in the first process of all": fused,
            f"starting: DeepSpeed's flat copy of the shard in {each}": flat,
        }
    # Under ZeRO-2 DeepSpeed copies to the host once more if two copies do not fit on the GPU.
    return {f"loading: the model in {each}": processes * whole}


def _is_offloaded(settings: Mapping[str, Any]) -> bool:
    return settings.get("offload_optimizer", {}).get("device", "none") == "cpu"
