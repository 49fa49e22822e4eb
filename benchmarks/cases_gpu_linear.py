"""Cases of time-invariant systems on a GPU: the linear scan beside the bytes it must move, and long convolutions.

As cases_gpu.py, whose words apply; the formulas beside them are those of cases_linear.py. l taps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from benchmarks.cases import OURS, without_grad
from benchmarks.cases_gpu import BF16, DEVICE, Case, gradients
from benchmarks.cases_linear import CHUNK, PLAIN, doubling_scan, fft_convolution
from benchmarks.measure import Work
from torch import Tensor

from stateline import ops


def linear() -> Iterator[Case]:
    """Every case."""
    yield from scan(8, 2048, 2048, torch.float32)
    yield from scan(1, 65536, 512, BF16)
    yield from scan(8, 4096, 256, torch.complex64)
    for b, t, d, taps in ((8, 2048, 2048, 16), (8, 4096, 512, 256), (8, 16384, 512, 16384)):
        yield from convolution(b, t, d, taps)
    yield streaming(8, 16384, 512, 1024)


def scan(b: int, t: int, d: int, dtype: torch.dtype) -> Iterator[Case]:
    """The recurrence alone, decays per token; constant ones where it is complex, as in a time-invariant layer."""

    def leaves() -> dict[str, Tensor]:
        torch.manual_seed(0)
        a = torch.rand(d if dtype.is_complex else (b, t, d), device=DEVICE) * 0.2 + 0.8
        a = torch.polar(a, torch.rand_like(a)) if dtype.is_complex else a
        return {"a": a, "b": torch.randn(b, t, d, dtype=dtype, device=DEVICE)}

    def ours(a: Tensor, b: Tensor) -> Tensor:
        return ops.linear_scan(a, b)[0]

    def plain(a: Tensor, b: Tensor) -> Tensor:
        return doubling_scan(a.expand(b.shape), b)

    yield from _both("linear_scan", f"b{b} t{t} d{d} {str(dtype)[6:]}", leaves, {OURS: ours, PLAIN: plain})


def convolution(b: int, t: int, d: int, taps: int) -> Iterator[Case]:
    """A kernel a channel."""

    def leaves() -> dict[str, Tensor]:
        torch.manual_seed(0)
        return {"u": torch.randn(b, t, d, device=DEVICE), "k": torch.randn(d, taps, device=DEVICE) / taps}

    def ours(u: Tensor, k: Tensor) -> Tensor:
        return ops.long_conv(u, k)[0]

    yield from _both("long_conv", f"b{b} t{t} d{d} l{taps}", leaves, {OURS: ours, PLAIN: fft_convolution})


def streaming(b: int, t: int, d: int, taps: int) -> Case:
    """A sequence in one piece, and in chunks that hand a state on."""

    def make() -> dict[str, Work]:
        torch.manual_seed(0)
        u, k = torch.randn(b, t, d, device=DEVICE), torch.randn(d, taps, device=DEVICE) / taps

        def chunks() -> None:
            state = None
            for piece in u.split(CHUNK, 1):
                _, state = ops.long_conv(piece, k, initial_state=state)

        whole = without_grad(lambda: ops.long_conv(u, k))
        return {"whole": whole, f"in chunks of {CHUNK}": without_grad(chunks)}

    return Case(
        "long_conv stream", f"b{b} t{t} d{d} l{taps}", make, ("long_conv",), tokens=b * t, many=True, dtype="float32"
    )


def _both(
    op: str, shape: str, leaves: Callable[[], dict[str, Tensor]], runs: dict[str, Callable[..., Tensor]]
) -> Iterator[Case]:
    def forward() -> dict[str, Work]:
        x = leaves()
        return {name: without_grad(lambda run=run: run(**x)) for name, run in runs.items()}

    def backward() -> dict[str, Work]:
        return {name: gradients(run, leaves()) for name, run in runs.items()}

    dtype = next((name for name in ("bfloat16", "complex64") if name in shape), "float32")
    yield Case(f"{op} fwd", shape, forward, (op,), many=True, dtype=dtype)
    yield Case(f"{op} fwd+bwd", shape, backward, (op,), many=True, dtype=dtype)
