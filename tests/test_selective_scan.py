"""selective_scan beside numbers that mamba_ssm's reference functions give; its grid of arguments is in test_ops.py."""

from __future__ import annotations

import pytest
import torch
from test_ops import BACKENDS
from torch import Tensor

from stateline import ops


def tokens(*values: float) -> Tensor:
    """One channel, (1, t, 1)."""
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1)


def close(got: Tensor, *want: complex) -> None:
    torch.testing.assert_close(got.flatten(), torch.tensor(want), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_published_numbers(backend: str) -> None:
    B, C = (torch.tensor(rows).mT[None] for rows in ([[1.0, 1, 1], [1, 2, 3]], [[1.0, 2, 3], [1, 1, 1]]))
    system = (tokens(1, 2, 3), tokens(-1, 0, 1), torch.tensor([[-1.0, -2]]), B, C)
    more = {"D": torch.tensor([0.5]), "z": tokens(1, -1, 2), "dt_bias": torch.tensor([0.5])}
    y, state = ops.selective_scan(*system, **more, dt_softplus=True, backend=backend)
    close(y, 1.058685, -2.479144, 58.875092)
    close(state, 5.492284, 15.444633)


@pytest.mark.parametrize("backend", BACKENDS)
def test_published_numbers_of_a_complex_system(backend: str) -> None:
    B, C = (torch.tensor(pairs).view(1, 3, 1, 2) for pairs in ([1.0, 0, 1, 1, 0, 1], [1.0, 0, 0, 1, 1, 0]))
    system = (tokens(1, 2, 3), tokens(-1, 0, 1), torch.tensor([[-1 + 2j]]), B, C)
    y, state = ops.selective_scan(*system, dt_softplus=True, backend=backend)
    close(y, 0.626523, -3.080534, -1.070478)
    close(state, -0.535239 + 3.766750j)


@pytest.mark.parametrize("backend", BACKENDS)
def test_published_numbers_of_a_step(backend: str) -> None:
    state, rates = torch.ones(1, 1, 2), torch.tensor([[-1.0, -2]])
    token = (torch.tensor([[2.0]]), torch.tensor([[0.0]]), rates, torch.tensor([[1.0, 2]]), torch.tensor([[2.0, 1]]))
    more = {"D": torch.tensor([0.5]), "z": torch.tensor([[1.0]]), "dt_bias": torch.tensor([0.5])}
    y = ops.selective_scan_step_(state, *token, **more, dt_softplus=True, backend=backend)
    close(y, 7.084129)
    close(state, 2.325695, 4.038845)
