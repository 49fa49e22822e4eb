"""linear_scan's Triton kernels against float64 oracles: values, gradients, states, steps; and long_conv there."""

from __future__ import annotations

from typing import Any

import pytest
import test_linear_scan as scan
import test_long_conv as conv
import torch
from oracles import pairwise
from test_gpu_ops import DTYPES, _memory_on_device, named, on_device  # noqa: F401  # the fixture serves here too
from test_ops import FLAG, LAYOUTS, check, close
from where import DEVICE, INTERPRETED

from stateline import ops

SIZES = {"t": [0, 1, 9, 21], "d": [1, 40]} if INTERPRETED else {
    "t": [0, 1, 2, 31, 32, 33, 130, 1000, 5000], "d": [1, 3, 17, 130, 1030],
}  # fmt: skip
SCAN = {
    "backend": ["gpu"], "dtype": DTYPES, "layout": LAYOUTS, **SIZES, "complex": FLAG, "constant": FLAG,
    "a": ["same", "wide"], "reverse": FLAG, "initial": FLAG, "strided": FLAG,
}  # fmt: skip
CONV = {
    "backend": ["gpu"], "dtype": DTYPES, "layout": LAYOUTS, "t": [0, 1, 9], "d": [1, 17], "l": [1, 3, 20],
    "out": [None, 2], "taps": [torch.float32], "reverse": FLAG, "initial": FLAG, "strided": FLAG,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter, runs of few steps, so that sequences have several."""
    if INTERPRETED:
        from stateline.ops.linear_scan import gpu

        monkeypatch.setattr(gpu, "plan", lambda *_: gpu.Plan(2, 4, 32, 1))


@pytest.mark.parametrize("s", pairwise(SCAN), ids=named)
def test_grid(s: dict[str, Any]) -> None:
    check(on_device(scan.case(s), s["strided"]), scan.precision(s), False)


@pytest.mark.parametrize("s", pairwise(CONV), ids=named)
def test_long_conv(s: dict[str, Any]) -> None:
    check(on_device(conv.case(s), s["strided"]), s["dtype"], False)


@pytest.mark.parametrize("complex_", FLAG)
@pytest.mark.parametrize("constant", FLAG)
def test_step(complex_: bool, constant: bool) -> None:
    x = scan.case(scan.PLAIN | {"d": 40, "complex": complex_, "constant": constant, "t": 5}).leaves
    a, b, start = (v.to(DEVICE) for v in (x["a"], x["b"], x["initial_state"]))
    whole, last = ops.linear_scan(a, b, initial_state=start, backend="gpu")
    state = torch.full((5, 40), 7.0, dtype=last.dtype, device=DEVICE)
    index = torch.tensor([3, 1, -1], device=DEVICE)
    state[[3, 1]] = start
    a, b = (a if constant else torch.cat([a, a[:1]])), torch.cat([b, b[:1]])
    for t in range(5):
        h = ops.linear_scan_step_(state, a if constant else a[:, t], b[:, t], index=index, backend="gpu")
        want = whole[:, t].to(torch.complex128 if complex_ else torch.float64)
        close("h", h[:2].cpu(), want.cpu(), torch.float32)
        assert not h[2].any()
    close("state", state[[3, 1]].cpu(), last.cpu().to(want.dtype), torch.float32)
    assert (state[[0, 2, 4]] == 7).all()


def test_a_row_does_not_depend_on_its_batch() -> None:
    a, b = torch.rand(3, 21, 40).to(DEVICE), torch.randn(3, 21, 40).to(DEVICE)
    h, state = ops.linear_scan(a, b, backend="gpu")
    alone, end = ops.linear_scan(a[1:2], b[1:2], backend="gpu")
    assert torch.equal(h[1:2], alone)
    assert torch.equal(state[1:2], end)
