"""Load an exported folder with stock transformers and compare it with what the trainer held.

`python -m qwen3_sft.export.check FOLDER NOTES` does it in a process of its own.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen3_sft.checkpoints.state_tensors import full_tensors
from qwen3_sft.errors import ExportError
from qwen3_sft.model.loading import load_strict

# The weights are equal bit by bit, so only other kernels (float32) and roundings to a narrower type
# (in which one of the two models may compute) may show in the logits, as RMS ratios.
_LOGITS_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.05}


@dataclass(frozen=True)
class Expected:
    """What the live model holds and says.

    Attributes:
        digests: of each entry of `full_tensors`, cast as written.
        logits: (1, 16, V) on the CPU, of the probe; their dtype is that of the computation.
    """

    digests: dict[str, str]
    logits: Tensor

    def save(self, folder: Path) -> None:
        """Write it to a folder."""
        folder.mkdir()
        (folder / "digests.json").write_text(json.dumps(self.digests), encoding="utf-8")
        save_file({"logits": self.logits}, folder / "logits.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Expected:
        """Read what `save` wrote."""
        digests = json.loads((folder / "digests.json").read_text(encoding="utf-8"))
        return cls(digests, load_file(folder / "logits.safetensors")["logits"])


def digest(tensor: Tensor) -> str:
    """Return a hash of dtype, shape and bits of a CPU tensor."""
    hasher = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    hasher.update(memoryview(flat.numpy()))  # type: ignore[arg-type]
    return hasher.hexdigest()


@torch.no_grad()
def probe(model: Any) -> Tensor:
    """Return the logits (1, 16, V) of fixed tokens on the CPU, of the dtype they were computed in.

    A forward pass, so every rank that holds a part of the model takes part.
    """
    was_training = model.training
    model.eval()
    vocabulary = model.config.get_text_config().vocab_size  # ZeRO-3 leaves the embedding empty
    ids = (torch.arange(16, device=model.device) * 7919 % vocabulary)[None]
    computed: list[torch.dtype] = []
    # Engines widen the result to float32 after a forward pass in bfloat16.
    hook = model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: computed.append(output.dtype)
    )
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
        model.train(was_training)
    return logits.to("cpu", computed[-1] if computed else logits.dtype).contiguous()


def check_export(folder: Path, expected: Expected) -> None:
    """Reload `folder` on the CPU and compare keys, shapes, dtypes, bits and logits.

    Raises:
        ExportError: what differs.
    """
    reloaded = load_strict(folder, dtype="auto")
    actual = {name: tensor for name, tensor in full_tensors(reloaded) if tensor is not None}
    if actual.keys() != expected.digests.keys():
        differing = sorted(actual.keys() ^ expected.digests.keys())
        raise ExportError(f"{folder}: keys differ: {', '.join(differing[:5])}")
    for name, tensor in actual.items():
        if digest(tensor) != expected.digests[name]:
            raise ExportError(f"{folder}: {name} differs after reloading")
    got, want = probe(reloaded), expected.logits
    limit = max(_LOGITS_LIMIT[got.dtype], _LOGITS_LIMIT[want.dtype])
    got, want = got.float(), want.float()
    ratio = ((got - want).square().mean() / want.square().mean()).sqrt().item()
    if not ratio <= limit:
        raise ExportError(f"{folder}: probe logits differ by {ratio:.2e} (RMS ratio) > {limit:.0e}")


if __name__ == "__main__":
    try:
        check_export(Path(sys.argv[1]), Expected.load(Path(sys.argv[2])))
    except ExportError as error:
        sys.exit(str(error))
