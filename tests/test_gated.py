"""GatedSSM beyond the law of every layer: its equation and index, its gates, its initial values, what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stateline.nn import Bidirectional, GatedSSM, param_groups
from stateline.ops.gated_scan import ACTIVATIONS

F = {"identity": lambda x: x, "relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}


def written_out(layer: GatedSSM, u: Tensor, gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One sequence u (t, d) by the equation: y (t, d), the last state."""
    A = layer.transition()
    A = torch.diag(A) if A.dim() == 1 else A
    h, ys = torch.zeros(layer.d_state, dtype=u.dtype), []
    for i, x in enumerate(u):
        ys.append(layer.out_proj.weight @ h + layer.skip_proj.weight @ x)  # before the token
        if gate is None:
            assert layer.gate_proj is not None
            g = torch.sigmoid(layer.gate_proj.weight @ x + layer.gate_proj.bias)
        else:
            g = gate[i]
        h = F[layer.activation](A @ h + layer.in_proj.weight @ x) * g
    return torch.stack(ys), h


@pytest.mark.parametrize("transition", ["diagonal", "dense"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_equation(transition: str, activation: str) -> None:
    layer = GatedSSM(5, 7, activation, transition).double()
    u = torch.randn(9, 5, dtype=torch.float64)
    y, state = layer.extend(u[None])
    want, h = written_out(layer, u)
    torch.testing.assert_close(y[0], want)
    torch.testing.assert_close(state.h[0], h)
    back = layer(u[None], reverse=True)[0].flip(0)
    torch.testing.assert_close(back, written_out(layer, u.flip(0))[0])
    assert Bidirectional(layer)(u[None]).shape == (1, 9, 5)


def test_an_output_does_not_read_what_its_token_writes() -> None:
    layer = GatedSSM(4)
    x = torch.randn(1, 6, 4)
    changed = x.clone()
    changed[:, 3] += 1
    difference = layer(changed) - layer(x)
    assert not difference[:, :3].any()
    torch.testing.assert_close(difference[:, 3], layer.skip_proj.weight.sum(1)[None], rtol=1e-4, atol=1e-5)
    assert (difference[:, 4:] != 0).any()


@pytest.mark.parametrize("kind", ["given", "learned"])
@pytest.mark.parametrize("per_state", [False, True])
def test_gates_from_outside_replace_the_learned(kind: str, per_state: bool) -> None:
    layer = GatedSSM(5, 7, "tanh", gate=kind).double()
    u, gate = torch.randn(2, 6, 5, dtype=torch.float64), torch.rand(2, 6, 7, dtype=torch.float64)
    gate = gate if per_state else gate[..., 0].clone()
    gate.requires_grad_()
    y, state = layer.extend(u, gate=gate)
    torch.testing.assert_close(y[1], written_out(layer, u[1], gate[1].detach())[0])
    (slope,) = torch.autograd.grad(y.sum() + state.h.sum(), gate)
    assert slope.shape == gate.shape
    assert (slope != 0).any()
    stepped = layer.init_state(2)
    for i in range(6):
        torch.testing.assert_close(layer.step_(u[:, i], stepped, gate=gate[:, i].detach()), y[:, i].detach())
    padded = gate.detach().clone()
    padded[0, 4:] = torch.nan  # skipped, as all padding is
    short, _ = layer.extend(u, gate=padded, lengths=[4, 6])
    torch.testing.assert_close(short[0, :4], y[0, :4])
    assert not short[0, 4:].any()


def test_gates_near_one_survive_sixteen_bits() -> None:
    """0.999 is 1 in bfloat16: a state that should fade to 1/e in 1000 tokens never would."""
    layer = GatedSSM(4, gate="given").bfloat16()
    with torch.no_grad():
        layer.A_raw.fill_(20.0)  # A = 1
    gate, x = torch.full((1, 1000), 0.999), torch.zeros(1, 1000, 4, dtype=torch.bfloat16)
    start = layer.init_state(1)
    start.h += 1
    _, state = layer.extend(x, start, gate=gate)
    torch.testing.assert_close(state.h, torch.full((1, 4), 0.999**1000), rtol=1e-3, atol=0)


def test_initial_lifetimes_and_sizes() -> None:
    layer = GatedSSM(8, 4000, memory=(2, 500))
    A, gate = layer.transition().double(), torch.sigmoid(layer.gate_proj.bias.double())
    tau = gate / (1 - gate)
    torch.testing.assert_close(A, torch.exp(-1 / tau), rtol=1e-3, atol=1e-4)
    assert 2 * 0.99 <= tau.min() < 2.1
    assert 450 < tau.max() <= 500 * 1.01
    assert abs(tau.log().mean() - math.log(2 * 500) / 2) < 0.1
    dense = GatedSSM(8, 50, "tanh", "dense", memory=(1, 100)).transition().double()
    values = torch.linalg.svdvals(dense)
    torch.testing.assert_close(values, torch.full_like(values, math.exp(-1 / 100)), rtol=1e-5, atol=0)
    for options in ({}, {"activation": "relu"}, {"transition": "dense"}):
        _, state = GatedSSM(32, 64, **options).extend(torch.randn(4, 3000, 32))
        assert 0.1 < state.h.std() < 2, options  # neither vanishing nor growing with memory


def test_a_diagonal_stays_below_one_whatever_training_does() -> None:
    layer = GatedSSM(4)
    with torch.no_grad():
        layer.A_raw += 100 * torch.randn(4)
    assert layer.transition().abs().max() <= 1
    names = {n for n, p in layer.named_parameters() if any(p is q for q in param_groups(layer, 0.1)[0]["params"])}
    assert names == {"in_proj.weight", "gate_proj.weight", "skip_proj.weight", "out_proj.weight"}
    dense = param_groups(GatedSSM(4, transition="dense"), 0.1)[0]["params"]
    assert all(p.shape == (4, 4) for p in dense)
    assert len(dense) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 0}, "d_model is 0"), ({"d_state": 0}, "d_state is 0"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"transition": "full"}, "transition is 'full', expected one of 'diagonal', 'dense'"),
        ({"gate": "tfidf"}, "gate is 'tfidf'"), ({"memory": 5}, "memory is 5, expected two numbers"),
        ({"memory": (0, 5)}, r"memory\[0\] is 0"), ({"memory": (9, 5)}, r"memory\[1\] is 5"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^GatedSSM: {message}"):
        GatedSSM(**{"d_model": 4, **options})


def test_wrong_gates() -> None:
    layer, x = GatedSSM(4, 6, gate="given"), torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="its gate is given, and this call gives none"):
        layer(x)
    for wrong in (torch.rand(2, 4), torch.rand(2, 3, 4), torch.rand(2, 3, 6, 1)):
        with pytest.raises(ValueError, match="gate has shape"):
            layer(x, gate=wrong)
    with pytest.raises(TypeError, match="gate is int64"):
        layer(x, gate=torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 5\)"):
        layer(torch.randn(2, 3, 5), gate=torch.rand(2, 3))
