"""The folder of one run: what is in it already, and the records written beside the weights."""

from __future__ import annotations

import json
import logging
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from qwen3_sft.errors import UsageError

logger = logging.getLogger(__name__)

_PACKAGES = (
    "qwen3-sft", "torch", "triton", "transformers", "accelerate", "trl", "datasets",
    "liger-kernel", "torchao", "flash-attn", "flash-attn-4", "deepspeed", "tokenizers", "tiktoken",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """Paths and records of `runs/NAME/`."""

    path: Path

    @property
    def model(self) -> Path:
        """The exported model, hub layout."""
        return self.path / "model"

    @property
    def demo(self) -> Path:
        """The demo's model and conversations."""
        return self.path / "base"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Completions of held-out prompts."""
        return self.path / "samples.jsonl"

    @property
    def summary_file(self) -> Path:
        """Written last; its presence says that the run is finished."""
        return self.path / "summary.json"

    @property
    def interrupted(self) -> Path:
        """There while a signal has ended the run and nobody has started it again."""
        return self.path / "INTERRUPTED"

    def create(self) -> None:
        """Make the folder.

        Raises:
            UsageError: it cannot be made or written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output_dir {self.path}: {error}") from error
        if not os.access(self.path, os.W_OK):
            raise UsageError(f"--output_dir {self.path}: not writable")

    def summary(self) -> dict[str, Any] | None:
        """Return the summary of a finished run, None of any other.

        Raises:
            UsageError: it is damaged.
        """
        return self.read_json(self.summary_file.name) if self.summary_file.is_file() else None

    def reopen(self) -> None:
        """Take the sign of a finished run away: it goes on."""
        self.summary_file.unlink(missing_ok=True)

    def read_json(self, name: str) -> dict[str, Any]:
        """Return one record.

        Raises:
            UsageError: it holds no JSON object, as after a crash of the machine.
        """
        path = self.path / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # JSON and UTF-8 alike
            raise UsageError(f"{path}: {self._damaged(str(error))}") from error
        if not isinstance(content, dict):
            raise UsageError(f"{path}: {self._damaged(f'a {type(content).__name__}')}")
        return content

    @staticmethod
    def _damaged(found: str) -> str:
        return (
            f"damaged ({found}); remove it, and the run goes on from its newest checkpoint, or "
            "choose another --output_dir"
        )

    def write_json(self, name: str, content: Any) -> None:
        """Write one record, replaced as a whole."""
        partial = self.path / f".{name}.partial"
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        partial.rename(self.path / name)

    def write_config(self, resolved: dict[str, Any]) -> None:
        """Write config.yaml: the resolved options, usable as a recipe."""
        text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
        (self.path / "config.yaml").write_text(text, encoding="utf-8")


def versions() -> dict[str, str]:
    """Return Python's and the packages' versions, absent packages left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
