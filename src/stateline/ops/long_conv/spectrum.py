"""One convolution of whole rows through torch.fft, in blocks of time: values and gradients.

A block of s outputs needs the s + l-1 inputs that end with it. Their circular convolution with the taps, of any length
n from s + l-1 on, is right in its last s places (overlap-save), so n is the next number above that which has no prime
factor beyond 5. Blocks are as long as makes the least work; channels go through in groups, which bounds memory.

Suffixes: b rows, t time step, d channel, o and i channels out and in, l taps, s outputs of a block, n length of a
transform, f frequency. Here data lies as (b, d, n), time last.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

#: Numbers of a row that are transformed at once: few enough to stay in a CPU's cache, enough to fill a GPU.
GROUP = {"cpu": 2**17}
GROUP_ELSEWHERE = 2**26
#: What a number costs beside its transform, in units of one of its log2(n) rounds: copies, the product.
OVERHEAD = 16
#: Channels of a group at least, and a divisor of them: a cache line of floats.
LINE = 16
#: Steps of a block at least, so that calls do not count.
FEWEST = 512
#: Transforms longer than this have a factor of 16: without, they take up to twice as long.
SHORTEST = 64

#: On a GPU rows up to this length are transformed as one: blocks would spare it some rounds, and cost it copies.
WHOLE = 2**17

#: turn(x, y, add, lead): write x (b, r, c) into y (b, c, r), or add it there; both with their last dimension adjacent.
#: With a `lead`, y (b, c, n) is wider: x goes to the places from there on, and the others become 0.
Turn = Callable[[Tensor, Tensor, bool, int | None], None]


def turn(x: Tensor, y: Tensor, add: bool = False, lead: int | None = None) -> None:
    """`Turn` in PyTorch."""
    y = inner(x, y, lead)
    if add:
        y += x.transpose(1, 2)
    else:
        y.copy_(x.transpose(1, 2))


def inner(x: Tensor, y: Tensor, lead: int | None) -> Tensor:
    """Where in y x goes, once all other places are 0."""
    if lead is None:
        return y
    after = lead + x.shape[1]
    y[..., :lead] = 0
    y[..., after:] = 0
    return y[..., lead:after]


def fast_length(n: int) -> int:
    """The least number from n on without a prime factor above 5, and with factors of 2 enough to be fast."""
    twos = 1 if n <= SHORTEST else 4
    best = 2 ** max(twos, math.ceil(math.log2(max(n, 2))))
    five = 1
    while five < best:
        three = five
        while three < best:
            two = 2 ** max(twos, math.ceil(math.log2(max(n / three, 1))))
            if n <= two * three < best:
                best = two * three
            three *= 3
        five *= 5
    return best


@functools.lru_cache(4096)
def plan(t: int, taps: int, device: str = "cpu") -> tuple[int, int]:
    """(s, n): outputs of a block and length of its transform, for t outputs. From sizes alone, never the batch."""
    if device != "cpu":
        s = t if t + taps - 1 <= WHOLE else min(t, max(WHOLE // 2, taps))
        return s, fast_length(s + taps - 1)
    best = (math.inf, t, 2)
    for steps in (t, *(max(taps, FEWEST) * 2**j for j in range(5))):
        blocks = -(-t // min(steps, t))
        s = -(-t // blocks)
        n = fast_length(s + taps - 1)
        best = min(best, (work(blocks, n), s, n))
    return best[1], best[2]


def work(blocks: int, n: int) -> float:
    """Cost of transforms, in rounds of one number."""
    return blocks * n * (math.log2(n) + OVERHEAD)


def convolve(u: Tensor, k: Tensor, past: Tensor | None, out: Tensor, turn: Turn = turn) -> None:
    """Write the convolution of u (b, t, i) by k (d, l) or (l, o, i), both of any dtype, into out (b, t, o).

    past: (b, l-1, i), the inputs before u; zeros if None.
    """
    for taps, inside, outside in _groups(u, k):
        s, n = plan(u.shape[1], taps.shape[-1], u.device.type)
        spectrum = torch.fft.rfft(taps, n=n)
        for first in range(0, u.shape[1], s):
            count = min(s, u.shape[1] - first)
            f = torch.fft.rfft(_window(u, past, first, count, taps.shape[-1], n, inside, turn))
            y = torch.fft.irfft(_times(f, spectrum), n=n)
            turn(_valid(y, taps.shape[-1], count), out[:, first : first + count, outside], False, None)


def gradients(
    dy: Tensor,
    u: Tensor,
    k: Tensor,
    past: Tensor | None,
    du: Tensor,
    dpast: Tensor | None,
    turn: Turn = turn,
) -> Tensor:
    """Gradient of k, in compute precision; those of u and past are added to du and dpast, of that precision."""
    t, dk = u.shape[1], torch.zeros(k.shape, dtype=_precision(u), device=k.device)
    for taps, inside, outside in _groups(u, k):
        length = taps.shape[-1]
        s, n = plan(t, length, u.device.type)
        spectrum = torch.fft.rfft(taps, n=n)
        dspectrum = torch.zeros_like(spectrum)
        for first in range(0, t, s):
            count = min(s, t - first)
            f = torch.fft.rfft(_window(u, past, first, count, length, n, inside, turn))
            later = _empty(dy, outside, n)
            turn(dy[:, first : first + count, outside], later, False, length - 1)
            g = torch.fft.rfft(later)
            dspectrum += _outer(g, f, k.dim() == 3)
            dwindow = torch.fft.irfft(_back(g, spectrum), n=n)
            before = min(length - 1, first)  # inputs of the window that lie in u, before the block
            own = dwindow[..., length - 1 - before : length - 1 + count]
            turn(own, du[:, first - before : first + count, inside], True, None)
            if dpast is not None and first < length - 1:
                turn(dwindow[..., : length - 1 - first], dpast[:, first:, inside], True, None)
        dtaps = torch.fft.irfft(dspectrum, n=n)[..., :length]
        if k.dim() == 3:
            dk.copy_(dtaps.permute(2, 0, 1))
        else:
            dk[inside] = dtaps
    return dk


def _groups(u: Tensor, k: Tensor) -> Iterator[tuple[Tensor, slice, slice]]:
    """Taps with time last, in compute precision, and the channels in and out that they belong to."""
    if 0 in u.shape or 0 in k.shape:
        return
    everything = slice(None)
    if k.dim() == 3:
        yield k.to(_precision(u)).permute(1, 2, 0), everything, everything
        return
    d, taps = k.shape
    channels = GROUP.get(u.device.type, GROUP_ELSEWHERE) // plan(u.shape[1], taps, u.device.type)[1]
    channels = max(LINE, channels // LINE * LINE)
    for first in range(0, d, channels):
        group = slice(first, min(first + channels, d))
        yield k[group].to(_precision(u)), group, group


def _precision(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _empty(u: Tensor, channels: slice, n: int) -> Tensor:
    """(b, d, n) for channels of u (b, t, d), in compute precision."""
    width = len(range(*channels.indices(u.shape[2])))
    return torch.empty(u.shape[0], width, n, dtype=_precision(u), device=u.device)


def _window(
    u: Tensor, past: Tensor | None, first: int, count: int, taps: int, n: int, channels: slice, turn: Turn
) -> Tensor:
    """(b, d, n): the taps-1 inputs before step `first`, the `count` from there on, and zeros."""
    begin = first - (taps - 1)
    outside = max(-begin, 0)  # places whose inputs come before u
    window = _empty(u, channels, n)
    turn(u[:, max(begin, 0) : first + count, channels], window, False, outside)
    if outside and past is not None:
        turn(past[:, first:, channels], window[..., :outside], False, None)
    return window


def _valid(y: Tensor, taps: int, count: int) -> Tensor:
    """Of a block's circular convolution, the outputs that are right."""
    return y[..., taps - 1 : taps - 1 + count]


def _times(f: Tensor, spectrum: Tensor) -> Tensor:
    """Spectrum of the outputs, (b, o, f), from that of the inputs (b, i, f), which it may overwrite."""
    return torch.einsum("bif,oif->bof", f, spectrum) if spectrum.dim() == 3 else f.mul_(spectrum)


def _back(g: Tensor, spectrum: Tensor) -> Tensor:
    """Spectrum of the inputs' gradient from that of the outputs', which it may overwrite."""
    turned = spectrum.conj_physical()  # not lazily: what runs while a graph is traced would forget it
    return torch.einsum("bof,oif->bif", g, turned) if spectrum.dim() == 3 else g.mul_(turned)


def _outer(g: Tensor, f: Tensor, matrices: bool) -> Tensor:
    """Spectrum of the taps' gradient, (o, i, f) of matrices or (d, f), from those of outputs' gradient and inputs."""
    turned = f.conj_physical()
    return torch.einsum("bof,bif->oif", g, turned) if matrices else (g * turned).sum(0)
