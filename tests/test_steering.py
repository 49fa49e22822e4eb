"""Steering: the average cost it promises, limits kept, inputs beside two other solvers, no memory but for speed."""

from __future__ import annotations

import dataclasses
import doctest
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from test_classical_model import F64, close, some_model, spd
from torch import Tensor

from stateline.classical import horizon as horizon_module
from stateline.classical import regulator as lqg_module
from stateline.classical.components import stationary_covariance
from stateline.classical.control import lqr
from stateline.classical.horizon import Limits, RecedingHorizon
from stateline.classical.model import StateSpace
from stateline.classical.regulator import Lqg, equilibrium, lqg
from stateline.classical.sampled import discretize

ONE = torch.eye(1, dtype=F64)


def springs() -> StateSpace:
    """Two masses, a spring and a damper between them, a force on the first, the place of the second seen."""
    k, c, dt = 1.0, 0.1, 0.2
    Ac = torch.tensor([[0, 1, 0, 0], [-k, -c, k, c], [0, 0, 0, 1], [k, c, -k, -c]], dtype=F64)
    Bc = torch.tensor([[0.0], [1.0], [0.0], [0.0]], dtype=F64)
    sampled = discretize(Ac, Bc, dt, 0.01 * torch.diag(torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=F64)))
    assert sampled.Q is not None
    C = torch.tensor([[0.0, 0.0, 1.0, 0.0]], dtype=F64)
    return StateSpace(
        sampled.A, sampled.B, C, None, sampled.Q, 0.01 * ONE, torch.zeros(4, dtype=F64), torch.eye(4, dtype=F64)
    )


@pytest.mark.parametrize("module", [lqg_module, horizon_module], ids=["lqg", "horizon"])
def test_docstrings(module: Any) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 2
    assert found.failed == 0


# ---- seen through noise ----------------------------------------------------------------------------------------------


def average_cost(x: StateSpace, Q: Tensor, R: Tensor, L: Tensor, K: Tensor) -> float:
    """Of plant and filter as one system driven by both noises, from the covariance it settles at."""
    assert x.B is not None
    n = len(x.A)
    # [h, m]: x̂ = m + K(C h + n − C m), u = −L x̂
    see = torch.cat([K @ x.C, torch.eye(n, dtype=F64) - K @ x.C], 1)  # x̂ of [h, m], beside K n
    whole = torch.block_diag(x.A, torch.zeros(n, n, dtype=F64))
    whole[:n] -= x.B @ L @ see
    whole[n:] += (x.A - x.B @ L) @ see
    enter = torch.cat([-x.B @ L @ K, (x.A - x.B @ L) @ K])
    noise = torch.block_diag(x.Q, torch.zeros(n, n, dtype=F64)) + enter @ x.R @ enter.mT
    cov = stationary_covariance(whole, noise)
    u = L @ see @ cov @ see.mT @ L.mT + L @ K @ x.R @ K.mT @ L.mT
    return float((Q @ cov[:n, :n]).trace() + (R @ u).trace())


def test_the_cost_is_the_promised_one_and_the_least() -> None:
    x, Q, R = springs(), torch.diag(torch.tensor([0.0, 0.1, 1.0, 0.1], dtype=F64)), 0.1 * ONE
    controller = lqg(x, Q, R)
    best = average_cost(x, Q, R, controller.gain, controller.steady.gain)
    assert float(controller.cost) == pytest.approx(best, rel=1e-9)
    for _ in range(5):
        L, K = (v + 0.02 * torch.randn_like(v) for v in (controller.gain, controller.steady.gain))
        assert average_cost(x, Q, R, L, controller.steady.gain) > best
        assert average_cost(x, Q, R, controller.gain, K) > best


