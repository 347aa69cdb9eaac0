"""What the Trainer writes into a checkpoint, through a ledger that hashes it on the way.

A disk that is full raises nothing here: a process that left a collective save in the middle would
leave the others in it. The ledger keeps what failed, and `save.py` tells all ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from qwen3_sft.checkpoints import sharded as sharded_checkpoint
from qwen3_sft.checkpoints.hub_writer import write_hub_model
from qwen3_sft.checkpoints.ledger import Ledger
from qwen3_sft.distributed.engine import Engine

# What a full or failing disk raises; torch.save a RuntimeError that names this file of torch.
_WRITE_FAILURES = (OSError, CheckpointException, RuntimeError)
_TORCH_WRITER = "inline_container"


class WritingTrainer(Trainer):
    """Trainer that writes weights, optimizer and random states of every engine into a ledger."""

    # Upstream declares these as optional or as unions that a type checker cannot narrow.
    args: Any
    model: Any
    model_wrapped: Any
    optimizer: Any
    lr_scheduler: Any
    processing_class: Any
    current_flos: Any

    def __init__(self, *, run_facts: dict[str, Any], engine: Engine, **kwargs: Any) -> None:
        """Keep what every manifest records beside the files.

        Args:
            run_facts: data key, chat format, versions and the like.
            engine: what spreads the run over processes.
            **kwargs: as for `transformers.Trainer`.
        """
        args = kwargs["args"]
        save_only_model = args.save_only_model
        # Upstream refuses to save a natively sharded model with its optimizer, and one sharded by
        # accelerate without it; this class does both.
        if engine.layout == "dtensor":
            args.save_only_model = engine.kind == "native"
        super().__init__(**kwargs)
        args.save_only_model = save_only_model
        self.run_facts = run_facts
        self.engine = engine
        self.skipped_steps = 0
        self.tokens_seen = 0
        self._ledger: Ledger | None = None  # of the save that is going on

    @property
    def _output_dir(self) -> Path:
        return Path(str(self.args.output_dir))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights as the engine's layout wants them; ZeRO's come with its optimizer.

        No pickle of the arguments, unlike upstream.
        """
        folder = Path(output_dir or self._output_dir)
        ledger = self._ledger or Ledger(folder)
        if self.engine.layout == "whole":
            write_hub_model(self.model, folder, ledger=ledger)
        elif self._saves_whole_weights():
            write_hub_model(self.model, folder, self.model.dtype, ledger=ledger)
        elif self.engine.layout == "dtensor":
            sharded_checkpoint.save_weights(self.model, folder, ledger)
        if self.args.should_save:
            with noting(ledger):
                folder.mkdir(parents=True, exist_ok=True)
                self._save_config(folder)
                self.processing_class.save_pretrained(folder)
        if self._ledger is None and ledger.error is not None:
            raise ledger.error

    def _save_config(self, folder: Path) -> None:
        """Write what `save_pretrained` writes of a model beside its weights."""
        config = self.model.config
        if self.engine.layout == "whole":
            config = copy.deepcopy(config)
            config.dtype = str(self.model.dtype).removeprefix("torch.")
            config.architectures = [type(self.model).__name__]
            if self.model.can_generate():
                self.model.generation_config.save_pretrained(folder)
        config.save_pretrained(folder)

    def _saves_whole_weights(self) -> bool:
        plugin = self.accelerator.state.fsdp_plugin if self.engine.kind == "fsdp" else None
        return plugin is not None and "FULL_STATE_DICT" in str(plugin.state_dict_type)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Hash what is written; upstream would write only the first shard of a native engine's."""
        folder = Path(output_dir)
        ledger = self._ledger or Ledger(folder)
        if self.engine.layout == "zero":
            with _deepspeed_into(ledger, self.model_wrapped):
                super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.engine.layout == "dtensor":
            optimizer = self._torch_optimizer()
            sharded_checkpoint.save_optimizer(self.model, optimizer, folder, ledger)
        elif self.args.should_save:
            _torch_save(ledger, self.optimizer.state_dict(), folder / OPTIMIZER_NAME)
        if self.args.should_save:
            _torch_save(ledger, self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)

    def _save_rng_state(self, output_dir: str) -> None:
        """Enter each rank's own file."""
        rank = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        ledger = self._ledger or Ledger(Path(output_dir))
        with noting(ledger):
            super()._save_rng_state(output_dir)
            ledger.record(Path(output_dir) / f"rng_state{rank}.pth")

    def _torch_optimizer(self) -> Any:
        """Torch's optimizer below accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)


@contextmanager
def noting(ledger: Ledger) -> Iterator[None]:
    """Keep what a disk refuses for the end of the save, where all ranks are told."""
    try:
        yield
    except _WRITE_FAILURES as error:
        if not isinstance(error, RuntimeError):
            ledger.fail(_cause(error))
        elif _TORCH_WRITER in str(error):
            ledger.fail(OSError(f"torch.save could not write a file: {error}"))
        else:
            raise


@contextmanager
def _deepspeed_into(ledger: Ledger, engine: Any) -> Iterator[None]:
    """Have a DeepSpeed engine write through the ledger; another kind of writer is left alone."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    writer = engine.checkpoint_engine
    if not isinstance(writer, TorchCheckpointEngine):
        yield
        return

    def save(state_dict: Any, path: str) -> None:
        _torch_save(ledger, state_dict, path, is_zip=writer.zipfile_serialization)

    writer.save = save
    try:
        yield
    finally:
        del writer.save


def _torch_save(ledger: Ledger, state: Any, path: Path | str, *, is_zip: bool = True) -> None:
    with ledger.open(path) as stream:
        file: Any = stream  # has what torch.save uses of a file
        torch.save(state, file, _use_new_zipfile_serialization=is_zip)


def _cause(error: BaseException) -> BaseException:
    """Return what the first rank that failed raised inside torch's distributed checkpoint."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error
