"""What a state of n numbers remembers of a signal: HiPPO systems, projecting onto them, reconstructing the past.

    memory = project(signal, "legs", 64)                   all of the past, however long: x' = (A x + B u)/t
    memory = project(signal, "legt", 64, dt=2 / 1000)      a window of the last 1000 samples: x' = A x + B u
    memory = extend(memory, more)                          the same bits as projecting it in one piece
    past = reconstruct(memory, ages)                       what it was so many samples ago

Suffixes: n state, t sample, k age.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stateline import checks
from stateline.theory.discretize import RULES, Rule, discretize
from stateline.theory.dplr import nplr
from stateline.theory.measures import MEASURES, Measure, generalized_laguerre, named, tilted_laguerre

__all__ = [
    "INITS",
    "MEASURES",
    "Measure",
    "Memory",
    "basis",
    "diagonal",
    "extend",
    "generalized_laguerre",
    "project",
    "reconstruct",
    "tilted_laguerre",
    "transition",
    "weight",
]

# --- systems ---------------------------------------------------------------------------------------------------------


def transition(measure: str | Measure, n: int) -> tuple[Tensor, Tensor]:
    """A (n, n) and B (n), float64, of x' = A x + B u.

    Args:
        measure: a name of `MEASURES`, or a row: `tilted_laguerre(beta)`, `generalized_laguerre(alpha, beta)`, your own.
        n: states ≥ 1.

    Raises:
        ValueError, TypeError: for an unknown measure, or an n that is no whole number ≥ 1.
    """
    row = named("hippo.transition", measure)
    checks.number("hippo.transition", "n", n, low=1, integer=True)
    return row.matrices(n)


def weight(measure: str | Measure, ages: Tensor) -> Tensor:
    """w(τ), how much an age τ ≥ 0 counts, at ages (…) in A's unit of time -> (…), float64.

    Raises ValueError for a system that is no projection onto an orthonormal basis (legsd, foud).
    """
    row = _orthonormal("hippo.weight", measure)
    assert row.weight is not None
    return row.weight(ages.double()).double()


def basis(measure: str | Measure, n: int, ages: Tensor) -> Tensor:
    """p_0 … p_{n−1} at ages (…) in A's unit of time -> (…, n), float64; ∫ p_i p_j w dτ = δ_ij.

    But for one: the Fourier family's p_1, the sine of frequency 0, is 0. Raises ValueError as `weight` does.
    """
    row = _orthonormal("hippo.basis", measure)
    checks.number("hippo.basis", "n", n, low=1, integer=True)
    assert row.basis is not None
    return row.basis(n, ages.double())


def _orthonormal(op: str, measure: str | Measure) -> Measure:
    row = named(op, measure)
    if row.weight is None or row.basis is None:
        problem = f"measure {row.name!r} has no weight and orthonormal basis: its state is no projection."
        origin = {"legsd": "legs", "foud": "fourier2"}.get(row.name)
        raise checks.fail(op, problem, f"Take {origin}, which it comes from." if origin else "Give its row both.")
    return row


# --- diagonal systems ------------------------------------------------------------------------------------------------


#: −Im A of state k where Re A is −½, from k (n/2) and n.
FREQUENCIES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "lin": lambda k, n: math.pi * k,
    "inv": lambda k, n: n / math.pi * (n / (2 * k + 1) - 1),
    "inv2": lambda k, n: n / math.pi * (n / (k + 1) - 1),
    "quad": lambda k, n: (2 * k + 1) ** 2 / math.pi,
}
#: What `diagonal` knows.
INITS = (*FREQUENCIES, "legs", "real", "rand")


def diagonal(init: str, n: int, *, generator: torch.Generator | None = None) -> Tensor:
    """A (n/2) complex128 of a diagonal system, half of conjugate pairs: Re A < 0, Im A ≤ 0.

    k = 0 … n/2 − 1 below; the real part is −½ but for "real".

    Args:
        init: "lin" −Im = πk, the frequencies of a Fourier series · "inv" (n/π)(n/(2k+1) − 1), close to legs in closed
            form · "inv2" (n/π)(n/(k+1) − 1) · "quad" (1+2k)²/π · "legs" the eigenvalues of legs' normal part, ascending
            in Im · "real" −(k+1), no frequencies · "rand" exp of a normal number.
        n: states, even; conjugates count.
        generator: of "rand". None: torch's own.

    Raises:
        ValueError, TypeError: for an unknown init, an odd n.

    Source: "On the parameterization and initialization of diagonal state space models" (Gu et al. 2022), §4.
    """
    op = "hippo.diagonal"
    checks.choice(op, "init", init, INITS)
    checks.number(op, "n", n, low=2, integer=True)
    if n % 2:
        raise checks.fail(op, f"n is {n}, expected an even number.", "States come in conjugate pairs.")
    k = torch.arange(n // 2, dtype=torch.float64)
    if init == "legs":
        return nplr("legs", n)[0]
    if init == "real":
        return torch.complex(-k - 1, torch.zeros_like(k))
    if init == "rand":
        frequency = torch.exp(torch.randn(n // 2, dtype=torch.float64, generator=generator))
    else:
        frequency = FREQUENCIES[init](k, n)
    return torch.complex(torch.full_like(k, -0.5), -frequency)


# --- projecting a signal ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """What is kept of a signal. Made by `project`, continued by `extend`, read by `reconstruct`.

    state (…, n) float64, the coefficients; samples, how many were taken in; last (…), the newest of them, for rules of
    two taps. dt: A's time a sample takes, None for the scaled system.
    """

    measure: Measure
    dt: float | None
    rule: Rule
    state: Tensor
    last: Tensor
    samples: int = 0

    @property
    def span(self) -> float:
        """How many samples back `reconstruct` reaches: the window, or all that was taken in, or inf."""
        return float(self.samples) if self.dt is None else self.measure.window / self.dt


def project(
    signal: Tensor,
    measure: str | Measure = "legs",
    n: int = 64,
    *,
    dt: float | None = None,
    rule: str | Rule | None = None,
) -> Memory:
    """The memory of a signal (…, t), sample after sample, in n numbers a signal.

    Args:
        signal: (…, t) real; everything is computed in float64. Sample t is the input of step t.
        measure: a name of `MEASURES`, or a row of one's own.
        n: states ≥ 1.
        dt: A's time a sample takes: a window measure remembers window/dt samples (window 2: legt, fourier; 1: lmu,
            fourier2), legs and the Laguerre family forget over about 1/dt of them. Before the first sample there was 0.
            None: scaled, for legs alone: all of the past at the resolution that n numbers allow, x' = (A x + B u)/t.
            In logarithmic time that system does not change, so step t is one of ln((t + 1)/t) by any rule.
        rule: of `discretize`, by name or row. None: zoh, or bilinear for the scaled system, which has another
            exponential at every step.

    Raises:
        ValueError, TypeError: for a signal without time, an unknown measure or rule, a dt ≤ 0 or one that is missing.
    """
    op = "hippo.project"
    row = named(op, measure)
    checks.number(op, "n", n, low=1, integer=True)
    if dt is not None:
        checks.number(op, "dt", dt, low=0, open_low=True)
    elif row is not MEASURES["legs"]:
        problem = f"dt is None, expected a number for measure {row.name!r}; only legs has a scaled form."
        raise checks.fail(op, problem, "Give the time a sample takes, for example window / samples.")
    if not isinstance(rule, Rule):
        rule = rule or ("bilinear" if dt is None else "zoh")
        checks.choice(op, "rule", rule, tuple(RULES))
        rule = RULES[rule]
    _check_signal(op, signal)
    start = signal.new_zeros(signal.shape[:-1], dtype=torch.float64)
    return extend(Memory(row, dt, rule, start[..., None].expand(*start.shape, n), start), signal)


def extend(memory: Memory, signal: Tensor) -> Memory:
    """The memory after more samples (…, t), batched as those before; `memory` stays as it is.

    Raises ValueError, TypeError for a signal of another batch shape.
    """
    op = "hippo.extend"
    _check_memory(op, memory)
    _check_signal(op, signal)
    if signal.shape[:-1] != memory.last.shape:
        expected = f"expected {(*memory.last.shape, 't')} as the signal before"
        raise checks.fail(op, f"signal has shape {tuple(signal.shape)}, {expected}.")
    if signal.shape[-1] == 0:
        return memory
    u, taken = signal.double(), 0
    state, last = memory.state, memory.last
    if memory.dt is None and memory.samples == 0:  # a past of one value: its mean, and nothing else
        state, last, taken = torch.cat([u[..., :1], state[..., 1:]], -1), u[..., 0], 1
    A, B = (x.to(u.device) for x in memory.measure.matrices(state.shape[-1]))
    constant = None if memory.dt is None else discretize(memory.rule, A, B, memory.dt)
    for t in range(taken, u.shape[-1]):
        # One step at a time: a batch of exponentials has other last bits than each of them.
        A_bar, B_bar = constant or discretize(memory.rule, A, B, math.log1p(1 / (memory.samples + t)))
        assert isinstance(A_bar, Tensor)
        inputs = (u[..., t], last)[: memory.rule.taps]
        state = (state[..., None, :] @ A_bar.mT)[..., 0, :]
        for tap, value in zip(B_bar if memory.rule.taps == 2 else (B_bar,), inputs, strict=True):
            state = state + value[..., None] * tap
        last = inputs[0]
    return replace(memory, state=state, last=last, samples=memory.samples + u.shape[-1])


def _check_memory(op: str, memory: Memory) -> None:
    if not isinstance(memory, Memory):
        problem = f"memory is a {type(memory).__name__}, expected a Memory."
        raise checks.fail(op, problem, "hippo.project(signal, …) makes one.", error=TypeError)


def _check_signal(op: str, signal: Tensor) -> None:
    if not isinstance(signal, Tensor):
        raise checks.fail(op, f"signal is a {type(signal).__name__}, expected a tensor (…, t).", error=TypeError)
    if signal.dim() == 0 or signal.is_complex():
        kind = "complex" if signal.is_complex() else "a single number"
        raise checks.fail(op, f"signal is {kind}, expected real samples (…, t).")


def reconstruct(memory: Memory, ages: Tensor) -> Tensor:
    """The past as the state has it: u at `ages` (k) samples before the end -> (…, k), float64.

    Samples are held for the step they are the input of, so the middle of the newest is at age ½, of the oldest at
    samples − ½. Where the measure gives an age little weight, little is promised. The Fourier family takes the window
    for one turn of a periodic signal: expect a wrong value near its two ends.

    Raises:
        ValueError: for ages below 0 or beyond `memory.span`, or a system that is no projection (legsd, foud).
    """
    op = "hippo.reconstruct"
    _check_memory(op, memory)
    row = _orthonormal(op, memory.measure)
    assert row.basis is not None
    ages = torch.as_tensor(ages, dtype=torch.float64, device=memory.state.device)
    if ages.dim() != 1:
        raise checks.fail(op, f"ages has shape {tuple(ages.shape)}, expected (k).", "Give a tensor of one dimension.")
    if memory.samples == 0:
        raise checks.fail(op, "the memory is empty.", "Project a signal of at least one sample.")
    if ages.numel() and not (float(ages.min()) >= 0 and float(ages.max()) <= memory.span):
        came = f"ages run from {float(ages.min()):g} to {float(ages.max()):g}"
        raise checks.fail(op, f"{came}, expected 0 to {memory.span:g} samples, which is as far as the memory reaches.")
    scaled = -torch.log1p(-ages / memory.samples) if memory.dt is None else ages * memory.dt
    n = memory.state.shape[-1]
    return (memory.state / row.gain(n).to(ages.device)) @ row.basis(n, scaled).mT