def test_steps_make_that_cost() -> None:
    x, Q, R = springs(), torch.eye(4, dtype=F64), 0.1 * ONE
    assert x.B is not None
    controller = lqg(x, Q, R)
    count, g = 400, torch.Generator().manual_seed(1)
    factor, h = torch.linalg.cholesky(x.Q + 1e-12 * torch.eye(4, dtype=F64)), torch.zeros(count, 4, dtype=F64)
    state, total, after = controller.init_state(count), 0.0, 100
    for t in range(500):
        y = h @ x.C.mT + 0.1 * torch.randn(count, 1, dtype=F64, generator=g)
        u, _, state = controller.step(y, state)
        if t >= after:
            total += float((h.square().sum(-1) + 0.1 * u.square().sum(-1)).mean()) / (500 - after)
        h = h @ x.A.mT + u @ x.B.mT + torch.randn(count, 4, dtype=F64, generator=g) @ factor.mT
    assert total == pytest.approx(float(controller.cost), rel=0.02)


def test_missing_entries_are_left_out() -> None:
    """As the conditional of one Gaussian: all entries of y missing change nothing, one is told by the others."""
    torch.manual_seed(0)
    x = some_model(3, 2, 1)._replace(D=None)
    x = x._replace(A=0.9 * x.A / torch.linalg.eigvals(x.A).abs().max())
    controller = lqg(x, torch.eye(3, dtype=F64), ONE)
    state, y = torch.randn(4, 3, dtype=F64), torch.randn(4, 2, dtype=F64)
    y[1], y[2, 0] = torch.nan, torch.nan
    mean = controller.update(y, state)
    whole = controller.update(y.nan_to_num(), state)
    assert torch.equal(mean[1], state[1])
    close(mean[[0, 3]], whole[[0, 3]], 1e-12)
    P, C = controller.steady.predicted_cov, x.C[1:]
    gain = P @ C.mT / (C @ P @ C.mT + x.R[1:, 1:])
    close(mean[2], state[2] + gain[:, 0] * (y[2, 1] - C[0] @ state[2]), 1e-10)
    decision = controller.step(torch.full((2,), torch.nan, dtype=F64), state[0])
    close(decision.state, controller.predict(state[0], decision.u), 1e-12)


def test_an_input_before_that_its_rates_cannot_leave_is_named() -> None:
    x = springs()
    weights = torch.ones(1, 1, dtype=F64), 0.1 * ONE
    controller = RecedingHorizon(x, *weights, horizon=5, limits=Limits(inputs=(-1.0, 1.0), rates=(-0.1, 0.1)))
    h = torch.zeros(4, dtype=F64)
    controller.plan(h, before=torch.tensor([1.1], dtype=F64))
    with pytest.raises(ValueError, match=r"before\[0\] is 1\.2, and no change within limits\.rates"):
        controller.plan(h, before=torch.tensor([1.2], dtype=F64))


def test_a_target_is_held() -> None:
    x = springs()
    assert x.B is not None
    controller = lqg(x, torch.eye(4, dtype=F64), 0.1 * ONE)
    target = equilibrium(x, torch.tensor([2.0], dtype=F64))
    close(target.h, [2.0, 0.0, 2.0, 0.0], 1e-12)
    close(target.u, [0.0], 1e-12)
    h, state = torch.tensor([1.0, 0.0, -1.0, 0.0], dtype=F64), controller.init_state()
    for _ in range(300):
        u, _, state = controller.step(x.C @ h, state, target)
        h = x.A @ h + x.B @ u
    close(h, target.h, 1e-6)


