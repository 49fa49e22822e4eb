"""selective_scan's Triton kernels, which cover every system, against the reference in float64.

Values, gradients, steps, layouts and awkward sizes; buffers are poisoned and fenced (conftest.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracles import pairwise
from test_gpu_ops import named
from test_ops import _strided as strided
from test_ops import close
from torch import Tensor
from where import DEVICE, INTERPRETED

from stateline.ops.selective_scan import gpu_triton, reference

# Triton's interpreter cuts bfloat16 off instead of rounding, which is beyond the bound.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
FLAG = [False, True]
NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
Table = list[tuple[int, int, int]] | None


@dataclass(frozen=True)
class Scan:
    """Arguments of one call, apart from their values; extras: D, z, dt_bias, softplus and an initial state."""

    b: int = 2
    t: int = 9
    d: int = 3
    n: int = 3
    g: int = 1
    dtype: torch.dtype = torch.float32
    complex: bool = False
    B: str = "token"
    C: str = "token"
    extras: bool = True
    reverse: bool = False
    table: Any = None

    def inputs(self) -> list[Any]:
        """In the order of `reference.forward`, up to the initial state, on the CPU."""
        b, t, d, n, pair = self.b, self.t, self.d, self.n, ((2,) if self.complex else ())
        A = -torch.rand(d, n) * 8
        if self.complex:
            A = torch.complex(A, 20 * torch.randn(d, n))
        u, z, dt = (torch.randn(b, t, d).to(self.dtype) for _ in range(3))
        B, C = (
            torch.randn(d, n, dtype=A.dtype) if kind == "constant" else torch.randn(b, t, self.g, n, *pair).to(u.dtype)
            for kind in (self.B, self.C)
        )
        if not self.extras:
            return [u, (0.2 * torch.rand(b, t, d)).to(self.dtype), A, B, C, None, None, None, False, None]
        rows = b if self.table is None else len(self.table)
        state = torch.randn(rows, d, n, dtype=A.dtype)
        return [u, dt, A, B, C, torch.randn(d), z, torch.randn(d) - 3, True, state]

    def where(self, device: str | None = None) -> tuple[Tensor | None, bool]:
        table = None if self.table is None else torch.tensor(self.table, dtype=torch.int64).reshape(-1, 3)
        return table if table is None or device is None else table.to(device), self.reverse


@pytest.fixture(autouse=True)
def _memory_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`strided` of test_ops makes its wide tensor on the CPU."""
    full = torch.full
    monkeypatch.setattr("test_ops.torch.full", lambda *a, **k: full(*a, **{"device": DEVICE} | k))


def moved(args: list[Any]) -> list[Any]:
    return [x.to(DEVICE) if isinstance(x, Tensor) else x for x in args]


def widened(args: list[Any]) -> list[Any]:
    return [x.to(torch.complex128 if x.is_complex() else torch.float64) if isinstance(x, Tensor) else x for x in args]


def check(scan: Scan, wide: bool = False) -> None:
    """Values and gradients within the published bounds; `wide`: tokens are slices of wider tensors."""
    args = scan.inputs()
    outside = torch.ones(scan.b, scan.t, dtype=torch.bool)
    for row, start, stop in scan.table if scan.table is not None else [(i, 0, scan.t) for i in range(scan.b)]:
        outside[row, start:stop] = False
    given = moved(args)
    tokens = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.dim() > 2 and NAMES[i : i + 1] != ()]
    for i in [i for i in tokens if i < 9 and args[i].shape[:2] == outside.shape]:
        given[i][outside] = float("nan")
        given[i] = strided(given[i]) if wide else given[i]
    y, state = gpu_triton.forward(*given, *scan.where(DEVICE))
    exact_y, exact_state = reference.forward(*widened(args), *scan.where())
    assert (y.dtype, state.dtype) == (args[0].dtype, args[2].dtype)
    close("y", y.cpu(), exact_y, scan.dtype)
    assert not y.cpu()[outside].any()
    close("state", state.cpu(), exact_state, torch.float32)
    dy, dstate = torch.randn(exact_y.shape).to(scan.dtype), torch.randn(exact_state.shape, dtype=args[2].dtype)
    got = gpu_triton.backward(dy.to(DEVICE), dstate.to(DEVICE), *given, *scan.where(DEVICE))
    wanted = reference.backward(*widened([dy, dstate]), *widened(args), *scan.where())
    for name, x, mine, right in zip(NAMES, [*args[:8], args[9]], got, wanted, strict=True):
        assert (mine is None) == (right is None), name
        if mine is not None and right is not None:
            assert mine.dtype == x.dtype, name
            close(f"d{name}", mine.cpu(), right, scan.dtype)


