"""The packages that filter, each behind one function, for benchmarks/kalman_peers.py: what goes in, what comes out.

Suffixes: N series, T step, n state, p observation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch

from stateline.classical import StateSpace, kalman_filter

Array = Any
OURS, ROOTS = "stateline", "stateline, square roots"
#: What is imported of packages that are named otherwise.
MODULES = {"fast_kalman": "kalman"}


class System(NamedTuple):
    """Constant matrices of a model, numpy."""

    A: Array
    C: Array
    Q: Array
    R: Array
    m0: Array
    P0: Array


class Result(NamedTuple):
    """mean and variances of the states (N, T, n), log-likelihood (N); None for what there is not."""

    mean: Array
    variance: Array | None
    loglik: Array | None


Filter = Callable[[System, Array], Result]


def ours(system: System, y: Array, form: str = "joseph") -> Result:
    """The filter with everything it returns."""
    out, _ = kalman_filter(model_of(system), torch.as_tensor(y), form=form)
    return Result(out.mean, out.cov.diagonal(dim1=-2, dim2=-1), out.loglik.sum(-1))  # type: ignore[union-attr]  # kept


def model_of(system: System) -> StateSpace:
    A, C, Q, R, m0, P0 = (torch.as_tensor(v) for v in system)
    return StateSpace(A, None, C, None, Q, R, m0, P0)


def statsmodels(system: System, y: Array, tolerance: float | None = None) -> Result:
    """One series after another; by default it stops updating covariances once they have settled."""
    from statsmodels.tsa.statespace.kalman_filter import KalmanFilter as Peer

    means, variances, logliks = [], [], []
    for series in y:
        peer = statsmodels_filter(Peer, system, series)
        if tolerance is not None:
            peer.tolerance = tolerance
        found = peer.filter()
        means.append(found.filtered_state.T)
        variances.append(np.diagonal(found.filtered_state_cov))
        logliks.append(found.llf_obs.sum())
    return Result(np.stack(means), np.stack(variances), np.array(logliks))


def statsmodels_filter(kind: Any, s: System, y: Array) -> Any:
    n = s.A.shape[0]
    peer = kind(k_endog=s.C.shape[0], k_states=n, design=s.C, transition=s.A, obs_cov=s.R, state_cov=s.Q,
                selection=np.eye(n, dtype=s.A.dtype), dtype=s.A.dtype)  # fmt: skip
    peer.bind(np.ascontiguousarray(y))
    peer.initialize_known(s.m0, s.P0)
    return peer


def filterpy(system: System, y: Array) -> Result:
    """One series after another; a likelihood only step by step, which its batch does not return."""
    from filterpy.kalman import KalmanFilter as Peer

    means, variances = [], []
    for series in y:
        peer = Peer(dim_x=system.A.shape[0], dim_z=system.C.shape[0])
        peer.F, peer.H, peer.Q, peer.R = system.A, system.C, system.Q, system.R
        peer.x, peer.P = system.m0.copy(), system.P0.copy()
        zs = [None if np.isnan(z).all() else z for z in series]
        mean, cov, _, _ = peer.batch_filter(zs, update_first=True)
        means.append(mean)
        variances.append(np.diagonal(cov, axis1=1, axis2=2))
    return Result(np.stack(means), np.stack(variances), None)


def pykalman(system: System, y: Array) -> Result:
    """One series after another; rows with a missing entry are masked, which it takes for missing altogether."""
    from pykalman import KalmanFilter as Peer

    means, variances = [], []
    for series in y:
        peer = Peer(system.A, system.C, system.Q, system.R, initial_state_mean=system.m0,
                    initial_state_covariance=system.P0)  # fmt: skip
        mean, cov = peer.filter(np.ma.masked_invalid(series))
        means.append(mean)
        variances.append(np.diagonal(cov, axis1=1, axis2=2))
    return Result(np.stack(means), np.stack(variances), None)


def pykalman_likelihood(system: System, y: Array) -> Result:
    """The same and its likelihood, which it computes in a second pass."""
    from pykalman import KalmanFilter as Peer

    found = pykalman(system, y)
    peer = Peer(system.A, system.C, system.Q, system.R, initial_state_mean=system.m0,
                initial_state_covariance=system.P0)  # fmt: skip
    return found._replace(loglik=np.array([peer.loglikelihood(np.ma.masked_invalid(series)) for series in y]))


def simdkalman(system: System, y: Array) -> Result:
    """All series at once; a likelihood without its constant, which is added here."""
    import simdkalman as package

    peer = package.KalmanFilter(system.A, system.Q, system.C, system.R)
    found = peer.compute(y, 0, initial_value=system.m0, initial_covariance=system.P0, smoothed=False, filtered=True,
                         observations=False, log_likelihood=True)  # fmt: skip
    cov = found.filtered.states.cov
    seen = (~np.isnan(y).any(-1)).sum(-1) * y.shape[-1]
    constant = -0.5 * seen * np.log(2 * np.pi)
    return Result(found.filtered.states.mean, np.diagonal(cov, axis1=-2, axis2=-1), found.log_likelihood + constant)


def torch_kf(system: System, y: Array) -> Result:
    """All series at once, without a likelihood."""
    from torch_kf import GaussianState
    from torch_kf import KalmanFilter as Peer

    A, C, Q, R, m0, P0 = (torch.as_tensor(v) for v in system)
    N, n = y.shape[0], A.shape[0]
    peer = Peer(A, C, Q, R)
    start = GaussianState(m0[:, None].expand(N, n, 1).clone(), P0.expand(N, n, n).clone())
    found = peer.filter(start, torch.as_tensor(y).transpose(0, 1)[..., None], update_first=True, return_all=True)
    return Result(found.mean[..., 0].transpose(0, 1), found.covariance.transpose(0, 1).diagonal(dim1=-2, dim2=-1), None)


def dynamax(system: System, y: Array) -> Result:
    """All series at once by vmap, compiled; the time of compiling does not count."""
    import jax

    jax.config.update("jax_enable_x64", y.dtype == np.float64)
    mean, cov, loglik = dynamax_filter()(*system, y)
    return Result(np.asarray(mean), np.diagonal(np.asarray(cov), axis1=-2, axis2=-1), np.asarray(loglik))


@functools.cache
def dynamax_filter() -> Any:
    import jax
    from dynamax.linear_gaussian_ssm.inference import lgssm_filter, make_lgssm_params

    def one(A: Array, C: Array, Q: Array, R: Array, m0: Array, P0: Array, y: Array) -> tuple[Array, ...]:
        found = lgssm_filter(make_lgssm_params(m0, P0, A, Q, C, R), y)
        return found.filtered_means, found.filtered_covariances, found.marginal_loglik

    return jax.jit(jax.vmap(one, in_axes=(*(None,) * 6, 0)))


def cuthbert(system: System, y: Array) -> Result:
    """All series at once by vmap, compiled, in square roots; the time of compiling does not count."""
    import jax

    jax.config.update("jax_enable_x64", y.dtype == np.float64)
    roots = (np.linalg.cholesky(v).astype(y.dtype) for v in (system.Q, system.R, system.P0))
    mean, factor, loglik = jax.tree.map(np.asarray, cuthbert_filter()(system.A, system.C, *roots, system.m0, y))
    return Result(mean, np.square(factor).sum(-1), loglik)


@functools.cache
def cuthbert_filter() -> Any:
    import jax

    return jax.jit(jax.vmap(_cuthbert_one, in_axes=(*(None,) * 6, 0)))


def _cuthbert_one(A: Array, C: Array, Q: Array, R: Array, P0: Array, m0: Array, y: Array) -> tuple[Array, ...]:
    """One series (T, p); Q, R and P0 are factors. Its state begins before the first observation, and the step
    from there leads from anything to the prior."""
    from cuthbert import filter as run
    from cuthbert.gaussian.kalman import build_filter
    from jax import numpy as jnp

    peer = build_filter(
        jnp.zeros_like(m0), jnp.eye(len(m0), dtype=y.dtype),
        lambda t: (jnp.where(t == 0, 0, A), jnp.where(t == 0, m0, 0), jnp.where(t == 0, P0, Q)),
        lambda t: (C, jnp.zeros(len(C), y.dtype), R, y[t]),
    )  # fmt: skip
    steps = jnp.arange(len(y))
    found = run(peer, steps, peer.init_prepare())
    return found.mean[1:], found.chol_cov[1:], found.log_normalizing_constant[-1]


def fast_kalman(system: System, y: Array) -> Result:
    """One series after another, of which it tells the last state only; no entry may be missing."""
    if np.isnan(y).any():
        raise ValueError("takes no missing entries")
    means = []
    for series in y:
        peer = fast_kalman_filter(system)
        peer.correct(series[0].tolist())
        peer.update_many(series[1:])
        means.append(np.asarray(peer.x))
    return Result(np.stack(means)[:, None], None, None)


def fast_kalman_filter(s: System) -> Any:
    from kalman import LinearKalmanFilter

    A, C, Q, R, m0, P0 = (v.ravel().tolist() for v in s)
    return LinearKalmanFilter(s.A.shape[0], s.C.shape[0], x=m0, P=P0, F=A, Q=Q, H=C, R=R)


def peers() -> dict[str, Filter]:
    """Those that are installed, ours first."""
    known = {"statsmodels": statsmodels, "simdkalman": simdkalman, "torch_kf": torch_kf, "filterpy": filterpy}
    known |= {"pykalman": pykalman, "dynamax": dynamax, "cuthbert": cuthbert, "fast_kalman": fast_kalman}
    roots = {OURS: ours, ROOTS: lambda s, y: ours(s, y, "sqrt")}
    return roots | {name: run for name, run in known.items() if find_spec(MODULES.get(name, name))}