def test_a_rest_is_one() -> None:
    x = some_model(4, 2, 3)
    y = torch.randn(5, 2, dtype=F64)
    h, u = equilibrium(x, y)
    assert x.B is not None
    assert x.D is not None
    close(h @ x.A.mT + u @ x.B.mT, h, 1e-10)
    close(h @ x.C.mT + u @ x.D.mT, y, 1e-10)
    with pytest.raises(ValueError, match=r"equilibrium: no rest has these y, the nearest misses them by"):
        equilibrium(some_model(4, 3, 1), torch.ones(3, dtype=F64))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda x, c: lqg(some_model(), torch.eye(3, dtype=F64), torch.eye(2, dtype=F64)),
            r"lqg: the model has D, and",
        ),
        (lambda x, c: lqg(x._replace(B=None), x.A, ONE), r"lqg: the model has no B, expected inputs"),
        (lambda x, c: lqg(x._replace(A=x.A.expand(5, 4, 4)), x.A, ONE), r"lqg: A has shape \(5, 4, 4\), expected one"),
        (
            lambda x, c: c.update(torch.ones(2, dtype=F64), c.init_state()),
            r"lqg\.update: y has shape \(2,\), expected \(…, 1\)",
        ),
        (lambda x, c: c.control(torch.ones(4)), r"lqg\.control: mean is float32, expected one of float64"),
        (
            lambda x, c: c.predict(torch.ones(4, dtype=F64), 1.0),
            r"lqg\.predict: u is a float, expected a tensor \(…, 1\)",
        ),
    ],
)
def test_lqg_refuses(call: Callable[[StateSpace, Lqg], Any], words: str) -> None:
    x = springs()
    with pytest.raises((ValueError, TypeError), match=words):
        call(x, lqg(x, torch.eye(4, dtype=F64), ONE))


# ---- within limits ---------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.booleans())
def test_without_limits_it_is_the_lqr(seed: int, steps: int, target: bool) -> None:
    torch.manual_seed(seed)
    x = some_model(3, 2, 2)._replace(D=None)
    assert x.B is not None
    Q, R, h = spd(2), spd(2) + torch.eye(2, dtype=F64), torch.randn(3, dtype=F64)
    wanted = torch.randn(2, dtype=F64) if target else None
    got = RecedingHorizon(x, Q, R, horizon=steps).plan(h, wanted)
    gain = lqr(x.A, x.B, x.C.mT @ Q @ x.C, R).K
    rest = equilibrium(x, torch.zeros(2, dtype=F64) if wanted is None else wanted)
    for t in range(steps):
        expected = rest.u - gain @ (h - rest.h)
        close(got.u[t] / (1 + expected.abs().max()), expected / (1 + expected.abs().max()), 1e-6)
        h = x.A @ h + x.B @ expected


def cost_of(x: StateSpace, u: Tensor, h: Tensor, before: Tensor, wanted: Tensor, S: Tensor, P: Tensor) -> Tensor:
    """Of inputs (T, p), by running the plant; Q and R are one, and rest costs nothing at input 0."""
    assert x.B is not None
    total, last = h.new_zeros(()), before
    for t in range(len(u)):
        h = x.A @ h + x.B @ u[t]
        total = total + u[t].square().sum() + (u[t] - last) @ S @ (u[t] - last)
        if t < len(u) - 1:
            total = total + (x.C @ h - wanted[t]).square().sum()
        last = u[t]
    away = h - equilibrium(x, wanted[-1]).h
    return total + away @ P @ away


