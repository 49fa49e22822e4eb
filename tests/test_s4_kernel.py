"""The Vandermonde and Cauchy products against their formulas, which hold every state at every step."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from stateline import backends, ops

F64, C128 = torch.float64, torch.complex128
BACKENDS = ["reference", "cpu"] if backends.native_problem() is None else ["reference"]
#: The published bounds of float32 and float64 (docs/numerics.md).
BOUND = {torch.complex64: 2e-5, C128: 1e-11}


def poles(h: int, n: int, dt_max: float = 0.1) -> Tensor:
    """Δ·A of systems as layers have them: slow decays, many turns."""
    dt = dt_max * torch.rand(h, 1, dtype=F64) + 1e-3
    return dt * torch.complex(-0.1 - torch.rand(h, n, dtype=F64), torch.pi * torch.arange(n, dtype=F64).expand(h, n))


def vandermonde(c: Tensor, z: Tensor, length: int) -> Tensor:
    return 2 * torch.einsum("rhn,hnl->rhl", c, torch.exp(z[..., None] * torch.arange(length))).real


def cauchy(v: Tensor, w: Tensor, length: int) -> Tensor:
    phi = torch.arange(length // 2 + 1, dtype=F64) * torch.pi / length
    node, cosine = 2j * phi.sin(), phi.cos()
    terms = (v[..., None] / (node - w[..., None] * cosine), v.conj()[..., None] / (node - w.conj()[..., None] * cosine))
    return sum(term.sum(-2) for term in terms)  # type: ignore[return-value]  # two tensors


def near(got: Tensor, want: Tensor, bound: float) -> None:
    assert got.shape == want.shape
    assert torch.isfinite(torch.view_as_real(got) if got.is_complex() else got).all()
    if want.numel():
        assert ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item() <= bound


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize(("r", "h", "n"), [(1, 1, 1), (2, 3, 5), (3, 2, 16), (1, 5, 33), (1, 2, 64)])
def test_kernels_and_gradients(backend: str, dtype: torch.dtype, r: int, h: int, n: int) -> None:
    z = poles(h, n).requires_grad_()
    c = torch.randn(r, h, n, dtype=dtype).requires_grad_()
    exact = c.detach().to(C128).requires_grad_(), z.detach().clone().requires_grad_()
    for length in (0, 1, 2, 17, 127, 128, 129, 700):
        got, want = ops.s4_kernel(c, z, length, backend=backend), vandermonde(*exact, length)
        assert got.dtype == (F64 if dtype == C128 else torch.float32)
        near(got, want, BOUND[dtype])
        g = torch.randn_like(got)
        for a, b in zip(torch.autograd.grad(got, (c, z), g), torch.autograd.grad(want, exact, g.double()), strict=True):
            near(a, b, BOUND[dtype])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("r", "h", "n"), [(1, 1, 1), (4, 3, 5), (5, 2, 16), (9, 1, 33)])
def test_cauchy_products_and_gradients(backend: str, r: int, h: int, n: int) -> None:
    v, w = torch.randn(r, h, n, dtype=C128).requires_grad_(), poles(h, n).requires_grad_()
    for length in (1, 2, 3, 16, 17, 200, 401):
        got, want = ops.s4_cauchy(v, w, length, backend=backend), cauchy(v, w, length)
        near(got, want, 1e-11)
        g = torch.randn_like(got)
        for a, b in zip(torch.autograd.grad(got, (v, w), g), torch.autograd.grad(want, (v, w), g), strict=True):
            near(a, b, 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_one_is_a_node_like_any_other(backend: str) -> None:
    """At ω = −1 the bilinear node is infinite; the product times 2/(1 + ω) is ½ Σ v there, from the formula's limit."""
    v, w = torch.randn(1, 2, 6, dtype=C128), poles(2, 6)
    last = ops.s4_cauchy(v, w, 8, backend=backend)[..., -1]
    assert torch.allclose(1j * last, v.real.sum(-1) + 0j, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_float32_kernels_are_as_exact_as_short_ones(backend: str) -> None:
    """A float32 phase is wrong by a rounding of l times the angle: 1e-3 at 16,384 steps of a radian."""
    z = torch.complex(torch.full((1, 8), -1e-5, dtype=F64), torch.linspace(0.1, 3, 8, dtype=F64)[None])
    c = torch.randn(1, 1, 8, dtype=torch.complex64)
    got = ops.s4_kernel(c, z, 16384, backend=backend)
    near(got[..., -100:], vandermonde(c.to(C128), z, 16384)[..., -100:], 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_opcheck_and_compile(backend: str) -> None:
    c, z, v = (torch.randn(s, dtype=C128) * 0.5 for s in ((2, 3, 4), (3, 4), (2, 3, 4)))
    z = torch.complex(-z.real.abs() - 0.1, z.imag).requires_grad_()
    c, v = c.requires_grad_(), v.requires_grad_()
    assert torch.autograd.gradcheck(lambda c, z: ops.s4_kernel(c, z, 9, backend=backend), (c, z))
    assert torch.autograd.gradcheck(lambda v, z: ops.s4_cauchy(v, z, 6, backend=backend), (v, z))
    raw = torch.ops.stateline
    checked = ("test_schema", "test_faketensor")
    plain, poles_ = c.detach(), z.detach()
    torch.library.opcheck(raw.s4_kernel.default, (plain, poles_, 9, backend), test_utils=checked)
    torch.library.opcheck(
        raw.s4_kernel_backward.default, (torch.randn(2, 3, 9, dtype=F64), plain, poles_, backend), test_utils=checked
    )
    real = [torch.randn(2, 3, 4, dtype=F64), torch.randn(2, 3, 4, dtype=F64), -torch.rand(3, 4, dtype=F64)]
    real += [torch.rand(3, 4, dtype=F64) + 1, torch.rand(5, dtype=F64), torch.rand(5, dtype=F64)]
    torch.library.opcheck(raw.s4_cauchy.default, (*real, backend), test_utils=checked)
    back = (torch.randn(2, 3, 5, 2, dtype=F64), *real, backend)
    torch.library.opcheck(raw.s4_cauchy_backward.default, back, test_utils=checked)
    compiled = torch.compile(lambda c, z: ops.s4_kernel(c, z, 50, backend=backend), backend="eager", fullgraph=True)
    assert torch.equal(compiled(c, z), ops.s4_kernel(c, z, 50, backend=backend))
    (g,) = torch.autograd.grad(ops.s4_kernel(c, z, 9, backend=backend).square().sum(), c, create_graph=True)
    with pytest.raises(RuntimeError, match="s4_kernel: a second derivative"):
        g.abs().sum().backward()


def test_the_matrix_of_states_and_steps_is_never_held() -> None:
    """Peak memory of a process that makes and differentiates a kernel, beside what the matrix alone would take."""
    h, n, length = 64, 32, 16384
    code = (
        "import resource, torch; from stateline import ops; torch.set_num_threads(1)\n"
        f"z = torch.complex(-torch.rand({h}, {n}).double(), torch.randn({h}, {n}).double()).requires_grad_()\n"
        f"c = torch.randn(1, {h}, {n}, dtype=torch.complex64).requires_grad_()\n"
        "ops.s4_kernel(c, z, 128).sum().backward(); a = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"ops.s4_kernel(c, z, {length}).sum().backward(); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - a)"
    )
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(grown) * unit <= h * n * length * 8 / 10


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"c": torch.ones(1, 2, 3)}, TypeError, "c is float32, expected one of complex64, complex128"),
        ({"z": torch.ones(2, 3, dtype=torch.complex64)}, TypeError, "z is complex64.*compute it in double"),
        ({"z": torch.ones(2, 4, dtype=C128)}, ValueError, r"z has shape \(2, 4\)"),
        ({"length": -1}, ValueError, "length is -1"), ({"length": 2.0}, TypeError, "length is 2.0"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"c": torch.ones(1, 2, 3, dtype=torch.complex64), "z": torch.ones(2, 3, dtype=C128), "length": 4}
    with pytest.raises(error, match=f"^s4_kernel: .*{message}"):
        ops.s4_kernel(**(given | change))
    with pytest.raises(TypeError, match=r"^s4_cauchy: v is complex64"):
        ops.s4_cauchy(given["c"], given["z"], 4)
