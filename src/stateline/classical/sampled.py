"""From x' = A x + B u + w with white noise w to the model of its samples, at steps of time that may differ.

The input enters as a state that stands still within a step: [[A, B], [0, 0]] is discretised in one piece, by the rules
of `stateline.theory.discretize`. The noise of a step is the integral of exp(A s) Q exp(A s)ᵀ over it, for all rules.
Van Loan (1978) reads it off exp of [[-A, Q], [0, Aᵀ]], which overflows where A decays fast; here the step is
halved until the integral's own series converges at once, then doubled again. No inverse of A is taken.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stateline import checks
from stateline.checks import Sizes
from stateline.classical.model import DTYPES, match, no_negative_variance
from stateline.theory import discretize as rules

METHODS = ("zoh", "bilinear", "forward_euler", "backward_euler")


class Sampled(NamedTuple):
    """A (…, n, n), B (…, n, p) or None, Q (…, n, n) or None, of one step."""

    A: Tensor
    B: Tensor | None
    Q: Tensor | None


def discretize(
    Ac: Tensor, Bc: Tensor | None, dt: float | Tensor, Qc: Tensor | None = None, method: str = "zoh"
) -> Sampled:
    """A, B and Q of h[t+1] = A h[t] + B u[t] + v[t] from x' = Ac x + Bc u + w.

    Args:
        Ac: (…, n, n).   Bc: (…, n, p) or None.
        dt: the length of a step, > 0; a tensor (…, T) gives each step its own, for irregular samples: step t goes from
            sample t to t+1.
        Qc: (…, n, n), the intensity of w, in squared units of x per unit of time; None for no noise.
        method: "zoh", exact for inputs that are held within a step, "bilinear", "forward_euler" or "backward_euler".
            Q is exact in each.

    Returns:
        Matrices with dt's shape in front. Differentiable in everything.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    >>> Ac, Bc = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0], [1.0]])
    >>> sampled = discretize(Ac, Bc, 2.0, Qc=Bc @ Bc.mT)
    >>> sampled.A.tolist(), sampled.B.tolist()
    ([[1.0, 2.0], [0.0, 1.0]], [[2.0], [2.0]])
    >>> discretize(Ac, Bc, torch.tensor([2.0, 1.0, 0.5])).A.shape
    torch.Size([3, 2, 2])
    """
    op = "discretize"
    sizes = Sizes(op)
    checks.choice(op, "method", method, METHODS)
    for name, x, form in (("Ac", Ac, "n n"), ("Bc", Bc, "n p"), ("Qc", Qc, "n n")):
        if x is not None:
            match(sizes, name, x, form)
            checks.dtype(op, name, x, DTYPES if name == "Ac" else (Ac.dtype,), "One dtype for all, as Ac.")
    checks.same_device(op, {"Ac": Ac, "Bc": Bc, "Qc": Qc, "dt": dt if isinstance(dt, Tensor) else None})
    if Qc is not None:
        no_negative_variance(op, Qc=Qc)
    n = sizes["n"]
    parts = Ac if Bc is None else _with_inputs(Ac, Bc)
    step = _step(op, dt, Ac.dtype)
    if method == "zoh":
        whole = rules.exponential(step * parts)
    else:
        rule = rules.RULES[method]
        whole, _ = rule.dense(step * parts, parts.new_zeros(parts.shape[:-1]))
    A, B = whole[..., :n, :n], None if Bc is None else whole[..., :n, n:]
    return Sampled(A, B, None if Qc is None else process_noise(Ac, Qc, dt))


def _step(op: str, dt: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    if not isinstance(dt, Tensor):
        checks.number(op, "dt", dt, low=0, open_low=True)
        return dt
    checks.dtype(op, "dt", dt, DTYPES)
    if checks.can_read(dt) and not (dt > 0).all():
        raise checks.fail(
            op, "dt has values that are not above 0.", "A step takes time: sort the times, merge equal ones."
        )
    return dt.to(dtype)[..., None, None]


def _with_inputs(Ac: Tensor, Bc: Tensor) -> Tensor:
    lead = torch.broadcast_shapes(Ac.shape[:-2], Bc.shape[:-2])
    top = torch.cat([Ac.expand(*lead, *Ac.shape[-2:]), Bc.expand(*lead, *Bc.shape[-2:])], -1)
    return torch.cat([top, top.new_zeros(*lead, Bc.shape[-1], top.shape[-1])], -2)


def process_noise(Ac: Tensor, Qc: Tensor, dt: float | Tensor) -> Tensor:
    """∫ exp(Ac s) Qc exp(Ac s)ᵀ ds over [0, dt], (…, n, n): the covariance that white noise leaves after a step."""
    step = _step("process_noise", dt, Ac.dtype)
    M, term = step * Ac, step * Qc
    count = rules.halvings(M)
    M, term = rules.halved(M, count), rules.halved(term, count)
    cov = term
    for k in range(2, rules.TERMS + 2):  # the integrand's k-th derivative is that of k-1, times Ac from both sides
        term = (M @ term + term @ M.mT) / k
        cov = cov + term
    decay = rules.exponential(M)
    for left in rules.turns(count):  # a step is two steps of half its length
        cov, decay = torch.where(left, cov + decay @ cov @ decay.mT, cov), torch.where(left, decay @ decay, decay)
    return 0.5 * (cov + cov.mT)
