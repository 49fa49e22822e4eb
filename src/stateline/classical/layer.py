"""The Kalman filter as a module: it learns its matrices, carries a state and takes observations as they come."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stateline import checks
from stateline.checks import Sizes
from stateline.classical.kalman import filter_by_factors, kalman_filter
from stateline.classical.model import StateSpace, validate
from stateline.ops.kalman import (
    FORMS,
    Filtered,
    KalmanState,
    SquareRootState,
    State,
    check_state,
    exact,
    square_root,
    taken,
)
from stateline.ops.kalman.step import advance, quick_step
from stateline.ops.library import transformed

OP = "KalmanFilter"
SEVERAL = "extend takes several observations of each series, (b, T, m)."


class KalmanFilter(nn.Module):
    """Filters series (b, T, m) with one constant model, whose parts are its parameters.

    A (n, n), C (m, n), m0 (n), and B (n, p), D (m, p) if the model has them, are parameters as they are. Q, R and P0
    stay covariances while they are learned: the parameters are their Cholesky factors, Q_factor, R_factor, P0_factor.
    What must not be learned is frozen with `requires_grad_(False)`. Parameters and state stay float32 or float64 in
    casts to less, and under autocast.

        out, state = layer.extend(y, state)              # any number of observations; its input state is not changed
        out, state = layer.update(y[:, t], state)        # one

    A series may be cut anywhere: what comes is what the whole series gives. `stateline.state` saves and loads states.

    Args:
        model: constant parts only; all are copied.
        form: "joseph" or "sqrt", as in `kalman_filter`; the state holds a covariance or a factor accordingly.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> layer = KalmanFilter(StateSpace(one, None, one, None, one, one, m0=one[0], P0=one))
    >>> (-layer(torch.randn(8, 100, 1, dtype=torch.float64)).loglik.sum()).backward()
    >>> layer.Q_factor.grad.shape
    torch.Size([1, 1])
    """

    A: nn.Parameter
    B: nn.Parameter | None
    C: nn.Parameter
    D: nn.Parameter | None
    Q_factor: nn.Parameter
    R_factor: nn.Parameter
    m0: nn.Parameter
    P0_factor: nn.Parameter

    def __init__(self, model: StateSpace, *, form: str = "joseph") -> None:
        super().__init__()
        checks.choice(OP, "form", form, FORMS)
        validate(model, OP)
        for name, v in model._asdict().items():
            if v is not None and v.dim() > (1 if name == "m0" else 2):
                remedy = "kalman_filter takes models that vary in time or from series to series."
                raise checks.fail(OP, f"{name} has shape {tuple(v.shape)}, expected one matrix for all.", remedy)
        self.form = form
        self.A, self.C, self.m0 = (nn.Parameter(v.detach().clone()) for v in (model.A, model.C, model.m0))
        for name in ("B", "D"):
            v = getattr(model, name)
            self.register_parameter(name, None if v is None else nn.Parameter(v.detach().clone()))
        for name in ("Q", "R", "P0"):
            root = square_root(getattr(model, name), OP, name)
            self.register_parameter(f"{name}_factor", nn.Parameter(root))

    def model(self) -> StateSpace:
        """The model as it is now, differentiable."""
        with exact(self.A):
            Q, R, P0 = (F.tril() @ F.tril().mT for F in (self.Q_factor, self.R_factor, self.P0_factor))
        return StateSpace(self.A, self.B, self.C, self.D, Q, R, self.m0, P0)

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> State:
        """What is known before the first observation, one row a series."""
        checks.number(OP, "batch", batch, low=0, integer=True)
        with torch.no_grad():
            start, n = self._start(), len(self.m0)
            second = start.factor if isinstance(start, SquareRootState) else start.cov
            parts = (self.m0.detach().expand(batch, n).clone(), second.expand(batch, n, n).contiguous())
        return type(start)(*(v.to(device) if device is not None else v for v in parts))

    def _start(self) -> State:
        """The state before the first observation, differentiable, without rows of series."""
        if self.form == "joseph":
            with exact(self.m0):
                return KalmanState(self.m0, self.P0_factor.tril() @ self.P0_factor.tril().mT)
        F = self.P0_factor.tril()
        return SquareRootState(self.m0, F * torch.where(F.diagonal() < 0, -1.0, 1.0).to(F))

    def forward(self, y: Tensor, u: Tensor | None = None) -> Filtered:
        """Moments of each series y (b, T, m) from its first observation on; u (b, T, p). As of `kalman_filter`."""
        return self.extend(y, self._start(), u)[0]

    def extend(self, y: Tensor, state: State, u: Tensor | None = None) -> tuple[Filtered, State]:
        """Go on from `state` (b rows) with observations y (b, T, m), inputs u (b, T, p); moments and the new state."""
        rows = isinstance(state, KalmanState | SquareRootState) and state.mean.dim() > 1
        if rows and isinstance(y, Tensor) and y.dim() != 3:
            remedy = "update takes one observation of each series, (b, m)."
            raise checks.fail(OP, f"y has shape {tuple(y.shape)}, expected (b, T, m).", remedy)
        if self.form == "joseph":
            return kalman_filter(self.model(), y, u, initial_state=state)
        return filter_by_factors(self.model(), (self.Q_factor.tril(), self.R_factor.tril()), y, u, state)

    def update(self, y: Tensor, state: State, u: Tensor | None = None) -> tuple[Filtered, State]:
        """Go on by one observation y (b, m), input u (b, p): mean (b, n), cov (b, n, n), loglik (b), and the new state.

        As `extend` of one step where a gradient is wanted, functions are transformed, or the state is of the other kind
        than the form's; else, sooner, as `update_` of a copy.
        """
        wanted = torch.is_grad_enabled() and any(v.requires_grad for v in self._inputs(y, u, state))
        if wanted or transformed() or (self.form == "sqrt" and isinstance(state, KalmanState)):
            Sizes(OP).match("y", y, "b m", SEVERAL)
            out, state = self.extend(y[:, None], state, None if u is None else u[:, None])
            return Filtered(*(None if v is None else v[:, 0] for v in out)), state  # type: ignore[arg-type]  # loglik is
        state = _copy(state)
        return self.update_(y, state, u), state

    def update_(self, y: Tensor, state: State, u: Tensor | None = None, *, index: Tensor | None = None) -> Filtered:
        """`update` in place, without gradient, for streams: some microseconds a call on a CPU.

        state: any number of rows. index (b): the row of each y, negative to skip it; None: row i.

        Raises:
            ValueError, TypeError: as `kalman_filter`. Where a value of y, u or the model is not finite, no state moves.
        """
        find = self._parameters.get  # past the module's search for attributes, which takes longer than the step
        A, C, Q, R, B, D = find("A"), find("C"), find("Q_factor"), find("R_factor"), find("B"), find("D")
        if A is not None and C is not None and Q is not None and R is not None:
            plain = u is None and B is None and D is None
            if plain and (self.form == "sqrt" or not isinstance(state, SquareRootState)):
                out = quick_step(state, y, (A, C, Q, R), (None, None), index, triangles=True)
                if out is not None:
                    return out
        with torch.no_grad():
            return self._update(y, state, u, index)

    def _update(self, y: Tensor, state: State, u: Tensor | None, index: Tensor | None) -> Filtered:
        """`update_` on any device, with every check."""
        sizes, B, D = Sizes(OP), self.B, self.D
        sizes.bind("n", self.m0.shape[0], "the model")
        sizes.bind("m", self.C.shape[0], "the model")
        sizes.match("y", y, "b m", SEVERAL)
        checks.dtype(OP, "y", y, (self.m0.dtype,), "Observations and model share one dtype.")
        check_state(OP, sizes, y, state, self.form, "slots")
        if index is not None:
            sizes.match("index", index, "b")
        checks.same_device(OP, {"y": y, "the model": self.m0, "u": u, "index": index})
        if u is not None or B is not None or D is not None:
            p = next((int(M.shape[1]) for M in (B, D) if M is not None), 0)
            sizes.bind("p", p, "the model")
            sizes.match("u", u, "b p", "Zeros are given as zeros.")  # type: ignore[arg-type]  # None is refused there
            checks.dtype(OP, "u", u, (y.dtype,), "Inputs and model share one dtype.")  # type: ignore[arg-type]  # and here
        with exact(y):
            b, d = (None if u is None or M is None else u @ M.mT for M in (B, D))
        try:
            return self._step(sizes, state, y, (b, d), index)
        except ValueError as error:  # of an input it knows only what was made of it
            raise checks.not_finite(OP, {"u": taken(u, index)}, steps=False) or error from None

    def _step(
        self, sizes: Sizes, state: State, y: Tensor, offsets: tuple[Tensor | None, Tensor | None], index: Tensor | None
    ) -> Filtered:
        """`_update` with inputs as B u and D u."""
        system = (self.A, self.C, self.Q_factor, self.R_factor)
        if (out := quick_step(state, y, system, offsets, index, triangles=True)) is not None:
            return out
        for name, form in {"A": "n n", "C": "m n", "Q_factor": "n n", "R_factor": "m m"}.items():
            v = getattr(self, name)
            sizes.match(name, v, form)
            checks.dtype(OP, name, v, (y.dtype,), "The parts of a model share one dtype.")
            checks.same_device(OP, {"y": y, name: v})
        model = self.model()
        roots = isinstance(state, SquareRootState)
        noise = (self.Q_factor.tril(), self.R_factor.tril()) if roots else (model.Q, model.R)
        rows = (v[None] for v in (model.A, model.C, *noise))
        return advance(sizes, state, y, (*rows, *offsets), index, None)

    def extra_repr(self) -> str:
        m, n = self.C.shape
        return f"n={n}, m={m}, p={0 if self.B is None else self.B.shape[1]}, form={self.form!r}"

    def _inputs(self, y: Tensor, u: Tensor | None, state: State) -> list[Tensor]:
        second = state.factor if isinstance(state, SquareRootState) else state.cov
        return [*self.parameters(), y, state.mean, second, *([] if u is None else [u])]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KalmanFilter:
        """What `.to`, `.half()` and the like do, except that nothing falls below float32."""

        def careful(v: Tensor) -> Tensor:
            moved = fn(v)
            if moved.is_floating_point() and moved.dtype.itemsize < 4:
                return v.to(device=moved.device, dtype=torch.float32)
            return moved

        return super()._apply(careful, recurse)


def _copy(given: State) -> State:
    """A copy in memory of its own, each row apart."""
    if not isinstance(given, KalmanState | SquareRootState):
        return given  # the step says what is wrong
    second = given.factor if isinstance(given, SquareRootState) else given.cov
    whole = torch.contiguous_format
    return type(given)(given.mean.clone(memory_format=whole), second.clone(memory_format=whole))
