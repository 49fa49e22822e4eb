"""How the scan's CUDA kernels are cut: tiles, chunks and blocks, from sizes and the device's limits alone.

Suffixes: t time step, d channel, n state.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: An eighth of a tile's steps, which the kernels call a run: of the forward pass, and where only sums are needed.
RUN, ENDS_RUN = 4, 16
THREADS, WARPS, WIDTH, PAIRS, LANES = 128, 4, 32, 16, 8
#: Fours of steps that the forward pass unrolls.
WALK = 2
#: A chunk is not shorter: finding what it leaves to the next has to pay.
LEAST_CHUNK = 2048
#: Shared memory of a block besides what is asked for: its place, and what the device keeps.
_OWN_SHARED, _RESERVED = 512, 1024


class Limits(NamedTuple):
    """What tiles depend on: multiprocessors; bytes of shared memory of a block and of a multiprocessor."""

    processors: int
    block: int
    whole: int

    @property
    def backward_run(self) -> int:
        """The gradient's run: half of it where a block has 99 KB, so that 16 states fit."""
        return 8 if self.block >= 160 * 1024 else 4

    @property
    def mark(self) -> int:
        """Steps between the states that the forward pass keeps for the gradient: a tile of the latter."""
        return LANES * self.backward_run

    def resident(self, shared: int) -> int:
        """Blocks of `shared` bytes that a multiprocessor holds at once; 0 if not even one fits."""
        if shared + _OWN_SHARED > self.block:
            return 0
        return self.whole // (shared + _OWN_SHARED + _RESERVED)


class Plan(NamedTuple):
    """How a kernel is compiled and launched: its options, blocks that share a multiprocessor, bytes a block."""

    options: tuple[str, ...]
    resident: int
    shared: int


@functools.cache
def covers(n: int, limits: Limits) -> bool:
    """Whether a device of these limits holds tiles of n states, whatever the data's dtype."""
    return all(p(n, torch.float32, limits).resident > 0 for p in (forward_plan, ends_plan, backward_plan))


def _options(dtype: torch.dtype, run: int, mark: int, **rest: int) -> tuple[str, ...]:
    every = {"DATA": _KINDS[dtype], "RUN": run, "MARK": mark} | rest
    return tuple(f"-D{name}={value}" for name, value in every.items())


def _buffer(tile: int) -> int:
    return tile * WIDTH + LANES * 8


def _raw(n: int, dtype: torch.dtype, tile: int) -> int:
    vector = 16 // dtype.itemsize
    return tile * -(-n // vector) * vector * dtype.itemsize


@functools.cache
def forward_plan(n: int, dtype: torch.dtype, limits: Limits) -> Plan:
    """Of scan_forward: each of a block's warps keeps a multiple of four states."""
    states, tile = 4 * -(-n // 16), LANES * RUN
    lines = 2 * tile * (WARPS * states + 4) * 4
    shared = 5 * _buffer(tile) * dtype.itemsize + 2 * _raw(n, dtype, tile) + lines + (tile // 2 + tile) * 36 * 16
    resident = min(4 if states <= 16 else 3, limits.resident(shared))
    rest = {"STATES": states, "WALK": WALK, "FORWARD_BLOCKS": max(1, resident)}
    return Plan(_options(dtype, RUN, limits.mark, **rest), resident, shared)


@functools.cache
def ends_plan(n: int, dtype: torch.dtype, limits: Limits) -> Plan:
    """Of chunk_ends and adjoint_ends."""
    tile = LANES * ENDS_RUN
    shared = 3 * _buffer(tile) * dtype.itemsize + _raw(n, dtype, tile) + n * tile * 4 + n * PAIRS * 16
    return Plan(_options(dtype, ENDS_RUN, limits.mark), limits.resident(shared), shared)


@functools.cache
def backward_plan(n: int, dtype: torch.dtype, limits: Limits, crowded: bool = False) -> Plan:
    """Of scan_backward: GROUP states of each warp and TURNS of its lines wait in shared memory to be added up.

    crowded: three blocks a multiprocessor, on fewer registers, where they fit. All plans give the same bits.
    """
    aim = 4 if limits.backward_run == 4 else 3 if crowded else 2  # what registers allow

    def plan(group: int, turns: int) -> Plan:
        tile = limits.mark
        parts = 4 * WARPS * (turns * PAIRS // WARPS * (2 * tile + 8) + group * 2 * tile)
        rows = 8 * _buffer(tile) * dtype.itemsize
        shared = rows + 2 * _raw(n, dtype, tile) + 2 * n * tile * 4 + parts + 2 * n * PAIRS * (16 + 8)
        resident = min(aim, limits.resident(shared))
        rest = {"GROUP": group, "TURNS": turns, "BACKWARD_BLOCKS": max(1, resident)}
        return Plan(_options(dtype, limits.backward_run, tile, **rest), resident, shared)

    return max((plan(16, 2), plan(8, 2), plan(4, 1)), key=lambda p: p.resident)


@functools.cache
def step_plan(dtype: torch.dtype) -> Plan:
    """Of scan_step, whose tiles depend on nothing."""
    return Plan(_options(dtype, RUN, LANES), 1, 0)


@functools.cache
def chunk_length(t: int, d: int, processors: int, resident: int) -> int:
    """Steps of a chunk: few chunks, but enough that one sequence fills the processors. Never depends on the batch.

    `resident`: blocks that share a processor. One that holds fewer works at four fifths of its rate at best.
    """
    across = max(1, -(-d // WIDTH))

    def time(chunks: int) -> float:
        full, rest = divmod(-(-across * chunks // processors), resident)
        return (full * resident + (max(rest, 0.8 * resident) if rest else 0)) / chunks

    counts = range(1, max(1, t // LEAST_CHUNK) + 1)
    counts = counts[:64]  # more chunks than that are never needed to fill a device
    best = min(map(time, counts))
    chunks = next(c for c in counts if time(c) <= 1.03 * best)
    tile = LANES * ENDS_RUN  # the coarser one
    return max(1, -(-t // chunks // tile)) * tile
