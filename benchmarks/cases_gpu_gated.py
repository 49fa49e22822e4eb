"""Cases of one GPU for gated_scan: its recurrence beside cuDNN's GRU of the same width, which has projections besides.

As cases_gpu.py, whose words apply. n numbers in the state.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from benchmarks.cases import OURS, without_grad
from benchmarks.cases_gpu import DEVICE, Case
from benchmarks.measure import Work
from torch import Tensor, nn

from stateline import ops

KINDS = (("diagonal", "identity"), ("diagonal", "tanh"), ("dense", "tanh"))


def cases() -> Iterator[Case]:
    """Forward, and forward and gradient, in float32."""
    for b, t, n in ((8, 2048, 64), (8, 2048, 128), (64, 2048, 128), (8, 16384, 1024)):
        for transition, activation in KINDS:
            if transition == "diagonal" or n <= 128:
                yield from recurrence(b, t, n, transition, activation)


def recurrence(b: int, t: int, n: int, transition: str, activation: str) -> Iterator[Case]:
    """gated_scan on whole sequences; floors count v, g and h, in the gradient also dh, dv and dg, once each."""

    def leaves() -> list[Tensor]:
        torch.manual_seed(0)
        v, g = torch.randn(b, t, n, device=DEVICE), torch.rand(b, t, n, device=DEVICE)
        A = torch.rand(n, device=DEVICE)
        if transition == "dense":
            A = torch.linalg.qr(torch.randn(n, n, device=DEVICE))[0].contiguous()
        return [v, g, A]

    def gru() -> tuple[nn.GRU, Tensor]:
        return nn.GRU(n, n, batch_first=True, device=DEVICE), torch.randn(b, t, n, device=DEVICE, requires_grad=True)

    def forward() -> dict[str, Work]:
        x, (layer, u) = leaves(), gru()
        work = {OURS: without_grad(lambda: ops.gated_scan(*x, activation=activation)[0])}
        return work | ({"torch.nn.GRU": without_grad(lambda: layer(u)[0])} if transition == "dense" else {})

    def both() -> dict[str, Work]:
        x, (layer, u) = [v.requires_grad_() for v in leaves()], gru()
        dy = torch.randn(b, t, n, device=DEVICE)
        inputs = [u, *layer.parameters()]
        work: dict[str, Work] = {OURS: lambda: torch.autograd.grad(ops.gated_scan(*x, activation=activation)[0], x, dy)}
        peer: dict[str, Work] = {"torch.nn.GRU": lambda: torch.autograd.grad(layer(u)[0], inputs, dy)}
        return work | (peer if transition == "dense" else {})

    name, shape, size = f"gated_scan, {transition} A, {activation}", f"b{b} t{t} n{n}", 4 * b * t * n
    yield Case(name, shape, forward, ("gated_scan",), bytes=3 * size, tokens=b * t)
    yield Case(f"{name}, forward + backward", shape, both, ("gated_scan",), bytes=9 * size, tokens=b * t)
