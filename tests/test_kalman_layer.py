"""The Kalman filter as a module: pieces, single observations, what it learns and what its steps in place see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_kalman_filter import CASES, F64, FORMS, STRESS, load
from torch import Tensor

from stateline import state as states
from stateline.backends import native_problem
from stateline.classical import KalmanFilter, KalmanState, SquareRootState, StateSpace, kalman_filter


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_the_law(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Pieces and single observations give what the whole gives; a saved state goes on in bits."""
    model, y, u = load(CASES["track2d_inputs"], dtype)
    assert u is not None
    y, u = torch.stack([y, y.flip(0)]), torch.stack([u, -u])
    y[1, 4, 0] = torch.nan
    layer = KalmanFilter(model, form=form)
    bound = 1e-11 if dtype == F64 else 1e-4
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            whole, start = layer(y, u), layer.init_state(2)
            first, state = layer.extend(y[:, :90], start, u[:, :90])
            parts = [first.mean]
            for t in range(90, 100):
                out, state = layer.update(y[:, t], state, u[:, t])
                assert out.mean is not None
                parts.append(out.mean[:, None])
            torch.testing.assert_close(torch.cat(parts, 1), whole.mean, rtol=bound, atol=bound)
            assert torch.equal(start.mean, layer.init_state(2).mean)
    states.save(state, tmp_path / "state.safetensors", layer)
    again = states.load(tmp_path / "state.safetensors", layer)
    _, a = layer.update(y[:, 0], state, u[:, 0])
    _, b = layer.update(y[:, 0], again, u[:, 0])
    assert torch.equal(a.mean, b.mean)
    assert type(a) is type(b)
    with torch.no_grad():
        layer.C.mul_(2)
    with pytest.raises(ValueError, match="made by another model or other weights"):
        states.load(tmp_path / "state.safetensors", layer)


def test_the_module_learns_and_keeps_its_digits() -> None:
    model, y, _ = load(CASES["nile_local_level"])
    layer = KalmanFilter(model._replace(R=2 * model.R))
    for p in (layer.A, layer.C, layer.m0, layer.P0_factor):
        p.requires_grad_(False)
    optimizer = torch.optim.LBFGS([layer.R_factor, layer.Q_factor], line_search_fn="strong_wolfe", max_iter=40)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -layer(y[None]).loglik.sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]  # torch's
    best = CASES["nile_local_level"]["mle"]["known start m0=1000,P0=1e5"]
    assert abs(-loss().item() - best["loglik"]) < 1e-5
    learned = layer.model()
    assert abs(learned.R.item() - best["R"]) / best["R"] < 1e-2
    assert layer.half().A.dtype == torch.float32
    assert layer.to(torch.float64).Q_factor.dtype == F64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer(y[None]).loglik
    assert torch.equal(inside, layer(y[None]).loglik)
    one = learned.A.detach()
    with pytest.raises(ValueError, match=r"^KalmanFilter: A has shape \(2, 1, 1\), expected one matrix for all"):
        KalmanFilter(model._replace(A=one.expand(2, 1, 1)))


@pytest.mark.parametrize("form", FORMS)
def test_updates_follow_the_parameters(form: str) -> None:
    """Whoever writes a parameter, by whatever way: the next step knows."""
    model, y, _ = load(CASES["track2d"])
    layer = KalmanFilter(model, form=form)
    start = layer.init_state(1)

    def replaced() -> None:
        layer.C = torch.nn.Parameter(1.5 * layer.C.detach())

    ways = [
        lambda: layer.R_factor.mul_(3), lambda: layer.R_factor.data.mul_(3), lambda: layer.A.data.mul_(0.9),
        lambda: layer.C.detach().numpy().__imul__(2), lambda: setattr(layer.A, "data", layer.A.data.mT), replaced,
        lambda: layer.R_factor[0, 1:].fill_(7.0),  # above the diagonal: of no account
        lambda: torch.nn.utils.parametrizations.orthogonal(layer, "A"),
    ]  # fmt: skip
    seen = [0.0]
    for i, way in enumerate(ways):
        with torch.no_grad():
            way()
            found, last = layer.update(y[None, 0], start)
            fresh, wanted = layer.extend(y[None, :1], start)
        torch.testing.assert_close(found.loglik, fresh.loglik[:, 0], msg=str(i))
        torch.testing.assert_close(last.cov, wanted.cov, rtol=1e-10, atol=1e-10, msg=str(i))
        seen.append(float(found.loglik.detach() + last.mean.sum().detach()))
        assert (seen[-1] != seen[-2]) == (i != 6), i


