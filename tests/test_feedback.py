"""State feedback: poles where they were placed, the verdict by simulation, errors that name the argument."""

from __future__ import annotations

import doctest
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stateline.nn import GatedSSM
from stateline.theory import feedback
from stateline.theory import feedback as closed
from stateline.theory.feedback import Loop


def companion(coefficients: list[float]) -> Tensor:
    """The matrix with characteristic polynomial zⁿ + c[n-1] zⁿ⁻¹ + … + c[0]; feedback moves its last row."""
    n = len(coefficients)
    A = torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)
    A[-1] = -torch.tensor(coefficients, dtype=torch.float64)
    return A


def polynomial(roots: list[complex]) -> list[float]:
    """Coefficients from the lowest, the leading 1 left out."""
    c: list[complex] = [1]
    for r in roots:
        c = [(c[i - 1] if i else 0) - r * (c[i] if i < len(c) else 0) for i in range(len(c) + 1)]
    return [x.real for x in map(complex, c[:-1])]


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("poles", [[0.5, 0.25, -0.75], [-0.3 + 0.4j, -0.3 - 0.4j, -0.1], [-2.0, -0.5, 1.5]], ids=str)
def test_poles_lie_where_they_were_placed(continuous: bool, poles: list[complex]) -> None:
    A = companion([2.0, -1.0, 3.0])
    K = -A[-1] - torch.tensor(polynomial(poles), dtype=torch.float64)
    loop = closed(A, torch.tensor([0.0, 0.0, 1.0]), K, continuous=continuous)
    key = (lambda z: -complex(z).real) if continuous else (lambda z: -abs(z))
    got = loop.eigenvalues.tolist()
    assert [key(z) for z in got] == sorted(key(z) for z in got)
    for z in poles:
        assert min(abs(z - y) for y in got) < 1e-9
    radius, abscissa = max(map(abs, poles)), max(complex(z).real for z in poles)
    assert math.isclose(loop.radius, radius, rel_tol=1e-9)
    assert math.isclose(loop.abscissa, abscissa, rel_tol=1e-9)
    assert math.isclose(loop.margin, -abscissa if continuous else 1 - radius, rel_tol=1e-6)
    assert loop.stable == (abscissa < 0 if continuous else radius < 1)
    assert f": {'stable' if loop.stable else 'not stable'}\n" in str(loop)
    assert ("units of time" in str(loop)) == (continuous and loop.stable)


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_the_loop_runs_as_the_system_fed_with_its_own_state(m: int, dense: bool, dtype: torch.dtype) -> None:
    A = torch.randn(4, 4, dtype=dtype) * 0.3 if dense else torch.randn(4, dtype=dtype) * 0.3
    B, K, r = (torch.randn(s, dtype=dtype) * 0.2 for s in ((4, m), (m, 4), (9, m)))
    loop = closed(A, B[:, 0] if m == 1 else B, K[0] if m == 1 else K)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    assert {x.dtype for x in (loop.A, loop.B, loop.K)} == {wide}
    A, B, K, r = (x.to(wide) for x in (A, B, K, r))
    matrix = A if dense else torch.diag(A)
    h = g = torch.zeros(4, dtype=wide)
    for t in range(9):
        h = matrix @ h + B @ (K @ h + r[t])
        g = loop.A @ g + loop.B @ r[t]
    torch.testing.assert_close(g, h)
    free = torch.linalg.matrix_power(loop.A, 4000)
    assert (free.abs().max() < 1e-6) == loop.stable


def test_time_constants_are_those_of_the_exponential() -> None:
    A = torch.tensor([-0.5, -2.0])
    loop = closed(A, torch.ones(2), torch.zeros(2), continuous=True)
    assert math.isclose(loop.time_constant, 2.0)
    start = torch.linalg.matrix_exp(loop.A * loop.time_constant) @ torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert math.isclose(float(start[0]), math.exp(-1))
    assert closed(A * 0, torch.ones(2), torch.zeros(2)).time_constant == 0
    assert closed(A * 0 + 1, torch.ones(2), torch.zeros(2)).time_constant == math.inf


def test_a_dense_layer_starts_from_a_loop() -> None:
    layer = GatedSSM(3, 4, activation="identity", transition="dense", gate="given")
    loop = closed(torch.full((4,), 0.9), torch.randn(4, 3), torch.zeros(3, 4))
    assert loop.norm < 1
    with torch.no_grad():
        layer.A.copy_(loop.A)
        layer.in_proj.weight.copy_(loop.B)
    x, h = torch.randn(1, 6, 3), torch.zeros(4, dtype=torch.float64)
    _, state = layer.extend(x, gate=torch.ones(1, 6))
    for u in x[0].double():
        h = loop.A @ h + loop.B @ u
    torch.testing.assert_close(state.h[0].double(), h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (dict(A=torch.ones(3, 4)), ValueError, r"^feedback: A has shape \(3, 4\), expected \(n, n\) with n = 3"),
        (dict(A=[1.0]), TypeError, "A is a list"),
        (dict(B=torch.ones(4, 1)), ValueError, r"B has shape \(4, 1\), expected \(n, m\) with n = 3 \(set by A\)"),
        (dict(K=torch.ones(3, 1)), ValueError, r"K has shape \(3, 1\), expected \(m, n\) with m = 2 \(set by B\)"),
        (dict(K=torch.ones(3)), ValueError, r"K has shape \(3,\), expected \(m, n\) with m = 2"),
        (dict(K=torch.ones(2, 3).long()), TypeError, "K is int64"),
        (dict(A=torch.full((3,), float("nan"))), ValueError, "A has values that are not finite"),
        (dict(continuous="yes"), TypeError, "continuous is 'yes'"),
    ],
    ids=str,
)
def test_errors_name_the_argument(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        closed(**{"A": torch.ones(3), "B": torch.ones(3, 2), "K": torch.ones(2, 3), **wrong})


def test_examples_and_empty_systems() -> None:
    import sys

    module = sys.modules[Loop.__module__]
    failed, tried = doctest.testmod(module, extraglobs={"torch": torch, "feedback": feedback})
    assert (failed, tried > 3) == (0, True)
    empty = closed(torch.ones(0), torch.ones(0, 1), torch.ones(1, 0))
    assert empty.stable
    assert "0 states" in str(empty)