PACKED: Table = [(0, 0, 5), (0, 5, 5), (0, 5, 6), (0, 6, 19)]
PADDED: Table = [(0, 0, 9), (1, 3, 9), (2, 0, 0)]
GRID = {
    "t": [1, 9] if INTERPRETED else [1, 127, 129, 300], "d": [1, 3] if INTERPRETED else [1, 3, 33, 96],
    "n": [1, 3] if INTERPRETED else [1, 3, 16, 24, 64], "g": [1, 3], "dtype": DTYPES, "complex": FLAG,
    "B": ["token", "constant"], "C": ["token", "constant"], "extras": FLAG, "reverse": FLAG, "wide": FLAG,
}  # fmt: skip


@pytest.mark.parametrize("s", pairwise(GRID), ids=named)
def test_systems(s: dict[str, Any]) -> None:
    s = s | {"g": min(s["g"], s["d"])}
    wide = s.pop("wide")
    check(Scan(**s), wide)


@pytest.mark.parametrize("t", [0, 1, 2, 127, 128, 129])
def test_lengths(t: int) -> None:
    if INTERPRETED and t > 2:
        t -= 120  # the interpreter is given chunks of 8 steps instead of 128
    check(Scan(1, t, 2, 2, complex=True, B="constant"))


@pytest.mark.parametrize("n", [0, 1, 3, 16, 24, 64, 256])
@pytest.mark.parametrize("complex_", FLAG)
def test_states(n: int, complex_: bool) -> None:
    check(Scan(1, 3 if INTERPRETED else 70, 2 if INTERPRETED else 40, n, complex=complex_, C="constant"))


@pytest.mark.parametrize("d", [1, 3, 33])
def test_widths(d: int) -> None:
    check(Scan(1, 4, d, 2, g=min(d, 2)))


@pytest.mark.parametrize("b", [0, 1])
def test_no_sequences(b: int) -> None:
    check(Scan(b, 5, 3, 2, table=[] if b else None, complex=bool(b)))


@pytest.mark.parametrize("table", [PACKED, PADDED], ids=["packed", "padded"])
@pytest.mark.parametrize("reverse", FLAG)
@pytest.mark.parametrize("complex_", FLAG)
def test_segments(table: list[tuple[int, int, int]], reverse: bool, complex_: bool) -> None:
    many = 1 if INTERPRETED else 30
    table = [(row, start * many, stop * many) for row, start, stop in table]
    b, t = max(row for row, *_ in table) + 1, max(stop for *_, stop in table)
    check(Scan(b, t, 3, 2, reverse=reverse, complex=complex_, B="constant" if reverse else "token", table=table))


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "initial_state"])
def test_each_option_absent(absent: str) -> None:
    args = Scan(1, 5, 3, 2).inputs()
    args[(*NAMES[:8], "softplus", *NAMES[8:]).index(absent)] = None
    y, _ = gpu_triton.forward(*moved(args), None, False)
    close("y", y.cpu(), reference.forward(*widened(args), None, False)[0], torch.float32)
    gradients = [torch.randn(1, 5, 3), torch.randn(1, 3, 2)]
    got = gpu_triton.backward(*moved(gradients), *moved(args), None, False)
    for name, mine, right in zip(NAMES, got, reference.backward(*widened(gradients), *widened(args), None, False),
                                 strict=True):  # fmt: skip
        assert (mine is None) == (right is None) == (name == absent)
        if mine is not None:
            close(f"d{name}", mine.cpu(), right, torch.float32)


