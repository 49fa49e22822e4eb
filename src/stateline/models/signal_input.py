"""What a model reads of a signal: each channel by three scales, and what of it is missing.

    z        standardised by the training signals' mean and deviation
    own      standardised by the signal's own mean and deviation so far, so that faint and loud ones look alike
    level    log10 of that deviation over the training signals', divided by 3
    missing  1 where a value is missing, and the others are 0

All can be kept up sample by sample. Computed in float64, since a channel may have a large offset.
Suffixes: b batch, t time, c channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stateline import checks

OP = "SignalInput"
#: Deviations up to this share of the training signals' count as none.
FAINTEST = 1e-7


@dataclass
class InputState:
    """What signals were so far, all (b, c) float64: first, their first standardised value; count, total and squares of
    the differences from it, which lose nothing to an offset."""

    first: Tensor
    count: Tensor
    total: Tensor
    squares: Tensor


torch.export.register_dataclass(InputState, serialized_type_name="stateline.models.InputState")


class SignalInput(nn.Module):
    """Signals (b, t, c) as they come, NaN where a value is missing -> what a model reads, (b, t, width) float32.

    `mean`, `scale` (c): of the training signals.   own: with the channels own and level.   missing: with those of that
    name.

    >>> reads = SignalInput(2)
    >>> whole, _ = reads.extend(torch.tensor([[[1.0, 5.0], [3.0, 5.0], [2.0, 5.0]]]))
    >>> whole.shape
    torch.Size([1, 3, 6])
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, channels: int, *, own: bool = True, missing: bool = False) -> None:
        super().__init__()
        self.channels, self.own, self.missing = channels, own, missing
        self.register_buffer("mean", torch.zeros(channels, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(channels, dtype=torch.float64))

    @property
    def width(self) -> int:
        """Channels of what comes out."""
        return self.channels * (1 + 2 * self.own + self.missing)

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> InputState:
        """That of signals before their first sample."""
        zeros = torch.zeros(batch, self.channels, dtype=torch.float64, device=device or self.mean.device)
        return InputState(zeros, zeros.clone(), zeros.clone(), zeros.clone())

    def extend(self, x: Tensor, state: InputState | None = None) -> tuple[Tensor, InputState]:
        """Continue by x (b, t, c), t ≥ 0: (what a model reads (b, t, width), new state)."""
        if x.dim() != 3 or x.shape[-1] != self.channels:
            raise checks.fail(OP, f"x has shape {tuple(x.shape)}, expected (b, t, {self.channels}).")
        state = self.init_state(x.shape[0], device=x.device) if state is None else state
        gone = x.isnan()
        z = ((x.double() - self.mean.to(x.device)) / self.scale.to(x.device)).masked_fill(gone, 0)
        if not x.shape[1]:
            return z.new_zeros(x.shape[0], 0, self.width, dtype=torch.float32), state
        here = z.gather(1, (~gone).int().argmax(1, keepdim=True))[:, 0]  # 0 where none is known yet, as z is
        first = torch.where(state.count > 0, state.first, here)
        shifted = (z - first[:, None]).masked_fill(gone, 0)
        count = state.count[:, None] + (~gone).double().cumsum(1)
        total = state.total[:, None] + shifted.cumsum(1)
        squares = state.squares[:, None] + shifted.square().cumsum(1)
        read = [z]
        if self.own:
            seen = count.clamp(min=1)
            mean = total / seen
            deviation = (squares / seen - mean.square()).clamp(min=FAINTEST**2).sqrt()
            read += [
                ((shifted - mean) / deviation).masked_fill(gone | (deviation <= FAINTEST), 0),
                deviation.log10() / 3,
            ]
        if self.missing:
            read.append(gone.double())
        return torch.cat(read, -1).float(), InputState(first, count[:, -1], total[:, -1], squares[:, -1])
