"""Every rule against quadrature, dense algebra and 40-digit arithmetic; its order; what Mamba's operations compute."""

from __future__ import annotations

import functools
import math

import mpmath  # PyTorch depends on it
import numpy as np
import pytest
import torch
from torch import Tensor

from stateline import ops
from stateline.theory import discretize as d
from stateline.theory import dplr, hippo

FUNCTIONS = {
    "forward_euler": d.forward_euler,
    "backward_euler": d.backward_euler,
    "bilinear": d.bilinear,
    "generalized_bilinear": functools.partial(d.generalized_bilinear, alpha=0.3),
    "zoh": d.zoh,
    "first_order_hold": d.first_order_hold,
    "exponential_euler": d.exponential_euler,
    "exponential_trapezoidal": d.exponential_trapezoidal,
}
RATIONAL = {"forward_euler": 0.0, "backward_euler": 1.0, "bilinear": 0.5, "generalized_bilinear": 0.3}
ORDER = {name: d.RULES[name].order for name in d.RULES} | {"generalized_bilinear": 1}


def close(got: Tensor, expected: Tensor | list[float], atol: float = 1e-12, rtol: float = 0.0) -> None:
    expected = torch.as_tensor(expected, dtype=got.dtype)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def integral(A: Tensor, B: Tensor, dt: float, weight) -> Tensor:
    """∫₀^dt weight(s) exp((dt − s)A) B ds by Gauss-Legendre quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    s = torch.tensor((nodes + 1) / 2 * dt)
    terms = torch.linalg.matrix_exp((dt - s)[:, None, None] * A) @ B
    return (torch.tensor(weights * dt / 2 * weight(s.numpy()))[:, None] * terms).sum(0)


def dense_oracle(name: str, A: Tensor, B: Tensor, dt: float) -> tuple[Tensor, list[Tensor]]:
    one = torch.eye(len(A), dtype=A.dtype)
    if name in RATIONAL:
        alpha = RATIONAL[name]
        inverse = torch.linalg.inv(one - alpha * dt * A)
        return inverse @ (one + (1 - alpha) * dt * A), [dt * inverse @ B]
    decay = torch.linalg.matrix_exp(dt * A / 8)
    decay = torch.linalg.matrix_power(decay, 8)
    if name == "zoh":
        return decay, [integral(A, B, dt, np.ones_like)]
    if name == "first_order_hold":
        return decay, [integral(A, B, dt, lambda s: s / dt), integral(A, B, dt, lambda s: 1 - s / dt)]
    if name == "exponential_euler":
        return decay, [dt * B]
    return decay, [0.5 * dt * B, 0.5 * dt * decay @ B]


def taps(B_bar: Tensor, name: str) -> list[Tensor]:
    return list(B_bar) if name in ("first_order_hold", "exponential_trapezoidal") else [B_bar]


def systems() -> dict[str, tuple[Tensor, Tensor]]:
    singular = torch.tensor([[0.0, 1, 0], [0, 0, 1], [0, 0, 0]], dtype=torch.float64)  # three integrators
    return {
        "legs": hippo.transition("legs", 8),
        "fourier, singular": hippo.transition("fourier", 6),
        "nilpotent": (singular, torch.tensor([0.0, 0, 1], dtype=torch.float64)),
        "nothing": (torch.zeros(2, 2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)),
    }


@pytest.mark.parametrize("system", systems())
@pytest.mark.parametrize("name", FUNCTIONS)
def test_dense(name: str, system: str) -> None:
    A, B = systems()[system]
    A_bar, B_bar = FUNCTIONS[name](A, B, 0.1)
    expected, expected_taps = dense_oracle(name, A, B, 0.1)
    close(A_bar, expected)
    for got, tap in zip(taps(B_bar, name), expected_taps, strict=True):
        close(got, tap)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_diagonal_is_dense_of_a_diagonal(name: str) -> None:
    A = torch.tensor([-0.5 - 3.0j, -2.0, 0.0, -1e-9 + 1e-9j, -40.0 + 7.0j, 2 * math.pi * 1j], dtype=torch.complex128)
    B = torch.randn(6, dtype=torch.complex128)
    A_bar, B_bar = FUNCTIONS[name](A, B, 1.0)
    expected, expected_B = FUNCTIONS[name](torch.diag(A), B, 1.0)
    close(torch.diag(A_bar), expected)
    close(B_bar, expected_B)


@pytest.mark.parametrize("measure", ["legs", "legt", "fourier", "legsd"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_dplr_is_the_dense_system_in_other_coordinates(name: str, measure: str) -> None:
    w, P, B, V = dplr.nplr(measure, 8)
    A_bar, B_bar = FUNCTIONS[name](dplr.DPLR(w, P), B, 0.1)
    expected, expected_B = FUNCTIONS[name](*hippo.transition(measure, 8), 0.1)
    basis = torch.cat([V, V.conj()], 1)
    if name in RATIONAL:
        assert isinstance(A_bar, dplr.DPLR)  # no matrix was made
        A_bar, B_bar = A_bar.pairs(), dplr.pairs(B_bar)
    close((basis @ A_bar @ basis.mH).real, expected)
    close((B_bar @ basis.mT).real, expected_B)


def test_scalars_against_forty_digits() -> None:
    """Relative error where subtraction cancels: small z, z near 2πi, and both sides of the series' edge."""
    mpmath.mp.dps = 40
    points = [1e-16, -1e-8, -1e-3 + 1e-3j, -0.4999, -0.5001, -0.3 + 0.4j, 1e-5j, 6.283j, -1e-9 + 6.2831853j, -30 + 100j]
    z = torch.tensor(points, dtype=torch.complex128)
    one = [complex((mpmath.expm1(p)) / p) for p in map(mpmath.mpmathify, points)]
    two = [complex((mpmath.expm1(p) - p) / p**2) for p in map(mpmath.mpmathify, points)]
    close(d.phi1(z), one, 0, 1e-14)
    close(d.phi1(z, quick=True), one, 0, 1e-14)
    close(d.phi2(z), two, 0, 1e-14)
    real = torch.tensor([-1e-12, -0.2, -3.0, -700.0], dtype=torch.float64)
    close(d.phi1(real), [float(mpmath.expm1(float(x)) / float(x)) for x in real], 0, 1e-14)
    assert d.phi1(torch.zeros(1))[0] == 1
    assert d.phi2(torch.zeros(1))[0] == 0.5


