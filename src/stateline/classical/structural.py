"""Forecast many series at once by their parts: level, slope, seasons, autoregression and regressors.

Harvey 1989, "Forecasting, structural time series models and the Kalman filter". Every series has parameters of its own,
found by maximum likelihood in one batch; several structures can be fitted and averaged by how well each predicted
(Burnham & Anderson 2002, AICc weights). Suffixes: N series, T time step, S steps ahead, c regressors.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from stateline import checks
from stateline.classical import saved_fits
from stateline.classical.assembly import LEVELS, PRIOR, REGRESSORS, TRENDS, Structure
from stateline.classical.batch_fit import (
    Progress,
    StructureFit,
    advance,
    blocks,
    check_fitting,
    filtered,
    fit_structure,
    fitting,
)
from stateline.classical.diagnosis import Diagnosis, diagnosis
from stateline.classical.kalman import forecast as forecast_states
from stateline.classical.mixture import StructuralForecast
from stateline.classical.model import StateSpace, simulate
from stateline.classical.panel import Panel, column_names, future, read, same_columns
from stateline.classical.smoother import kalman_smoother
from stateline.ops.kalman import KalmanState

Floats = NDArray[np.float64]
TRANSFORMS = ("none", "log")
COMBINE = ("average", "best")
#: A weight that keeps this share of the variance it started with was not seen.
UNKNOWN = 1e-2


class Components(NamedTuple):
    """Parts of each series, given all of it: (N, T) aligned at each series' first value, NaN after its end.

    Where `log` (N) is true they add up to log y, else to y; noise is what is left. `slope` is the change of the level
    that the next step is expected to bring. They are those of the series' likeliest structure, 0 what that has not.
    """

    level: Floats
    slope: Floats
    season: Floats
    ar: Floats
    regression: Floats
    noise: Floats
    log: NDArray[np.bool_]


class Coefficients(NamedTuple):
    """Weights of the regressors at each series' end, in units of y, or of log y where `log` (N) is true, per unit of X.

    names (c): those of the columns of a DataFrame X, else "weight_0" and so on.
    mean, error (N, c): expected values and their standard errors, for fixed weights the regression's; parameters are
    taken as known. They are those of the series' likeliest structure.
    reason (N): why a series has errors that are NaN, or "".
    """

    names: list[str]
    mean: Floats
    error: Floats
    log: NDArray[np.bool_]
    reason: list[str]


class StructuralModel:
    """Structural time series models of many series, fitted, forecast and kept up to date together.

    Args:
        level: "walk", a level that moves at random, or "fixed".
        trend: "none", "fixed" (the same change each step), "walk" (a slope that moves) or "damped" (one that fades).
        seasonal: steps of a period, such as 12 or 365.25; 0 for none; a list of lists for several periods at once.
        ar: the order of an autoregression beside the level; 0 for none.
        transform: "none", or "log" for series that grow by percentages; values must be above 0.
        harmonics: how many waves of each period, the longest first, up to half the longest period's steps;
            None: all. Few are smoother, and much faster.
        regressors: "fixed" weights of the columns of X, or weights that "walk".
        combine: of several structures, the "average" by AICc weights or for each series the "best" alone.
        tolerance, evaluations: of the search for parameters: largest derivative of the mean log-likelihood, and how
            many likelihoods a series may take.
        progress: True, False, or "auto": on a terminal, once a fit takes more than two seconds.

    Each of the first five may be a list of alternatives: all combinations are fitted, and combined for each series. A
    series too short for a structure, or with values that are not positive for "log", goes without it. Fitted, it has
    `fits_` (one `StructureFit` a structure), `weights_` (N, structures), `loglik_` (N) and `steps_` (N): how
    many steps of each series have passed since its first value, which is where its forecast begins.

    >>> y = [[112.0, 118, 132, 129, 121, 135, 148, 148, 136, 119], [30.0, 32, 31, 35, 36, 38, 37, 40]]
    >>> model = StructuralModel(trend="fixed").fit(y)
    >>> low, high = model.forecast(3).interval(0.8)
    >>> low.shape, bool((low < high).all())
    ((2, 3), True)
    """

    fits_: list[StructureFit]
    weights_: Tensor
    panel_: Panel
    steps_: NDArray[np.int64]
    names_: list[str]

    def __init__(
        self,
        level: Any = "walk",
        trend: Any = ("fixed", "walk", "damped"),
        seasonal: Any = 0,
        ar: Any = 0,
        transform: Any = ("none", "log"),
        *,
        harmonics: int | None = None,
        regressors: str = "fixed",
        combine: str = "average",
        tolerance: float = 1e-5,
        evaluations: int = 200,
        progress: bool | str = "auto",
    ) -> None:
        self.level = level
        self.trend = trend
        self.seasonal = seasonal
        self.ar = ar
        self.transform = transform
        self.harmonics = harmonics
        self.regressors = regressors
        self.combine = combine
        self.tolerance = tolerance
        self.evaluations = evaluations
        self.progress = progress

    # ---- parameters, as in scikit-learn ----

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor and their values."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> Self:
        """Change arguments of the constructor; what was fitted stays until the next `fit`."""
        known = self.get_params()
        for name, value in params.items():
            checks.choice("set_params", "the name of a parameter", name, tuple(known))
            setattr(self, name, value)
        return self

    def clone(self) -> Self:
        """A model with the same parameters that is not fitted."""
        return type(self)(**self.get_params())

    def __repr__(self) -> str:
        default = {name: p.default for name, p in inspect.signature(type(self)).parameters.items()}
        changed = [f"{name}={value!r}" for name, value in self.get_params().items() if value != default[name]]
        return f"StructuralModel({', '.join(changed)})"

    def structures(self, columns: int = 0) -> list[Structure]:
        """Every combination of the alternatives, for X of so many columns."""
        op = "StructuralModel"
        for name, value, allowed in (("regressors", self.regressors, REGRESSORS), ("combine", self.combine, COMBINE)):
            checks.choice(op, name, value, allowed)
        checks.number(op, "tolerance", self.tolerance, low=0, open_low=True)
        checks.number(op, "evaluations", self.evaluations, low=1, integer=True)
        checks.choice(op, "progress", self.progress, (True, False, "auto"))
        choices = [_alternatives(getattr(self, name)) for name in ("level", "trend", "seasonal", "ar", "transform")]
        known: dict[str, tuple[str, ...]] = {"level": LEVELS, "trend": TRENDS, "transform": TRANSFORMS}
        for name, given in zip(known, (0, 1, 4), strict=True):
            for value in choices[given]:
                checks.choice(op, name, value, known[name])
        for order in choices[3]:
            checks.number(op, "ar", order, low=0, high=20, integer=True)
        periods = [_periods(op, value) for value in choices[2]]
        if self.harmonics is not None:
            most = max([int(period // 2) for several in periods for period in several], default=math.inf)
            checks.number(op, "harmonics", self.harmonics, low=1, high=most, integer=True)
        found = product(choices[0], choices[1], periods, [self.harmonics], choices[3], choices[4])
        return [Structure(*parts, regressors=self.regressors, columns=columns) for parts in found]

    # ---- fitting ----

    def fit(
        self, y: Any, X: Any = None, *, lengths: ArrayLike | None = None, checkpoint: str | Path | None = None
    ) -> Self:
        """Find the likeliest parameters of each structure for each series.

        Args:
            y: a list of arrays (T) of any lengths, or one array (N, T): a table in which all rows share time. NaN is a
                missing value; a series begins at its first value, and ends where its array ends.
            X: regressors: (T, c) for all series, (N, T, c), or a list of (T, c). No values may be missing. Names of a
                DataFrame's columns are kept, and those of later ones must be the same.
            lengths: (N), for an array (N, T) that is padded: where each row ends.
            checkpoint: a file that keeps each structure once it is fitted; the same call goes on from there after an
                interruption. It is not deleted.

        Raises:
            ValueError, TypeError: naming the series and what is wrong with it, such as too few values.
        """
        panel = read("fit", y, X, lengths)
        structures = self.structures(0 if panel.X is None else panel.X.shape[2])
        names = column_names(X) or [f"weight_{i}" for i in range(structures[0].columns)]
        same_columns("fit", X, names)
        check_fitting(panel, structures)
        structures = [structure for structure in structures if fitting(structure, panel).any()]
        common = max(structure.diffuse for structure in structures)
        progress = Progress(len(panel.y) * len(structures), self.progress)
        options = (float(self.tolerance), int(self.evaluations))
        done = saved_fits.Checkpoint(checkpoint, panel, structures, options)
        progress.advance(len(done.fits) * len(panel.y), "from the checkpoint")
        for structure in structures[len(done.fits) :]:
            done.add(fit_structure(structure, panel, common, options, progress))
        fits = done.fits
        self.fits_, self.panel_, self.steps_ = fits, panel, panel.length.numpy().copy()
        self.names_ = names
        self.weights_ = _weights(panel, fits, self.combine)
        return self

    @property
    def loglik_(self) -> Floats:
        """(N): log-likelihood of each series under its likeliest structure, given its first values."""
        table = torch.stack([_spread(fit.rows, fit.loglik, len(self.weights_)) for fit in self._fitted()], 1)
        return table.gather(1, self.weights_.argmax(1, keepdim=True))[:, 0].numpy()

    @property
    def converged_(self) -> NDArray[np.bool_]:
        """(N): whether every search that counts for a series ended before its evaluations were used up."""
        found = torch.ones(len(self.weights_), dtype=torch.bool)
        for j, fit in enumerate(self._fitted()):
            found[fit.rows] &= fit.converged | (self.weights_[fit.rows, j] == 0)
        return found.numpy()

    def parameters(self, series: int) -> list[dict[str, Any]]:
        """What was found for one series, a dictionary a structure, the one of most weight first.

        Variances are in squared units of y (of log y for "log"), those of weights per squared unit of their regressor.
        """
        checks.number("parameters", "series", series, low=0, high=len(self._weight()) - 1, integer=True)
        found = []
        for j, fit in enumerate(self.fits_):
            at = (fit.rows == series).nonzero()[:, 0]
            if not len(at):
                continue
            values = fit.structure.values(fit.theta[at])
            unit = float(fit.scale[at])
            units = {"damping": 1.0, "coefficients": 1.0} | {
                f"weight_{i}": unit / u for i, u in enumerate(fit.unit.tolist())
            }
            plain = {name: (x * units.get(name, unit) ** 2)[0].tolist() for name, x in values.items()}
            weight = float(self.weights_[series, j])
            found.append({"structure": str(fit.structure), "weight": weight, "aicc": float(fit.aicc[at]), **plain})
        return sorted(found, key=lambda one: -one["weight"])

    def coefficients(self) -> Coefficients:
        """What each regressor counts for in each series, after all values it was fitted to and updated with.

        Errors are NaN where values do not tell: of a regressor that does as the level or others do, or does nothing;
        and of a series that is predicted without error, as one that is constant is.

        Raises ValueError for a model that was fitted without X.
        """
        N, best = len(self._weight()), self.weights_.argmax(1)
        columns = self.fits_[0].structure.columns
        if not columns:
            raise checks.fail("coefficients", "the model was fitted without X, and has no regressors.")
        mean, error = torch.zeros(N, columns, dtype=torch.float64), torch.zeros(N, columns, dtype=torch.float64)
        log = torch.zeros(N, dtype=torch.bool)
        names, reason = list(self.names_), [""] * N
        for j, fit in enumerate(self.fits_):
            mine = (best[fit.rows] == j).nonzero()[:, 0]
            rows, at, unit = fit.rows[mine], fit.structure.where("weights"), fit.scale[mine, None] / fit.unit
            mean[rows] = fit.state.mean[mine, at] * unit
            variance = fit.state.cov[mine].diagonal(dim1=-2, dim2=-1)[:, at]
            exact, open_ = fit.structure.exact(fit.theta[mine]), variance > UNKNOWN * PRIOR
            error[rows] = (variance * self._excess(fit)[mine, None]).clamp(min=0).sqrt() * unit
            error[rows] = torch.where(exact[:, None] | open_, torch.nan, error[rows])
            log[rows] = fit.structure.transform == "log"
            for i in (exact | open_.any(1)).nonzero()[:, 0].tolist():
                told = ", ".join(name for name, one in zip(names, open_[i].tolist(), strict=True) if one)
                reason[int(rows[i])] = (
                    f"nothing tells {told} from the rest" if told else "it is predicted without error"
                )
        return Coefficients(names, mean.numpy(), error.numpy(), log.numpy(), reason)

    # ---- what lies ahead ----

    def forecast(self, steps: int, X: Any = None) -> StructuralForecast:
        """The next `steps` values of every series, from the end of what was fitted or updated with.

        Args:
            X: the regressors of those steps, (S, c) for all series or (N, S, c), for a model fitted with any.

        Variances are enlarged by v / (v − k) for k parameters found from v values. Beyond that parameters are taken as
        known, and structures as right: intervals of short or broken series are still too narrow.
        """
        checks.number("forecast", "steps", steps, low=0, integer=True)
        N, ahead = len(self._weight()), self._ahead("forecast", X, steps)
        shape = (N, len(self.fits_), steps)
        location, deviation = torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
        for j, fit in enumerate(self.fits_):
            for at, model, state in self._models(fit, ahead, steps):
                rows, scale = fit.rows[at], fit.scale[at, None]
                out = forecast_states(model, state, steps)
                location[rows, j] = out.mean[..., 0] * scale + fit.centre[at, None]
                variance = out.cov[..., 0, 0] * self._excess(fit)[at, None]
                deviation[rows, j] = variance.sqrt() * scale
        log = torch.tensor([fit.structure.transform == "log" for fit in self.fits_])
        return StructuralForecast(self.weights_, location, deviation, log)

    def sample_paths(self, steps: int, paths: int = 100, X: Any = None, *, seed: int | None = None) -> Floats:
        """Possible futures (paths, N, steps): each goes on as its series might, so sums and maxima are right too."""
        checks.number("sample_paths", "steps", steps, low=0, integer=True)
        checks.number("sample_paths", "paths", paths, low=1, integer=True)
        weights, ahead = self._weight(), self._ahead("sample_paths", X, steps)
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)
        chosen = torch.multinomial(weights, paths, replacement=True, generator=generator).T  # (paths, N)
        found = torch.zeros(paths, len(weights), steps, dtype=torch.float64)
        for j, fit in enumerate(self.fits_):
            for at, model, state in self._models(fit, ahead, steps * paths):
                rows, more = fit.rows[at], self._excess(fit)[at, None, None]
                Q, R = more[..., None] * model.Q, more[..., None] * model.R
                model = model._replace(m0=state.mean, P0=more * state.cov, Q=Q, R=R)
                _, drawn = simulate(model, steps, batch=(paths, len(at)), generator=generator)
                values = drawn[..., 0] * fit.scale[at, None] + fit.centre[at, None]
                values = values.exp() if fit.structure.transform == "log" else values
                found[:, rows] = torch.where((chosen[:, rows] == j)[..., None], values, found[:, rows])
        return found.numpy()

    def update(self, y: Any, X: Any = None, *, lengths: ArrayLike | None = None) -> Self:
        """Take in what came since, a few values or many of each series, without fitting again.

        Args:
            y: a list of N arrays, or an array (N, T), or (N, 1) for one step. NaN: the step passed and its value is
                missing. An empty array: nothing came yet, and the series stays at the step where it was.
            X: the regressors beside them, for a model fitted with any.   lengths: as in `fit`.

        Each series is forecast from after its own last step here; `steps_` tells which that is. Parameters, weights,
        components and diagnosis stay those of the fit.
        """
        N, op = len(self._weight()), "update"
        panel = read(op, y, X, lengths, trim=False)
        columns = self.fits_[0].structure.columns
        same_columns(op, X, self.names_)
        if len(panel.y) != N:
            raise checks.fail(op, f"y has {len(panel.y)} series, expected the {N} that were fitted.")
        if (0 if panel.X is None else panel.X.shape[2]) != columns:
            raise checks.fail(op, f"X has not the {columns} columns of the fit.")
        logs = [fit.rows for fit in self.fits_ if fit.structure.transform == "log"]
        for rows in logs:
            bad = rows[(panel.y[rows] <= 0).any(1)]
            if len(bad):
                problem = f"series {int(bad[0])} has values that are not above 0, and its model is one of logarithms."
                raise checks.fail(op, problem, 'Fit again with transform="none".')
        states = [advance(fit, fit.scaled(panel)) for fit in self.fits_]
        for fit, state in zip(self.fits_, states, strict=True):
            fit.state = state
        self.steps_ = self.steps_ + panel.length.numpy()
        return self

    # ---- what lies behind ----

    def components(self) -> Components:
        """Level, slope, seasons, autoregression, regression, noise of each fitted series, given all of its values."""
        N, T = self._panel().y.shape
        parts = torch.full((6, N, T), torch.nan, dtype=torch.float64)
        log = torch.zeros(N, dtype=torch.bool)
        best = self.weights_.argmax(1)
        for j, fit in enumerate(self.fits_):
            part, mine = fit.scaled(self.panel_), (best[fit.rows] == j).nonzero()[:, 0]
            log[fit.rows[mine]] = fit.structure.transform == "log"
            if not len(mine):
                continue
            for block in blocks(part.length[mine], fit.structure.n):
                at = mine[block]
                found = _parts(fit, at, part.take(at))
                parts[:, fit.rows[at], : found.shape[2]] = found
        level, slope, season, ar, regression, noise = parts.numpy()
        return Components(level, slope, season, ar, regression, noise, log.numpy())

    def diagnose(self, lags: int = 10) -> Diagnosis:
        """Errors of the one-step predictions of each fitted series, and whether anything in them could be predicted."""
        checks.number("diagnose", "lags", lags, low=1, integer=True)
        N, T = self._panel().y.shape
        errors = torch.full((N, T), torch.nan, dtype=torch.float64)
        free = torch.zeros(N, dtype=torch.float64)
        best = self.weights_.argmax(1)
        for j, fit in enumerate(self.fits_):
            part, mine = fit.scaled(self.panel_), (best[fit.rows] == j).nonzero()[:, 0]
            for block in blocks(part.length[mine], fit.structure.n) if len(mine) else ():
                at = mine[block]
                one = part.take(at)
                _, error, variance, _ = filtered(fit.structure, fit.theta[at], one)
                kept = one.after(fit.structure.diffuse)
                errors[fit.rows[at], : one.y.shape[1]] = torch.where(kept, error / variance.sqrt(), torch.nan)
            free[fit.rows[mine]] = float(len(fit.structure.names) - 1)
        return diagnosis(errors, lags, free)

    # ---- files ----

    def save(self, path: str | Path) -> None:
        """Write the fitted model to one safetensors file, whole or not at all: parameters, states and series."""
        self._fitted()
        saved_fits.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The model that `save` wrote; no pickle is read. Raises ValueError if the file is none or damaged."""
        return saved_fits.load(cls, path)

    # ---- parts ----

    def _fitted(self) -> list[StructureFit]:
        if not hasattr(self, "fits_"):
            raise checks.fail(
                "StructuralModel", "the model is not fitted yet.", "Call fit(y) first.", error=RuntimeError
            )
        return self.fits_

    def _weight(self) -> Tensor:
        self._fitted()
        return self.weights_

    def _panel(self) -> Panel:
        self._fitted()
        return self.panel_

    def _excess(self, fit: StructureFit) -> Tensor:
        """(M): what variances of a fit's series are multiplied by, as their parameters took some values to find."""
        values, k = self.panel_.count[fit.rows] - fit.structure.diffuse, len(fit.structure.names)
        return values / (values - k).clamp(min=1)

    def _models(
        self, fit: StructureFit, ahead: Tensor | None, steps: int
    ) -> Iterator[tuple[Tensor, StateSpace, KalmanState]]:
        """Blocks of a fit's series, their models beside the regressors `ahead` of all, and their states."""
        for at in blocks(torch.full((len(fit.rows),), max(1, steps)), fit.structure.n):
            X = None if ahead is None else ahead[fit.rows[at]] / fit.unit
            yield at, fit.structure.model(fit.theta[at], X), KalmanState(fit.state.mean[at], fit.state.cov[at])

    def _ahead(self, op: str, X: Any, steps: int) -> Tensor | None:
        same_columns(op, X, self.names_)
        return future(op, X, len(self.weights_), steps, self.fits_[0].structure.columns)


