"""What the tests of data preparation write and compare."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from qwen3_sft.data.token_store import TokenDataset

NUM_ROWS = 700  # three chunks of the tokeniser


def write(rows: Iterable[dict]) -> None:
    """Write data.jsonl in the current folder."""
    Path("data.jsonl").write_text("\n".join(map(json.dumps, rows)))


def arrays(dataset: TokenDataset) -> list[list]:
    """Return (ids, trained) of every sample as lists."""
    return [[part.tolist() for part in dataset[i]] for i in range(len(dataset))]
