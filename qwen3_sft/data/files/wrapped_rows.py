"""The rows of a JSON file that is one object around them, as `{"version": "1", "data": [...]}`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwen3_sft.data.rows.fields import meaning

_OF_FILES = (
    "name", "title", "description", "homepage", "citation", "count", "total", "size", "num_rows",
    "num_rows_total", "num_rows_per_page", "total_count", "schema", "status",
)  # fmt: skip
_WRAPPERS = ("data", "rows", "train", "examples", "instances", "records", "items")


def wrapped_rows(value: dict[str, Any], location: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of an object that holds nothing but a list of them, else the object.

    What stands beside the list is said of every row, unless it is a fact of the file.
    """
    lists = [name for name in _WRAPPERS if _is_list_of_objects(value.get(name))]
    others = [item for name, item in value.items() if name not in lists]
    if len(lists) != 1 or any(isinstance(item, list | dict) for item in others):
        yield location, value
        return
    shared = {
        name: item for name, item in value.items()
        if name not in (*lists, *_OF_FILES) and (name == "split" or meaning(name, "") != "")
    }  # fmt: skip
    for index, row in enumerate(value[lists[0]]):
        yield f"{location} {lists[0]}[{index}]", {**shared, **row}


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