@pytest.mark.parametrize("form", FORMS)
def test_a_module_of_inference_mode_updates(form: str) -> None:
    model, y, _ = load(CASES["track2d"])
    usual = KalmanFilter(model, form=form)
    with torch.inference_mode():
        layer = KalmanFilter(model, form=form)
        state = layer.init_state(1)
        for t in range(3):
            out, state = layer.update(y[None, t], state)
    assert torch.equal(out.loglik, usual.extend(y[None, :3], usual.init_state(1))[0].loglik[:, 2])


def test_square_roots_are_never_multiplied_out() -> None:
    """What the module keeps as factors reaches the filter as factors: 1e-6 beside 1 is nothing in float32 else."""
    model, y, _ = load(STRESS["near_collinear_float32"], torch.float32)
    spread = torch.tensor([[1.0, 0.0], [1.0, 1e-6]])  # its square is singular to working precision
    P0 = torch.tensor([[1.0, 0, 0], [1.0, 1e-6, 0], [1, 1, 1e-6]])
    roots = KalmanFilter(model._replace(R=torch.eye(2)), form="sqrt")
    with torch.no_grad():
        roots.R_factor.copy_(spread)
        roots.P0_factor.copy_(P0)
    wide = StateSpace(*(None if v is None else v.double() for v in model))._replace(  # type: ignore[arg-type]  # B, D
        R=spread.double() @ spread.double().mT,
        P0=roots.P0_factor.detach().double() @ roots.P0_factor.detach().double().mT,
    )
    wanted = kalman_filter(wide, y.double(), form="sqrt")[0].loglik.sum()
    state, online = roots.init_state(1), torch.zeros(1)
    for t in range(len(y)):
        online = online + roots.update_(y[None, t], state).loglik
    for got in (roots(y[None]).loglik.sum(), online):
        assert abs(float(got.detach()) - float(wanted)) <= 0.01


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_updates_in_place(form: str, dtype: torch.dtype) -> None:
    """By rows, with inputs, under autocast and another default device; autograd is told; wrong arguments are named."""
    model, y, u = load(CASES["track2d_inputs"], dtype)
    assert u is not None
    layer = KalmanFilter(model, form=form)
    bound = 1e-11 if dtype == F64 else 1e-4
    y[1, 0] = torch.nan
    whole, _ = layer.extend(y[None, :3], layer.init_state(1), u[None, :3])
    state = layer.init_state(5)
    untouched = states.clone(state)
    versions, rows = state.mean._version, torch.tensor([3, -1])
    for t in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            out = layer.update_(y[t].expand(2, -1), state, u[t].expand(2, -1), index=rows)
        assert out.mean is not None
        assert out.cov is not None
        torch.testing.assert_close(out.mean[0], whole.mean[0, t], rtol=bound, atol=bound)  # type: ignore[index]  # kept
        torch.testing.assert_close(out.cov[0], whole.cov[0, t], rtol=bound, atol=bound)  # type: ignore[index]  # kept
        assert not out.mean[1].any()
    assert state.mean._version > versions
    for i in (0, 1, 2, 4):
        assert torch.equal(state.mean[i], untouched.mean[i])
        assert torch.equal(state.cov[i], untouched.cov[i])
    plain = KalmanFilter(model._replace(B=None, D=None), form=form)
    first, second = plain.init_state(1), plain.init_state(3)
    for t in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            one = plain.update_(y[None, t], first)
        several = plain.update_(y[t].expand(3, -1), second)
        assert torch.equal(one.loglik, several.loglik[:1])
        assert one.cov is not None
        assert one.cov.dtype == dtype
    assert torch.equal(first.mean, second.mean[:1])
    blind = KalmanFilter(model._replace(B=None, D=None, R=0 * model.R, P0=0 * model.P0), form=form)
    with pytest.raises(ValueError, match=r"^kalman_step_: the innovation covariance C P Cᵀ \+ R of series 1 is not"):
        blind.update_(torch.stack([torch.full_like(y[0], torch.nan), y[0]]), blind.init_state(2))
    good = plain.init_state(1)
    for run, message in [
        (lambda: plain.update_(y[:1, :1], good), r"y has shape \(1, 1\), expected \(b, m\) with m = 2"),
        (lambda: plain.update_(y[:2], good), "state has 1 rows for a batch of 2"),
        (lambda: plain.update_(y[:1].to(torch.float16), good), "y is float16"),
        (lambda: plain.update_(y[:1], type(good)(good.mean.half(), good.mean[:, None] * good.mean)), "state"),
        (lambda: plain.update_(y[:1], good, u[:1]), "u has shape"),
        (lambda: layer.update_(y[:1], good), "u is a NoneType"),
        (lambda: plain.update_(y[:1], (good.mean, good.cov)), "the state is a tuple"),  # type: ignore[arg-type]  # wrong
        (lambda: plain.update(y[:1], None), "the state is a NoneType"),  # type: ignore[arg-type]  # wrong
        (lambda: plain.update_(None, good), "y is a NoneType"),  # type: ignore[arg-type]  # wrong
    ]:  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message), torch.no_grad():
            run()


