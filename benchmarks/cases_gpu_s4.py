"""Cases of one GPU: S4's kernels and the S4D block beside the plain PyTorch formulas, which hold (states × steps).

b batch, t time step, h channel, n complex state (half of d_state), r read-out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from benchmarks.cases import OURS
from benchmarks.cases_gpu import DEVICE, Case
from benchmarks.cases_s4 import PLAIN, Plain, fft, poles, vandermonde
from torch import Tensor

from stateline import ops
from stateline.nn import S4D


def structured() -> Iterator[Case]:
    """Yield every case; inputs are built when a case is asked for."""
    b, h, n, t = 8, 512, 32, 16384
    for back in (False, True):
        name = "fwd+bwd" if back else "fwd"
        yield Case(
            f"s4_kernel {name}", f"h{h} n{2 * n} t{t}", lambda back=back: _kernel(h, n, t, back), bytes=4 * h * t
        )
        yield Case(f"s4_cauchy {name}", f"r4 h{h} n{2 * n} t{t}", lambda back=back: _cauchy(h, n, t, back))
    yield Case("s4 kernel and convolution", f"b{b} h{h} n{2 * n} t{t}", lambda: _convolution(b, h, n, t), tokens=b * t)
    for back in (False, True):
        name = "fwd+bwd" if back else "fwd"
        for length in (4096, 16384):
            yield Case(
                f"S4D block {name}", f"b8 h256 t{length}", lambda back=back, t=length: _block(8, 256, t, back),
                tokens=8 * length, many=True,
            )  # fmt: skip


def _both(run: Callable[..., Tensor], leaves: tuple[Tensor, ...], back: bool) -> Callable[[], object]:
    if not back:
        return lambda: run(*leaves)
    given = tuple(x.detach().requires_grad_() for x in leaves)
    g = torch.randn_like(run(*leaves))
    return lambda: torch.autograd.grad(run(*given), given, g)


def _kernel(h: int, n: int, t: int, back: bool) -> dict[str, Callable[[], object]]:
    z, c = poles(h, n).to(DEVICE), torch.randn(1, h, n, dtype=torch.complex64, device=DEVICE)
    plain = (c[0], z.to(torch.complex64))
    return {
        OURS: _both(lambda c, z: ops.s4_kernel(c, z, t, backend="gpu"), (c, z), back),
        PLAIN: _both(lambda c, z: vandermonde(c, z, t), plain, back),
    }


def _cauchy(h: int, n: int, t: int, back: bool) -> dict[str, Callable[[], object]]:
    w, v = poles(h, n).to(DEVICE), torch.randn(4, h, n, dtype=torch.complex128, device=DEVICE)

    def run(v: Tensor, w: Tensor) -> Tensor:
        return torch.view_as_real(ops.s4_cauchy(v, w, t, backend="gpu"))

    return {OURS: _both(run, (v, w), back)}


def _convolution(b: int, h: int, n: int, t: int) -> dict[str, Callable[[], object]]:
    z, c = poles(h, n).to(DEVICE), torch.randn(1, h, n, dtype=torch.complex64, device=DEVICE)
    u, narrow = torch.randn(b, h, t, device=DEVICE), z.to(torch.complex64)
    return {
        OURS: lambda: fft(u, ops.s4_kernel(c, z, t, backend="gpu")[0]),
        PLAIN: lambda: fft(u, vandermonde(c[0], narrow, t)),
    }


def _block(b: int, h: int, t: int, back: bool) -> dict[str, Callable[[], object]]:
    x = torch.randn(b, t, h, device=DEVICE)
    layers = {f"{OURS}, {mode}": S4D(h, mode=mode, device=DEVICE) for mode in ("scan", "convolution")}

    def work(layer: torch.nn.Module) -> Callable[[], object]:
        def run() -> object:
            with torch.set_grad_enabled(back):
                y: Tensor = layer(x)
            return y.square().mean().backward() if back else y

        return run

    return {name: work(layer) for name, layer in (layers | {PLAIN: Plain(h, 32).to(DEVICE)}).items()}
