"""kalman on every back end against one Gaussian of all states and observations: values, gradients, pieces, steps."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise as neighbours
from typing import Any

import pytest
import torch
from oracles import JointGaussian, pairwise
from test_ops import BACKENDS, name_of
from torch import Tensor

from stateline import ops
from stateline.backends import explain
from stateline.ops.kalman import Filtered, KalmanState, SquareRootState, State, square_root, step

RAW = torch.ops.stateline
FORMS = ["joseph", "sqrt"]
#: Largest error over largest value: values and gradients, against float64 on the same rounded inputs.
BOUND = {torch.float64: (1e-11, 1e-9), torch.float32: (2e-5, 2e-4)}
GRID = {
    "backend": BACKENDS, "dtype": list(BOUND), "form": FORMS, "N": [1, 2, 9], "t": [0, 1, 2, 7, 12],
    "n": [1, 2, 3, 4, 6, 9], "m": [1, 2, 3, 5], "A": ["one", "time", "series", "both"],
    "noise": ["one", "time", "series", "both"], "gaps": ["none", "same", "own", "all"],
    "offsets": ["none", "one", "both"], "start": ["one", "own"],
}  # fmt: skip
USUAL: dict[str, Any] = {
    "backend": None, "dtype": torch.float64, "form": "joseph", "N": 3, "t": 6, "n": 3, "m": 2, "A": "one",
    "noise": "one", "gaps": "own", "offsets": "one", "start": "own",
}  # fmt: skip


@dataclass
class Problem:
    """Leaves of a call, and how to run the operation and the oracle on them."""

    leaves: dict[str, Tensor]
    setting: dict[str, Any]

    def run(self, x: dict[str, Tensor], **options: Any) -> tuple[Filtered, State]:
        N, form = x["y"].shape[0], self.setting["form"]
        start = KalmanState(x["m0"], symmetric(x["P0"]).expand(N, *x["P0"].shape[1:]))
        noise = [symmetric(x[k]) for k in "QR"]
        offsets = {"transition_offset": x.get("b"), "observation_offset": x.get("d")}
        options = {"form": form, "backend": self.setting["backend"]} | options
        return ops.kalman(x["y"], x["A"], x["C"], *noise, start, **offsets, **options)

    def outputs(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        out, state = self.run(x)
        found = dict(zip(Filtered._fields[:5], out[:5], strict=True))
        return found | {"mean_next": state.mean, "cov_next": state.cov}  # type: ignore[return-value]  # all kept

    def exact(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same by conditioning."""
        (N, T, m), n = x["y"].shape, x["m0"].shape[1]

        def of(name: str, i: int, *tail: int) -> Tensor:
            v = x.get(name, torch.zeros(1, 1, *tail, dtype=torch.float64))
            v = symmetric(v) if name in "QR" else v
            return v.expand(N, T, *tail)[i]

        rows: dict[str, list[Tensor]] = {}
        for i in range(N):
            P0 = symmetric(x["P0"].expand(N, n, n)[i])
            parts = (of("A", i, n, n), of("C", i, m, n), of("Q", i, n, n), of("R", i, m, m))
            joint = JointGaussian.of(x["y"][i], *parts, x["m0"][i], P0, of("b", i, n), of("d", i, m))
            filtered = [joint.state(t, t + 1) for t in range(T)]
            predicted = [joint.state(t, t) for t in range(T + 1)]
            ends = [joint.loglik(t) for t in range(T + 1)]
            found = {
                "mean": [v[0] for v in filtered], "cov": [v[1] for v in filtered],
                "predicted_mean": [v[0] for v in predicted[:T]], "predicted_cov": [v[1] for v in predicted[:T]],
                "loglik": [b - a for a, b in neighbours(ends)],
            }  # fmt: skip
            for name, values in found.items():
                tail = {"mean": (n,), "cov": (n, n)}.get(name.removeprefix("predicted_"), ())
                empty = torch.zeros(0, *tail, dtype=torch.float64)
                rows.setdefault(name, []).append(torch.stack(values) if values else empty)
            for name, value in zip(("mean_next", "cov_next"), predicted[T], strict=True):
                rows.setdefault(name, []).append(value)
        return {name: torch.stack(values) for name, values in rows.items()}


def symmetric(v: Tensor) -> Tensor:
    return (v + v.mT) / 2


