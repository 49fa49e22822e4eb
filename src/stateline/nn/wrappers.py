"""Wrappers that read a whole signal from several sides: Bidirectional over time, Scan2d over images.

Both run the layer inside backwards by its own `reverse`; nothing is flipped or copied for that.
"""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from stateline import checks
from stateline.nn.mixer import Lengths, Mixer

MERGES = ("sum", "concat")


class Bidirectional(Mixer):
    """layer(x) + layer'(x backwards), (b, t, d) -> (b, t, d): every token knows the whole sequence.

    Args:
        layer: what reads forwards, a layer that can also run backwards, such as `Mamba`.
        shared: read backwards with the same weights. Otherwise with a copy of the layer, which starts from the same
            values and learns its own.
        merge: "sum" adds the two, as Vision Mamba and Caduceus do; "concat" puts them side by side and projects them
            back to width d, as bidirectional recurrent networks do.

    `lengths` and `cu_seqlens` as for every layer: each sequence is read backwards from its own last token. What looks
    ahead cannot be continued, so `init_state`, `extend` and `step_` are refused.

    Sources: Zhu et al. 2024, "Vision Mamba", section 3.3; Schiff et al. 2024, "Caduceus", section 3.1; Schuster &
    Paliwal 1997, "Bidirectional Recurrent Neural Networks".

    >>> from stateline.nn import Mamba
    >>> layer = Bidirectional(Mamba(8))
    >>> layer(torch.randn(2, 5, 8), lengths=[5, 3]).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, layer: Mixer, *, shared: bool = False, merge: str = "sum") -> None:
        super().__init__()
        _check_layer("Bidirectional", layer, shared)
        checks.choice("Bidirectional", "merge", merge, MERGES)
        self.d_model: int = layer.d_model
        self.ahead = layer
        self.back = None if shared else copy.deepcopy(layer)
        self.project: nn.Linear | None = None
        if merge == "concat":
            like = next(m.weight for m in layer.modules() if isinstance(m, nn.Linear))
            made: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
            self.project = nn.Linear(2 * self.d_model, self.d_model, bias=False, **made)

    def forward(self, x: Tensor, *, lengths: Lengths | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """y (b, t, d) for whole sequences x (b, t, d), 0 at padding; arguments as for `Mixer.extend`."""
        where: dict[str, Any] = {"lengths": lengths, "cu_seqlens": cu_seqlens}
        back = self.ahead if self.back is None else self.back
        one, other = self.ahead(x, **where), back(x, reverse=True, **where)
        return one + other if self.project is None else self.project(torch.cat([one, other], -1))

    def init_state(
        self, batch: int, *, max_tokens: int | None = None, device: torch.device | str | None = None
    ) -> NoReturn:
        """Refused with TypeError: see the class."""
        raise _refusal()

    def extend(
        self, x: Tensor, state: Any = None, *, lengths: Lengths | None = None, cu_seqlens: Tensor | None = None
    ) -> NoReturn:
        """Refused with TypeError: see the class."""
        raise _refusal()

    def step_(self, x: Tensor, state: Any) -> NoReturn:
        """Refused with TypeError: see the class."""
        raise _refusal()


class Scan2d(nn.Module):
    """A map read in four directions and added up, (b, height, width, d) -> (b, height, width, d).

    Row by row and column by column, each from its first place to its last and back: every place knows the whole map.
    Any height and width. The map is laid out by columns once; rows, and all reading backwards, copy nothing.

    Args:
        layer: reads rows; it must be able to run backwards, as `Mamba` is.
        shared: read all four directions with the same weights. Otherwise three copies of the layer learn their own.

    Source: Liu et al. 2024, "VMamba: Visual State Space Model", section 4.2.

    >>> from stateline.nn import Mamba
    >>> Scan2d(Mamba(8))(torch.randn(2, 3, 5, 8)).shape
    torch.Size([2, 3, 5, 8])
    """

    def __init__(self, layer: Mixer, *, shared: bool = False) -> None:
        super().__init__()
        _check_layer("Scan2d", layer, shared)
        self.d_model: int = layer.d_model
        self.rows = Bidirectional(layer, shared=shared)
        self.columns = None if shared else Bidirectional(copy.deepcopy(layer))

    def forward(self, x: Tensor) -> Tensor:
        """x (b, height, width, d) -> y (b, height, width, d)."""
        sizes = checks.Sizes("Scan2d")
        sizes.bind("d_model", self.d_model, "the layer")
        sizes.match("x", x, "b height width d_model")
        height, width = x.shape[1:3]
        columns = self.rows if self.columns is None else self.columns
        by_rows = self.rows(x.flatten(1, 2)).unflatten(1, (height, width))
        by_columns = columns(x.transpose(1, 2).flatten(1, 2)).unflatten(1, (width, height))
        return by_rows + by_columns.transpose(1, 2)


def _check_layer(op: str, layer: Any, shared: Any) -> None:
    """Raise TypeError unless the layer can run backwards, and `shared` is a yes or no."""
    if not isinstance(layer, Mixer) or not layer.reversible:
        problem = f"layer is a {type(layer).__name__}, expected one that can run backwards, as nn.Mamba."
        raise checks.fail(op, problem, error=TypeError)
    if not isinstance(shared, bool):
        raise checks.fail(op, f"shared is {shared!r}, expected True or False.", error=TypeError)


def _refusal() -> Exception:
    problem = "it looks at tokens to come, so a sequence cannot be continued from a state."
    return checks.fail("Bidirectional", problem, "Give it whole sequences: layer(x).", error=TypeError)
