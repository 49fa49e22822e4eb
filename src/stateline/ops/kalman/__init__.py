"""kalman: means and covariances of a linear-Gaussian state given all observations so far, and their likelihood."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from stateline import backends, checks
from stateline.checks import Sizes
from stateline.ops.library import call, define, first_only, first_only_of, or_empty
from stateline.ops.selective_scan import check_slots
from stateline.theory.covariance import ROUNDING, spectrum

OP = "kalman"
STEP = "kalman_step_"
DTYPES = (torch.float32, torch.float64)
FORMS = ("joseph", "sqrt")
KEEPS = ("all", "filtered", "loglik")
PRECISION = "Covariances need full precision: float32 or float64."
LAYOUT = "Dimensions ahead of a matrix are those of y, or 1 for all."


@dataclass
class KalmanState:
    """What is known of the state at the next observation, before it is seen: mean (N, n), cov (N, n, n)."""

    mean: Tensor
    cov: Tensor


@dataclass
class SquareRootState:
    """The same with a factor G (N, n, n) of the covariance, lower triangular with a diagonal ≥ 0: cov = G Gᵀ."""

    mean: Tensor
    factor: Tensor

    @property
    def cov(self) -> Tensor:
        """G Gᵀ, (N, n, n)."""
        return self.factor @ self.factor.mT


torch.export.register_dataclass(KalmanState, serialized_type_name="stateline.ops.KalmanState")
torch.export.register_dataclass(SquareRootState, serialized_type_name="stateline.ops.SquareRootState")
State = KalmanState | SquareRootState


class Filtered(NamedTuple):
    """Moments of the state, N series, T steps, n states; None what was not kept.

    mean (N, T, n), cov (N, T, n, n): given y[0 … t].   predicted_mean, predicted_cov: given y[0 … t−1].
    loglik (N, T): log p(y[t] | y[0 … t−1]), 0 where all entries are missing.
    factor, predicted_factor: lower triangular factors of the covariances in form="sqrt", without gradient.
    """

    mean: Tensor | None
    cov: Tensor | None
    predicted_mean: Tensor | None
    predicted_cov: Tensor | None
    loglik: Tensor
    factor: Tensor | None = None
    predicted_factor: Tensor | None = None


def kalman(
    y: Tensor,
    A: Tensor,
    C: Tensor,
    Q: Tensor,
    R: Tensor,
    initial_state: State,
    *,
    transition_offset: Tensor | None = None,
    observation_offset: Tensor | None = None,
    form: str = "joseph",
    factors: tuple[Tensor, Tensor] | None = None,
    keep: str = "all",
    backend: str | None = None,
) -> tuple[Filtered, State]:
    """Filter `h[t+1] = A h[t] + b + v`, `y[t] = C h[t] + d + n`, v ~ N(0, Q), n ~ N(0, R): moments and the next state.

    Args:
        y: (N, T, m) observations, float32 or float64; NaN: that entry is missing.
        A: (·, ·, n, n), C: (·, ·, m, n), Q: (·, ·, n, n), R: (·, ·, m, m); the first two dimensions are N or 1, and T
            or 1. A[t], Q[t] lead from step t to t + 1. Only the symmetric parts of Q, R and P count.
        initial_state: what is known at the first observation, before it is seen. In form="sqrt" either kind.
        transition_offset: b = B u (·, ·, n).   observation_offset: d = D u (·, ·, m).
        form: "joseph", covariances; "sqrt", triangular factors by QR: twice the digits, about three times the work.
        factors: with form="sqrt", square roots (F Fᵀ) of Q and R if they are at hand, in their layouts. Gradients go to
            Q and R all the same.
        keep: "all", "filtered" (mean, cov, loglik) or "loglik"; the rest is not written.
        backend: "gpu", "cpu" or "reference" forces one, None chooses.

    Returns:
        `Filtered`, and the state at the observation that would come next, of the kind of `form`: give it as
        `initial_state` to go on, with equal results. Series that share all matrices and miss the same entries share
        covariances, which on the CPU are then computed once and expanded.

    Differentiable in every tensor, NaN entries of y having zero, and out of every result; first derivatives only. No
    jitter is added anywhere: Q, R = 0 or P = 0 are used as they are.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; on the CPU also series and step
            whose innovation covariance C P Cᵀ + R is not positive definite. (Elsewhere its results are NaN.)

    >>> one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    >>> start = KalmanState(torch.zeros(1, 1, dtype=torch.float64), one[0])
    >>> out, state = kalman(one[0].expand(1, 3, 1), one, one, 0 * one, one, start)
    >>> [round(m, 2) for m in out.mean[0, :, 0].tolist()], round(state.cov.item(), 2)
    ([0.5, 0.67, 0.75], 0.25)
    """
    sizes = Sizes(OP)
    sizes.match("y", y, "N T m")
    offsets = {"transition_offset": transition_offset, "observation_offset": observation_offset}
    _check_system(OP, sizes, y, A, C, Q, R, offsets, form, factors)
    checks.choice(OP, "keep", keep, KEEPS)
    check_state(OP, sizes, y, initial_state, form, "N")
    given = {"y": y, "A": A, "C": C, "Q": Q, "R": R, "initial_state": initial_state.mean}
    checks.same_device(OP, given | offsets)
    shared = _shared(y, (A, C, Q, R), initial_state)
    roots = _roots(OP, form, (Q, R), factors, initial_state, shared)
    cov = initial_state.cov[:1] if shared else initial_state.cov
    inputs = (y, A, C, Q, R, transition_offset, observation_offset, initial_state.mean, cov)
    wanted = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs)
    results = call(_Kalman, *inputs, *roots, form, "all" if wanted else keep, shared, backend)
    mean, cov, predicted_mean, predicted_cov, loglik, mean_next, cov_next, factor, predicted_factor, root = results
    if form == "sqrt" and cov_next.requires_grad:
        root = call(_Factor, cov_next, root)

    def whole(v: Tensor | None, kept: bool = True) -> Tensor | None:
        """`v` of every series; None if it is not to be kept."""
        return v.expand(y.shape[0], *v.shape[1:]) if kept and v is not None else None

    filtered, predicted = keep != "loglik", keep == "all"
    out = Filtered(
        whole(mean, filtered), whole(cov, filtered), whole(predicted_mean, predicted), whole(predicted_cov, predicted),
        loglik, whole(factor, filtered), whole(predicted_factor, predicted),
    )  # fmt: skip
    last = whole(cov_next if form == "joseph" else root)
    assert last is not None
    return out, KalmanState(mean_next, last) if form == "joseph" else SquareRootState(mean_next, last)


def kalman_step_(
    state: State,
    y: Tensor,
    A: Tensor,
    C: Tensor,
    Q: Tensor,
    R: Tensor,
    *,
    transition_offset: Tensor | None = None,
    observation_offset: Tensor | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
    index: Tensor | None = None,
    backend: str | None = None,
) -> Filtered:
    """Take one observation a series into `state` in place; mean (b, n), cov (b, n, n) given it, and loglik (b).

    Args:
        state: `KalmanState`, or `SquareRootState` for the form by factors, of any number of rows, contiguous.
        y: (b, m), NaN: missing.   A: (·, n, n), C: (·, m, n), Q: (·, n, n), R: (·, m, m), the first dimension b or 1.
        transition_offset: (·, n).   observation_offset: (·, m).
        factors: square roots of Q and R, as in `kalman`; without them they are computed for every call.
        index: (b) distinct rows of the state; a negative one skips: its results are 0 and no row is touched. None: all.

    Predicted moments are in the state: None here. No gradient: for streams.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; as `kalman` for a failed step.
    """
    sizes = Sizes(STEP)
    sizes.match("y", y, "b m")
    form = "sqrt" if isinstance(state, SquareRootState) else "joseph"
    offsets = {"transition_offset": transition_offset, "observation_offset": observation_offset}
    _check_system(STEP, sizes, y, A, C, Q, R, offsets, form, factors)
    check_state(STEP, sizes, y, state, form, "slots")
    checks.same_device(STEP, {"y": y, "A": A, "C": C, "Q": Q, "R": R, "state": state.mean, "index": index} | offsets)
    with torch.no_grad():
        if form == "sqrt" and factors is None:
            factors = square_root(Q, STEP, "Q"), square_root(R, STEP, "R")
        noise = factors or (Q, R)
        return advance(sizes, state, y, (A, C, *noise, transition_offset, observation_offset), index, backend)


def advance(
    sizes: Sizes, state: State, y: Tensor, system: tuple[Tensor | None, ...], index: Tensor | None, backend: str | None
) -> Filtered:
    """`kalman_step_` with a system that is known to fit y and state: A, C, Q, R (or their roots), b, d."""
    root = isinstance(state, SquareRootState)
    second = state.factor if isinstance(state, SquareRootState) else state.cov
    check_slots(STEP, sizes, state.mean, index)
    check_slots(STEP, sizes, second, index)
    mean, cov, loglik = _step(state.mean, second, y, *system, index, "sqrt" if root else "joseph", backend)
    return Filtered(mean, cov @ cov.mT if root else cov, None, None, loglik, cov if root else None)


def square_root(S: Tensor, op: str = "square_root", name: str = "S") -> Tensor:
    """F (…, n, n), lower triangular with a diagonal ≥ 0, such that F Fᵀ = S; S positive semidefinite. No gradient.

    By Cholesky where it succeeds, else by eigenvectors of S scaled to a unit diagonal, so that small variances beside
    large ones keep their digits.

    Raises:
        ValueError: on the CPU, if S has an eigenvalue below 0 by more than rounding explains. `op`, `name`: who asks.
    """
    with torch.no_grad():
        S = (S + S.mT) / 2
        L, problem = torch.linalg.cholesky_ex(S)
        if checks.can_read(S) and not problem.any():
            return L.contiguous()
        scale, values, vectors = spectrum(S)
        if checks.can_read(S):
            tolerance = ROUNDING * S.shape[-1] * torch.finfo(S.dtype).eps
            rest = S * ((scale == 0)[..., :, None] | (scale == 0)[..., None, :])  # 0 unless S is indefinite
            if not bool(torch.isfinite(S).all()) or bool(rest.any()) or float(values.min()) < -tolerance:
                problem_of = f"{name} is not positive semidefinite"
                raise checks.fail(
                    op, f"{problem_of}.", "A covariance has no eigenvalue below 0; look for a wrong sign."
                )
        F = scale[..., :, None] * vectors * values.clamp(min=0).sqrt()[..., None, :]
        G = torch.linalg.qr(F.mT, mode="r").R.mT.tril()
        G = G * torch.where(G.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(G)[..., None, :]
        return torch.where((problem != 0)[..., None, None], G, L).contiguous()


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_system(
    op: str, sizes: Sizes, y: Tensor, A: Tensor, C: Tensor, Q: Tensor, R: Tensor,
    offsets: dict[str, Tensor | None], form: str, factors: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    """Check matrices and offsets, whose leading dimensions are those of y or 1."""
    checks.dtype(op, "y", y, DTYPES, PRECISION)
    checks.choice(op, "form", form, FORMS)
    lead = y.shape[:-1]
    given = [("A", A, "nn"), ("C", C, "mn"), ("Q", Q, "nn"), ("R", R, "mm")]
    given += [(name, v, letter) for (name, v), letter in zip(offsets.items(), "nm", strict=True) if v is not None]
    if factors is not None:
        if form != "sqrt":
            raise checks.fail(op, "factors were given.", 'They belong to form="sqrt".')
        given += [("factors[0]", factors[0], "nn"), ("factors[1]", factors[1], "mm")]
    for name, v, letters in given:
        if not isinstance(v, Tensor):
            raise checks.fail(op, f"{name} is a {type(v).__name__}, expected a tensor", error=TypeError)
        shape, ahead = v.shape, len(lead)
        fits = len(shape) == ahead + len(letters) and all(s in (1, t) for s, t in zip(shape, lead, strict=False))
        for letter, size in zip(letters, shape[ahead:], strict=False):
            expected, _ = sizes.bound.setdefault(letter, (size, name))
            fits = fits and size == expected
        if not fits:
            want = [f"1 or {size}" if size != 1 else "1" for size in lead]
            want += [f"{letter} = {sizes[letter]}" if letter in sizes.bound else letter for letter in letters]
            raise checks.fail(op, f"{name} has shape {tuple(shape)}, expected ({', '.join(want)}).", LAYOUT)
        if v.dtype != y.dtype:
            checks.dtype(op, name, v, (y.dtype,), "Observations and system share one dtype.")
    if sizes["n"] < 1 or sizes["m"] < 1:
        raise checks.fail(op, f"there are {sizes['n']} states and {sizes['m']} observed values, expected at least one.")


def check_state(op: str, sizes: Sizes, y: Tensor, state: State, form: str, rows: str) -> None:
    """Raise unless `state` is of the kind of `form`, with `rows` rows (a letter of `sizes`) and the dtype of y."""
    if not isinstance(state, KalmanState | SquareRootState):
        kinds = "KalmanState(mean, cov) or SquareRootState(mean, factor)"
        raise checks.fail(op, f"the state is a {type(state).__name__}, expected {kinds}", error=TypeError)
    if form == "joseph" and isinstance(state, SquareRootState):
        remedy = 'Use form="sqrt", or KalmanState(state.mean, state.cov).'
        raise checks.fail(
            op, 'the state is a SquareRootState, form="joseph" has a KalmanState.', remedy, error=TypeError
        )
    name, second = ("factor", state.factor) if isinstance(state, SquareRootState) else ("cov", state.cov)
    sizes.match("state.mean", state.mean, f"{rows} n")
    sizes.match(f"state.{name}", second, f"{rows} n n")
    for part, v in (("mean", state.mean), (name, second)):
        checks.dtype(op, f"state.{part}", v, (y.dtype,), "A state has the dtype of the observations.")


def _shared(y: Tensor, system: Sequence[Tensor], state: State) -> bool:
    """Whether one recursion of covariances serves all series: same matrices, same start, the same entries missing."""
    if y.shape[0] < 2 or any(v.shape[0] != 1 for v in system) or not checks.can_read(y):
        return False
    cov = state.factor if isinstance(state, SquareRootState) else state.cov
    if cov.stride(0) != 0 and (cov.requires_grad or not checks.can_read(cov) or not bool((cov == cov[:1]).all())):
        return False
    if not bool(torch.isnan(y.detach().sum())):  # no entry is missing
        return True
    holes = torch.isnan(y)
    return bool((holes == holes[:1]).all())


def _roots(
    op: str, form: str, noise: tuple[Tensor, Tensor], factors: tuple[Tensor, Tensor] | None, state: State, shared: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Square roots of Q, R and the state's covariance, cut off from the graph; None in covariance form."""
    if form == "joseph":
        return None, None, None
    Q, R = factors or (square_root(v, op, name) for v, name in zip(noise, "QR", strict=True))
    start = state.factor if isinstance(state, SquareRootState) else square_root(state.cov, op, "initial_state.cov")
    return Q.detach(), R.detach(), start.detach()[: 1 if shared else None]


