"""Timing cases of the CPU operations, at the shapes of Mamba 130M and 2.8B blocks: (name, shape, callable) each.

b batch, t time step, d channel, n state, k taps, h head, p head width, r rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stateline import ops

Case = tuple[str, str, Callable[[], object]]


def cases() -> Iterator[Case]:
    """Yield every case; inputs are built when a case is asked for."""
    for dtype in (torch.float32, torch.bfloat16):
        yield from _scan(1, 2048, 1536, 16, dtype)
        yield from _ssd(1, 2048, 24, 64, 128, dtype)
        yield from _trapezoid(1, 2048, 24, 64, 128, 1, dtype)
        yield from _trapezoid(1, 2048, 24, 64, 128, 4, dtype)
        yield from _conv(1, 2048, 1536, 4, dtype)
        yield from _norm(2048, 768, dtype)
    yield from _scan_step(1, 1536, 16)
    yield from _scan_step(64, 5120, 16)
    yield from _ssd_step(1, 24, 64, 128)
    yield from _ssd_step(64, 80, 64, 128)
    yield from _trapezoid_step(1, 24, 64, 128, 1)
    yield from _trapezoid_step(64, 80, 64, 128, 1)
    yield from _conv_step(1, 1536, 4)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _passes(
    run: Callable[..., tuple[Tensor, Any]], inputs: dict[str, Any]
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Of an operation: itself alone, and with the gradients of all its inputs, tensors each."""

    def forward() -> object:
        with torch.no_grad():
            return run(**inputs)

    leaves = {name: v.clone().requires_grad_() for name, v in inputs.items()}
    dy = torch.randn_like(run(**inputs)[0])

    def both() -> object:
        y, _ = run(**leaves)
        return torch.autograd.grad(y, list(leaves.values()), dy)

    return forward, both


def _scan_inputs(b: int, t: int, d: int, n: int, dtype: torch.dtype) -> dict[str, Any]:
    """Inputs as a trained model has them: dt around 0.01, A from -1 to -n."""
    torch.manual_seed(0)
    u, z = (torch.randn(b, t, d).to(dtype) for _ in range(2))
    dt = (torch.randn(b, t, d) * 0.5).to(dtype)
    A = -torch.arange(1.0, n + 1).expand(d, n).contiguous()
    B, C = (torch.randn(b, t, n).to(dtype) for _ in range(2))
    bias = torch.log(torch.expm1(torch.exp(torch.rand(d) * 4.6 - 6.9)))
    return {"u": u, "dt": dt, "A": A, "B": B, "C": C, "D": torch.ones(d), "z": z, "dt_bias": bias}


def _scan(b: int, t: int, d: int, n: int, dtype: torch.dtype) -> Iterator[Case]:
    shape = f"b{b} d{d} t{t} n{n} {_name(dtype)}"
    run = functools.partial(ops.selective_scan, dt_softplus=True)
    forward, both = _passes(run, _scan_inputs(b, t, d, n, dtype))
    yield "selective_scan fwd", shape, forward
    yield "selective_scan fwd+bwd", shape, both


