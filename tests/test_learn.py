"""Learning: values of 60 digits, likelihoods that never fall, entries that stay, one optimum by two methods."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import pytest
import torch
from test_kalman_filter import CASES, agrees, load
from torch import Tensor

from stateline.classical import (
    FitOptions,
    StateSpace,
    em,
    fit,
    kalman_filter,
    learn,
    local_level,
    simulate,
)  # fmt: skip

F64 = torch.float64
QUICK = FitOptions(errors=False, tolerance=0.0)
ALL = ("A", "C", "Q", "R", "m0", "P0")


def loglik(model: StateSpace, y: Tensor, u: Tensor | None = None) -> Tensor:
    return kalman_filter(model, y, u, keep="loglik")[0].loglik.sum(-1)


def system(n: int = 3, m: int = 2, p: int = 1, seed: int = 0) -> StateSpace:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=F64, generator=generator)

    def cov(k: int, size: float) -> Tensor:
        X = draw(k, k)
        return size * (X @ X.mT / k + 0.5 * torch.eye(k, dtype=F64))

    A = draw(n, n)
    A = 0.85 * A / torch.linalg.eigvals(A).abs().max()
    return StateSpace(A, draw(n, p), draw(m, n), draw(m, p), cov(n, 0.3), cov(m, 0.5), draw(n), cov(n, 1.0))


def data(model: StateSpace, N: int = 6, T: int = 40, gaps: bool = True, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Series with whole rows and single entries missing, and their inputs."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(N, T, model.B.shape[-1] if model.B is not None else 1, dtype=F64, generator=generator)
    y = simulate(model, T, u, batch=N, generator=generator)[1]
    if gaps:
        rows = torch.rand(N, T, 1, generator=generator) < 0.1
        y = torch.where(rows | (torch.rand(y.shape, generator=generator) < 0.1), float("nan"), y)
    return y, u


def away(model: StateSpace) -> StateSpace:
    """Somewhere else, to start from."""
    eye = torch.eye(len(model.A), dtype=F64)
    Q, R = 0.4 * torch.diag(model.Q.diagonal()) + 0.1 * eye, 2 * model.R
    return model._replace(A=0.8 * model.A, Q=Q, R=R, m0=0 * model.m0, P0=2 * model.P0)


# ---- values of 60 digits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["joseph", "sqrt"])
@pytest.mark.parametrize(("name", "learn"), [("nile_local_level", ("Q", "R")), ("track2d", ALL)])
def test_reference_steps_of_em(name: str, learn: tuple[str, ...], form: str) -> None:
    case = CASES[name]
    model, y, u = load(case)
    options = FitOptions(errors=False, tolerance=0.0, form=form)
    one = fit(model, y, u, learn=learn, steps=1, options=options)
    for part, wanted in case["em"]["after_one_iteration"].items():
        agrees(part, getattr(one.model, part), wanted)
    ten = fit(model, y, u, learn=learn, steps=10, options=options)
    agrees("loglik", ten.loglik, case["em"]["loglik_before_iteration_0_to_10"])
    assert ten.reason == "all 10 steps are used up"
    assert ten.converged is False


def test_reference_maximum() -> None:
    case = CASES["nile_local_level"]
    model, y, _ = load(case)
    wanted = case["mle"]["known start m0=1000,P0=1e5"]
    found = fit(model, y, method="lbfgs", options=FitOptions(tolerance=1e-11))
    assert found.converged, found.reason
    assert found.model.Q.item() == pytest.approx(wanted["Q"], rel=1e-6)
    assert found.model.R.item() == pytest.approx(wanted["R"], rel=1e-6)
    assert found.loglik[-1].item() == pytest.approx(wanted["loglik"], abs=1e-9)
    assert fit(found.model, y, steps=1).loglik.diff().item() < 1e-9


# ---- never less likely, and entries that stay ------------------------------------------------------------------------


MASKS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "rows of A": {"A": [[1, 1, 1], [0, 0, 0], [1, 0, 1]]},
    "diagonal R": {"R": [[0, 1], [1, 0]], "C": [[1, 0, 0], [0, 0, 1]], "D": [[1], [0]]},
    "some of a block": {
        "Q": [[1, 0, 0], [0, 0, 1], [0, 1, 0]],
        "B": [[0], [1], [0]],
        "P0": [[0, 0, 1]] * 2 + [[1] * 3],
    },
    "some of m0": {"m0": [1, 0, 1]},
}


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("masks", list(MASKS))
def test_em_never_lowers_the_likelihood_and_keeps_what_is_frozen(masks: str, gaps: bool, each: bool) -> None:
    truth = system()
    y, u = data(truth, N=2, T=12, gaps=gaps)
    start = away(truth)
    if "Q" in MASKS[masks]:
        start = start._replace(Q=truth.Q)
    frozen = {name: torch.tensor(mask, dtype=torch.bool) for name, mask in MASKS[masks].items()}
    learn = tuple(StateSpace._fields)
    found = fit(start, y, u, learn=learn, frozen=frozen, each=each, steps=3, options=QUICK)
    gains = found.loglik.diff(dim=0)
    assert found.loglik.shape == ((4, 2) if each else (4,)), found.reason
    assert float(gains.min()) > 0
    assert torch.allclose(loglik(found.model, y, u) if each else loglik(found.model, y, u).sum(), found.loglik[-1])
    for name, mask in frozen.items():
        part, before = getattr(found.model, name), getattr(start, name)
        part = part[:, 0] if part.dim() > before.dim() + 1 else part
        assert torch.equal(part[..., mask], before[mask].expand_as(part[..., mask]))
        assert not torch.isclose(part[..., ~mask], before[~mask]).any()


@pytest.mark.parametrize("gaps", [False, True])
def test_a_step_of_em_is_the_best_answer_to_its_moments(gaps: bool) -> None:
    """Against moments of one Gaussian of the whole series: no parts near those of the step explain them better."""
    truth = system()
    (y, u), start = data(truth, N=1, T=6, gaps=False), away(truth)
    if gaps:
        y[0, 2] = float("nan")
        y[0, 4, 1] = float("nan")
    free = {"Q": [[0, 1, 1], [1, 1, 0], [1, 0, 0]], "A": [[1, 0, 0], [0, 1, 0], [0, 0, 0]]}
    frozen = {name: torch.tensor(mask, dtype=torch.bool) for name, mask in free.items()}
    start = start._replace(Q=truth.Q)
    learn = ("A", "B", "C", "D", "Q", "R", "m0", "P0")
    found = fit(start, y[0], u[0], learn=learn, frozen=frozen, steps=1, options=QUICK).model
    mean, cov = _given(start, y[0], u[0])

    def expected(model: StateSpace) -> Tensor:
        """E log p(states, completed observations), up to a constant."""
        return -_quadratic(model, mean, y[0], u[0], cov)

    x = [getattr(found, name).clone().requires_grad_() for name in learn]
    value = expected(StateSpace(*(dict(zip(learn, x, strict=True))[name] for name in StateSpace._fields)))
    for name, v, slope in zip(learn, x, torch.autograd.grad(value, x), strict=True):
        slope = (slope + slope.mT) / 2 if name in ("Q", "R", "P0") else slope
        slope = torch.where(frozen[name], 0.0, slope) if name in frozen else slope
        assert float(slope.abs().max()) < 1e-6 * max(1.0, 1 / float(v.detach().abs().max())), name


def _given(model: StateSpace, y: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of all states and all observations (T (n + m)) given those that are seen, by one Gaussian."""
    T, n, m = len(y), len(model.A), len(model.C)
    size = n + T * n + T * m  # h0's deviation and the noises, from which all follows linearly
    blocks = [model.P0, *[model.Q] * T, *[model.R] * T]
    noise = torch.block_diag(*blocks)
    h, H = model.m0, torch.zeros(n, size, dtype=F64)
    H[:, :n] = torch.eye(n, dtype=F64)
    means, rows, seen_means, seen_rows = [], [], [], []
    for t in range(T):
        means.append(h)
        rows.append(H.clone())
        e = torch.zeros(m, size, dtype=F64)
        e[:, n + T * n + t * m : n + T * n + (t + 1) * m] = torch.eye(m, dtype=F64)
        seen_means.append(model.C @ h + model.D @ u[t])
        seen_rows.append(model.C @ H + e)
        h, H = model.A @ h + model.B @ u[t], model.A @ H
        H[:, n + t * n : n + (t + 1) * n] += torch.eye(n, dtype=F64)
    M, mean = torch.cat([*rows, *seen_rows]), torch.cat([*means, *seen_means])
    cov = M @ noise @ M.mT
    there = torch.cat([torch.zeros(T * n, dtype=torch.bool), ~y.flatten().isnan()])
    gain = torch.linalg.solve(cov[there][:, there], cov[there]).mT
    return mean + gain @ (y.flatten()[there[T * n :]] - mean[there]), cov - gain @ cov[there]


