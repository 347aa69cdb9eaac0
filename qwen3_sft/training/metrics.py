"""Efficiency and health of a run: one record per logged step, to metrics.jsonl and the screen.

Counts are kept as plain Python numbers on the host (the collator knows them), so that they cost
no device synchronisation; they are summed over ranks only when a step is logged.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerState

from qwen3_sft.checkpoints.manifest import Totals
from qwen3_sft.distributed.process_group import sum_over_ranks
from qwen3_sft.families.family import family_of
from qwen3_sft.families.flops import train_flops
from qwen3_sft.hardware import MemoryStats
from qwen3_sft.model.layer_compile import RecompileWatch
from qwen3_sft.packing.collator import BatchStats
from qwen3_sft.records.step_lines import StepLines

logger = logging.getLogger(__name__)

# The keys of metrics.jsonl and their order: a contract (docs/design.md).
KEYS = (
    "step", "epoch", "loss", "aux_loss", "grad_norm", "learning_rate", "step_time_s", "tokens",
    "tokens_per_second_per_gpu", "label_tokens", "padding_fraction", "model_tflops_per_gpu", "mfu",
    "peak_memory_gib", "expert_load_max_over_mean", "router_entropy", "skipped_steps",
    "lost_update_fraction", "lost_update_mass", "compiles_total", "tokens_seen",
)  # fmt: skip


@dataclass
class Window:
    """Sums over the steps since the last log line, of this rank unless said otherwise.

    Time spent in evaluation, sampling and saving is not training time: wrap it in `pause()`.
    """

    steps: int = 0
    stats: BatchStats = field(default_factory=lambda: BatchStats(0, 0, 0, 0, 0))
    flops: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    paused_s: float = 0.0
    _pauses: int = 0  # that are going on, one in another

    def add(self, stats: BatchStats, flops: float) -> None:
        """Count one micro-batch."""
        self.stats += stats
        self.flops += flops

    def sums(self) -> list[float]:
        """Tokens, label tokens, padding tokens, model FLOPs: what is summed over ranks."""
        return [
            float(self.stats.tokens),
            float(self.stats.label_tokens),
            float(self.stats.padded_tokens),
            self.flops,
        ]

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave what happens inside out of the step time, once however deep."""
        began = time.perf_counter()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses:
                self.paused_s += time.perf_counter() - began

    def seconds(self) -> float:
        """Training seconds since the window began."""
        return time.perf_counter() - self.started - self.paused_s


def throughput(
    window_sums: Sequence[float],
    *,
    seconds: float,
    steps: int,
    num_gpus: int,
    peak_flops: float | None,
) -> dict[str, float | None]:
    """Turn sums over all ranks into per-second figures.

    Args:
        window_sums: `Window.sums()`, added up over all ranks.
        seconds: training time of the window.
        steps: optimizer steps in it.
        num_gpus: processes.
        peak_flops: dense FLOP/s of one device in the compute dtype; None gives no MFU.
    """
    tokens, label_tokens, padding, flops = window_sums
    flops_per_gpu = flops / seconds / num_gpus
    return {
        "step_time_s": seconds / steps,
        "tokens": int(tokens),
        "tokens_per_second_per_gpu": tokens / seconds / num_gpus,
        "label_tokens": int(label_tokens),
        "padding_fraction": padding / (tokens + padding) if tokens + padding else 0.0,
        "model_tflops_per_gpu": flops_per_gpu / 1e12,
        "mfu": None if peak_flops is None else flops_per_gpu / peak_flops,
    }


