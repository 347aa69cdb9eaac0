"""Which base model it is, wherever its folder lies: a hash that reads little of its weights."""

from __future__ import annotations

import json
from pathlib import Path

import xxhash

from qwen3_sft.model.base_files import read_object, weight_files
from qwen3_sft.model.config_file import CONFIG

_SAMPLE_BYTES = 1024


def model_fingerprint(folder: Path) -> str:
    """Return a hash of a model's configuration and of the beginning of each of its tensors.

    Weights that differ further inside their tensors alone pass as the same ones; what trains or
    merges a model changes them everywhere. Files that transformers does not read do not count.

    Args:
        folder: with config.json and whole `*.safetensors`.

    Raises:
        ModelError: config.json or a file of weights is missing.
    """
    hasher = xxhash.xxh3_128()
    config = read_object(folder / CONFIG)
    config.pop("transformers_version", None)
    hasher.update(json.dumps(config, sort_keys=True).encode())
    for file in weight_files(folder):
        with file.open("rb") as stream:
            # The safetensors package tells no offsets, and reading tensors maps whole files.
            size = int.from_bytes(stream.read(8), "little")
            tensors = json.loads(stream.read(size))
            tensors.pop("__metadata__", None)
            for name, entry in sorted(tensors.items()):
                first, end = entry["data_offsets"]
                stream.seek(8 + size + first)
                hasher.update(f"{name} {entry['dtype']} {entry['shape']}".encode())
                hasher.update(stream.read(min(end - first, _SAMPLE_BYTES)))
    return hasher.hexdigest()
