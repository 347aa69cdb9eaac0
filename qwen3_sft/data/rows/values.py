"""Texts and JSON values inside a row, checked for what no tokenizer or template can take."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from qwen3_sft.data.files.strict_json import StrictDecoder, python_value
from qwen3_sft.data.rows.source import Source

_CONTROL_TEXT = re.compile(r"<\|[a-z_]+\|>|</?(?:tool_call|tool_response|think)>")

_ENDS = ("<|endoftext|>", "<|im_end|>")


def split_end(text: str) -> tuple[str, str | None]:
    """Split the end tokens off a text that was written with some: (text, the first of them)."""
    stop, first = len(text), None
    at = _before_blanks(text, stop)
    while found := next((end for end in _ENDS if text.endswith(end, 0, at)), None):
        stop, first = at - len(found), found
        at = _before_blanks(text, stop)
    return text[:stop], first


# How answers end that were written for another model, here no token but text to learn.
_FOREIGN_END = re.compile(
    r"(?:<\|[\w ]{1,30}\|>|</s>|<eos>|<end_of_turn>|<\uff5cend\u2581of\u2581sentence\uff5c>)\s*\Z"
)


def refuse_foreign_end(text: str, where: str, source: Source) -> None:
    """Raise for what is learned and ends with the end token of another model.

    Raises:
        DataError: names the token.
    """
    if not text.rstrip().endswith(">") or not (end := _FOREIGN_END.search(text[-200:])):
        return
    token = end[0].strip()
    if token == "</s>" and "<s>" in text.lstrip()[1:]:
        return  # HTML that strikes a text out
    source.fail(
        f"{where} ends with {token}, the end token of another model, which would be learned as "
        "text; remove it: every answer is ended as this model's template does"
    )


def _before_blanks(text: str, stop: int) -> int:
    while stop and text[stop - 1].isspace():
        stop -= 1
    return stop


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
        return _DECODER.decode(text)
    except (json.JSONDecodeError, RecursionError) as error:
        return _python_value(text, f"{where} is not valid JSON ({error}): {text[:80]!r}", source)
    except ValueError as error:
        source.fail(f"{where} is not valid JSON ({error}): {text[:80]!r}")


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_DECODER = StrictDecoder(parse_constant=_refuse_constant)


def _python_value(text: str, problem: str, source: Source) -> Any:
    try:
        value = python_value(text)
    except ValueError as error:
        source.fail(f"{problem}, and as Python's value: {error}")
    if value is None:
        source.fail(problem)
    return value


def check_json(value: Any, where: str, source: Source) -> Any:
    """Return a nested value; raise if it cannot be written as JSON."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        source.fail(f"{where} cannot be written as JSON: {error}")
    check_text(text, where, source)
    return value
