"""Cases of one GPU for Mamba-2: its recurrence, block, training step and decoding step.

As cases_gpu.py, whose words apply. h head, p head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from benchmarks.cases import OURS, without_grad
from benchmarks.cases_gpu import BF16, DEVICE, Case, captured, gradients, language_model, training_step
from benchmarks.measure import Work
from torch import Tensor, nn

from stateline import ops, prepare_for_decode
from stateline.nn import Mamba2

ALL = ("causal_conv1d", "ssd", "rms_norm")


def cases() -> Iterator[Case]:
    """Every case."""
    for b, t, h, bars in ((8, 2048, 32, (0.3, 1.4)), (1, 65536, 32, (0.9, 3.0)), (4, 4096, 80, (0.55, 2.0))):
        yield from recurrence(b, t, h, 64, 128, bars)
    for b in (1, 64):
        yield recurrence_step(b, 80, 64, 128)
    yield from norm(16384, 2048)
    yield from block("Mamba-2", Mamba2, 8, 2048, 1024, ALL, (0.7, 2.8))
    for how in ("eager", "recorded"):
        make = lambda how=how: {OURS: training_step(768, 24, 8, 2048, how, "Mamba2")}  # noqa: E731
        yield Case(
            "Mamba-2 training step", f"d768 layers24 b8 t2048 {how}", make, (*ALL, "cross_entropy"), tokens=8 * 2048,
            bar=1e3 * 8 * 2048 / 270_000, many=True,
        )  # fmt: skip
    for b, bar, states in ((1, 2.6, None), (64, 10.5, None), (64, 7.0, BF16)):
        yield decoding(2560, 64, b, bar, states)


def leaves(b: int, t: int, h: int, p: int, n: int) -> dict[str, Tensor]:
    """As in a Mamba-2 layer: x, dt, B, C in bfloat16, the system in float32."""
    torch.manual_seed(0)
    x = {"x": torch.randn(b, t, h, p, device=DEVICE, dtype=BF16)}
    x["dt"] = F.softplus(torch.randn(b, t, h, device=DEVICE) - 4).to(BF16)
    x["A"] = -torch.exp(torch.rand(h, device=DEVICE) * 2.7)
    x |= {name: torch.randn(b, t, 1, n, device=DEVICE, dtype=BF16) / math.sqrt(n) for name in "BC"}
    return x | {"D": torch.randn(h, device=DEVICE)}


def recurrence(b: int, t: int, h: int, p: int, n: int, bars: tuple[float, float]) -> Iterator[Case]:
    """ssd on whole sequences."""

    def ours(**x: Tensor) -> Tensor:
        return ops.ssd(**x)[0]

    def forward() -> dict[str, Work]:
        x = leaves(b, t, h, p, n)
        return {OURS: without_grad(lambda: ours(**x))}

    shape, moved = f"b{b} t{t} h{h} p{p} n{n}", 2 * b * t
    yield Case("ssd fwd", shape, forward, ("ssd",), moved * (2 * h * p + h + 2 * n), tokens=b * t, bar=bars[0])
    yield Case(
        "ssd fwd+bwd", shape, lambda: {OURS: gradients(ours, leaves(b, t, h, p, n))}, ("ssd",),
        moved * (5 * h * p + 3 * h + 6 * n), tokens=b * t, bar=bars[1],
    )  # fmt: skip


def recurrence_step(b: int, h: int, p: int, n: int) -> Case:
    """One token of many streams."""

    def make() -> dict[str, Work]:
        x = leaves(b, 1, h, p, n)
        x = {name: v if name in ("A", "D") else v[:, 0].contiguous() for name, v in x.items()}
        state = torch.zeros(b, h, p, n, device=DEVICE)
        return {OURS: lambda: ops.ssd_step_(state, **x)}

    return Case("ssd step", f"b{b} h{h} p{p} n{n}", make, ("ssd",), 2 * b * h * p * n * 4, tokens=b)


def norm(rows: int, d: int) -> Iterator[Case]:
    """Gate and norm in one pass; torch's operations beside it."""

    def made() -> dict[str, Tensor]:
        torch.manual_seed(0)
        x = {name: torch.randn(rows, d, device=DEVICE, dtype=BF16) for name in "yz"}
        return x | {"weight": torch.randn(d, device=DEVICE, dtype=BF16)}

    def ours(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return ops.gated_rms_norm(y, z, weight)

    def theirs(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(y.float() * F.silu(z.float()), (d,), weight.float(), 1e-5).to(BF16)

    def forward() -> dict[str, Work]:
        x = made()
        return {OURS: without_grad(lambda: ours(**x)), "torch": without_grad(lambda: theirs(**x))}

    def both() -> dict[str, Work]:
        return {OURS: gradients(ours, made()), "torch": gradients(theirs, made())}

    shape, needs = f"rows{rows} d{d}", ("rms_norm",)
    yield Case("gated_rms_norm fwd", shape, forward, needs, 6 * rows * d)
    yield Case("gated_rms_norm fwd+bwd", shape, both, needs, 16 * rows * d)


def block(
    name: str, layer_type: Callable[..., nn.Module], b: int, t: int, d: int, needs: tuple[str, ...],
    bars: tuple[float, float],
) -> Iterator[Case]:  # fmt: skip
    """A block with its projections, weights in bfloat16."""

    def make(backward: bool) -> dict[str, Work]:
        torch.manual_seed(0)
        layer, x = layer_type(d, device=DEVICE, dtype=BF16), torch.randn(b, t, d, device=DEVICE, dtype=BF16)
        if not backward:
            return {OURS: without_grad(lambda: layer(x))}
        given, dy = [x.requires_grad_(), *layer.parameters()], torch.randn_like(x)
        return {OURS: lambda: torch.autograd.grad(layer(x), given, dy)}

    shape = f"b{b} t{t} d{d}"
    yield Case(f"{name} block fwd", shape, lambda: make(False), needs, tokens=b * t, bar=bars[0])
    yield Case(f"{name} block fwd+bwd", shape, lambda: make(True), needs, tokens=b * t, bar=bars[1])


def decoding(d: int, layers: int, b: int, bar: float, states: torch.dtype | None) -> Case:
    """One token of every stream by a captured graph: packed, in one call, and as loaded, layer by layer."""

    def make() -> dict[str, Work]:
        plain = language_model(d, layers, "Mamba2").eval()
        plain.state_dtype = states
        models = {f"{OURS}, {form} packed": prepare_for_decode(plain, form) for form in ("bf16", "int8", "int4")}
        return {name: captured(model, b) for name, model in (models | {f"{OURS}, layer by layer": plain}).items()}

    inner, n = 2 * d, 128
    weights = 2 * (50280 * d + layers * d * (3 * inner + 2 * n + inner // 64))
    kept = b * layers * (inner * n * (4 if states is None else 2) + 3 * (inner + 2 * n) * 4) * 2
    shape = f"d{d} layers{layers} b{b}" + ("" if states is None else " bfloat16 states")
    return Case("Mamba-2 decoding step", shape, make, ALL, weights + kept, tokens=b, bar=bar)
