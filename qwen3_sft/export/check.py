"""Load an exported folder with stock transformers and compare it with what the trainer held.

`python -m qwen3_sft.export.check FOLDER NOTES` does it in a process of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from qwen3_sft.checkpoints.hub_metadata import CONFIG, GENERATION, as_ids
from qwen3_sft.checkpoints.state_tensors import full_tensors
from qwen3_sft.errors import ExportError
from qwen3_sft.model.loading import load_strict, load_tokenizer

# The weights are equal bit by bit, so only other kernels (float32) and roundings to a narrower type
# (in which one of the two models may compute) may show in the logits, as RMS ratios.
_LOGITS_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.05}


@dataclass(frozen=True)
class Expected:
    """What the live model holds and says.

    Attributes:
        digests: of each entry of `full_tensors`, cast as written.
        logits: (1, 16, V) on the CPU, of the probe; their dtype is that of the computation.
        turn_ends: ids of the tokens that end a labelled turn, the most important first.
    """

    digests: dict[str, str]
    logits: Tensor
    turn_ends: tuple[int, ...] = ()

    def save(self, folder: Path) -> None:
        """Write it to a folder."""
        folder.mkdir()
        notes = {"digests": self.digests, "turn_ends": self.turn_ends}
        (folder / "notes.json").write_text(json.dumps(notes), encoding="utf-8")
        save_file({"logits": self.logits}, folder / "logits.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Expected:
        """Read what `save` wrote."""
        notes = json.loads((folder / "notes.json").read_text(encoding="utf-8"))
        logits = load_file(folder / "logits.safetensors")["logits"]
        return cls(notes["digests"], logits, tuple(notes["turn_ends"]))


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
    """Reload `folder` on the CPU; compare keys, shapes, dtypes, bits and logits, and generate.

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
    if expected.turn_ends:
        check_stops(reloaded, folder, expected.turn_ends)


def check_stops(model: Any, folder: Path, turn_ends: Sequence[int]) -> None:
    """Find out whether readers of `folder` stop at each token that ends a labelled turn.

    What the model will say is the training's affair, so the end token is put into its mouth: stock
    generation with the folder's own settings must stop there.

    Raises:
        ExportError: a file names another end token, or generation went on.
    """
    tokenizer = load_tokenizer(folder)
    named = {"the tokenizer": as_ids(tokenizer.eos_token_id)}
    for name in (GENERATION, CONFIG):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        named[name] = as_ids(content.get("eos_token_id"))
    for name, ids in named.items():
        wanted = turn_ends[:1] if name == "the tokenizer" else turn_ends
        if ids[:1] != list(turn_ends[:1]) or not set(wanted) <= set(ids):
            raise ExportError(f"{folder}: {name} ends at {ids}, trained turns at {wanted}")
    for end in turn_ends:
        if (length := _generated(model, tokenizer, end)) != 1:
            raise ExportError(f"{folder}: generation goes on after {end}, for {length} tokens")


class _SayOnly(LogitsProcessor):
    """Leave one token to choose from."""

    def __init__(self, token: int) -> None:
        self._token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        only = torch.full_like(scores, -torch.inf)
        only[:, self._token] = 0
        return only


@torch.no_grad()
def _generated(model: Any, tokenizer: Any, token: int) -> int:
    """Return how many tokens stock generation says until it stops, at most two."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    said = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2,
        logits_processor=LogitsProcessorList([_SayOnly(token)]), tokenizer=tokenizer,
    )  # fmt: skip
    return said.shape[1] - 1


if __name__ == "__main__":
    try:
        check_export(Path(sys.argv[1]), Expected.load(Path(sys.argv[2])))
    except ExportError as error:
        sys.exit(str(error))
