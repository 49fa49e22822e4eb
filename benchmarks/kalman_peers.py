"""The Kalman filter beside the packages that others use: times, and what missing entries and float32 do to results.

    python -m benchmarks.kalman_peers                                     # prints the page
    python -m benchmarks.kalman_peers --out docs/kalman_performance.md    # writes it
    python -m benchmarks.kalman_peers --quick                             # seconds instead of minutes, for a look

Peers: pip install stateline[peers-classical]. Those that are absent are left out. Everything runs on one core; a time
is the least CPU time of the process over several runs, so that other work on the machine counts little.

Suffixes: N series, T step, n state, p observation.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import os
import sys
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from benchmarks.kalman_packages import (
    OURS,
    ROOTS,
    Array,
    Filter,
    Result,
    System,
    cuthbert_filter,
    dynamax_filter,
    fast_kalman_filter,
    model_of,
    ours,
    peers,
    pykalman_likelihood,
    statsmodels,
    statsmodels_filter,
)

from stateline.classical import KalmanFilter, kalman_filter, kalman_smoother
from stateline.ops.kalman import KalmanState

# ---- problems --------------------------------------------------------------------------------------------------------


def tracking() -> System:
    """Points in a plane at constant velocity but for noise, their positions seen: n = 4, p = 2."""
    A = np.eye(4) + np.diag([1.0, 1.0], 2)
    Q = 0.05 * np.kron(np.array([[1 / 3, 1 / 2], [1 / 2, 1.0]]), np.eye(2))
    return System(A, np.eye(2, 4), Q, 0.5 * np.eye(2), np.zeros(4), 10 * np.eye(4))


def random_system(n: int, p: int) -> System:
    """A stable one of that size."""
    rng = np.random.default_rng(0)
    A = 0.9 * np.linalg.qr(rng.standard_normal((n, n)))[0]
    return System(A, rng.standard_normal((p, n)) / n**0.5, 0.1 * np.eye(n), 0.5 * np.eye(p), np.zeros(n), np.eye(n))


def drawn(s: System, N: int, T: int, gaps: float = 0.0) -> Array:
    """N series of T observations (N, T, p), of which a share has nothing seen."""
    rng = np.random.default_rng(1)
    roots = [np.linalg.cholesky(v) for v in (s.Q, s.R, s.P0)]
    h, y = s.m0 + rng.standard_normal((N, len(s.A))) @ roots[2].T, []
    for _ in range(T):
        y.append(h @ s.C.T + rng.standard_normal((N, len(s.C))) @ roots[1].T)
        h = h @ s.A.T + rng.standard_normal((N, len(s.A))) @ roots[0].T
    series = np.stack(y, 1)
    if gaps:
        series[rng.random((N, T)) < gaps] = np.nan
    return series


def dense_loglik(s: System, y: Array) -> float:
    """log p(y) of one series (T, p) from the covariance of all its entries at once: no filter."""
    T = len(y)
    covs, mean, means = [s.P0], s.m0, [s.m0]
    for _ in range(T - 1):
        covs.append(s.A @ covs[-1] @ s.A.T + s.Q)
        mean = s.A @ mean
        means.append(mean)
    p = len(s.C)
    K = np.zeros((T * p, T * p))
    for t in range(T):
        cross = covs[t]
        for u in range(t, T):
            block = s.C @ cross @ s.C.T + (s.R if u == t else 0)
            K[t * p : (t + 1) * p, u * p : (u + 1) * p] = block.T
            K[u * p : (u + 1) * p, t * p : (t + 1) * p] = block
            cross = s.A @ cross
    seen = ~np.isnan(y.ravel())
    e = (y - np.stack(means) @ s.C.T).ravel()[seen]
    K = K[np.ix_(seen, seen)]
    return float(-0.5 * (e @ np.linalg.solve(K, e) + np.linalg.slogdet(2 * np.pi * K)[1]))


# ---- measuring -------------------------------------------------------------------------------------------------------


def least(work: Callable[[], object], seconds: float) -> float:
    """Milliseconds of CPU time of the best run, within `seconds` but at least one after a first."""
    work()
    best, until = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
        if time.perf_counter() > until:
            return 1e3 * best


def times(seconds: float) -> list[tuple[str, dict[str, str]]]:
    """Rows (case, by package)."""
    small, large = tracking(), random_system(64, 32)
    cases = [
        ("one series, n = 4, p = 2, T = 10,000", small, 1, 10_000, 0.0),
        ("1,000 series, n = 4, p = 2, T = 1,000", small, 1000, 1000, 0.0),
        ("the same, a tenth of each series' rows missing", small, 1000, 1000, 0.1),
        ("one series, n = 64, p = 32, T = 1,000", large, 1, 1000, 0.0),
    ]
    return [(f"filter: {name}", filters(name, system, drawn(system, N, T, gaps), seconds))
            for name, system, N, T, gaps in cases] + others(small, seconds)  # fmt: skip


def filters(name: str, system: System, y: Array, seconds: float) -> dict[str, str]:
    """Every package's filter."""
    loops = {"filterpy": 2, "pykalman": 1, "statsmodels": 50}  # series after which a loop over series is extrapolated
    row = {}
    for by, run in peers().items():
        some = min(len(y), loops.get(by, len(y)))
        found = _tried(run, system, y[:some])
        if isinstance(found, str):
            row[by] = "–"
            continue
        took = least(functools.partial(run, system, y[:some]), seconds) * len(y) / some
        row[by] = f"{took:,.3g}" if took < 100 else f"{took:,.0f}"
        row[by] += "*" if some < len(y) else ""
        row[by] = row[by] if np.isfinite(np.asarray(found.mean)).all() else "NaN"
        print(f"{name}: {by} {row[by]} ms", file=sys.stderr)
    return row


