"""A model whose every word is known in advance, so that tests see what generation makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class Scripted(nn.Module):
    """A stand-in for a model that says what it is told: ids over and over, those of scripts[f] after a first token f.

    Its state is (b, 2): the first id, and the tokens generated so far.
    """

    def __init__(self, scripts: Sequence[int] | dict[int, Sequence[int]], vocab_size: int = 256) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.scripts = scripts
        self.anchor = nn.Parameter(torch.zeros(1))
        self.read: list[tuple[int, ...]] = []
        self.stepped: list[int] = []
        self.broken_at = -1

    def init_state(self, batch: int) -> Tensor:
        return torch.tensor([[-1, 0]]).repeat(batch, 1)

    def extend(
        self, ids: Tensor, before: Tensor, *, lengths: Any = None, last_only: bool = False
    ) -> tuple[None, Tensor]:
        assert last_only
        assert not torch.is_grad_enabled()
        self.read.append(tuple(ids.shape))
        after = before.clone()
        after[:, 0] = torch.where(before[:, 0] < 0, ids[:, 0], before[:, 0])
        return None, after

    def check_room(self, memory: Tensor) -> None:
        """There is always room."""

    def step_(self, ids: Tensor, memory: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.stepped.append(len(ids))
        memory[:, 0] = torch.where(memory[:, 0] < 0, ids, memory[:, 0])
        logits = torch.full((len(ids), self.config.vocab_size), -10.0)
        for row, (first, count) in enumerate(memory.tolist()):
            script = self.scripts[first] if isinstance(self.scripts, dict) else self.scripts
            logits[row, script[count % len(script)]] = 10.0 if count != self.broken_at else math.nan
        memory[:, 1] += 1
        return logits
