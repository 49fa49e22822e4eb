"""Learn the parts of a `StateSpace` from series: the values under which what was observed is most likely.

"em", expectation maximisation, takes steps that never make the data less likely and need no tuning, but become small
long before the end where little noise is observed. "lbfgs" climbs the likelihood by its analytic derivatives, and takes
all that varies in time. Both learn the same parts, keep the same frozen entries and stop at the same maximum. How sure
that is follows from the curvature there. Everything is computed in float64 on the processor.

Suffixes: N all series of (…), G model (N, or 1 for all series), T time step, k learned number.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stateline import checks
from stateline.classical import minimise as minimised
from stateline.classical.em import Data, em_step, replace
from stateline.classical.kalman import kalman_filter
from stateline.classical.minimise import minimise
from stateline.classical.model import StateSpace, check, validate
from stateline.classical.objective import Cost, Tensors, apart, beside, some_of, standard_errors, without_top
from stateline.classical.parameters import COVARIANCES, Parameters, of
from stateline.ops.kalman import FORMS

OP = "fit"
METHODS = ("em", "lbfgs")
#: A likelihood that falls by no more than this share of itself fell by rounding.
ROUNDING = 1e-11
#: Evaluations a step of "lbfgs" may take, and how far it may go, in learned numbers.
TRIALS, LONGEST = 20, 10.0
#: The largest tolerance, in nats: a factor of e in how likely the series are matters to any use of a model.
MOST = 1.0
Progress = Callable[[int, Tensor, StateSpace], None]


@dataclass(frozen=True)
class FitOptions:
    """How `fit` goes about it.

    tolerance: in nats, at most 1; the end is where a step gains less ("lbfgs": three in a row). What is still to gain
        there may be a hundred times more.
    stable: all eigenvalues of A stay inside the unit circle, by construction; for "lbfgs".
    errors: whether standard errors are computed, by two gradients for each learned number.
    form: of the filter, as in `kalman_filter`.
    progress: True writes a line to stderr that is renewed with every step. Or a function, called with step,
        log-likelihood and the model so far: what it saves is not lost if a long fit is interrupted.
    """

    tolerance: float = 1e-6
    stable: bool = False
    errors: bool = True
    form: str = "joseph"
    progress: bool | Progress = False


class Fit(NamedTuple):
    """What `fit` found.

    model: the StateSpace, learned parts in their shapes, or one a series (…, 1, rows, columns) with each=True.
    loglik: (steps + 1) log-likelihoods before the first step and after each; (steps + 1, …) with each=True.
    converged: bool, or bool tensor (…) with each=True.   reason: why it ended; of the first that did not converge.
    errors: standard errors of the learned parts by name, in their shapes, 0 where frozen; with each=True NaN for series
        that have none. None if there are none at all.
    errors_reason: why there are none, of the first series that has none, or "".
    """

    model: StateSpace
    loglik: Tensor
    converged: bool | Tensor
    reason: str
    errors: dict[str, Tensor] | None
    errors_reason: str


def fit(
    model: StateSpace,
    y: Tensor,
    u: Tensor | None = None,
    *,
    learn: Sequence[str] = ("Q", "R"),
    method: str = "em",
    frozen: Mapping[str, Tensor] | None = None,
    each: bool = False,
    steps: int = 500,
    options: FitOptions | None = None,
) -> Fit:
    """Learn parts of a model from series y by maximum likelihood, starting from the values it has.

    Args:
        model: where to start; parts that are not learned may vary in time and from series to series.
        y: (…, T, m), NaN: that entry is missing.   u: (…, T, p).
        learn: names among A, B, C, D, Q, R, m0, P0. Learned parts are constant in time.
        method: "em" or "lbfgs"; "em" refuses to learn A, B beside a Q that varies in time, and C, D beside such an R.
        frozen: for each name a boolean mask, True for entries that keep their value; symmetric for covariances.
        each: False learns one model for all series together; True one for each, (…, 1, rows, columns), side by side.
        steps: at most.

    A covariance that starts singular keeps its range: what has no noise is taken to have none. To learn A, C and Q all
    at once leaves the coordinates of the state open: the likelihood is right, standard errors do not exist.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came. What fails after the first step
            ends the fit instead, with the best model so far and the reason.

    >>> from stateline.classical import local_level, simulate
    >>> truth = local_level(level=0.5, noise=2.0, prior=1.0)
    >>> _, y = simulate(truth, 400, batch=20, generator=torch.Generator().manual_seed(0))
    >>> found = fit(local_level(level=1.0, noise=1.0, prior=1.0), y, method="lbfgs")
    >>> found.converged, round(found.model.Q.item(), 2), round(found.errors["Q"].item(), 2)
    (True, 0.55, 0.03)
    """
    options, learn = options or FitOptions(), (learn,) if isinstance(learn, str) else tuple(learn)
    batch, flat, data = _prepare(model, y, u, learn, each, options)
    free = _free(model, learn, frozen or {}, options)
    checks.choice(OP, "method", method, METHODS)
    checks.number(OP, "steps", steps, low=0, integer=True)
    with torch.no_grad():
        if method == "em":
            _refuse_varying_noise(flat, free, options)
        flat = _given_each(flat, free, len(data.y)) if each else flat
        shape = _Shape(model, batch, each)
        report = _reporter(options.progress, method, steps, flat, shape)
        run = _em if method == "em" else _lbfgs
        try:
            found, trace, converged, reasons = run(flat, data, free, steps, options, report)
        finally:
            if options.progress is True:
                print(file=sys.stderr)  # what comes next has a line of its own
        for g, problem in (endless := without_top(found, data, free)).items():
            converged[g], reasons[g] = False, problem
        errors, why = standard_errors(found, data, free, endless) if options.errors else (None, "errors=False")
    first = next((r for r, good in zip(reasons, converged.tolist(), strict=True) if not good), reasons[0])
    named = None
    if errors is not None:
        still = {name: torch.zeros_like(getattr(model, name)) for name in learn if name not in free}
        named = {name: shape.part(name, v) for name, v in errors.items()} | still
    return Fit(
        shape.model(found, free),
        (trace.unflatten(1, batch) if batch else trace[:, 0]) if each else trace[:, 0],
        converged.reshape(batch) if each else bool(converged[0]),
        first,
        named,
        why,
    )


# ---- the problem, flat -----------------------------------------------------------------------------------------------


def _prepare(
    model: StateSpace, y: Tensor, u: Tensor | None, learn: tuple[str, ...], each: bool, options: FitOptions
) -> tuple[tuple[int, ...], StateSpace, Data]:
    """Check everything, and bring it to one batch dimension in float64."""
    if not isinstance(options, FitOptions):
        problem = f"options is a {type(options).__name__}, expected FitOptions"
        raise checks.fail(OP, f"{problem}.", "As in options=FitOptions(tolerance=1e-3).", error=TypeError)
    if not (isinstance(options.progress, bool) or callable(options.progress)):
        problem = f"progress is {options.progress!r}, expected True, False or a function of step, log-likelihood, model"
        raise checks.fail(OP, f"{problem}.", error=TypeError)
    checks.choice(OP, "form", options.form, FORMS)
    checks.number(OP, "tolerance", options.tolerance, low=0.0)
    if options.tolerance > MOST:
        problem = f"tolerance is {options.tolerance:g} nats, at which a search may end far from the top"
        raise checks.fail(OP, f"{problem}; expected at most {MOST:g}.", "To end sooner, say steps=.")
    validate(model, OP)
    frame = check(OP, model, y, u)
    if not learn:
        raise checks.fail(OP, "learn is empty, expected names of parts.", 'The noise is learn=("Q", "R").')
    for name in learn:
        checks.choice(OP, "learn", name, StateSpace._fields)
        part = getattr(model, name)
        if part is None:
            raise checks.fail(OP, f"learn names {name}, which the model does not have.", f"Give it a {name} to start.")
        time = 1 if name in ("m0", "P0") or part.dim() < 3 else part.shape[-3]
        if time != 1:
            remedy = f"Leave {name} out of learn, or start from a constant one."
            raise checks.fail(OP, f"{name} has shape {tuple(part.shape)} and varies in time.", remedy)
        series = part.numel() // (part.shape[-1] * (1 if name == "m0" else part.shape[-2]))
        if series != 1 and not each:
            problem = f"{name} has shape {tuple(part.shape)}, a value for each series, to be learned for all together"
            raise checks.fail(OP, f"{problem}.", "Give each=True, or one matrix.")
    needed = 2 if set(learn) & {"A", "B", "Q"} else 1
    if y.shape[-2] < needed or torch.Size(frame.batch).numel() == 0:
        raise checks.fail(OP, f"y has shape {tuple(y.shape)}, expected series of at least {needed} steps.")
    if torch.isinf(y).any() or (u is not None and not torch.isfinite(u).all()):
        raise checks.fail(OP, "y has infinite values, or u values that are not finite.", "Only NaN in y is missing.")
    if bool(y.isnan().all()):
        raise checks.fail(OP, "all entries of y are missing (NaN).", "There is nothing to learn from.")
    N = torch.Size(frame.batch).numel()
    parts = {
        name: None if v is None else _lead(v, frame.batch, 1 if name == "m0" else 2, name not in ("m0", "P0"))
        for name, v in model._asdict().items()
    }

    def series_of(v: Tensor | None) -> Tensor | None:
        return None if v is None else _wide(v).expand(*frame.batch, *v.shape[-2:]).reshape(N, *v.shape[-2:])

    whole = series_of(y)
    assert whole is not None
    return frame.batch, StateSpace(**parts), Data(whole, series_of(u), each, options.form)  # type: ignore[arg-type]  # B, D


def _wide(v: Tensor) -> Tensor:
    return v.detach().to("cpu", torch.float64)


def _lead(v: Tensor, batch: tuple[int, ...], own: int, timed: bool) -> Tensor:
    """(N or 1, T or 1, own dimensions), without the dimension of time for what has none."""
    v = _wide(v)
    ahead, tail = v.shape[: v.dim() - own], v.shape[v.dim() - own :]
    time, series = (ahead[-1:] or torch.Size([1]), ahead[:-1]) if timed else (torch.Size([]), ahead)
    if series.numel() == 1:
        return v.reshape(1, *time, *tail)
    return v.expand(*batch, *time, *tail).reshape(-1, *time, *tail)


def _given_each(flat: StateSpace, free: Mapping[str, Tensor], N: int) -> StateSpace:
    """Learned parts with a row for each series."""
    changed = {name: getattr(flat, name) for name in free}
    return flat._replace(**{k: v.expand(N, *v.shape[1:]).clone() for k, v in changed.items()})


def _free(
    model: StateSpace, learn: tuple[str, ...], frozen: Mapping[str, Tensor], options: FitOptions
) -> dict[str, Tensor]:
    """The entries that are not frozen, for each learned part that has any."""
    for name in frozen:
        if name not in learn:
            problem = f"frozen has a mask for {name!r}, which is not in learn={learn!r}"
            raise checks.fail(OP, f"{problem}.", "What is not learned is frozen anyway.")
    free = {}
    for name in learn:
        size = tuple(getattr(model, name).shape[-1 if name == "m0" else -2 :])
        mask = frozen.get(name)
        if mask is None:
            free[name] = torch.ones(size, dtype=torch.bool)
            continue
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != size:
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise checks.fail(OP, f"frozen[{name!r}] is {got}, expected a bool tensor {size}.", error=TypeError)
        if name in COVARIANCES and not bool((mask == mask.mT).all()):
            raise checks.fail(OP, f"frozen[{name!r}] is not symmetric.", "Give mask | mask.mT.")
        free[name] = ~mask.cpu()
    free = {name: entries for name, entries in free.items() if bool(entries.any())}
    if not free:
        raise checks.fail(OP, f"frozen keeps every entry of learn={learn!r}.", "There is nothing to learn.")
    if options.stable and "A" in free and not bool(free["A"].all()):
        problem = "stable=True moves all entries of A together, and some are frozen"
        raise checks.fail(OP, f"{problem}.", "Leave out one of the two.")
    if options.stable and "A" not in free:
        raise checks.fail(OP, "stable=True, and A is not learned.", "Name it in learn, or leave stable out.")
    return free


def _refuse_varying_noise(flat: StateSpace, free: Mapping[str, Tensor], options: FitOptions) -> None:
    """What has no exact step of expectation maximisation."""
    if options.stable:
        raise checks.fail(OP, "stable=True, which method='em' cannot keep.", "Take method='lbfgs'.")
    for names, noise in ((("A", "B"), "Q"), (("C", "D"), "R")):
        learned = [name for name in names if name in free]
        cov = getattr(flat, noise)
        if learned and (cov.shape[1] > 1 or (cov.shape[0] > 1 and noise not in free)):
            problem = f"{learned[0]} is learned and {noise} varies, for which method='em' has no exact step"
            raise checks.fail(OP, f"{problem}.", "Take method='lbfgs'.")


class _Shape:
    """From flat results to the shapes the caller knows."""

    def __init__(self, model: StateSpace, batch: tuple[int, ...], each: bool) -> None:
        self.like, self.batch, self.each = model, batch, each

    def part(self, name: str, v: Tensor) -> Tensor:
        """A learned part (G, …)."""
        like = getattr(self.like, name)
        tail = v.shape[1:] if name in ("m0", "P0") else v.shape[-2:]
        if not self.each:
            v = v.reshape(like.shape)
        else:
            v = v.reshape(*self.batch, *(() if name in ("m0", "P0") or not self.batch else (1,)), *tail)
        return v.to(like)

    def model(self, flat: StateSpace, free: Mapping[str, Tensor]) -> StateSpace:
        return self.like._replace(**{name: self.part(name, getattr(flat, name)) for name in free})


def _reporter(
    progress: bool | Progress, method: str, steps: int, flat: StateSpace, shape: _Shape
) -> Callable[[int, Tensor, Callable[[], dict[str, Tensor]]], None]:
    """What is called after each step with its number, the log-likelihoods (G) and the learned parts on demand."""

    def line(step: int, loglik: Tensor, parts: Callable[[], dict[str, Tensor]]) -> None:
        told = f"\rfit {method}: step {step} of {steps}, log-likelihood {float(loglik.sum()):.6f}"
        print(told, end="", file=sys.stderr)

    def tell(step: int, loglik: Tensor, parts: Callable[[], dict[str, Tensor]]) -> None:
        learned = parts()
        assert callable(progress)
        progress(step, loglik.clone(), shape.model(replace(flat, learned), learned))

    if callable(progress):
        return tell
    return line if progress else lambda step, loglik, parts: None


# ---- expectation maximisation ----------------------------------------------------------------------------------------


Result = tuple[StateSpace, Tensor, Tensor, list[str]]


def _em(
    flat: StateSpace, data: Data, free: dict[str, Tensor], steps: int, options: FitOptions,
    report: Callable[[int, Tensor, Callable[[], dict[str, Tensor]]], None],
) -> Result:  # fmt: skip
    """Steps until none of the models gains; those that have ended stay as they are."""
    G = len(data.y) if data.each else 1
    reasons, converged = ["" for _ in range(G)], torch.zeros(G, dtype=torch.bool)
    best, last = flat, torch.zeros(G, dtype=torch.float64)
    trace: list[Tensor] = []

    def improve(rows: Tensor) -> Tensors:
        model, some = some_of(flat, data, rows)
        made, loglik = em_step(some, model, free)
        return (loglik.sum(1) if data.each else loglik.sum()[None], *(made[name] for name in free))

    def failed(g: int, problem: str) -> Tensors:
        if not trace:
            raise ValueError(problem)
        reasons[g] = f"step {len(trace)} failed: {problem}"
        return (last.new_tensor([-torch.inf]), *(of(_matrix_of(flat, name), torch.tensor([g])) for name in free))

    for step in range(steps + 1):
        open_ = torch.tensor([not r for r in reasons])
        rows = open_.nonzero()[:, 0]
        found, *made = apart(improve, failed, rows)
        if step and not bool(torch.isfinite(found).any()):
            break
        value = last.index_put((rows,), found)
        if step:
            gain = value - last
            fell = open_ & ~(gain >= -ROUNDING * last.abs().clamp(min=1))
            for g in fell.nonzero()[:, 0].tolist():
                reasons[g] = reasons[g] or f"step {step} lowered the log-likelihood by {-float(gain[g]):.3g}: rounding"
            ended = open_ & ~fell & (gain < options.tolerance)
            for g in ended.nonzero()[:, 0].tolist():
                reasons[g] = f"a step gains less than {options.tolerance:g}"
            converged |= ended
            back = {name: torch.where(beside(fell, v), _matrix_of(best, name), v) for name, v in _parts(flat, free)}
            flat, value = replace(flat, back), torch.where(fell, last, value)
            if bool((open_ & ~fell).any()):
                report(step, value, lambda: dict(_parts(flat, free)))  # noqa: B023  # called at once
        best, last = flat, value
        trace.append(value)
        if all(reasons):
            break
        if step < steps:
            go = torch.tensor([not reasons[g] for g in rows.tolist()])
            moved = zip(_parts(flat, free), made, strict=True)
            flat = replace(flat, {name: v.index_put((rows[go],), new[go]) for (name, v), new in moved})
    return best, torch.stack(trace), converged, [r or f"all {steps} steps are used up" for r in reasons]


def _parts(flat: StateSpace, free: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(name, _matrix_of(flat, name)) for name in free]


def _matrix_of(flat: StateSpace, name: str) -> Tensor:
    v: Tensor = getattr(flat, name)
    return v[:, 0] if v.dim() == 4 else v


# ---- L-BFGS --------------------------------------------------------------------------------------------------------


def _lbfgs(
    flat: StateSpace, data: Data, free: dict[str, Tensor], steps: int, options: FitOptions,
    report: Callable[[int, Tensor, Callable[[], dict[str, Tensor]]], None],
) -> Result:  # fmt: skip
    G = len(data.y) if data.each else 1
    parameters = Parameters(OP, flat, tuple(free), free, options.stable)
    cost, all_rows = Cost(flat, data, parameters), torch.arange(G)
    kalman_filter(flat, data.y, data.u, form=data.form, keep="loglik")  # a start that fails says why
    found = minimise(
        cost, parameters.start(G), tolerance=0.0, gain=options.tolerance, steps=steps, evaluations=TRIALS * (steps + 1),
        longest=LONGEST, report=lambda step, value, x: report(step, -value, lambda: parameters(x, all_rows)[0]),
    )  # fmt: skip
    told = []
    for g, reason in enumerate(found.reason.tolist()):
        if reason == minimised.LITTLE:
            told.append(f"a step gains less than {options.tolerance:g}")
        elif reason == minimised.STUCK:
            why = f" ({cost.problems[g]})" if g in cost.problems else ""
            told.append(f"no step along the slope raises the likelihood{why}")
        else:
            told.append(minimised.REASONS[reason].replace("all steps", f"all {steps} steps"))
    return replace(flat, parameters(found.x, all_rows)[0]), -found.trace, found.converged, told
