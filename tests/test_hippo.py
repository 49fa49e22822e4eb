"""Measures, bases and projections: by quadrature, and by the equation that the state obeys."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from stateline.theory import discretize, hippo

Signal = Callable[[Tensor], Tensor]
ORTHONORMAL = {name: row for name, row in hippo.MEASURES.items() if row.basis is not None}
ORTHONORMAL |= {"tlagt .3": hippo.tilted_laguerre(0.3), "glagt .5 .2": hippo.generalized_laguerre(0.5, 0.2)}
ORTHONORMAL |= {"glagt -.5 2": hippo.generalized_laguerre(-0.5, 2.0)}
POLYNOMIAL = ("legt", "lmu")
EXACT = [name for name in ORTHONORMAL if name not in POLYNOMIAL and "fourier" not in name]


def close(got: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=0, atol=atol)


@functools.cache
def nodes(end: float) -> tuple[Tensor, Tensor]:
    """Ages and weights of a composite Gauss rule on [0, end], 16 points in each piece.

    The pieces are bounded by squares, s², so that powers of the age, which are no polynomials at 0, come out too.
    """
    x, w = np.polynomial.legendre.leggauss(16)
    edges = np.linspace(0, math.sqrt(end), 151)
    width = np.diff(edges)[:, None]
    s = edges[:-1, None] + width * (x + 1) / 2
    return torch.tensor((s * s).ravel()), torch.tensor((width * w / 2 * 2 * s).ravel())


def reach(name: str) -> float:
    window = ORTHONORMAL[name].window
    return 200.0 if math.isinf(window) else window


def inner(name: str, n: int, u: Signal) -> Tensor:
    """gain_n ∫ u(τ) p_n(τ) w(τ) dτ: the state that a signal should have left, u by age."""
    if name == "fourier_decay":  # jumps at every turn: integrate turn by turn
        ages, weights = nodes(2.0)
        turns = torch.arange(60, dtype=torch.float64)[:, None] * 2
        ages, weights = (ages + turns).flatten(), weights.expand(60, -1).flatten()
    else:
        ages, weights = nodes(reach(name))
    row = ORTHONORMAL[name]
    terms = (u(ages) * hippo.weight(row, ages) * weights)[:, None] * hippo.basis(row, n, ages)
    return row.gain(n) * terms.sum(0)


@pytest.mark.parametrize("name", ORTHONORMAL)
def test_basis_is_orthonormal_under_the_measure(name: str) -> None:
    row, n = ORTHONORMAL[name], 8
    gram = torch.stack([inner(name, n, lambda age, k=k: hippo.basis(row, n, age)[:, k]) for k in range(n)])
    expected = torch.eye(n, dtype=torch.float64)
    if "fourier" in name:
        expected[1, 1] = 0  # the sine that never moves
    close(gram / row.gain(n), expected, 1e-9)


@pytest.mark.parametrize("name", ORTHONORMAL)
def test_the_measure_has_mass_one(name: str) -> None:
    """But for lagt, whose measure is flat and endless."""
    if name == "lagt":
        assert (hippo.weight("lagt", torch.arange(3)) == 1).all()
        return
    ages, weights = nodes(2000.0 if math.isinf(ORTHONORMAL[name].window) else ORTHONORMAL[name].window)
    mass = (hippo.weight(ORTHONORMAL[name], ages) * weights).sum()
    close(mass, torch.tensor(1.0), 1e-2 if name == "fourier_decay" else 1e-7)  # its jumps lie between nodes


@pytest.mark.parametrize("name", EXACT)
def test_impulse_response_is_the_memory(name: str) -> None:
    """exp(τA)B = gain · p(τ) · w(τ), the definition of what these systems remember."""
    row, n = ORTHONORMAL[name], 8
    A, B = hippo.transition(row, n)
    ages = torch.tensor([0.01, 0.5, 1.0, 3.0, 10.0], dtype=torch.float64)
    response = torch.linalg.matrix_exp(ages[:, None, None] * A) @ B
    close(row.gain(n) * hippo.basis(row, n, ages) * hippo.weight(row, ages)[:, None], response, 1e-10)


@pytest.mark.parametrize("name", ORTHONORMAL)
def test_state_obeys_its_equation(name: str) -> None:
    """x' = A x + B u where x is the projection: of a polynomial where polynomials fit, of waves where waves do."""
    n, row = 6, ORTHONORMAL[name]
    turn = 2 * math.pi / (1.0 if name == "fourier2" else 2.0)
    if "fourier" in name:
        u, slope = (lambda t: torch.cos(2 * turn * t + 0.4)), (lambda t: -2 * turn * torch.sin(2 * turn * t + 0.4))
    elif name in POLYNOMIAL:
        u, slope = (lambda t: t**5 - 2 * t**2 + 0.3), (lambda t: 5 * t**4 - 4 * t)
    else:
        u, slope = (lambda t: torch.cos(5 * t)), (lambda t: -5 * torch.sin(5 * t))
    A, B = hippo.transition(row, n)
    now = torch.tensor(0.7, dtype=torch.float64)
    x, derivative = (inner(name, n, lambda age, f=f: f(now - age)) for f in (u, slope))
    close(derivative, A @ x + B * u(now), 1e-8)


