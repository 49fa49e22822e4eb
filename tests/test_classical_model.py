"""Models: shapes refused with reasons, series against one dense Gaussian, sampling against quadrature, closed forms."""

from __future__ import annotations

import doctest
import inspect
import itertools
import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, linalg, signal
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils import _pytree as pytree

from stateline import classical, ops
from stateline.classical import components, model, sampled
from stateline.classical.model import StateSpace, check, from_scan, simulate, to_scan, validate
from stateline.classical.sampled import discretize, process_noise

REFERENCE = json.loads((Path(__file__).parent / "data" / "control_reference.json").read_text())
F64 = torch.float64


def close(got: Tensor, expected: Any, atol: float = 1e-10) -> None:
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=0, atol=atol)


def spd(n: int, *lead: int, rank: int | None = None) -> Tensor:
    factor = torch.randn(*lead, n, n if rank is None else rank, dtype=F64)
    return factor @ factor.mT


def some_model(n: int = 3, m: int = 2, p: int = 2, lead: tuple[int, ...] = ()) -> StateSpace:
    B, D = (torch.randn(*lead, rows, p, dtype=F64) if p else None for rows in (n, m))
    A = 0.5 * torch.randn(*lead, n, n, dtype=F64)
    return StateSpace(
        A, B, torch.randn(*lead, m, n, dtype=F64), D, spd(n, *lead), spd(m, *lead), torch.randn(n, dtype=F64), spd(n)
    )


