"""selective_scan and its step give the numbers that mamba_ssm's reference functions give in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stateline import ops
from stateline.backends import native_problem

BACKENDS = ["reference", "cpu"] if native_problem() is None else ["reference"]


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def near(got: Tensor, want: list[complex]) -> None:
    torch.testing.assert_close(got.flatten(), torch.tensor(want, dtype=got.dtype), atol=1e-6, rtol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_selective_scan(backend: str) -> None:
    u, dt, z = (x.view(1, 3, 1) for x in (row(1, 2, 3), row(-1, 0, 1), row(1, -1, 2)))
    B, C = torch.tensor([[1, 1], [1, 2], [1, 3]]).double()[None], torch.tensor([[1, 1], [2, 1], [3, 1]]).double()[None]
    y, state = ops.selective_scan(
        u, dt, row(-1, -2)[None], B, C, D=row(0.5), z=z, dt_bias=row(0.5), dt_softplus=True, backend=backend
    )
    near(y, [1.058685, -2.479144, 58.875092])
    near(state, [5.492284, 15.444633])


@pytest.mark.parametrize("backend", BACKENDS)
def test_complex_systems(backend: str) -> None:
    u, dt = row(1, 2, 3).view(1, 3, 1), row(-1, 0, 1).view(1, 3, 1)
    B, C = row(1, 0, 1, 1, 0, 1).view(1, 3, 1, 2), row(1, 0, 0, 1, 1, 0).view(1, 3, 1, 2)
    A = torch.tensor([[-1 + 2j]], dtype=torch.complex128)
    y, state = ops.selective_scan(u, dt, A, B, C, dt_softplus=True, backend=backend)
    near(y, [0.626523, -3.080534, -1.070478])
    near(state, [-0.535239 + 3.766750j])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token(backend: str) -> None:
    state = row(1, 1).view(1, 1, 2)
    u, dt, A, B, C = (x[None] for x in (row(2), row(0), row(-1, -2), row(1, 2), row(2, 1)))
    options = {"D": row(0.5), "z": row(1)[None], "dt_bias": row(0.5), "dt_softplus": True}
    near(ops.selective_scan_step_(state, u, dt, A, B, C, **options, backend=backend), [7.084129])
    near(state, [2.325695, 4.038845])
