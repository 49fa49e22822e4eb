"""A running mean of the weights: often better than the weights themselves, and calmer between validations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stateline.nn.precision import wide


class Ema:
    """mean ← c · mean + (1 − c) · weights after step t ≥ 1, with c = min(decay, (1 + t) / (10 + t)).

    The growing c lets a young mean follow the weights instead of holding on to their initial values. Only parameters
    that learn are kept; float32 (float64 beside float64 weights), whatever their own dtype.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.means = {name: p.detach().to(wide(p.dtype), copy=True) for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step number `step` (from 1)."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self._parameters.items():
            self.means[name].lerp_(parameter.to(self.means[name].dtype), share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While entered, the model has the mean's weights; afterwards its own, the same tensors."""
        own = {name: p.data for name, p in self._parameters.items()}
        for name, parameter in self._parameters.items():
            parameter.data = self.means[name].to(own[name].dtype)
        try:
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = own[name]

    def load(self, means: Mapping[str, Tensor]) -> None:
        """Take up stored means. Raises KeyError if they are another model's."""
        if set(means) != set(self.means):
            raise KeyError(f"the mean's names are not the model's: {sorted(set(means) ^ set(self.means))[:4]}")
        for name, mean in self.means.items():
            mean.copy_(means[name])
