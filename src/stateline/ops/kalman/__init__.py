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
from stateline.ops.kalman import cpu
from stateline.ops.kalman.reference import DROPPED, RESULTS
from stateline.ops.library import call, define, first_only, first_only_of, or_empty
from stateline.theory.covariance import square_root

OP = "kalman"
DTYPES = (torch.float32, torch.float64)
FORMS = ("joseph", "sqrt")
KEEPS = ("all", "filtered", "loglik")
PRECISION = "Covariances need full precision: float32 or float64."
START = "initial_state"
SYSTEM_NAMES = ("A", "C", "Q", "R", "transition_offset", "observation_offset")
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

    def check(self) -> Filtered:
        """These results, once it is known that every step could be computed; waits for the device.

        Raises ValueError naming the first entry of loglik (by step, then series) that is NaN: on a GPU, `kalman` itself
        does not wait to learn of an innovation covariance that is not positive definite.
        """
        bad = torch.isnan(self.loglik.detach())
        if bool(bad.any()):
            bad = bad.movedim(-1, 0)
            step, *series = bad.nonzero()[0].tolist()
            where = f"loglik{[*series, step]} is NaN: the innovation covariance C P Cᵀ + R is not positive definite"
            raise checks.fail(
                OP, f"{where} there, or an input is not finite.", _remedy("joseph" if self.factor is None else "sqrt")
            )
        return self


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
    wide: bool = False,
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
        wide: results and state in float64, in which form="sqrt" is computed, whatever y is: for what goes on from them.
        backend: "gpu", "cpu" or "reference" forces one, None chooses.

    Returns:
        `Filtered`, and the state at the observation that would come next, of the kind of `form`: give it as
        `initial_state` to go on, with equal results. Series that share all matrices and the covariance they start
        with, and miss the same entries, share covariances: these are computed once, and on the CPU expanded. On a GPU,
        where nobody waits to learn whether they do, each series has a copy, with the bits of its own as long as they
        do; results there lie in memory step by step (strides of (T, N, …)).

    Differentiable in every tensor, NaN entries of y having zero, and out of every result; first derivatives only. No
    jitter is added anywhere: Q, R = 0 or P = 0 are used as they are.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; on the CPU also where a value is
            not finite (in y: infinite), and series and step whose innovation covariance C P Cᵀ + R is not positive
            definite. Elsewhere nothing waits to learn of either: results of that series are NaN from there on, others
            are untouched, `out.check()` raises when you ask.

    >>> one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    >>> start = KalmanState(torch.zeros(1, 1, dtype=torch.float64), one[0])
    >>> out, state = kalman(one[0].expand(1, 3, 1), one, one, 0 * one, one, start)
    >>> [round(m, 2) for m in out.mean[0, :, 0].tolist()], round(state.cov.item(), 2)
    ([0.5, 0.67, 0.75], 0.25)
    """
    sizes = Sizes(OP)
    sizes.match("y", y, "N T m")
    offsets = {"transition_offset": transition_offset, "observation_offset": observation_offset}
    check_system(OP, sizes, y, A, C, Q, R, offsets, form, factors)
    checks.choice(OP, "keep", keep, KEEPS)
    check_state(OP, sizes, y, initial_state, form, "N")
    shared = _shared(y, (A, C, Q, R), initial_state)
    roots = _roots(OP, form, (Q, R), factors, initial_state, shared)
    cov = initial_state.cov[:1] if shared else initial_state.cov
    inputs = (y, A, C, Q, R, transition_offset, observation_offset, initial_state.mean, cov)
    if wide:
        inputs, roots = (tuple(None if v is None else v.double() for v in part) for part in (inputs, roots))  # type: ignore[assignment]  # lengths stay
    wanted = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs)
    needed = keep if not wanted else "predicted" if keep == "loglik" else "all"
    results = call(_Kalman, *inputs, *roots, form, needed, shared, backend)
    return _of_every_series(y.shape[0], results, form, keep)


def _of_every_series(N: int, results: tuple[Any, ...], form: str, keep: str) -> tuple[Filtered, State]:
    """What `kalman` returns, covariances of N rows, from what its Function does."""
    mean, cov, predicted_mean, predicted_cov, loglik, mean_next, cov_next, factor, predicted_factor, root = results
    if form == "sqrt" and cov_next.requires_grad:
        root = call(_Factor, cov_next, root)

    def whole(v: Tensor | None, kept: bool = True) -> Tensor | None:
        """`v` of every series; None if it is not to be kept."""
        return v.expand(N, *v.shape[1:]) if kept and v is not None else None

    filtered, predicted = keep != "loglik", keep == "all"
    out = Filtered(
        whole(mean, filtered), whole(cov, filtered), whole(predicted_mean, predicted), whole(predicted_cov, predicted),
        loglik, whole(factor, filtered), whole(predicted_factor, predicted),
    )  # fmt: skip
    last = whole(cov_next if form == "joseph" else root)
    assert last is not None
    return out, KalmanState(mean_next, last) if form == "joseph" else SquareRootState(mean_next, last)


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_system(
    op: str, sizes: Sizes, y: Tensor, A: Tensor, C: Tensor, Q: Tensor, R: Tensor,
    offsets: dict[str, Tensor | None], form: str, factors: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    """Check matrices and offsets, whose leading dimensions are those of y or 1, and whose dtype and device are its."""
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
        checks.dense(op, name, v)
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
        if v.device != y.device:
            checks.same_device(op, {"y": y, name: v})
    if sizes["n"] < 1 or sizes["m"] < 1:
        raise checks.fail(op, f"there are {sizes['n']} states and {sizes['m']} observed values, expected at least one.")


def check_state(op: str, sizes: Sizes, y: Tensor, state: State, form: str, rows: str) -> None:
    """Raise unless `state` is of the kind of `form`, with `rows` rows (a letter of `sizes`), and fits y in all else."""
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
        if v.device != y.device:
            checks.same_device(op, {"y": y, f"state.{part}": v})


def _shared(y: Tensor, system: Sequence[Tensor], state: State) -> bool:
    """Whether one recursion of covariances serves all series: same matrices, same start, the same entries missing."""
    if y.shape[0] < 2 or any(v.shape[0] != 1 for v in system):
        return False
    cov = state.factor if isinstance(state, SquareRootState) else state.cov
    if not expanded(cov) and (cov.requires_grad or not checks.can_read(cov) or not bool((cov == cov[:1]).all())):
        return False
    return same_gaps(y)


def same_gaps(y: Tensor) -> bool:
    """Whether all series miss the same entries, or none, where values may be looked at."""
    if not checks.can_read(y):
        return False
    if not bool(torch.isnan(y.detach().sum())):  # no entry is missing
        return True
    holes = torch.isnan(y)
    return bool((holes == holes[:1]).all())


def expanded(v: Tensor) -> bool:
    """Whether all rows are one in memory and the gradients of each go into one sum: not so in a leaf of that shape."""
    return v.stride(0) == 0 and not (v.requires_grad and v.is_leaf)


def _roots(
    op: str, form: str, noise: tuple[Tensor, Tensor], factors: tuple[Tensor, Tensor] | None, state: State, shared: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Square roots of Q, R and the state's covariance, cut off from the graph; None in covariance form."""
    if form == "joseph":
        return None, None, None
    Q, R = factors or (square_root(v, op, name) for v, name in zip(noise, "QR", strict=True))
    start = state.factor if isinstance(state, SquareRootState) else square_root(state.cov, op, f"{START}.cov")
    return Q.detach(), R.detach(), start.detach()[: 1 if shared else None]


