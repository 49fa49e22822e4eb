"""A linear-Gaussian state space model: what it is made of, that its parts fit, and series drawn from it.

    h[t+1] = A h[t] + B u[t] + v[t],   v ~ N(0, Q)
    y[t]   = C h[t] + D u[t] + n[t],   n ~ N(0, R),    h[0] ~ N(m0, P0)

`m0, P0` is what is known of the state at the first observation, before that is seen. Entry t of
a matrix that varies belongs to time t, as u[t] does: of A, B and Q to the step from t to t+1.
Suffixes: n state, m observation, p input.

Deep state space layers write h[t] = A h[t-1] + B u[t], y[t] = C h[t] + D u[t], one step ahead of the above:
`to_scan` and `from_scan` convert, exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stateline import checks
from stateline.checks import Sizes
from stateline.ops.kalman.reference import times
from stateline.theory.covariance import spectral_root

DTYPES = (torch.float32, torch.float64)
#: The last two sizes of each part, and how many dimensions they are.
FORM = {"A": "n n", "B": "n p", "C": "m n", "D": "m p", "Q": "n n", "R": "m m", "m0": "n", "P0": "n n"}
#: What differs by more than this share of the largest entry is not symmetric; so much of it may be below zero.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}


class StateSpace(NamedTuple):
    """The matrices of a model, data only: a pytree of float64 or float32 tensors of one dtype on one device.

    A (n, n), B (n, p), C (m, n), D (m, p), Q (n, n), R (m, m), m0 (n), P0 (n, n). B and D may be None; without both
    there are no inputs. Dimensions before a matrix's last two broadcast against the (…, T) of series y (…, T, m):
    (n, n) is constant, (T, n, n) varies, (N, 1, n, n) is one a series; m0 and P0 broadcast against the (…) alone.
    """

    A: Tensor
    B: Tensor | None
    C: Tensor
    D: Tensor | None
    Q: Tensor
    R: Tensor
    m0: Tensor
    P0: Tensor

    def to(self, where: torch.dtype | torch.device | str) -> StateSpace:
        """The model in another dtype or on another device."""
        return self._replace(**{name: x.to(where) for name, x in self._asdict().items() if x is not None})


class Frame(NamedTuple):
    """The sizes of a model beside its series: n states, m observations, p inputs, series (…), steps T or None."""

    n: int
    m: int
    p: int
    batch: tuple[int, ...]
    steps: int | None


def check(
    op: str, model: StateSpace, y: Tensor | None = None, u: Tensor | None = None, steps: int | None = None
) -> Frame:
    """The sizes of a model and of series y (…, T, m) and inputs u (…, T, p), after checking that all fit together.

    Shapes, dtypes and devices are looked at, not values; `validate` reads those. `steps` is T where there is no y.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    sizes = Sizes(op)
    if not isinstance(model, StateSpace):
        remedy = "A NonlinearModel goes to extended_kalman_filter; a KalmanFilter tells its own by .model()."
        if op == "forecast":
            remedy = (
                "A NonlinearModel is forecast by extended_kalman_filter with initial_state=state and a y (steps, m) of"
                " NaN; a KalmanFilter tells its own by .model()."
            )
        raise checks.fail(op, f"the model is a {type(model).__name__}, expected a StateSpace.", remedy, error=TypeError)
    given = {name: x for name, x in model._asdict().items() if x is not None}
    for name, x in given.items():
        match(sizes, name, x, FORM[name])
    if "p" not in sizes.bound:
        sizes.bind("p", 0, "a model with neither B nor D")
    series = {name: x for name, x in {"y": y, "u": u}.items() if x is not None}
    for name, x in series.items():
        match(sizes, name, x, {"y": "T m", "u": "T p"}[name])
    if sizes["p"] and u is None and (y is not None or steps is not None):
        expected = f"(…, T, p) with p = {sizes['p']} (set by {sizes.bound['p'][1]})"
        raise checks.fail(op, f"u is None, expected {expected}.", "Zeros are given as zeros.")
    for name, x in (given | series).items():
        remedy = f"One dtype for all, that of A: {name}.to(model.A.dtype), or model.to(dtype)."
        checks.dtype(op, name, x, (model.A.dtype,), remedy)
    checks.same_device(op, given | series)
    batch, length = _lead(op, given | series, steps)
    return Frame(sizes["n"], sizes["m"], sizes["p"], batch, length)


def no_tensor(op: str, name: str, x: object, expected: str, side: int | str | None = None) -> Exception:
    """What to raise for an argument that is no tensor. `side`: of the square matrix that it should be, if it is one."""
    remedy = ""
    if isinstance(x, np.ndarray | list | tuple):
        remedy = f"torch.as_tensor({name}, dtype=torch.float64) makes one."
    elif isinstance(x, int | float) and side is not None:
        remedy = f"{x} * torch.eye({side}, dtype=torch.float64) makes one."
    elif isinstance(x, int | float):
        remedy = f"torch.tensor([{x}], dtype=torch.float64) makes one of one value."
    problem = f"{name} is a {type(x).__name__}, expected a tensor {expected}."
    return checks.fail(op, problem, remedy, error=TypeError)


