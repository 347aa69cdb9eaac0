"""transformers' Trainer with as few overrides as a right loss, resume and log need.

Each override names its reason. What a step is, how data is skipped on resume, schedules, DDP and
reporting stay the Trainer's own.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from qwen3_sft.errors import NonFiniteError
from qwen3_sft.families.family import family_of
from qwen3_sft.families.flops import train_flops
from qwen3_sft.hardware import memory_stats
from qwen3_sft.model.layer_compile import RecompileWatch
from qwen3_sft.packing.collator import BatchStats
from qwen3_sft.packing.rows import Document, PackedDataset
from qwen3_sft.training.callbacks import RecordSteps
from qwen3_sft.training.interruption import InterruptibleTrainer
from qwen3_sft.training.metrics import KEYS, MemoryWatch, StepLines, Window, log_line, throughput

logger = logging.getLogger(__name__)


class SftTrainer(InterruptibleTrainer):
    """Train on packed batches of `PackedCollator`.

    The loss is the sum of cross entropy over labelled tokens divided by the number of labelled
    tokens of the whole step, over ranks and accumulation; no micro-batch waits for the device.
    """

    def __init__(
        self,
        *,
        router_statistics: Any,
        peak_flops: float | None,
        metrics_file: StepLines | None,
        **kwargs: Any,
    ) -> None:
        """Set up counters beside the Trainer's own state.

        Args:
            router_statistics: state of the `router_aux_loss` patch; None if it is not applied.
            peak_flops: dense FLOP/s of the device in the compute dtype, None if unknown.
            metrics_file: where records go; None on ranks other than 0.
            **kwargs: as for `transformers.Trainer`.
        """
        super().__init__(**kwargs)
        self.router_statistics = router_statistics
        self.peak_flops = peak_flops
        self.metrics_file = metrics_file
        config = self.model.config
        self.model_flops = family_of(config).count_flops(config)
        # The loss is normalised over the whole step, accumulation included (compute_loss).
        self.loss_is_scaled_for_ga = True
        self.window = Window()
        self.memory_watch = MemoryWatch(self.memory_settings)
        self.bad_steps_in_a_row = 0
        self.recompile_watch: RecompileWatch | None = None
        self._step_loss = torch.zeros((), device=self.args.device)
        self._step_tokens = torch.ones((), device=self.args.device)
        self.steps_at_last_record = 0
        self.add_callback(RecordSteps(self))

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        if self.args.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def first_row(self) -> list[Document]:
        """Return the documents of the first training row."""
        return cast(PackedDataset, self.train_dataset)[0]

    # ---- loss ----

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """Draw one step's micro-batches and count its labels over all ranks.

        Overridden because upstream counts labels by scanning them on the device and cannot tell
        padding, which the router loss must leave out.
        """
        batches = list(itertools.islice(epoch_iterator, num_batches))
        total = sum((b["stats"] for b in batches), BatchStats(0, 0, 0, 0, 0))
        # From pinned memory: a copy from elsewhere waits for all that the device has to do.
        counts = torch.tensor(
            [total.label_tokens, total.tokens], pin_memory=torch.device(device).type == "cuda"
        ).to(device, non_blocking=True)
        label_tokens, self._step_tokens = self._sum_over_ranks(counts).clamp_min(1)
        self._step_loss = torch.zeros((), device=device)
        return batches, label_tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this rank's share of the step's loss, times the ranks that DDP averages over."""
        stats, token_mask = inputs.pop("stats"), inputs.pop("token_mask")
        flops = train_flops(
            self.model_flops,
            tokens=stats.tokens,
            label_tokens=stats.label_tokens,
            sum_length_squared=stats.sum_length_squared,
        )
        self.window.add(stats, flops)
        self.current_flos += flops
        scale = self.args.world_size
        if self.router_statistics is not None:
            self.router_statistics.begin(
                token_mask, num_rows=self.args.per_device_train_batch_size,
                weight=scale / self._step_tokens,
            )  # fmt: skip
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss * scale
        self._step_loss += loss.detach()
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: `compute_loss` adds the exact count; upstream's counts inactive experts."""
        return 0

    # ---- non-finite steps ----

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Any:
        """Skip the update when the loss or the gradient norm is NaN or Inf.

        The last point before `optimizer.step()`: without gradients it changes nothing, neither
        weights nor moments. Upstream would clip by NaN and turn every weight into NaN. DeepSpeed
        steps within the backward pass and has skipped the update itself if the norm is not finite.

        Raises:
            NonFiniteError: after `max_bad_steps` such steps in a row.
        """
        fused = self.backward_optimizer
        norm = super()._get_grad_norm(model, grad_norm) if fused is None else fused.norm()
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        sums = self._sum_over_ranks(self.interruption.votes(self._step_loss))
        # One wait for the device per optimizer step; none per micro-batch.
        values = torch.cat([sums, torch.as_tensor(norm).to(sums)[None]]).tolist()
        loss_value, norm_value = values[0] / self.args.world_size, values[-1]
        self.interruption.agree(values[1:-1])
        left_out = [] if fused is None else fused.end_step(norm_value)
        if math.isfinite(norm_value) and math.isfinite(loss_value):
            self.bad_steps_in_a_row = 0
            return norm
        self.skipped_steps += 1
        self.bad_steps_in_a_row += 1
        for parameter in model.parameters():
            parameter.grad = None
        step = self.state.global_step + 1
        logger.warning("step %d skipped: loss %s, gradient norm %s", step, loss_value, norm_value)
        kept = "The weights are those before them"
        if fused is not None:
            kept = "Weights whose own gradient was finite were updated in them"
            logger.warning(
                "%d weights had a non-finite gradient and were left out (%s); the others were "
                "updated within the backward pass", len(left_out), ", ".join(left_out[:3]),
            )  # fmt: skip
        if self.bad_steps_in_a_row >= self.args.max_bad_steps:
            raise NonFiniteError(
                f"steps {step - self.bad_steps_in_a_row + 1} to {step} all had a non-finite loss "
                f"or gradient (last: loss {loss_value}, gradient norm {norm_value}). {kept} and "
                "the last checkpoint is whole. Lower --learning_rate, look at the data of these "
                "steps, or allow more with --max_bad_steps"
            )
        return norm

    # ---- evaluation ----

    def loss_sums(self, batches: Iterable[dict[str, Any]]) -> Tensor:
        """Return the summed loss over this rank's batches and their labels, (2,) float64."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self.model.eval()
        for batch in batches:
            inputs: dict[str, Any] = self._prepare_inputs(batch)
            label_tokens = inputs.pop("stats").label_tokens
            del inputs["token_mask"]
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = self.model(**inputs, num_items_in_batch=1)
            sums += torch.stack([outputs.loss.double(), sums.new_tensor(label_tokens)])
        self.model.train()
        return sums

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return the exact loss per labelled token over the packed evaluation rows.

        Overridden because upstream averages per-batch means, which weighs tokens unequally.
        """
        with self.naming("evaluation"), self.window.pause():
            sums = self.loss_sums(self.get_eval_dataloader(cast("Dataset | None", eval_dataset)))
            loss_sum, num_labels = self._sum_over_ranks(sums).tolist()
            loss = loss_sum / max(num_labels, 1)
            metrics = {
                f"{metric_key_prefix}_loss": loss,
                f"{metric_key_prefix}_label_tokens": num_labels,
            }
            step = self.state.global_step
            logger.info("step %d  %s loss %.4f", step, metric_key_prefix, loss)
            self.log(dict(metrics))
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
        return metrics

    # ---- log ----

    @contextmanager
    def counting_nothing(self) -> Iterator[None]:
        """Leave counters and sums as they are, whatever is computed inside."""
        names = ("window", "current_flos", "_step_loss", "_step_tokens")
        kept = {name: getattr(self, name) for name in names}
        self.window, self._step_loss = Window(), torch.zeros_like(self._step_loss)
        try:
            yield
        finally:
            vars(self).update(kept)
            if self.router_statistics is not None:
                self.router_statistics.drain()

    def pause_metrics(self) -> AbstractContextManager[None]:
        """Leave the time spent inside out of the step time."""
        return self.window.pause() if self.is_in_train else nullcontext()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add efficiency and router health to a training record before reporters see it."""
        if "loss" in logs:
            logs = self._training_record(logs)
            self.window = Window()
            # Upstream empties its sum by subtraction, and a NaN minus itself stays one for ever.
            self._tr_loss = torch.zeros_like(self._tr_loss)
        super().log(logs, start_time)

    def _training_record(self, logs: dict[str, float]) -> dict[str, Any]:
        steps = self.state.global_step - self.steps_at_last_record
        self.steps_at_last_record = self.state.global_step
        seconds = self.window.seconds()
        sums = torch.tensor(self.window.sums(), dtype=torch.float64, device=self.args.device)
        sums = self._sum_over_ranks(sums)
        memory = memory_stats()
        record: dict[str, Any] = {
            **logs,
            "step": self.state.global_step,
            "epoch": self.state.epoch,
            "skipped_steps": self.skipped_steps,
            "peak_memory_gib": memory.peak_allocated_gib,
            **throughput(
                sums.tolist(), seconds=seconds, steps=steps, num_gpus=self.args.world_size,
                peak_flops=self.peak_flops,
            ),
        }  # fmt: skip
        self.tokens_seen += record["tokens"]
        record["tokens_seen"] = self.tokens_seen
        if self.recompile_watch is not None:
            record["compiles_total"] = self.recompile_watch.compiles_total
        if self.backward_optimizer is not None:
            record |= self.backward_optimizer.lost_updates.drain()
        if self.router_statistics is not None:
            record |= self.router_statistics.drain(reduce=self._sum_over_ranks)
        self.memory_watch.check(memory)
        if self.metrics_file is not None:
            self.metrics_file.write({key: record.get(key) for key in KEYS})
        left = (self.state.max_steps - self.state.global_step) * seconds / steps
        logger.info("%s", log_line(record, self.state.max_steps, left))
        return {key: value for key, value in record.items() if value is not None}