def others(small: System, seconds: float) -> list[tuple[str, dict[str, str]]]:
    """Rows that are not of filters alone."""
    rows = [("gradient of the likelihood in A, C, Q, R: one series, n = 4, p = 2, T = 1,000",
             gradients(small, drawn(small, 1, 1000), seconds))]  # fmt: skip
    rows.append(("smoother: one series, n = 4, p = 2, T = 10,000", smoothers(small, drawn(small, 1, 10_000), seconds)))
    rows.append(("new observation of one series, n = 4, p = 2", updates(small, 1, seconds)))
    rows.append(("new observation of each of 10,000 series", updates(small, 10_000, seconds)))
    return rows


def gradients(s: System, y: Array, seconds: float) -> dict[str, str]:
    """The log-likelihood and its slopes together, of packages that differentiate it."""
    leaves = [torch.as_tensor(v).clone().requires_grad_() for v in (s.A, s.C, s.Q, s.R)]
    A, C, Q, R = leaves
    model, series = model_of(s)._replace(A=A, C=C, Q=Q, R=R), torch.as_tensor(y)
    work: dict[str, Callable[[], object]] = {}
    for by, form in ((OURS, "joseph"), (ROOTS, "sqrt")):
        run = functools.partial(kalman_filter, model, series, form=form, keep="loglik")
        work[by] = lambda run=run: torch.autograd.grad(run()[0].loglik.sum(), leaves)  # type: ignore[misc]  # a default
    if find_spec("dynamax") or find_spec("cuthbert"):
        import jax

        jax.config.update("jax_enable_x64", True)
    if find_spec("dynamax"):
        dynamax_slope = jax.jit(jax.grad(lambda *v: dynamax_filter()(*v, s.m0, s.P0, y)[2].sum(), argnums=(0, 1, 2, 3)))
        work["dynamax"] = lambda: jax.block_until_ready(dynamax_slope(s.A, s.C, s.Q, s.R))
    if find_spec("cuthbert"):
        P0 = np.linalg.cholesky(s.P0)

        def likelihood(A: Array, C: Array, Q: Array, R: Array) -> Array:
            roots = (jax.numpy.linalg.cholesky(v) for v in (Q, R))
            return cuthbert_filter()(A, C, *roots, P0, s.m0, y)[2].sum()

        cuthbert_slope = jax.jit(jax.grad(likelihood, argnums=(0, 1, 2, 3)))
        work["cuthbert"] = lambda: jax.block_until_ready(cuthbert_slope(s.A, s.C, s.Q, s.R))
    return {by: f"{least(run, seconds):,.3g}" for by, run in work.items()}


