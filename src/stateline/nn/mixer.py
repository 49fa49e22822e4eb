"""The contract of a layer that mixes along time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stateline import checks
from stateline.checks import fail

Lengths = Tensor | Sequence[int]
NARROW = (torch.float32, torch.bfloat16, torch.float16)  # what autocast converts between


class Mixer(nn.Module, ABC):
    """A layer (b, t, d) -> (b, t, d) that can be cut anywhere along time and continued.

    For any split of x the concatenated outputs of `extend` equal `forward`; `step_` equals `extend` by one token;
    padded (`lengths`) and packed (`cu_seqlens`) batches equal their sequences alone. A state is a dataclass of tensors,
    known to PyTorch as a pytree, with one row a sequence.

    d_model: width of input and output.
    reversible: whether `forward` takes `reverse=True`, which reads every sequence from its last token to its first.
    takes_gate: whether `forward`, `extend` and `step_` want `gate=`, a number a token that the layer does not compute.
    """

    d_model: int
    reversible: bool = False
    takes_gate: bool = False

    @abstractmethod
    def init_state(self, batch: int, *, max_tokens: int | None = None, device: torch.device | str | None = None) -> Any:
        """The state of `batch` sequences before their first token.

        max_tokens: bound on a sequence's length, for layers whose state grows; others ignore it.
        device: the layer's own if None.
        """

    @abstractmethod
    def extend(
        self, x: Tensor, state: Any = None, *, lengths: Lengths | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Continue by any number of tokens: (y, new state). Differentiable, also in and through the state.

        Args:
            x: (b, t, d), t ≥ 0.
            state: b rows (n_seq with `cu_seqlens`), never changed; None starts afresh.
            lengths: (b) valid tokens a row; what follows them is skipped, and y is 0 there.
            cu_seqlens: (n_seq + 1) bounds of sequences packed along time in a batch of 1.
        """

    @abstractmethod
    def step_(self, x: Tensor, state: Any) -> Tensor:
        """Continue by one token, x (b, d) -> y (b, d), writing into `state`. No gradient: for engines that generate."""

    def check_room(self, state: Any, tokens: int = 1) -> None:
        """Raise ValueError if a sequence of `state` cannot become so many tokens longer; most may grow for ever."""

    def forward(self, x: Tensor, *, lengths: Lengths | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """y (b, t, d) for whole sequences x (b, t, d); arguments as for `extend`."""
        return self.extend(x, None, lengths=lengths, cu_seqlens=cu_seqlens)[0]


def check_input(op: str, x: Tensor, form: str, d_model: int, own: torch.dtype) -> None:
    """Raise unless x has a layer's width and its own dtype; autocast converts narrow floats by itself."""
    sizes = checks.Sizes(op)
    sizes.bind("d_model", d_model, "the layer")
    sizes.match("x", x, form)
    if x.dtype != own and not (x.dtype in NARROW and own in NARROW and torch.is_autocast_enabled(x.device.type)):
        checks.dtype(op, "x", x, (own,), "Convert x, or the layer, with .to(dtype).")


def check_state(op: str, state: Any, kind: type) -> None:
    """Raise TypeError unless a state is of the layer's own kind."""
    if not isinstance(state, kind):
        problem = f"initial_state is a {type(state).__name__}, expected {kind.__name__}."
        raise fail(op, problem, "layer.init_state(b) makes one.", error=TypeError)


def padding(x: Tensor, lengths: Lengths) -> Tensor:
    """(b, t) bool, True at the padding that follows `lengths` (b) valid tokens of x (b, t, …)."""
    lengths = torch.as_tensor(lengths, device=x.device)
    if lengths.shape != x.shape[:1]:
        raise fail("lengths", f"it has shape {tuple(lengths.shape)}, expected (b,) with b = {x.shape[0]}.")
    return torch.arange(x.shape[1], device=x.device) >= lengths[:, None]


def zero_padding(x: Tensor, lengths: Lengths | None) -> Tensor:
    """x (b, t, d) with padding set to 0, whatever it held: a NaN there would reach every weight's gradient as 0·NaN."""
    return x if lengths is None else x.masked_fill(padding(x, lengths)[..., None], 0)
