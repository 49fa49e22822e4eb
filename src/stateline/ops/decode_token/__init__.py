"""decode_token: one token through a whole Mamba-1 or Mamba-2 model with packed matrices, in place, in one call.

Letters: b sequences, d_model width, d inner channels, n state, r rank of the step size, k taps; of Mamba-2 h heads of
width p, d = h·p, and g groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor

from stateline import backends, checks

OP = "decode_token"


class Matrix(NamedTuple):
    """A packed matrix (rows, columns) as `ops.packed_linear` takes it, with its bias (rows) or None."""

    data: Tensor
    scales: Tensor
    bias: Tensor | None
    format: str
    rows: int
    columns: int


class Norm(NamedTuple):
    """RMSNorm's weight (d_model); with a bias, LayerNorm's."""

    weight: Tensor
    bias: Tensor | None


Shape = tuple[int, ...]
GatedMLP = tuple[Norm, Matrix, Matrix]


@dataclass(frozen=True, eq=False)
class Layer:
    """A block of Mamba-1: float32 tensors, contiguous, on one device.

    norm; in_proj (2d, d_model), x_proj (r + 2n, d), dt_proj (d, r) without its bias, out_proj (d_model, d); taps
    (k, d), oldest first; conv_bias (d) or None; A2 (d, n) = −exp(A_log)·log2(e); D, dt_bias (d); and
    of a gated MLP, if any, norm2, fc1 (2 hidden, d_model), fc2 (d_model, hidden) with hidden a multiple of 128.
    """

    norm: Norm
    in_proj: Matrix
    x_proj: Matrix
    dt_proj: Matrix
    out_proj: Matrix
    taps: Tensor
    conv_bias: Tensor | None
    A2: Tensor
    D: Tensor
    dt_bias: Tensor
    mlp: GatedMLP | None = None

    @property
    def state_shapes(self) -> dict[str, Shape]:
        """A sequence's states: conv (k−1, d), ssm (d, n)."""
        k, d = self.taps.shape
        return {"conv": (k - 1, d), "ssm": tuple(self.A2.shape)}


@dataclass(frozen=True)
class Heads:
    """Sizes and choices of Mamba-2, the same in all layers of a network.

    p, n, g: width of a head, state, groups that share B and C and are normalised together.   low, high: of the step
    size, infinite where there are none.   beside: channels of a gated unit beside the recurrence.   eps: of the norm
    before out_proj; normalise: there is one; gate_last: it comes before the gate.   narrow: ssm is kept in bfloat16.
    """

    p: int
    n: int
    g: int
    low: float
    high: float
    beside: int
    normalise: bool
    gate_last: bool
    eps: float
    narrow: bool = False


@dataclass(frozen=True, eq=False)
class HeadLayer:
    """A block of Mamba-2, as `Layer` but for these.

    in_proj: (2 beside + 2d + 2g·n + h, d_model), rows of the gate and value beside, z, x, B, C, dt.
    out_proj: (d_model, beside + d).   taps (k, d + 2g·n), conv_bias (d + 2g·n) or None.
    A (h) = −exp(A_log), D (d), dt_bias (h), scale (d) of the norm before out_proj, ones where there is none.
    """

    norm: Norm
    in_proj: Matrix
    out_proj: Matrix
    taps: Tensor
    conv_bias: Tensor | None
    A: Tensor
    D: Tensor
    dt_bias: Tensor
    scale: Tensor
    heads: Heads
    mlp: GatedMLP | None = None

    @property
    def state_shapes(self) -> dict[str, Shape]:
        """A sequence's states: conv (k−1, d + 2g·n), ssm (h, p, n)."""
        k, channels = self.taps.shape
        return {"conv": (k - 1, channels), "ssm": (self.A.shape[0], self.heads.p, self.heads.n)}


@dataclass(frozen=True, eq=False)
class Network:
    """A model: token ids are below `vocabulary`; blocks, final norm, the epsilon of all norms, embedding and head.

    All layers are of one kind and size.
    """

    vocabulary: int
    layers: tuple[Layer | HeadLayer, ...]
    norm: Norm
    eps: float
    embedding: Matrix
    head: Matrix
    #: The states that were last found good: a token takes milliseconds, looking at 48 cold tensors a tenth of one.
    seen: list[ref[Tensor]] = field(default_factory=list)
    #: Where the matrices of both ends and of the last layer lay when this was made.
    home: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.home[:] = self._places()

    def at_home(self) -> bool:
        """Whether matrices are still where they were: sharing memory between processes, for one, moves them."""
        return self.home == self._places()

    def _places(self) -> list[int]:
        inner = [self.layers[0].in_proj, self.layers[-1].out_proj] if self.layers else []
        return [m.data.data_ptr() for m in (self.embedding, self.head, *inner)]


def decode_token_(states: Sequence[Tensor], ids: Tensor, network: Network, *, backend: str | None = None) -> Tensor:
    """Advance `states` by the tokens ids (b) in place and return logits (b, rows of the head), float32. No gradient.

    states: of each layer in turn the convolution's and the recurrence's, (b, *state_shapes), float32, contiguous; the
        recurrence's of `narrow` heads in bfloat16, which a state is rounded to as it is stored.

    Residual stream and all that is not packed are float32. A row's bits do not depend on the other rows.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came, before any state is touched.
    """
    checks.dtype(OP, "ids", ids, (torch.int32, torch.int64))
    if ids.dim() != 1:
        raise checks.fail(OP, f"ids has shape {tuple(ids.shape)}, expected (b,).")
    known = len(states) == len(network.seen) and all(x is seen() for x, seen in zip(states, network.seen, strict=True))
    if not known or len(states[0]) != len(ids) or states[0].device != ids.device:
        _check_states(states, len(ids), ids.device, network)
        network.seen[:] = map(ref, states)
    if checks.can_read(ids) and ids.numel():
        wrong = [i for i in ids.tolist() if not 0 <= i < network.vocabulary]
        if wrong:
            raise checks.fail(OP, f"token id {wrong[0]} is outside the vocabulary, 0 to {network.vocabulary - 1}.")
    with torch.no_grad():
        module = backends.kernel(OP, ids.device.type, backend, args=(network,))
        return module.step(states, ids.long().contiguous(), network)


def _check_states(states: Sequence[Tensor], b: int, device: torch.device, network: Network) -> None:
    if len(states) != 2 * len(network.layers):
        raise checks.fail(OP, f"states has {len(states)} tensors, the model {2 * len(network.layers)}.")
    for i, layer in enumerate(network.layers):
        for (name, of_one), x in zip(layer.state_shapes.items(), states[2 * i : 2 * i + 2], strict=True):
            shape = (b, *of_one)
            narrow = name == "ssm" and isinstance(layer, HeadLayer) and layer.heads.narrow
            dtype = torch.bfloat16 if narrow else torch.float32
            if x.shape != shape or x.dtype != dtype or not x.is_contiguous() or x.device != device:
                got = f"{x.dtype} {tuple(x.shape)} on {x.device}"
                wanted_here = f"contiguous {str(dtype).removeprefix('torch.')} {shape} on {device}"
                raise checks.fail(OP, f"layer {i}'s {name} state is {got}, expected {wanted_here}.")
