"""qwen3_sft.train with what a test may ask of one rank; {RANK} in an option becomes the rank.

    torchrun --nproc-per-node 2 -m tests.distributed.rank_faults_worker OPTIONS

FAULTS_STORE_PORT=P: rank 0 itself holds the store, at this port, as without torchrun.
FAULTS_HOLD_LOCK_S=S: rank 1 holds Python's lock for so long in its second step.
FAULTS_LEAVE_LATE_S=S: rank 1 comes so much later to its end, and its process still later.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import Any

from qwen3_sft import train


def main() -> int:
    """Train."""
    rank = os.environ.get("RANK", "0")
    if port := os.environ.get("FAULTS_STORE_PORT"):
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": port}
    if rank == "1":
        _delay()
    return train.main([word.replace("{RANK}", rank) for word in sys.argv[1:]])


def _delay() -> None:
    from qwen3_sft.distributed.peer_watch import PeerWatch

    step, leave = PeerWatch.step, PeerWatch.leave

    def slow_step(self: Any, number: int) -> None:
        step(self, number)
        if number == 1:  # a call through PyDLL keeps the lock
            ctypes.PyDLL(None).sleep(int(os.environ.get("FAULTS_HOLD_LOCK_S", "0")))

    def late_leave(self: Any) -> None:
        seconds = float(os.environ.get("FAULTS_LEAVE_LATE_S", "0"))
        time.sleep(seconds)
        leave(self)
        time.sleep(seconds)

    PeerWatch.step, PeerWatch.leave = slow_step, late_leave


if __name__ == "__main__":
    sys.exit(main())
