"""What a linear system does by itself, what inputs can make of it, and the feedback that costs least.

h[t+1] = A h[t] + B u[t], y[t] = C h[t], or h' = A h + B u where a function says `continuous`. Suffixes: n state,
p input, m observation. Gains come as u = −K h; `stateline.theory.feedback` closes loops u = K h + r and is given −K.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stateline import checks
from stateline.checks import Sizes
from stateline.classical.model import DTYPES, StateSpace, check, covariance, match, no_tensor
from stateline.classical.riccati import riccati, wide
from stateline.classical.sampled import discretize
from stateline.theory.covariance import lyapunov, spectral_root
from stateline.theory.feedback import Loop, feedback

#: Directions reached, or seen, with less than this share of the matrices' norm do not count: rounding of the matrices
#: as they were given, and of a few products of them.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


# ---- analysis --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """A system's motions; print it.

    motion: its eigenvalues, radius, margin, time constant and whether it is stable (`stateline.theory.Loop`).
    uncontrollable: the eigenvalues of what no input moves; None if there was no B.
    unobservable: those of what never shows in y; None if there was no C.
    """

    motion: Loop
    uncontrollable: Tensor | None
    unobservable: Tensor | None

    @property
    def stable(self) -> bool:
        """Whether all motions die out."""
        return self.motion.stable

    @property
    def controllable(self) -> bool:
        """Whether inputs can bring the state anywhere."""
        return self.uncontrollable is not None and not len(self.uncontrollable)

    @property
    def observable(self) -> bool:
        """Whether y and u determine the state."""
        return self.unobservable is not None and not len(self.unobservable)

    @property
    def stabilisable(self) -> bool:
        """Whether all that no input moves dies out by itself: then `lqr` has an answer."""
        return self.stable or self._dies_out(self.uncontrollable)

    @property
    def detectable(self) -> bool:
        """Whether all that never shows dies out by itself: then `steady_state` can follow the rest."""
        return self.stable or self._dies_out(self.unobservable)

    def _dies_out(self, values: Tensor | None) -> bool:
        if values is None:
            return False
        return bool((values.real < 0 if self.motion.continuous else values.abs() < 1).all())

    def __str__(self) -> str:
        motion, n = self.motion, len(self.motion.eigenvalues)
        kind, name = ("continuous", "spectral abscissa") if motion.continuous else ("discrete", "spectral radius")
        value = motion.abscissa if motion.continuous else motion.radius
        verdict = "stable" if self.stable else "not stable"
        lines = [f"{kind} system, {n} state{'s' if n != 1 else ''}: {verdict}, {name} {value:.6g}"]
        if self.stable:
            unit = "units of time" if motion.continuous else "steps"
            lines.append(f"  a free state falls to 1/e in {motion.time_constant:.4g} {unit}")
        for word, rest, weak, mild in (
            ("controllable", self.uncontrollable, "stabilisable", self.stabilisable),
            ("observable", self.unobservable, "detectable", self.detectable),
        ):
            if rest is None:
                continue
            line = f"  {word}" if not len(rest) else f"  {word}: {n - len(rest)} of {n} states"
            if len(rest):
                line += f"; {weak if mild else 'not ' + weak}, eigenvalues of the rest {_listed(rest)}"
            lines.append(line)
        return "\n".join([*lines, f"  eigenvalues {_listed(motion.eigenvalues)}"])


def analyse(A: Tensor, B: Tensor | None = None, C: Tensor | None = None, *, continuous: bool = False) -> Report:
    """Whether a system is stable, and what its inputs reach and its observations show.

    Args:
        A: (n, n).   B: (n, p), or None.   C: (m, n), or None.

    What is reached is built up by orthogonal steps B, A B, A² B, … each ranked by its singular values; the powers
    themselves, of `controllability`, soon point all one way.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    >>> A = torch.tensor([[1.0, 0.1], [0.0, 1.0]])  # position and speed of a cart
    >>> print(analyse(A, B=torch.tensor([[0.0], [0.1]]), C=torch.tensor([[0.0, 1.0]])))
    discrete system, 2 states: not stable, spectral radius 1
      controllable
      observable: 1 of 2 states; not detectable, eigenvalues of the rest 1
      eigenvalues 1, 1
    """
    _check("analyse", A, B, C)
    tolerance = max(TOLERANCE[x.dtype] for x in (A, B, C) if x is not None)
    A = wide(A)
    n = len(A)
    motion = feedback(A, A.new_zeros(n, 1), A.new_zeros(1, n), continuous=continuous)
    return Report(
        motion,
        None if B is None else _left_out(A, wide(B), tolerance),
        None if C is None else _left_out(A.mT, wide(C).mT, tolerance),
    )


def _left_out(A: Tensor, B: Tensor, tolerance: float) -> Tensor:
    """Eigenvalues of A beside the subspace that B, A B, A² B, … span."""
    basis, block, scale = B[:, :0], B, float(torch.linalg.matrix_norm(B, 2)) if B.numel() else 0.0
    while block.shape[1] and basis.shape[1] < len(A):
        for _ in range(2):  # once more for what rounding left
            block = block - basis @ (basis.mT @ block)
        U, sizes, _ = torch.linalg.svd(block, full_matrices=False)
        new = U[:, sizes > tolerance * scale]
        basis, block, scale = torch.cat([basis, new], 1), A @ new, float(torch.linalg.matrix_norm(A, 2))
    rest = torch.linalg.qr(basis, mode="complete").Q[:, basis.shape[1] :]
    return torch.linalg.eigvals(rest.mT @ A @ rest)


def controllability(A: Tensor, B: Tensor) -> Tensor:
    """[B, A B, …, Aⁿ⁻¹ B] (n, n·p). For the question whether its rank is n, `analyse` is the precise way."""
    _check("controllability", A, B, None)
    blocks = [B]
    for _ in range(len(A) - 1):
        blocks.append(A @ blocks[-1])
    return torch.cat(blocks, 1)


def observability(A: Tensor, C: Tensor) -> Tensor:
    """[C; C A; …; C Aⁿ⁻¹] (n·m, n). For the question whether its rank is n, `analyse` is the precise way."""
    _check("observability", A, None, C)
    return controllability(A.mT, C.mT).mT


class Gramians(NamedTuple):
    """controllability, observability (n, n), and hankel (n): how much each direction of a balanced state matters."""

    controllability: Tensor
    observability: Tensor
    hankel: Tensor


def gramians(A: Tensor, B: Tensor, C: Tensor, *, continuous: bool = False) -> Gramians:
    """Σ Aᵏ B Bᵀ Aᵏᵀ and Σ Aᵏᵀ Cᵀ C Aᵏ (integrals if `continuous`), and the Hankel singular values, largest first.

    hᵀ W⁻¹ h of the first is the least energy of inputs that bring the state to h; hᵀ W h of the second is the energy
    of the y that follow from h. In float64; without gradients.

    Raises:
        ValueError: if the system is not stable; both sums are then infinite.
    """
    op = "gramians"
    _check(op, A, B, C)
    if not analyse(A, continuous=continuous).stable:
        raise checks.fail(op, "A is not stable, and its Gramians are infinite.", "Close a loop first, or take `lqr`.")
    A64, B64, C64 = wide(A), wide(B), wide(C)
    reach = lyapunov(A64, B64 @ B64.mT, continuous=continuous)
    shown = lyapunov(A64.mT, C64.mT @ C64, continuous=continuous)
    hankel = torch.linalg.svdvals(spectral_root(shown).mT @ spectral_root(reach))
    return Gramians(*(x.to(A.device, A.dtype) for x in (reach, shown, hankel)))


# ---- feedback --------------------------------------------------------------------------------------------------------


class Lqr(NamedTuple):
    """Gain K: u = −K h, (p, n) or (…, T, p, n); and P: hᵀ P h is the cost from there on, (n, n) or (…, T+1, n, n)."""

    K: Tensor
    P: Tensor


def lqr(
    A: Tensor,
    B: Tensor,
    Q: Tensor,
    R: Tensor,
    *,
    horizon: int | None = None,
    final: Tensor | None = None,
    continuous: bool = False,
) -> Lqr:
    """The feedback u = −K h of least cost Σ hᵀ Q h + uᵀ R u, over all of time or over `horizon` steps.

    Args:
        A: (n, n).   B: (n, p).   Q: (n, n), what a state costs.   R: (p, p), what an input costs.
        horizon: T steps, after which the state costs hᵀ `final` h (n, n); Q if None. Matrices may then have (…, T) in
            front of their last two dimensions and vary, and the result is differentiable in them.
        continuous: integrals in place of sums, for h' = A h + B u; over all of time only.

    Without a horizon SciPy solves the Riccati equation in float64, without gradients, and the loop is stable.

    Raises:
        ValueError: if no feedback makes the cost finite, saying which motion is in the way; or naming an argument.

    >>> A, B = torch.tensor([[1.0, 0.1], [0.0, 1.0]]), torch.tensor([[0.005], [0.1]])
    >>> K, P = lqr(A, B, Q=torch.eye(2), R=torch.eye(1))
    >>> K
    tensor([[0.9171, 1.6356]])
    """
    op = "lqr"
    sizes = Sizes(op)
    given = {"A": A, "B": B, "Q": Q, "R": R} | ({} if final is None else {"final": final})
    for name, x in given.items():
        match(sizes, name, x, {"B": "n p", "R": "p p"}.get(name, "n n"))
        checks.dtype(op, name, x, DTYPES if name == "A" else (A.dtype,), "One dtype for all, as A.")
    checks.same_device(op, given)
    for name in ("Q", "R", "final"):
        if name in given and checks.can_read(given[name].detach()):
            covariance(op, name, given[name].detach(), "weight")
    if horizon is not None:
        if continuous:
            raise checks.fail(op, f"horizon is {horizon} and continuous is True.", "Take `discretize` first.")
        checks.number(op, "horizon", horizon, low=0, integer=True)
        if final is None:
            final = Q if Q.dim() == 2 else Q[..., -1, :, :]
        return _backwards(op, (A, B, Q, R), horizon, final)
    if final is not None:
        raise checks.fail(op, "final is given and horizon is None.", "All of time has no end.")
    _check(op, A, B, None)
    if Q.dim() > 2 or R.dim() > 2:
        raise checks.fail(op, "Q or R varies, expected (n, n) and (p, p).", "Give a horizon.")
    P = riccati(op, A, B, Q, R, _in_the_way(A, B, Q, continuous), continuous=continuous)
    A64, B64, R64 = wide(A), wide(B), wide(R)
    if continuous:
        K = torch.linalg.solve(R64, B64.mT @ P)
    else:
        K = torch.linalg.solve(R64 + B64.mT @ P @ B64, B64.mT @ P @ A64)
    return Lqr(*(x.to(A.device, A.dtype) for x in (K, P)))


def _in_the_way(A: Tensor, B: Tensor, Q: Tensor, continuous: bool) -> str:
    report = analyse(A, B, wide(Q).to(A.dtype), continuous=continuous)
    if not report.stabilisable:
        assert report.uncontrollable is not None
        stuck = f"No input moves the motions of eigenvalues {_listed(report.uncontrollable)}, which do not die out."
        wanders = not continuous and bool((report.uncontrollable.abs() < 1 + 1e-6).all())
        remedy = " Let a disturbance that wanders fade, if slowly: 0.999 for 1, as arma(ar=[0.999]) does."
        return stuck + remedy if wanders else stuck
    return "Every motion on the edge of stability must cost something: Q does not see one, or R is 0."


def _backwards(op: str, parts: tuple[Tensor, Tensor, Tensor, Tensor], horizon: int, final: Tensor) -> Lqr:
    for name, x in zip("ABQR", parts, strict=True):
        if x.dim() > 2 and x.shape[-3] not in (1, horizon):
            raise checks.fail(op, f"{name} has shape {tuple(x.shape)}, expected {horizon} steps (set by horizon).")
    lead = torch.broadcast_shapes(*(x.shape[:-3] for x in parts), final.shape[:-2])
    P = final.expand(*lead, *final.shape[-2:])
    gains, costs = [], [P]
    for t in reversed(range(horizon)):
        A, B, Q, R = (x if x.dim() == 2 else x[..., min(t, x.shape[-3] - 1), :, :] for x in parts)
        ahead = P @ B
        factor, failed = torch.linalg.cholesky_ex(R + B.mT @ ahead)
        if checks.can_read(failed) and failed.any():
            raise checks.fail(op, f"R + Bᵀ P B is singular at step {t}: an input costs nothing.", "Give R a diagonal.")
        K = torch.cholesky_solve(ahead.mT @ A, factor)
        closed = A - B @ K
        P = Q + K.mT @ R @ K + closed.mT @ P @ closed  # a sum of squares, whatever K's rounding
        P = 0.5 * (P + P.mT)
        gains.append(K)
        costs.append(P)
    n, p = parts[1].shape[-2:]
    made = torch.stack(gains[::-1], -3) if horizon else final.new_zeros(*lead, 0, p, n)
    return Lqr(made, torch.stack(costs[::-1], -3))


# ---- python-control --------------------------------------------------------------------------------------------------


def to_control(model: StateSpace, dt: float | bool = True) -> Any:
    """A `control.StateSpace` of A, B, C and D, for its plots, margins, transfer functions and reductions.

    Args:
        dt: seconds a step, or True for steps without a unit.

    Noise and start are left behind. Raises ImportError naming the extra, ValueError if a matrix varies.
    """
    op = "to_control"
    n, m, p, _, _ = check(op, model)
    for name, x in model._asdict().items():
        if name in "ABCD" and x is not None and x.dim() > 2:
            raise checks.fail(op, f"{name} has shape {tuple(x.shape)}, expected one constant matrix.")
    B, D = (
        torch.zeros(rows, p, dtype=torch.float64) if x is None else wide(x) for x, rows in ((model.B, n), (model.D, m))
    )
    package = _control(op)
    return package.ss(*(x.numpy() for x in (wide(model.A), B, wide(model.C), D)), dt)


def from_control(
    system: Any,
    Q: Tensor | None = None,
    R: Tensor | None = None,
    *,
    dt: float | None = None,
    m0: Tensor | None = None,
    P0: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> StateSpace:
    """The model of a `control` system (state space or transfer function), in steps.

    Args:
        Q, R: noise of a step and of an observation (n, n), (m, m); zero if None.
        dt: seconds a step, for a continuous system, which is sampled with its inputs held.
        m0, P0: the start (n), (n, n); zero if None.

    Raises:
        ValueError: if a continuous system comes without dt, or one in steps with another dt than its own.
    """
    op = "from_control"
    package = _control(op)
    system = package.ss(system)
    A, B, C, D = (torch.tensor(x, dtype=dtype) for x in (system.A, system.B, system.C, system.D))
    if system.isctime(strict=True):
        if dt is None:
            raise checks.fail(op, "the system is continuous and dt is None, expected the seconds a step takes.")
        sampled = discretize(A, B, dt)
        assert sampled.B is not None
        A, B = sampled.A, sampled.B
    elif dt is not None and system.dt is not None and system.dt is not True and system.dt != dt:
        raise checks.fail(op, f"dt is {dt}, and the system's own is {system.dt}.", "Resample it in control first.")
    n, m = len(A), len(C)
    model = StateSpace(
        A,
        B,
        C,
        D,
        A.new_zeros(n, n) if Q is None else Q,
        A.new_zeros(m, m) if R is None else R,
        A.new_zeros(n) if m0 is None else m0,
        A.new_zeros(n, n) if P0 is None else P0,
    )
    check(op, model)
    return model


def _control(op: str) -> ModuleType:
    try:
        import control
    except ImportError as error:
        raise ImportError(f"{op}: needs python-control. pip install 'stateline[classical]'") from error
    module: ModuleType = control
    return module


def _check(op: str, A: Tensor, B: Tensor | None, C: Tensor | None) -> None:
    sizes = Sizes(op)
    given = {name: x for name, x in {"A": A, "B": B, "C": C}.items() if x is not None}
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise no_tensor(op, name, x, {"A": "(n, n)", "B": "(n, p)", "C": "(m, n)"}[name])
        sizes.match(name, x, {"A": "n n", "B": "n p", "C": "m n"}[name], "One constant system.")
        checks.dtype(op, name, x, DTYPES)
        if checks.can_read(x.detach()) and not torch.isfinite(x).all():
            raise checks.fail(op, f"{name} has values that are not finite.")
    checks.same_device(op, given)


def _listed(values: Tensor) -> str:
    shown = [f"{z.real:.4g}" + (f"{z.imag:+.4g}i" if abs(z.imag) > 1e-12 * abs(z) else "") for z in values[:4].tolist()]
    return ", ".join(shown) + (", …" if len(values) > 4 else "")