@pytest.mark.parametrize("kind", ["inputs", "rates", "states", "outputs", "all"])
def test_with_limits_it_is_what_another_solver_finds(kind: str) -> None:
    x, steps = springs(), 12
    assert x.B is not None
    every = Limits(
        inputs=(-0.1, 0.12),
        rates=(-0.2, 0.3),
        states=(-0.35, torch.tensor([2.0, 0.3, 1.0, 0.2], dtype=F64)),
        outputs=(-0.26, 0.1),
    )
    limits = every if kind == "all" else Limits(**{kind: getattr(every, kind)})
    S, P = 0.1 * ONE, 2 * torch.eye(4, dtype=F64)
    h, before = torch.tensor([0.1, 0.0, -0.2, 0.0], dtype=F64), torch.tensor([0.05], dtype=F64)
    wanted = torch.linspace(0.2, 0.6, steps, dtype=F64)[:, None]
    controller = RecedingHorizon(x, ONE, ONE, horizon=steps, rate=S, final=P, limits=limits)
    plan = controller.plan(h, wanted, before)

    powers = [torch.linalg.matrix_power(x.A, k) for k in range(steps + 1)]
    free = torch.cat([powers[t + 1] @ h for t in range(steps)])
    forced = torch.zeros(4 * steps, steps, dtype=F64)
    for t in range(steps):
        for s in range(t + 1):
            forced[4 * t : 4 * t + 4, s : s + 1] = powers[t - s] @ x.B
    change = torch.eye(steps, dtype=F64) - torch.diag(torch.ones(steps - 1, dtype=F64), -1)
    first = torch.nn.functional.pad(-before, (0, steps - 1))
    seen = torch.kron(torch.eye(steps, dtype=F64), x.C)
    rows = {"inputs": (torch.eye(steps, dtype=F64), 0.0), "rates": (change, first), "states": (forced, free)}
    rows["outputs"] = seen @ forced, seen @ free
    constraints = []
    for name, (matrix, offset) in rows.items():
        box = getattr(limits, name)
        if box is not None:
            low, high = (
                (end.repeat(steps) if isinstance(end, Tensor) else torch.full((len(matrix),), end, dtype=F64)) - offset
                for end in box
            )
            constraints.append(optimize.LinearConstraint(matrix.numpy(), low.numpy(), high.numpy()))

    def objective(u: np.ndarray) -> tuple[float, np.ndarray]:
        made = torch.tensor(u[:, None], requires_grad=True)
        cost = cost_of(x, made, h, before, wanted, S, P)
        cost.backward()
        assert made.grad is not None
        return float(cost.detach()), made.grad[:, 0].numpy()

    found = optimize.minimize(
        objective,
        np.zeros(steps),
        jac=True,
        method="SLSQP",
        constraints=constraints,
        options=dict(ftol=1e-14, maxiter=500),
    )
    close(plan.u[:, 0], found.x, 1e-5)
    assert any((abs(c.A @ found.x - end) < 1e-7).any() for c in constraints for end in (c.lb, c.ub)), (
        "no limit is touched"
    )
    close(plan.h[1:].flatten(), free + forced @ plan.u[:, 0], 1e-9)


def test_a_loop_keeps_its_limits_and_arrives() -> None:
    x = springs()
    assert x.B is not None
    limits = Limits(
        inputs=(-0.5, 0.5), rates=(-0.1, 0.1), states=(-1.0, torch.tensor([9.0, 0.2, 9.0, 0.25], dtype=F64))
    )
    controller = RecedingHorizon(x, 10 * ONE, ONE, horizon=30, limits=limits)
    h, u, goal = torch.zeros(4, dtype=F64), torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)
    fastest, warm = 0.0, []
    for _ in range(120):
        plan = controller.plan(h, goal, u)
        assert (plan.u[0] - u).abs().max() <= 0.1 + 1e-15
        u = plan.u[0]
        h = x.A @ h + x.B @ u
        assert u.abs().max() <= 0.5
        assert (h <= torch.tensor([9.0, 0.2, 9.0, 0.25]) + 5 * horizon_module.PRECISION).all()
        fastest, warm = max(fastest, float(h[1])), [*warm, plan.iterations]
    assert fastest > 0.1999
    close(h, [1.0, 0.0, 1.0, 0.0], 1e-3)
    assert np.median(warm) <= 50  # a cold start takes hundreds
    cold = RecedingHorizon(x, 10 * ONE, ONE, horizon=30, limits=limits)
    close(cold.plan(h, goal, u).u, controller.plan(h, goal, u).u, 1e-5)