def steps_by_hand(name: str, n: int, signal: Tensor, dt: float | None) -> Tensor:
    """The state that a signal held between samples leaves, by quadrature over each sample's stay."""
    x, w = np.polynomial.legendre.leggauss(n + 8)
    t, row = len(signal), ORTHONORMAL[name]
    total = torch.zeros(n, dtype=torch.float64)
    for j in range(t):
        if dt is None:  # shares of the whole past
            place = torch.tensor((j + (x + 1) / 2) / t)
            values = hippo.basis("legs", n, -torch.log(place)) / t
        else:
            ages = torch.tensor((t - j - 1 + (x + 1) / 2) * dt)
            values = dt * hippo.basis(row, n, ages) * hippo.weight(row, ages)[:, None]
        total += signal[j] * (torch.tensor(w / 2)[:, None] * values).sum(0)
    return row.gain(n) * total


@pytest.mark.parametrize("name", ["legs", "lagt", "tlagt", "glagt", "tlagt .3"])
def test_projection_is_the_integral(name: str) -> None:
    signal = torch.randn(40, dtype=torch.float64)
    memory = hippo.project(signal, ORTHONORMAL[name], 8, dt=0.1)
    close(memory.state, steps_by_hand(name, 8, signal, 0.1), 1e-10)


@pytest.mark.parametrize("name", ["legs", "lagt", "tlagt .3"])
def test_first_order_hold_is_exact_for_a_ramp(name: str) -> None:
    """Two taps: the sample before counts, also across a cut."""
    row, t, dt = ORTHONORMAL[name], 30, 0.1
    ramp = torch.arange(1, t + 1, dtype=torch.float64) * dt
    memory = hippo.project(ramp[:11], row, 8, dt=dt, rule="first_order_hold")
    ages, weights = nodes(t * dt)
    terms = ((t * dt - ages) * hippo.weight(row, ages) * weights)[:, None] * hippo.basis(row, 8, ages)
    expected = row.gain(8) * terms.sum(0)
    close(hippo.extend(memory, ramp[11:]).state, expected, 1e-10)


def test_scaled_projection_is_the_integral_over_all_of_the_past() -> None:
    """zoh in logarithmic time is exact for a signal held between samples, however many."""
    signal = torch.randn(150, dtype=torch.float64)
    for t in (1, 2, 7, 150):
        memory = hippo.project(signal[:t], "legs", 8, rule="zoh")
        close(memory.state, steps_by_hand("legs", 8, signal[:t], None), 1e-10)
    assert memory.samples == 150


def test_scaled_bilinear_comes_close() -> None:
    signal = torch.sin(torch.arange(400) / 40.0)
    exact = hippo.project(signal, "legs", 16, rule="zoh").state
    close(hippo.project(signal, "legs", 16).state, exact, 2e-3)


