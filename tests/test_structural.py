"""Structural models: statsmodels' likelihoods, best fits, many series at once, gaps, mixtures, updates, files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from stateline.classical import StructuralModel, batch_fit
from stateline.classical import kalman as kalman_module
from stateline.classical.assembly import FLOOR, STABLE, Structure
from stateline.classical.batch_fit import Progress, filtered, fit_structure
from stateline.classical.kalman import forecast
from stateline.classical.mixture import StructuralForecast
from stateline.classical.panel import read

CASES = json.loads((Path(__file__).parent / "data" / "structural_reference.json").read_text())["cases"]
#: What is compared with one-structure models.
ONE = {"trend": "fixed", "transform": "none", "progress": False}


def structure_of(case: dict[str, Any]) -> Structure:
    given = dict(case["structure"])
    return Structure(**{**given, "seasonal": tuple(given.get("seasonal", ()))})


def values_of(case: dict[str, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    y, X = np.array(case["y"], dtype=float), np.array(case["X"])
    return y, X if X.shape[1] else None


def theta_of(structure: Structure, params: list[float]) -> torch.Tensor:
    """Free numbers (1, k) of variances and coefficients in statsmodels' order, which is ours."""
    k = 1 + len(structure.deviations)
    free = [math.sqrt(params[0] - FLOOR), *(math.sqrt(v) for v in params[1:k])]
    ar = params[k:]
    partial = {0: [], 1: ar, 2: [ar[0] / (1 - ar[-1]), ar[-1]] if ar else []}[len(ar)]
    return torch.tensor([free + [math.asin(r / STABLE) for r in partial]], dtype=torch.float64)


def drawn(N: int = 5, T: int = 40, seed: int = 0, season: int = 0) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    y = 50 + np.cumsum(rng.normal(0.3, 1, (N, T)), 1) + rng.normal(0, 0.5, (N, T))
    return y + (4 * np.sin(2 * np.pi * np.arange(T) / season) if season else 0)


# ---- against statsmodels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_likelihood_and_forecast_are_those_of_statsmodels(case: dict[str, Any]) -> None:
    structure, (y, X) = structure_of(case), values_of(case)
    T, steps = len(y), len(case["forecast"])
    theta = theta_of(structure, case["params"])
    panel = read("test", [y], None if X is None else [X])
    terms, error, variance, state = filtered(structure, theta, panel)
    expected = torch.tensor(case["terms"], dtype=torch.float64)
    assert (terms[0] - expected)[case["burn"] :].abs().max() < 1e-6
    assert abs(float(terms[0, case["burn"] :].sum()) - case["loglik"]) < 1e-6
    ahead = forecast(structure.model(theta, None if X is None else torch.tensor(X[None, T:])), state, steps)
    assert np.abs(ahead.mean[0, :, 0].numpy() - case["forecast"]).max() < 1e-5
    assert np.abs(ahead.cov[0, :, 0, 0].sqrt().numpy() - case["deviation"]).max() < 1e-5
    seen = ~np.isnan(y)
    seen[: case["burn"]] = False
    again = -0.5 * ((error**2 / variance + variance.log())[0, seen] + math.log(2 * math.pi))
    assert (again - terms[0, seen]).abs().max() < 1e-9


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_search_finds_what_statsmodels_finds(case: dict[str, Any]) -> None:
    """`best` has its burn and a prior in units of y; ours is in units of a change, which moves it by some 1e-5."""
    y, X = values_of(case)
    panel = read("test", [y], None if X is None else [X[: len(y)]])
    fit = fit_structure(structure_of(case), panel, case["burn"], (1e-6, 300), Progress(1, False))
    assert bool(fit.converged.all())
    assert float(fit.evidence) > case["best"] - 2e-3  # and may be better: theirs can end early
    assert float(fit.evidence) < case["best"] + 0.5


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_components_add_up_and_the_level_is_that_of_statsmodels(case: dict[str, Any]) -> None:
    structure, (y, X) = structure_of(case), values_of(case)
    model = StructuralModel(
        structure.level, structure.trend, [list(structure.seasonal)], structure.ar, "none",
        harmonics=structure.harmonics, progress=False,
    ).fit([y], None if X is None else X[: len(y)])  # fmt: skip
    fit = model.fits_[0]
    fit.theta = theta_of(structure, case["params"])  # in units of y
    fit.centre, fit.scale = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    fit.unit = torch.ones_like(fit.unit)
    parts = model.components()
    assert np.abs(parts.level[0] - case["level"])[5:].max() < 2e-4  # a season may lend the level its first values
    whole = parts.level + parts.season + parts.ar + parts.regression + parts.noise
    assert np.nanmax(np.abs(whole[0] - y)) < 1e-9
    assert not parts.log[0]