def smoothers(s: System, y: Array, seconds: float) -> dict[str, str]:
    """Filter and smoother together."""
    model = model_of(s)
    work: dict[str, Callable[[], object]] = {OURS: lambda: kalman_smoother(model, torch.as_tensor(y))}
    if find_spec("statsmodels"):
        from statsmodels.tsa.statespace.kalman_smoother import KalmanSmoother

        work["statsmodels"] = lambda: statsmodels_filter(KalmanSmoother, s, y[0]).smooth()
    if find_spec("simdkalman"):
        import simdkalman as package

        peer = package.KalmanFilter(s.A, s.Q, s.C, s.R)
        work["simdkalman"] = lambda: peer.smooth(y, initial_value=s.m0, initial_covariance=s.P0, observations=False)
    return {by: f"{least(run, seconds):,.3g}" for by, run in work.items()}


def updates(s: System, N: int, seconds: float) -> dict[str, str]:
    """One observation of each of N series; many calls are timed together."""
    layer = KalmanFilter(model_of(s))
    state = KalmanState(torch.as_tensor(s.m0).expand(N, -1).clone(), torch.as_tensor(s.P0).expand(N, -1, -1).clone())
    y, calls = torch.ones(N, 2, dtype=torch.float64), 200 if N == 1 else 2
    with torch.no_grad():
        row = {OURS: least(lambda: [layer.update_(y, state) for _ in range(calls)], seconds) / calls}
    if find_spec("filterpy"):
        from filterpy.kalman import KalmanFilter as Peer

        peer, z, few = Peer(dim_x=4, dim_z=2), np.ones(2), 200
        peer.F, peer.H, peer.Q, peer.R, peer.P = s.A, s.C, s.Q, s.R, s.P0.copy()

        def loop() -> None:
            for _ in range(few):
                peer.update(z)
                peer.predict()

        row["filterpy"] = least(loop, seconds) / few * N
    if find_spec("kalman"):
        fast, seen, many = fast_kalman_filter(s), [1.0, 1.0], 1000

        def steps() -> None:
            for _ in range(many):
                fast.correct(seen)
                fast.predict()

        row["fast_kalman"] = least(steps, seconds) / many * N
    return {by: f"{took:,.3g}" + ("*" if by != OURS and N > 1 else "") for by, took in row.items()}


def correctness() -> list[tuple[str, dict[str, str]]]:
    """Rows (case, by package): how far results are from exact ones."""
    s = tracking()
    y = drawn(s, 1, 100)
    y[0, ::3, 1] = np.nan
    y[0, 5] = np.nan
    exact = dense_loglik(s, y[0])
    likelihood, sensor = {}, {}
    precise = System(np.array([[1.0, 1.0], [0.0, 1.0]]), np.eye(1, 2), 0.01 * np.eye(2), np.full((1, 1), 1e-12),
                     np.zeros(2), 100 * np.eye(2))  # fmt: skip
    series = drawn(precise, 1, 200)
    truth = np.asarray(ours(precise, series, "sqrt").variance)
    single = System(*(v.astype(np.float32) for v in precise))
    extra = {"pykalman": pykalman_likelihood, "statsmodels": lambda s, y: statsmodels(s, y, 0)}
    for by, run in peers().items():
        found = _tried(extra.get(by, run), s, y)
        if isinstance(found, str) or found.loglik is None:
            likelihood[by] = found if isinstance(found, str) else _finite(found)
        else:
            likelihood[by] = f"{abs(float(found.loglik[0]) - exact):.1g}".replace("nan", "NaN")
        found = _tried(run, single, series.astype(np.float32))
        if isinstance(found, str):
            sensor[by] = found
        elif found.variance is None:
            sensor[by] = "no variances of every step"
        else:
            error = float(np.abs(np.asarray(found.variance, dtype=float) / truth - 1).max())
            sensor[by] = f"{error:.1g}".replace("nan", "NaN")
            sensor[by] += "" if _kind(found) == "float32" else " (in float64)"
    return [
        ("a third of one sensor's entries missing: error of the log-likelihood of 100 steps, nats", likelihood),
        ("R = 1e-12, float32 data: largest relative error of a variance", sensor),
    ]


def _tried(run: Filter, s: System, y: Array) -> Result | str:
    try:
        return run(s, y.copy())
    except Exception as error:  # any way in which a peer refuses is the result
        return f"raises {type(error).__name__}"


def _finite(found: Result) -> str:
    good = bool(np.isfinite(np.asarray(found.mean)).all())
    return "no likelihood" if good else "means are NaN"