def _alternatives(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]


def _periods(op: str, value: Any) -> tuple[float, ...]:
    periods = [p for p in _alternatives(value) if p]
    for period in periods:
        checks.number(op, "seasonal", period, low=2)
    if len(set(periods)) < len(periods):
        raise checks.fail(op, f"seasonal is {value!r}, expected each period once.")
    return tuple(float(period) for period in periods)


def _spread(rows: Tensor, values: Tensor, N: int, fill: float = torch.nan) -> Tensor:
    """Values of the series `rows` in a tensor of all N."""
    found = torch.full((N,), fill, dtype=torch.float64)
    found[rows] = values
    return found


def _weights(panel: Panel, fits: list[StructureFit], combine: str) -> Tensor:
    """(N, structures) summing to 1: how much each counts."""
    aicc = torch.stack([_spread(fit.rows, fit.aicc, len(panel.y), torch.inf) for fit in fits], 1)
    if combine == "best":
        return torch.nn.functional.one_hot(aicc.argmin(1), aicc.shape[1]).double()
    return torch.softmax(-(aicc - aicc.amin(1, keepdim=True)) / 2, 1)


def _parts(fit: StructureFit, at: Tensor, part: Panel) -> Tensor:
    """(6, M, T) components of the series `at` of a fit, in units of y or log y; `part` are they, scaled."""
    structure, scale = fit.structure, fit.scale[at, None]
    model = structure.model(fit.theta[at], part.X)
    h = kalman_smoother(model, part.y[..., None]).mean
    seen = model.C[..., 0, :] * h
    level = h[..., 0] * scale + fit.centre[at, None]
    slope = h[..., structure.where("slope")].sum(-1) * scale
    rest = [seen[..., structure.where(name)].sum(-1) * scale for name in ("season", "ar", "weights")]
    noise = part.y * scale + fit.centre[at, None] - level - sum(rest)
    found = torch.stack([level, slope, *rest, noise])
    inside = torch.arange(part.y.shape[1]) < part.length[:, None]
    return torch.where(inside, found, torch.nan)
