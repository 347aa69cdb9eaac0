"""Nothing in a checkpoint runs code: its pickles are read without running them before any loader.

Loaders of torch and DeepSpeed unpickle without restraint: `.metadata` of a distributed checkpoint
and the values in its `.distcp` files (torch/distributed/checkpoint: filesystem.py `read_metadata`,
default_planner.py `load_bytes`), and all `*.pt` of DeepSpeed (torch_checkpoint_engine.py,
zero_to_fp32.py; torch 2.13, DeepSpeed 0.19). The manifest does not help: whoever plants a file
writes its hash too. So each file is taken as its loader would take it, pickles are read into inert
objects (`pickles.py`), and whatever our own savers do not write is refused.

Not covered: someone who can write into the folder between the check and the load, and wrong weights
in files of the right kind.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.utils import _create_file_view

from qwen3_sft.checkpoints.pickles import (
    IN_ARCHIVES,
    IN_METADATA,
    MAX_PICKLE_BYTES,
    METADATA,
    STORAGE_INFO,
    read_inert,
    stand_in_for,
)
from qwen3_sft.errors import CheckpointError, RefusedPickleError
from qwen3_sft.model.trust import check_index, is_plain_name

_ZIP = b"PK\x03\x04"  # how torch.load tells its own format
_BINARY_PICKLE = b"\x80"
_ARCHIVES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
_DISTRIBUTED_METADATA = ".metadata"


def refuse_foreign_code(folder: Path, *, trusted: bool) -> None:
    """Raise if loading a checkpoint could run code; call it before anything in it is loaded.

    Reads the pickles and not the tensors: 0.1 ms for each chunk of a distributed
    checkpoint (2 layers, 612 chunks, one core, files in the page cache).

    Args:
        folder: a checkpoint whose files agree with its manifest.
        trusted: `--trust_checkpoint`, the user knows who wrote it: nothing is looked at.

    Raises:
        CheckpointError: naming the first file that is refused and why.
    """
    if trusted:
        return
    for path in _regular_files(folder):
        try:
            _check_file(path)
        except (RefusedPickleError, ValueError) as error:
            raise _refused(path, error) from error
        except (OSError, SafetensorError, RecursionError) as error:
            raise _refused(path, f"cannot be read ({error})") from error


def best_checkpoint(recorded: Any, output_dir: Path) -> Path:
    """Return the best checkpoint that a `trainer_state.json` names, which is one of the run's own.

    Args:
        recorded: the path as it was written; the run's folder may have been moved since.
        output_dir: of the run.

    Raises:
        CheckpointError: it lies elsewhere, or is not there.
    """
    named = Path(str(recorded))
    own = output_dir / named.name
    is_own = own.is_dir() and (not named.exists() or named.samefile(own))
    if not is_own or not named.name.startswith("checkpoint-"):
        raise CheckpointError(
            f"trainer_state.json names {named} as the best checkpoint, which is none of "
            f"{output_dir}: copy it to {own}, or set --load_best_model_at_end false"
        )
    return own


def check_best(checkpoint: Path, output_dir: Path) -> None:
    """Find out at the start, not at the end, that the best checkpoint is out of reach.

    Raises:
        CheckpointError: as `best_checkpoint`.
    """
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if state.get("best_model_checkpoint"):
        best_checkpoint(state["best_model_checkpoint"], output_dir)


def _refused(path: Path, why: object) -> CheckpointError:
    return CheckpointError(
        f"{path} {why}: refused, because loading it might run code. Set --trust_checkpoint true "
        "only if you know who wrote this checkpoint"
    )


def _regular_files(folder: Path) -> Iterator[Path]:
    """Yield every file below `folder`, listed in the manifest or not.

    Raises:
        CheckpointError: a link to a folder, or something that is neither file nor folder.
    """
    for parent, folders, files in os.walk(folder):
        for name in sorted(folders):
            if (Path(parent) / name).is_symlink():
                raise _refused(Path(parent) / name, "is a link to a folder, which no hash covers")
        for name in sorted(files):
            path = Path(parent) / name
            if not path.exists() or not stat.S_ISREG(path.stat().st_mode):
                raise _refused(path, "is no regular file")
            yield path


def _check_file(path: Path) -> None:
    """Take a file as its loader would.

    Raises:
        RefusedPickleError: it imports something, or is not of the kind that its name says.
        ValueError: not JSON.
        SafetensorError: no safetensors file.
    """
    match path.suffix:
        case ".distcp":
            return  # read in chunks, which `.metadata` lists
        case ".json":
            _check_json(path)
        case ".safetensors":
            with safe_open(path, framework="pt"):
                return
        case _ if path.name.endswith(_DISTRIBUTED_METADATA):
            _check_distributed(path)
        case _ if path.name == "latest":
            _check_latest(path)
        case _ if path.suffix in _ARCHIVES or _begins_with(path, _ZIP):
            _check_archive(str(path), is_zip=_begins_with(path, _ZIP))
        case _ if _begins_with(path, _BINARY_PICKLE):
            raise RefusedPickleError("is a bare pickle, which is no part of a checkpoint")


def _check_json(path: Path) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UTF-8 as well
        raise ValueError(f"is not JSON ({error})") from error
    if path.name.endswith(".index.json"):
        check_index(content, path)


def _check_latest(path: Path) -> None:
    """DeepSpeed goes on in the folder that this file names."""
    name = path.read_text(encoding="utf-8").strip()
    if not is_plain_name(name):
        raise RefusedPickleError(f"names {name!r}, which is no folder beside it")


def _check_archive(source: Any, *, is_zip: bool) -> None:
    """Read the pickle of a `torch.save` file with the reader of `torch.load`.

    Another reader of zip files might find another pickle in the same bytes.

    Args:
        source: path or open file.
        is_zip: what `torch.load` goes by; older formats are several pickles, or a tar file.
    """
    if not is_zip:
        raise RefusedPickleError("is not in the format that torch.save writes")
    try:
        reader = torch._C.PyTorchFileReader(source)
        if "constants.pkl" in reader.get_all_records():
            raise RefusedPickleError("is a TorchScript program")
        if (size := reader.get_record_size("data.pkl")) > MAX_PICKLE_BYTES:
            raise RefusedPickleError(f"holds a pickle of {size:,} bytes")
        data = reader.get_record("data.pkl")
    except RuntimeError as error:  # what the reader raises for anything else
        raise RefusedPickleError(f"cannot be read ({str(error).splitlines()[0]})") from error
    read_inert(data, IN_ARCHIVES)


def _check_distributed(path: Path) -> None:
    """Check a distributed checkpoint's metadata, and every chunk of a file that it points to.

    Values that are no tensors are chunks as well, and loaded without restraint.
    """
    metadata = read_inert(_read_pickle(path), IN_METADATA)
    state = _state(metadata, *METADATA)
    chunks: dict[str, list[tuple[int, int]]] = {}
    for info in _values(state.get("storage_data")):
        name, offset, length = _storage(_state(info, *STORAGE_INFO))
        chunks.setdefault(name, []).append((offset, length))
    for name, places in chunks.items():
        _check_chunks(path.parent / name, places)


def _state(thing: Any, module: str, name: str) -> dict[str, Any]:
    """Return the attributes of an object of one class; as arguments they would be hidden."""
    is_one = type(thing) is stand_in_for(module, name)
    if not is_one or thing.args or not isinstance(thing.state, dict):
        raise RefusedPickleError(f"has no {name} where a distributed checkpoint has one")
    return thing.state


def _values(mapping: Any) -> list[Any]:
    if not isinstance(mapping, dict):
        raise RefusedPickleError("has no table of chunks")
    return list(mapping.values())


def _storage(state: dict[str, Any]) -> tuple[str, int, int]:
    """Return file, offset and length in bytes of one entry of `storage_data`."""
    names = ("relative_path", "offset", "length")
    name, offset, length = (state.get(key) for key in names)
    is_plain = not any(value for key, value in state.items() if key not in names)  # transforms
    are_of_type = isinstance(name, str) and isinstance(offset, int) and isinstance(length, int)
    if not is_plain or not are_of_type or not is_plain_name(name) or offset < 0 or length <= 0:
        raise RefusedPickleError(f"has a chunk that is no part of a file beside it ({name!r})")
    return name, offset, length


def _check_chunks(path: Path, places: list[tuple[int, int]]) -> None:
    if not path.is_file():
        raise RefusedPickleError(f"names {path.name}, which is not there")
    size = path.stat().st_size
    with path.open("rb") as file:
        for offset, length in sorted(places):
            if offset + length > size:
                raise RefusedPickleError(f"names bytes after the end of {path.name}")
            file.seek(offset)
            is_zip = file.read(len(_ZIP)) == _ZIP
            try:
                _check_archive(_create_file_view(file, offset, length), is_zip=is_zip)
            except RefusedPickleError as error:
                where = f"points to byte {offset} of {path.name}, which"
                raise RefusedPickleError(f"{where} {error}") from error


def _read_pickle(path: Path) -> bytes:
    if (size := path.stat().st_size) > MAX_PICKLE_BYTES:
        raise RefusedPickleError(f"holds a pickle of {size:,} bytes")
    return path.read_bytes()


def _begins_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic
