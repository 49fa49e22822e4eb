"""How GPU kernels are launched, and how time is cut for them: no device is needed to check either."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from typing import Any

import pytest
import torch

from stateline.ops import cuda
from stateline.ops.decode_token import gpu

GRID = (1, 1, 1)


class Compiler:
    """Stands for a Triton function: compiling gives a variant, which records what it is launched with."""

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []
        self.ahead: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def compile_and_launch(*args: Any, num_warps: int) -> Any:
            self.compiled.append(args)
            return type("Variant", (), {"__getitem__": lambda _, grid: lambda *a: self.launched.append(a)})()

        return compile_and_launch

    def warmup(self, *args: Any, grid: tuple[int, int, int], num_warps: int) -> Any:
        """Compiling without a launch."""
        self.ahead.append(args)
        return None if self.broken else type("Compiled", (), {"run": None})()


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


def test_kernels_of_a_function_are_compiled_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton", reason="kernels are compiled by Triton, which this machine has no wheel of")
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    compilers = [Compiler(), Compiler(broken=True)]  # what cannot be compiled is left to the launch, which then says so
    kernels, begun = [cuda.Kernel(c) for c in compilers], []

    @cuda.side_by_side
    def launches(x: torch.Tensor) -> str:
        begun.append(x)
        for kernel in kernels:
            kernel._launch(0, GRID, (x,), (), 4)
        return "done"

    x = torch.zeros(64)
    assert launches(x) == "done"
    assert len(begun) == 3, "until the first kernel that is missing, to find all of them, and to launch"
    assert [c.ahead for c in compilers] == [[(x,)], [(x,)]]
    assert [c.compiled for c in compilers] == [[(x,)], [(x,)]], "each launched once"
    assert launches(x) == "done"
    assert len(begun) == 4
    assert [c.launched for c in compilers] == [[(x.data_ptr(),)]] * 2
    kernels.append(cuda.Kernel(Compiler()))
    assert launches(x) == "done", "kernels that are there are not launched while others are compiled"
    assert [len(c.launched) for c in compilers] == [3, 3]


def test_an_error_among_the_launches_leaves_nothing_held() -> None:
    @cuda.side_by_side
    def fails() -> None:
        raise ValueError("a size")

    with pytest.raises(ValueError, match="a size"):
        fails()
    compiler = Compiler()
    cuda.Kernel(compiler)._launch(0, GRID, (torch.zeros(4),), (), 4)
    assert len(compiler.compiled) == 1


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


class Slow:
    """Stands for a launch that is ready: it tells whose it was, and lets other threads in."""

    def __init__(self, told: list[str]) -> None:
        self.told, self.fields = told, [0] * 40

    def __call__(self) -> None:
        self.told.append(threading.current_thread().name)
        time.sleep(0.002)


def test_a_tokens_launches_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads on one stream share scratch memory: another token's kernel between two of one would overwrite it."""
    stream = type("Stream", (), {"cuda_stream": 7})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    told: list[str] = []
    known, states = gpu._Known(None, (), [], ()), torch.zeros(3, 4)  # type: ignore[arg-type]  # nothing is prepared
    for row in states:
        known.tokens[1, 7, row.data_ptr()] = [Slow(told) for _ in range(5)]  # type: ignore[misc]  # stand-ins
    ids, logits = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 4)
    threads = [threading.Thread(target=known.launch, args=([row], ids, logits)) for row in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(list(own)) for _, own in itertools.groupby(told)] == [5, 5, 5]
