"""Which cuts of a stage are worth a GPU's time: arithmetic first, then the compiler.

Arithmetic knows how many accumulators a thread would hold and how much shared memory the steps in
flight take; the rest is compiled ahead of time, and what spills or does not fit is thrown out. The
binaries stay in Triton's cache, so that the timing which follows starts at once.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import triton

from monkey_patch.kernels.aot import Resources, compile_ahead
from monkey_patch.kernels.scatter_moe.triton.catalogue import Shape, launches
from monkey_patch.kernels.scatter_moe.triton.tiles import Tiles

INTERPRETER = "interpreter"

# Shared memory that one program may have, in KiB: CUDA C++ programming guide, technical
# specifications per compute capability.
_SHARED_KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
_WARP_SPECIALIZING = ("sm_100",)  # elsewhere Triton compiles the same without a word
_WITHOUT_TMA = ("sm_80", "sm_89")
_TENSOR_CORES = {"sm_90": "wgmma", "sm_100": "tcgen05"}

_BLOCK_M, _BLOCK_N, _WARPS = (64, 128), (64, 128, 256), (4, 8)
_BLOCK_K = 64  # a row of 64 bfloat16 is 128 bytes, the widest swizzle of shared memory
_BUFFERS = (5, 4, 3)  # steps whose operands lie in shared memory at once
# Float32 accumulators per thread: more do not leave enough of the 255 registers for the rest, fewer
# make products smaller than the loads around them.
_ACCUMULATORS = range(32, 129)
_EPILOGUES = ("up", "activation_gradient")  # do more than store
_MANY_ACCUMULATORS = 64
_LIBRARY_STAGES = ("down", "input_gradient")
_ELEMENT_BYTES = 2  # bfloat16


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler made of a cut.

    Attributes:
        resources: of each launch of the stage.
        problem: why the cut is not to be timed; None if it is.
    """

    resources: tuple[Resources, ...] = ()
    problem: str | None = None

    @property
    def programs_per_sm(self) -> int:
        """Programs that fit on a multiprocessor, whichever launch; 1 where nothing was compiled."""
        return min((one.programs_per_sm for one in self.resources), default=1)

    def as_json(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


def candidates(stage: str, target: str, shipped: Sequence[Tiles], limit: int) -> list[Tiles]:
    """Return the cuts to try: the shipped ones, more up to `limit` in all, and the library.

    Large tiles come first, as they load fewer bytes per product, each with its deepest pipeline.
    The other ways to run a tile follow two places behind one another, so that a small limit still
    sees every tile, and the most promising ones in several ways.

    Args:
        stage: one of `tiles.STAGES`.
        target: one of `aot.TARGETS`, or `INTERPRETER` for a few that a CPU runs in no time.
        shipped: cuts of the stage in the shipped table, of which none is left out.
        limit: most cuts to compile.
    """
    if target == INTERPRETER:
        more = [replace(cut, tma=False) for cut in shipped]
    else:
        ways = [_ways(stage, target, *tile) for tile in _tiles(stage)]
        places = [
            (tile + 2 * way, tile, way) for tile, w in enumerate(ways) for way in range(len(w))
        ]
        more = [ways[tile][way] for _, tile, way in sorted(places)]
    plain = {"persistent": False, "warp_specialize": False, "programs": 1, "library": False}
    own = [replace(cut, **plain) for cut in shipped]
    found = list(dict.fromkeys([*shipped, *own, *more]))[: max(limit, len(shipped))]
    library = [replace(own[-1], library=True)] if stage in _LIBRARY_STAGES else []
    return list(dict.fromkeys([*found, *library]))


def _as_compiled(cut: Tiles) -> Tiles:
    """Return the cut without what the compiler does not see."""
    return replace(cut, library=False, programs=1)


def _tiles(stage: str) -> list[tuple[int, int, int]]:
    """Return (block_m, block_n, warps) with a sound number of accumulators, large tiles first."""
    products = 2 if stage == "up" else 1  # gate and up
    found = [
        (block_m, block_n, warps)
        for block_m, block_n, warps in itertools.product(_BLOCK_M, _BLOCK_N, _WARPS)
        if products * block_m * block_n // (32 * warps) in _ACCUMULATORS
    ]
    return sorted(found, key=lambda tile: (tile[0] * tile[1], *tile), reverse=True)


def _ways(stage: str, target: str, block_m: int, block_n: int, warps: int) -> list[Tiles]:
    """Return the ways to run one tile, the most usual first."""
    tma = target not in _WITHOUT_TMA

    def depths(block_k: int) -> list[Tiles]:
        shared = _SHARED_KIB[target] * 1024
        cuts = (Tiles(block_m, block_n, block_k, warps, _stages(stage, b), tma) for b in _BUFFERS)
        fitting = [(shared // shared_bytes(stage, cut), cut) for cut in cuts]
        fitting = [(programs, cut) for programs, cut in fitting if programs]
        # The deepest pipeline, then the deepest of those that let more programs onto one
        # multiprocessor, or else the next.
        fitting[1:] = sorted(fitting[1:], key=lambda one: one[0] == fitting[0][0])
        return [cut for _, cut in fitting]

    usual, short, long = depths(_BLOCK_K), depths(_BLOCK_K // 2), depths(2 * _BLOCK_K)
    best, has_epilogue = usual[:1], stage == "activation_gradient"
    walk = [_persistent(cut, target) for cut in usual[:2] if stage == "weight_gradient"]
    return [
        *best,
        *sorted(walk, key=lambda cut: -cut.programs)[:1],
        *(one for cut in best for one in _walks(stage, target, cut)),
        *usual[1:2],
        *(replace(cut, epilogue_n=64) for cut in best if has_epilogue),
        *(replace(cut, tma=False) for cut in best if tma),
        *long[:1],
        *short[:1],
        *(replace(cut, epilogue_n=16) for cut in best if has_epilogue),
    ]


def _walks(stage: str, target: str, cut: Tiles) -> list[Tiles]:
    """Return the persistent programs of a large tile that are not the same machine code.

    Small tiles leave room for a second program, which computes while the first finishes a tile.
    """
    accumulators = cut.block_m * cut.block_n * (2 if stage == "up" else 1) // (32 * cut.num_warps)
    is_large = cut.num_warps == max(_WARPS) and accumulators >= _MANY_ACCUMULATORS
    if stage == "weight_gradient" or not (cut.tma and is_large):
        return []
    walk = replace(cut, persistent=True)
    # Beside the operands of the next tile 128 x 256 may spill at 32 columns (Triton 3.6, sm_90).
    narrow = [replace(walk, epilogue_n=16)] if stage == "activation_gradient" else []
    parted = replace(walk, warp_specialize=True, epilogue_n=16 if stage in _EPILOGUES else 32)
    # 136 registers do not hold 128 accumulators and the rest of this epilogue.
    spills = stage == "activation_gradient" and accumulators > _MANY_ACCUMULATORS
    is_parted = target in _WARP_SPECIALIZING and not spills
    return [*([parted] if is_parted else []), *narrow, walk]


def _persistent(cut: Tiles, target: str) -> Tiles:
    """Return the cut on a grid of one or two programs per multiprocessor, as many as fit."""
    epilogue = cut.block_m * cut.epilogue_n * _ELEMENT_BYTES
    fits = _SHARED_KIB[target] * 1024 // (shared_bytes("weight_gradient", cut) + epilogue)
    return replace(cut, persistent=True, programs=max(1, min(2, fits)))


def _stages(stage: str, buffers: int) -> int:
    # Loading the index of the gathered rows takes its share of the stages: every other one.
    return 2 * buffers - 1 if stage == "weight_gradient" else buffers


def shared_bytes(stage: str, cut: Tiles) -> int:
    """Return the shared memory of the operands in flight; a program takes a little more."""
    sides = cut.block_m + cut.block_n * (2 if stage == "up" else 1)
    buffers = (cut.num_stages + 1) // 2 if stage == "weight_gradient" else cut.num_stages
    return buffers * sides * cut.block_k * _ELEMENT_BYTES


def compile_cut(stage: str, cut: Tiles, shape: Shape, target: str) -> Compiled:
    """Compile the launches of one stage; what goes wrong becomes the `problem`.

    Args:
        stage: one of `tiles.STAGES`.
        cut: the candidate.
        shape: sizes of the block, in bfloat16.
        target: one of `aot.TARGETS`.
    """
    try:
        found = launches(shape, lambda _: cut, torch.bfloat16)[stage]
        resources = tuple(compile_ahead(launch, target) for launch in found)
    except (RuntimeError, ValueError, triton.TritonError) as error:
        return Compiled(problem=f"{type(error).__name__}: {error}")
    problems = filter(None, map(_problem, resources))
    return Compiled(resources, next(problems, None))


def _problem(one: Resources) -> str | None:
    tensor_cores = _TENSOR_CORES.get(one.target, "mma_sync")
    if one.spill_bytes or one.spill_stores or one.spill_loads:
        return f"spills {one.spill_bytes} bytes per thread"
    if one.programs_per_sm == 0:
        return f"does not fit: {one.registers} registers, {one.shared_bytes} bytes shared"
    if getattr(one, tensor_cores) == 0:
        return f"no {tensor_cores} instructions"
    return None


class Compiling:
    """Compiles cuts in other processes: they need no lock of ours, and may die.

    Args:
        shape: sizes of the block.
        target: one of `aot.TARGETS`; nothing is compiled for `INTERPRETER`.
        workers: processes.
    """

    def __init__(self, shape: Shape, target: str, workers: int) -> None:
        self.shape, self.target = shape, target
        # A forked process could not use CUDA's driver, should a compiler ask for it.
        self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
        self._futures: dict[tuple[str, Tiles], Future[Compiled]] = {}

    def start(self, stage: str, cut: Tiles) -> None:
        """Compile this after what was started before; repetitions cost nothing."""
        key = (stage, _as_compiled(cut))
        if self.target != INTERPRETER and not cut.library and key not in self._futures:
            self._futures[key] = self._pool.submit(compile_cut, *key, self.shape, self.target)

    def result(self, stage: str, cut: Tiles, seconds: float | None = None) -> Compiled:
        """Wait for the result.

        Args:
            stage: as for `start`.
            cut: as for `start`, or the same with another grid.
            seconds: to wait at most.

        Raises:
            TimeoutError: it took longer.
        """
        if self.target == INTERPRETER or cut.library:
            return Compiled()
        try:
            found = self._futures[stage, _as_compiled(cut)].result(seconds)
        except (BrokenExecutor, CancelledError) as error:
            return Compiled(problem=f"not compiled: {type(error).__name__}")
        if found.problem is None and found.programs_per_sm < cut.programs:
            several = f"{cut.programs} programs per multiprocessor, {found.programs_per_sm} fit"
            return replace(found, problem=several)
        return found

    def close(self) -> None:
        """Drop what is not finished."""
        self._pool.shutdown(wait=False, cancel_futures=True)
