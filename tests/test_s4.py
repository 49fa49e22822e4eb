"""S4D beyond the law of tests/test_layers.py: long sequences against dense powers, golden values, the known traps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stateline import nn as sl

F64 = torch.float64
INITS = ["legs", "inv", "inv2", "lin", "quad", "rand", "real"]


def bare(d_model: int = 3, d_state: int = 8, **options: Any) -> sl.S4D:
    """A layer that shows what its state space computes, in float64: no activation, the projection the identity."""
    layer = sl.S4D(d_model, d_state, activation=None, final_act=None, dtype=F64, **options)
    with torch.no_grad():
        layer.output_linear[0].weight.copy_(torch.eye(d_model))
        layer.output_linear[0].bias.zero_()
    return layer.eval()


def dense(layer: sl.S4D, u: Tensor, start: Tensor | None = None) -> Tensor:
    """y (b, t, h): every channel as a real 2n × 2n system, sampled by a matrix exponential, run as a loop."""
    kernel = layer.kernel
    dt, A = kernel.inv_dt.exp() * layer.rate, torch.complex(-kernel.A_real.exp(), -kernel.A_imag)
    A, B = (v.repeat(layer.d_model // A.shape[0], 1) for v in (A, torch.view_as_complex(kernel.B)[0]))
    C = torch.view_as_complex(kernel.C)[0]
    ys = []
    for h in range(layer.d_model):
        real, imag = torch.diag(A[h].real), torch.diag(A[h].imag)
        M = torch.cat([torch.cat([real, -imag], 1), torch.cat([imag, real], 1)]) * dt[h]
        N = torch.cat([B[h].real, B[h].imag])[:, None] * dt[h]
        size = len(M)
        if layer.discretization == "zoh":
            both = torch.linalg.matrix_exp(torch.cat([torch.cat([M, N], 1), M.new_zeros(1, size + 1)]))
            M, N = both[:size, :size], both[:size, size:]
        else:
            left = torch.linalg.inv(torch.eye(size, dtype=F64) - M / 2)
            M, N = left @ (torch.eye(size, dtype=F64) + M / 2), left @ N
        read = 2 * torch.cat([C[h].real, -C[h].imag])
        x = u.new_zeros(len(u), size) if start is None else torch.cat([start[:, h, :, 0], start[:, h, :, 1]], 1)
        y = []
        for t in range(u.shape[1]):
            x = x @ M.T + u[:, t, h, None] @ N.T
            y.append(x @ read + layer.D[0, h] * u[:, t, h])
        ys.append(torch.stack(y, 1))
    return torch.stack(ys, -1)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_every_initialiser_equals_dense_powers(init: str, rule: str) -> None:
    layer, u = bare(init=init, discretization=rule), torch.randn(2, 200, 3, dtype=F64)
    want = dense(layer, u)
    y = layer(u)
    assert (y - want).abs().max() <= 1e-11 * want.abs().max()
    state = layer.init_state(2)
    stepped = torch.stack([layer.step_(u[:, i], state) for i in range(200)], 1)
    assert (stepped - want).abs().max() <= 1e-11 * want.abs().max()


@pytest.mark.parametrize(("rule", "want"), [
    ("zoh", [0.387011, 0.350341, 0.300985, 0.244020]), ("bilinear", [0.385767, 0.349877, 0.301445, 0.245362]),
])  # fmt: skip
def test_kernel_of_two_states_is_the_known_one(rule: str, want: list[float]) -> None:
    layer = bare(1, 4, init="lin", discretization=rule)
    with torch.no_grad():
        layer.kernel.inv_dt.fill_(0.1).log_()
        layer.kernel.A_imag.copy_(-torch.tensor([[0.0, torch.pi]]))
        layer.kernel.C.copy_(torch.tensor([1.0, 0.0]).expand(1, 1, 2, 2))
        layer.D.zero_()
    impulse = torch.zeros(1, 4, 1, dtype=F64)
    impulse[0, 0] = 1
    assert torch.allclose(layer(impulse).flatten(), torch.tensor(want, dtype=F64), atol=5e-7)


@pytest.mark.parametrize("mode", ["auto", "scan"])
def test_long_pieces_padding_and_packing_agree(mode: str) -> None:
    layer = bare(mode=mode)
    lengths = [300, 0, 64, 65, 1]
    u = torch.randn(5, 300, 3, dtype=F64)
    start = sl.S4DState(torch.randn(5, 3, 4, 2, dtype=F64))
    want = dense(layer, u, start.x)
    y, end = layer.extend(u, start)
    assert (y - want).abs().max() <= 1e-11 * want.abs().max()
    padded, ends = layer.extend(u, start, lengths=lengths)
    packed = torch.cat([u[i, :n] for i, n in enumerate(lengths)])[None]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    ys, packed_ends = layer.extend(packed, start, cu_seqlens=bounds)
    for i, (n, (a, b)) in enumerate(zip(lengths, pairwise(bounds.tolist()), strict=True)):
        assert torch.allclose(padded[i, :n], want[i, :n], atol=1e-11)
        assert not padded[i, n:].any()
        assert torch.allclose(ys[0, a:b], want[i, :n], atol=1e-11)
        alone = layer.extend(u[i : i + 1, :n], sl.S4DState(start.x[i : i + 1]))[1]
        assert torch.allclose(ends.x[i], alone.x[0], atol=1e-11)
        assert torch.allclose(packed_ends.x[i], alone.x[0], atol=1e-11)
    pieces, state = [], start
    for size in (1, 100, 0, 70, 129):
        at = sum(p.shape[1] for p in pieces)
        piece, state = layer.extend(u[:, at : at + size], state)
        pieces.append(piece)
    assert torch.allclose(torch.cat(pieces, 1), want, atol=1e-11)
    assert torch.allclose(state.x, end.x, atol=1e-11)


def test_backwards_is_forwards_turned_round() -> None:
    layer, u = bare(), torch.randn(2, 100, 3, dtype=F64)
    assert torch.allclose(layer(u, reverse=True), layer(u.flip(1)).flip(1), atol=1e-12)
    padded = layer(u, lengths=[100, 30], reverse=True)
    assert torch.allclose(padded[1, :30], layer(u[1:, :30].flip(1)).flip(1)[0], atol=1e-12)
    assert not padded[1, 30:].any()
    packed = layer(u[:1], cu_seqlens=torch.tensor([0, 20, 100]), reverse=True)
    assert torch.allclose(packed[:, :20], layer(u[:1, :20].flip(1)).flip(1), atol=1e-12)
    both = sl.Bidirectional(layer)
    assert torch.allclose(both(u), layer(u) + layer(u, reverse=True), atol=1e-12)


def test_rate_runs_a_model_at_another_sampling_rate() -> None:
    """A slow signal at half the samples gives nearly the same numbers at those samples; without rate it does not."""
    layer = bare(d_state=16, dt_min=0.001, dt_max=0.005, init="lin")
    time = torch.arange(0, 4000, dtype=F64)
    u = torch.stack([torch.sin(time / w) for w in (90, 150, 300)], -1)[None]
    full = layer(u)
    unset = layer(u[:, ::2])
    layer.rate = 2.0
    half = layer(u[:, ::2])
    scale = full.abs().max()
    assert (half - full[:, ::2]).abs().max() < 0.03 * scale
    assert (unset - full[:, ::2]).abs().max() > 0.1 * scale
    state = layer.init_state(1)
    stepped = torch.stack([layer.step_(u[:, 2 * i], state) for i in range(20)], 1)
    assert torch.allclose(stepped, half[:, :20], atol=1e-11)


def test_parameters_are_real_pairs_under_known_names() -> None:
    layer = sl.S4D(6, 8, 2, n_ssm=3)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "D": (2, 6), "kernel.inv_dt": (6, 1), "kernel.A_real": (3, 4), "kernel.A_imag": (3, 4),
        "kernel.B": (1, 3, 4, 2), "kernel.C": (2, 6, 4, 2), "output_linear.0.weight": (12, 12),
        "output_linear.0.bias": (12,),
    }  # fmt: skip
    assert not any(p.is_complex() for p in layer.parameters())
    dt = layer.kernel.inv_dt.exp()
    assert 0.001 <= dt.min() <= dt.max() <= 0.1


def test_time_constants_learn_at_their_own_rate() -> None:
    net = nn.Sequential(sl.S4D(4), sl.S4D(4, lr=None), sl.S4D(4, lr=0.01))
    groups = sl.param_groups(net, 0.1)
    assert [(len(g["params"]), g["weight_decay"], g.get("lr")) for g in groups] == [
        (3, 0.1, None), (3 * 3 + 4, 0.0, None), (4, 0.0, 0.001), (4, 0.0, 0.01)
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.5, 0.001, 0.01]


def test_dropout_is_for_training_alone() -> None:
    layer, x = sl.S4D(4, 8, dropout=0.5), torch.randn(1, 50, 4)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 7}, "d_state is 7"), ({"init": "hippo"}, "init is 'hippo'"), ({"n_ssm": 3}, "n_ssm is 3"),
        ({"discretization": "euler"}, "discretization"), ({"dt_min": 0.0}, "dt_min"), ({"dt_max": 1e-9}, "dt_max"),
        ({"rate": 0.0}, "rate"), ({"mode": "fft"}, "mode is 'fft'"), ({"dropout": 2.0}, "dropout"),
        ({"activation": "relu"}, "activation"), ({"channels": 0}, "channels"), ({"lr": -1.0}, "lr"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^S4D: .*{message}"):
        sl.S4D(**{"d_model": 8, **options})
