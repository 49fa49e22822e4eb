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
from stateline.ops.s4_scan import chunked, system_step_, system_tables

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
        from stateline.ops.s4_scan import gpu

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


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
@pytest.mark.parametrize("n_ssm", [None, 2])
def test_a_system_is_sampled_as_on_a_cpu(rule: str, n_ssm: int | None) -> None:
    from stateline.nn import S4D

    layer = S4D(4, 12, channels=2, discretization=rule, n_ssm=n_ssm)
    with torch.no_grad():  # one state hardly decays: A dt near 0
        layer.kernel.A_real[0, 0], layer.kernel.A_imag[0, 0] = -14.0, 1e-5
    layer.to(DEVICE)
    kernel, u = layer.kernel, torch.zeros(2, 20, 4, device=DEVICE)
    given = [kernel.inv_dt, kernel.A_real, kernel.A_imag, kernel.B, kernel.C, layer.D]
    made = parts(system_tables(u, *given, 1.3, rule == "bilinear"))
    _, A_bar, B_bar, C = kernel.sampled(1.3)
    want = parts(chunked.diagonal_tables(A_bar, B_bar, C, layer.D.double(), made[0].shape[-1], F64))
    slopes = [torch.randn_like(x) for x in made]
    grads = torch.autograd.grad(made, given, slopes)
    wanted = torch.autograd.grad(want, given, [x.double() for x in slopes])
    for i, (a, b) in enumerate(zip((*made, *grads), (*want, *wanted), strict=True)):
        near(str(i), a, b.double(), 1e-6)


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
@pytest.mark.parametrize("n_ssm", [None, 2])
def test_a_token_samples_the_system_on_the_way(rule: str, n_ssm: int | None) -> None:
    from stateline.nn import S4D

    layer, rate = S4D(4, 12, channels=2, discretization=rule, n_ssm=n_ssm).to(DEVICE), 1.3
    kernel, u = layer.kernel, torch.randn(3, 4, device=DEVICE)
    state = torch.randn(4, 3, 6, 2, device=DEVICE).transpose(0, 1)
    _, A_bar, B_bar, C = kernel.sampled(rate)
    x = torch.view_as_complex(state.double()) * A_bar + B_bar * u[..., None]
    y = 2 * (C * x[:, None]).real.sum(-1) + layer.D * u[:, None]
    given = [kernel.inv_dt, kernel.A_real, kernel.A_imag, kernel.B, kernel.C, layer.D]
    near("y", system_step_(state, u, *given, rate, rule == "bilinear"), y, 1e-6)
    near("state", state, torch.view_as_real(x), 1e-6)


def parts(tables: chunked.Tables) -> tuple[torch.Tensor, ...]:
    assert isinstance(tables.advance, chunked.Diagonal)
    return tables.taps, tables.read, tables.write, chunked.as_real(tables.advance.powers)
