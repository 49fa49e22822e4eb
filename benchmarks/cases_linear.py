"""Cases of time-invariant systems on a CPU: long convolutions, kernels fused into one, streaming, the scan by itself.

Beside the formulas that one would write in plain PyTorch: products of Fourier transforms, and a scan by doubling.
b batch, t time step, d channel, l taps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from benchmarks.cases import OURS, Case, with_backward, without_grad
from benchmarks.measure import Work
from torch import Tensor

from stateline import ops

CHUNK = 256  # tokens of a piece of a stream
PLAIN = "plain PyTorch"


def linear() -> Iterator[Case]:
    """Every case, cheapest first."""
    yield from scan(2, 4096, 256, torch.float32, constant=False)
    yield from scan(2, 4096, 128, torch.complex64, constant=True)
    yield from convolution(2, 4096, 256, 16)
    yield from convolution(2, 4096, 256, 256)
    yield from convolution(2, 4096, 256, 4096)
    yield from convolution(1, 16384, 512, 16384)
    for taps in (16, 64, 256, 1024, 4096):
        yield streaming(2, 16384, 128, taps)
    yield from fusion(8, 4096, 128)


def doubling_scan(a: Tensor, b: Tensor) -> Tensor:
    """h[t] = a[t] h[t-1] + b[t] in log2(t) steps: after each, a step stands for twice as many before it."""
    reach = 1
    while reach < b.shape[1]:
        b = torch.cat([b[:, :reach], b[:, reach:] + a[:, reach:] * b[:, :-reach]], 1)
        a = torch.cat([a[:, :reach], a[:, reach:] * a[:, :-reach]], 1)
        reach *= 2
    return b


def fft_convolution(u: Tensor, k: Tensor) -> Tensor:
    """The formula, with transforms of exactly t + l places."""
    n = u.shape[1] + k.shape[1]
    y = torch.fft.irfft(torch.fft.rfft(u.mT, n=n) * torch.fft.rfft(k, n=n), n=n)
    return y[..., : u.shape[1]].mT


def scan(b: int, t: int, d: int, dtype: torch.dtype, *, constant: bool) -> Iterator[Case]:
    """The recurrence alone; a constant one in plain PyTorch as a convolution with powers of its decays."""
    torch.manual_seed(0)
    a = torch.rand(d if constant else (b, t, d)) * 0.2 + 0.8
    a = torch.polar(a, torch.rand_like(a)) if dtype.is_complex else a
    leaves = {"a": a, "b": torch.randn(b, t, d, dtype=dtype)}

    def ours(a: Tensor, b: Tensor) -> Tensor:
        return ops.linear_scan(a, b)[0]

    def powers(a: Tensor, b: Tensor) -> Tensor:
        k = a[:, None] ** torch.arange(t)
        f = torch.fft.fft(b.mT, n=2 * t) * torch.fft.fft(k, n=2 * t)
        return torch.fft.ifft(f)[..., :t].mT

    plain = powers if constant else doubling_scan
    shape = f"b{b} t{t} d{d} {'constant' if constant else 'per token'}"
    kind = str(dtype).removeprefix("torch.")

    def real(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return (lambda a, b: torch.view_as_real(run(a, b))) if dtype.is_complex else run

    yield from _both("linear_scan", shape, kind, leaves, {OURS: real(ours), PLAIN: real(plain)}, b * t)


def convolution(b: int, t: int, d: int, taps: int) -> Iterator[Case]:
    """A kernel a channel, of few taps and of as many as there are tokens."""
    torch.manual_seed(0)
    leaves = {"u": torch.randn(b, t, d), "k": torch.randn(d, taps) / taps}

    def ours(u: Tensor, k: Tensor) -> Tensor:
        return ops.long_conv(u, k)[0]

    def grouped(u: Tensor, k: Tensor) -> Tensor:
        padded = F.pad(u.mT, (taps - 1, 0))
        return F.conv1d(padded, k.flip(1)[:, None], groups=d).mT

    runs: dict[str, Callable[..., Tensor]] = {OURS: ours, PLAIN: fft_convolution}
    if taps <= 256:
        runs["torch conv1d"] = grouped
    yield from _both("long_conv", f"b{b} t{t} d{d} l{taps}", "float32", leaves, runs, b * t)


def streaming(b: int, t: int, d: int, taps: int) -> Case:
    """A sequence in one piece, and in chunks that hand a state on."""
    torch.manual_seed(0)
    u, k = torch.randn(b, t, d), torch.randn(d, taps) / taps

    def chunks() -> None:
        state = None
        for piece in u.split(CHUNK, 1):
            _, state = ops.long_conv(piece, k, initial_state=state)

    def make(_: bool) -> dict[str, Work]:
        whole = without_grad(lambda: ops.long_conv(u, k))
        return {"whole": whole, f"in chunks of {CHUNK}": without_grad(chunks)}

    return Case("long_conv stream", f"b{b} t{t} d{d} l{taps}", "float32", make, b * t)


def fusion(b: int, t: int, d: int) -> Iterator[Case]:
    """Kernels made one beforehand, or in the call as in training, beside running them apart."""
    torch.manual_seed(0)
    u = torch.randn(b, t, d)
    one_after_another = [torch.randn(d, taps) / taps for taps in (512, 1024, 2048)]
    branches = [torch.randn(d, taps) / taps for taps in (64, 512, t)]

    def apart_cascade() -> Tensor:
        y = u
        for k in one_after_another:
            y, _ = ops.long_conv(y, k)
        return y

    def made(fuse: Callable[..., Tensor], kernels: list[Tensor], apart: Work) -> Callable[[bool], dict[str, Work]]:
        def make(_: bool) -> dict[str, Work]:
            fused = fuse(*kernels)
            return {
                "fused beforehand": without_grad(lambda: ops.long_conv(u, fused)),
                "fused in the call": without_grad(lambda: ops.long_conv(u, fuse(*kernels))),
                "apart": without_grad(apart),
            }

        return make

    shape = f"b{b} t{t} d{d}"
    cascade = made(ops.fuse_cascade, one_after_another, apart_cascade)
    yield Case("fuse_cascade", f"{shape} l512, l1024, l2048", "float32", cascade, b * t)
    parallel = made(ops.fuse_parallel, branches, lambda: sum(ops.long_conv(u, k)[0] for k in branches))
    yield Case("fuse_parallel", f"{shape} l64, l512, l{t}", "float32", parallel, b * t)


def _both(
    op: str, shape: str, dtype: str, leaves: dict[str, Tensor], runs: dict[str, Callable[..., Tensor]], tokens: int
) -> Iterator[Case]:
    def forward(_: bool) -> dict[str, Work]:
        return {name: without_grad(lambda run=run: run(**leaves)) for name, run in runs.items()}

    def backward(_: bool) -> dict[str, Work]:
        return {name: with_backward(run, leaves) for name, run in runs.items()}

    yield Case(op, shape, dtype, forward, tokens)
    yield Case(f"{op} forward+backward", shape, dtype, backward, tokens)
