"""Timing cases of S4's kernels and layers beside the plain PyTorch formulas, which hold (states × steps).

b batch, t time step, h channel, n complex state (half of d_state).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.cases import OURS, Case
from torch import Tensor, nn

from stateline import ops
from stateline.nn import S4D

PLAIN = "plain PyTorch"
Run = Callable[[], object]


def structured() -> Iterator[Case]:
    """Yield every case; inputs are built when a case is asked for."""
    yield Case("s4 kernel and convolution", "b8 h512 n64 t16384", "float32", lambda _: _kernel(8, 512, 32, 16384))
    b, h, t = 8, 256, 4096
    for name, back in (("S4D forward", False), ("S4D forward and backward", True)):
        yield Case(name, f"b{b} h{h} t{t}", "float32", lambda _, back=back: _block(b, h, t, back))
    for rows in (1, 8):
        yield Case("S4D stream by 256", f"b{rows} h{h} t{t}", "float32", lambda _, rows=rows: _stream(rows, h, t))


def poles(h: int, n: int) -> Tensor:
    """Δ·A (h, n) complex128 as layers have it at first."""
    dt = torch.exp(torch.rand(h, 1, dtype=torch.float64) * math.log(100) + math.log(1e-3))
    return dt * torch.complex(torch.tensor(-0.5, dtype=torch.float64), math.pi * torch.arange(n, dtype=torch.float64))


def fft(u: Tensor, kernel: Tensor) -> Tensor:
    """u (b, h, t), kernel (h, t) -> (b, h, t)."""
    t = u.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(u, n=2 * t) * torch.fft.rfft(kernel, n=2 * t), n=2 * t)[..., :t]


def vandermonde(c: Tensor, z: Tensor, t: int) -> Tensor:
    """The kernel (h, t) by its formula, through the matrix of states and steps (h, n, t)."""
    return 2 * torch.einsum("hn,hnl->hl", c, torch.exp(z[..., None] * torch.arange(t, device=z.device))).real


def _kernel(b: int, h: int, n: int, t: int) -> dict[str, Run]:
    z, c, u = poles(h, n), torch.randn(1, h, n, dtype=torch.complex64), torch.randn(b, h, t)
    inputs, one, reads = u.mT.contiguous(), torch.ones_like(z), c.to(torch.complex128)
    return {
        OURS: lambda: ops.s4_scan(inputs, z.exp(), one, reads),
        "s4_kernel and FFT": lambda: fft(u, ops.s4_kernel(c, z, t)[0]),
        PLAIN: lambda: fft(u, vandermonde(c[0], z.to(torch.complex64), t)),
    }


class Plain(nn.Module):
    """S4D as a few lines of PyTorch."""

    def __init__(self, h: int, n: int) -> None:
        super().__init__()
        self.C = nn.Parameter(torch.randn(h, n, 2) * 0.5**0.5)
        self.log_dt = nn.Parameter(torch.rand(h, 1) * math.log(100) + math.log(1e-3))
        self.log_A_real = nn.Parameter(torch.full((h, n), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(n).float().repeat(h, 1))
        self.D = nn.Parameter(torch.randn(h))
        self.out = nn.Linear(h, 2 * h)

    def forward(self, x: Tensor) -> Tensor:
        A, u = torch.complex(-self.log_A_real.exp(), self.A_imag), x.mT
        z = A * self.log_dt.exp()
        kernel = vandermonde(torch.view_as_complex(self.C) * (z.exp() - 1) / A, z, x.shape[1])
        return F.glu(self.out(F.gelu(fft(u, kernel) + u * self.D[:, None]).mT))


def _block(b: int, h: int, t: int, back: bool) -> dict[str, Run]:
    x = torch.randn(b, t, h, requires_grad=True)
    convolution = S4D(h, mode="convolution")

    def passes(layer: nn.Module) -> Run:
        def run() -> object:
            with torch.set_grad_enabled(back):
                y: Any = layer(x)
            return y.square().mean().backward() if back else y

        return run

    return {OURS: passes(S4D(h)), "mode='convolution'": passes(convolution), PLAIN: passes(Plain(h, 32))}


def _stream(b: int, h: int, t: int) -> dict[str, Run]:
    layer, x = S4D(h).eval(), torch.randn(b, t, h)

    def pieces() -> None:
        state = layer.init_state(b)
        with torch.no_grad():
            for piece in x.split(256, 1):
                _, state = layer.extend(piece, state)

    def whole() -> None:
        with torch.no_grad():
            layer(x)

    return {OURS: pieces, "the whole at once": whole}
