"""State feedback: a system whose input is made from its own state, and whether what comes of it is stable.

    u[t] = K h[t] + r[t]   turns   h[t+1] = A h[t] + B u[t]   into   h[t+1] = (A + B K) h[t] + B r[t]

and h' = A h + B u into h' = (A + B K) h + B r likewise. Suffixes: n state, m input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stateline import checks

OP = "feedback"
_NUMBERS = (*checks.REAL_DTYPES, torch.complex64, torch.complex128)


@dataclass(frozen=True)
class Loop:
    """A closed loop, h[t+1] = A h[t] + B r[t], or h' = A h + B r if it is continuous; float64, or complex128.

    A: (n, n), the open loop's A + B K.   B: (n, m).   K: (m, n).
    continuous: whether time flows, instead of going in steps.
    eigenvalues: (n) of A, complex, the one that decides first.
    """

    A: Tensor
    B: Tensor
    K: Tensor
    continuous: bool
    eigenvalues: Tensor

    @property
    def radius(self) -> float:
        """The spectral radius: the largest |eigenvalue|, by which a free state shrinks or grows with every step."""
        return float(self.eigenvalues.abs().max()) if len(self.eigenvalues) else 0.0

    @property
    def abscissa(self) -> float:
        """The spectral abscissa: the largest real part, at whose rate a free state grows with time."""
        return float(self.eigenvalues.real.max()) if len(self.eigenvalues) else -math.inf

    @property
    def margin(self) -> float:
        """How far inside the deciding eigenvalue lies: 1 − radius, in continuous time −abscissa; negative outside."""
        return -self.abscissa if self.continuous else 1 - self.radius

    @property
    def stable(self) -> bool:
        """Whether a free state dies out: every eigenvalue inside the unit circle, or left of the imaginary axis."""
        return self.margin > 0

    @property
    def norm(self) -> float:
        """The largest singular value of A: the most by which one step can stretch a state.

        Below 1, a discrete loop stays stable whatever gates in [0, 1] multiply its states from step to step; a radius
        below 1 does not promise that.
        """
        return float(torch.linalg.matrix_norm(self.A, 2)) if len(self.eigenvalues) else 0.0

    @property
    def time_constant(self) -> float:
        """When the slowest part of a free state has fallen to 1/e: in steps, or in time; infinite if it never does."""
        if not self.stable:
            return math.inf
        return 1 / -self.abscissa if self.continuous else (-1 / math.log(self.radius) if self.radius else 0.0)

    def __str__(self) -> str:
        n, m = self.B.shape
        kind, rule = ("continuous", "spectral abscissa") if self.continuous else ("discrete", "spectral radius")
        value = self.abscissa if self.continuous else self.radius
        bound = "0" if self.continuous else "1"
        verdict = "stable" if self.stable else "not stable"
        sign = "below" if self.stable else "not below"
        lines = [f"closed loop, {kind}, {_of(n, 'state')}, {_of(m, 'input')}: {verdict}"]
        lines.append(f"  {rule} {value:.6g}, {sign} {bound}; margin {self.margin:.6g}")
        if self.stable:
            unit = "units of time" if self.continuous else "steps"
            lines.append(f"  a free state falls to 1/e in {self.time_constant:.4g} {unit}; {self._reach()}")
        leading = ", ".join(_written(x) for x in self.eigenvalues[:4].tolist())
        return "\n".join([*lines, f"  eigenvalues {leading}{', …' if n > 4 else ''}"])

    def _reach(self) -> str:
        if self.continuous:
            return f"largest singular value {self.norm:.4g}"
        return f"a step stretches it by {self.norm:.4g} at most" + (", gates or not" if self.norm < 1 else "")


def feedback(A: Tensor, B: Tensor, K: Tensor, *, continuous: bool = False) -> Loop:
    """The closed loop that u = K h + r makes of h[t+1] = A h + B u, or of h' = A h + B u if it is `continuous`.

    Args:
        A: (n) diagonal, or (n, n), real or complex.
        B: (n, m), or (n) for one input.   K: (m, n), or (n).

    Returns:
        The system (A + B K, B) in float64, or complex128 if any of the three is complex, with its stability; print it.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    >>> swing = torch.tensor([[1.0, 0.1], [0.1, 1.0]])  # an inverted pendulum, sampled: it falls
    >>> push = torch.tensor([0.0, 0.1])
    >>> print(feedback(swing, push, torch.zeros(2)))
    closed loop, discrete, 2 states, 1 input: not stable
      spectral radius 1.1, not below 1; margin -0.1
      eigenvalues 1.1, 0.9
    >>> print(feedback(swing, push, torch.tensor([-3.0, -3.0])))
    closed loop, discrete, 2 states, 1 input: stable
      spectral radius 0.9, below 1; margin 0.1
      a free state falls to 1/e in 9.491 steps; a step stretches it by 1.021 at most
      eigenvalues 0.9, 0.8
    """
    if not isinstance(continuous, bool):
        raise checks.fail(OP, f"continuous is {continuous!r}, expected True or False.", error=TypeError)
    sizes = checks.Sizes(OP)
    dense = isinstance(A, Tensor) and A.dim() == 2
    sizes.match("A", A, "n n" if dense else "n", "It is the diagonal, (n,), or the whole matrix, (n, n).")
    single = isinstance(B, Tensor) and B.dim() == 1
    sizes.match("B", B, "n" if single else "n m", "One column an input; one input may be a vector, (n,).")
    if single:
        sizes.bind("m", 1, "B")
    row = isinstance(K, Tensor) and K.dim() == 1
    if row and sizes["m"] != 1:
        raise checks.fail(OP, f"K has shape {tuple(K.shape)}, expected (m, n) with m = {sizes['m']} (set by B).")
    sizes.match("K", K, "n" if row else "m n", "One row an input.")
    for name, x in (("A", A), ("B", B), ("K", K)):
        checks.dtype(OP, name, x, _NUMBERS)
        if not torch.isfinite(x).all():
            raise checks.fail(OP, f"{name} has values that are not finite.")
    checks.same_device(OP, {"A": A, "B": B, "K": K})
    wide = torch.complex128 if any(x.is_complex() for x in (A, B, K)) else torch.float64
    A, B, K = (x.detach().to(wide) for x in (A, B, K))
    B, K = B[:, None] if single else B, K[None] if row else K
    closed = (A if dense else torch.diag(A)) + B @ K
    values = torch.linalg.eigvals(closed)
    order = torch.argsort(values.real if continuous else values.abs(), descending=True, stable=True)
    return Loop(closed, B, K, continuous, values[order])


def _written(x: complex) -> str:
    return f"{x.real:.4g}" if abs(x.imag) <= 1e-12 * abs(x) else f"{x.real:.4g}{x.imag:+.4g}i"


def _of(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