def test_the_slope_is_what_a_smooth_level_moves_by() -> None:
    model = StructuralModel(level="fixed", trend="walk", transform="none", progress=False).fit(37 * drawn())
    parts = model.components()
    np.testing.assert_allclose(np.diff(parts.level), parts.slope[:, :-1], rtol=1e-6, atol=1e-6)


# ---- many series at once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", ["none", "log"])
def test_a_batch_is_its_series_alone(log: str) -> None:
    """Different lengths, gaps and units beside each other change nothing."""
    y = drawn(4, 60)
    rows = [row[: 20 + 12 * i].copy() * 10.0 ** (i - 2) for i, row in enumerate(y)]
    rows[1][5:9] = np.nan
    rows[2][:3] = np.nan
    model = StructuralModel(trend=("fixed", "damped"), transform=log, progress=False).fit(rows)
    together = model.forecast(4)
    for i, row in enumerate(rows):
        alone = StructuralModel(trend=("fixed", "damped"), transform=log, progress=False).fit([row])
        assert alone.loglik_[0] == pytest.approx(model.loglik_[i], abs=1e-5)
        np.testing.assert_allclose(alone.forecast(4).median[0], together.median[i], rtol=1e-3)
    assert model.converged_.all()


def test_forecasts_have_the_units_of_y() -> None:
    y = drawn()
    plain, other = StructuralModel(**ONE).fit(y), StructuralModel(**ONE).fit(1e4 * y + 3e5)
    np.testing.assert_allclose(other.forecast(3).mean, 1e4 * plain.forecast(3).mean + 3e5, rtol=1e-6)
    T = y.shape[1] - 2
    np.testing.assert_allclose(other.loglik_, plain.loglik_ - T * math.log(1e4), atol=1e-4)


def test_a_logarithm_is_a_change_of_variables() -> None:
    """log p(y) = log p(log y) − Σ log y."""
    y = np.exp(drawn() / 20)
    log = StructuralModel(trend="fixed", transform="log", progress=False).fit(y)
    plain = StructuralModel(**ONE).fit(np.log(y))
    np.testing.assert_allclose(log.loglik_, plain.loglik_ - np.log(y)[:, 2:].sum(1), atol=1e-6)
    np.testing.assert_allclose(log.forecast(3).median, np.exp(plain.forecast(3).median), rtol=1e-6)
    assert log.components().log.all()


def test_logarithms_are_for_series_above_zero_alone() -> None:
    y = drawn(3, 20) - 60
    assert (y <= 0).any(1).all()
    both, plain = (StructuralModel(trend="fixed", transform=t, progress=False) for t in (["none", "log"], "none"))
    np.testing.assert_array_equal(both.fit(y).forecast(2).mean, plain.fit(y).forecast(2).mean)
    mixed = both.fit([*y, np.exp(y[0] / 50)])
    assert (mixed.weights_[:3, 1] == 0).all()
    assert mixed.weights_[3, 1] > 0
    np.testing.assert_allclose(mixed.forecast(2).mean[:3], plain.forecast(2).mean, rtol=1e-3)


