"""torch.compile of a function that many shapes are given to.

torch 2.13 has an argument for it; the versions before have only the process's setting, which is
8 by default and, where it is one of the thread's context, not what a backward pass sees.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def compiled(function: Callable[..., Any], max_graphs: int, **options: Any) -> Callable[..., Any]:
    """Return `torch.compile(function)` that may be compiled up to `max_graphs` times.

    The limit of the thread that calls is raised, for other compiled functions too; beyond it
    dynamo runs the function eagerly, or raises with `fullgraph`.

    Args:
        function: of tensors and numbers.
        max_graphs: one for each set of guards, such as shapes and dtypes.
        **options: of `torch.compile`.
    """
    from torch._dynamo import config  # which loads Triton

    inner = torch.compile(function, **options)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if config.recompile_limit < max_graphs:
            config.recompile_limit = max_graphs
        return inner(*args, **kwargs)

    return call
