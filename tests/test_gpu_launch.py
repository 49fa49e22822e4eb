"""How GPU kernels are launched, and how time is cut for them: no device is needed to check either."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stateline.ops import cuda

GRID = (1, 1, 1)


class Compiler:
    """Stands for a Triton function: compiling gives a variant, which records what it is launched with."""

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def compile_and_launch(*args: Any, num_warps: int) -> Any:
            self.compiled.append(args)
            return type("Variant", (), {"__getitem__": lambda _, grid: lambda *a: self.launched.append(a)})()

        return compile_and_launch


def test_a_variant_is_compiled_once_and_gets_addresses() -> None:
    compiler = Compiler()
    kernel = cuda.Kernel(compiler)
    x, y = torch.zeros(64), torch.zeros(64)
    for tensor in (x, y):
        kernel._launch(0, GRID, (tensor, None, 32, 0.5), (True, 8), 4)
    assert len(compiler.compiled) == 1
    assert compiler.launched == [(y.data_ptr(), None, 32, 0.5, True, 8)]


@pytest.mark.parametrize("change", [
    {"x": torch.zeros(65)[1:]}, {"x": torch.zeros(64).half()}, {"other": torch.zeros(1)}, {"number": 33}, {"number": 1},
    {"number": 2**31}, {"constants": (False, 8)}, {"warps": 8}, {"device": 1},
], ids=str)  # fmt: skip
def test_what_triton_compiles_apart_is_a_variant_of_its_own(change: dict[str, Any]) -> None:
    compiler = Compiler()
    kernel = cuda.Kernel(compiler)
    usual = {"device": 0, "x": torch.zeros(64), "other": None, "number": 32, "constants": (True, 8), "warps": 4}
    for s in (usual, usual | change, usual):
        kernel._launch(s["device"], GRID, (s["x"], s["other"], s["number"]), s["constants"], s["warps"])
    assert len(compiler.compiled) == 2
    assert len(compiler.launched) == 1


@pytest.mark.parametrize("steps", [1, 3, 8, 100])
@pytest.mark.parametrize("table", [
    [[0, 0, 9], [1, 0, 4], [2, 0, 0]], [[0, 0, 0], [0, 0, 1], [0, 1, 1], [0, 1, 20]], [[0, 5, 24]], [],
], ids=str)  # fmt: skip
def test_runs_cover_every_sequence_once(table: list[list[int]], steps: int) -> None:
    b, t = 3 if len(table) == 3 else 1, 24
    runs = cuda.runs(torch.tensor(table, dtype=torch.int64).reshape(-1, 3), b, t, steps)
    wanted = [
        [i, run] for i, (_, start, stop) in enumerate(table) for run in range(max(1, -(-(stop - start) // steps)))
    ]
    assert runs.tiles is not None
    assert runs.tiles.shape == (runs.count, 2)
    assert [tile for tile in runs.tiles.tolist() if tile[0] >= 0] == wanted


def test_whole_rows_need_no_table() -> None:
    assert cuda.runs(None, 3, 17, 8) == cuda.Runs(9, 3)
    assert cuda.runs(None, 2, 0, 8) == cuda.Runs(2, 1)