@pytest.mark.parametrize("dt", [1e-7, 1e-4, 0.003, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in RATIONAL])
def test_matrices_of_any_norm_against_forty_digits(name: str, dt: float) -> None:
    """torch.linalg.matrix_exp loses four digits at norms from 0.01 to 0.05."""
    A = torch.tensor([[-0.5, 1.0, 0.25], [-1.0, -0.5, 2.0], [0.5, 0.0, -3.0]], dtype=torch.float64)
    with mpmath.workdps(40):
        exact = mpmath.expm(mpmath.matrix(A.tolist()) * mpmath.mpf(dt))
        expected = torch.tensor([[float(exact[i, j]) for j in range(3)] for i in range(3)], dtype=torch.float64)
    close(FUNCTIONS[name](A, torch.ones(3, dtype=torch.float64), dt)[0], expected, atol=1e-15)


def test_small_steps_in_float32_keep_their_digits() -> None:
    """(exp z − 1)/A as it stands loses all but two digits of float32 at |z| = 1e−6."""
    A = torch.tensor([-0.5 - 1.0j], dtype=torch.complex64)
    _, B_bar = d.zoh(A, torch.ones(1), 1e-6)
    exact = d.zoh(A.to(torch.complex128), torch.ones(1), 1e-6)[1]
    close(B_bar.to(torch.complex128), exact, 0, 2e-7)
    assert B_bar.dtype == torch.complex64


