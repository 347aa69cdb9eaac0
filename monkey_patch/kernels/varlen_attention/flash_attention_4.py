"""flash-attn-4 as torch's registry calls it: a forward pass that returns two tensors.

In 4.0.0b36 it returns five, which torch up to 2.13 does not unpack ("too many values to unpack").

Remove when torch takes all that flash-attn-4 returns: this file and its call in `switch_on`
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

from torch.nn.attention import register_flash_attention_impl

_PACKAGE = "flash_attn.cute.interface"


def adapt_flash_attention_4() -> None:
    """Have torch's registry find the package's functions here.

    Raises:
        ImportError: the package is not there.
    """
    from torch.nn.attention._fa4 import register_flash_attention_fa4

    import_module(_PACKAGE)
    register = partial(register_flash_attention_fa4, module_path=__name__)
    register_flash_attention_impl("FA4", register_fn=register)


def _flash_attn_fwd(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    out, lse, *_ = import_module(_PACKAGE)._flash_attn_fwd(*args, **kwargs)
    return out, lse


def _flash_attn_bwd(*args: Any, **kwargs: Any) -> Any:
    return import_module(_PACKAGE)._flash_attn_bwd(*args, **kwargs)
