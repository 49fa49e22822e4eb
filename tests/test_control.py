"""Control: reference values, hidden motions found, costs beside one dense least-squares problem, conversions."""

from __future__ import annotations

import doctest
import sys
from collections.abc import Callable
from typing import Any

import control
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_classical_model import F64, REFERENCE, close, some_model, spd
from torch import Tensor
from torch.autograd import gradcheck

from stateline.classical import control as module
from stateline.classical.control import (
    analyse,
    controllability,
    from_control,
    gramians,
    lqr,
    observability,
    to_control,
)
from stateline.classical.model import StateSpace, simulate


def tensors(entry: str, names: str) -> list[Tensor]:
    return [torch.tensor(REFERENCE[entry][name], dtype=F64) for name in names]


def test_docstrings() -> None:
    found = doctest.testmod(module)
    assert found.attempted > 4
    assert found.failed == 0


def test_reference_values() -> None:
    A, B, C = tensors("gramians", "ABC")
    expected, got = REFERENCE["gramians"], gramians(A, B, C)
    close(controllability(A, B), expected["controllability_matrix"])
    close(observability(A, C), expected["observability_matrix"])
    close(got.controllability, expected["Wc"])
    close(got.observability, expected["Wo"])
    close(got.hankel, expected["hankel_singular_values"])
    still = StateSpace(A, B, C, None, torch.eye(3, dtype=F64), torch.eye(1, dtype=F64), torch.zeros(3, dtype=F64), A)
    impulse = torch.zeros(7, 1, dtype=F64)
    impulse[0] = 1
    close(simulate(still, 7, impulse, noise=False)[1][1:, 0], expected["impulse_response"])
    expected, got_lqr = REFERENCE["lqr"], lqr(*tensors("lqr", "ABQR"))
    close(got_lqr.K, expected["K"])
    close(got_lqr.P, expected["P"])
    A, B = tensors("lqr", "AB")
    values = torch.view_as_real(torch.linalg.eigvals(A - B @ got_lqr.K))
    close(values[values[:, 1].argsort(descending=True)], expected["closed_loop_eigenvalues"])