def _quadratic(model: StateSpace, mean: Tensor, y: Tensor, u: Tensor, cov: Tensor) -> Tensor:
    """−E log p of states and observations, those of empty rows left out, for moments of all of them."""
    T, n, m = len(y), len(model.A), len(model.C)
    assert model.B is not None
    assert model.D is not None

    def cost(rows: list[tuple[Tensor, slice]], offset: Tensor, noise: Tensor) -> Tensor:
        r = sum((M @ mean[at] for M, at in rows), offset)
        spread = sum(M @ cov[at, other] @ K.mT for M, at in rows for K, other in rows)
        return 0.5 * (torch.logdet(noise) + torch.linalg.solve(noise, torch.outer(r, r) + spread).trace())

    def state(t: int) -> slice:
        return slice(t * n, (t + 1) * n)

    one, seen = torch.eye(n, dtype=F64), torch.eye(m, dtype=F64)
    total = cost([(one, state(0))], -model.m0, model.P0)
    for t in range(T):
        if t + 1 < T:
            total = total + cost([(one, state(t + 1)), (-model.A, state(t))], -model.B @ u[t], model.Q)
        if not y[t].isnan().all():
            at = slice(T * n + t * m, T * n + (t + 1) * m)
            total = total + cost([(seen, at), (-model.C, state(t))], -model.D @ u[t], model.R)
    return total