@pytest.mark.parametrize("rule", discretize.RULES)
@pytest.mark.parametrize(
    ("name", "dt"), [("legs", None), ("legt", 0.02), ("lagt", 0.1), ("fourier", 0.02), ("lmu", 0.01)]
)
def test_law(name: str, dt: float | None, rule: str) -> None:
    """Cut anywhere and continued, a projection is the same, to the bit; the memory before is not touched."""
    signal = torch.randn(2, 3, 60)
    whole = hippo.project(signal, name, 4, dt=dt, rule=rule)
    for cuts in ((0,), (1,), (59,), (1, 2, 40)):
        pieces = torch.tensor_split(signal, cuts, -1)
        memory = hippo.project(pieces[0], name, 4, dt=dt, rule=rule)
        before = memory.state.clone()
        result = functools.reduce(hippo.extend, pieces[1:], memory)
        assert torch.equal(result.state, whole.state)
        assert torch.equal(memory.state, before)
        assert result.samples == 60


def test_batched_signals_are_each_their_own() -> None:
    signal = torch.randn(2, 3, 50)
    for name, dt in (("legs", None), ("legt", 0.05)):
        alone = hippo.project(signal[1, 2], name, 8, dt=dt)
        memory = hippo.project(signal, name, 8, dt=dt)
        close(memory.state[1, 2], alone.state)
        ages = torch.tensor([0.5, 7.5, 30.0])
        assert hippo.reconstruct(memory, ages).shape == (2, 3, 3)
        close(hippo.reconstruct(memory, ages)[1, 2], hippo.reconstruct(alone, ages))


def test_reconstruction_is_the_best_approximation() -> None:
    """Least squares over all of the past on the same polynomials gives the same curve."""
    t = 200
    signal = torch.randn(t, dtype=torch.float64).cumsum(0)
    ages = torch.arange(t) + 0.5
    fine = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    vandermonde = torch.tensor(np.polynomial.legendre.legvander(2 * fine.numpy() - 1, 11))
    held = signal[(fine * t).long()]
    fit = torch.linalg.lstsq(vandermonde, held[:, None]).solution[:, 0]
    expected = torch.tensor(np.polynomial.legendre.legval(2 * (1 - ages.numpy() / t) - 1, fit.numpy()))
    close(hippo.reconstruct(hippo.project(signal, "legs", 12, rule="zoh"), ages), expected, 1e-3)


@pytest.mark.parametrize(
    ("name", "dt", "bound"),
    [
        ("legs", None, 1e-3), ("legs", 1 / 400, 0.1), ("legt", 2 / 400, 1e-3), ("lmu", 1 / 400, 1e-3),
        ("tlagt", 16 / 400, 1e-2), ("lagt", 20 / 400, 0.3), ("glagt", 20 / 400, 0.3),
        ("fourier", 2 / 400, 0.1), ("fourier2", 1 / 400, 0.1),
    ],
)  # fmt: skip
def test_the_past_comes_back(name: str, dt: float | None, bound: float) -> None:
    """A smooth signal from 32 numbers, 400 samples of it; the Fourier family away from the ends of its window.

    lagt weighs all ages alike, so a signal that never ends has no best approximation: it comes back roughly.
    """
    t = torch.arange(800 if dt is None else 4000)
    signal = torch.sin(t / 60.0) + 0.5 * torch.cos(t / 26.0)
    memory = hippo.project(signal, name, 32, dt=dt)
    ages = torch.arange(60, 340) + 0.5
    close(hippo.reconstruct(memory, ages), signal.flip(0)[60:340], bound)


def test_more_states_remember_more() -> None:
    signal = torch.randn(600).cumsum(0)
    ages = torch.arange(300) + 0.5
    for name in ("legt", "fourier"):
        errors = [
            float((hippo.reconstruct(hippo.project(signal, name, n, dt=2 / 300), ages) - signal.flip(0)[:300]).norm())
            for n in (4, 16, 64)
        ]
        assert errors == sorted(errors, reverse=True)


def test_gradients_reach_the_signal() -> None:
    signal = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    ages = torch.tensor([0.5, 3.0])
    for name, dt in (("legs", None), ("lagt", 0.3)):
        assert torch.autograd.gradcheck(
            lambda u, name=name, dt=dt: hippo.reconstruct(hippo.project(u, name, 4, dt=dt), ages), signal
        )


@pytest.mark.parametrize("name", [name for name in ORTHONORMAL if "fourier" not in name])
def test_few_states(name: str) -> None:
    """Sizes that a recurrence of three terms could trip over, each the beginning of the larger one."""
    ages = torch.tensor([0.1, 0.9], dtype=torch.float64)
    A, B = hippo.transition(ORTHONORMAL[name], 5)
    p = hippo.basis(ORTHONORMAL[name], 5, ages)
    for n in (1, 2, 3):
        small_A, small_B = hippo.transition(ORTHONORMAL[name], n)
        close(small_A, A[:n, :n])
        close(small_B, B[:n])
        close(hippo.basis(ORTHONORMAL[name], n, ages), p[:, :n])


