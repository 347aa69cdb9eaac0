"""`--deterministic`: two runs of the same options give the same bits on the same GPUs.

Our kernels sum in a fixed order as they are. What does not, unless it is told to: the gradient of
the queries in FlashAttention (atomic additions; its own mode is read off torch's switch, or off
FLASH_ATTENTION_DETERMINISTIC by transformers), cuBLAS with several streams (its workspace, fixed by
CUBLAS_WORKSPACE_CONFIG before its first use), and some of torch's own operators. transformers'
`full_determinism` would block after every kernel, too (CUDA_LAUNCH_BLOCKING), which changes no bit.
"""

from __future__ import annotations

import os
from typing import Any

import torch

VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}


def make_deterministic() -> None:
    """Have every operator of this process give the same bits each time, or raise if it cannot.

    Call it before the first product on a GPU. A workspace that the user has set stays.
    """
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    # It would fill what is allocated, against reads of what was never written: a debugging aid.
    switches: Any = torch.utils.deterministic
    switches.fill_uninitialized_memory = False
