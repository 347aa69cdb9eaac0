"""The one subclass of transformers' Trainer: every override, its reason and its part.

What a step is, how data is skipped on resume, schedules, DDP and reporting stay the Trainer's own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import Trainer

from qwen3_sft.checkpoints import restore, write
from qwen3_sft.checkpoints.rotation import only_ours_removed
from qwen3_sft.checkpoints.save import CheckpointSaver, let_sharded_models_save
from qwen3_sft.distributed.engine import Engine
from qwen3_sft.distributed.process_group import sum_over_ranks
from qwen3_sft.hardware import memory_stats
from qwen3_sft.optimizers.choice import OptimizerChoice, with_states
from qwen3_sft.optimizers.in_backward import BackwardOptimizer
from qwen3_sft.optimizers.rounding_noise import RoundingNoise
from qwen3_sft.training.bad_steps import BadSteps
from qwen3_sft.training.callbacks import RecordSteps
from qwen3_sft.training.interruption import Interruption, let_workers_outlive_signals
from qwen3_sft.training.loss import StepLoss, eval_losses, losses_in_words
from qwen3_sft.training.memory_guard import MemoryGuard
from qwen3_sft.training.metrics import Metrics

logger = logging.getLogger(__name__)


class SftTrainer(Trainer):
    """Train on packed batches of `PackedCollator`, with exact losses and whole checkpoints."""

    # Upstream declares these as optional or as unions that a type checker cannot narrow.
    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    current_flos: Any

    def __init__(
        self, *, engine: Engine, metrics: Metrics, run_facts: dict[str, Any], **kwargs: Any
    ) -> None:
        """Put the parts together.

        Args:
            engine: what spreads the run over processes.
            metrics: of this training.
            run_facts: what every manifest records beside the files.
            **kwargs: as for `transformers.Trainer`; the data collator knows `max_length`.
        """
        args = kwargs["args"]
        with let_sharded_models_save(args, engine):
            super().__init__(**kwargs)
        self.engine, self.metrics = engine, metrics
        self.step_loss = StepLoss(args, metrics)
        self.bad_steps = BadSteps(metrics.totals, args.max_bad_steps)
        self.saver = CheckpointSaver(args, engine, run_facts, metrics.totals)
        self.memory_guard = MemoryGuard(self)
        self.interruption = Interruption()
        self.backward_optimizer: BackwardOptimizer | None = None
        self.loss_is_scaled_for_ga = True  # normalised over the whole step, accumulation included
        # In this order: what the warm-up takes and compiles is not counted.
        self.add_callback(self.memory_guard.warm_up)
        self.add_callback(self.interruption)
        self.add_callback(RecordSteps(metrics))
        if metrics.recompile_watch is not None:
            self.add_callback(metrics.recompile_watch)

    @property
    def torch_optimizer(self) -> Any:
        """Torch's optimizer below accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    # ---- from the first step to the last ----

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Listen to signals at most until this ends; name what nothing closer inside has named."""
        preparation = self.memory_guard.naming("preparation, start checks or samples")
        with self.interruption, preparation:
            return super()._inner_training_loop(*args, **kwargs)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Have its workers leave signals to this process."""
        loader: Any = super()._get_dataloader(*args, **kwargs)
        let_workers_outlive_signals(loader.base_dataloader)
        return loader

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train no step too many, and leave here if interrupted, before the end of training."""
        # Remove when transformers trains no step after max_steps where it resumes there: both ifs
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            # Between micro-batches and evaluations only the update takes memory of the device.
            with self.memory_guard.naming("update of the optimizer"):
                super()._run_epoch(*args, **kwargs)
        self.interruption.leave_if_agreed(self.state.global_step, self.saver.folder)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        """Hear signals that came after the last step's agreement, as during its save."""
        interruption, step = self.interruption, self.state.global_step
        votes = sum_over_ranks(interruption.votes(torch.zeros((), device=self.args.device)))
        interruption.agree(votes.tolist()[1:])
        if interruption.signal is not None and interruption.saved_step != step:
            self._save_checkpoint(self.model_wrapped, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        interruption.leave_if_agreed(step, self.saver.folder)
        interruption.stop_listening()
        with only_ours_removed(self.args, self.state, self.saver.folder):
            return super()._finalize_training(trial, *args, **kwargs)

    # ---- optimizer ----

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """Know torchao's AdamWFp8 too."""
        chosen = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return with_states(OptimizerChoice.of(args), chosen)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Have the optimizer step within the backward pass if the run asks for it."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        self.hyperparameters = restore.hyperparameters(optimizer)
        if is_new and self.args.optimizer_in_backward:
            self.backward_optimizer = BackwardOptimizer(
                self.model, optimizer, clip=self.args.clip, max_grad_norm=self.args.max_grad_norm
            )
        elif is_new and OptimizerChoice.of(self.args).rounds_stochastically:
            RoundingNoise(optimizer, self.args.seed, lambda: self.state.global_step)
        return optimizer

    # ---- a step ----

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """Count on the host, padding too; upstream scans the labels alone, on the device."""
        return self.step_loss.draw(epoch_iterator, num_batches, device)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Name a lack of memory."""
        with self.memory_guard.naming("forward and backward of a micro-batch"):
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this rank's share of the step's loss, times the ranks that DDP averages over."""
        loss, outputs, flops = self.step_loss.add(model, inputs, num_items_in_batch)
        self.current_flos += flops
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: `compute_loss` adds the exact count; upstream's counts inactive experts."""
        return 0

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Any:
        """Skip the update when the loss or the gradient norm is NaN or Inf.

        The last point before `optimizer.step()`: without gradients it changes nothing, neither
        weights nor moments. Upstream would clip by NaN and turn every weight into NaN. DeepSpeed
        steps within the backward pass and has skipped the update itself if the norm is not finite.
        """
        fused = self.backward_optimizer
        norm = super()._get_grad_norm(model, grad_norm) if fused is None else fused.norm()
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        sums = sum_over_ranks(self.interruption.votes(self.step_loss.total))
        # One wait for the device per optimizer step; none per micro-batch.
        values = torch.cat([sums, torch.as_tensor(norm).to(sums)[None]]).tolist()
        loss_value, norm_value = values[0] / self.args.world_size, values[-1]
        self.interruption.agree(values[1:-1])
        left_out = None if fused is None else fused.end_step(norm_value)
        step = self.state.global_step + 1
        self.bad_steps.check(model, step, loss_value, norm_value, left_out)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add efficiency and router health to a training record before reporters see it."""
        if "loss" in logs:
            memory, fused = memory_stats(), self.backward_optimizer
            self.memory_guard.watch.check(memory)
            lost_updates = {} if fused is None else fused.lost_updates.drain()
            logs = self.metrics.record(logs, self.state, memory, lost_updates)
            # Upstream empties its sum by subtraction, and a NaN minus itself stays one for ever.
            # Remove when transformers sets its running loss to zero: the next line
            self._tr_loss = torch.zeros_like(self._tr_loss)
        super().log(logs, start_time)

    # ---- evaluation ----

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return the exact loss per label; upstream's mean of means weighs tokens unequally."""
        prefix, step = metric_key_prefix, self.state.global_step
        with self.memory_guard.naming("evaluation"), self.metrics.window.pause():
            metrics = eval_losses(self, eval_dataset, prefix)
            logger.info("step %d  %s", step, losses_in_words(metrics))
            self.log(dict(metrics))
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Save an interrupted step too: with `save_strategy best` this decides whether to."""
        is_best = super()._determine_best_metric(metrics, trial)
        return is_best or self.interruption.signal is not None

    # ---- saving ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let upstream write aside, then seal, publish and only then rotate."""
        upstream = partial(super()._save_checkpoint, model, trial)
        with self.metrics.window.pause():
            self.saver.save(upstream, self.model, self.optimizer, self.state)

    def _get_output_dir(self, trial: Any) -> str:
        """While a checkpoint is being written, point upstream's code at the staging folder."""
        return str(self.saver.folder_now)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights as the engine's layout wants them; ZeRO's come with its optimizer."""
        folder, layout = Path(output_dir or self.saver.folder), self.engine.layout
        plugin = self.accelerator.state.fsdp_plugin if self.engine.kind == "fsdp" else None
        with self.saver.ledger(folder) as ledger:
            write.write_weights(self.model, folder, ledger, layout, plugin)
            if self.args.should_save:
                ends = self.saver.turn_ends
                write.write_small_files(self.model, self.processing_class, folder, ledger, ends)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Hash what is written; upstream would write only the first shard of a native engine's."""
        folder, layout = Path(output_dir), self.engine.layout
        with self.saver.ledger(folder) as ledger:
            if layout == "zero":
                with write.deepspeed_into(ledger, self.model_wrapped):
                    super()._save_optimizer_and_scheduler(output_dir)
            else:
                states = (self.torch_optimizer, self.lr_scheduler)
                is_first = self.args.should_save
                write.write_states(self.model, *states, folder, ledger, layout, is_first=is_first)

    def _save_rng_state(self, output_dir: str) -> None:
        """Enter each rank's own file."""
        file = write.rng_file(folder := Path(output_dir), self.args)
        with self.saver.ledger(folder) as ledger, write.recording(ledger, file):
            super()._save_rng_state(output_dir)

    # ---- restoring ----

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Restore the weights strictly; upstream leaves the experts as they are, silently.

        Not called under DeepSpeed, which loads all it has at once. The files were hashed when the
        checkpoint was chosen (`resume.choose_checkpoint`).
        """
        restore.restore_weights(self.model, Path(resume_from_checkpoint), self.engine.layout)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Raise where a file is missing, and let no option of the checkpoint's win unseen."""
        if checkpoint is None:
            return
        folder, own = Path(checkpoint), (self.torch_optimizer, self.hyperparameters)
        self.memory_guard.warm_up.before_loading()  # while the optimizer is still a fresh one
        restore.restore_totals(self.metrics.totals, self.state, folder, self.args.world_size)
        with restore.own_options(*own, self.lr_scheduler):
            if self.engine.layout == "dtensor":
                restore.restore_states(self.model, own[0], self.lr_scheduler, folder)
            else:
                restore.require_states(folder, self.engine.layout)
                super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        """Go back to the best checkpoint's weights, experts included."""
        best = restore.verified_best(self.state, self.saver.folder, self.args.trust_checkpoint)
        if self.engine.layout == "zero":
            super()._load_best_model()
        else:
            restore.restore_weights(self.model, best, self.engine.layout)
        logger.info("best model: %s, %s", best, self.state.best_metric)
