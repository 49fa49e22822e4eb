"""kalman_step_: what its short way past the dispatcher takes, and what it leaves to the long one."""

from __future__ import annotations

import pytest
import torch
from test_kalman import USUAL, problem, symmetric
from torch import Tensor
from torch._subclasses import FakeTensorMode

from stateline import ops
from stateline.ops.kalman import KalmanState, SquareRootState, State, square_root


def test_the_short_way_is_for_what_it_was_made_for() -> None:
    """Other dtypes are refused, views that stand for their negative are read as such; traced, autograd is told."""
    x = problem(USUAL | {"n": 2, "m": 1, "N": 1, "A": "one", "noise": "one"}).leaves
    y, A, C, Q, R = (x[k][:, 0] for k in "yACQR")
    Q, R = symmetric(Q), symmetric(R)

    def start() -> KalmanState:
        return KalmanState(x["m0"].clone(), symmetric(x["P0"]).clone())

    want = ops.kalman_step_(start(), y, A, C, Q, R)
    state = start()
    before = state.mean._version, state.cov._version
    ops.kalman_step_(state, y, A, C, Q, R)
    assert state.mean._version > before[0]
    assert state.cov._version > before[1]
    given = {"y": y, "A": A, "C": C, "Q": Q, "R": R}
    for name, v in given.items():
        with pytest.raises(TypeError, match=rf"^kalman_step_: {'A' if name == 'y' else name} is float"):
            ops.kalman_step_(start(), **(given | {name: v.float()}))
        turned = torch._neg_view(-v)
        assert turned.is_neg()
        got = ops.kalman_step_(start(), **(given | {name: turned}))
        assert torch.equal(got.loglik, want.loglik)
    traced, roots = start(), (square_root(Q), square_root(R))

    @torch.compile(fullgraph=True, backend="eager")
    def step(state: State, y: Tensor, factors: tuple[Tensor, Tensor] | None) -> Tensor:
        return ops.kalman_step_(state, y, A, C, Q, R, factors=factors).loglik

    assert torch.equal(step(traced, y, None), want.loglik)
    assert torch.equal(traced.mean, state.mean)
    factored = SquareRootState(x["m0"].clone(), square_root(symmetric(x["P0"])))
    torch.testing.assert_close(step(factored, y, roots), want.loglik)
    for wrong in (Q.float(), torch.eye(3, dtype=torch.float64)[None]):  # what stands beside factors is looked at too
        with pytest.raises((TypeError, ValueError), match=r"^kalman_step_: Q "):
            ops.kalman_step_(factored, y, A, C, wrong, R, factors=roots)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = KalmanState(*(mode.from_tensor(v) for v in (x["m0"], x["P0"])))
        assert ops.kalman_step_(fake, mode.from_tensor(y), A, C, Q, R).loglik.shape == (1,)


def test_each_series_of_a_step_has_the_system_that_was_given_for_it() -> None:
    """Also where every part has as many rows as there are series: the short way is for one system."""
    x = problem(USUAL | {"t": 1, "A": "series", "noise": "series", "gaps": "none"}).leaves
    y, A, C, Q, R = (symmetric(x[k][:, 0]) if k in "QR" else x[k][:, 0] for k in "yACQR")
    C = C.expand(3, -1, -1) + torch.arange(3.0, dtype=torch.float64)[:, None, None]
    both = KalmanState(x["m0"].clone(), symmetric(x["P0"]).contiguous())
    alone = [KalmanState(both.mean[i : i + 1].clone(), both.cov[i : i + 1].clone()) for i in range(3)]
    assert {len(v) for v in (y, A, C, Q, R)} == {3}
    out = ops.kalman_step_(both, y, A, C, Q, R)
    for i, state in enumerate(alone):
        one = ops.kalman_step_(state, *(v[i : i + 1].contiguous() for v in (y, A, C, Q, R)))
        torch.testing.assert_close(one.loglik[0], out.loglik[i])
        torch.testing.assert_close(state.cov[0], both.cov[i])
    one_system = [v[:1] for v in (A, C, Q, R)]
    straight, turned = (KalmanState(both.mean.clone(), both.cov.clone()) for _ in range(2))
    order = torch.tensor([2, 0, 1])
    straight.mean, straight.cov = straight.mean[order], straight.cov[order]
    ops.kalman_step_(straight, y, *one_system)
    ops.kalman_step_(turned, y, *one_system, index=order)
    assert torch.equal(turned.mean[order], straight.mean)
