"""long_conv by Fourier transforms, in PyTorch: the same functions as reference.py, for kernels of any length.

Rows of a batch, whole or padded, go through together; packed sequences one after another, so that each has the bits it
has alone. Matrix taps that are too few for transforms to pay are products with shifted inputs.

Suffixes: b batch, t time step, o and i channels out and in, l taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.ops.long_conv import reference, spectrum
from stateline.ops.long_conv.reference import compute_dtype, flip, step, taps, width
from stateline.ops.long_conv.spectrum import Turn
from stateline.ops.segments import gathered, pieces

__all__ = ["backward", "forward", "step"]

#: What matrix taps cost on a CPU, ns (benchmarks/NOTES.md): a multiply-add and a number in or out of the product with
#: one tap; a multiply-add of one frequency, between what many and few rows take; a round of a number's transform.
TAP, MOVED, FREQUENCY, ROUND = 0.033, 0.35, 1.0, 1.36


def forward(
    u: Tensor,
    k: Tensor,
    initial_state: Tensor | None,
    segments: Tensor | None,
    reverse: bool,
    turn: Turn = spectrum.turn,
) -> tuple[Tensor, Tensor]:
    """u (b, t, i), k (d, l) with d = i, or (l, o, i) -> y (b, t, o), state (n_seq, l-1, i).

    turn: what copies between rows of channels and rows of time.
    """
    y = u.new_zeros(*u.shape[:2], width(k))
    if segments is None or segments.shape[0] == u.shape[0]:
        past = initial_state
        inputs = _aligned(u, segments, reverse)
        out, state = _rows(inputs, k, past, _lengths(segments), turn)
        return _back_in_place(out, segments, reverse), state
    state = reference.initial(u, k, initial_state, segments)
    for rows, seq, time in pieces(segments, u.shape[1]):
        past = None if initial_state is None else initial_state[seq]
        out, state[seq] = _rows(flip(u[rows, time], reverse), k, past, None, turn)
        y[rows, time] = flip(out, reverse)
    return y, state


def backward(
    dy: Tensor,
    dstate: Tensor,
    u: Tensor,
    k: Tensor,
    initial_state: Tensor | None,
    segments: Tensor | None,
    reverse: bool,
    turn: Turn = spectrum.turn,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of u, k, initial_state; None where the input was None. turn: as in `forward`."""
    if segments is None or segments.shape[0] == u.shape[0]:
        inputs, slopes = _aligned(u, segments, reverse), _aligned(dy, segments, reverse)
        du, dk, dpast = _rows_backward(slopes, dstate, inputs, k, initial_state, _lengths(segments), turn)
        return _back_in_place(du.to(u.dtype), segments, reverse), dk.to(k.dtype), dpast
    du = torch.zeros(u.shape, dtype=u.dtype, device=u.device)
    dk = torch.zeros(k.shape, dtype=compute_dtype(u), device=k.device)
    dpast = None if initial_state is None else torch.zeros_like(initial_state, memory_format=torch.contiguous_format)
    for rows, seq, time in pieces(segments, u.shape[1]):
        past = None if initial_state is None else initial_state[seq]
        slopes, inputs = flip(dy[rows, time], reverse), flip(u[rows, time], reverse)
        dinputs, dtaps, dpiece = _rows_backward(slopes, dstate[seq], inputs, k, past, None, turn)
        du[rows, time] = flip(dinputs, reverse).to(du.dtype)
        dk += dtaps
        if dpast is not None and dpiece is not None:
            dpast[seq] = dpiece
    return du, dk.to(k.dtype), dpast


