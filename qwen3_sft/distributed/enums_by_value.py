"""Enums in our pickles are written by value, whatever the Python.

Python 3.11.0 to 3.11.3 (Debian 12 has 3.11.2) pickles a member as `getattr(class, name)`, which
`trust.py` cannot let in: a checkpoint of those could not be read again. All others write what
stands here.

Remove when setup.py asks for Python 3.12: this module
"""

from __future__ import annotations

import copyreg
import sys
from enum import Enum
from typing import Any

# Of torch's and DeepSpeed's states; the list of what may be read has them too (`pickles.py`).
_ENUMS = (
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
)


def write_enums_by_value() -> None:
    """Have this process pickle members of these enums, as far as they are imported, by value."""
    for module, name in _ENUMS:
        if module in sys.modules:
            copyreg.pickle(getattr(sys.modules[module], name), _by_value)


def _by_value(member: Enum) -> tuple[type[Enum], tuple[Any]]:
    return type(member), (member.value,)