class Metrics:
    """Counts what is trained and makes a record of it for each logged step.

    Attributes:
        totals: since the run's first step, which a checkpoint keeps.
        window: since the last record.
        router_statistics: state of the `router_aux_loss` patch; None if it is not applied.
        recompile_watch: to be called back; None where layers are not compiled.
    """

    def __init__(
        self,
        args: Any,
        config: Any,
        *,
        router_statistics: Any = None,
        peak_flops: float | None = None,
        file: StepLines | None = None,
    ) -> None:
        """Begin with nothing counted.

        Args:
            args: of the training.
            config: of the model.
            router_statistics: as above.
            peak_flops: dense FLOP/s of the device in the compute dtype, None if unknown.
            file: where records go; None on ranks other than 0.
        """
        self.totals, self.window = Totals(), Window()
        self.router_statistics = router_statistics
        self.recompile_watch = RecompileWatch() if args.compiles_layers else None
        self._args, self._peak_flops, self._file = args, peak_flops, file
        self._model_flops = family_of(config).count_flops(config)
        self._last_step = 0

    def begin(self, step: int) -> None:
        """Count from here: set-up and loading are not training time."""
        self.window, self._last_step = Window(), step

    def count(self, stats: BatchStats) -> float:
        """Count one micro-batch; return the FLOPs of training on it."""
        flops = train_flops(
            self._model_flops, tokens=stats.tokens, label_tokens=stats.label_tokens,
            sum_length_squared=stats.sum_length_squared,
        )  # fmt: skip
        self.window.add(stats, flops)
        return flops

    def record(
        self,
        logs: dict[str, float],
        state: TrainerState,
        memory: MemoryStats,
        lost_updates: dict[str, float | None],
    ) -> dict[str, Any]:
        """Add efficiency and health to what the Trainer logs, write it and begin a new window.

        Collective. What is unknown is left out of what is returned.
        """
        steps, self._last_step = state.global_step - self._last_step, state.global_step
        seconds = self.window.seconds()
        sums = torch.tensor(self.window.sums(), dtype=torch.float64, device=self._args.device)
        record: dict[str, Any] = {
            **logs,
            "step": state.global_step,
            "epoch": state.epoch,
            "skipped_steps": self.totals.skipped_steps,
            "peak_memory_gib": memory.peak_allocated_gib,
            **throughput(
                sum_over_ranks(sums).tolist(), seconds=seconds, steps=steps,
                num_gpus=self._args.world_size, peak_flops=self._peak_flops,
            ),
        }  # fmt: skip
        self.totals.tokens_seen += record["tokens"]
        record["tokens_seen"] = self.totals.tokens_seen
        if self.recompile_watch is not None:
            record["compiles_total"] = self.recompile_watch.compiles_total
        record |= lost_updates
        if self.router_statistics is not None:
            record |= self.router_statistics.drain(reduce=sum_over_ranks)
        if self._file is not None:
            self._file.write({key: record.get(key) for key in KEYS})
        left = (state.max_steps - state.global_step) * seconds / steps
        logger.info("%s", log_line(record, state.max_steps, left))
        self.window = Window()
        return {key: value for key, value in record.items() if value is not None}


def log_line(record: dict[str, Any], max_steps: int, seconds_left: float) -> str:
    """Return the one line a person watches."""
    parts = [f"step {record['step']}/{max_steps}", f"loss {record['loss']:.4f}"]
    if record.get("grad_norm") is not None:
        parts.append(f"grad {record['grad_norm']:.3g}")
    parts.append(f"lr {record['learning_rate']:.3g}")
    parts.append(f"{record['tokens_per_second_per_gpu']:,.0f} tok/s/GPU")
    parts.append(f"{record['model_tflops_per_gpu']:.3g} TFLOP/s")
    if record["mfu"] is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    parts.append(f"{record['peak_memory_gib']:.1f} GiB")
    if record.get("expert_load_max_over_mean") is not None:
        parts.append(f"experts {record['expert_load_max_over_mean']:.2f}x")
    if record["skipped_steps"]:
        parts.append(f"SKIPPED {record['skipped_steps']}")
    parts.append(f"{duration(seconds_left)} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Return 1h02m, 3m04s or 5s."""
    total = round(seconds)
    hours, minutes = total // 3600, total % 3600 // 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{total % 60:02d}s" if minutes else f"{total}s"
