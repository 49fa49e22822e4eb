"""What is no tensor is told how to become one, in every function of the classical models that takes matrices."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from stateline.classical import RecedingHorizon, StateSpace, analyse, equilibrium, gramians, lqr, n4sid

I = torch.eye(2, dtype=torch.float64)  # the papers' notation
A, B, C = I + 0.1 * I.roll(1, 0), I[:, 1:], I[:1]
MODEL = StateSpace(A, B, C, None, I, I[:1, :1], I[0], I)
RECORD = torch.randn(100, 1, dtype=torch.float64)


def controller(Q: Any = I[:1, :1]) -> RecedingHorizon:
    return RecedingHorizon(MODEL, Q, I[:1, :1], horizon=3)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: n4sid(RECORD.numpy()), "y"),  # type: ignore[arg-type]  # wrong, as all below
        (lambda: n4sid(RECORD, RECORD.tolist()), "u"),  # type: ignore[arg-type]
        (lambda: analyse(A.numpy()), "A"),  # type: ignore[arg-type]
        (lambda: gramians(A, B, C.numpy()), "C"),  # type: ignore[arg-type]
        (lambda: controller(np.eye(1)), "Q"),
        (lambda: controller().control(np.zeros(2)), "h"),  # type: ignore[arg-type]
        (lambda: controller().control(I[0], np.ones(1)), "reference"),  # type: ignore[arg-type]
        (lambda: controller().control(I[0], None, [0.0]), "before"),  # type: ignore[arg-type]
        (lambda: equilibrium(MODEL, np.ones(1)), "y"),  # type: ignore[arg-type]
    ],
)
def test_arrays(call: Callable[[], object], name: str) -> None:
    told = rf"{name} is a (ndarray|list), expected .*\. torch\.as_tensor\({name}, dtype=torch\.float64\) makes one"
    with pytest.raises(TypeError, match=told):
        call()


@pytest.mark.parametrize(
    ("call", "remedy"),
    [
        (lambda: lqr(A, B, I, 0.1), "0.1 * torch.eye(1, dtype=torch.float64)"),  # type: ignore[arg-type]
        (lambda: lqr(A, B, 2, I[:1, :1]), "2 * torch.eye(2, dtype=torch.float64)"),  # type: ignore[arg-type]
        (lambda: controller(0.1), "0.1 * torch.eye(1, dtype=torch.float64)"),
        (lambda: controller().control(I[0], 1.0), "torch.tensor([1.0], dtype=torch.float64)"),  # type: ignore[arg-type]
    ],
)
def test_numbers(call: Callable[[], object], remedy: str) -> None:
    with pytest.raises(TypeError, match=re.escape(f"{remedy} makes one")):
        call()