def test_waves_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = Scan(2, 20 if INTERPRETED else 700, 3, 2, complex=True)
    args, gradients = moved(scan.inputs()), moved([torch.randn(2, scan.t, 3), torch.randn(2, 3, 2).cfloat()])
    whole = gpu_triton.backward(*gradients, *args, None, False)
    monkeypatch.setattr(gpu_triton, "WAVE", 1)
    monkeypatch.setattr(gpu_triton, "WAVE_OF_DATA", 0)
    for a, b in zip(whole, gpu_triton.backward(*gradients, *args, None, False), strict=True):
        assert torch.equal(a, b)


def test_a_row_does_not_depend_on_its_batch_and_bits_repeat() -> None:
    t = 9 if INTERPRETED else 700
    args = moved(Scan(3, t, 3, 2, complex=True).inputs())
    gradients = moved([torch.randn(3, t, 3), torch.randn(3, 3, 2).cfloat()])

    def run(rows: slice) -> list[Tensor]:
        cut = [x[rows] if isinstance(x, Tensor) and x.shape[0] == 3 and i not in (2, 5, 7) else x
               for i, x in enumerate(args)]  # fmt: skip
        out = gpu_triton.forward(*cut, None, False)
        return [*out, *gpu_triton.backward(*(x[rows] for x in gradients), *cut, None, False)]

    together, again, alone = run(slice(None)), run(slice(None)), run(slice(1, 2))
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    for i, name in enumerate(("y", "state", *NAMES)):
        if name not in ("A", "D", "dt_bias"):
            assert torch.equal(together[i][1:2], alone[i]), name


def test_undamped_turns_stay_in_phase() -> None:
    """Nothing is forgotten and every step turns far: errors of the phase would add up."""
    t = 40 if INTERPRETED else 3000
    scan = Scan(1, t, 2, 3, complex=True, B="constant", C="constant", extras=False)
    args = scan.inputs()
    turns = 3.0 if INTERPRETED else 1e4  # the interpreter rounds the product in a fused multiply-add
    args[2] = torch.complex(torch.zeros(2, 3), torch.tensor([[0.3 * turns, 3.0, 0.0], [-turns, 7.0, -1.0]]))
    y, state = gpu_triton.forward(*moved(args), None, False)
    exact = reference.forward(*widened(args), None, False)
    close("y", y.cpu(), exact[0], torch.float32)
    close("state", state.cpu(), exact[1], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("complex_", FLAG)
@pytest.mark.parametrize("kind", ["token", "constant"])
@pytest.mark.parametrize("n", [0, 3, 70])
def test_step(dtype: torch.dtype, complex_: bool, kind: str, n: int) -> None:
    scan = Scan(4, 1, 40, n, 3, dtype, complex_, kind)
    u, dt, A, B, C, D, z, bias, softplus, _ = scan.inputs()
    token = [u[:, 0], dt[:, 0], A, *(x if x.dim() == 2 else x[:, 0] for x in (B, C)), D, z[:, 0], bias]
    states = torch.randn(7, 40, n, dtype=A.dtype)
    for index in (None, torch.tensor([5, -1, 0, 2]), torch.tensor([5, -1, 0, 2], dtype=torch.int32)):
        h = states[:4] if index is None else states
        mine, right = h.clone().to(DEVICE), widened([h])[0].clone()
        y = gpu_triton.step(mine, *moved(token), softplus, None if index is None else index.to(DEVICE))
        close("y", y.cpu(), reference.step(right, *widened(token), softplus, index), dtype)
        close("state", mine.cpu(), right, torch.float32)
        if index is not None:
            assert torch.equal(mine.cpu()[[1, 3, 4, 6]], states[[1, 3, 4, 6]])
