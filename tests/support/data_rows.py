"""Rows of the `messages` format, rows of files, and what of a sample is trained."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import Any

from qwen3_sft.chat.pieces import Rendered
from qwen3_sft.data.formats import detect_format, parse_row
from qwen3_sft.data.readers import find_sources
from qwen3_sft.data.tally import Tally
from qwen3_sft.options.data_args import DataArguments

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
# The least that a row of each format has.
BY_FORMAT = {
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "i", "output": "o"},
    "question_answer": {"question": "q", "answer": "a"},
    "prompt_completion": {"prompt": "p", "completion": "c"},
    "lists": {"prompt": [USER], "completion": [ANSWER]},
    "text": {"text": "t"},
    "tokens": {"input_ids": [1, 2]},
}


def parse(row: dict, **options: Any) -> tuple[Any, Counter[str]]:
    """Parse a row that stands at f:1; return the sample and the counted warnings."""
    warnings = Counter()
    sample = parse_row(row, detect_format(row, "f:1"), "f:1", warnings, **options)
    return sample, warnings


def read_rows(args: DataArguments, tally: Tally | None = None) -> list[tuple[str, dict]]:
    """Return (location, row) of all sources of `dataset`."""
    counted = Tally() if tally is None else tally
    return [row for source in find_sources(args) for row in source.reader.rows(counted)]


def trained_texts(sample: Rendered) -> list[str]:
    """Return the stretches of a sample that carry labels, in order."""
    runs = groupby(sample.pieces, key=lambda piece: piece.trained)
    return ["".join(piece.text for piece in run) for trained, run in runs if trained]


def chat(*messages: dict, **columns: Any) -> dict:
    """Return a row of these messages."""
    return {"messages": list(messages), **columns}


def answer(**fields: Any) -> dict:
    """Return a row with a question and an answer of these fields."""
    return chat(USER, {"role": "assistant", **fields})


def calling(arguments: Any, **fields: Any) -> dict:
    """Return a row whose answer calls a tool."""
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return answer(tool_calls=[call], **fields)


def sums(number: int) -> list[dict]:
    """Return conversations of four lengths, 37 to 52 tokens with the tests' tokenizer."""
    return [
        chat(
            {"role": "user", "content": f"What is {i} plus {i}?"},
            {"role": "assistant", "content": f"It is {2 * i}." + " Really." * (i % 4)},
        )
        for i in range(number)
    ]