def solve(name: str, steps: int, phase: float) -> Tensor:
    """|h(1) − exact| for x' = Ax + B cos(3t + phase) from the steady oscillation; one tap reads the step's middle."""
    A, B = hippo.transition("legt", 4)
    steady = torch.linalg.solve(3j * torch.eye(4) - A, B.to(torch.complex128))

    def exact(t: float) -> Tensor:
        return (steady * np.exp(1j * (3 * t + phase))).real

    A_bar, B_bar = FUNCTIONS[name](A, B, 1 / steps)
    now = 1.0 if d.RULES.get(name, d.RULES["bilinear"]).taps == 2 else 0.5
    h = exact(0.0)
    for t in range(steps):
        u = [math.cos(3 * (t + now) / steps + phase), math.cos(3 * t / steps + phase)]
        h = A_bar @ h + sum(tap * x for tap, x in zip(taps(B_bar, name), u, strict=False))
    return (h - exact(1.0)).abs().max()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_order_of_convergence(name: str) -> None:
    """Halving dt divides the error by 2^order, no less and no more."""
    errors = torch.stack([solve(name, steps, 0.3) for steps in (128, 256, 512)])
    close(torch.log2(errors[:-1] / errors[1:]), [float(ORDER[name])] * 2, 0.1)


def test_holds_are_exact_for_the_inputs_they_are_named_after() -> None:
    A, B = hippo.transition("fourier", 6)
    steps = 4
    for name, read in (("zoh", lambda t: 1.0), ("first_order_hold", lambda t: t)):
        A_bar, B_bar = FUNCTIONS[name](A, B, 1 / steps)
        h = torch.zeros(6, dtype=torch.float64)
        for t in range(steps):
            u = [read((t + 1) / steps), read(t / steps)]
            h = A_bar @ h + sum(tap * x for tap, x in zip(taps(B_bar, name), u, strict=False))
        close(h, integral(A, B, 1.0, lambda s, read=read: read(s) + 0 * s))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_irregular_steps_are_each_their_own(name: str) -> None:
    dt = torch.tensor([0.1, 0.02, 0.5], dtype=torch.float64)
    w, P, B_c, _ = dplr.nplr("legt", 6)
    A, B = hippo.transition("legs", 5)
    for system, gain in ((A, B), (w, B_c)):
        A_bar, B_bar = FUNCTIONS[name](system, gain, dt)
        for t, step in enumerate(dt.tolist()):
            one_A, one_B = FUNCTIONS[name](system, gain, step)
            close(A_bar[t], one_A)
            close(B_bar[..., t, :], one_B)
    A_bar, B_bar = FUNCTIONS[name](dplr.DPLR(w, P), B_c, dt)
    one_A, one_B = FUNCTIONS[name](dplr.DPLR(w, P), B_c, 0.5)
    if isinstance(A_bar, dplr.DPLR):
        A_bar, one_A = A_bar.pairs(), one_A.pairs()
    close(A_bar[2], one_A)
    close(B_bar[..., 2, :], one_B)


def test_shapes_in_front_broadcast() -> None:
    A, B = torch.randn(4, 3, dtype=torch.complex128), torch.randn(4, 3, dtype=torch.complex128)
    assert d.zoh(A, B, torch.rand(4))[0].shape == (4, 3)
    assert d.zoh(A, B, torch.rand(7, 1))[1].shape == (7, 4, 3)
    assert d.first_order_hold(A, B, torch.rand(7, 4))[1].shape == (2, 7, 4, 3)
    w, P, B_c, _ = dplr.nplr("legt", 6)
    many = d.bilinear(dplr.DPLR(w.expand(4, 3), P.expand(4, 2, 3)), B_c.expand(4, 3), torch.rand(7, 4))
    assert many[0].w.shape == (7, 4, 3)
    assert many[0].P.shape == (7, 4, 2, 3)
    assert many[1].shape == (7, 4, 3)