def match(sizes: Sizes, name: str, x: Tensor, form: str) -> None:
    """Check the last sizes of x against a form such as "n p", binding its letters; anything may stand in front."""
    letters = form.split()
    if not isinstance(x, Tensor):
        square = len(letters) == 2 and letters[0] == letters[1]
        side = sizes.bound.get(letters[0], letters)[0] if square else None
        raise no_tensor(sizes.op, name, x, f"(…, {', '.join(letters)})", side)
    checks.dense(sizes.op, name, x)
    if name == "A":
        checks.dtype(sizes.op, name, x, DTYPES, "Convert with .to(torch.float64).")
    if x.dim() < len(letters):
        remedy = f"One value a step is {name}[:, None]." if letters[0] == "T" and x.dim() == 1 else ""
        raise checks.fail(sizes.op, f"{name} has shape {tuple(x.shape)}, expected (…, {', '.join(letters)}).", remedy)
    tail = tuple(x.shape[x.dim() - len(letters) :])
    for letter, size in zip(letters, tail, strict=True):
        if letter in sizes.bound and sizes[letter] != size:
            expected, source = sizes.bound[letter]
            wanted = f"(…, {', '.join(letters)}) with {letter} = {expected} (set by {source})"
            raise checks.fail(sizes.op, f"{name} has shape {tuple(x.shape)}, expected {wanted}.")
        sizes.bound.setdefault(letter, (size, name))


def _lead(op: str, given: dict[str, Tensor], steps: int | None) -> tuple[tuple[int, ...], int | None]:
    """The series (…) and the steps T that all dimensions in front broadcast to."""
    batch: tuple[int, ...] = ()
    length, source = (steps, "steps") if steps is not None else (None, "")
    if steps is None:
        for name in ("y", "u"):
            if name in given:
                length, source = given[name].shape[-2], name
                break
    for name, x in given.items():
        lead = tuple(x.shape[: x.dim() - (1 if name == "m0" else 2)])
        if name in ("y", "u"):
            own, lead = int(x.shape[-2]), tuple(x.shape[:-2])
        elif name in ("m0", "P0"):
            own = 1
        else:
            own, lead = (int(lead[-1]), lead[:-1]) if lead else (1, ())
        exact = name in ("y", "u")
        if length is not None and own != length and (exact or own != 1):
            problem = f"{name} has shape {tuple(x.shape)}, expected {length} steps of time (set by {source})"
            own_one = ", ".join(("N", "1", *map(str, x.shape[-2:])))
            remedy = "" if exact else f"One matrix a series is ({own_one})."
            raise checks.fail(op, f"{problem}.", remedy)
        if own != 1:
            length, source = own, source or name
        try:
            batch = tuple(torch.broadcast_shapes(batch, lead))
        except RuntimeError:
            problem = f"{name} has shape {tuple(x.shape)}, whose series {lead} do not broadcast with {batch}"
            raise checks.fail(op, f"{problem} (set by the arguments before).") from None
    return batch, length


def validate(model: StateSpace, op: str = "validate") -> Frame:
    """`check`, and what takes reading the values: finite, and Q, R and P0 symmetric and positive semidefinite.

    Raises:
        ValueError: naming the part and the worst entry.
    """
    frame = check(op, model)
    for name, x in model._asdict().items():
        if x is None:
            continue
        if not torch.isfinite(x).all():
            raise checks.fail(op, f"{name} has values that are not finite.", "Only observations may be missing (NaN).")
        if name in ("Q", "R", "P0"):
            covariance(op, name, x)
    return frame


def covariance(op: str, name: str, x: Tensor, kind: str = "covariance") -> None:
    """Raise ValueError unless x (…, n, n) is symmetric and positive semidefinite, up to rounding."""
    scale = x.abs().amax((-1, -2), keepdim=True) if x.shape[-1] else x.new_zeros(())
    if ((x - x.mT).abs() > ROUNDING[x.dtype] * scale).any():
        worst = float((x - x.mT).abs().max())
        raise checks.fail(op, f"{name} is not symmetric, by up to {worst:.3g}.", f"Give ({name} + {name}.mT) / 2.")
    values = torch.linalg.eigvalsh(x)
    if (values < -ROUNDING[x.dtype] * scale[..., 0]).any():
        least = float(values.min())
        raise checks.fail(op, f"{name} has the eigenvalue {least:.3g}, expected none below 0: it is a {kind}.")


def no_negative_variance(op: str, **covariances: Tensor) -> None:
    """Raise ValueError if a variance, on the diagonal of a covariance (…, n, n), is below 0; reads values on CPUs only.

    A filter whose innovations happen to stay positive would go on, with numbers that mean nothing.
    """
    for name, x in covariances.items():
        if checks.can_read(x) and x.numel():
            least, most = (float(v) for v in torch.aminmax(x.detach().diagonal(dim1=-2, dim2=-1)))
            if least < -ROUNDING[x.dtype] * max(most, -least):
                raise checks.fail(
                    op, f"{name} has the variance {least:.3g}, expected none below 0: it is a covariance."
                )


