"""Texts and JSON values inside a row, checked for what no tokenizer or template can take."""

from __future__ import annotations

import ast
import json
import re
from typing import Any, NoReturn

from qwen3_sft.data.rows.source import Source

_CONTROL_TEXT = re.compile(r"<\|[a-z_]+\|>|</?(?:tool_call|tool_response|think)>")

_END = re.compile(r"(<\|(?:endoftext|im_end)\|>)(?:\s*<\|(?:endoftext|im_end)\|>)*\s*\Z")


def split_end(text: str) -> tuple[str, str | None]:
    """Split the end tokens off a text that was written with some: (text, the first of them)."""
    if not text.rstrip().endswith("|>"):
        return text, None
    end = _END.search(text)
    return (text[: end.start()], end[1]) if end else (text, None)


def check_text(text: str, where: str, source: Source) -> str:
    """Return `text`; raise on what no tokenizer can encode, count what is suspicious."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            source.fail(
                f"{where} has a lone surrogate {text[error.start]!a} at character {error.start}; "
                "it is half of an emoji or broken text: repair or remove it"
            )
    if "\0" in text:
        source.warn("NUL character")
    return text


def warn_control_text(text: str, source: Source) -> None:
    """Count text that spells a control token: it is encoded as plain text."""
    if "<" in text and _CONTROL_TEXT.search(text):
        source.warn("control-token text kept as plain text")


def describe(value: Any) -> str:
    """Name a value in an error message: its type, and its beginning."""
    if value is None:
        return "null"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def load_json(text: str, where: str, source: Source) -> Any:
    """Parse a JSON value, or one that Python has printed, found as a string inside a row."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        value = _python_value(text)
        if value is None:
            source.fail(f"{where} is not valid JSON ({error}): {text[:80]!r}")
        return value


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _python_value(text: str) -> Any:
    """Return a list or dict in Python's spelling, as `str()` and pandas write it, else None."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def check_json(value: Any, where: str, source: Source) -> Any:
    """Return a nested value; raise if it cannot be written as JSON."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        source.fail(f"{where} cannot be written as JSON: {error}")
    check_text(text, where, source)
    return value
