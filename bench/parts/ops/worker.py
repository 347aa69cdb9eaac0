"""The process of one implementation: imports it, then answers one JSON line per case.

Each has its own process because a wrong kernel can leave the CUDA context of its process unusable,
end the process or never return, and because what an implementation raises needs no catching here:
it ends the process, and the last answer says why.

    PYTHONPATH=bench python -m parts.ops.worker NAME <cases >answers
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from parts.ops.case import Case, make_inputs
from parts.ops.measure import compute, measure
from parts.ops.peers import find
from parts.ops.roof import measure_roof

ROOF = "roof"


def serve(name: str, answer: Callable[[dict[str, Any]], None]) -> None:
    """Answer that the implementation is loaded, then each case until the input ends."""
    peer = None if name == ROOF else find(name)
    run = peer.load() if peer else None
    tune_in_parallel()
    answer({"status": "ready", "versions": peer.versions() if peer else {}})
    for line in sys.stdin:
        request = json.loads(line)
        case = Case(**request["case"])
        if run is None:
            result = measure_roof(case)
        elif request["only_compile"]:
            compute(run, make_inputs(case))
            result = {"status": "compiled"}
        else:
            result = measure(run, case)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # the other processes need the memory
        answer(result)


def tune_in_parallel() -> None:
    """Make Triton's autotuner compile all candidates at once and time each for 25 ms, not 100.

    Same candidates, same rule of choice. Liger alone has 240: one after the other they compile
    for minutes.
    """
    if not torch.cuda.is_available():
        return
    from triton import AsyncCompileMode
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    plain_run, compiled = Autotuner.run, set()

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        given = self.nargs | kwargs
        key = (self, *(str(given.get(name)) for name in self.keys))
        if len(self.configs) > 1 and key not in compiled:
            compiled.add(key)
            threads = ThreadPoolExecutor(os.cpu_count())
            # A candidate that cannot be compiled raises again, and is passed over, when timed.
            with threads, AsyncCompileMode(threads, ignore_errors=True):
                for config in self.prune_configs(kwargs):
                    self.fn.run(*args, **{**kwargs, "warmup": True}, **config.all_kwargs())
        return plain_run(self, *args, **kwargs)

    Autotuner.run = run
    Autotuner.do_bench = staticmethod(functools.partial(do_bench, warmup=5, rep=25))


def main() -> None:
    """Serve the implementation that the command line names."""
    # What packages print goes to stderr; stdout carries the answers alone.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    def last_answer(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        traceback.print_exception(kind, error, trace)
        answer({"status": "ended", "reason": f"{kind.__name__}: {error}"})

    sys.excepthook = last_answer
    serve(sys.argv[1], answer)


if __name__ == "__main__":
    main()
