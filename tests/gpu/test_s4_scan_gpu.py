"""s4_scan's Triton kernels against sums over all earlier inputs in float64: values, gradients, states, steps."""

from __future__ import annotations

from typing import Any

import pytest
import test_s4_scan as scan
import torch
from oracles import pairwise
from test_gpu_ops import DTYPES, named
from test_s4_scan import BOUND, C128, F64, near
from where import DEVICE, INTERPRETED

from stateline import ops

FLAG = [False, True]
SIZES = {"t": [0, 1, 17, 40], "h": [1, 3], "n": [1, 5, 20], "c": [1, 2]} if INTERPRETED else {
    "t": [0, 1, 15, 64, 65, 200, 1000], "h": [1, 3, 40], "n": [1, 5, 32, 40], "c": [1, 2, 3],
}  # fmt: skip
GRID: dict[str, list[Any]] = {
    "backend": ["gpu"], "dtype": DTYPES, "layout": ["whole", "right", "left", "packed"], **SIZES, "D": FLAG,
    "initial": FLAG, "strided": FLAG, "reverse": FLAG,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter short chunks, and products that it knows."""
    if INTERPRETED:
        from stateline.ops.s4_scan import chunked, gpu

        monkeypatch.setattr(chunked, "CHUNK", 16)
        monkeypatch.setattr(gpu, "PRECISION", "ieee")
        monkeypatch.setattr(gpu, "ROWS", 16)
        monkeypatch.setattr(gpu, "NUMBERS", 16)
        monkeypatch.setattr(gpu, "AHEAD", 2)


@pytest.mark.parametrize("s", pairwise(GRID), ids=named)
def test_grid(s: dict[str, Any]) -> None:
    scan.check(s, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_follow_the_scan(dtype: torch.dtype) -> None:
    x, _ = scan.case(scan.USUAL | {"t": 4, "h": 3, "dtype": dtype, "backend": "gpu"})
    x = {k: v.to(DEVICE) for k, v in x.items()}
    whole, last = ops.s4_scan(**x, backend="gpu")
    u, start = x.pop("u"), x.pop("initial_state")
    u = torch.cat([u, u[:1]])
    state = torch.full((5, *last.shape[1:]), 7.0, device=DEVICE)
    index = torch.tensor([3, 1, -1], device=DEVICE)
    state[[3, 1]] = start
    for t in range(4):
        y = ops.s4_scan_step_(state, u[:, t], **x, index=index, backend="gpu")
        near("y", y[:2], whole[:, t].double(), BOUND[dtype])
        assert not y[2].any()
    near("state", state[[3, 1]], last.double(), BOUND[torch.float32])
    assert (state[[0, 2, 4]] == 7).all()


def test_a_row_does_not_depend_on_its_batch() -> None:
    x, _ = scan.case(scan.USUAL | {"t": 70, "h": 3, "backend": "gpu"})
    x = {k: v.to(DEVICE) for k, v in x.items()}
    y, state = ops.s4_scan(**x, backend="gpu")
    alone = {k: v[1:] if k in ("u", "initial_state") else v for k, v in x.items()}
    y1, state1 = ops.s4_scan(**alone, backend="gpu")
    assert torch.equal(y[1:], y1)
    assert torch.equal(state[1:], state1)


@pytest.mark.skipif(INTERPRETED, reason="there is no compiler or device to ask")
def test_compiled_and_in_double() -> None:
    x, _ = scan.case(scan.USUAL | {"t": 150, "h": 3})
    x = {k: v.to(DEVICE) for k, v in x.items()}
    run = torch.compile(lambda u, A: ops.s4_scan(u, A, x["B_bar"], x["C"])[0], backend="eager", fullgraph=True)
    near("compiled", run(x["u"], x["A_bar"]), ops.s4_scan(x["u"], x["A_bar"], x["B_bar"], x["C"])[0], 1e-6)
    wide = {k: v.to(C128 if v.is_complex() else F64) for k, v in x.items()}
    near("y", ops.s4_scan(**x)[0], ops.s4_scan(**wide)[0], BOUND[torch.float32])
