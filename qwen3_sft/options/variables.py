"""Variables of the environment that are options; a value that means nothing is an error."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Mapping

from qwen3_sft.errors import UsageError
from qwen3_sft.options.listing import switch

# A launcher's word to its processes, and the least that each may be.
_NUMBERS = {
    "RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1,
}  # fmt: skip


def is_dry_run(environment: Mapping[str, str]) -> bool:
    """Whether DRY_RUN asks to print what would be done, and to stop.

    Raises:
        UsageError: it is neither 1 nor 0, nor another word for them.
    """
    word = environment.get("DRY_RUN", "0")
    try:
        return switch(word)
    except ArgumentTypeError:
        raise UsageError(f"DRY_RUN={word}: set it to 1, or unset it") from None


def named_launch_file(environment: Mapping[str, str]) -> str | None:
    """Return what ACCELERATE_CONFIG names, None where it is not set.

    Raises:
        UsageError: it is set but empty.
    """
    name = environment.get("ACCELERATE_CONFIG")
    if name is not None and not name.strip():
        raise UsageError("ACCELERATE_CONFIG is set but empty: name a launch file or unset it")
    return name


def check_launcher_variables(environment: Mapping[str, str]) -> None:
    """Refuse what no launcher sets, before anything reads it as a number.

    Raises:
        UsageError: naming the variable.
    """
    for name, least in _NUMBERS.items():
        word = environment.get(name, str(least))
        if not word.isascii() or not word.isdigit() or int(word) < least:
            raise UsageError(
                f"{name}={word}: must be a whole number of at least {least}; a launcher sets it, "
                "unset it otherwise"
            )
