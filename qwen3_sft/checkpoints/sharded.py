"""Weights and optimizer of a model made of DTensors, saved and restored shard by shard.

Serves accelerate's FSDP2 and transformers' native FSDP2 with expert parallelism alike: torch's
distributed checkpoint describes every shard by its place in the whole tensor, so that one layout's
checkpoint loads into another (world size, ep_size). transformers has the functions
(`transformers/distributed/checkpoint.py`), but its Trainer refuses to use them.

The weights of a checkpoint are either shards (`weights/`, a safetensors file per process) or, with
accelerate's FULL_STATE_DICT, a hub model that vLLM and transformers load. The optimizer stays in
shards always: gathered it would be 244 GB for the 30B model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystem

from qwen3_sft.checkpoints.ledger import Ledger
from qwen3_sft.checkpoints.state_tensors import local_part, plain_name
from qwen3_sft.distributed.rank_zero import process_rank
from qwen3_sft.errors import CheckpointError
from qwen3_sft.model.loading import load_strict

WEIGHTS, OPTIMIZER = "weights", "optimizer"


class _LedgerFiles(FileSystem):
    """What a writer of torch's distributed checkpoint writes goes through a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with self._ledger.open(path) as stream:
            yield stream

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        self._ledger.rename(Path(path), Path(new_path))


def _into(ledger: Ledger, writer: Any) -> Any:
    writer.fs = _LedgerFiles(ledger)
    writer.sync_files = False  # closing does; without a file number the writer would sync all disks
    return writer


def save_weights(model: Any, folder: Path, ledger: Ledger) -> None:
    """Write this process's shards to `folder/weights`; collective.

    As transformers' `_save_model_checkpoint_distributed`, which fails on accelerate's tied weights:
    safetensors writes no memory twice. They are written under both names, and load so.

    Remove when transformers saves tied DTensors: the copies that are made of them here
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from transformers.distributed.checkpoint import _redistribute_state_dict

    state: dict[str, Any] = _redistribute_state_dict(get_model_state_dict(model))
    seen: set[int] = set()
    for name, value in state.items():
        address = local_part(value).data_ptr()
        if address in seen:
            state[name] = value.clone()
        seen.add(address)
    writer = checkpoint.HuggingFaceStorageWriter(str(folder / WEIGHTS), save_distributed=True)
    checkpoint.save(state, storage_writer=_into(ledger, writer))


def load_sharded_weights(model: Any, folder: Path) -> None:
    """Restore the weights of `folder`, shards or a hub model, into a live model; collective.

    Raises:
        CheckpointError: the files hold other parameters than the model.
    """
    from transformers.distributed.checkpoint import _load_model_checkpoint_distributed

    if not (folder / WEIGHTS).is_dir():
        _load_hub_model(model, folder)
        return
    saved, live = saved_names(folder), {plain_name(name) for name in model.state_dict()}
    if saved != live:
        differing = sorted(saved ^ live)
        raise CheckpointError(f"{folder}: the live model differs in {', '.join(differing[:5])}")
    _load_model_checkpoint_distributed(model, folder / WEIGHTS)


def saved_names(folder: Path) -> set[str]:
    """Return the names of the parameters in `folder/weights`."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    metadata = HuggingFaceStorageReader(str(folder / WEIGHTS)).read_metadata()
    return set(metadata.state_dict_metadata)


def _load_hub_model(model: Any, folder: Path) -> None:
    """Read the whole model on rank 0 and hand every process its shards."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    is_first = process_rank() == 0
    whole = load_strict(folder, dtype=model.dtype).state_dict() if is_first else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    set_model_state_dict(model, whole, options=options)


def save_optimizer(model: nn.Module, optimizer: Any, folder: Path, ledger: Ledger) -> None:
    """Write this process's part of the optimizer state to `folder/optimizer`; collective.

    As transformers' `save_optimizer_distributed`, through a ledger: entries by name, so that
    another layout may put the weights into other groups.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    from transformers.distributed.checkpoint import _redistribute_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    writer = _into(ledger, checkpoint.FileSystemWriter(folder / OPTIMIZER))
    checkpoint.save({"optimizer": _redistribute_state_dict(state)}, storage_writer=writer)


def load_optimizer(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Restore it, whatever number of processes wrote it; collective.

    Raises:
        CheckpointError: there is none.
    """
    from transformers.distributed.checkpoint import load_optimizer_distributed

    if not (folder / OPTIMIZER).is_dir():
        raise CheckpointError(f"{folder / OPTIMIZER}: missing, cannot resume from here")
    load_optimizer_distributed(model, optimizer, str(folder / OPTIMIZER))


def load_scheduler(scheduler: Any, path: Path) -> None:
    """Restore a learning rate schedule whose optimizer may have other groups than the saved one.

    One group per device mesh is made, so their number depends on the layout; every list with one
    entry per group is kept as it was created. The schedule itself depends on the step alone.

    Raises:
        CheckpointError: there is none.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, cannot resume from here")
    saved = torch.load(path, weights_only=True)
    fresh = scheduler.state_dict()
    saved |= {key: fresh[key] for key in ("base_lrs", "lr_lambdas") if key in fresh}
    if "_last_lr" in fresh:
        saved["_last_lr"] = saved["_last_lr"][:1] * len(fresh["_last_lr"])
    scheduler.load_state_dict(saved)
