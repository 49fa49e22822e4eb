"""kalman_smooth: moments of a linear-Gaussian state given all observations, from the filter's predicted moments.

Suffixes as in reference.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from stateline import backends, checks
from stateline.checks import Sizes
from stateline.ops.kalman import DTYPES, PRECISION, exact, expanded, same_gaps
from stateline.ops.library import call, define, first_only_of, or_empty

OP = "kalman_smooth"


def kalman_smooth(
    y: Tensor,
    A: Tensor,
    C: Tensor,
    R: Tensor,
    predicted_mean: Tensor,
    predicted_cov: Tensor,
    *,
    observation_offset: Tensor | None = None,
    known: tuple[Tensor, Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (N, T, n), cov (N, T, n, n), and Cov(h[t], h[t+1]) (N, T−1, n, n) of the state, given all of y.

    Args:
        y, A, C, R, observation_offset: as `ops.kalman` took them.
        predicted_mean, predicted_cov: as it returned them; covariances of one series, expanded, are taken as shared.
        known: the three results, where they are at hand already, from factors: only their gradients are computed here.
        backend: "cpu" or "reference" forces one, None chooses.

    Differentiable in every tensor; first derivatives only.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    sizes = Sizes(OP)
    sizes.match("y", y, "N T m")
    checks.dtype(OP, "y", y, DTYPES, PRECISION)
    sizes.match("predicted_mean", predicted_mean, "N T n")
    sizes.match("predicted_cov", predicted_cov, "N T n n")
    given = {"A": A, "C": C, "R": R, "observation_offset": observation_offset}
    for (name, v), tail in zip(given.items(), ("n n", "m n", "m m", "m"), strict=True):
        if v is not None:
            want = tuple(sizes[letter] for letter in tail.split())
            lead = v.shape[:2]
            if v.shape[2:] != want or any(s not in (1, t) for s, t in zip(lead, y.shape[:2], strict=True)):
                problem = f"{name} has shape {tuple(v.shape)}, expected (1 or N, 1 or T, {', '.join(map(str, want))})."
                raise checks.fail(OP, problem)
    moments = {"predicted_mean": predicted_mean, "predicted_cov": predicted_cov}
    for name, v in (given | moments).items():
        if v is not None:
            checks.dtype(OP, name, v, (y.dtype,), "Observations, system and moments share one dtype.")
    checks.same_device(OP, {"y": y} | given | moments)
    N = y.shape[0]
    shared = N > 1 and expanded(predicted_cov) and all(v.shape[0] == 1 for v in (A, C, R)) and same_gaps(y)
    cov = predicted_cov[:1] if shared else predicted_cov
    there = (None, None, None) if known is None else (known[0], *(v[:1] if shared else v for v in known[1:]))
    mean, cov, lag = call(_Smooth, y, A, C, R, observation_offset, predicted_mean, cov, *there, shared, backend)
    return mean, cov.expand(N, *cov.shape[1:]), lag.expand(N, *lag.shape[1:])


def _run(y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *given, shared, backend = args
    with exact(y):
        module = backends.kernel(OP, y.device.type, backend, y.dtype, (y, *given))
        return tuple(v.contiguous() for v in module.smooth(y, *given, shared=shared))


def _fake(y: Tensor, A: Any, C: Any, R: Any, d: Any, mean: Tensor, cov: Tensor, *_: Any) -> tuple[Tensor, ...]:
    s, T, n, n = cov.shape
    return y.new_empty(mean.shape), y.new_empty(cov.shape), y.new_empty((s, max(T - 1, 0), n, n))


def _run_backward(*args: Any) -> tuple[Tensor, ...]:
    grads, y, rest, (shared, backend) = args[:3], args[3], args[4:-2], args[-2:]
    with exact(y):
        module = backends.kernel(OP, y.device.type, backend, y.dtype, (y, *rest))
        found = module.smooth_backward(grads, y, *rest, shared=shared)
    return tuple(or_empty(v, y) for v in found)


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    y = args[3]
    return tuple(y.new_empty((0,) if v is None else v.shape) for v in args[3:10])


_GIVEN = "Tensor y, Tensor A, Tensor C, Tensor R, Tensor? d, Tensor mean, Tensor cov, bool shared, str? backend"
_forward = define(f"{OP}({_GIVEN}) -> (Tensor, Tensor, Tensor)", _run, _fake)
_backward = define(
    f"{OP}_backward(Tensor? dmean, Tensor? dcov, Tensor? dlag, {_GIVEN}) -> ({', '.join(['Tensor'] * 7)})",
    _run_backward,
    _fake_backward,
)


class _Smooth(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        y: Tensor, A: Tensor, C: Tensor, R: Tensor, d: Tensor | None, mean: Tensor, cov: Tensor,
        known_mean: Tensor | None, known_cov: Tensor | None, known_lag: Tensor | None, shared: bool,
        backend: str | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if known_mean is not None and known_cov is not None and known_lag is not None:
            return known_mean.clone(), known_cov.clone(), known_lag.clone()
        results: tuple[Tensor, ...] = _forward(y, A, C, R, d, mean, cov, shared, backend)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:7])
        ctx.options = inputs[10:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs: Any = ctx.saved_tensors
        found = _backward(*grads, *inputs, *ctx.options)
        return (*first_only_of(OP, inputs, found, *(v for v in grads if v is not None)), *[None] * 5)
