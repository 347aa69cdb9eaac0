"""Write a stream of tensors as a hub checkpoint, holding one file's worth of them at a time.

In memory the experts of a layer are two fused tensors; on the hub every expert has its own three
matrices. transformers' own reverse conversion does that step, for one fused tensor at a time: each
of them is converted without looking at any other. By itself it gives back the names that the model
was loaded from; here they are the family's on the hub, whatever the base had and whoever loaded it.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from qwen3_sft.checkpoints.ledger import Ledger
from qwen3_sft.checkpoints.safetensors_file import write_tensors
from qwen3_sft.checkpoints.state_tensors import full_tensors
from qwen3_sft.distributed.rank_zero import RankZero

logger = logging.getLogger(__name__)

Layout = Literal["hub", "fused"]

MAX_SHARD_BYTES = 5 * 10**9  # what the hub recommends for one file

INDEX = "model.safetensors.index.json"


def write_hub_model(
    model: Any,
    folder: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    ledger: Ledger | None = None,
) -> None:
    """Write the weights of `model`, and nothing but these, to `folder`; collective.

    Args:
        model: unwrapped, held by any engine.
        folder: made if it does not exist; on rank 0 only.
        dtype: of the written floating-point tensors; None leaves them as they are.
        max_shard_bytes: of the tensors in one file.
        ledger: of the save that this is a part of. It keeps what the disk refuses.

    Raises:
        OSError: on every rank; rank 0 could not write.
    """
    rank0 = RankZero(folder, raises=OSError)
    rank0.do(lambda: folder.mkdir(parents=True, exist_ok=True))
    writer = HubWriter(model, folder, dtype, max_shard_bytes, ledger)
    for name, tensor in full_tensors(model, dtype):
        if tensor is not None:
            # After a failure the loop goes on, without writing: the others are in it as well.
            rank0.do(writer.add, name, tensor)
    rank0.do(writer.close)
    rank0.agree()


class HubWriter:
    """Collects converted tensors and writes them to `folder`, file by file.

    Attributes:
        num_tensors: hub tensors accepted so far.
        num_bytes: their size.
    """

    def __init__(
        self,
        model: Any,
        folder: Path,
        dtype: torch.dtype | None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        ledger: Ledger | None = None,
        layout: Layout = "hub",
    ) -> None:
        """Write nothing yet.

        Args:
            model: its class and configuration choose the conversion; its weights are not read.
            folder: exists and holds no weights.
            dtype: of the written floating-point tensors; None leaves them as they are.
            max_shard_bytes: of the tensors in one file; a larger tensor has a file for itself.
            ledger: enters the files, and keeps what the disk refuses; None raises that.
            layout: names of the tensors: the released models', or the live model's.
        """
        self._conversions = _hub_conversions(model) if layout == "hub" else []
        self._model, self._folder, self._dtype = model, folder, dtype
        self._max_shard_bytes = max_shard_bytes
        self._is_own = ledger is None
        self._ledger = Ledger(folder) if ledger is None else ledger
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._files: list[list[str]] = []
        self._num_parameters = 0
        self.num_tensors = 0
        self.num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> Tensor:
        """Take one entry of the state dict.

        Args:
            name: as in the live model.
            tensor: in full, any device and dtype; neither kept nor changed if it must be cast.

        Returns:
            The tensor as written, on the CPU, before it is taken apart.

        Raises:
            OSError: a file cannot be written.
        """
        is_cast = self._dtype is not None and tensor.is_floating_point()
        dtype = self._dtype if is_cast else tensor.dtype
        cast = tensor.detach().to("cpu", dtype)
        for hub_name, part in self._converted({name: cast}).items():
            if self._pending and self._pending_bytes + part.nbytes > self._max_shard_bytes:
                self._write()
            self._pending[hub_name] = part.contiguous()
            self._pending_bytes += part.nbytes
            self._num_parameters += part.numel()
            self.num_tensors += 1
            self.num_bytes += part.nbytes
        return cast

    def close(self) -> None:
        """Write what is left, give the files their final names and add the index.

        Raises:
            OSError: a file cannot be written.
        """
        if self._pending or not self._files:
            self._write()
        count = len(self._files)
        if count == 1:
            self._ledger.rename(self._staged(1), self._folder / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._files, start=1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._ledger.rename(self._staged(number), self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        metadata = {"total_parameters": self._num_parameters, "total_size": self.num_bytes}
        index = {"metadata": metadata, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        with self._ledger.open(self._folder / INDEX) as file:
            file.write(text.encode())
        self._raise_own()

    def _converted(self, entry: dict[str, Tensor]) -> dict[str, Tensor]:
        """Undo the family's conversions, not those that this model happened to be loaded with."""
        loaded_with = getattr(self._model, "_weight_conversions", None)
        self._model._weight_conversions = self._conversions
        try:
            return revert_weight_conversion(self._model, entry)
        finally:
            self._model._weight_conversions = loaded_with

    def _write(self) -> None:
        self._files.append(list(self._pending))
        number = len(self._files)
        with self._ledger.open(self._staged(number)) as file:
            write_tensors(self._pending, file)
        self._raise_own()
        if number > 1:
            logger.info("wrote %d files, %.1f GB", number, self.num_bytes / 1e9)
        self._pending, self._pending_bytes = {}, 0

    def _raise_own(self) -> None:
        if self._is_own and self._ledger.error is not None:
            raise self._ledger.error

    def _staged(self, number: int) -> Path:
        """The name of a file while their number is still unknown."""
        return self._folder / f"model-{number:05d}.safetensors"


def _hub_conversions(model: Any) -> list[Any]:
    """Return what turns the hub's names of a family into those in memory.

    A change of prefix is what `from_pretrained` does to a base model's file.
    """
    every = get_model_conversion_mapping(model, add_legacy=False)
    return [conversion for conversion in every if not isinstance(conversion, PrefixChange)]