def problem(s: dict[str, Any]) -> Problem:
    N, T, n, m, dtype = (s[k] for k in ("N", "t", "n", "m", "dtype"))

    def lead(kind: str) -> tuple[int, int]:
        return (N if kind in ("series", "both") else 1, T if kind in ("time", "both") else 1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    def covariance(*shape: int) -> Tensor:
        M = draw(*shape, shape[-1])
        return M @ M.mT / shape[-1] + 0.3 * torch.eye(shape[-1], dtype=torch.float64)

    x = {"y": draw(N, T, m), "A": draw(*lead(s["A"]), n, n) * 0.6 / n**0.5, "C": draw(*lead(s["noise"]), m, n)}
    x |= {"Q": covariance(*lead(s["noise"]), n), "R": covariance(*lead(s["noise"]), m), "m0": draw(N, n)}
    x["P0"] = covariance(N if s["start"] == "own" else 1, n)
    if s["offsets"] != "none":
        x |= {"b": draw(*lead(s["offsets"]), n), "d": draw(*lead(s["offsets"]), m)}
    if s["gaps"] != "none":
        holes = torch.rand(1 if s["gaps"] == "same" else N, T, m) < (1.1 if s["gaps"] == "all" else 0.4)
        x["y"] = torch.where(holes, torch.nan, x["y"])
    return Problem({k: v.to(dtype) for k, v in x.items()}, s)


def close(name: str, got: Tensor, wanted: Tensor, bound: float) -> None:
    assert got.shape == wanted.shape, name
    assert torch.isfinite(got).all(), f"{name} is not finite"
    if got.numel():
        wanted = wanted.detach()
        error = ((got.detach().double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)).item()
        assert error <= bound, f"{name}: error {error:.2e} exceeds {bound:.0e}"


def check(s: dict[str, Any]) -> None:
    """Compare all results and the gradients of a random mixture of them; that of a missing entry is exactly 0."""
    case = problem(s)
    values, slopes = BOUND[s["dtype"]]
    exact = {k: v.double().requires_grad_() for k, v in case.leaves.items()}
    given = {k: v.clone().requires_grad_() for k, v in case.leaves.items()}
    wanted, got = case.exact(exact), case.outputs(given)
    weights = {k: torch.randn_like(v).to(s["dtype"]) for k, v in wanted.items()}
    for name, v in wanted.items():
        assert got[name].dtype == s["dtype"]
        close(name, got[name], v, values)
    whole = sum((v * weights[k].double()).sum() for k, v in wanted.items())
    part = sum((v * weights[k]).sum() for k, v in got.items())
    options: dict[str, Any] = {"materialize_grads": True}
    for name, a, b in zip(
        given,
        torch.autograd.grad(part, list(given.values()), **options),
        torch.autograd.grad(whole, list(exact.values()), **options),
        strict=True,
    ):
        assert a.dtype == s["dtype"]
        close(f"d{name}", a, b, slopes)
        if name == "y":
            assert not a[torch.isnan(given["y"])].any()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("s", pairwise(GRID), ids=name_of)
def test_grid(s: dict[str, Any]) -> None:
    check(s)


@pytest.mark.full
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seed", range(1, 8))
def test_grids_with_other_seeds(seed: int) -> None:
    for s in pairwise(GRID, seed):
        check(s)


def cut(x: dict[str, Tensor], span: slice, T: int) -> dict[str, Tensor]:
    return {k: v[:, span] if v.dim() > 2 and k != "P0" and v.shape[1] == T else v for k, v in x.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gaps", ["same", "own"])
def test_pieces_and_steps_follow_the_whole(backend: str, form: str, gaps: str) -> None:
    """Values, and gradients through the state that pieces hand on."""
    case = problem(USUAL | {"backend": backend, "form": form, "t": 9, "A": "time", "gaps": gaps, "start": "one"})
    x = {k: v.requires_grad_() for k, v in case.leaves.items()}
    out, last = case.run(x)
    grads = torch.autograd.grad(out.loglik.sum() + last.cov.square().sum(), list(x.values()))
    for at in (0, 1, 5, 9):
        first, state = case.run(cut(x, slice(at), 9))
        rest = cut(x, slice(at, None), 9)
        noise = [symmetric(rest[k]) for k in "QR"]
        offsets = {"transition_offset": x["b"], "observation_offset": x["d"]}
        options: dict[str, Any] = {"form": form, "backend": backend}
        second, end = ops.kalman(rest["y"], rest["A"], x["C"], *noise, state, **offsets, **options)
        for name, whole, a, b in zip(Filtered._fields[:5], out, first, second, strict=False):
            close(name, torch.cat([a, b], 1), whole, 1e-12)
        close("state", end.cov, last.cov, 1e-12)
        total = first.loglik.sum() + second.loglik.sum() + end.cov.square().sum()
        for name, a, b in zip(x, torch.autograd.grad(total, list(x.values())), grads, strict=True):
            close(f"d{name}", a, b, 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
def test_steps_follow_the_whole_in_slots(backend: str, form: str, dtype: torch.dtype) -> None:
    case = problem(USUAL | {"backend": backend, "form": form, "dtype": dtype, "N": 2, "t": 7, "A": "both"})
    x, bound = case.leaves, BOUND[dtype][0]
    out, last = case.run(x)
    P0 = square_root(x["P0"]) if form == "sqrt" else x["P0"]
    mean, second = torch.full((5, 3), torch.nan, dtype=dtype), torch.full((5, 3, 3), torch.nan, dtype=dtype)
    mean[[3, 1]], second[[3, 1]] = x["m0"], P0
    state = SquareRootState(mean, second) if form == "sqrt" else KalmanState(mean, second)
    system = [symmetric(x[k][:, 0]) for k in "QR"]
    offsets = {"transition_offset": x["b"][:, 0], "observation_offset": x["d"][:, 0]}
    roots = tuple(map(square_root, system)) if form == "sqrt" else None
    for t in range(7):
        A, C = (x[k][:, min(t, x[k].shape[1] - 1)] for k in "AC")
        options: dict[str, Any] = {"index": torch.tensor([3, 1]), "backend": backend, "factors": roots if t else None}
        step = ops.kalman_step_(state, x["y"][:, t], A, C, *system, **offsets, **options)
        for got, whole in ((step.mean, out.mean), (step.cov, out.cov), (step.loglik, out.loglik)):
            close(f"step {t}", got, whole[:, t].double(), bound)  # type: ignore[arg-type,index]  # kept
        assert (step.factor is None) == (form == "joseph")
    close("mean", mean[[3, 1]], last.mean.double(), bound)
    close("cov", state.cov[[3, 1]], last.cov.double(), bound)
    assert torch.isnan(mean[[0, 2, 4]]).all()
    assert torch.isnan(second[[0, 2, 4]]).all()
    before = mean.clone()
    options["index"] = torch.tensor([-1, 1], dtype=torch.int32)
    step = ops.kalman_step_(state, x["y"][:, 0].nan_to_num(1.0), A, C, *system, **offsets, **options)
    assert not step.mean[0].any()  # type: ignore[index]  # kept
    assert step.loglik[0] == 0
    assert torch.equal(mean[3], before[3])
    assert not torch.equal(mean[1], before[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_covariances_are_shared_where_they_can_be(backend: str, form: str) -> None:
    s = USUAL | {"backend": backend, "form": form, "t": 20, "N": 5, "gaps": "same", "start": "one"}
    x = problem(s).leaves
    out, state = problem(s).run(x)
    for v in (out.cov, out.predicted_cov, state.factor if isinstance(state, SquareRootState) else state.cov):
        assert v is not None
        assert v.stride(0) == 0
    apart = x | {"A": x["A"].expand(5, -1, -1, -1)}
    own, _ = problem(s).run(apart)
    assert own.cov is not None
    assert own.cov.stride(0) != 0
    for name, a, b in zip(Filtered._fields[:5], out, own, strict=False):
        close(name, a, b, 1e-12)
    x["y"][2, 3, 0] = torch.nan  # one series misses one more
    out, _ = problem(s).run(x)
    assert out.cov is not None
    assert out.cov.stride(0) != 0
    assert not torch.allclose(out.cov[2, 3], out.cov[1, 3])


@pytest.mark.parametrize("form", FORMS)
def test_a_leaf_that_is_one_row_in_memory_has_gradients_of_each_row(form: str) -> None:
    whole = problem(USUAL | {"gaps": "none", "N": 3}).leaves
    y, A, C, Q, R = (symmetric(v) if k in "QR" else v for k, v in whole.items() if k in "yACQR")
    n, weights, found = A.shape[-1], torch.arange(1.0, 4.0, dtype=torch.float64)[:, None], []
    one = torch.eye(n, dtype=torch.float64).expand(3, n, n)
    for leaf in (one.clone(), one.detach()):
        leaf.requires_grad_()
        out, _ = ops.kalman(y, A, C, Q, R, KalmanState(y.new_zeros(3, n), leaf), form=form)
        found.append(torch.autograd.grad((out.loglik * weights).sum(), leaf)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("b", [1, 9])
def test_the_short_way_of_a_step_has_the_bits_of_the_long_one(
    form: str, b: int, slots: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = problem(USUAL | {"N": b, "t": 1, "offsets": "both", "form": form}).leaves
    y, A, C, Q, R = (symmetric(v) if k in "QR" else v for k, v in whole.items() if k in "yACQR")
    offsets = {"transition_offset": whole["b"][:, 0], "observation_offset": whole["d"][:, 0]}
    y, A, C, Q, R = (v[:, 0] for v in (y, A, C, Q, R))
    noise = (square_root(Q), square_root(R)) if form == "sqrt" else None
    index = torch.arange(b + 2, 2, -1) if slots else None
    if index is not None and b > 1:
        index[3] = -1
    found: list[Any] = []
    taken: list[bool] = []
    quick = step.quick_step

    def tried(*given: Any) -> Filtered | None:
        out = quick(*given) if not taken else None  # None: it does not serve
        taken.append(out is not None)
        return out

    monkeypatch.setattr(step, "quick_step", tried)
    for _ in range(2):
        rows = b + 3 if slots else b
        eye = torch.eye(A.shape[-1], dtype=torch.float64).expand(rows, -1, -1).clone()
        state = (SquareRootState if form == "sqrt" else KalmanState)(y.new_zeros(rows, A.shape[-1]), eye)
        out = ops.kalman_step_(state, y, A, C, Q, R, factors=noise, index=index, **offsets)
        found.append([v for v in (*out, state.mean, state.cov) if v is not None])
    assert taken == ["cpu" in BACKENDS, False]
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(x, z) for x, z in zip(*found, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_kept_is_none(form: str) -> None:
    case = problem(USUAL | {"form": form})
    whole, state = case.run(case.leaves)
    for keep, fields in (("filtered", ("mean", "cov", "loglik")), ("loglik", ("loglik",))):
        out, last = case.run(case.leaves, keep=keep)
        wanting, _ = case.run({k: v.requires_grad_() for k, v in case.leaves.items()}, keep=keep)
        for name in Filtered._fields[:5]:
            assert (getattr(out, name) is not None) == (getattr(wanting, name) is not None) == (name in fields)
            if name in fields:
                assert torch.equal(getattr(out, name), getattr(whole, name))
        assert torch.equal(last.mean, state.mean)
        assert torch.autograd.grad(wanting.loglik.sum(), case.leaves["A"])[0].any()
        for v in case.leaves.values():
            v.requires_grad_(False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(backend: str, form: str) -> None:
    case = problem(USUAL | {"backend": backend, "form": form, "t": 3, "n": 2, "N": 2, "gaps": "none"})
    leaves = [v.requires_grad_() for v in case.leaves.values()]

    def run(*v: Tensor) -> tuple[Tensor, ...]:
        out, state = case.run(dict(zip(case.leaves, v, strict=True)))
        second = state.factor if isinstance(state, SquareRootState) else state.cov
        return (*out[:5], state.mean, second)  # type: ignore[return-value]  # all kept

    assert torch.autograd.gradcheck(run, leaves)


def test_opcheck_and_transforms() -> None:
    case = problem(USUAL | {"gaps": "none", "backend": "reference"})
    x = case.leaves
    args = (x["y"], x["A"], x["C"], x["Q"], x["R"], x["b"], None, x["m0"], x["P0"])
    out = RAW.kalman(*args, "joseph", "all", False, "reference")
    torch.library.opcheck(RAW.kalman.default, (*args, "joseph", "filtered", False, "reference"))
    grads = (None, out[1], None, None, out[4], None, None)
    torch.library.opcheck(RAW.kalman_backward.default, (*grads, *args, *out[2:4], False, "reference"))
    one = (x["y"][:, 0], x["A"][0], x["C"][0], x["Q"][0], x["R"][0], None, None)
    index = torch.tensor([1, -1, 0])
    torch.library.opcheck(RAW.kalman_step_.default, (x["m0"], x["P0"], *one, index, "joseph", "reference"))

    def energy(A: Tensor) -> Tensor:
        out, state = case.run(x | {"A": A}, keep="loglik")
        return out.loglik.sum() + state.mean.sum()

    leaf = x["A"].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(energy(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(energy)(x["A"]), wanted)
    compiled = torch.compile(energy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], wanted)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(torch.autograd.grad(energy(leaf), leaf, create_graph=True)[0].sum(), leaf)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_failed_factorisation_names_series_and_step(backend: str) -> None:
    x = problem(USUAL | {"backend": backend, "t": 4, "gaps": "none", "A": "series"}).leaves
    zero = {"A": 0 * x["A"], "Q": 0 * x["Q"], "R": 0 * x["R"]}
    zero["A"][1] = torch.eye(3)
    case = problem(USUAL | {"backend": backend})
    message = r"^kalman: the innovation covariance .* of series 0 at step 1 is not positive definite.*form=\"sqrt\""
    with pytest.raises(ValueError, match=message):
        case.run(x | zero)
    case.setting = case.setting | {"form": "sqrt"}
    with pytest.raises(ValueError, match=r"series 0 at step 1 .* R > 0"):
        case.run(x | zero)
    second = torch.stack([torch.eye(3), torch.eye(3), torch.zeros(3, 3)]).double()
    start = KalmanState(torch.zeros(3, 3).double(), second)
    with pytest.raises(ValueError, match=r"^kalman_step_: .* of series 2 is not"):
        ops.kalman_step_(start, x["y"][:, 0], *(zero.get(k, x[k])[:, 0] for k in "ACQR"), backend=backend)


def test_a_singular_factor_has_no_derivative() -> None:
    case = problem(USUAL | {"form": "sqrt", "gaps": "none", "start": "one"})
    x = {k: (0 * v if k in "AQ" else v).requires_grad_() for k, v in case.leaves.items()}
    _, state = case.run(x)
    with pytest.raises(RuntimeError, match=r"singular, its factor has no derivative. Use form=\"joseph\""):
        state.cov.sum().backward()


def test_square_roots_of_semidefinite_matrices() -> None:
    v = torch.randn(4, 5, 2, dtype=torch.float64) * torch.tensor([1.0, 1e-3, 1e3, 0.0, 1e-9]).double()[:, None]
    S = torch.cat([v @ v.mT, torch.zeros(1, 5, 5).double(), torch.diag(torch.tensor([1.0, 1e-20, 0, 4, 9]))[None]])
    F = square_root(S)
    scale = S.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((F @ F.mT - S).abs() <= 1e-14 * scale[..., None] * scale[..., None, :] + 1e-300).all()
    assert torch.equal(F, F.tril())
    assert (F.diagonal(dim1=-2, dim2=-1) >= 0).all()
    for wrong in (torch.diag(torch.tensor([1.0, -1e-3])), torch.tensor([[0.0, 1.0], [1.0, 2.0]])):
        with pytest.raises(ValueError, match=r"^fit: Q is not positive semidefinite"):
            square_root(wrong, "fit", "Q")


def test_errors_name_the_argument() -> None:
    case = problem(USUAL)
    y, A, C, Q, R = (case.leaves[k] for k in "yACQR")
    start = KalmanState(case.leaves["m0"], case.leaves["P0"])
    for wrong, message in [
        (dict(A=A[0]), r"^kalman: A has shape \(1, 3, 3\), expected \(1 or 3, 1 or 6, n = 3, n = 3\)"),
        (dict(C=C[..., :2]), r"C has shape \(1, 1, 2, 2\), expected .*n = 3"),
        (dict(R=R.expand(2, 1, 2, 2)), r"R has shape \(2, 1, 2, 2\)"),
        (dict(transition_offset=y), r"transition_offset has shape \(3, 6, 2\), expected .*n = 3"),
        (dict(form="ud"), r"form is 'ud', expected one of 'joseph', 'sqrt'"),
        (dict(keep="none"), r"keep is 'none'"),
        (dict(factors=(Q, R)), r"factors were given. They belong to form=\"sqrt\""),
        (dict(initial_state=KalmanState(start.mean[:2], start.cov)), r"state.mean has shape \(2, 3\)"),
        (dict(initial_state=KalmanState(start.mean, start.cov[:, :2])), r"state.cov has shape"),
        (dict(form="sqrt", Q=-Q), r"Q is not positive semidefinite"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.kalman(**{"y": y, "A": A, "C": C, "Q": Q, "R": R, "initial_state": start, **wrong})
    with pytest.raises(TypeError, match=r"y is float16, expected one of float32, float64. Covariances need"):
        ops.kalman(y.half(), A, C, Q, R, start)
    with pytest.raises(TypeError, match=r"Q is float32, expected one of float64"):
        ops.kalman(y, A, C, Q.float(), R, start)
    with pytest.raises(TypeError, match=r"the state is a tuple, expected KalmanState"):
        ops.kalman(y, A, C, Q, R, (start.mean, start.cov))  # type: ignore[arg-type]  # the point
    with pytest.raises(TypeError, match=r"the state is a SquareRootState.* Use form=\"sqrt\""):
        ops.kalman(y, A, C, Q, R, SquareRootState(start.mean, start.cov))
    shared = KalmanState(start.mean, start.cov[:1].expand(3, 3, 3))
    with pytest.raises(ValueError, match=r"^kalman_step_: state is not contiguous"):
        ops.kalman_step_(shared, y[:, 0], A[0], C[0], Q[0], R[0])
    for index, message in [
        (torch.tensor([0, 0, 1]), r"index is \[0, 0, 1\], expected distinct slots below 3"),
        (torch.tensor([0, 1, 3]), r"index is \[0, 1, 3\], expected distinct slots below 3"),
        (torch.tensor([0, 1]), r"index has shape \(2,\), expected \(b,\) with b = 3"),
        ([0, 1, 2], r"index is a list, expected a tensor"),
        (torch.tensor([0.0, 1, 2]), r"index is float32, expected one of int32, int64"),
    ]:
        with pytest.raises((ValueError, TypeError), match=rf"^kalman_step_: {message}"):
            ops.kalman_step_(start, y[:, 0], A[0], C[0], Q[0], R[0], index=index)


@pytest.mark.parametrize("name", ["y", "A", "C", "Q", "R", "mean", "cov"])
def test_only_dense_tensors_are_read(name: str) -> None:
    """Sparse, nested, and zeros that are nowhere, whose address would be read: by the whole operation and by a step."""
    x = problem(USUAL | {"N": 1, "t": 1, "gaps": "none"}).leaves
    given = {k: symmetric(x[k]) if k in "QR" else x[k] for k in "yACQR"} | {"mean": x["m0"], "cov": symmetric(x["P0"])}
    zeros = torch._efficientzerotensor(given[name].shape, dtype=torch.float64)
    assert not zeros.clone()._is_zerotensor()
    for odd, message in ((given[name].to_sparse(), "sparse_coo"), (zeros, "zeros without memory")):
        bad = given | {name: odd}
        system = [bad[k] for k in "yACQR"]
        said = f"state.{name}" if len(name) > 1 else name
        with pytest.raises(TypeError, match=rf"^kalman: {said} is {message}.*, expected a dense tensor"):
            ops.kalman(*system, KalmanState(bad["mean"], bad["cov"]))
        steps = [v.clone()[:, 0] if not v.is_sparse else v.to_dense()[:, 0].to_sparse() for v in system]
        if len(name) == 1 and message != "sparse_coo":
            place = "yACQR".index(name)
            steps[place] = torch._efficientzerotensor(steps[place].shape, dtype=torch.float64)
        with pytest.raises(TypeError, match=rf"^kalman_step_: {said} is {message}.*, expected a dense tensor"):
            ops.kalman_step_(KalmanState(bad["mean"], bad["cov"]), *steps)


def test_explain_names_the_back_end() -> None:
    assert explain(ops.kalman, torch.zeros(1, 2, 1)).name == BACKENDS[-1]


@pytest.mark.parametrize("form", ["joseph", "sqrt"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_of_covariances_the_symmetric_part_counts(backend: str, form: str) -> None:
    """Where Q, R and the start are not symmetric, values and gradients are those of their symmetric parts."""
    A = torch.tensor([[1.0, 0.1], [0, 1]], dtype=torch.float64)[None, None]
    y, eye = torch.randn(1, 6, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    skew = torch.tensor([[1.0, 0.5], [0, 1]], dtype=torch.float64)

    def run(Q: Tensor, R: Tensor, P0: Tensor) -> tuple[Tensor, ...]:
        start = KalmanState(torch.zeros(1, 2, dtype=torch.float64), P0[None])
        out, state = ops.kalman(y, A, eye[None, None], Q[None, None], R[None, None], start, form=form, backend=backend)
        return out.loglik, out.cov, state.cov

    for got, wanted in zip(run(skew, skew, skew), run(*[symmetric(skew)] * 3), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda Q, R: run(Q, R, eye)[0], (skew.clone().requires_grad_(), skew.clone().requires_grad_())
    )
