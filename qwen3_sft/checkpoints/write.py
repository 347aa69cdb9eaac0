"""What goes into a checkpoint, written through a ledger that hashes it on the way.

A disk that is full raises nothing here: a process that left a collective save in the middle would
leave the others in it. The ledger keeps what failed, and `save.py` tells all ranks.
"""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from qwen3_sft.checkpoints import sharded
from qwen3_sft.checkpoints.hub_metadata import complete_metadata, write_configs
from qwen3_sft.checkpoints.hub_writer import write_hub_model
from qwen3_sft.checkpoints.ledger import Ledger

# What a full or failing disk raises; torch.save a RuntimeError that names this file of torch.
# Remove when torch.save raises an OSError for a full disk: RuntimeError and _TORCH_WRITER
_WRITE_FAILURES = (OSError, CheckpointException, RuntimeError)
_TORCH_WRITER = "inline_container"
# Of torch's and DeepSpeed's states; `pickles.py` lets them in.
_ENUMS = (
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
)


def write_enums_by_value() -> None:
    """Have this process pickle members of these enums, as far as they are imported, by value.

    Python 3.11.0 to 3.11.3 (Debian 12 has 3.11.2) pickles a member as `getattr(class, name)`, which
    `trust.py` cannot let in: a checkpoint of those could not be read again.

    Remove when setup.py asks for Python 3.12: this function and _by_value
    """
    for module, name in _ENUMS:
        if module in sys.modules:
            copyreg.pickle(getattr(sys.modules[module], name), _by_value)


def _by_value(member: Enum) -> tuple[type[Enum], tuple[Any]]:
    return type(member), (member.value,)


def write_weights(
    model: Any, folder: Path, ledger: Ledger, layout: str, fsdp_plugin: Any = None
) -> None:
    """Write the weights as the engine's layout wants them; ZeRO's come with its optimizer.

    Accelerate's `fsdp_plugin`, if it shards the model, says whether shards are gathered.
    """
    if layout == "whole":
        write_hub_model(model, folder, ledger=ledger)
    elif fsdp_plugin is not None and "FULL_STATE_DICT" in str(fsdp_plugin.state_dict_type):
        write_hub_model(model, folder, model.dtype, ledger=ledger)
    elif layout == "dtensor":
        sharded.save_weights(model, folder, ledger)


def write_small_files(
    model: Any, tokenizer: Any, folder: Path, ledger: Ledger, turn_ends: Sequence[str] = ()
) -> None:
    """Write what `save_pretrained` writes of model and tokenizer beside the weights; on rank 0.

    No pickle of the arguments, unlike upstream, and all that other readers look for.
    """
    with noting(ledger):
        folder.mkdir(parents=True, exist_ok=True)
        write_configs(model, folder, model.dtype)
        tokenizer.save_pretrained(folder)
        complete_metadata(folder, tokenizer, turn_ends)


def write_states(
    model: Any, optimizer: Any, scheduler: Any, folder: Path, ledger: Ledger, layout: str,
    *, is_first: bool,
) -> None:  # fmt: skip
    """Write torch's optimizer and the schedule; DeepSpeed's are written by `deepspeed_into`.

    Remove when transformers saves every shard of a model sharded at load: save_optimizer here
    """
    if layout == "dtensor":
        sharded.save_optimizer(model, optimizer, folder, ledger)
    elif is_first:
        _torch_save(ledger, optimizer.state_dict(), folder / OPTIMIZER_NAME)
    if is_first:
        _torch_save(ledger, scheduler.state_dict(), folder / SCHEDULER_NAME)


def rng_file(folder: Path, args: Any) -> Path:
    """Return where upstream writes this rank's random states."""
    rank = f"_{args.process_index}" if args.world_size > 1 else ""
    return folder / f"rng_state{rank}.pth"


@contextmanager
def recording(ledger: Ledger, path: Path) -> Iterator[None]:
    """Enter the file that something else writes inside."""
    with noting(ledger):
        yield
        ledger.record(path)


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
def deepspeed_into(ledger: Ledger, engine: Any) -> Iterator[None]:
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