def dense_moments(x: StateSpace, steps: int, u: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and covariance of all of y stacked, from the one matrix that makes it of h[0], every v and every n."""
    n, m = x.A.shape[-1], x.C.shape[-2]

    def at(matrix: Tensor, t: int) -> Tensor:
        return matrix[min(t, len(matrix) - 1)] if matrix.dim() == 3 else matrix

    noises = torch.block_diag(x.P0, *[at(x.Q, t) for t in range(steps)], *[at(x.R, t) for t in range(steps)])
    rows, mean = [], []
    state = torch.eye(n, len(noises), dtype=F64)  # of h[t], in terms of every noise
    centre = x.m0
    for t in range(steps):
        row, seen = at(x.C, t) @ state, at(x.C, t) @ centre
        row[:, n + n * steps + m * t : n + n * steps + m * (t + 1)] += torch.eye(m, dtype=F64)
        state, centre = at(x.A, t) @ state, at(x.A, t) @ centre
        state[:, n + n * t : n + n * (t + 1)] += torch.eye(n, dtype=F64)
        if u is not None and x.B is not None and x.D is not None:
            seen, centre = seen + at(x.D, t) @ u[t], centre + at(x.B, t) @ u[t]
        rows.append(row)
        mean.append(seen)
    whole = torch.cat(rows)
    return torch.cat(mean), whole @ noises @ whole.mT


@pytest.mark.parametrize("module", [model, sampled, components], ids=lambda x: x.__name__.split(".")[-1])
def test_docstrings(module: Any) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 2
    assert found.failed == 0


# ---- checks ----------------------------------------------------------------------------------------------------------

Y = torch.zeros(7, 5, 2, dtype=F64)
U = torch.zeros(5, 2, dtype=F64)


@pytest.mark.parametrize(
    ("change", "y", "error", "words"),
    [
        (dict(A=3), Y, TypeError, r"f: A is a int, expected a tensor \(…, n, n\)"),
        (dict(A=torch.ones(3, 3)), Y, TypeError, r"f: B is float64, expected one of float32\. .*model\.to\(dtype\)"),
        (dict(A=torch.ones(3, 3, dtype=torch.int64)), Y, TypeError, r"f: A is int64, .*to\(torch\.float64\)"),
        (dict(A=torch.ones(3, 2, dtype=F64)), Y, ValueError, r"f: A has shape \(3, 2\), expected \(…, n, n\)"),
        (dict(m0=torch.tensor(1.0, dtype=F64)), Y, ValueError, r"f: m0 has shape \(\), expected \(…, n\)"),
        (dict(C=torch.ones(2, 4, dtype=F64)), Y, ValueError, r"f: C has shape \(2, 4\), .* n = 3 \(set by A\)"),
        (dict(D=torch.ones(2, 1, dtype=F64)), Y, ValueError, r"f: D has shape \(2, 1\), .* p = 2 \(set by B\)"),
        (
            dict(Q=torch.ones(4, 3, 3, dtype=F64)),
            Y,
            ValueError,
            r"f: Q has shape \(4, 3, 3\), expected 5 steps of time",
        ),
        (dict(m0=torch.ones(6, 3, dtype=F64)), Y, ValueError, r"whose series \(.*\) do not broadcast with \(.*\)"),
        ({}, Y.float(), TypeError, r"f: y is float32, expected one of float64"),
        ({}, Y[..., 0, 0], ValueError, r"f: y has shape \(7,\), expected \(…, T, m\)"),
        (dict(B=None, D=None), Y, ValueError, r"f: u has shape \(5, 2\), .* p = 0 \(set by a model with neither"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], y: Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check("f", some_model()._replace(**change), y, U)


@pytest.mark.parametrize(
    ("model", "y", "words"),
    [
        (some_model(), Y.numpy(), r"y is a ndarray, .*T, m\)\. torch\.as_tensor\(y, dtype=torch\.float64\) makes one"),
        (some_model(), [[1.0, 2.0]], r"y is a list, .* torch\.as_tensor\(y, "),
        (some_model(), Y.long(), r"y is int64, expected one of float64\. .*: y\.to\(model\.A\.dtype\)"),
        (tuple(some_model()), Y, r"the model is a tuple, expected a StateSpace\. A NonlinearModel goes to extended"),
    ],
)
def test_what_is_of_another_kind_is_refused_with_the_remedy(model: Any, y: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        check("f", model, y, U)


def test_shapes_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"y has shape \(5,\), .*\. One value a step is y\[:, None\]\."):
        check("f", some_model(), Y[0, :, 0], U)
    each = some_model()._replace(R=torch.ones(7, 2, 2, dtype=F64))
    with pytest.raises(ValueError, match=r"R has .* 5 steps .*\. One matrix a series is \(N, 1, 2, 2\)\."):
        check("f", each, Y, U)
    assert check("f", each._replace(R=each.R[:, None]), Y, U).batch == (7,)


def test_inputs_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"f: u is None, expected .* p = 2 \(set by B\)\. Zeros are given as zeros"):
        check("f", some_model(), Y)


def test_sizes_broadcast() -> None:
    x = some_model()
    assert check("f", x, Y, U) == (3, 2, 2, (7,), 5)
    assert check("f", x) == (3, 2, 2, (), None)
    varying = x._replace(A=x.A.expand(5, 3, 3), Q=x.Q.expand(7, 1, 3, 3), P0=x.P0.expand(4, 1, 3, 3))
    assert check("f", varying) == (3, 2, 2, (4, 7), 5)
    assert check("f", x, Y[:, :0], U[:0]).steps == 0


def test_a_model_is_a_pytree() -> None:
    x = some_model()
    doubled = pytree.tree_map(lambda leaf: 2 * leaf, x)
    assert isinstance(doubled, StateSpace)
    close(doubled.Q, 2 * x.Q)
    assert x._replace(B=None).to(torch.float32).R.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(Q=torch.diag(torch.tensor([1.0, 1.0, -0.5], dtype=F64))), r"Q has the eigenvalue -0\.5, expected none"),
        (dict(R=torch.tensor([[1.0, 0.3], [0.2, 1.0]], dtype=F64)), r"R is not symmetric, by up to 0\.1"),
        (dict(A=torch.full((3, 3), math.nan, dtype=F64)), r"A has values that are not finite"),
    ],
)
def test_values_are_checked_on_demand(change: dict[str, Tensor], words: str) -> None:
    assert validate(some_model()) == check("validate", some_model())
    assert validate(some_model()._replace(Q=spd(3, rank=1), R=torch.zeros(2, 2, dtype=F64)))
    with pytest.raises(ValueError, match=words):
        validate(some_model()._replace(**change))


# ---- simulation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("rank", [3, 1])
def test_series_have_the_moments_of_the_stacked_gaussian(varying: bool, rank: int) -> None:
    steps, count = 4, 40_000
    x = some_model(lead=(steps,) if varying else ())._replace(Q=spd(3, rank=rank), R=0.1 * spd(2))
    u = torch.randn(steps, 2, dtype=F64)
    h, y = simulate(x, steps, u, batch=count)
    assert h.shape == (count, steps, 3)
    flat = y.flatten(1)
    mean, cov = dense_moments(x, steps, u)
    deviation = cov.diagonal().sqrt()
    assert ((flat.mean(0) - mean).abs() / deviation).max() < 5 / math.sqrt(count)
    error = (torch.cov(flat.mT) - cov) / torch.outer(deviation, deviation)
    assert error.abs().max() < 6 / math.sqrt(count)
    close(simulate(x, steps, u, noise=False)[1].flatten(), mean)


def test_simulation_is_of_the_generator_and_has_gradients() -> None:
    x = some_model()
    u = torch.randn(4, 2, dtype=F64)
    one, two = (simulate(x, 4, u, generator=torch.Generator().manual_seed(3), batch=2)[1] for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one[0], one[1])

    def run(A: Tensor, B: Tensor, C: Tensor, D: Tensor, m0: Tensor, u: Tensor) -> Tensor:
        changed = x._replace(A=A, B=B, C=C, D=D, m0=m0)
        return simulate(changed, 4, u, generator=torch.Generator().manual_seed(3))[1]

    assert x.B is not None
    assert x.D is not None
    inputs = [v.clone().requires_grad_() for v in (x.A, x.B, x.C, x.D, x.m0, u)]
    assert gradcheck(run, inputs)


def test_simulation_of_series_that_differ() -> None:
    x = some_model(lead=(3, 1))._replace(Q=torch.zeros(3, 3, dtype=F64), P0=torch.zeros(3, 3, dtype=F64))
    u = torch.randn(3, 6, 2, dtype=F64)
    h, _ = simulate(x, 6, u)
    for i in range(3):
        alone = StateSpace(*(v if v is None or v.dim() < 4 else v[i, 0] for v in x))  # type: ignore[arg-type]  # eight parts in order
        close(h[i], simulate(alone, 6, u[i])[0])
    assert simulate(x, 0, u[:, :0])[1].shape == (3, 0, 2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: simulate(x, -1), r"simulate: steps is -1, expected a whole number at least 0"),
        (lambda x: simulate(x, 5), r"simulate: u is None, expected"),
        (lambda x: simulate(x, 5, U[:4]), r"simulate: u has shape \(4, 2\), expected 5 steps of time \(set by steps\)"),
        (lambda x: simulate(x._replace(Q=-x.Q), 5, U), r"simulate: Q has the eigenvalue"),
        (lambda x: simulate(x._replace(A=x.A.expand(2, 1, 3, 3)), 5, U, batch=3), r"simulate: batch is 3, which does"),
    ],
)
def test_simulation_refuses(call: Callable[[StateSpace], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(some_model())


# ---- the other indexing ----------------------------------------------------------------------------------------------


def test_scan_indexing_gives_the_same_outputs() -> None:
    a = torch.tensor([0.9, 0.5, -0.3], dtype=F64)
    B, C, D = torch.randn(3, 1, dtype=F64), torch.randn(2, 3, dtype=F64), torch.randn(2, 1, dtype=F64)
    u, before = torch.randn(1, 20, 1, dtype=F64), torch.randn(1, 3, dtype=F64)
    h, _ = ops.linear_scan(a, u @ B.mT, initial_state=before)
    expected = h @ C.mT + u @ D.mT
    A2, B2, C2, D2 = from_scan(torch.diag(a), B, C, D)
    x = StateSpace(A2, B2, C2, D2, spd(3), spd(2), before[0], spd(3))
    close(simulate(x, 20, u, noise=False)[1], expected, 1e-13)
    for got, wanted in zip(to_scan(A2, B2, C2, D2), (torch.diag(a), B, C, D), strict=True):
        close(got, wanted, 1e-13)
    close(from_scan(torch.diag(a), B, C)[3], C @ B)
    close(to_scan(A2, B2, C2)[3], -C @ B, 1e-13)


def test_what_a_singular_matrix_forgets_has_no_scan_form() -> None:
    with pytest.raises(ValueError, match=r"to_scan: A is singular .* Feed the recurrence u\[t-1\]"):
        to_scan(torch.zeros(2, 2), torch.ones(2, 1), torch.ones(1, 2))


# ---- discretisation --------------------------------------------------------------------------------------------------


def test_reference_values_of_sampling() -> None:
    z, noise = REFERENCE["zoh"], REFERENCE["process_noise"]
    Ac, Bc, L = (torch.tensor(v, dtype=F64) for v in (z["Ac"], z["Bc"], noise["L"]))
    got = sampled.discretize(Ac, Bc, z["dt"], noise["qc"] * L @ L.mT)
    assert got.B is not None
    assert got.Q is not None
    close(got.A, z["A"])
    close(got.B, z["B"])
    close(got.Q, noise["Qd"])
    tustin = sampled.discretize(Ac, Bc, z["dt"], method="bilinear")
    assert tustin.B is not None
    close(tustin.A, z["bilinear_A"])
    close(tustin.B, z["bilinear_B"])


@pytest.mark.parametrize("method", sampled.METHODS)
def test_every_rule_beside_scipy(method: str) -> None:
    Ac, Bc = torch.randn(3, 3, dtype=F64), torch.randn(3, 2, dtype=F64)
    theirs = {"forward_euler": "euler", "backward_euler": "backward_diff"}.get(method, method)
    got = sampled.discretize(Ac, Bc, 0.3, method=method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        A, B, *_ = signal.cont2discrete((Ac.numpy(), Bc.numpy(), np.eye(3), np.zeros((3, 2))), 0.3, method=theirs)
    assert got.B is not None
    close(got.A, A, 1e-12)
    close(got.B, B, 1e-12)
    assert got.Q is None


@pytest.mark.parametrize("kind", ["general", "singular", "nilpotent", "stiff", "oscillating", "unstable"])
def test_process_noise_is_the_integral(kind: str) -> None:
    A = {
        "general": torch.randn(3, 3, dtype=F64),
        "singular": torch.randn(3, 2, dtype=F64) @ torch.randn(2, 3, dtype=F64),
        "nilpotent": torch.diag(torch.ones(2, dtype=F64), 1),
        "stiff": torch.tensor([[-2000.0, 3.0, 0.0], [0.0, -0.1, 1.0], [0.0, 0.0, 0.0]], dtype=F64),
        "oscillating": torch.tensor([[0.0, 9.0, 0.0], [-9.0, 0.0, 1.0], [0.0, 0.0, -1.0]], dtype=F64),
        "unstable": torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=F64)),
    }[kind]
    Q, dt = spd(3), 1.5

    def at(s: float) -> np.ndarray:
        grown = linalg.expm(A.numpy() * s)
        return grown @ Q.numpy() @ grown.T

    edges = [0.0, 0.001, 0.01, dt] if kind == "stiff" else [0.0, dt]
    expected = sum(integrate.quad_vec(at, a, b, epsabs=1e-13, epsrel=1e-12)[0] for a, b in itertools.pairwise(edges))
    got = process_noise(A, Q, dt)
    close(got / np.abs(expected).max(), expected / np.abs(expected).max(), 1e-11)
    assert torch.linalg.eigvalsh(got)[0] > 0


def test_a_precise_step_keeps_its_digits() -> None:
    """dt³/3 beside dt: nothing is lost to the larger entries."""
    dt = 1e-5
    got = process_noise(
        torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=F64), torch.diag(torch.tensor([0.0, 1.0])).to(F64), dt
    )
    expected = torch.tensor([[dt**3 / 3, dt**2 / 2], [dt**2 / 2, dt]], dtype=F64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 2.0), st.floats(0.01, 2.0), st.integers(0, 10_000), st.integers(1, 4))
def test_two_steps_are_one(first: float, second: float, seed: int, n: int) -> None:
    g = torch.Generator().manual_seed(seed)
    Ac, Bc, L = (torch.randn(n, k, dtype=F64, generator=g) for k in (n, 2, n))
    a = sampled.discretize(Ac, Bc, torch.tensor([first, second], dtype=F64), L @ L.mT)
    b = sampled.discretize(Ac, Bc, first + second, L @ L.mT)
    assert a.B is not None
    assert b.B is not None
    assert a.Q is not None
    assert b.Q is not None
    for got, expected in (
        (a.A[1] @ a.A[0], b.A),
        (a.A[1] @ a.B[0] + a.B[1], b.B),
        (a.A[1] @ a.Q[0] @ a.A[1].mT + a.Q[1], b.Q),
    ):
        close(got / expected.abs().max(), expected / expected.abs().max(), 1e-12)


def test_a_step_does_not_depend_on_the_steps_beside_it() -> None:
    torch.manual_seed(0)
    Ac, Bc, Qc = torch.randn(4, 4, dtype=F64), torch.randn(4, 2, dtype=F64), spd(4)
    dt = torch.tensor([1e-3, 0.3, 0.7, 2.0, 5.0], dtype=F64)
    alone = [discretize(Ac, Bc, dt[:i], Qc) for i in range(1, 6)]
    for shorter in alone[:-1]:
        for got, wanted in zip(shorter, alone[-1], strict=True):
            assert torch.equal(got, wanted[: len(got)])


def test_irregular_steps_of_several_systems() -> None:
    dt = torch.rand(4, 6, dtype=F64) + 0.1
    Ac, Bc, Qc = torch.randn(4, 1, 3, 3, dtype=F64), torch.randn(3, 2, dtype=F64), spd(3)
    got = sampled.discretize(Ac, Bc, dt, Qc)
    assert got.B is not None
    assert got.Q is not None
    assert got.A.shape == got.Q.shape == (4, 6, 3, 3)
    alone = sampled.discretize(Ac[2, 0], Bc, float(dt[2, 5]), Qc)
    assert alone.B is not None
    assert alone.Q is not None
    close(got.A[2, 5], alone.A, 1e-12)
    close(got.B[2, 5], alone.B, 1e-12)
    close(got.Q[2, 5], alone.Q, 1e-11)


def test_sampling_has_gradients() -> None:
    Ac, Bc, L = torch.randn(2, 2, dtype=F64), torch.randn(2, 1, dtype=F64), torch.randn(2, 2, dtype=F64)
    dt = torch.tensor([0.3, 1.7], dtype=F64)
    inputs = [v.requires_grad_() for v in (Ac, Bc, dt, L)]
    assert gradcheck(lambda a, b, t, f: tuple(sampled.discretize(a, b, t, f @ f.mT)), inputs)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda A: sampled.discretize(A, None, 0.0), r"dt is 0\.0, expected a number above 0"),
        (lambda A: sampled.discretize(A, None, 1.0, method="foh"), r"discretize: method is 'foh', expected one of"),
        (lambda A: sampled.discretize(A, A[:1], 1.0), r"discretize: Bc has shape \(1, 2\), .* n = 2 \(set by Ac\)"),
        (lambda A: sampled.discretize(A, None, 1.0, A.float()), r"discretize: Qc is float32"),
        (
            lambda A: sampled.discretize(A, None, 1.0, -torch.eye(len(A), dtype=F64)),
            r"discretize: Qc has the variance -1,",
        ),
    ],
)
def test_sampling_refuses(call: Callable[[Tensor], Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        call(torch.eye(2, dtype=F64))


def test_types_that_signatures_name_can_be_imported_beside_the_functions() -> None:
    """As whoever annotates a function that takes or keeps them does; so can those of fields and attributes."""
    places: list[tuple[str, Any, dict[str, Any]]] = []
    for name in classical.__all__:
        whole = getattr(classical, name)
        if not inspect.isclass(whole):
            places.append((name, whole, inspect.get_annotations(whole) if inspect.isfunction(whole) else {}))
            continue
        places.append((name, whole, inspect.get_annotations(whole)))
        for key, f in vars(whole).items():
            f = f.fget if isinstance(f, property) else getattr(f, "__func__", f)
            if inspect.isfunction(f) and (key == "__init__" or not key.startswith("_")):
                places.append((f"{name}.{key}", whole, inspect.get_annotations(f)))
    assert len(places) > 100
    for place, whole, named in places:
        known = vars(inspect.getmodule(whole) or object)
        public = [x for key, x in named.items() if not key.startswith("_")]
        texts = [x if isinstance(x, str) else getattr(x, "__forward_arg__", repr(x)) for x in public]
        for name in re.findall(r"[A-Za-z]\w*", " ".join(texts)):
            found = known.get(name)
            ours = "stateline." in f"{getattr(found, '__module__', '')} {found}"  # a union has no module of its own
            if ours and name != "Progress" and not inspect.ismodule(found):  # an alias: a function of three arguments
                assert name in classical.__all__, f"{place} says {name}"
                assert getattr(classical, name) is found
    assert isinstance(classical.KalmanState(torch.zeros(1), torch.eye(1)), classical.State)
