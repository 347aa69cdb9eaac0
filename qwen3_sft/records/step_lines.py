"""One JSON object per line: the files of a run that grow while it trains."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class StepLines:
    """JSON lines with a `step`, such as metrics.jsonl. A full disk costs the file, not the run."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Start anew, or keep what a resumed run wrote up to the step it resumes from."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.exists() and resume_step is not None:
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step(line) <= resume_step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; a non-finite value becomes a string, JSON has no word for it."""
        line = json.dumps(
            {key: _json_number(value) for key, value in record.items()}, ensure_ascii=False
        )
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            logger.warning("cannot write %s (%s); training goes on", self.path, error)


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):  # the last line of a killed run may be cut
        return 1 << 62


def _json_number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
