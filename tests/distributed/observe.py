"""What a run's experts function was called with, written down by each rank."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def watched_experts(notes: Path) -> Iterator[None]:
    """Count the calls of our experts function and the experts that its weights hold."""
    import monkey_patch.scatter_moe as patch

    original = patch.scatter_moe
    num_calls, sizes = 0, set()

    def watched(hidden: Any, gate_up: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        sizes.add(len(gate_up))
        return original(hidden, gate_up, *args, **kwargs)

    patch.scatter_moe = watched
    try:
        yield
    finally:
        patch.scatter_moe = original
        seen = {"calls": num_calls, "local_experts": sorted(sizes)}
        notes.with_suffix(f".{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen))