def simulate(
    model: StateSpace,
    steps: int,
    u: Tensor | None = None,
    *,
    noise: bool = True,
    batch: int | tuple[int, ...] = (),
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """States h (…, T, n) and observations y (…, T, m) that the model makes in T `steps`.

    Args:
        u: (…, T, p) inputs, for a model that has any.
        noise: False leaves out v, n and the uncertainty of h[0]: what comes is the mean of all series.
        batch: how many series to draw; with what the model and u bring, it broadcasts to (…).
        generator: where the noise comes from; one seed on one machine gives the same series again.

    Differentiable in A, B, C, D, m0 and u; a draw has no gradient with respect to Q, R and P0.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    >>> one = torch.ones(1, 1)
    >>> model = StateSpace(A=0.5 * one, B=None, C=one, D=None, Q=one, R=one, m0=torch.tensor([8.0]), P0=one)
    >>> h, y = simulate(model, 4, noise=False)
    >>> y[:, 0].tolist()
    [8.0, 4.0, 2.0, 1.0]
    >>> simulate(model, 4, batch=1000)[1].shape
    torch.Size([1000, 4, 1])
    """
    op = "simulate"
    checks.number(op, "steps", steps, low=0, integer=True)
    frame = check(op, model, u=u, steps=steps)
    wanted = batch if isinstance(batch, tuple) else (batch,)
    for size in wanted:
        checks.number(op, "batch", size, low=0, integer=True)
    try:
        shape = tuple(torch.broadcast_shapes(tuple(map(int, wanted)), frame.batch))
    except RuntimeError:
        have = f"the {frame.batch} of the model and the inputs"
        raise checks.fail(op, f"batch is {batch!r}, which does not broadcast with {have}.") from None
    h = model.m0.expand(*shape, frame.n)
    drive, seen = h.new_zeros(*shape, steps, frame.n), h.new_zeros(*shape, steps, frame.m)
    if noise:
        h = h + _draw(op, "P0", model.P0, (*shape, frame.n), generator)
        drive = drive + _draw(op, "Q", model.Q, drive.shape, generator)
        seen = seen + _draw(op, "R", model.R, seen.shape, generator)
    if u is not None and model.B is not None:
        drive = drive + times(model.B, u)
    if u is not None and model.D is not None:
        seen = seen + times(model.D, u)
    A = model.A.expand(*model.A.shape[:-3], steps, frame.n, frame.n) if model.A.dim() > 2 else model.A
    states = []
    for t in range(steps):
        states.append(h)
        h = times(A[..., t, :, :] if A.dim() > 2 else A, h) + drive[..., t, :]
    made = torch.stack(states, -2) if steps else drive
    return made, seen + times(model.C, made)


def _draw(op: str, name: str, cov: Tensor, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Samples of N(0, cov); a semidefinite covariance has no Cholesky factor, but always a spectral one."""
    with torch.no_grad():
        covariance(op, name, cov)
        white = torch.randn(shape, dtype=cov.dtype, device=cov.device, generator=generator)
        return times(spectral_root(cov), white)


def from_scan(A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B, C, D of this module's indexing, from those of h[t] = A h[t-1] + B u[t], y[t] = C h[t] + D u[t].

    The state at time t becomes what the recurrence knew before u[t]: C' = C A, D' = D + C B. Matrices (…, n, n),
    (…, n, p), (…, m, n) and (…, m, p), constant or varying, real or complex; D may be None. Exact for every system.

    >>> A, B, C, D = from_scan(torch.tensor([[0.5]]), torch.tensor([[1.0]]), torch.tensor([[2.0]]))
    >>> C.item(), D.item()
    (1.0, 2.0)
    """
    _check_four("from_scan", A, B, C, D)
    feed = C @ B
    return A, B, C @ A, feed if D is None else D + feed


def to_scan(A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inverse of `from_scan`: C' = C A⁻¹, D' = D - C A⁻¹ B.

    Raises:
        ValueError: if A is singular to working precision: what A forgets at once cannot be seen a step later. Feed the
            recurrence u[t-1] instead: its h[t] is then the state of here, with the same C, and D u[t] is added.
    """
    _check_four("to_scan", A, B, C, D)
    sizes = torch.linalg.svdvals(A)
    if (sizes[..., -1] <= 1e3 * torch.finfo(A.dtype).eps * sizes[..., 0]).any():
        remedy = "Feed the recurrence u[t-1] in place of u[t] and keep C: its h[t] is then this model's."
        raise checks.fail("to_scan", "A is singular to working precision, expected one with an inverse.", remedy)
    moved = torch.linalg.solve(A, C, left=False)
    feed = moved @ B
    return A, B, moved, -feed if D is None else D - feed


def _check_four(op: str, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> None:
    sizes = Sizes(op)
    for name, x in {"A": A, "B": B, "C": C, "D": D}.items():
        if x is not None:
            match(sizes, name, x, FORM[name])
