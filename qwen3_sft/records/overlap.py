"""A run or an export never writes where it reads, whatever links and `..` the names go through."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3_sft.errors import UsageError
from qwen3_sft.options import data_entries
from qwen3_sft.records.ownership import OVERWRITTEN, REPLACED, is_run

if TYPE_CHECKING:
    from qwen3_sft.options.recipe import Options

_NO_PATHS = ("", "demo", "auto", "never")


def refuse_export_over_source(source: Path, folder: Path) -> None:
    """Refuse to replace the folder that is read or one around it, or to write into it.

    Raises:
        UsageError: naming both.
    """
    read, written = source.resolve(), folder.resolve()
    if read == written or read in written.parents or written in read.parents:
        raise UsageError(
            f"{folder}: the export would replace or change {source}, which it reads: choose a "
            "folder outside of it that does not hold it either"
        )


def refuse_run_over_source(options: Options) -> None:
    """Refuse a run that would overwrite, remove or write into what it reads.

    Raises:
        UsageError: naming the option, and what to do.
    """
    out = Path(str(options.train.output_dir))
    for option, path in _read_by(options):
        _refuse_inside(out, option, path)
        if place := _written(out, path):
            is_own_config = option == "--config" and place == "config.yaml" and is_run(out)
            is_own_checkpoint = option == "--resume" and place != "model"
            if not is_own_config and not is_own_checkpoint:
                raise UsageError(
                    f"{option} {path} lies where this run would write, {out / place}: choose "
                    "another --output_dir, or move what is read"
                )


def _read_by(options: Options) -> Iterator[tuple[str, Path]]:
    """Yield what a run reads here, with its option; also what links in a folder lead to."""
    data = options.data
    named = [
        ("--model_name_or_path", options.model.model_name_or_path),
        *(
            (f"--{option}", name)
            for option in data_entries.OPTIONS
            for entry in data_entries.read_entries(getattr(data, option), f"--{option}")
            for name in (entry.path, entry.path.rpartition(":")[0])  # with a split
        ),
        ("--data_cache_dir", data.data_cache_dir or ""),
        ("--config", options.recipe or ""),
        ("--resume", options.train.resume),
    ]
    for option, name in named:
        path = Path(name).expanduser()
        if name in _NO_PATHS or not (path.exists() or option == "--data_cache_dir"):
            continue
        yield option, path
        if path.is_dir():
            yield from ((option, link) for link in path.iterdir() if _is_linked_file(link))


def _is_linked_file(path: Path) -> bool:
    return path.is_symlink() and path.is_file()


def _refuse_inside(out: Path, option: str, path: Path) -> None:
    """Refuse a run folder inside a folder that is read; a cache is read by name, not as a whole."""
    read, written = path.resolve(), out.resolve()
    is_inside = path.is_dir() and (read == written or read in written.parents)
    if is_inside and option not in ("--data_cache_dir", "--resume"):
        raise UsageError(
            f"--output_dir {out} lies in {path}, which {option} reads: choose one outside of it"
        )


def _written(out: Path, path: Path) -> str | None:
    """Return the name in the run folder that a run writes or removes and `path` lies in."""
    read, folder = path.resolve(), out.resolve()
    names = {read.relative_to(folder).parts[0]} if folder in read.parents else set()
    if folder.is_dir():
        links = (entry for entry in folder.iterdir() if entry.is_symlink())
        names |= {e.name for e in links if e.resolve() == read or e.resolve() in read.parents}
    found = [name for name in names if OVERWRITTEN.fullmatch(name) or REPLACED.fullmatch(name)]
    return found[0] if found else None