# ---- one optimum -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", [False, True])
def test_both_methods_find_one_maximum(each: bool) -> None:
    truth = system(n=2, m=2)
    y, u = data(truth, N=2, T=60)
    frozen = {"R": torch.tensor([[False, True], [True, False]])}
    start = away(truth)._replace(A=truth.A, R=torch.eye(2, dtype=F64))
    names = ("B", "R", "m0")
    found = [
        fit(
            start,
            y,
            u,
            learn=names,
            frozen=frozen,
            each=each,
            method=method,
            steps=2000,
            options=FitOptions(tolerance=t),
        )
        for method, t in (("em", 1e-10), ("lbfgs", 1e-10))
    ]
    for result in found:
        assert bool(torch.as_tensor(result.converged).all()), result.reason
        assert result.errors is not None, result.errors_reason
    for name in names:
        a, b = (getattr(result.model, name) for result in found)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[0].errors[name], found[1].errors[name], rtol=1e-2, atol=1e-5)  # type: ignore[index]  # one of each series
    assert (found[0].loglik[-1] - found[1].loglik[-1]).abs().max() < 1e-6


def test_both_methods_keep_one_entry_of_a_covariance() -> None:
    truth = system(n=2, m=2)
    y, u = data(truth, N=2, T=40)
    frozen = {"Q": torch.tensor([[True, False], [False, False]])}
    found = [
        fit(truth, y, u, learn=("Q",), frozen=frozen, method=method, steps=600, options=FitOptions(tolerance=1e-10))
        for method in ("em", "lbfgs")
    ]
    torch.testing.assert_close(found[0].model.Q, found[1].model.Q, rtol=1e-3, atol=1e-5)
    for result in found:
        assert result.model.Q[0, 0] == truth.Q[0, 0]
        assert result.errors is not None
        assert result.errors["Q"][0, 0] == 0