def test_golden_kernels() -> None:
    """Bilinear legs (dense and DPLR), S4D by zoh and bilinear."""
    dt, C = 0.1, torch.ones(4, dtype=torch.float64)
    expected = [0.547052, 0.223439, 0.063994, -0.004599, -0.025622, -0.023929]
    A, h = d.bilinear(*hippo.transition("legs", 4), dt)
    kernel = []
    for _ in range(6):
        kernel.append(C @ h)
        h = A @ h
    close(torch.stack(kernel), expected, 1e-6)

    w, P, B, V = dplr.nplr("legs", 4)
    low, z = d.bilinear(dplr.DPLR(w, P), B, dt)
    kernel = []
    for _ in range(6):
        kernel.append(2 * (C.to(V.dtype) @ V @ z).real)
        z = low.apply(z)
    close(torch.stack(kernel), expected, 1e-6)

    A_c, one = torch.tensor([-0.5, -0.5 + math.pi * 1j], dtype=torch.complex128), torch.ones(2)
    for rule, values in (
        (d.zoh, [0.387011, 0.350341, 0.300985, 0.244020]),
        (d.bilinear, [0.385767, 0.349877, 0.301445, 0.245362]),
    ):
        A_bar, B_bar = rule(A_c, one, dt)
        close(2 * (B_bar * A_bar ** torch.arange(4)[:, None]).sum(-1).real, values, 1e-6)


def test_exponential_euler_is_what_selective_scan_computes() -> None:
    t, n = 5, 3
    A, B, C = -torch.rand(1, n, dtype=torch.float64), *torch.randn(2, t, n, dtype=torch.float64)
    u, dt = torch.randn(t, dtype=torch.float64), torch.rand(t, dtype=torch.float64)
    y, state = ops.selective_scan(u[None, :, None], dt[None, :, None], A, B[None], C[None], backend="reference")
    A_bar, B_bar = d.exponential_euler(A.expand(t, n), B, dt)
    h = torch.zeros(n, dtype=torch.float64)
    for k in range(t):
        h = A_bar[k] * h + B_bar[k] * u[k]
        close(y[0, k, 0], C[k] @ h)
    close(state[0, 0], h)


def test_exponential_trapezoidal_is_what_trapezoid_ssd_computes() -> None:
    t, n = 6, 4
    A, blend, dt = -torch.rand(1, dtype=torch.float64), *torch.rand(2, t, dtype=torch.float64)
    B, C, u = torch.randn(n).double(), torch.randn(n).double(), torch.randn(t).double()

    def tokens(x: Tensor) -> Tensor:
        return x.expand(t)[None, :, None]

    y, (_, state, _, _) = ops.trapezoid_ssd(
        tokens(u)[..., None], tokens(dt), tokens(A), tokens(blend),
        B.expand(1, t, 1, n), C.expand(1, t, 1, n), backend="reference",
    )  # fmt: skip
    A_bar, B_bar = d.exponential_trapezoidal(A.expand(n), B, dt, blend=blend)
    h, before = torch.zeros(n, dtype=torch.float64), 0.0
    for k in range(t):
        h = A_bar[k] * h + B_bar[0, k] * u[k] + B_bar[1, k] * before
        before = u[k]
        close(y[0, k, 0, 0], C @ h)
    close(state[0, 0, 0], h)


def test_blend_one_is_mamba_2_and_alpha_half_bilinear() -> None:
    A, B = hippo.transition("legs", 4)
    A_bar, B_bar = d.exponential_trapezoidal(A, B, 0.1, blend=1.0)
    plain = d.exponential_euler(A, B, 0.1)
    close(A_bar, plain[0])
    close(B_bar, torch.stack([plain[1], torch.zeros(4)]))
    close(d.generalized_bilinear(A, B, 0.1)[0], d.bilinear(A, B, 0.1)[0])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients(name: str) -> None:
    z = torch.tensor([[-0.5 + 2j, -1e-3 + 0j, -0.2 - 0.3j]], dtype=torch.complex128)
    B = torch.randn(1, 3, dtype=torch.complex128)
    dt = torch.tensor([0.3, 1.1], dtype=torch.float64)[:, None]
    dense = torch.randn(3, 3, dtype=torch.float64) - torch.eye(3)
    w, P, B_c, _ = dplr.nplr("legs", 4)
    leaves = [x.clone().requires_grad_() for x in (z, B, dt, dense, B[0].real, dt[:, 0], w, P, B_c)]
    assert torch.autograd.gradcheck(FUNCTIONS[name], leaves[:3])
    assert torch.autograd.gradcheck(FUNCTIONS[name], leaves[3:6])

    def low_rank(w: Tensor, P: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, ...]:
        A_bar, B_bar = FUNCTIONS[name](dplr.DPLR(w, P), B, dt)
        return (A_bar.w, A_bar.P, A_bar.right, B_bar) if isinstance(A_bar, dplr.DPLR) else (A_bar, B_bar)

    assert torch.autograd.gradcheck(low_rank, [*leaves[6:], leaves[5]])