def _kind(found: Result) -> str:
    return str(found.mean.dtype).removeprefix("torch.")


# ---- the page --------------------------------------------------------------------------------------------------------


PAGE = """# The Kalman filter beside other packages

Made by `python -m benchmarks.kalman_peers --out docs/kalman_performance.md`, with the peers of
`pip install stateline[peers-classical]` installed: {versions}; torch {torch}.

## Times

n is the number of states, p of the values observed at each step, T of steps. A dash (–): a package refuses the case, or
was not timed in it; NaN: that is its answer.

Milliseconds of CPU time on one core, the least of several runs, float64. Other work counts little: ratios
say more than figures. Ours include the log-likelihood, as those of statsmodels, simdkalman and dynamax do; the others'
do not. \\* extrapolated from a few series of a loop over series. statsmodels stops updating covariances once they have
settled, which ours never does; dynamax and cuthbert are compiled first, which takes seconds and does not count here.
fast-kalman returns the last state only, takes no missing entries and at most eight states. Of these packages only ours,
dynamax and cuthbert differentiate the likelihood; statsmodels evaluates it once or twice for each parameter.

TIMES

## On a GPU

100,000 series of 1,000 steps, n = 4, p = 2, float32, one system for all, on one H100 (80 GB HBM3), torch 2.11,
CUDA 13.0, commit e10a76c; milliseconds of the device (`python -m benchmarks.gpu --only kalman`). Where series start
with one covariance and miss the same entries, covariances are computed once, which nobody has to say, and written for
each.

| | shared | shared, a tenth missing in all | each its own | torch-kf | what memory allows |
|---|---|---|---|---|---|
| means, covariances, both predictions, log-likelihoods | 5.9 | 6.5 | 7.6 | 1,261\\* | 5.7 |
| log-likelihoods alone | 0.82 | 1.4 | 2.8 | – | 0.4 |
| log-likelihoods and their gradient of A, C, Q and R | | | 17.2 | – | 6.4 |
| one observation of each series | | | 0.022 | – | 0.008 |

\\* without log-likelihoods and predictions. Systems of up to 64 states are shared by several lanes where a thread's
registers do not hold them, and so are gradients from seven states on (float64: five). 1,000 steps, float32, each
series its own covariances:

| | all results | log-likelihoods and their gradient | torch-kf |
|---|---|---|---|
| 20,000 series, n = 8, p = 4 (shared: 5.6) | 7.3 | 33.8 | – |
| 2,000 series, n = 16, p = 8 | 8.7 | 24.3 | 527 |
| 2,000 series, n = 32, p = 16 | 52 | 161 | 532 |

Kernels are compiled when they are first used, in one to five seconds, and kept on disk.

## Correctness

The exact likelihood is that of all observations as one Gaussian, without a filter; the exact variances are those of
square roots in float64.

CORRECTNESS

Packages that drop a whole row where one entry is missing answer another question, without saying so. Where a sensor is
far more precise than the prior, `form="sqrt"` keeps twice the digits: [numerics](numerics.md).
"""


def page(rows: list[tuple[str, dict[str, str]]], checks: list[tuple[str, dict[str, str]]]) -> str:
    """Markdown of both tables."""
    names = list(peers())
    versions = ", ".join(f"{name.replace('_', '-')} {importlib.metadata.version(name)}" for name in names[2:])
    made = PAGE.format(versions=versions, torch=torch.__version__)
    return made.replace("TIMES", _table(names, rows)).replace("CORRECTNESS", _table(names, checks))


def _table(names: list[str], rows: list[tuple[str, dict[str, str]]]) -> str:
    head = "| | " + " | ".join(name.replace("_", "-") for name in names) + " |"
    lines = [head, "|---" * (len(names) + 1) + "|"]
    return "\n".join(
        lines + [f"| {case} | " + " | ".join(row.get(name, "–") for name in names) + " |" for case, row in rows]
    )


def main() -> None:
    """Measure, and write or print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the page goes; printed otherwise")
    parser.add_argument("--quick", action="store_true", help="one run of each")
    options = parser.parse_args()
    alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if any(os.environ.get(name) != value for name, value in alone.items()):  # read when numpy is loaded: start again
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.kalman_peers", *sys.argv[1:]], os.environ | alone)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of peers
    np.seterr(all="ignore")
    text = page(times(0 if options.quick else 3), correctness())
    if options.out:
        options.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