@pytest.mark.parametrize("method", ["em", "lbfgs"])
@pytest.mark.parametrize("each", [False, True])
def test_a_part_that_is_frozen_whole_is_as_one_that_is_not_learned(method: str, each: bool) -> None:
    truth = system(n=2, m=2)
    y, u = data(truth, N=2, T=40)
    frozen = {name: torch.ones(2, 2, dtype=torch.bool) for name in ("A", "Q")}
    both, one = (
        fit(truth, y, u, learn=learn, frozen=masks, method=method, each=each, steps=20)
        for learn, masks in ((("A", "Q", "R"), frozen), (("R",), {}))
    )
    assert torch.equal(both.model.R, one.model.R)
    assert torch.equal(both.model.A, truth.A)
    assert both.errors is not None
    assert both.errors["A"].tolist() == both.errors["Q"].tolist() == [[0, 0], [0, 0]]
    assert torch.equal(both.errors["R"], one.errors["R"])  # type: ignore[index]  # it has them


def test_a_part_may_be_named_by_itself() -> None:
    truth = system(n=2, m=2)
    y, u = data(truth, N=2, T=40)
    found = [fit(truth, y, u, learn=learn, steps=2, options=QUICK).model.m0 for learn in ("m0", ("m0",))]
    assert torch.equal(*found)


def test_standard_errors_are_the_spread_of_estimates() -> None:
    truth = local_level(level=0.5, noise=2.0, prior=1.0)
    y = simulate(truth, 300, batch=200, generator=torch.Generator().manual_seed(0))[1]
    found = fit(truth, y, method="lbfgs", each=True)
    assert bool(found.converged.all()), found.reason  # type: ignore[union-attr]  # one of each series
    assert found.errors is not None
    for name in ("Q", "R"):
        spread = getattr(found.model, name).std().item()
        assert found.errors[name].mean().item() == pytest.approx(spread, rel=0.12)


def test_standard_errors_by_second_derivatives() -> None:
    """The information of variances and an entry of A, by the dense likelihood of one Gaussian, differentiated twice."""
    truth = local_level(level=1.0, noise=0.5, prior=1.0)._replace(A=torch.tensor([[0.9]], dtype=F64))
    y = simulate(truth, 60, generator=torch.Generator().manual_seed(1))[1]
    found = fit(truth, y, learn=("A", "Q", "R"), method="lbfgs", options=FitOptions(tolerance=1e-12))

    def dense(x: Tensor) -> Tensor:
        a, q, r = x
        P, C = [truth.P0[0, 0]], []
        for _ in range(59):
            P.append(a * a * P[-1] + q)
        for i in range(60):
            C.append(torch.stack([a ** abs(i - j) * P[min(i, j)] for j in range(60)]))
        cov = torch.stack(C) + r * torch.eye(60, dtype=F64)
        mean = truth.m0 * a ** torch.arange(60, dtype=F64)
        return torch.distributions.MultivariateNormal(mean, cov).log_prob(y[:, 0])

    best = torch.stack([getattr(found.model, k)[0, 0] for k in ("A", "Q", "R")])
    wanted = torch.linalg.inv(-torch.autograd.functional.hessian(dense, best)).diagonal().sqrt()
    assert found.errors is not None
    got = torch.stack([found.errors[k][0, 0] for k in ("A", "Q", "R")])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=0)


def test_no_standard_errors_where_coordinates_are_open() -> None:
    truth = system(n=2, m=1, p=1)
    y, u = data(truth, N=2, T=60, gaps=False)
    found = fit(truth, y, u, learn=("A", "C", "Q", "R"), method="lbfgs", steps=5)
    assert found.errors is None
    assert "singular" in found.errors_reason
    assert "Freeze" in found.errors_reason


def test_no_standard_errors_where_a_variance_vanished() -> None:
    walk = local_level(level=1.0, noise=0.5, prior=1.0)
    y = simulate(walk._replace(R=0 * walk.R), 60, generator=torch.Generator().manual_seed(0))[1]
    found = fit(walk, y, method="lbfgs", options=FitOptions(tolerance=1e-9))
    assert found.model.R.item() < 1e-3
    assert found.errors is None
    assert "R went to the border" in found.errors_reason


