"""Generated conversations of several turns, as long as those of real data sets.

Words are drawn from the vocabulary of the tokenizer, the frequent ones (the first merged) most
often, and one in eight is made up of two, so that it takes several tokens. Every text is new:
a tokenizer's memory of words helps as much as with real text, and one of whole texts not at all.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

MEAN_ROUNDS = 4  # questions and answers of a row
_WORDS = 20_000
_OTHER = (
    "def f(x):\n    return x + 1\n", "1,234.50", "https://example.org/a?b=c", "naïve café",
    "“quoted”", "很高兴认识你。", "привет, мир", "😀", "\n\n- ", "\n\n", "x² + y²", "don't",
)  # fmt: skip


def write_conversations(path: Path, rows: int, words: list[str]) -> None:
    """Write `rows` conversations as JSON lines, the same in every run."""
    with path.open("w", encoding="utf-8") as file:
        for row in conversations(rows, words):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def conversations(rows: int, words: list[str], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield rows of the `messages` format."""
    rng = random.Random(seed)
    weights = [*accumulate(1 / (rank + 20) for rank in range(len(words)))]

    def text(mean: int) -> str:
        count = max(1, int(rng.lognormvariate(0, 0.8) * mean))
        said = rng.choices(words, cum_weights=weights, k=count)
        for at in range(rng.randrange(8), count, 8):
            said[at] += rng.choice(words)
        for at in range(rng.randrange(40), count, 40):
            said[at] = rng.choice(_OTHER)
        return " ".join(said) + rng.choice(".?!")

    for _ in range(rows):
        messages = []
        for _ in range(rng.randint(1, 2 * MEAN_ROUNDS - 1)):
            messages += [
                {"role": "user", "content": text(10)}, {"role": "assistant", "content": text(16)}
            ]  # fmt: skip
        yield {"messages": messages}


def frequent_words(vocabulary: dict[str, int]) -> list[str]:
    """Return words of a byte-level vocabulary, the first merged first."""
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    words = (token[1:] for token in ordered if token.startswith("Ġ"))
    return [word for word in words if word.isalpha() and word.isascii()][:_WORDS]
