"""What the pickles in our checkpoints import, by module; found by saving on every engine.

A name that is missing here refuses good checkpoints; one too many may let code in. Nothing may be
added that unpickles, calls or imports what its arguments say: `torch.storage._load_from_bytes`,
`builtins.getattr` and `functools.partial` are each a way around the whole list.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

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
