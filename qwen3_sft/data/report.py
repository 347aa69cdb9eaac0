"""What became of every row, sample and token: as a dictionary, a short text, or an error.

The equations hold exactly: rows_in = rows_used + dropped rows; samples_in = samples_used + dropped
samples (a conversation may give several samples); tokens_in = tokens_used + tokens_truncated +
tokens_dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from qwen3_sft.chat.turn_ends import in_order
from qwen3_sft.data.readers import EntrySource
from qwen3_sft.data.rows.defects import ASKED_FOR, BAD_ROW
from qwen3_sft.data.source_counts import source_lines
from qwen3_sft.data.tokenize_rows import Counts, TokenizeOptions
from qwen3_sft.errors import DataError

_QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_INDENT = " " * 10
_NONE = {"count": 0}


def report_origin(
    sources: Iterable[EntrySource], formats: Mapping[str, int], options: TokenizeOptions
) -> dict[str, Any]:
    """Return the part of `data_report.json` that says what was read and how.

    Args:
        sources: in the order read.
        formats: sources per row format.
        options: what decided the tokens.
    """
    return {
        "files": [source.name for source in sources],
        "formats": dict(formats),
        "chat_format": options.chat_format,
        "max_length": options.max_length,
        "overlong": options.overlong,
    }


def make_report(counts: Counts, lengths: np.ndarray) -> dict[str, Any]:
    """Return the counted part of `data_report.json`.

    Args:
        counts: of all rows.
        lengths: tokens of each used sample, (s,) int64.
    """
    return {
        "rows_in": counts.rows_in,
        "rows_used": counts.rows_used,
        "rows_dropped": counts.rows_dropped.to_dict(),
        "dropped": [{"location": place, "reason": reason} for place, reason in counts.dropped],
        "rows_split": counts.rows_split,
        "samples_of_split_rows": counts.samples_of_split_rows,
        "samples_in": counts.samples_in,
        "samples_used": len(lengths),
        "samples_truncated": counts.samples_truncated,
        "samples_dropped": counts.samples_dropped.to_dict(),
        "tokens_in": counts.tokens_in,
        "tokens_repeated": counts.tokens_repeated,
        "tokens_used": counts.tokens_used,
        "tokens_truncated": counts.tokens_truncated,
        "tokens_dropped": counts.tokens_dropped,
        "label_tokens": counts.label_tokens,
        "turn_ends": in_order(counts.turn_ends),
        "supervised_fraction": _share(counts.label_tokens, counts.tokens_used),
        "length_histogram": _histogram(lengths),
        "length_quantiles": _quantiles(lengths),
        "longest": [{"tokens": tokens, "location": place} for tokens, place in counts.longest],
        "warnings": counts.warnings.to_dict(),
    }


def _histogram(lengths: np.ndarray) -> dict[str, int]:
    """Count lengths by the smallest power of two that holds them: {"<=128": n, ...}."""
    exponents = np.ceil(np.log2(lengths)).astype(int)
    return {f"<={1 << e}": int(n) for e, n in enumerate(np.bincount(exponents)) if n}


def _quantiles(lengths: np.ndarray) -> dict[str, int]:
    if not len(lengths):
        return {}
    values = np.quantile(lengths, list(_QUANTILES.values()), method="inverted_cdf")
    return {name: int(value) for name, value in zip(_QUANTILES, values, strict=True)}


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def check_drops(report: dict[str, Any], max_drop_fraction: float) -> None:
    """Refuse data of which too much, or everything, was dropped.

    Raises:
        DataError: with every reason, its count and first location, and what to set.
    """
    origin = report["files"][0]
    rows, dropped = report["rows_in"], _total(report["rows_dropped"])
    if not rows:
        raise DataError(f"{', '.join(report['files'])}: 0 rows; there is nothing to train on")
    if dropped == rows:
        problem = f"{_all_dropped(report)}{_first_defect(report)}"
        raise DataError(f"{origin}: {problem}. {_remedy(report)}")
    asked_for = sum(report["rows_dropped"].get(reason, _NONE)["count"] for reason in ASKED_FOR)
    lost = {
        "rows": (dropped - asked_for, rows),
        "samples": (_total(report["samples_dropped"]), report["samples_in"]),
    }
    for what, (part, whole) in lost.items():
        if _share(part, whole) > max_drop_fraction:
            raise DataError(
                f"{origin}: {part} of {whole} {what} ({part / whole:.2%}) were dropped, more than "
                f"max_drop_fraction {max_drop_fraction:.2%}: "
                f"{_reasons(report[f'{what}_dropped'])}{_first_defect(report)}. {_remedy(report)}, "
                "or accept it with "
                f"--max_drop_fraction {_ceil_percent(part / whole)}"
            )


def _all_dropped(report: dict[str, Any]) -> str:
    reasons = report["rows_dropped"]
    if len(reasons) == 1:
        (reason,) = reasons
        return f"all {report['rows_in']} rows have {reason}"
    return f"all {report['rows_in']} rows were dropped: {_reasons(reasons)}"


def _reasons(dropped: dict[str, dict[str, Any]]) -> str:
    return "; ".join(
        f"{entry['count']} with {reason} (first {entry['first']})"
        for reason, entry in dropped.items()
    )


def _first_defect(report: dict[str, Any]) -> str:
    entry = report["rows_dropped"].get(BAD_ROW)
    listed = (row for row in report["dropped"] if entry and row["location"] == entry["first"])
    return next((f", the first: {row['reason']}" for row in listed), "")


def _remedy(report: dict[str, Any]) -> str:
    lengths = report["longest"]
    if not lengths or lengths[0]["tokens"] <= report["max_length"]:
        return "Repair or remove these rows"
    longest = f"the longest has {lengths[0]['tokens']} tokens, {lengths[0]['location']}"
    truncate = ", or set --overlong truncate" if report["overlong"] == "drop" else ""
    return f"Raise --max_length, now {report['max_length']} ({longest}){truncate}"


def _ceil_percent(share: float) -> str:
    return f"{np.ceil(share * 100) / 100:.2f}"


def _total(dropped: dict[str, dict[str, Any]]) -> int:
    return sum(entry["count"] for entry in dropped.values())


def report_text(report: dict[str, Any]) -> str:
    """Return the report as a few lines for a terminal or a log."""
    files = report["files"]
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    formats = ", ".join(f"{name} x {count}" for name, count in report["formats"].items())
    lines = [
        f"data      {files[0]}{more} ({formats}), chat format {report['chat_format']}",
        _equation("rows", report, ["used"]),
        *_entries(report["rows_dropped"]),
        *source_lines(report),
        *_splits(report),
        _equation("samples", report, ["used"]),
        *_entries(report["samples_dropped"]),
        _equation("tokens", report, ["used", "truncated"]),
        f"labels    {report['label_tokens']:,} tokens, {report['supervised_fraction']:.1%} of used",
        f"ends      {_ends(report['turn_ends'])}",
        "lengths   "
        + ", ".join(f"{name} {value:,}" for name, value in report["length_quantiles"].items()),
        *(f"warning   {line.strip()}" for line in _entries(report["warnings"])),
    ]
    return "\n".join(lines)


def _ends(turn_ends: dict[str, int]) -> str:
    """Say which tokens end what is labelled: generation will stop there."""
    return ", ".join(f"{token} x {n:,}" for token, n in turn_ends.items()) or "no end token"


def _splits(report: dict[str, Any]) -> Iterator[str]:
    """Yield what it takes to show every answer the history that it has at inference."""
    if not report["rows_split"]:
        return
    total = report["tokens_in"]
    once = total - report["tokens_repeated"]
    yield (
        f"split     {report['rows_split']:,} rows became {report['samples_of_split_rows']:,} "
        "samples, since inference shows their answers different histories (--thinking "
        f"split_turns): {total:,} tokens in place of {once:,}, x {total / once:.2f}"
    )


def _equation(what: str, report: dict[str, Any], parts: list[str]) -> str:
    dropped = report[f"{what}_dropped"]
    amounts = {part: report[f"{what}_{part}"] for part in parts}
    amounts["dropped"] = dropped if isinstance(dropped, int) else _total(dropped)
    terms = " + ".join(f"{amount:,} {part}" for part, amount in amounts.items())
    return f"{what:<10}{report[f'{what}_in']:,} = {terms}"


def _entries(tally: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"{_INDENT}{entry['count']:,} x {kind}, first at {entry['first']}"
        for kind, entry in tally.items()
    ]