# ---- raw ops ---------------------------------------------------------------------------------------------------------


def kernel(y: Tensor, backend: str | None, *args: Any) -> ModuleType:
    """The module whose functions compute for y and what else is given."""
    if backend is None and y.is_cpu and backends.native_problem() is None:
        return cpu  # what would be chosen, sooner
    return backends.kernel(OP, y.device.type, backend, y.dtype, (y, *args))


def raise_failed(
    info: Tensor | Sequence[int], form: str, what: str, given: Sequence[Tensor | None], index: Tensor | None = None
) -> None:
    """Raise if `info`, as of `forward`, says so; not read on devices that would have to be waited for.

    given: what the operation `what` was given, y first, of which a value that is not finite is named; of y and offsets
        no row that the step's `index` skips.
    """
    if isinstance(info, Tensor):
        if info.device.type != "cpu":
            return
        info = info.tolist()
    series, step, odd = info
    if step < 0 and odd <= 0:
        return
    steps = what == OP
    given = [taken(v, index) if i in (0, 5, 6) else v for i, v in enumerate(given)]
    names = ("y", *SYSTEM_NAMES, *((f"{START}.mean", f"{START}.cov") if steps else ("state.mean", "state.cov")))
    cause = checks.not_finite(what, dict(zip(names, given, strict=False)), steps=steps)
    if cause is not None:
        raise cause
    if step >= 0:
        where = f"series {series}" + (f" at step {step}" if steps else "")
        problem = f"the innovation covariance C P Cᵀ + R of {where} is not positive definite."
        raise checks.fail(what, problem, _remedy(form))
    if not steps:
        problem = "the next state would not be finite; the state is left as it was."
        raise checks.fail(what, problem, "Numbers outgrow the dtype: scale them, or look at the eigenvalues of A.")


def taken(v: Tensor | None, index: Tensor | None) -> Tensor | None:
    """Rows (b, …) with zeros where `index` (b) skips them: what stands there is to blame for nothing."""
    if v is None or index is None or len(v) != len(index):
        return v
    return v.masked_fill((index < 0)[:, None], 0.0)