def test_one_observation_is_not_taken_for_several() -> None:
    """With and without a gradient: broadcasting would make numbers of them."""
    model, y, _ = load(CASES["track2d"])
    layer = KalmanFilter(model)
    state, several = layer.init_state(3), y[:3].expand(3, 3, 2)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            with pytest.raises(ValueError, match=r"y has shape \(3, 3, 2\), expected \(b, m\)\. extend takes several"):
                layer.update(several, state)
            with pytest.raises(ValueError, match=r"y has shape \(3, 2\), expected \(b, T, m\)\. update takes one"):
                layer.extend(several[:, 0], state)
    assert layer(y).loglik.shape == (100,)  # of a single series, from the start


@pytest.mark.parametrize("form", FORMS)
def test_parameters_that_do_not_fit_are_refused_at_every_step(form: str) -> None:
    """Whoever replaces them, however many steps went well before; nothing is read beside them."""
    model, y, _ = load(CASES["track2d"])
    n, m = model.A.shape[-1], model.C.shape[-2]
    for name, other, message in [
        ("A", torch.eye(n + 1, dtype=F64), f"A has shape .*, expected .n, n. with n = {n}"),
        ("Q_factor", torch.eye(n - 1, dtype=F64), f"Q_factor has shape .*, expected .n, n. with n = {n}"),
        ("R_factor", torch.eye(m - 1, dtype=F64), f"R_factor has shape .*, expected .m, m. with m = {m}"),
        ("R_factor", torch.eye(m), "R_factor is float32, expected one of float64"),
        ("R_factor", torch.eye(m, dtype=F64, device="meta"), "R_factor is on meta, y is on cpu"),
    ]:
        layer = KalmanFilter(model, form=form)
        state = layer.init_state(1)
        layer.update_(y[None, 0], state)
        setattr(layer, name, torch.nn.Parameter(other))
        for index in (None, torch.tensor([0])):
            with pytest.raises((ValueError, TypeError), match=f"^KalmanFilter: {message}"):
                layer.update_(y[None, 1], state, index=index)
    model, y, u = load(CASES["track2d_inputs"])
    assert u is not None
    layer = KalmanFilter(model, form=form)
    with pytest.raises(TypeError, match=r"^KalmanFilter: u is float32, expected one of float64"):
        layer.update_(y[None, 0], layer.init_state(1), u[None, 0].float())


def test_a_state_of_the_other_kind() -> None:
    """A covariance enters the form by factors, which come out, with a gradient or without; factors do not go back."""
    model, y, _ = load(CASES["track2d"])
    layer = KalmanFilter(model, form="sqrt")
    with torch.no_grad():
        factors = layer.init_state(1)
        start = KalmanState(factors.mean, factors.cov)
        _, quick = layer.update(y[None, 0], start)
    _, slow = layer.update(y[None, 0], start)
    assert isinstance(quick, SquareRootState)
    assert isinstance(slow, SquareRootState)
    assert torch.equal(quick.factor, slow.factor)
    joseph = KalmanFilter(model)
    for step in (joseph.update, joseph.update_):  # the way past the checks too
        with pytest.raises(TypeError, match=r"SquareRootState|holds factors"), torch.no_grad():
            step(y[None, 0], factors)


def test_updates_under_transforms_and_of_any_memory() -> None:
    """As the whole filter: derivatives of a layer whose parameters are frozen, one call for many, a turned state."""
    model, y, _ = load(CASES["track2d"])
    layer = KalmanFilter(model).requires_grad_(False)
    start = layer.init_state(2)
    rows = y[:2]

    def last(rows: Tensor) -> Tensor:
        return layer.update(rows, start)[0].loglik.sum()

    leaf = rows.clone().requires_grad_()
    last(leaf).backward()
    assert leaf.grad is not None
    assert torch.equal(torch.func.grad(last)(rows), leaf.grad)
    with torch.no_grad():
        many = torch.func.vmap(lambda row: layer.update(row[None], layer.init_state(1))[0].loglik)(rows)
        assert torch.equal(many[:, 0], layer.update(rows, start)[0].loglik)
        turned = type(start)(start.mean, start.cov.mT.contiguous().mT)
        assert torch.equal(layer.update(rows, turned)[1].cov, layer.update(rows, start)[1].cov)
    with pytest.raises(RuntimeError, match="forward"), torch.autograd.forward_ad.dual_level():
        layer.update(torch.autograd.forward_ad.make_dual(rows, rows), start)