# ---- raw ops ---------------------------------------------------------------------------------------------------------


def _kernel(y: Tensor, backend: str | None, *args: Any) -> ModuleType:
    return backends.kernel(OP, y.device.type, backend, y.dtype, (y, *args))


def _raise_failed(info: Tensor, form: str, what: str) -> None:
    """Raise if `info` (series, step) says so; not read on devices that would have to be waited for."""
    if info.device.type != "cpu":
        return
    series, step = info.tolist()
    if step >= 0:
        where = f"series {series}" + (f" at step {step}" if what == OP else "")
        remedy = 'form="sqrt" keeps twice the digits.' if form == "joseph" else "Give the observations noise, R > 0."
        problem = f"the innovation covariance C P Cᵀ + R of {where} is not positive definite."
        raise checks.fail(what, problem, f"Nothing is added to it to hide that. {remedy}")


def _run(y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *system, form, keep, shared, backend = args
    with _exact(y):
        module = _kernel(y, backend, *system, form)
        *results, info = module.forward(y, *system, form=form, keep=keep, shared=shared)
    _raise_failed(info, form, OP)
    return tuple(or_empty(v, y) for v in results)


def _run_backward(*args: Any) -> tuple[Tensor, ...]:
    grads, y, rest, (shared, backend) = args[:7], args[7], args[8:-2], args[-2:]
    with _exact(y):
        found = _kernel(y, backend, *rest).backward(grads, y, *rest, shared=shared)
    return tuple(or_empty(v, y) for v in found)


def _run_step(mean: Tensor, cov: Tensor, *args: Any) -> tuple[Tensor, ...]:
    y, *system, index, form, backend = args
    with _exact(y):
        *results, info = _kernel(y, backend, *system, form).step(y, *system, mean, cov, index, form=form)
    _raise_failed(info, form, STEP)
    return tuple(results)


def _exact(y: Tensor) -> Any:
    """Autocast off: products of covariances keep their digits."""
    on = torch.is_autocast_enabled(y.device.type)
    return torch.autocast(y.device.type, enabled=False) if on else contextlib.nullcontext()


def _fake(
    y: Tensor, A: Tensor, C: Tensor, Q: Tensor, R: Tensor, b: Any, d: Any, mean0: Tensor, cov0: Tensor, form: str,
    keep: str, shared: bool, backend: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    (N, T, _), n, s = y.shape, mean0.shape[1], 1 if shared else y.shape[0]
    shapes = ((N, T, n), (s, T, n, n), (N, T, n), (s, T, n, n))
    kept = {"all": 4, "filtered": 2, "loglik": 0}[keep]
    moments = (y.new_empty(shape if i < kept else (0,)) for i, shape in enumerate(shapes))
    return (*moments, y.new_empty((N, T)), y.new_empty((N, n)), y.new_empty((s, n, n)))


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    y = args[7]
    return tuple(y.new_empty((0,) if v is None else v.shape) for v in args[7:16])


def _fake_step(mean: Tensor, cov: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    b, n = y.shape[0], mean.shape[1]
    return y.new_empty((b, n)), y.new_empty((b, n, n)), y.new_empty((b,))


_SYSTEM = "Tensor y, Tensor A, Tensor C, Tensor Q, Tensor R, Tensor? b, Tensor? d"
_SEVEN = ", ".join(["Tensor"] * 7)
_forward = define(
    f"{OP}({_SYSTEM}, Tensor mean0, Tensor cov0, str form, str keep, bool shared, str? backend) -> ({_SEVEN})",
    _run,
    _fake,
)
_backward = define(
    f"{OP}_backward({', '.join(f'Tensor? d{i}' for i in range(7))}, {_SYSTEM}, Tensor mean0, Tensor cov0, "
    f"Tensor predicted_mean, Tensor predicted_cov, bool shared, str? backend) -> ({_SEVEN}, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_step = define(
    f"{STEP}(Tensor(a!) mean, Tensor(b!) cov, {_SYSTEM}, Tensor? index, str form, str? backend) -> "
    "(Tensor, Tensor, Tensor)",
    _run_step,
    _fake_step,
)


def _filter(
    inputs: tuple[Tensor, ...], roots: tuple[Tensor | None, ...], form: str, keep: str, shared: bool, backend: Any
) -> tuple[Tensor | None, ...]:
    """The raw op's seven results in covariances, None what was not kept; then the three factors of form="sqrt"."""
    y, A, C, Q, R, b, d, mean0, cov0 = inputs
    if form == "sqrt":
        Q, R, cov0 = roots  # type: ignore[assignment]  # all there in this form
    raw = _forward(y, A, C, Q, R, b, d, mean0, cov0, form, keep, shared, backend)
    dropped = {"all": (), "filtered": (2, 3), "loglik": (0, 1, 2, 3)}[keep]
    results = [None if i in dropped else v for i, v in enumerate(raw)]
    if form == "joseph":
        return (*results, None, None, None)
    factors = [results[i] for i in (1, 3, 6)]
    for i, G in zip((1, 3, 6), factors, strict=True):
        results[i] = None if G is None else G @ G.mT
    return (*results, *factors)


class _Kalman(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # setup_context form; spelled out, since compile does not take *args here
        y: Tensor, A: Tensor, C: Tensor, Q: Tensor, R: Tensor, b: Tensor | None, d: Tensor | None, mean0: Tensor,
        cov0: Tensor, root_Q: Tensor | None, root_R: Tensor | None, root0: Tensor | None, form: str, keep: str,
        shared: bool, backend: str | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        inputs = (y, A, C, Q, R, b, d, mean0, cov0)
        return _filter(inputs, (root_Q, root_R, root0), form, keep, shared, backend)  # type: ignore[arg-type]  # b, d

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.mark_non_differentiable(*(v for v in output[7:] if v is not None))
        ctx.set_materialize_grads(False)  # no zeros for what nobody used
        ctx.save_for_backward(*inputs[:12], *output[2:4])
        ctx.options = inputs[12:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, predicted_mean, predicted_cov = ctx.saved_tensors
        inputs, roots = tuple(saved[:9]), tuple(saved[9:])
        form, _, shared, backend = ctx.options
        if predicted_mean is None:  # a transform wanted a derivative that forward did not see coming
            predicted_mean, predicted_cov = _filter(inputs, roots, form, "all", shared, backend)[2:4]
        args = (*grads[:7], *inputs, predicted_mean, predicted_cov)
        if form == "sqrt":  # covariances of such systems need the digits that their factors had
            args = tuple(None if v is None else v.double() for v in args)
        found = _backward(*args, shared, backend)
        found = tuple(v.to(inputs[0].dtype) for v in found)
        return (*first_only_of(OP, inputs, found, *(v for v in grads[:7] if v is not None)), *[None] * 7)


class _Factor(Function):
    """The factor G of P that is already known, with the derivative of the Cholesky factorisation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(P: Tensor, G: Tensor) -> Tensor:
        return G.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dG: Tensor) -> tuple[Tensor, None]:
        (G,) = ctx.saved_tensors
        diagonal = G.diagonal(dim1=-2, dim2=-1)
        if checks.can_read(G):
            floor = torch.finfo(G.dtype).eps * G.shape[-1] * diagonal.amax(-1, keepdim=True)
            if bool((diagonal <= floor).any()):
                problem = "the covariance of the returned state is singular, its factor has no derivative."
                remedy = 'Use form="joseph", or cut the graph with state.detach.'
                raise checks.fail(OP, problem, remedy, error=RuntimeError)
        M = (G.mT @ dG).tril()
        M = M - 0.5 * torch.diag_embed(M.diagonal(dim1=-2, dim2=-1))
        left = torch.linalg.solve_triangular(G.mT, M, upper=True)
        dP = torch.linalg.solve_triangular(G.mT, left.mT, upper=True)  # G⁻ᵀ M G⁻¹, transposed
        return first_only(OP, (dP + dP.mT) / 2, dG), None
