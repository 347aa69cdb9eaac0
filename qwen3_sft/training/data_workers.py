"""Data workers outlive signals that are sent to every process of a run.

torch's workers end with any SIGTERM (torch 2.13, `_set_worker_signal_handlers`), and their rank
then fails in the middle of the step that it was about to finish and save.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from qwen3_sft.errors import DONE, SIGNALS


def let_workers_outlive_signals(loader: DataLoader) -> None:
    """Have all workers that the loader starts from now on end with its process's word alone."""
    if loader.num_workers:
        loader.worker_init_fn = partial(_obey_parent, loader.worker_init_fn)
        loader._get_iterator = partial(_start_deaf, loader._get_iterator)


def _start_deaf(get_iterator: Callable[[], Any]) -> Any:
    """Start workers that hear no signal from their first moment on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return get_iterator()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _obey_parent(init: Callable[[int], None] | None, worker_id: int) -> None:
    """Begin to listen to the parent, which terminates workers that do not end; in the worker."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()
    if init is not None:
        init(worker_id)


def _wait_for_parent() -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != os.getppid():
        pass
    os._exit(DONE)
