"""Cases of one GPU for Mamba-3: its recurrence, whole and by a token, and its block.

As cases_gpu.py, whose words apply. h head, p head width, s pairs of states that turn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from benchmarks.cases import OURS, without_grad
from benchmarks.cases_gpu import BF16, DEVICE, Case, gradients
from benchmarks.cases_gpu_mamba2 import block
from benchmarks.measure import Work
from torch import Tensor

from stateline import ops
from stateline.nn import Mamba3

OP = "trapezoid_ssd"


def cases() -> Iterator[Case]:
    """Every case."""
    for b, t, h in ((8, 2048, 32), (1, 65536, 32)):
        yield from recurrence(b, t, h, 64, 128, 32)
    for b in (1, 64):
        yield recurrence_step(b, 32, 64, 128, 32)
    yield from block("Mamba-3", Mamba3, 8, 2048, 1024, (OP, "rms_norm"), (1.0, 3.5))


def leaves(b: int, t: int, h: int, p: int, n: int, s: int) -> dict[str, Tensor]:
    """As in a Mamba-3 layer: x, z, B, C in bfloat16, the system in float32."""
    torch.manual_seed(0)
    x = {name: torch.randn(b, t, h, p, device=DEVICE, dtype=BF16) for name in "xz"}
    x["dt"] = F.softplus(torch.randn(b, t, h, device=DEVICE) - 4)
    x["A"] = -torch.exp(torch.rand(b, t, h, device=DEVICE) * 2.7)
    x["blend"] = torch.rand(b, t, h, device=DEVICE)
    x |= {name: torch.randn(b, t, 1, n, device=DEVICE, dtype=BF16) / math.sqrt(n) for name in "BC"}
    x["rates"] = torch.rand(b, t, s, device=DEVICE) - 0.5
    x |= {f"{name}_bias": torch.randn(h, 1, n, device=DEVICE) / math.sqrt(n) for name in "BC"}
    return x | {"D": torch.randn(h, device=DEVICE)}


def recurrence(b: int, t: int, h: int, p: int, n: int, s: int) -> Iterator[Case]:
    """trapezoid_ssd on whole sequences."""

    def ours(**x: Tensor) -> Tensor:
        return ops.trapezoid_ssd(**x)[0]

    def forward() -> dict[str, Work]:
        x = leaves(b, t, h, p, n, s)
        return {OURS: without_grad(lambda: ours(**x))}

    shape, moved = f"b{b} t{t} h{h} p{p} n{n}", 2 * b * t
    yield Case(f"{OP} fwd", shape, forward, (OP,), moved * (3 * h * p + 2 * n + 6 * h + 2 * s), tokens=b * t)
    yield Case(
        f"{OP} fwd+bwd", shape, lambda: {OURS: gradients(ours, leaves(b, t, h, p, n, s))}, (OP,),
        moved * (8 * h * p + 6 * n + 18 * h + 6 * s), tokens=b * t,
    )  # fmt: skip


def recurrence_step(b: int, h: int, p: int, n: int, s: int) -> Case:
    """One token of many streams."""

    def make() -> dict[str, Work]:
        x = leaves(b, 1, h, p, n, s)
        x = {name: v if name in ("D", "B_bias", "C_bias") else v[:, 0].contiguous() for name, v in x.items()}
        state = tuple(torch.zeros(b, *shape, device=DEVICE) for shape in ((h, s), (h, p, n), (h, 1, n), (h, p)))
        return {OURS: lambda: ops.trapezoid_ssd_step_(state, **x)}

    return Case(f"{OP} step", f"b{b} h{h} p{p} n{n}", make, (OP,), 2 * b * h * p * n * 4, tokens=b)