def direct_pays(k: Tensor, t: int) -> bool:
    """Whether matrix taps are better multiplied with shifted inputs than by way of transforms."""
    if k.dim() != 3 or t == 0:
        return False
    count, o, i = k.shape
    s, n = spectrum.plan(t, min(count, t))
    blocks = -(-t // s)
    transformed = blocks * n * FREQUENCY * o * i + ROUND * (o + i) * spectrum.work(blocks, n)
    return t * count * (TAP * o * i + MOVED * (o + i)) <= transformed


def _rows(u: Tensor, k: Tensor, past: Tensor | None, lengths: Tensor | None, turn: Turn) -> tuple[Tensor, Tensor]:
    """y and the state of rows u (b, t, i) that all begin at step 0 and end at `lengths` (b, 1), at t if None."""
    y = u.new_empty(*u.shape[:2], width(k))
    if direct_pays(k, u.shape[1]):
        padded = _padded(u, k, past)
        out = sum(reference.apply(_tap(k, u, i), _shifted(padded, k, i, u)) for i in range(taps(k)))
        y.copy_(torch.as_tensor(out))
    else:
        spectrum.convolve(u, _reaching(k, u, past), past, y, turn)
    return y, _state(u, k, past, lengths)


def _rows_backward(
    dy: Tensor, dstate: Tensor, u: Tensor, k: Tensor, past: Tensor | None, lengths: Tensor | None, turn: Turn
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of u, k (both in compute precision) and past."""
    real, (b, t, _), before = compute_dtype(u), u.shape, taps(k) - 1
    dpadded = torch.zeros(b, before + t, u.shape[2], dtype=real, device=u.device)
    du, dpast = dpadded[:, before:], dpadded[:, :before]
    if direct_pays(k, t):
        padded, dk = _padded(u, k, past), torch.zeros(k.shape, dtype=real, device=k.device)
        g = dy.to(real)
        for i in range(taps(k)):
            _shifted(dpadded, k, i, u).add_(g @ _tap(k, u, i))
            dk[i] = torch.einsum("bto,bti->oi", g, _shifted(padded, k, i, u))
    else:
        reaching = _reaching(k, u, past)
        slope = spectrum.gradients(dy, u, reaching, past, du, None if past is None else dpast, turn)
        dk = torch.zeros(k.shape, dtype=real, device=k.device)
        (dk if k.dim() == 3 else dk.T)[: taps(reaching)] = slope if k.dim() == 3 else slope.T
    if lengths is None:
        dpadded[:, t:] += dstate
    elif before:
        j = torch.arange(before + t, device=u.device) - lengths  # padded input -> row of the state
        rows = torch.take_along_dim(dstate, j.clamp(0, before - 1)[..., None], 1)
        dpadded += rows.masked_fill(((j < 0) | (j >= before))[..., None], 0)
    return du, dk, None if past is None else dpast.clone(memory_format=torch.contiguous_format)


def _reaching(k: Tensor, u: Tensor, past: Tensor | None) -> Tensor:
    """The taps that meet an input: from a fresh start, no more than there are inputs."""
    if past is not None:
        return k
    return k[: u.shape[1]] if k.dim() == 3 else k[:, : u.shape[1]]


def _padded(u: Tensor, k: Tensor, past: Tensor | None) -> Tensor:
    """(b, l-1 + t, i): past, or zeros, and u in compute precision."""
    real = compute_dtype(u)
    if past is None:
        past = torch.zeros(u.shape[0], taps(k) - 1, u.shape[2], dtype=real, device=u.device)
    return torch.cat([past, u.to(real)], 1)


def _state(u: Tensor, k: Tensor, past: Tensor | None, lengths: Tensor | None) -> Tensor:
    """The last l-1 inputs, `past` included."""
    before, t = taps(k) - 1, u.shape[1]
    if lengths is None:
        if t >= before:
            return u[:, t - before :].to(compute_dtype(u), copy=True).contiguous()
        return _padded(u, k, past)[:, t:].contiguous()
    if u.device.type != "cpu":
        return gathered_state(u, k, past, lengths)
    state = torch.zeros(u.shape[0], before, u.shape[2], dtype=compute_dtype(u))
    for row, length in enumerate(lengths[:, 0].tolist()):
        own = min(length, before)  # the last inputs of the row itself
        state[row, before - own :] = u[row, length - own : length]
        if past is not None:
            state[row, : before - own] = past[row, own:]
    return state


def gathered_state(u: Tensor, k: Tensor, past: Tensor | None, lengths: Tensor) -> Tensor:
    """`_state`, without reading lengths."""
    index = lengths + torch.arange(taps(k) - 1, device=u.device)
    return torch.take_along_dim(_padded(u, k, past), index[..., None], 1)


def _tap(k: Tensor, u: Tensor, i: int) -> Tensor:
    return reference.tap(k, i).to(compute_dtype(u))


def _shifted(padded: Tensor, k: Tensor, i: int, u: Tensor) -> Tensor:
    return reference.shifted(padded, k, i, u.shape[1])


def _lengths(segments: Tensor | None) -> Tensor | None:
    return None if segments is None else (segments[:, 2] - segments[:, 1])[:, None]


def _aligned(x: Tensor, segments: Tensor | None, reverse: bool) -> Tensor:
    """x (b, t, …) with every row's sequence running forwards from step 0, zeros after it; padding is not read."""
    if segments is None:
        return flip(x, reverse)
    if x.device.type != "cpu":
        return gathered(x, segments, reverse, back=False)
    moved = torch.zeros(x.shape, dtype=x.dtype)  # ten times as fast, where the table can be read
    for row, start, stop in segments.tolist():
        moved[row, : stop - start] = flip(x[row : row + 1, start:stop], reverse)[0]
    return moved


def _back_in_place(y: Tensor, segments: Tensor | None, reverse: bool) -> Tensor:
    """The opposite of `_aligned`; zeros at padding."""
    if segments is None:
        return y.flip(1) if reverse else y.contiguous()
    if y.device.type != "cpu":
        return gathered(y, segments, reverse, back=True)
    moved = torch.zeros(y.shape, dtype=y.dtype)
    for row, start, stop in segments.tolist():
        moved[row, start:stop] = flip(y[row : row + 1, : stop - start], reverse)[0]
    return moved