# ---- what else ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["em", "lbfgs"])
def test_singular_noise_keeps_its_range(method: str) -> None:
    case = CASES["ar2_singular_Q_noise"]
    model, y, u = load(case)
    direction = torch.linalg.eigh(model.Q)[1][:, :1]
    frozen = {"A": torch.ones(model.A.shape, dtype=torch.bool)}
    frozen["A"][0] = False
    start = model._replace(A=model.A + torch.tensor([[0.1, -0.1], [0, 0]], dtype=F64)) if len(model.A) == 2 else model
    found = fit(start, y, u, learn=("A", "Q"), frozen=frozen, method=method, steps=30)
    assert found.loglik[-1] > found.loglik[0] + 0.1
    assert float((found.model.Q @ direction).abs().max()) < 1e-9 * float(found.model.Q.abs().max())
    assert torch.equal(found.model.A[1:], start.A[1:])
    if method == "lbfgs":
        assert found.errors is not None, found.errors_reason


def test_stable_by_construction() -> None:
    """A growing record makes likelihood leave the unit circle; stable=True does not, and says what it needs."""
    t = torch.arange(60, dtype=F64)
    y = (1.03**t)[:, None] + 0.1 * torch.randn(60, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    eye = torch.eye(2, dtype=F64)
    start = StateSpace(
        0.9 * eye + 0.04, None, torch.ones(1, 2, dtype=F64), None, 0.01 * eye, 0.01 * eye[:1, :1], eye[0], eye
    )
    runs = {
        stable: fit(start, y, learn=("A",), method="lbfgs", steps=100, options=FitOptions(stable=stable, errors=False))
        for stable in (False, True)
    }
    radius = {k: float(torch.linalg.eigvals(v.model.A).abs().max()) for k, v in runs.items()}
    assert radius[False] > 1 > radius[True] > 0.99
    assert runs[True].loglik[0].item() == pytest.approx(runs[False].loglik[0].item(), abs=1e-9)
    with pytest.raises(ValueError, match="spectral radius 1"):
        fit(start._replace(A=eye), y, learn=("A",), method="lbfgs", options=FitOptions(stable=True))


def test_varying_parts_that_are_not_learned() -> None:
    model, y, u = load(CASES["track2d"])
    R = model.R * (1 + torch.arange(100, dtype=F64)[:, None, None] / 50)
    for method in ("em", "lbfgs"):
        found = fit(model._replace(R=R), y, u, learn=("Q",), method=method, steps=5, options=QUICK)
        assert bool((found.loglik.diff() > 0).all())
        assert found.model.R is R


def test_float32_and_its_shapes() -> None:
    truth = local_level(level=0.5, noise=2.0, prior=1.0).to(torch.float32)
    y = simulate(truth, 50, batch=(2, 3), generator=torch.Generator().manual_seed(0))[1]
    found = fit(truth, y, each=True, steps=3)
    assert found.model.Q.shape == (2, 3, 1, 1, 1)
    assert found.model.Q.dtype == torch.float32
    assert found.loglik.shape == (4, 2, 3)
    assert kalman_filter(found.model, y)[0].loglik.shape == (2, 3, 50)
    assert found.errors is not None
    assert found.errors["R"].shape == (2, 3, 1, 1, 1)


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    truth = local_level(level=0.5, noise=2.0, prior=1.0)
    y = simulate(truth, 50, generator=torch.Generator().manual_seed(0))[1]
    for method in ("em", "lbfgs"):
        told: list[tuple[int, float]] = []

        def tell(step: int, value: Tensor, model: StateSpace, told: list[tuple[int, float]] = told) -> None:
            told.append((step, value.item() - loglik(model, y).item()))

        fit(
            away(truth)._replace(A=truth.A), y, method=method, steps=3, options=FitOptions(tolerance=0.0, progress=tell)
        )
        assert [step for step, _ in told] == [1, 2, 3]
        assert max(abs(difference) for _, difference in told) < 1e-9
        fit(truth, y, method=method, steps=2, options=FitOptions(tolerance=0.0, progress=True))
        assert f"fit {method}: step 2 of 2, log-likelihood -" in capsys.readouterr().err
        assert fit(truth, y, method=method, options=FitOptions(tolerance=1.0, progress=True)).converged
        err = capsys.readouterr().err
        assert err.endswith("\n")  # though it ended before the last step
        assert err.count("\n") == 1


def test_a_failed_step_ends_with_the_best_model_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails, whenever: here the third smoothing, then a step that rounding spoils."""
    walk = local_level(level=0.5, noise=2.0, prior=1.0)
    y = simulate(walk, 50, generator=torch.Generator().manual_seed(0))[1]
    good, calls = em.em_step, [0]

    def fails(data: Any, model: StateSpace, free: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise ValueError("kalman: series 0 at step 7")
        return good(data, model, free)

    monkeypatch.setattr(learn, "em_step", fails)
    found = fit(walk, y, steps=10, options=QUICK)
    assert (found.converged, found.reason) == (False, "step 2 failed: kalman: series 0 at step 7")
    assert len(found.loglik) == 2
    assert loglik(found.model, y).sum().item() == pytest.approx(found.loglik[-1].item(), abs=1e-12)

    def spoils(data: Any, model: StateSpace, free: Any) -> Any:
        made, value = good(data, model, free)
        return {"Q": 100 * made["Q"], "R": made["R"]}, value

    monkeypatch.setattr(learn, "em_step", spoils)
    found = fit(walk, y, steps=10, options=QUICK)
    assert found.reason.startswith("step 1 lowered the log-likelihood by")
    assert torch.equal(found.model.Q, walk.Q)
    assert found.loglik.diff().tolist() == [0.0]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"learn": ()}, "learn is empty"),
    ({"learn": ("Z",)}, "learn is 'Z'"),
    ({"learn": ("B",)}, "does not have"),
    ({"method": "sgd"}, "method is 'sgd'"),
    ({"frozen": {"A": torch.ones(4, 4, dtype=torch.bool)}}, "not in learn"),
    ({"frozen": {"Q": torch.ones(4, 4)}}, "expected a bool tensor"),
    ({"frozen": {"Q": torch.ones(4, 4, dtype=torch.bool).triu()}}, "not symmetric"),
    ({"learn": ("A",), "options": FitOptions(stable=True)}, "method='lbfgs'"),
    ({"options": FitOptions(stable=True), "method": "lbfgs"}, "A is not learned"),
    ({"frozen": {name: torch.ones(k, k, dtype=torch.bool) for name, k in (("Q", 4), ("R", 2))}}, "keeps every entry"),
    ({"options": {"tolerance": 1e-3}}, "options is a dict, expected FitOptions"),
    ({"options": FitOptions(progress="yes")}, "progress is 'yes', expected True, False or a function"),  # type: ignore[arg-type]  # refused
    ({"steps": -1}, "steps"),
    ({"options": FitOptions(tolerance=1.5)}, "tolerance is 1.5 nats, .* expected at most 1. To end sooner, say steps="),
    ({"y": torch.full((100, 2), float("nan"), dtype=F64)}, "all entries"),
    ({"y": torch.zeros(1, 2, dtype=F64)}, "at least 2 steps"),
    ({"Q": torch.eye(4, dtype=F64).expand(100, 4, 4)}, "varies in time"),
    ({"Q": torch.eye(4, dtype=F64).expand(3, 1, 4, 4)}, "each=True"),
    ({"R": torch.eye(2, dtype=F64).expand(100, 2, 2), "learn": ("C",)}, "no exact step"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refuses(given: dict[str, Any], message: str) -> None:
    model, y, _ = load(CASES["track2d"])
    parts = {name: v for name, v in given.items() if name in StateSpace._fields}
    rest = {name: v for name, v in given.items() if name not in parts}
    with pytest.raises((ValueError, TypeError), match=message):
        fit(model._replace(**parts), **({"y": y} | rest))


def test_examples_of_the_docstring() -> None:
    failed, tried = doctest.testmod(importlib.import_module("stateline.classical.learn"))
    assert tried > 0
    assert failed == 0