def _ssd_inputs(b: int, t: int, h: int, p: int, n: int, dtype: torch.dtype) -> dict[str, Any]:
    """Inputs as a Mamba-2 layer at its initial values has them, one group of B and C."""
    torch.manual_seed(0)
    x, z = (torch.randn(b, t, h, p).to(dtype) for _ in range(2))
    B, C = (torch.randn(b, t, 1, n).to(dtype) for _ in range(2))
    dt = (torch.randn(b, t, h) * 0.5).to(dtype)
    bias = torch.log(torch.expm1(torch.exp(torch.rand(h) * 4.6 - 6.9)))
    A = -1 - 15 * torch.rand(h)
    return {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": torch.ones(h), "z": z, "dt_bias": bias}


def _ssd(b: int, t: int, h: int, p: int, n: int, dtype: torch.dtype) -> Iterator[Case]:
    shape = f"b{b} h{h} p{p} t{t} n{n} {_name(dtype)}"
    inputs = _ssd_inputs(b, t, h, p, n, dtype)
    for backend, name in ((None, "ssd"), ("chunked", "ssd, chunked in PyTorch")):
        forward, both = _passes(functools.partial(ops.ssd, dt_softplus=True, backend=backend), inputs)
        yield f"{name} fwd", shape, forward
        yield f"{name} fwd+bwd", shape, both


def _ssd_step(b: int, h: int, p: int, n: int) -> Iterator[Case]:
    token = {k: v if v.dim() == 1 else v[:, 0] for k, v in _ssd_inputs(b, 1, h, p, n, torch.float32).items()}
    state = torch.zeros(b, h, p, n)
    yield "ssd step", f"b{b} h{h} p{p} n{n} float32", lambda: ops.ssd_step_(state, **token, dt_softplus=True)


def _trapezoid_inputs(b: int, t: int, h: int, p: int, n: int, r: int, dtype: torch.dtype) -> dict[str, Any]:
    """Inputs as a Mamba-3 layer at its initial values has them, half the states turning, with its gate."""
    torch.manual_seed(0)
    x, z = (torch.randn(b, t, h, p).to(dtype) for _ in range(2))
    B, C = (torch.randn(b, t, r, 1, n).to(dtype) for _ in range(2))
    dt = F.softplus(torch.randn(b, t, h) * 0.5 - 4)
    mixes = {name: torch.full((h, r, p), 1 / r) for name in ("mix", "z_mix", "y_mix") if r > 1}
    tokens = {"x": x, "dt": dt, "A": -1 - torch.rand(b, t, h), "blend": torch.rand(b, t, h), "B": B, "C": C, "z": z}
    rates, one = torch.randn(b, t, n // 4).tanh() / 2, torch.ones(h, r, n)
    return {**tokens, "rates": rates, "B_bias": one, "C_bias": one, "D": torch.ones(h), **mixes}


def _trapezoid(b: int, t: int, h: int, p: int, n: int, r: int, dtype: torch.dtype) -> Iterator[Case]:
    shape = f"b{b} h{h} p{p} t{t} n{n} r{r} {_name(dtype)}"
    inputs = _trapezoid_inputs(b, t, h, p, n, r, dtype)
    for backend, name in ((None, "trapezoid_ssd"), ("chunked", "trapezoid_ssd, chunked in PyTorch")):
        forward, both = _passes(functools.partial(ops.trapezoid_ssd, backend=backend), inputs)
        yield f"{name} fwd", shape, forward
        yield f"{name} fwd+bwd", shape, both


def _trapezoid_step(b: int, h: int, p: int, n: int, r: int) -> Iterator[Case]:
    whole = ("B_bias", "C_bias", "D", "mix", "z_mix", "y_mix")
    inputs = _trapezoid_inputs(b, 1, h, p, n, r, torch.float32)
    token = {k: v if k in whole else v[:, 0] for k, v in inputs.items()}
    state = (torch.zeros(b, h, n // 4), torch.zeros(b, h, p, n), torch.zeros(b, h, r, n), torch.zeros(b, h, p))
    shape = f"b{b} h{h} p{p} n{n} r{r} float32"
    yield "trapezoid_ssd step", shape, lambda: ops.trapezoid_ssd_step_(state, **token)


def _conv(b: int, t: int, d: int, k: int, dtype: torch.dtype) -> Iterator[Case]:
    shape = f"b{b} d{d} t{t} k{k} {_name(dtype)}"
    x, weight, bias = torch.randn(b, t, d).to(dtype), torch.randn(d, k), torch.randn(d)

    def forward() -> object:
        with torch.no_grad():
            return ops.causal_conv1d(x, weight, bias, activation="silu")

    leaves = [v.clone().requires_grad_() for v in (x, weight, bias)]
    dy = torch.randn_like(x)

    def both() -> object:
        y, _ = ops.causal_conv1d(*leaves, activation="silu")
        return torch.autograd.grad(y, leaves, dy)

    yield "causal_conv1d+silu fwd", shape, forward
    yield "causal_conv1d+silu fwd+bwd", shape, both


def _norm(rows: int, d: int, dtype: torch.dtype) -> Iterator[Case]:
    shape = f"rows{rows} d{d} {_name(dtype)}"
    x, residual, weight = torch.randn(rows, d).to(dtype), torch.randn(rows, d), torch.randn(d)

    def forward() -> object:
        with torch.no_grad():
            return ops.rms_norm(x, weight, residual=residual, residual_dtype=torch.float32)

    leaves = [v.clone().requires_grad_() for v in (x, weight, residual)]
    grads = torch.randn_like(x), torch.randn_like(residual)

    def both() -> object:
        x, weight, residual = leaves
        out = ops.rms_norm(x, weight, residual=residual, residual_dtype=torch.float32)
        return torch.autograd.grad(out, leaves, grads)

    yield "add+rms_norm fwd", shape, forward
    yield "add+rms_norm fwd+bwd", shape, both


def _scan_step(b: int, d: int, n: int) -> Iterator[Case]:
    inputs = _scan_inputs(b, 1, d, n, torch.float32)
    token = {k: v if k in ("A", "D", "dt_bias") else v[:, 0] for k, v in inputs.items()}
    token["B"], token["C"] = (token[k][:, None] for k in ("B", "C"))
    state = torch.zeros(b, d, n)
    yield (
        "selective_scan step",
        f"b{b} d{d} n{n} float32",
        lambda: ops.selective_scan_step_(state, **token, dt_softplus=True),
    )


def _conv_step(b: int, d: int, k: int) -> Iterator[Case]:
    x, weight, bias, state = torch.randn(b, d), torch.randn(d, k), torch.randn(d), torch.zeros(b, k - 1, d)
    yield (
        "causal_conv1d step",
        f"b{b} d{d} k{k} float32",
        lambda: F.silu(ops.causal_conv1d_step_(state, x, weight, bias)),
    )
