"""gated_scan's GPU kernels against float64 oracles: values, gradients, states, layouts, sizes, slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import pairwise
from test_gated_scan import USUAL, gated_case
from test_gpu_ops import named, on_device
from test_ops import FLAG, LAYOUTS, check, close
from where import DEVICE, INTERPRETED

from stateline import backends, ops
from stateline.ops.gated_scan import ACTIVATIONS, gpu

# Triton's interpreter cuts bfloat16 off instead of rounding, which is beyond the bound.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
GRID: dict[str, list[Any]] = {
    "backend": ["gpu"], "dtype": DTYPES, "layout": LAYOUTS, "dense": FLAG, "activation": list(ACTIVATIONS),
    "reverse": FLAG, "initial": FLAG, "strided": FLAG,
}  # fmt: skip
if INTERPRETED:
    GRID |= {"t": [0, 1, 9], "n": [1, 17, 40]}
else:
    GRID |= {"t": [0, 1, 2, 7, 64, 65, 300], "n": [1, 3, 16, 17, 40, 64, 65, 128]}


@pytest.fixture(autouse=True)
def _memory_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`strided` of test_ops makes its wide tensor on the CPU."""
    full = torch.full
    monkeypatch.setattr("test_ops.torch.full", lambda *a, **k: full(*a, **{"device": DEVICE} | k))


@pytest.mark.parametrize("s", pairwise(GRID), ids=named)
def test_grid(s: dict[str, Any]) -> None:
    check(on_device(gated_case(s | {"strided": False}), s["strided"]), s["dtype"], False)


@pytest.mark.parametrize("dense", FLAG)
def test_steps_follow_the_scan_in_slots(dense: bool) -> None:
    case = gated_case(USUAL | {"t": 5, "n": 19, "dense": dense})
    x = {name: v.to(DEVICE) for name, v in case.leaves.items()}
    options: dict[str, Any] = {"activation": "tanh", "backend": "gpu"}
    whole, last = ops.gated_scan(**x, **options)
    state = torch.full((4, 19), 7.0, device=DEVICE)
    state[[3, 1]] = x["initial_state"]
    index = torch.tensor([3, 1], device=DEVICE, dtype=torch.int32)
    for t in range(5):
        h = ops.gated_scan_step_(state, x["v"][:, t], x["g"][:, t], x["A"], index=index, **options)
        close("h", h.cpu(), whole[:, t].cpu().double(), torch.float32)
    close("state", state[[3, 1]].cpu(), last.cpu().double(), torch.float32)
    assert (state[[0, 2]] == 7).all()
    before = state.clone()
    index = torch.tensor([-1, 1], device=DEVICE)
    h = ops.gated_scan_step_(state, x["v"][:, 0], x["g"][:, 0], x["A"], index=index, **options)
    assert not h[0].any()
    assert torch.equal(h[1], before[1])
    assert torch.equal(state[[0, 2, 3]], before[[0, 2, 3]])


@pytest.mark.parametrize("reverse", FLAG)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_linear_diagonal_system_is_a_parallel_scan(layout: str, reverse: bool) -> None:
    s = USUAL | {"backend": "gpu", "layout": layout, "reverse": reverse, "dense": False, "activation": "identity"}
    for t in (1, 13) if INTERPRETED else (0, 1, 63, 64, 65, 1000):
        check(on_device(gated_case(s | {"t": t, "n": 17}), False), torch.float32, False)


@pytest.mark.parametrize("dense", FLAG)
def test_a_row_does_not_depend_on_its_batch(dense: bool) -> None:
    x = {name: v.to(DEVICE) for name, v in gated_case(USUAL | {"t": 9, "n": 19, "dense": dense}).leaves.items()}
    options: dict[str, Any] = {"activation": "sigmoid" if dense else "identity", "backend": "gpu"}
    h, state = ops.gated_scan(**x, **options)
    alone = {name: v if name == "A" else v[1:] for name, v in x.items()}
    h1, state1 = ops.gated_scan(**alone, **options)
    assert torch.equal(h[1:], h1)
    assert torch.equal(state[1:], state1)


def test_a_large_matrix_is_refused_by_name() -> None:
    n = gpu.LARGEST + 1
    v, A = torch.zeros(1, 2, n, device=DEVICE), torch.zeros(n, n, device=DEVICE)
    assert gpu.problem(v, v, A) == f"a dense A has {n} states, its GPU kernels keep up to 128 in registers."
    assert gpu.problem(v, v, A[0]) is None
    if not INTERPRETED:
        choice = backends.explain(ops.gated_scan, v, v, A)
        assert choice.name == "reference"
        assert "keep up to 128 in registers" in choice.rejected["gpu"]