def test_tables_lists_padding_and_leading_gaps_are_the_same_series() -> None:
    y = drawn(3, 30)
    rows = [y[0], y[1, :20], y[2, :25]]
    table = np.full((3, 30), 7.0)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    padded = StructuralModel(**ONE).fit(table, lengths=[30, 20, 25])
    listed = StructuralModel(**ONE).fit([torch.tensor(row) for row in rows])
    np.testing.assert_array_equal(padded.forecast(3).mean, listed.forecast(3).mean)
    late = StructuralModel(**ONE).fit([np.r_[np.nan, np.nan, row] for row in rows])
    np.testing.assert_array_equal(late.forecast(3).mean, listed.forecast(3).mean)
    gone = StructuralModel(**ONE).fit([np.r_[row, np.nan, np.nan] for row in rows])  # two steps that nobody saw
    np.testing.assert_allclose(gone.forecast(1).mean, listed.forecast(3).mean[:, 2:], rtol=1e-9)


def test_coefficients_are_those_of_a_regression() -> None:
    """A level that stands still, white noise and fixed weights are ordinary least squares, errors included."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(2, 60, 2)) * [1.0, 1000.0]
    y = 5 + X @ [3.0, -0.002] + rng.normal(size=(2, 60))
    model = StructuralModel(level="fixed", trend="none", transform="none", progress=False).fit(y, X)
    found = model.coefficients()
    assert found.names == ["weight_0", "weight_1"]
    assert found.log.tolist() == [False, False]
    for i in range(2):
        Z = np.column_stack([np.ones(60), X[i]])
        best, rest, _, _ = np.linalg.lstsq(Z, y[i], rcond=None)
        errors = np.sqrt(np.diag(np.linalg.inv(Z.T @ Z)) * rest[0] / 57)
        np.testing.assert_allclose(found.mean[i], best[1:], rtol=1e-4)
        np.testing.assert_allclose(found.error[i], errors[1:], rtol=0.02)
    model.update(y[:, :1], X[:, :1])
    assert (model.coefficients().error < found.error).all()
    with pytest.raises(ValueError, match="coefficients: the model was fitted without X"):
        StructuralModel(trend="none", transform="none", progress=False).fit(y).coefficients()


def test_coefficients_that_values_do_not_tell_have_no_errors() -> None:
    """Of a series that is constant, or a sum of regressors; of a regressor that is constant as the level, or twice."""
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2, 60))
    settings: dict[str, Any] = {"level": "fixed", "trend": "none", "transform": "none", "progress": False}
    found = StructuralModel(**settings).fit([np.full(60, 5.0), 2 * x + 1, x + noise], x[:, None]).coefficients()
    assert np.isnan(found.error[:, 0]).tolist() == [True, True, False]
    assert found.reason == ["it is predicted without error", "it is predicted without error", ""]
    np.testing.assert_allclose(found.mean[:2, 0], [0.0, 2.0], atol=1e-6)
    X = np.column_stack([x, np.ones(60), rng.normal(size=60)])
    found = StructuralModel(**settings).fit([x + noise], X).coefficients()
    assert np.isnan(found.error).tolist() == [[False, True, False]]
    assert found.reason == ["nothing tells weight_1 from the rest"]
    found = StructuralModel(**settings).fit([x + noise], np.column_stack([x, x])).coefficients()
    assert found.reason == ["nothing tells weight_0, weight_1 from the rest"]


def test_weights_that_walk_have_variances_in_their_own_units() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(1, 80, 1))
    y = (1 + rng.normal(size=(1, 80)).cumsum(1)) * X[..., 0] + rng.normal(size=(1, 80))
    found = [
        StructuralModel(trend="none", transform="none", regressors="walk", progress=False).fit(scale * y, unit * X)
        for scale, unit in ((1.0, 1.0), (10.0, 1000.0))
    ]
    first, second = (model.parameters(0)[0] for model in found)
    assert second["weight_0"] == pytest.approx(1e-4 * first["weight_0"], rel=1e-3)
    assert second["noise"] == pytest.approx(100 * first["noise"], rel=1e-3)
    assert 0.2 < first["weight_0"] < 5
    np.testing.assert_allclose(100 * found[1].coefficients().mean, found[0].coefficients().mean, rtol=1e-3)


def test_forecasts_and_updates_go_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    y, X = rng.normal(size=(30, 20)).cumsum(1), rng.normal(size=(30, 26, 1))
    model = StructuralModel(trend="fixed", transform="none", progress=False).fit(y, X[:, :20])
    new = [rng.normal(size=i % 3) for i in range(30)]
    wanted = model.forecast(5, X[:, 20:25])
    paths = model.sample_paths(5, 10, X[:, 20:25], seed=0)
    sizes: list[int] = []

    def counted(run: Any) -> Any:
        def noted(y: Any, *rest: Any, **more: Any) -> Any:
            sizes.append(y.shape[0] * y.shape[1])
            return run(y, *rest, **more)

        return noted

    monkeypatch.setattr(batch_fit, "BLOCK", 9 * 5 * 4)
    monkeypatch.setattr(batch_fit, "kalman", counted(batch_fit.kalman))
    monkeypatch.setattr(kalman_module, "kalman", counted(kalman_module.kalman))
    found = model.forecast(5, X[:, 20:25])
    assert sizes
    assert max(sizes) <= 20
    assert torch.equal(found.location, wanted.location)
    assert torch.equal(found.deviation, wanted.deviation)
    assert model.sample_paths(5, 10, X[:, 20:25], seed=0).shape == paths.shape
    sizes.clear()
    X_new = [X[i, 20 : 20 + i % 3] for i in range(30)]
    model.update(new, X_new)
    assert sizes
    assert max(sizes) <= 20
    monkeypatch.undo()
    again = StructuralModel(trend="fixed", transform="none", progress=False).fit(y, X[:, :20]).update(new, X_new)
    assert torch.equal(again.fits_[0].state.mean, model.fits_[0].state.mean)


@pytest.mark.parametrize("regressors", ["fixed", "walk"])
def test_regressors_are_found_and_used(regressors: str) -> None:
    rng = np.random.default_rng(1)
    X = rng.normal(size=(84, 2)) * [1.0, 1000.0]
    y = drawn(4, 80, season=4) + X[:80] @ [3.0, -0.002]
    model = StructuralModel(trend="none", seasonal=4, transform="none", regressors=regressors, progress=False)
    model.fit(y, X[:80])
    assert np.abs(model.components().regression - X[:80] @ [3.0, -0.002]).max() < 3
    by_hand = [model.forecast(4, X[80:]).mean, model.forecast(4, np.stack([X[80:]] * 4)).mean]
    np.testing.assert_array_equal(*by_hand)
    moved = model.forecast(4, X[80:] + np.array([1.0, 0.0])).mean - by_hand[0]
    assert np.abs(moved - 3).max() < 1
    assert model.sample_paths(4, 3, X[80:], seed=0).shape == (3, 4, 4)
    small = model.clone().fit(y, 1e-7 * X[:80])
    np.testing.assert_allclose(small.forecast(4, 1e-7 * X[80:]).mean, by_hand[0], rtol=1e-5)
    with pytest.raises(ValueError, match="forecast: X is None, expected the 2 regressors of the 4 steps ahead"):
        model.forecast(4)


def test_what_has_no_noise_at_all_can_be_fitted() -> None:
    """Constant, straight and almost empty series stand beside others without harm."""
    rows = [
        np.full(12, 3.0),
        np.arange(12.0),
        np.zeros(8),
        drawn(1, 30)[0],
        np.array([1e9, 1e9, 1e9, 1e9, 1e9 + 1, 1e9]),
    ]
    model = StructuralModel(progress=False).fit(rows)
    ahead = model.forecast(3)
    assert np.isfinite(ahead.median).all()
    np.testing.assert_allclose(ahead.median[:3], [[3.0] * 3, [12, 13, 14], [0] * 3], atol=0.05)


# ---- mixtures --------------------------------------------------------------------------------------------------------


def mixture() -> StructuralForecast:
    w = torch.tensor([[0.3, 0.7, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    location = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)[None, :, None].expand(2, 3, 1)
    deviation = torch.tensor([0.4, 1.5, 0.7], dtype=torch.float64)[None, :, None].expand(2, 3, 1)
    return StructuralForecast(w, location, deviation, torch.tensor([True, False, False]))


def test_quantiles_of_mixtures_are_those_of_many_draws() -> None:
    rng = np.random.default_rng(0)
    n = 1_000_000
    draws = np.where(rng.random(n) < 0.3, np.exp(rng.normal(0.5, 0.4, n)), rng.normal(2.0, 1.5, n))
    for q in (0.025, 0.3, 0.5, 0.9):
        assert mixture().quantile(q)[0, 0] == pytest.approx(np.quantile(draws, q), abs=0.01)
    assert mixture().mean[0, 0] == pytest.approx(draws.mean(), abs=0.01)
    low, high = mixture().interval(0.9)
    assert high[1, 0] == pytest.approx(-1 + 0.7 * 1.6448536, abs=1e-6)
    assert low[1, 0] == pytest.approx(-1 - 0.7 * 1.6448536, abs=1e-6)
    assert mixture().quantile([0.1, 0.5]).shape == (2, 2, 1)


def test_sample_paths_have_the_forecast_distribution() -> None:
    model = StructuralModel(trend=("none", "fixed"), transform=("none", "log"), progress=False).fit(drawn(3, 9))
    paths, ahead = model.sample_paths(3, 20_000, seed=1), model.forecast(3)
    for q in (0.05, 0.5, 0.95):
        width = ahead.quantile(0.75) - ahead.quantile(0.25)
        assert (np.abs(np.quantile(paths, q, axis=0) - ahead.quantile(q)) / width).max() < 0.06
    np.testing.assert_array_equal(model.sample_paths(3, 5, seed=1), model.sample_paths(3, 5, seed=1))


def test_variances_are_enlarged_for_parameters_that_few_values_gave() -> None:
    """By v / (v − k): 12 values, 2 of them left out, for the variances of noise and level."""
    model = StructuralModel(**ONE).fit(drawn(2, 12))
    fit = model.fits_[0]
    plain = forecast(fit.structure.model(fit.theta), fit.state, 3).cov[..., 0, 0] * fit.scale[:, None] ** 2
    torch.testing.assert_close(model.forecast(3).deviation[:, 0] ** 2, plain * 10 / 8)


def test_a_mean_far_out_in_the_tail_is_told() -> None:
    wild = mixture()
    wild = StructuralForecast(wild.weight, wild.location, 20 * wild.deviation, wild.log)
    with pytest.warns(RuntimeWarning, match="1 of 2 series have means above their 95% quantile"):
        wild.mean  # noqa: B018


def test_weights_follow_the_structure_that_made_the_series() -> None:
    rng = np.random.default_rng(3)
    slopes = np.cumsum(np.cumsum(rng.normal(0, 1, (8, 80)), 1), 1) + rng.normal(0, 1, (8, 80))
    walks = np.cumsum(rng.normal(0, 1, (8, 80)), 1)
    model = StructuralModel(trend=("none", "walk"), transform="none", progress=False).fit([*slopes, *walks])
    assert (model.weights_[:8, 1] > 0.99).all()
    assert (model.weights_[8:, 0] > 0.5).sum() >= 7
    best = model.clone().set_params(combine="best").fit([*slopes, *walks])
    assert set(best.weights_.unique().tolist()) == {0.0, 1.0}
    assert best.parameters(0)[0]["structure"] == "level=walk, trend=walk"


# ---- tomorrow --------------------------------------------------------------------------------------------------------


def test_updates_are_a_longer_filter() -> None:
    y = drawn(4, 50, season=4)
    X = np.random.default_rng(2).normal(size=(52, 1))
    model = StructuralModel(trend=("fixed", "damped"), seasonal=4, transform=("none", "log"), progress=False)
    model.fit(y[:, :40], X[:40])
    whole = [filtered(f.structure, f.theta, f.scaled(read("test", y, X[:50])))[3] for f in model.fits_]
    model.update([y[0, 40:43], y[1, 40:], y[2, 40:40], y[3, 40:41]], X[40:50])
    model.update([y[0, 43:], y[1, 50:], y[2, 40:], y[3, 41:]], [X[43:50], X[50:50], X[40:50], X[41:50]])
    for fit, state in zip(model.fits_, whole, strict=True):
        torch.testing.assert_close(fit.state.mean, state.mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fit.state.cov, state.cov, rtol=1e-9, atol=1e-9)
    before = model.forecast(2, X[50:]).mean
    model.update(np.full((4, 1), np.nan), X[50:51])
    np.testing.assert_allclose(model.forecast(1, X[51:]).mean, before[:, 1:], rtol=1e-9)


def test_saved_loaded_and_cloned(tmp_path: Path) -> None:
    y, X = drawn(4, 30), np.random.default_rng(2).normal(size=(33, 1))
    model = StructuralModel(seasonal=(0, 4), transform="none", progress=False).fit(y, X[:30])
    model.save(tmp_path / "model.safetensors")
    again = StructuralModel.load(tmp_path / "model.safetensors")
    for one in (model, again):
        one.update(y[:, -1:], X[30:31])
    np.testing.assert_array_equal(again.forecast(2, X[31:]).interval(), model.forecast(2, X[31:]).interval())
    np.testing.assert_array_equal(again.components().season, model.components().season)
    assert repr(again) == repr(model)
    fresh = model.clone()
    assert fresh.get_params() == model.get_params()
    with pytest.raises(RuntimeError, match="not fitted yet"):
        fresh.forecast(1)
    (tmp_path / "no").write_bytes(b"y,x\n1.25,3\n")
    with pytest.raises(ValueError, match=r"no holds no structural model\. StructuralModel\.save writes one"):
        StructuralModel.load(tmp_path / "no")
    (tmp_path / "half").write_bytes((tmp_path / "model.safetensors").read_bytes()[:500])
    with pytest.raises(ValueError, match="half cannot be read"):
        StructuralModel.load(tmp_path / "half")


def test_an_interrupted_fit_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    y, file = drawn(4, 30), tmp_path / "fit"
    whole = StructuralModel(progress=False).fit(y)
    model, fitted = StructuralModel(progress=False).fit(y[:, :20]), []

    def until_the_third(structure: Structure, *rest: Any) -> Any:
        if len(fitted) == 3:
            raise KeyboardInterrupt
        fitted.append(structure)
        return fit_structure(structure, *rest)

    monkeypatch.setattr("stateline.classical.structural.fit_structure", until_the_third)
    before = model.forecast(2).median
    with pytest.raises(KeyboardInterrupt):
        model.fit(y, checkpoint=file)
    np.testing.assert_array_equal(model.forecast(2).median, before)  # the earlier fit stands
    fitted.clear()
    model.fit(y, checkpoint=file)
    assert len(fitted) == 3  # of six
    np.testing.assert_array_equal(model.forecast(2).median, whole.forecast(2).median)
    with pytest.raises(ValueError, match="is of other series, structures or settings"):
        model.fit(y + 1, checkpoint=file)


def test_diagnosis_sees_what_a_model_leaves_out() -> None:
    y = drawn(6, 120, season=6)
    blind, seeing = (StructuralModel(trend="none", seasonal=s, transform="none", progress=False).fit(y) for s in (0, 6))
    assert (blind.diagnose(6).p_value < 0.01).all()
    assert (seeing.diagnose(6).p_value > 0.01).sum() >= 5
    found = seeing.diagnose(6)
    e = found.errors[0][~np.isnan(found.errors[0])]
    parts = found.autocorrelation[0] ** 2 / (len(e) - np.arange(1, 7))
    box = len(e) * (len(e) + 2) * parts.sum()
    assert found.ljung_box[0] == pytest.approx(box)
    assert found.p_value[0] == pytest.approx(stats.chi2.sf(box, 6 - 2))  # two variances beside the noise's
    assert found.autocorrelation[0, 1] == pytest.approx(np.corrcoef(e[2:], e[:-2])[0, 1], abs=0.05)
    assert 0.7 < e.std() < 1.3


# ---- what is refused -------------------------------------------------------------------------------------------------


class DatetimeIndex:
    """As pandas calls it."""


class OfTimes:
    """A table as pandas keeps series: a row a time, a column a series."""

    def __init__(self, table: Any) -> None:
        self.table, self.index = table, DatetimeIndex()

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.table


@pytest.mark.parametrize(
    ("change", "y", "message"),
    [
        ({"trend": "up"}, [[1.0] * 9], "trend is 'up', expected one of 'none', 'fixed', 'walk', 'damped'"),
        ({"seasonal": 1}, [[1.0] * 9], "seasonal is 1, expected a number at least 2"),
        ({"ar": -1}, [[1.0] * 9], "ar is -1"),
        ({"combine": "all"}, [[1.0] * 9], "combine is 'all'"),
        ({}, [1.0, 2.0, 3.0], r"y has shape \(3,\), expected a list"),
        ({}, [[1.0] * 9, [1.0, float("inf")]], "series 1 has infinite values"),
        ({}, [[1.0] * 9, [float("nan")] * 5], "series 1 has no values"),
        ({}, [[1.0] * 9, [1.0, 2.0]], "series 1 has 2 values, and no structure can be fitted"),
        ({}, np.ones((40, 3)), "There are 40 series of 3 steps: is it y"),
        ({}, OfTimes(np.ones((40, 30))), "y is a table whose rows are times, expected a row a series. Transpose it"),
        ({"transform": "log"}, [[1.0] * 9, [1.0, 2.0, -3.0, 4.0, 5.0]], "series 1 has the value -3, and logarithms"),
        ({}, [["a", "b"]], "not made of numbers"),
        ({}, [np.arange("2024-01", "2024-12", dtype="M8[M]")], "not made of numbers"),
    ],
)
def test_refusals(change: dict[str, Any], y: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        StructuralModel(**change, progress=False).fit(y)


def test_updates_that_do_not_fit_change_nothing() -> None:
    model = StructuralModel(trend="fixed", transform="log", progress=False).fit(drawn(3, 20))
    before = model.forecast(2).median
    for y, message in [
        ([[1.0], [2.0]], "y has 2 series, expected the 3"),
        ([[1.0], [2.0], [-1.0]], "series 2 has values that are not above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.update(y)
    with pytest.raises(ValueError, match="X has not the 0 columns"):
        model.update([[1.0]] * 3, [[1.0]])
    np.testing.assert_array_equal(model.forecast(2).median, before)
    with pytest.raises(ValueError, match="set_params: the name of a parameter is 'tend'"):
        model.set_params(tend="fixed")


def test_an_autoregression_that_rounding_makes_explosive_is_no_answer() -> None:
    structure = Structure(ar=4)
    part = read("fit", [list(range(12)), [3.0, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])
    theta = torch.full((2, len(structure.names)), 0.5, dtype=torch.float64)
    theta[0, -4:] = math.pi / 2  # all partial correlations at their bound: a root of modulus 1
    value, slope = batch_fit._Likelihood(structure, part)(theta, torch.arange(2))
    assert value[0].item() == math.inf
    assert torch.isfinite(value[1])
    assert torch.isfinite(slope[1]).all()
