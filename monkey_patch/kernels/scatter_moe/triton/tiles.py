"""The shape of a kernel's work: one row of the shipped table, made to fit the matrix at hand.

`tiles.json` holds, per architecture and stage, the choice for an average number of rows per expert
up to `max_rows` (null: any). bench/tune_scatter_moe.py writes it; nothing is tuned at run time, so
every rank and every run launches the same kernels and adds in the same order.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from monkey_patch.kernels.launch import next_power_of_2
from monkey_patch.kernels.scatter_moe.quantize import E4M3, Fp8

TABLE = Path(__file__).with_name("tiles.json")
STAGES = ("up", "down", "activation_gradient", "input_gradient", "weight_gradient")
FP8_STAGES = STAGES[:-1]  # those whose operands may be in FP8

_SMALLEST = 16  # tl.dot takes no smaller side
_TMA_ALIGNMENT = 16  # bytes, of the base address and of every row


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one stage is cut.

    Attributes:
        block_m: rows of the output tile (of the weight's rows in `weight_gradient`).
        block_n: columns of the output tile.
        block_k: depth of one step of the loop.
        num_warps: warps per program.
        num_stages: steps in flight.
        tma: read contiguous operands through tensor descriptors.
        persistent: as many programs as there is room for, which walk over tiles; the loads of the
            next tile are in flight while one is finished.
        warp_specialize: of a persistent program, other warps load, multiply and finish tiles, the
            last while the next is multiplied (datacenter Blackwell; not `weight_gradient`). Where
            descriptors cannot be used, `persistent` alone.
        epilogue_n: columns that `activation_gradient`, and `up` where it is persistent, finish at a
            time; more need more registers.
        library: leave the product to torch's grouped_mm (`down` and `input_gradient` only).
        programs: per multiprocessor, of a persistent grid.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False
    persistent: bool = False
    warp_specialize: bool = False
    epilogue_n: int = 32
    library: bool = False
    programs: int = 1

    def __post_init__(self) -> None:
        """Refuse a field that would do nothing.

        Raises:
            ValueError: warp specialisation without a persistent grid.
        """
        if self.warp_specialize and not self.persistent:
            raise ValueError("warp_specialize is true, but persistent is not: set both")

    def fit(self, columns: int, depth: int, rows: int | None = None) -> Tiles:
        """Shrink to a product with fewer columns, less depth or fewer rows than one tile."""
        return replace(
            self,
            block_m=self.block_m if rows is None else _shrink(self.block_m, rows),
            block_n=_shrink(self.block_n, columns),
            block_k=_shrink(self.block_k, depth),
        )


def choose_tiles(
    stage: str, architecture: str, dtype: torch.dtype, rows_per_expert: int, fp8: Fp8 = "off"
) -> Tiles:
    """Look up the shipped choice.

    Args:
        stage: one of `STAGES`.
        architecture: `architecture_of` a tensor; unlisted ones take "default".
        dtype: of the operands; float32 takes its own small tiles, float8_e4m3fn the rows of the
            architecture's name behind "fp8_" or, in mxfp8, "mxfp8_".
        rows_per_expert: average, T * K // E.
        fp8: scaling of the operands.
    """
    table = shipped_table()
    if dtype == torch.float32 and architecture != "interpreter":
        architecture = "float32"
    kind = ""
    if dtype == E4M3:
        kind = "mxfp8_" if fp8 == "mxfp8" else "fp8_"
    rows = table.get(kind + architecture, table[kind + "default"])[stage]
    return next(tiles for limit, tiles in rows if limit is None or rows_per_expert <= limit)


@functools.cache
def shipped_table() -> dict[str, dict[str, list[tuple[int | None, Tiles]]]]:
    """Return {architecture: {stage: [(max_rows, tiles), ...]}}, ascending."""
    return read_table(json.loads(TABLE.read_text(encoding="utf-8")))


def read_table(table: dict[str, Any]) -> dict[str, dict[str, list[tuple[int | None, Tiles]]]]:
    """Turn the content of tiles.json into `Tiles`; a row may carry other facts beside."""
    names = {field.name for field in fields(Tiles)}
    return {
        architecture: {
            stage: [
                (row["max_rows"], Tiles(**{k: v for k, v in row.items() if k in names}))
                for row in rows
            ]
            for stage, rows in stages.items()
        }
        for architecture, stages in table["tiles"].items()
    }


def architecture_of(tensor: torch.Tensor) -> str:
    """Return the table's key for the tensor's device, such as "sm_90"."""
    if not tensor.is_cuda:
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(tensor.device)
    # Blackwell Ultra (10.3) has the tensor cores and the shared memory of 10.0.
    return "sm_100" if major == 10 else f"sm_{major}{minor}"


def _shrink(block: int, size: int) -> int:
    return min(block, max(_SMALLEST, next_power_of_2(size)))


def takes_tma(*matrices: torch.Tensor) -> bool:
    """Tell whether tensor descriptors can address the matrices (last dimension contiguous)."""
    return all(
        m.data_ptr() % _TMA_ALIGNMENT == 0
        and m.shape[-1] * m.element_size() % _TMA_ALIGNMENT == 0
        and m.numel() > 0
        for m in matrices
    )
