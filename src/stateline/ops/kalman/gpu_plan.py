"""Kernels of kalman in which several lanes share a series (gpu_wide.cu, gpu_wide_backward.cu): sizes and layout.

All of it follows from the system, nothing from the number of series: a series has the same bits in any batch.
"""

from __future__ import annotations

import functools
import importlib.resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stateline.ops.kalman.gpu import Variant

FORWARD, BACKWARD = "gpu_wide.cu", "gpu_wide_backward.cu"
#: The fewest states, or observed values, that each takes over from a thread a series, by bytes of a number: as soon as
#: the numbers of one do not fit in the registers of a thread.
FEWEST = {FORWARD: {4: 9, 8: 7}, BACKWARD: {4: 7, 8: 5}}
#: The most states, and observed values: what is missing of the latter at a step is a number of 64 bits.
MOST = 64
#: Shared memory of a multiprocessor of what kernels are tuned for, an H100, and how much of it goes with each block.
SHARED, KEPT = 233472, 1024


def lanes(v: Variant) -> tuple[int, int]:
    """Rows and columns of the lanes of a series (timings: benchmarks/NOTES.md)."""
    wide = max(v.n, v.m)
    if v.size == 8:
        return (2, 4) if wide <= 8 else (4, 8) if wide <= 16 else (8, 16)
    return (2, 2) if wide <= 8 else (4, 4) if wide <= 16 else (4, 8) if wide <= 32 else (8, 16)


def threads(v: Variant) -> int:
    """Of a block."""
    rows, columns = lanes(v)
    return max(32, rows * columns)


def series(v: Variant) -> int:
    """Of a block."""
    rows, columns = lanes(v)
    return max(1, 32 // (rows * columns))


def takes(file: str, v: Variant) -> bool:
    """Whether a kernel of these computes such systems, and not one of a thread a series."""
    return max(v.n, v.m) >= FEWEST[file][v.size]


def source(file: str) -> str:
    """A kernel file with what both share in front."""
    folder = importlib.resources.files("stateline.ops.kalman")
    ahead = ("gpu_wide.cuh", "gpu_record.cuh") if file == FORWARD else ("gpu_wide.cuh",)
    return "".join((folder / part).read_text() for part in (*ahead, file))


@functools.cache
def room(file: str, v: Variant) -> int:
    """Bytes of shared memory of a block."""
    n, m = v.n, v.m

    def total(*shapes: tuple[int, int, int]) -> int:
        """Of so many matrices of so many rows and columns."""
        return sum(count * rows * -(-columns * v.size // 16) * 16 for count, rows, columns in shapes)

    one = [(3, n, n), (3, m, n), (2, n, m), (2, m, m), (1, m + 1, m), (2, 1, n), (5, 1, m)]
    if file == FORWARD:
        one, system = [*one, (1, 1, m)], total((2, n, n))
    else:
        one, system = [*one, (3, n, n), (1, n, m), (1, m, m), (6, 1, n), (4, 1, m)], total((1, n, n))
    count, (rows, columns) = series(v), lanes(v)
    beyond = 48 if rows * columns <= 4 else rows * columns * 4 % 128
    apart = (total(*one) + 127 - beyond) // 128 * 128 + beyond
    return system * (count if v.own else 1) + count * apart + -(-count * 8 // 16) * 16


def options(file: str, v: Variant) -> tuple[str, ...]:
    """What a source is compiled with for a variant."""
    (rows, columns), whole = lanes(v), room(file, v)
    warps = threads(v) // 32
    # Of a multiprocessor, whose quarters have registers of their own: 168 or 255 for each thread.
    fit = min(SHARED // (whole + KEPT) * warps, 8 if file == BACKWARD else 12)
    blocks = max(1, (fit if fit < 4 else fit - fit % 4) // warps)
    return (
        f"-DSTATES={v.n}", f"-DOBSERVED={v.m}", f"-DNUMBER={'double' if v.size == 8 else 'float'}", f"-DOWN={v.own:d}",
        f"-DROWS={rows}", f"-DCOLUMNS={columns}", f"-DBLOCKS={blocks}", f"-DROOM={whole}", "--fmad=false",
    )  # fmt: skip