def test_gradient_at_zero_is_that_of_the_limit() -> None:
    """d φ₁/dz = ½ and d φ₂/dz = 1/6 there: no NaN from the branch not taken."""
    z = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for function, slope in ((d.phi1, 1 / 2), (d.phi2, 1 / 6)):
        close(torch.autograd.grad(function(z).sum(), z)[0], [slope] * 3)


def test_rules_compile_in_one_graph() -> None:
    """Layers call them in forward."""
    A, B = hippo.diagonal("lin", 8), torch.ones(4)
    w, P, gain, _ = dplr.nplr("legt", 8)
    step = torch.compile(lambda dt: d.zoh(A, B, dt), backend="eager", fullgraph=True)
    close(step(torch.tensor(0.1))[1], d.zoh(A, B, torch.tensor(0.1))[1])
    low = torch.compile(lambda dt: d.bilinear(dplr.DPLR(w, P), gain, dt)[1], backend="eager", fullgraph=True)
    close(low(torch.tensor(0.1)), d.bilinear(dplr.DPLR(w, P), gain, torch.tensor(0.1))[1])


def test_rows_are_validated() -> None:
    with pytest.raises(ValueError, match=r"discretize.mine: taps add up to 1.5 at dt·A = 0, expected 1"):
        d.Exponential("mine", 1, (1, 0, 0, 1))
    with pytest.raises(ValueError, match=r"discretize.mine: order 2 does not fit alpha 0.3"):
        d.Rational("mine", 2, 0.3)
    A, B = torch.full((1,), -2.0), torch.ones(1)
    close(d.discretize(d.Exponential("late", 1, (0, 1, 0, 0)), A, B, 0.5)[1], [0.5 * math.exp(-1)], 1e-7)


A, B = torch.zeros(4, 3), torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: d.zoh([1.0], B, 0.1), "discretize.zoh: A is a list, expected a tensor"),
        (lambda: d.zoh(A.half(), B, 0.1), "discretize.zoh: A is float16"),
        (lambda: d.zoh(A, B.half(), 0.1), "discretize.zoh: B is float16"),
        (lambda: d.zoh(A, B[:, :2], 0.1), r"B has shape \(4, 2\), expected \(…, n\) with n = 3"),
        (lambda: d.zoh(A, B[0], 0.1), r"A has shape \(4, 3\), expected \(…, n, n\) as B has one dimension less"),
        (lambda: d.zoh(A[None], B[0], 0.1), r"B has shape \(3,\), expected \(…, n\) as A's \(1, 4, 3\)"),
        (lambda: d.zoh(torch.tensor(1.0), torch.tensor(1.0), 0.1), r"A has shape \(\)"),
        (lambda: d.zoh(A, B, 0.0), "dt is 0.0, expected a number above 0"),
        (lambda: d.zoh(A, B, torch.ones(1, dtype=torch.long)), "dt is int64"),
        (lambda: d.zoh(A, B, torch.tensor([0.1, 0.1, -0.1, 0.1])), "dt has values that are not above 0"),
        (lambda: d.zoh(A, B, torch.tensor([0.1, 0.1, 0.1, float("nan")])), "dt has values that are not above 0"),
        (
            lambda: d.generalized_bilinear(A, B, 0.1, alpha=1.5),
            "alpha is 1.5, expected a number at least 0 and at most",
        ),
        (lambda: d.exponential_trapezoidal(A, B, 0.1, blend=2.0), "blend is 2.0, expected"),
        (lambda: d.discretize("zoo", A, B, 0.1), "discretize: rule is 'zoo', expected one of 'forward_euler'"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
