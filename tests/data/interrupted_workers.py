"""A program that tokenises slowly in two processes until it is stopped."""

from __future__ import annotations

import sys
import time

from qwen3_sft.data.tokenize_rows import Counts, TokenizedRows, tokenize_chunks
from qwen3_sft.errors import unless_stopped


def slow(rows: list) -> TokenizedRows:
    """Take a while for a chunk."""
    time.sleep(0.3)
    return TokenizedRows([], Counts(), [])


def main() -> int:
    """Tokenise without end; say when the workers have begun."""
    endless = iter(int, 1)
    for number, _ in enumerate(tokenize_chunks(slow, endless, num_proc=2)):  # type: ignore[arg-type]
        if number == 3:
            sys.stdout.write("at work\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(unless_stopped(main, print))
