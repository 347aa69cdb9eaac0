"""What the tuner prints: candidates with their resources, or the fastest beside the shipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from parts.tune.candidates import Compiled
from parts.tune.measure import Timing
from parts.tune.table import cut_row, fastest

from monkey_patch.kernels.scatter_moe.triton.tiles import Tiles

_ALWAYS = ("block_m", "block_n", "block_k", "num_warps", "num_stages")


def candidate_lines(compiled: Mapping[tuple[str, Tiles], Compiled]) -> Iterator[str]:
    """Yield one line per cut: resources, or why it was thrown out."""
    for (stage, cut), found in compiled.items():
        name = f"{stage:20s}{cut_text(cut):46s}"
        if found.problem:
            yield f"{name}thrown out: {found.problem.splitlines()[0]}"
        for one in found.resources if not found.problem else ():
            yield (
                f"{name}{one.registers:3d} registers {one.shared_bytes / 1024:6.1f} KiB "
                f"{one.programs_per_sm} per SM, {one.wgmma + one.tcgen05 + one.mma_sync} products, "
                f"{one.cp_async} cp.async, {one.tma_loads} TMA"
            )


def timing_lines(
    timings: Iterable[Timing], shipped_cut: Callable[[str, int], Tiles]
) -> Iterator[str]:
    """Yield one line per stage and size, then one per cut that was not timed.

    Args:
        timings: of all cuts.
        shipped_cut: (stage, tokens) -> the shipped cut.
    """
    timings = list(timings)
    yield f"{'stage':20s}{'rows':>6s}{'shipped ms':>12s}{'best ms':>10s}  best cut"
    for stage, tokens in dict.fromkeys((t.stage, t.tokens) for t in timings):
        here = [t for t in timings if (t.stage, t.tokens) == (stage, tokens)]
        best = fastest(here)
        ours = next(t for t in here if t.cut == shipped_cut(stage, tokens))
        if best:
            yield (
                f"{stage:20s}{best.rows:6d}{ours.mean_ms:12.3f}{best.mean_ms:10.3f}  "
                f"{cut_text(best.cut)}"
            )
    for timing in timings:
        if timing.problem:
            first = timing.problem.splitlines()[0]
            yield f"{timing.stage:20s}{timing.rows:6d}  {cut_text(timing.cut)}: {first}"


def cut_text(cut: Tiles) -> str:
    """Return a cut in one phrase."""
    if cut.library:
        return "grouped_mm"
    rest = {k: v for k, v in cut_row(cut).items() if k not in _ALWAYS}
    words = (name if value is True else f"{name} {value}" for name, value in rest.items())
    sizes = f"{cut.block_m}x{cut.block_n}x{cut.block_k}"
    return " ".join((sizes, f"{cut.num_warps} warps", f"{cut.num_stages} stages", *words))