def _remedy(form: str) -> str:
    remedy = 'form="sqrt" keeps twice the digits.' if form == "joseph" else "Give the observations noise, R > 0."
    return f"Nothing is added to it to hide that. {remedy}"


def _run(y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *system, form, keep, shared, backend = args
    with exact(y):
        module = kernel(y, backend, *system, form)
        *results, info = module.forward(y, *system, form=form, keep=keep, shared=shared)
    raise_failed(info, form, OP, (y, *system))
    if y.is_cuda:
        results[:5] = [v if v is None else _steps_first(v) for v in results[:5]]
    return tuple(or_empty(v, y) for v in results)


def _steps_first(v: Tensor) -> Tensor:
    """v (·, T, …) as it lies in memory on a GPU, whatever computed it: step by step, one series beside the other."""
    return v.transpose(0, 1).contiguous().transpose(0, 1)


def _run_backward(*args: Any) -> tuple[Tensor, ...]:
    grads, y, rest, (shared, backend) = args[:7], args[7], args[8:-2], args[-2:]
    with exact(y):
        found = kernel(y, backend, *rest).backward(grads, y, *rest, shared=shared)
    return tuple(or_empty(v, y) for v in found)


def exact(y: Tensor) -> Any:
    """Autocast off: products of covariances keep their digits."""
    on = torch.is_autocast_enabled(y.device.type)
    return torch.autocast(y.device.type, enabled=False) if on else contextlib.nullcontext()


def _fake(
    y: Tensor, A: Tensor, C: Tensor, Q: Tensor, R: Tensor, b: Any, d: Any, mean0: Tensor, cov0: Tensor, form: str,
    keep: str, shared: bool, backend: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    (N, T, _), n, s = y.shape, mean0.shape[1], 1 if shared else y.shape[0]
    shapes = ((N, T, n), (s, T, n, n), (N, T, n), (s, T, n, n))
    dropped = DROPPED[keep]
    moments = [y.new_empty((0,) if name in dropped else x) for name, x in zip(RESULTS, shapes, strict=False)]
    moments.append(y.new_empty((N, T)))
    if y.device.type == "cuda":
        moments = [v if v.dim() < 2 else _steps_first(v) for v in moments]
    return (*moments, y.new_empty((N, n)), y.new_empty((s, n, n)))


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    y = args[7]
    return tuple(y.new_empty((0,) if v is None else v.shape) for v in args[7:16])


SYSTEM = "Tensor y, Tensor A, Tensor C, Tensor Q, Tensor R, Tensor? b, Tensor? d"
_SEVEN = ", ".join(["Tensor"] * 7)
_forward = define(
    f"{OP}({SYSTEM}, Tensor mean0, Tensor cov0, str form, str keep, bool shared, str? backend) -> ({_SEVEN})",
    _run,
    _fake,
)
_backward = define(
    f"{OP}_backward({', '.join(f'Tensor? d{i}' for i in range(7))}, {SYSTEM}, Tensor mean0, Tensor cov0, "
    f"Tensor predicted_mean, Tensor predicted_cov, bool shared, str? backend) -> ({_SEVEN}, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)


def _filter(
    inputs: tuple[Tensor, ...], roots: tuple[Tensor | None, ...], form: str, keep: str, shared: bool, backend: Any
) -> tuple[Tensor | None, ...]:
    """The raw op's seven results in covariances, None what was not kept; then the three factors of form="sqrt"."""
    y, A, C, Q, R, b, d, mean0, cov0 = inputs
    if form == "sqrt":
        Q, R, cov0 = roots  # type: ignore[assignment]  # all there in this form
    raw = _forward(y, A, C, Q, R, b, d, mean0, cov0, form, keep, shared, backend)
    results = [None if name in DROPPED[keep] else v for name, v in zip(RESULTS, raw, strict=True)]
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
        if form == "sqrt":  # covariances of such systems need the digits that their factors had
            y, A, C, _, _, *rest, _ = (None if v is None else v.double() for v in inputs)
            wide = tuple(v.double() for v in roots)
            Q, R, cov0 = (F @ F.mT for F in wide)
            moments = y, A, C, Q, R, *rest, cov0
            if predicted_mean is None or inputs[0].dtype is torch.float32:
                predicted_mean, predicted_cov = _filter(moments, wide, form, "all", shared, backend)[2:4]
            args = (*(None if v is None else v.double() for v in grads[:7]), *moments, predicted_mean, predicted_cov)
        else:
            if predicted_mean is None:  # a transform wanted a derivative that forward did not see coming
                predicted_mean, predicted_cov = _filter(inputs, roots, form, "all", shared, backend)[2:4]
            args = (*grads[:7], *inputs, predicted_mean, predicted_cov)
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
