"""Every operation on a device that is not the current one, under torch.compile, and past 2^31 elements."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from where import DEVICE, INTERPRETED

from stateline import ops
from stateline.nn import Mamba, Mamba2, Mixer

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no device")

Op = Callable[..., Any]


def scan_inputs(device: str, kind: str = "real") -> dict[str, Tensor]:
    b, t, d, n = 2, 70, 40, 8
    x = {name: torch.randn(b, t, d, device=device) for name in ("u", "dt", "z")}
    A = -torch.rand(d, n, device=device)
    if kind == "complex":
        A = torch.complex(A, torch.randn(d, n, device=device))
        constants = {name: torch.randn(d, n, dtype=A.dtype, device=device) for name in ("B", "C")}
        return x | constants | {"A": A}
    return x | {"A": A, "B": torch.randn(b, t, n, device=device), "C": torch.randn(b, t, n, device=device)}


def calls(device: str) -> dict[str, tuple[Op, dict[str, Tensor]]]:
    """Each operation with inputs that want gradients, by name; both kinds of kernels of the scan."""
    x, taps = torch.randn(2, 70, 40, device=device), torch.randn(40, 4, device=device)
    scan = functools.partial(ops.selective_scan, dt_softplus=True)
    h, p, n = 3, 64, 64
    heads = {name: torch.randn(2, 70, h, p, device=device) for name in ("x", "z")}
    heads |= {name: torch.randn(2, 70, n, device=device) for name in "BC"}
    heads |= {"dt": torch.randn(2, 70, h, device=device), "A": -torch.rand(h, device=device)}
    made = {
        "ssd": (functools.partial(ops.ssd, dt_softplus=True), heads),
        "ssd, bfloat16": (
            functools.partial(ops.ssd, dt_softplus=True),
            {k: v if k == "A" else v.bfloat16() for k, v in heads.items()},
        ),
        "gated_rms_norm": (
            lambda **x: (ops.gated_rms_norm(**x),),
            {"y": x, "z": x.flip(0), "weight": taps[:, 0].contiguous()},
        ),
        "causal_conv1d": (functools.partial(ops.causal_conv1d, activation="silu"), {"x": x, "weight": taps}),
        "rms_norm": (ops.rms_norm, {"x": x, "weight": taps[:, 0].contiguous(), "residual": torch.randn_like(x)}),
        "selective_scan": (scan, scan_inputs(device)),
        "selective_scan, complex": (scan, scan_inputs(device, "complex")),
    }
    return {name: (op, {k: v.requires_grad_() for k, v in given.items()}) for name, (op, given) in made.items()}


OPS = (
    "causal_conv1d", "rms_norm", "gated_rms_norm", "selective_scan", "selective_scan, complex", "ssd", "ssd, bfloat16",
)  # fmt: skip


def results(op: Op, given: dict[str, Tensor]) -> list[Tensor]:
    """Outputs and all gradients of their sum of squares."""
    out = op(**given)
    loss = sum((torch.view_as_real(y) if y.is_complex() else y).float().square().sum() for y in out)
    return [*out, *torch.autograd.grad(loss, list(given.values()))]


def same(got: list[Tensor], wanted: list[Tensor], bound: float = 0.0) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert (a.cpu() - b.cpu()).abs().max() <= bound * b.abs().max().cpu()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", OPS)
def test_tensors_of_another_device_than_the_current_one(name: str) -> None:
    torch.manual_seed(0)
    op, given = calls("cuda:0")[name]
    wanted = results(op, given)
    moved = {k: v.detach().to("cuda:1").requires_grad_() for k, v in given.items()}
    assert torch.cuda.current_device() == 0
    got = results(op, moved)
    assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in got)
    same(got, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_steps_on_another_device_than_the_current_one() -> None:
    torch.manual_seed(0)
    for kind in ("real", "complex"):
        x = scan_inputs("cuda:0", kind)
        token = {k: v[:, 0] if v.dim() == 3 else v for k, v in x.items()}
        token |= {k: v[:, None] for k, v in token.items() if k in "BC" and x[k].dim() == 3}
        states = [torch.zeros(2, 40, 8, dtype=x["A"].dtype, device=f"cuda:{i}") for i in (0, 1)]
        ys = [ops.selective_scan_step_(h, **{k: v.to(h.device) for k, v in token.items()}) for h in states]
        same([ys[1], states[1]], [ys[0], states[0]])
    x, taps = torch.randn(2, 40), torch.randn(40, 4)
    states = [torch.zeros(2, 3, 40, device=f"cuda:{i}") for i in (0, 1)]
    ys = [ops.causal_conv1d_step_(h, x.to(h.device), taps.to(h.device)) for h in states]
    same([ys[1], states[1]], [ys[0], states[0]])


@pytest.mark.parametrize("name", OPS)
def test_compiled_whole_it_is_eagers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the fenced buffers of other tests are no part of a graph
    op, given = calls(DEVICE)[name]
    compiled = torch.compile(lambda **x: op(**x), fullgraph=True, dynamic=False)
    same(results(compiled, given), results(op, given), 1e-6)


@pytest.mark.parametrize("kind", [Mamba, Mamba2])
def test_a_compiled_mamba_block_is_eagers(kind: type[Mixer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    layer, x = kind(64, device=DEVICE), torch.randn(2, 50, 64, device=DEVICE, requires_grad=True)
    leaves = [x, *layer.parameters()]

    def both(run: Op) -> list[Tensor]:
        y = run(x)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    same(both(torch.compile(layer, fullgraph=True)), both(layer), 1e-5)


def long_tensor(t: int, d: int, tail: int) -> Tensor:
    """(1, t, d) bfloat16 of more than 2^31 elements: zeros, and numbers in the last steps."""
    assert t * d > 2**31
    x = torch.zeros(1, t, d, dtype=torch.bfloat16, device=DEVICE)
    x[0, -tail:] = torch.randn(tail, d, device=DEVICE, dtype=torch.bfloat16)
    return x


@pytest.mark.parametrize("constant", [False, True], ids=["CUDA", "Triton"])
def test_a_scan_beyond_two_to_the_31(constant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # guard bytes would take as much memory again
    t, d, n, tail = 1_100_000, 2048, 1, 300
    u = long_tensor(t, d, tail).requires_grad_()
    A = torch.zeros(d, n, device=DEVICE)  # keeps everything, and zeros leave nothing behind
    B = torch.ones(d, n, device=DEVICE) if constant else torch.ones(1, t, n, device=DEVICE, dtype=torch.bfloat16)
    y, state = ops.selective_scan(u, torch.ones_like(u), A, B, B, backend="gpu")
    ones = B if constant else B[:, -tail:]
    short = u.detach()[:, -tail:].contiguous().requires_grad_()
    y_tail, state_tail = ops.selective_scan(short, torch.ones_like(short), A, ones, ones, backend="gpu")
    assert not y[0, : t - tail : 1000].any()
    same([y[:, -tail:], state], [y_tail, state_tail], 8e-3)  # a bit of bfloat16
    dy = torch.zeros_like(y)
    dy[:, -tail:] = torch.randn(tail, d, device=DEVICE)
    (du,) = torch.autograd.grad(y, u, dy)
    (du_tail,) = torch.autograd.grad(y_tail, short, dy[:, -tail:])
    same([du[:, -tail:]], [du_tail], 8e-3)


def test_norms_beyond_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x = long_tensor(1_100_000, 2048, 64)
    weight = torch.randn(2048, device=DEVICE)
    y, h = ops.rms_norm(x, weight, backend="gpu")
    wanted, _ = ops.rms_norm(x[:, -64:].contiguous(), weight, backend="gpu")
    assert torch.equal(y[:, -64:], wanted)
    assert torch.equal(h[:, -64:], x[:, -64:])
