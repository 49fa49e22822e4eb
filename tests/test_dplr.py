"""HiPPO matrices as a diagonal and a few rows: against the matrices themselves, published numbers, dense algebra."""

from __future__ import annotations

import pytest
import torch

from stateline.theory import dplr, hippo

NORMAL = [name for name, row in hippo.MEASURES.items() if row.rows is not None]


def close(got: torch.Tensor, expected: torch.Tensor | list[float] | list[complex], atol: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=got.dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("n", [2, 8, 64])
@pytest.mark.parametrize("measure", NORMAL)
def test_the_matrix_comes_back(measure: str, n: int) -> None:
    A, B = hippo.transition(measure, n)
    w, P, B_c, V = dplr.nplr(measure, n)
    scale = float(A.abs().max())
    close(dplr.dense(w, P, V), A, 1e-13 * scale * n)
    close(2 * (V @ B_c).real, B, 1e-13 * n)
    basis = torch.cat([V, V.conj()], 1)
    close(basis.mH @ basis, torch.eye(n, dtype=torch.complex128))
    assert (w.imag <= 0).all()
    assert (w.imag.diff() >= 0).all()
    assert (w.real == w.real[0]).all()
    assert w.real[0] <= 0
    assert (B_c.imag == 0).all()  # phases are fixed, whatever LAPACK does
    assert (B_c.real >= 0).all()


def test_golden_values() -> None:
    w, P, B, _ = dplr.nplr("legs", 4)
    close(w, torch.complex(torch.tensor(-0.5).expand(2), torch.tensor([-4.603293, -0.556501])), 1e-6)
    close(P[0].abs() ** 2, [3.532522, 0.467478], 1e-6)
    close(B.abs() ** 2, [7.065044, 0.934956], 1e-6)
    close(dplr.nplr("legt", 4)[0].imag, [-3.602392, -1.422243], 1e-6)
    close(dplr.nplr("legs", 64)[2].abs().max(), 40.75, 5e-3)


def test_diagonal_initialisers() -> None:
    close(hippo.diagonal("inv", 8).imag, [-17.825354, -4.244132, -1.527887, -0.363783], 1e-6)
    pi = torch.pi
    close(hippo.diagonal("lin", 6), [-0.5, -0.5 - pi * 1j, -0.5 - 2 * pi * 1j])
    close(hippo.diagonal("inv2", 4).imag, [-12 / pi, -4 / pi])
    close(hippo.diagonal("quad", 4).imag, [-1 / pi, -9 / pi])
    close(hippo.diagonal("real", 6), torch.tensor([-1, -2, -3], dtype=torch.complex128))
    close(hippo.diagonal("legs", 8), dplr.nplr("legs", 8)[0])
    for init in hippo.INITS:
        A = hippo.diagonal(init, 8)
        assert A.dtype == torch.complex128
        assert A.shape == (4,)
        assert (A.real < 0).all()
        assert (A.imag <= 0).all()


def test_rand_follows_its_generator() -> None:
    def draw(seed: int) -> torch.Tensor:
        return hippo.diagonal("rand", 8, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("measure", ["fourier", "fourier2", "foud"])
def test_the_wave_that_does_not_turn_keeps_its_place(measure: str) -> None:
    """Two zero eigenvalues (or −½ ± 0i): what is kept must still span constants together with its conjugate."""
    w, _, B, V = dplr.nplr(measure, 8)
    assert w.imag[-1] == 0
    assert B[-1].abs() > 0.1
    constant = torch.zeros(8, dtype=torch.complex128)
    constant[0] = 1
    close(2 * (V @ (V.mH @ constant)).real, constant.real)


def test_rank_is_filled_with_zeros_and_never_cut() -> None:
    _, P, _, _ = dplr.nplr("legs", 8, rank=3)
    assert P.shape == (3, 4)
    assert (P[1:] == 0).all()
    assert dplr.nplr("legt", 8)[1].shape == (2, 4)
    assert dplr.nplr("legsd", 8)[1].shape == (0, 4)
    with pytest.raises(ValueError, match=r"rank is 1, expected at least 2 for measure 'legt'"):
        dplr.nplr("legt", 8, rank=1)


def test_clip_bounds_what_it_changes() -> None:
    B, clipped = dplr.nplr("legs", 64)[2], dplr.nplr("legs", 64, clip=2.0)[2]
    assert clipped.abs().max() <= 2 + 1e-12
    assert torch.equal(clipped[B.abs() <= 2], B[B.abs() <= 2])


def test_a_matrix_of_ones_own() -> None:
    """A row is validated: rows that do not make A normal are refused."""
    matrices = hippo.MEASURES["legs"].matrices
    with pytest.raises(ValueError, match="hippo: measure mine: A \\+ PᵀP is not normal"):
        hippo.Measure("mine", matrices, lambda n: torch.ones(1, n, dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dplr.nplr("legs", 7), r"dplr.nplr: n is 7, expected an even number"),
        (lambda: dplr.nplr("lmu", 8), r"'lmu' has no low-rank correction .* Take legt"),
        (lambda: dplr.nplr(hippo.generalized_laguerre(0.5), 8), r"'glagt' has no low-rank .* alpha = 0"),
        (lambda: dplr.nplr("legz", 8), r"dplr.nplr: measure is 'legz', expected one of 'legs'"),
        (lambda: dplr.nplr("legs", 8, clip=0.0), r"clip is 0.0, expected a number above 0"),
        (lambda: hippo.diagonal("legt", 8), r"hippo.diagonal: init is 'legt', expected one of 'lin'"),
        (lambda: hippo.diagonal("lin", 5), r"hippo.diagonal: n is 5, expected an even number"),
        (lambda: hippo.transition("legs", 0), r"hippo.transition: n is 0"),
        (lambda: dplr.DPLR(torch.zeros(4).cfloat(), torch.zeros(3).cfloat()), r"DPLR: P has shape \(3,\)"),
        (lambda: dplr.DPLR(torch.zeros(4), torch.zeros(1, 4)), r"DPLR: w and P are expected complex"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_apply_is_the_dense_matrix() -> None:
    w, P, _, V = dplr.nplr("legt", 8)
    A = dplr.DPLR(w, P)
    z = torch.randn(3, 4, dtype=torch.complex128)
    full = dplr.pairs(z) @ A.pairs().mT
    close(dplr.pairs(A.apply(z)), full)
    basis = torch.cat([V, V.conj()], 1)
    close((basis @ A.pairs() @ basis.mH).real, hippo.transition("legt", 8)[0])
