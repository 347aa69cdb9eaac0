"""Read a pickle without running it: what it would import is looked up in a list, never imported.

A pickle is a program. Its opcodes name callables and call them, so whoever loads one runs what its
author wrote. Here every name stands for an inert object that swallows its arguments, and any name
or opcode that is not expected is an error. Used is Python's own interpreter of pickles with its
table of opcodes cut down to those that the savers of this project write: no extension registry
(which would get round the look-up of names), no opcode that takes a class from the stack, no sets.

Limits, so that a small file cannot fill the memory: bytes, opcodes, and keys of dictionaries that
are plain values (hashing nested tuples that share their parts takes exponential time).
"""

from __future__ import annotations

import functools
import io
import pickle
import struct
import types
from collections.abc import Callable, Mapping, Set
from typing import Any

from qwen3_sft.errors import RefusedPickleError

# What the pickles in our checkpoints import, by module; found by saving on every engine. A name
# that is missing refuses good checkpoints; one too many may let code in. Nothing may be added that
# unpickles, calls or imports what its arguments say: `torch.storage._load_from_bytes`,
# `builtins.getattr` and `functools.partial` are each a way around the whole list.
Names = Mapping[str, Set[str]]

_DTYPES = {
    "float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "uint8", "int8", "int32",
    "int64", "bool",
}  # fmt: skip

# Files of torch.save: optimizers, schedules, random states and DeepSpeed's states.
IN_ARCHIVES: Names = {
    "_codecs": {"encode"},
    "collections": {"OrderedDict"},
    "torch": {
        *_DTYPES, "Size", "Tensor", "device", "ByteStorage", "CharStorage", "IntStorage",
        "LongStorage", "HalfStorage", "BFloat16Storage", "FloatStorage", "DoubleStorage",
        "BoolStorage",
    },
    "torch.storage": {"UntypedStorage"},
    "torch.serialization": {"_get_layout"},
    "torch._tensor": {"_rebuild_from_type_v2"},
    "torch._utils": {
        "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter",
        "_rebuild_wrapper_subclass",
    },
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct"},
    "numpy.core.multiarray": {"_reconstruct"},
    "torchao.optim.subclass_8bit": {"OptimState8bit"},
    "torchao.optim.subclass_4bit": {"OptimState4bit"},
    "torchao.optim.subclass_fp8": {"OptimStateFp8"},
    "deepspeed.runtime.fp16.loss_scaler": {"LossScaler", "DynamicLossScaler"},
    "deepspeed.runtime.zero.config": {"ZeroStageEnum"},
    "deepspeed.utils.tensor_fragment": {"fragment_address"},
}  # fmt: skip

# `.metadata` of torch's distributed checkpoint.
METADATA = ("torch.distributed.checkpoint.metadata", "Metadata")
STORAGE_INFO = ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
IN_METADATA: Names = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING",
        "ChunkStorageMetadata", "TensorStorageMetadata", "BytesStorageMetadata",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {*_DTYPES, "Size"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # Python 3.13
}  # fmt: skip

MAX_PICKLE_BYTES = 256 << 20
MAX_OPCODES = 50_000_000  # up to some 100 bytes of memory each

_OPCODES = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE,
    pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.LONG4,
    pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8,
    pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1,
    pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS,
    pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS, pickle.BINGET, pickle.LONG_BINGET,
    pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.GLOBAL, pickle.STACK_GLOBAL,
    pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD, pickle.BINPERSID,
)  # fmt: skip
_PLAIN = (str, bytes, int, float, types.NoneType)  # bool is an int
# What the interpreter raises on bytes that are no pickle or do not fit the stack.
_MALFORMED = (
    pickle.UnpicklingError, EOFError, TypeError, AttributeError, KeyError, IndexError, ValueError,
    OverflowError, MemoryError, struct.error,
)  # fmt: skip


class StandIn:
    """What a pickle gets for any object it makes: keeps arguments and state, does nothing.

    Attributes:
        args: what it was made with.
        state: as it was when it was set. Setting it again is an error: a real object would then
            mix both.
    """

    __slots__ = ("args", "state")

    def __new__(cls, *args: Any) -> StandIn:
        """Make one, whatever the arguments."""
        made = object.__new__(cls)
        made.args, made.state = args, None
        return made

    def __init__(self, *args: Any) -> None:
        self.args: tuple[Any, ...]
        self.state: Any

    def __setstate__(self, state: Any) -> None:
        if self.state is not None:
            raise RefusedPickleError("sets the state of an object twice")
        # A real object takes the entries over, whatever becomes of the dictionary later.
        self.state = dict(state) if isinstance(state, dict) else state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Swallow an entry of a dictionary's subclass."""

    def extend(self, values: Any) -> None:
        """Swallow the items of a list's subclass."""

    append = extend


@functools.cache
def stand_in_for(module: str, name: str) -> type[StandIn]:
    """Return the inert class for one name."""
    return type(f"{module}.{name}", (StandIn,), {"__slots__": ()})


def read_inert(data: bytes, allowed: Names) -> Any:
    """Return what a pickle describes, with a stand-in for each object that is not a plain value.

    Args:
        data: the pickle; what follows its end is not read, as by `pickle.load`.
        allowed: all that it may import.

    Raises:
        RefusedPickleError: it would import something else, uses an opcode that is not expected, or
            is malformed or too large.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise RefusedPickleError(f"holds a pickle of {len(data):,} bytes")
    try:
        return _InertUnpickler(data, allowed).load()
    except _MALFORMED as error:
        what = f"{type(error).__name__}: {error}"
        raise RefusedPickleError(f"holds no pickle of this project's ({what})") from error


class _Opcodes(dict[int, Callable[[Any], None]]):
    """The table of opcodes, which counts how often it is asked."""

    count = 0

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.count += 1
        if self.count > MAX_OPCODES:
            raise RefusedPickleError(f"holds a pickle of more than {MAX_OPCODES:,} opcodes")
        if code not in self:
            raise RefusedPickleError(f"holds the pickle opcode {bytes([code])!r}")
        return super().__getitem__(code)


class _InertUnpickler(pickle._Unpickler):  # in Python: the one in C keeps its opcodes to itself
    def __init__(self, data: bytes, allowed: Names) -> None:
        super().__init__(io.BytesIO(data))
        table = pickle._Unpickler.dispatch
        opcodes = _Opcodes({code[0]: table[code[0]] for code in _OPCODES})
        opcodes |= {pickle.SETITEM[0]: _set_item, pickle.SETITEMS[0]: _set_items}
        vars(self)["dispatch"] = opcodes  # the class attribute that `load` would look up
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> type[StandIn]:
        if name not in self._allowed.get(module, ()):
            raise RefusedPickleError(f"would import {module}.{name}")
        return stand_in_for(module, name)

    def persistent_load(self, pid: Any) -> StandIn:
        return StandIn()


def _set_item(unpickler: Any) -> None:
    value, key = unpickler.stack.pop(), unpickler.stack.pop()
    _put(unpickler.stack[-1], [key, value])


def _set_items(unpickler: Any) -> None:
    items = unpickler.pop_mark()
    _put(unpickler.stack[-1], items)


def _put(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict | StandIn):
        raise RefusedPickleError(f"sets entries of a {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        parts = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(part, (*_PLAIN, StandIn)) for part in parts):
            raise RefusedPickleError(f"has a {type(key).__name__} as a key")
        target[key] = value