@pytest.mark.parametrize("form", FORMS)
def test_rows_in_another_order_and_factors_of_another_sign(form: str) -> None:
    model, y, _ = load(CASES["track2d"])
    layer = KalmanFilter(model, form=form)
    rows = y[:2]
    first, second = layer.init_state(2), layer.init_state(2)
    layer.update_(rows.flip(0), first)
    layer.update_(rows, second, index=torch.tensor([1, 0]))
    assert torch.equal(first.mean, second.mean)
    whole = layer(y[None])
    with torch.no_grad():
        layer.P0_factor.neg_()  # the same covariance
        again = layer(y[None])
        start = layer.init_state(1)
    assert torch.allclose(whole.mean, again.mean, rtol=1e-12, atol=1e-12)
    second_part = start.factor if isinstance(start, SquareRootState) else start.cov
    assert (second_part.diagonal(dim1=-2, dim2=-1) >= 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_step_refuses_zeros_without_memory(form: str) -> None:
    """Which the kernel would read from nowhere."""
    model, _, _ = load(CASES["track2d"])
    layer = KalmanFilter(model, form=form)
    state, nowhere = layer.init_state(1), torch._efficientzerotensor((1, 2), dtype=F64)
    before = states.clone(state)
    for index in (None, torch.tensor([0])):
        with pytest.raises(TypeError, match=r"y is zeros without memory .*, expected a dense tensor"):
            layer.update_(nowhere, state, index=index)
    assert torch.equal(state.mean, before.mean)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_each_row_by_index_goes_on_with_its_own_state(form: str, dtype: torch.dtype, kind: torch.dtype) -> None:
    """Row 0 too, in any order, some skipped: as each series filtered alone, whose states have come to differ."""
    model, y, _ = load(CASES["track2d"], dtype)
    layer, series = KalmanFilter(model, form=form), y[:80].reshape(4, 20, 2)
    state, means = layer.init_state(4), torch.zeros(4, 5, 4, dtype=dtype)
    taken = [0] * 4
    for turn in (
        [2, -1, 0],
        [1, 3, -1],
        [0, 2, 3],
        [3, 1, 0],
        [-1, 2, 1],
        [3, 0, 2],
        [1, -1, -1],
        [0, 3, 2],
        [1, -1, -1],
    ):
        rows = torch.stack([series[max(i, 0), taken[max(i, 0)]] for i in turn])
        out = layer.update_(rows, state, index=torch.tensor(turn, dtype=kind))
        assert out.mean is not None
        for place, i in enumerate(turn):
            if i >= 0:
                means[i, taken[i]] = out.mean[place]
                taken[i] += 1
    assert taken == [5, 5, 5, 5]
    with torch.no_grad():
        whole, last = layer.extend(series[:, :5], layer.init_state(4))
    bound = 1e-11 if dtype == F64 else 1e-4
    torch.testing.assert_close(means, whole.mean, rtol=bound, atol=bound)
    torch.testing.assert_close(state.mean, last.mean, rtol=bound, atol=bound)
    torch.testing.assert_close(state.cov, last.cov, rtol=bound, atol=bound)


@pytest.mark.skipif(native_problem() is not None, reason="no C++ library")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_rows_by_index_take_the_short_way(form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bits of the long one, inputs or none; what is not as the kernel reads it goes the long way."""
    model, y, u = load(CASES["track2d_inputs"], dtype)
    assert u is not None
    layer, rows, index = KalmanFilter(model, form=form), y[:3], torch.tensor([4, -1, 1])
    plain = KalmanFilter(model._replace(B=None, D=None), form=form)

    def run(index: Tensor) -> list[Tensor]:
        state, found = layer.init_state(5), []
        for step in (
            lambda: layer.update_(rows, state, u[:3], index=index),
            lambda: plain.update_(rows, state, index=index),
        ):
            found += [v for v in step() if v is not None] + [state.mean.clone(), state.cov.clone()]
        return found

    def refuse(*_: object) -> None:
        raise AssertionError("the long way")

    long = run(index.int())
    monkeypatch.setattr("stateline.classical.layer.advance", refuse)
    with pytest.raises(AssertionError, match="the long way"):
        run(index.int())
    for a, b in zip(run(index), long, strict=True):
        assert torch.equal(a, b)
    monkeypatch.undo()
    for wrong in ([4, 1, 4], [0, 1, 5]):
        with pytest.raises(ValueError, match=r"index is .*, expected distinct slots below 5"):
            run(torch.tensor(wrong))
