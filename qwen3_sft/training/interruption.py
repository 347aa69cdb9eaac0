"""SIGTERM and SIGUSR1 end training with a checkpoint at the step's end, on all ranks alike.

The handler only remembers the signal. Every rank's memory rides in the all-reduce of the step's
loss and in the one wait for the device that a step has anyway, so that all ranks know of it at the
same step, whichever of them was signalled. The step is finished, logged, evaluated if that is due,
and saved; then `Interrupted` leaves the training loop before anything that belongs to its end.

Upstream's own way saves before the optimizer's step, when random states are one micro-batch ahead:
what it saves does not resume exactly with dropout (transformers 5.23, `JITCheckpointCallback`).

Data workers outlive signals that are sent to every process of a run. torch's end with any SIGTERM
(torch 2.13, `_set_worker_signal_handlers`), and their rank then fails in the middle of the step
that it was about to finish and save.

Remove when transformers saves at a step's end on all ranks alike and resumes exactly: Interruption
Remove when torch lets data workers outlive a SIGTERM: let_workers_outlive_signals
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerState

from qwen3_sft.distributed.rank_zero import on_first_rank
from qwen3_sft.errors import DONE, INTERRUPTED, SIGNALS, Interrupted
from qwen3_sft.records.run_folder import RunFolder

logger = logging.getLogger(__name__)


class Interruption(TrainerCallback):
    """What a rank knows of signals; inside `with`, and from the beginning of training, it listens.

    Before and after that the signals do what they did: there is nothing to save, and the same
    command repeats an export that was ended.
    """

    def __init__(self) -> None:
        """Hear nothing yet."""
        self.signal: signal.Signals | None = None  # that all ranks agree on
        self._received: signal.Signals | None = None  # on this rank
        self._num_ignored = 0
        self._former: dict[int, Any] = {}
        self._waits_for_epoch_end = False
        self._save_began = 0.0
        self.save_s = 0.0
        self.saved_step = -1

    # ---- signals ----

    def __enter__(self) -> Self:
        """Forget earlier signals."""
        self.signal = self._received = None
        self._num_ignored = 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        """Put the former handlers back, but have an interrupted run ignore further signals.

        Its process is about to end, and that shall not change its exit code. Python takes its own
        handlers away before the last of its threads has ended.
        """
        if isinstance(error, Interrupted):
            for number in self._former:
                signal.signal(number, signal.SIG_IGN)
        else:
            self.restore()

    def listen(self) -> None:
        """Install the handlers; only the main thread can."""
        if not self._former:
            self._former = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._former = {}

    def stop_listening(self) -> None:
        """Put the former handlers back; a signal that nobody has agreed on does what it would."""
        self.restore()
        if self._received is not None and self.signal is None:
            signal.raise_signal(signal.SIGTERM)  # SIGUSR1 may be ignored, as a launcher leaves it

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received = signal.Signals(number)
        else:
            self._num_ignored += 1

    # ---- agreement ----

    def votes(self, like: Tensor) -> Tensor:
        """Return (1 + 2,): `like`, a scalar, and 1.0 for the signal that this rank has received."""
        votes = like.new_zeros(1 + len(SIGNALS))
        votes[0] = like
        if self._received is not None:
            votes[1 + SIGNALS.index(self._received)].fill_(1.0)
        return votes

    def agree(self, votes: list[float]) -> None:
        """Take what the ranks' votes, without the scalar, sum up to."""
        if any(votes) and self.signal is None:
            self.signal = SIGNALS[votes.index(max(votes))]
            self._save_began = time.monotonic()

    # ---- training ----

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Begin to listen; the run goes on, so that it is not an interrupted one any more."""
        if state.is_world_process_zero:
            RunFolder(Path(args.output_dir)).interrupted.unlink(missing_ok=True)
        self.saved_step = state.global_step  # what the run resumes from
        self.listen()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Have the step saved, whatever `save_strategy` says, and be the last."""
        if self.signal is None:
            return
        control.should_training_stop = True
        control.should_log = True  # sums of steps since the last record are in no checkpoint
        is_last = state.epoch == int(state.epoch or 0) or state.global_step >= state.max_steps
        # Whatever the epoch's end evaluates or saves has to be in the one checkpoint of this step.
        self._waits_for_epoch_end = is_last and "epoch" in (args.eval_strategy, args.save_strategy)
        control.should_save = not self._waits_for_epoch_end

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Upstream comes here in the middle of an epoch, too."""
        if self.signal is None:
            return
        control.should_save = self._waits_for_epoch_end
        control.should_evaluate = control.should_evaluate and self._waits_for_epoch_end

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Leave the evaluation out of the time that saving takes."""
        self._save_began = time.monotonic()

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Remember what is saved."""
        self.saved_step = state.global_step
        self.save_s = time.monotonic() - self._save_began
        if self._num_ignored:
            logger.warning("%d more signals came and were ignored", self._num_ignored)

    # ---- the end ----

    def leave_if_agreed(self, step: int, output_dir: Path) -> None:
        """End a run whose ranks have agreed on a signal and saved their last step; collective.

        Before anything that belongs to its end: the best checkpoint must not be loaded, nor others
        removed.

        Raises:
            Interrupted: saying where the run goes on from.
        """
        if self.signal is None:
            return
        assert self.saved_step == step, (self.saved_step, step)
        checkpoint = output_dir / f"checkpoint-{step}"
        record = {
            "signal": self.signal.name,
            "step": step,
            "checkpoint": str(checkpoint),
            "to go on": "start the same command again",
        }
        # Collective: no rank ends, and has its launcher end the others, before all is written.
        on_first_rank(lambda: _write(RunFolder(output_dir), record))
        raise Interrupted(
            f"interrupted by {self.signal.name} at step {step}: saved {checkpoint} in "
            f"{self.save_s:.0f} s; the same command goes on from it (exit code {INTERRUPTED})"
        )


def _write(folder: RunFolder, record: dict[str, Any]) -> None:
    try:
        folder.write_json(folder.interrupted.name, record)
    except OSError as error:  # the checkpoint is written, this is only a note
        logger.warning("%s: %s", folder.interrupted, error)


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