# ---- analysis --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 4), st.integers(1, 3), st.booleans())
def test_motions_that_no_input_moves_are_found(seed: int, moved: int, hidden: int, p: int, continuous: bool) -> None:
    """Hidden behind a change of coordinates; their duals are those that no observation shows."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=F64, generator=g)

    n = moved + hidden
    inner, rest = draw(moved, moved), draw(hidden, hidden)
    A = torch.cat(
        [torch.cat([inner, draw(moved, hidden)], 1), torch.cat([torch.zeros(hidden, moved, dtype=F64), rest], 1)]
    )
    B = torch.cat([draw(moved, p), torch.zeros(hidden, p, dtype=F64)])
    turn = torch.linalg.qr(draw(n, n)).Q
    A, B = turn @ A @ turn.mT, turn @ B
    report = analyse(A, B, continuous=continuous)
    assert report.uncontrollable is not None
    assert len(report.uncontrollable) == hidden
    for value in torch.linalg.eigvals(rest):
        assert (report.uncontrollable - value).abs().min() < 1e-6
    assert report.controllable == (hidden == 0)
    out = torch.linalg.eigvals(rest)
    dies = bool((out.real < 0 if continuous else out.abs() < 1).all())
    assert report.stabilisable == dies
    dual = analyse(A.mT, C=B.mT, continuous=continuous)
    assert dual.unobservable is not None
    assert len(dual.unobservable) == hidden
    assert (dual.observable, dual.detectable) == (report.controllable, report.stabilisable)
    assert not dual.controllable


def test_what_a_report_says() -> None:
    A = torch.diag(torch.tensor([0.5, 1.5, 0.9]))
    text = str(analyse(A, torch.tensor([[1.0], [0.0], [1.0]]), torch.tensor([[0.0, 1.0, 1.0]])))
    assert text == (
        "discrete system, 3 states: not stable, spectral radius 1.5\n"
        "  controllable: 2 of 3 states; not stabilisable, eigenvalues of the rest 1.5\n"
        "  observable: 2 of 3 states; detectable, eigenvalues of the rest 0.5\n"
        "  eigenvalues 1.5, 0.9, 0.5"
    )
    text = str(analyse(-torch.eye(1), torch.ones(1, 1), continuous=True))
    assert text == (
        "continuous system, 1 state: stable, spectral abscissa -1\n"
        "  a free state falls to 1/e in 1 units of time\n"
        "  controllable\n"
        "  eigenvalues -1"
    )
    assert analyse(torch.eye(2), torch.zeros(2, 0)).uncontrollable is not None
    assert not analyse(torch.eye(2)).stabilisable


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_of_the_dtype_reaches_nothing(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    T = torch.linalg.qr(torch.randn(4, 4, dtype=F64))[0]
    A = torch.block_diag(0.5 * torch.randn(2, 2, dtype=F64), torch.diag(torch.tensor([0.8, 0.3], dtype=F64)))
    B = torch.tensor([[1.0], [0.5], [0.0], [0.0]], dtype=F64)
    report = analyse((T @ A @ T.mT).to(dtype), (T @ B).to(dtype))
    assert report.uncontrollable is not None
    close(report.uncontrollable.real.sort().values, [0.3, 0.8], 1e-5)


def test_a_long_chain_is_controllable() -> None:
    """Where the rank of [B, A B, …] fails: its columns span 1e-18 of a direction."""
    n = 30
    A = torch.diag(torch.linspace(0.1, 0.9, n, dtype=F64)) + 0.5 * torch.diag(torch.ones(n - 1, dtype=F64), 1)
    B = torch.eye(n, dtype=F64)[:, -1:]
    assert torch.linalg.matrix_rank(controllability(A, B)) < n
    assert analyse(A, B).controllable


@pytest.mark.parametrize("continuous", [False, True])
def test_gramians_are_energies(continuous: bool) -> None:
    A, B, C = torch.randn(3, 3, dtype=F64), torch.randn(3, 2, dtype=F64), torch.randn(2, 3, dtype=F64)
    A = A / torch.linalg.eigvals(A).abs().max() * 0.8 if not continuous else A - 4 * torch.eye(3, dtype=F64)
    got = gramians(A, B, C, continuous=continuous)
    if continuous:
        dt = 1e-3
        step, grown = torch.linalg.matrix_exp(A * dt), [torch.linalg.matrix_exp(A * dt / 2)]  # the midpoint rule
        while len(grown) < 8000:
            grown.append(step @ grown[-1])
        reach, shown = (sum((x @ x.mT for x in xs), torch.zeros(3, 3, dtype=F64)) * dt for xs in
                        ([e @ B for e in grown], [(C @ e).mT for e in grown]))  # fmt: skip
        bound = 1e-5
    else:
        long = 200
        whole = torch.cat([torch.linalg.matrix_power(A, k) @ B for k in range(long)], 1)
        reach = whole @ whole.mT
        seen = torch.cat([C @ torch.linalg.matrix_power(A, k) for k in range(long)])
        shown, bound = seen.mT @ seen, 1e-11
        goal = torch.randn(3, dtype=F64)
        least = torch.linalg.pinv(whole) @ goal  # the smallest inputs that lead there
        close(goal @ torch.linalg.solve(got.controllability, goal), least @ least, 1e-9 * float(least @ least))
    close(got.controllability, reach, bound)
    close(got.observability, shown, bound)
    close(
        got.hankel,
        torch.linalg.eigvals(got.controllability @ got.observability).real.sqrt().sort().values.flip(0),
        1e-9,
    )


# ---- feedback --------------------------------------------------------------------------------------------------------


def costs(A: Tensor, B: Tensor, Q: Tensor, R: Tensor, horizon: int, final: Tensor) -> tuple[Tensor, Tensor]:
    """P of the horizon, and the first inputs (p, n) a state: all of it one quadratic in all inputs, solved once."""
    n, p = B.shape[-2:]

    def at(x: Tensor, t: int) -> Tensor:
        return x[min(t, len(x) - 1)] if x.dim() == 3 else x

    of_start, of_inputs = torch.eye(n, dtype=F64), torch.zeros(n, p * horizon, dtype=F64)
    H, G, F = (
        torch.zeros(p * horizon, p * horizon, dtype=F64),
        torch.zeros(p * horizon, n, dtype=F64),
        torch.zeros(n, n, dtype=F64),
    )
    for t in range(horizon + 1):
        weight = at(Q, t) if t < horizon else final
        H = H + of_inputs.mT @ weight @ of_inputs
        G = G + of_inputs.mT @ weight @ of_start
        F = F + of_start.mT @ weight @ of_start
        if t < horizon:
            cut = slice(p * t, p * t + p)
            H[cut, cut] += at(R, t)
            of_start, of_inputs = at(A, t) @ of_start, at(A, t) @ of_inputs
            of_inputs[:, cut] += at(B, t)
    best = -torch.linalg.solve(H, G)
    return F + G.mT @ best, best[:p]


@pytest.mark.parametrize("varying", [False, True])
def test_a_finite_horizon_is_one_least_squares_problem(varying: bool) -> None:
    lead = (5,) if varying else ()
    A, B, Q, R, final = (
        torch.randn(*lead, 3, 3, dtype=F64),
        torch.randn(*lead, 3, 2, dtype=F64),
        spd(3, *lead),
        spd(2, *lead),
        spd(3),
    )
    got = lqr(A, B, Q, R, horizon=5, final=final)
    assert got.K.shape == (5, 2, 3)
    assert got.P.shape == (6, 3, 3)
    P, first = costs(A, B, Q, R, 5, final)
    close(got.P[0] / P.abs().max(), P / P.abs().max(), 1e-11)
    close(got.K[0], -first, 1e-8)
    close(got.P[5], final, 0)
    assert lqr(
        A[:0] if varying else A,
        B[:0] if varying else B,
        Q[:0] if varying else Q,
        R[:0] if varying else R,
        horizon=0,
        final=final,
    ).K.shape == (0, 2, 3)


def test_a_finite_horizon_has_gradients_and_batches() -> None:
    A, B, L, M = (
        torch.randn(2, 1, 3, 3, dtype=F64),
        torch.randn(3, 2, dtype=F64),
        torch.randn(3, 3, dtype=F64),
        torch.randn(2, 2, dtype=F64),
    )
    alone = lqr(A[1, 0], B, L @ L.mT, M @ M.mT, horizon=4)
    close(lqr(A, B, L @ L.mT, M @ M.mT, horizon=4).K[1], alone.K, 1e-11)
    inputs = [x.requires_grad_() for x in (A, B, L, M)]
    assert gradcheck(lambda a, b, q, r: tuple(lqr(a, b, q @ q.mT, r @ r.mT, horizon=3)), inputs)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 2))
def test_for_ever_is_a_long_horizon(seed: int, n: int, p: int) -> None:
    g = torch.Generator().manual_seed(seed)
    A, B = torch.randn(n, n, dtype=F64, generator=g), torch.randn(n, p, dtype=F64, generator=g)
    Q, R = torch.eye(n, dtype=F64), torch.eye(p, dtype=F64)
    got, long = lqr(A, B, Q, R), lqr(A, B, Q, R, horizon=300)
    close(got.K / got.K.abs().max(), long.K[0] / got.K.abs().max(), 1e-7)
    assert analyse(A - B @ got.K).stable


def test_continuous_feedback_is_the_limit_of_fast_samples() -> None:
    A, B, Q, R = torch.randn(3, 3, dtype=F64), torch.randn(3, 1, dtype=F64), spd(3), torch.eye(1, dtype=F64)
    got = lqr(A, B, Q, R, continuous=True)
    assert analyse(A - B @ got.K, continuous=True).stable
    dt = 1e-5
    fast = lqr(torch.eye(3, dtype=F64) + dt * A, dt * B, dt * Q, dt * R)
    torch.testing.assert_close(fast.K, got.K, rtol=2e-3, atol=1e-3)
    left = A.mT @ got.P + got.P @ A - got.P @ B @ B.mT @ got.P + Q
    close(left / got.P.abs().max(), torch.zeros(3, 3), 1e-9)


ONE = torch.eye(2, dtype=F64)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: lqr(2 * ONE, ONE[:, :1], ONE, ONE[:1, :1]),
            r"lqr: .*No input moves the motions of eigenvalues 2, which do not die out\.$",
        ),
        (
            lambda: lqr(torch.diag(torch.tensor([0.5, 1.0], dtype=F64)), ONE[:, :1], ONE, ONE[:1, :1]),
            r"lqr: .*eigenvalues 1, which do not die out\. Let a disturbance that wanders fade, if slowly: 0\.999",
        ),
        (lambda: lqr(ONE, ONE, 0 * ONE, ONE), r"lqr: .*Every motion on the edge of stability must cost something"),
        (lambda: lqr(ONE, ONE, -ONE, ONE), r"lqr: Q has the eigenvalue -1, expected none below 0: it is a weight"),
        (
            lambda: lqr(ONE, ONE, ONE, ONE[:1, :1]),
            r"lqr: R has shape \(1, 1\), expected \(…, p, p\) with p = 2 \(set by B\)",
        ),
        (lambda: lqr(ONE.expand(4, 2, 2), ONE, ONE, ONE), r"lqr: A has shape \(4, 2, 2\), expected \(n, n\)"),
        (lambda: lqr(ONE.expand(4, 2, 2), ONE, ONE, ONE, horizon=5), r"lqr: A has shape \(4, 2, 2\), expected 5 steps"),
        (lambda: lqr(ONE, ONE, ONE, 0 * ONE, horizon=2, final=0 * ONE), r"lqr: R \+ Bᵀ P B is singular at step 1"),
        (lambda: lqr(ONE, ONE, ONE, ONE, final=ONE), r"lqr: final is given and horizon is None"),
        (lambda: lqr(ONE, ONE, ONE, ONE, horizon=3, continuous=True), r"lqr: horizon is 3 and continuous is True"),
        (lambda: lqr(ONE, ONE.float(), ONE, ONE), r"lqr: B is float32, expected one of float64"),
        (lambda: gramians(ONE, ONE, ONE), r"gramians: A is not stable"),
        (lambda: analyse(ONE, ONE[:1]), r"analyse: B has shape \(1, 2\), expected \(n, p\) with n = 2 \(set by A\)"),
        (lambda: analyse(ONE * torch.nan), r"analyse: A has values that are not finite"),
    ],
)
def test_refusals(call: Callable[[], Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        call()


# ---- python-control --------------------------------------------------------------------------------------------------


def test_there_and_back() -> None:
    x = some_model(3, 2, 1)
    there = to_control(x, dt=0.5)
    assert there.dt == 0.5
    back = from_control(there, x.Q, x.R, m0=x.m0, P0=x.P0)
    for name in StateSpace._fields:
        close(getattr(back, name), getattr(x, name), 0)
    u = torch.randn(20, 1, dtype=F64)
    expected = control.forced_response(there, inputs=u.mT.numpy(), initial_state=x.m0.numpy()).outputs
    close(simulate(x, 20, u, noise=False)[1].mT, expected, 1e-10)
    assert to_control(x._replace(B=None, D=None)).ninputs == 0


def test_a_transfer_function_is_sampled() -> None:
    x = from_control(control.tf([1.0], [1.0, 0.3, 2.0]), dt=0.1, R=torch.eye(1, dtype=F64))
    _, y = simulate(x, 100, torch.ones(100, 1, dtype=F64), noise=False)
    expected = control.step_response(control.tf([1.0], [1.0, 0.3, 2.0]), np.arange(100) * 0.1).outputs
    close(y[:, 0], expected, 1e-8)
    with pytest.raises(ValueError, match=r"from_control: the system is continuous and dt is None"):
        from_control(control.tf([1.0], [1.0, 1.0]))
    with pytest.raises(ValueError, match=r"from_control: dt is 0\.2, and the system's own is 0\.1"):
        from_control(control.tf([1.0], [1.0, 0.5], 0.1), dt=0.2)
    with pytest.raises(ValueError, match=r"to_control: A has shape \(5, 2, 2\), expected one constant matrix"):
        to_control(x._replace(A=x.A.expand(5, 2, 2)))


@pytest.mark.parametrize(
    ("package", "call"), [("control", lambda: to_control(some_model())), ("scipy", lambda: lqr(ONE, ONE, ONE, ONE))]
)
def test_without_the_extra_it_is_named(package: str, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'stateline\[classical\]'"):
        call()


def test_a_weight_that_varies_ends_with_its_last() -> None:
    A, B, R = torch.randn(2, 2, dtype=F64), torch.randn(2, 1, dtype=F64), torch.eye(1, dtype=F64)
    Q = torch.stack([spd(2) for _ in range(5)])
    got, wanted = lqr(A, B, Q, R, horizon=5), lqr(A, B, Q, R, horizon=5, final=Q[-1])
    assert torch.equal(got.K, wanted.K)
    assert got.P.shape == (6, 2, 2)
