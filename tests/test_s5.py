"""S5: the initial system, its discretisation against matrix exponentials, sampling rates, both directions, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stateline import LanguageModel, ModelConfig, ops
from stateline import nn as sl
from stateline.theory.dplr import nplr


def legs(n: int) -> Tensor:
    """HiPPO-LegS's A, entry by entry."""
    A = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(i + 1):
            A[i, j] = -(i + 1) if i == j else -(((2 * i + 1) * (2 * j + 1)) ** 0.5)
    return A


def dense(layer: sl.S5) -> tuple[Tensor, Tensor, Tensor]:
    """A (n, n), B (n, d), C (d, n) of the real system whose conjugate halves the layer keeps."""
    A = torch.complex(-layer.A_log.exp(), layer.A_imag)
    B = torch.view_as_complex(layer.B.weight.unflatten(0, (-1, 2)).transpose(1, 2).contiguous())
    C = torch.view_as_complex(layer.C.weight.unflatten(1, (-1, 2)).contiguous()).conj() / 2
    both = [torch.cat([v, v.conj()], dim) for v, dim in ((A, 0), (B, 0), (C, 1))]
    return torch.diag(both[0]), both[1], both[2]


@pytest.mark.parametrize("n", [2, 8, 64])
def test_the_initial_system_is_the_normal_part_of_legs(n: int) -> None:
    w, _, _, V = nplr("legs", n)
    P = torch.arange(n, dtype=torch.float64).add(0.5).sqrt()
    A = legs(n) + torch.outer(P, P)  # normal
    assert (w.imag < 0).all()
    assert torch.allclose(V.mH @ V, torch.eye(n // 2, dtype=torch.complex128), atol=1e-12)
    assert torch.allclose(2 * (V @ torch.diag(w) @ V.mH).real, A, atol=1e-10 * n)


def test_blocks_and_step_sizes() -> None:
    layer = sl.S5(7, 24, 3, 0.01, 0.2)
    w, *_ = nplr("legs", 8)
    assert torch.allclose(-layer.A_log.exp(), w.real.float().repeat(3))
    assert torch.allclose(layer.A_imag, w.imag.float().repeat(3))
    dt = sl.S5(4, 2048, 64).log_dt.exp()
    assert dt.min() >= 0.001 * (1 - 1e-5)
    assert dt.max() <= 0.1 * (1 + 1e-5)
    assert abs(dt.log().mean() - torch.tensor(1e-4).log() / 2) < 0.15  # log-uniform
    torch.manual_seed(3)
    one = sl.S5(7, 8)
    torch.manual_seed(3)
    assert torch.equal(one.B.weight, sl.S5(7, 8).B.weight)


@pytest.mark.parametrize("rate", [1.0, 2.5])
def test_the_linear_system_is_the_held_input_of_a_differential_equation(rate: float) -> None:
    """y from dense matrix exponentials: x(t+dt) = e^(A dt) x + ∫ e^(A s) ds B u, all of it in one exponential."""
    layer = sl.S5(3, 12, 2, activation=None, dtype=torch.float64)
    layer.rate = rate
    with torch.no_grad():
        layer.log_dt += 1
    u = torch.randn(1, 30, 3, dtype=torch.float64)
    A, B, C = dense(layer)
    n, dt = len(A), torch.cat([layer.log_dt.exp()] * 2) * rate
    block = torch.zeros(n + 3, n + 3, dtype=torch.complex128)
    block[:n, :n], block[:n, n:] = dt[:, None] * A, dt[:, None] * B
    block = torch.linalg.matrix_exp(block)
    x, ys = torch.zeros(n, dtype=torch.complex128), []
    for step in u[0]:
        x = block[:n, :n] @ x + block[:n, n:] @ step.to(torch.complex128)
        ys.append((C @ x).real + layer.D * step)
    want = torch.stack(ys).detach()
    assert torch.allclose(layer(u)[0], want, atol=1e-10)
    state = layer.init_state(1)
    assert torch.allclose(torch.stack([layer.step_(u[:, t], state)[0] for t in range(30)]), want, atol=1e-10)


def test_it_is_a_convolution_with_a_matrix_for_every_age() -> None:
    """What S5 has for a third mode: taps W_i = 2 Re(C Ā^i B̄), which mix channels."""
    layer, u = sl.S5(3, 8, activation=None, dtype=torch.float64), torch.randn(2, 40, 3, dtype=torch.float64)
    with torch.no_grad():
        decay, gain = layer._system()
        B, C = torch.view_as_complex(layer.B.weight.unflatten(0, (-1, 2)).mT.contiguous()), layer.C.weight
        C = torch.view_as_complex(C.unflatten(1, (-1, 2)).contiguous()).conj()
        taps = torch.einsum("dp,pi,pe->ide", C, decay[:, None] ** torch.arange(40), gain[:, None] * B).real
        taps[0] += torch.diag(layer.D)
        assert torch.allclose(layer(u), ops.long_conv(u, taps)[0], atol=1e-12)


def test_half_the_samples_at_twice_the_rate_see_the_same_signal() -> None:
    layer = sl.S5(2, 32, dt_max=0.01, activation=None, dtype=torch.float64)
    t = torch.linspace(0, 6, 4000, dtype=torch.float64)
    signal = torch.stack([t.sin(), (2 * t).cos()], -1)[None]
    whole = layer(signal)
    layer.rate = 2.0
    half = layer(signal[:, ::2])
    error = (half - whole[:, ::2]).abs().max() / whole.abs().max()
    assert error < 0.02
    layer.rate = 1.0
    assert (layer(signal[:, ::2]) - whole[:, ::2]).abs().max() / whole.abs().max() > 5 * error


def test_both_directions() -> None:
    layer = sl.Bidirectional(sl.S5(6, 8).double(), shared=True)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    want = layer.ahead(x) + layer.ahead(x.flip(1)).flip(1)
    assert torch.allclose(layer(x), want, atol=1e-12)
    padded = layer(x, lengths=[9, 4])
    assert torch.allclose(padded[1:, :4], layer(x[1:, :4]), atol=1e-12)


def test_gradients_reach_every_parameter_in_bfloat16_too() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = sl.S5(6, 8).to(dtype)
        layer(torch.randn(2, 9, 6).to(dtype)).float().square().sum().backward()
        for name, p in layer.named_parameters():
            assert p.grad is not None, name
            assert p.grad.isfinite().all()
            assert p.grad.any(), name


def test_a_language_model_of_s5() -> None:
    config = ModelConfig(d_model=16, n_layer=1, vocab_size=31, ssm_cfg={"layer": "S5", "d_state": 8, "blocks": 2})
    model = LanguageModel(ModelConfig.from_dict(config.to_dict())).eval()
    ids = torch.randint(31, (2, 12))
    whole = model(ids)
    logits, state = model.extend(ids[:, :5])
    rest, _ = model.extend(ids[:, 5:], state)
    assert torch.allclose(torch.cat([logits, rest], 1), whole, atol=1e-5)
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(fast(ids), whole, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 9}, "d_state is 9 and blocks is 1, expected a multiple"), ({"blocks": 3}, "multiple of 2"),
        ({"d_state": 0}, "d_state"), ({"dt_min": 0}, "dt_min"), ({"dt_max": 1e-6}, "dt_max"),
        ({"activation": "relu"}, "activation is 'relu'"), ({"rate": -1.0}, "rate is -1"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^S5: .*{message}"):
        sl.S5(**{"d_model": 8, "d_state": 16, **options})


def test_states_of_any_strides_and_of_one_precision() -> None:
    layer, x = sl.S5(8, 16).eval(), torch.randn(2, 5, 8)
    _, state = layer.extend(x)
    turned = sl.S5State(state.ssm.transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(layer.extend(x, turned)[0], layer.extend(x, state)[0])
    for call in (layer.extend, lambda x, s: layer.step_(x[:, 0], s)):
        with pytest.raises(TypeError, match=r"^S5: initial_state is bfloat16, expected one of float32\. A state keeps"):
            call(x, sl.S5State(state.ssm.bfloat16()))


def test_a_rate_is_checked_where_it_is_set() -> None:
    layer = sl.S5(8, 16)
    for wrong in (0.0, -2.0, "fast"):
        with pytest.raises((ValueError, TypeError), match=r"^S5: rate is"):
            layer.rate = wrong  # type: ignore[assignment]  # wrong on purpose
    assert layer.rate == 1


def test_as_many_states_as_channels_and_a_rate_for_time_constants() -> None:
    from stateline.nn import param_groups

    assert [sl.S5(d, blocks=j).d_state for d, j in ((16, 1), (7, 1), (10, 3))] == [16, 8, 12]
    layer = sl.S5(4, lr=0.002)
    (group,) = (g for g in param_groups(layer, 0.1) if g.get("lr") == 0.002)
    assert {id(p) for p in group["params"]} == {id(p) for p in (layer.A_log, layer.A_imag, layer.log_dt)}
    assert group["weight_decay"] == 0
    assert all("lr" not in g for g in param_groups(sl.S5(4, lr=None), 0.1))
    assert [g["lr"] for g in param_groups(sl.S5(4, lr=0), 0.1) if "lr" in g] == [0]
    with pytest.raises(ValueError, match=r"^S5: lr"):
        sl.S5(4, lr=-1.0)
