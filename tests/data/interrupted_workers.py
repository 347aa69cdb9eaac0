"""A program that tokenises slowly in two processes until it is stopped."""

from __future__ import annotations

import sys
import time
from contextlib import closing
from importlib import import_module

from qwen3_sft.data.tokenize_rows import Counts, tokenize_chunks
from qwen3_sft.data.tokenized_rows import TokenizedRows
from qwen3_sft.errors import unless_stopped


def slow(rows: list) -> TokenizedRows:
    """Take a while for a chunk."""
    time.sleep(0.3)
    return TokenizedRows([], Counts(), [], [])


def main() -> int:
    """Tokenise without end; say when the workers have begun."""
    endless = iter(int, 1)
    # Processes that tokenise do not import the program that starts them.
    known = import_module("tests.data.interrupted_workers").slow
    with closing(tokenize_chunks(known, endless, num_proc=2)) as chunks:  # type: ignore[arg-type]
        for number, _ in enumerate(chunks):
            if number == 3:
                sys.stdout.write("at work\n")
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(unless_stopped(main, print))