def test_span() -> None:
    signal = torch.zeros(30)
    assert hippo.project(signal, "legs").span == 30
    assert hippo.project(signal, "legt", dt=0.1).span == 20
    assert hippo.project(signal, "fourier2", dt=0.1).span == 10
    assert hippo.project(signal, "lagt", dt=0.1).span == math.inf


@pytest.mark.parametrize("measure", ["legsd", "foud"])
def test_systems_without_a_basis_say_so(measure: str) -> None:
    memory = hippo.project(torch.zeros(3), measure, 4, dt=0.1)  # a state they have
    for call in (
        lambda: hippo.basis(measure, 4, torch.zeros(1)),
        lambda: hippo.weight(measure, torch.zeros(1)),
        lambda: hippo.reconstruct(memory, torch.zeros(1)),
    ):
        with pytest.raises(
            ValueError, match=rf"hippo\.\w+: measure '{measure}' has no weight and orthonormal basis: .* Take"
        ):
            call()


def test_foud_and_fourier_decay_fold_the_past() -> None:
    """Their impulse responses are the waves, damped; what the page says of them."""
    ages = torch.tensor([0.0, 0.4, 1.7], dtype=torch.float64)
    A, B = hippo.transition("foud", 8)
    response = torch.linalg.matrix_exp(ages[:, None, None] * A) @ B
    close(response, torch.exp(-ages / 2)[:, None] * hippo.basis("fourier2", 8, ages))


x = torch.zeros(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hippo.project([1.0]), r"hippo.project: signal is a list, expected a tensor \(…, t\)"),
        (lambda: hippo.project(x.cfloat()), r"hippo.project: signal is complex, expected real samples"),
        (lambda: hippo.project(torch.tensor(1.0)), r"hippo.project: signal is a single number, expected real samples"),
        (
            lambda: hippo.project(x, "legt"),
            r"hippo.project: dt is None, expected a number for measure 'legt'; only legs",
        ),
        (lambda: hippo.project(x, dt=0.0), r"hippo.project: dt is 0.0, expected a number above 0"),
        (lambda: hippo.project(x, n=0), r"hippo.project: n is 0, expected a whole number at least 1"),
        (lambda: hippo.project(x, rule="euler"), r"hippo.project: rule is 'euler', expected one of 'forward_euler'"),
        (
            lambda: hippo.extend(hippo.project(x), torch.zeros(2, 4)),
            r"hippo.extend: signal has shape \(2, 4\), expected",
        ),
        (
            lambda: hippo.reconstruct(hippo.project(x), torch.tensor([5.0])),
            r"ages run from 5 to 5, expected 0 to 4 samples",
        ),
        (lambda: hippo.reconstruct(hippo.project(x), torch.tensor([math.nan])), r"ages run from nan to nan"),
        (lambda: hippo.reconstruct(hippo.project(x[:0]), torch.zeros(1)), r"hippo.reconstruct: the memory is empty"),
        (lambda: hippo.extend(x, x), r"hippo.extend: memory is a Tensor, expected a Memory\. hippo.project"),
        (lambda: hippo.reconstruct(x, x), r"hippo.reconstruct: memory is a Tensor, expected a Memory"),
        (lambda: hippo.reconstruct(hippo.project(x), 5), r"hippo.reconstruct: ages has shape \(\), expected \(k\)"),
        (lambda: hippo.transition("fourier", 5), r"hippo: n is 5, expected an even number for the Fourier family"),
        (lambda: hippo.basis("fourier2", 3, x), r"hippo: n is 3, expected an even number for the Fourier family"),
        (lambda: hippo.tilted_laguerre(0.0), r"hippo.tilted_laguerre: beta is 0.0, expected a number above 0"),
        (lambda: hippo.generalized_laguerre(1.0), "alpha is 1, expected a number above -1 and below 1"),
        (lambda: hippo.generalized_laguerre(-1.0), r"alpha is -1.0, expected a number above -1"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