@pytest.mark.parametrize(
    ("kind", "kept", "inside"),
    [
        ("states", "states", [-0.186, 0.292, 0.168, -0.083]),
        ("outputs", "outputs", [0.1, 0.1, 0.21, 0.17]),
        ("states outputs", "states and outputs", [-0.186, 0.292, 0.168, -0.083]),
    ],
)
def test_soft_limits_have_an_answer_everywhere(kind: str, kept: str, inside: list[float]) -> None:
    x = springs()
    hard = Limits(inputs=(-0.5, 0.5), **dict.fromkeys(kind.split(), (-0.3, 0.3)))
    h = torch.tensor([0.5, 0.2, 0.5, 0.2], dtype=F64)
    with pytest.raises(ValueError, match=rf"no inputs within the limits keep the {kept} .*make those of {kept} soft"):
        RecedingHorizon(x, ONE, ONE, horizon=10, limits=hard).plan(h)
    controller = RecedingHorizon(x, ONE, ONE, horizon=10, limits=dataclasses.replace(hard, soft=100.0))
    assert controller.plan(h).u.abs().max() <= 0.5 + 1e-6
    start = torch.tensor(inside, dtype=F64)
    expected = RecedingHorizon(x, ONE, ONE, horizon=10, limits=hard).plan(start)
    limited = expected.y if kind == "outputs" else expected.h
    assert (limited[1:].abs() > 0.2999).any(), "no limit is touched"
    close(controller.plan(start).u, expected.u, 1e-5)
    close(controller.plan(start).u, expected.u, 1e-5)  # from the solution before, moved by a step


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: RecedingHorizon(x, ONE, ONE, horizon=0), r"horizon is 0, expected a whole number at least 1"),
        (lambda x: RecedingHorizon(x, x.A, ONE, horizon=3), r"Q has shape \(4, 4\), expected \(1, 1\)"),
        (lambda x: RecedingHorizon(x, ONE, -ONE, horizon=3), r"R has the eigenvalue -1, .* a weight"),
        (
            lambda x: RecedingHorizon(x, ONE, ONE, horizon=3, limits=(-1.0, 1.0)),  # type: ignore[arg-type]  # wrong
            r"limits is \(-1\.0, 1\.0\), expected Limits\(inputs=\(low, high\), …\)",
        ),
        (
            lambda x: RecedingHorizon(x, ONE, ONE, horizon=3, limits=Limits(1.0)),  # type: ignore[arg-type]  # wrong
            r"limits\.inputs is 1\.0, expected two ends",
        ),
        (
            lambda x: RecedingHorizon(x, ONE, ONE, horizon=3, limits=Limits((1.0, -1.0))),
            r"limits\.inputs is .* low ≤ high",
        ),
        (
            lambda x: RecedingHorizon(x, ONE, ONE, horizon=3, limits=Limits(states=(torch.ones(3), 2.0))),
            r"limits\.states has an end of shape \(3,\), expected \(\) or \(4,\)",
        ),
        (
            lambda x: RecedingHorizon(x, ONE, ONE, horizon=3, limits=Limits(outputs=(torch.ones(4), 2.0))),
            r"limits\.outputs has an end of shape \(4,\), expected \(\) or \(1,\)",
        ),
        (lambda x: RecedingHorizon(x, ONE, ONE, horizon=3, rate=ONE).plan(x.m0), r"before is None, expected \(1,\)"),
        (lambda x: RecedingHorizon(x, ONE, ONE, horizon=3).plan(x.m0[:3]), r"h has shape \(3,\), expected \(4,\)"),
        (lambda x: RecedingHorizon(x, ONE, ONE, horizon=3).plan(x.m0 * torch.nan), r"h has values that are not finite"),
        (
            lambda x: RecedingHorizon(x, ONE, ONE, horizon=3).plan(x.m0, torch.ones(2, 1, dtype=F64)),
            r"reference has shape \(2, 1\), expected \(3, 1\)",
        ),
    ],
)
def test_horizons_refuse(call: Callable[[StateSpace], Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=r"^RecedingHorizon: " + words):
        call(springs())


def test_without_osqp_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "osqp", None)
    with pytest.raises(ImportError, match=r"RecedingHorizon: needs OSQP .*pip install 'stateline\[classical\]'"):
        RecedingHorizon(springs(), ONE, ONE, horizon=3)
