"""S4D beyond the law of tests/test_layers.py: long sequences against dense powers, golden values, the known traps."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stateline
from stateline import nn as sl
from stateline.interop import exported_program
from stateline.models import LanguageModel, ModelConfig
from stateline.theory import dplr, hippo

F64 = torch.float64
INITS = ["legs", "inv", "inv2", "lin", "quad", "rand", "real"]


def bare(d_model: int = 3, d_state: int = 8, kind: type = sl.S4D, **options: Any) -> Any:
    """A layer that shows what its state space computes, in float64: no activation, the projection the identity."""
    layer = kind(d_model, d_state, activation=None, final_act=None, dtype=F64, **options)
    with torch.no_grad():
        layer.output_linear[0].weight.copy_(torch.eye(d_model))
        layer.output_linear[0].bias.zero_()
    return layer.eval()


def exponential(M: Tensor) -> Tensor:
    """e^M by its series at M / 1024 and ten squarings. (torch's of a complex matrix is good to 1e-9.)"""
    term = total = torch.eye(len(M), dtype=M.dtype)
    for i in range(1, 16):
        term = term @ M / (1024 * i)
        total = total + term
    for _ in range(10):
        total = total @ total
    return total


def dense(layer: Any, u: Tensor, start: Tensor | None = None) -> Tensor:
    """y (b, t, h): every channel as a 2n × 2n system on states and conjugates, sampled as a whole, run as a loop."""
    kernel = layer.kernel
    dt, A = kernel.inv_dt.exp() * layer.rate, torch.complex(-kernel.A_real.exp(), -kernel.A_imag)
    copies = layer.d_model // A.shape[0]
    A, B = (v.repeat(copies, 1) for v in (A, torch.view_as_complex(kernel.B)[0]))
    C = torch.view_as_complex(kernel.C)[0]
    ys = []
    for h in range(layer.d_model):
        M, N = torch.diag(torch.cat([A[h], A[h].conj()])), torch.cat([B[h], B[h].conj()])[:, None]
        if isinstance(layer, sl.S4):
            P = torch.view_as_complex(kernel.P).repeat(1, copies, 1)[:, h]
            P = torch.cat([P, P.conj()], 1)
            M = M - P.T @ P.conj()
        M, N, size = M * dt[h], N * dt[h], len(M)
        if getattr(kernel, "rule", "bilinear") == "zoh":
            both = exponential(torch.cat([torch.cat([M, N], 1), M.new_zeros(1, size + 1)]))
            M, N = both[:size, :size], both[:size, size:]
        else:
            left = torch.linalg.inv(torch.eye(size, dtype=M.dtype) - M / 2)
            M, N = left @ (torch.eye(size, dtype=M.dtype) + M / 2), left @ N
        read = torch.cat([C[h], C[h].conj()])
        x = M.new_zeros(len(u), size) if start is None else torch.view_as_complex(start[:, h].contiguous())
        x = x if start is None else torch.cat([x, x.conj()], 1)
        y = []
        for t in range(u.shape[1]):
            x = x @ M.T + (u[:, t, h, None] + 0j) @ N.T
            y.append((x @ read).real + layer.D[0, h] * u[:, t, h])
        ys.append(torch.stack(y, 1))
    return torch.stack(ys, -1)


KINDS: dict[str, dict[str, Any]] = {
    **{f"s4d {init} {rule}": {"init": init, "discretization": rule} for init in INITS for rule in ("zoh", "bilinear")},
    **{f"s4 {init}": {"kind": sl.S4, "init": init} for init in ("legs", "legt", "lagt", "fourier")},
    "s4 rank 2": {"kind": sl.S4, "rank": 2, "n_ssm": 1}, "s4 rank 3": {"kind": sl.S4, "init": "legt", "rank": 3},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_all_modes_equal_dense_powers_for_every_initialiser(kind: str) -> None:
    layer, u = bare(**KINDS[kind]), torch.randn(2, 200, 3, dtype=F64)
    with torch.no_grad():
        for name, parameter in layer.kernel.named_parameters():
            if name == "P":  # a rank that begins as zeros counts too
                parameter += 0.1 * torch.randn_like(parameter)
    want = dense(layer, u)
    bound = 1e-11 * want.abs().max()
    assert (layer(u) - want).abs().max() <= bound
    layer.mode = "convolution"
    for t in (200, 199, 1):
        assert (layer(u[:, :t]) - want[:, :t]).abs().max() <= bound
    state = layer.init_state(2)
    stepped = torch.stack([layer.step_(u[:, i], state) for i in range(200)], 1)
    assert (stepped - want).abs().max() <= bound


@pytest.mark.parametrize("kind", ["s4d lin zoh", "s4 legs", "s4 legt", "s4 fourier"])
def test_float32_is_within_its_bound_over_a_long_sequence(kind: str) -> None:
    """Phases come from float64: at 16,384 steps a float32 kernel is as exact as at the first."""
    layer, u = bare(2, 16, **KINDS[kind]), torch.randn(1, 16384, 2, dtype=F64)
    want = layer(u)
    narrow = layer.float()
    for mode in ("scan", "convolution"):
        narrow.mode = mode
        assert (narrow(u.float()) - want).abs().max() <= 2e-5 * want.abs().max(), mode
    state = narrow.init_state(1)
    stepped = torch.stack([narrow.step_(u[:, i].float(), state) for i in range(2000)], 1)
    assert (stepped - want[:, :2000]).abs().max() <= 2e-5 * want.abs().max()


def test_c_is_never_rewritten_and_lengths_may_come_in_any_order() -> None:
    """The S4 repository turns C into C (I − Ā^L) at the first call, and again when sequences grow."""
    layer = bare(kind=sl.S4, mode="convolution")
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    u = torch.randn(1, 130, 3, dtype=F64)
    whole = layer(u)
    for t in (5, 130, 64, 1, 7):
        assert torch.allclose(layer(u[:, :t]), whole[:, :t], atol=1e-11)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert set(before) == {"D", "output_linear.0.weight", "output_linear.0.bias"} | {
        f"kernel.{name}" for name in ("inv_dt", "A_real", "A_imag", "B", "C", "P")
    }


@pytest.mark.parametrize("kind", [sl.S4D, sl.S4])
def test_nothing_is_set_up_before_stepping(kind: type) -> None:
    """The S4 repository wants setup_step() first, and again whenever parameters or the rate have changed."""
    layer, x = kind(4, 8), torch.randn(1, 3, 4)
    state = layer.init_state(1)
    stepped = [layer.step_(x[:, 0], state)]
    assert torch.allclose(stepped[0], layer(x)[:, 0], atol=1e-5)
    with torch.no_grad():
        layer.kernel.A_imag.mul_(2)
    layer.rate = 0.5
    state = layer.init_state(1)
    stepped = [layer.step_(x[:, i], state) for i in range(3)]
    assert torch.allclose(torch.stack(stepped, 1), layer(x), atol=1e-5)


def test_b_is_not_clipped_so_that_legs_is_exactly_hippo() -> None:
    kernel = sl.S4(1, 64, dtype=F64).kernel
    B, P = torch.view_as_complex(kernel.B)[0, 0], torch.view_as_complex(kernel.P)[:, 0]
    assert B.abs().max() > 40
    w = torch.complex(-kernel.A_real.exp(), -kernel.A_imag)[0]
    A, b = hippo.transition("legs", 64)
    V = dplr.nplr("legs", 64)[3]
    assert torch.allclose(dplr.dense(w, P, V), A, atol=1e-11)
    assert torch.allclose(2 * (V @ B).real, b, atol=1e-11)


def test_dplr_kernel_of_legs_is_the_known_one() -> None:
    layer = bare(1, 4, sl.S4)
    V = dplr.nplr("legs", 4)[3]
    with torch.no_grad():
        layer.kernel.inv_dt.fill_(0.1).log_()
        layer.kernel.C.copy_(torch.view_as_real(torch.ones(4, dtype=V.dtype) @ V))
        layer.D.zero_()
    impulse = torch.zeros(1, 6, 1, dtype=F64)
    impulse[0, 0] = 1
    want = torch.tensor([0.547052, 0.223439, 0.063994, -0.004599, -0.025622, -0.023929], dtype=F64)
    for mode in ("scan", "convolution"):
        layer.mode = mode
        assert torch.allclose(layer(impulse).flatten(), want, atol=5e-7)


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


@pytest.mark.parametrize("kind", [sl.S4D, sl.S4])
@pytest.mark.parametrize("mode", ["scan", "convolution"])
def test_long_pieces_padding_and_packing_agree(mode: str, kind: type) -> None:
    layer = bare(mode=mode, kind=kind)
    lengths = [300, 0, 64, 65, 1]
    u = torch.randn(5, 300, 3, dtype=F64)
    start = sl.S4State(torch.randn(5, 3, 4, 2, dtype=F64))
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
        alone = layer.extend(u[i : i + 1, :n], sl.S4State(start.x[i : i + 1]))[1]
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


@pytest.mark.parametrize("kind", [{"init": "lin"}, {"kind": sl.S4}], ids=["s4d", "s4"])
def test_rate_runs_a_model_at_another_sampling_rate(kind: dict[str, Any]) -> None:
    """A slow signal at half the samples gives nearly the same numbers at those samples; without rate it does not."""
    layer = bare(d_state=16, dt_min=0.001, dt_max=0.005, **kind)
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


def test_what_is_kept_between_calls_follows_every_change() -> None:
    """Without gradients S4D keeps its sampled system; values decide, since `.data` tells nobody that it was written."""
    layer, x = sl.S4D(4, 8).eval(), torch.randn(2, 30, 4)

    def fresh() -> sl.S4D:
        new = sl.S4D(4, 8, rate=layer.rate).eval()
        new.load_state_dict(layer.state_dict())
        return new

    def same() -> None:
        with torch.no_grad():
            assert torch.equal(layer(x), fresh()(x))
            one, two = layer.init_state(2), layer.init_state(2)
            assert torch.equal(layer.step_(x[:, 0], one), fresh().step_(x[:, 0], two))
            assert torch.equal(one.x, two.x)

    same()
    for name, parameter in layer.named_parameters():
        before = layer(x).detach()
        parameter.data.mul_(1.5).add_(0.1)
        same()
        assert not torch.equal(layer(x), before), name
    layer.rate = 3.0
    same()
    with torch.no_grad():
        layer(x)
    copied = pickle.loads(pickle.dumps(layer))
    assert copied.kernel._kept == {}
    assert len(layer.kernel._kept) > 0
    assert torch.equal(copied(x), layer(x))


@pytest.mark.parametrize("layer", ["S4D", "S4"])
def test_language_models_are_exported_for_any_length_or_refused(layer: str, tmp_path: Path) -> None:
    model = LanguageModel(ModelConfig(d_model=8, n_layer=2, vocab_size=20, ssm_cfg={"layer": layer, "d_state": 4}))
    if layer == "S4D":
        program = exported_program(model).module()
        ids = torch.randint(20, (3, 50))
        logits, state = program(ids[:, :40], model.init_state(3))
        more, _ = program(ids[:, 40:], state)
        assert torch.allclose(torch.cat([logits, more], 1), model(ids), atol=1e-5)
    else:
        with pytest.raises(ValueError, match="s4_scan: chunks in PyTorch are counted"):
            exported_program(model)
    for form in ("mamba_ssm", "huggingface", "gguf"):
        with pytest.raises(ValueError, match=r"save: .*Use format=.stateline"):
            stateline.save(model, tmp_path / "x", format=form)
    stateline.save(model, tmp_path / "ours")
    assert stateline.load(tmp_path / "ours").config == model.config


def test_s4_samples_its_system_once_for_calls_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = sl.S4(4, 8).eval(), torch.randn(2, 9, 4)
    with torch.no_grad():
        y, state = layer.extend(x[:, :5])
        made, kept = type(layer.kernel).sampled, []
        monkeypatch.setattr(type(layer.kernel), "sampled", lambda *a: kept.append(a) or made(*a))
        again, same = layer.extend(x[:, :5])
        assert torch.equal(again, y)
        assert torch.equal(same.x, state.x)
        assert len(kept) == 0
        layer.kernel.C.data.mul_(2)
        assert not torch.equal(layer.extend(x[:, :5])[0], y)
        layer.rate = 2.0
        layer.extend(x[:, :5])
    assert len(kept) == 2
    layer.extend(x[:, :5])  # with gradients nothing is kept
    assert len(kept) == 3


@pytest.mark.parametrize("kind", [sl.S4, sl.S4D])
def test_what_is_kept_is_bounded(kind: type) -> None:
    layer, x = kind(4, 8).eval(), torch.randn(1, 70, 4)
    with torch.no_grad():
        for i in range(12):
            layer.rate = 1 + i / 4
            whole = layer(x)
            first, state = layer.extend(x[:, :3])
            assert torch.allclose(torch.cat([first, layer.extend(x[:, 3:], state)[0]], 1), whole, atol=1e-5)
    assert 1 < len(layer.kernel._kept) <= layer.kernel.memories


@pytest.mark.parametrize("kind", [sl.S4, sl.S4D, sl.S5])
def test_layers_are_built_under_any_device(kind: type) -> None:
    with torch.device("meta"):
        layer = kind(4, 8)
    assert all(p.is_meta for p in layer.parameters())


@pytest.mark.parametrize("kind", [sl.S4, sl.S4D])
def test_running_backwards_checks_its_input_first(kind: type) -> None:
    for wrong in (torch.randn(5, 4), torch.randn(1, 5, 3), [1.0]):
        with pytest.raises((ValueError, TypeError), match=f"^{kind.__name__}: x "):
            kind(4, 8)(wrong, reverse=True)


def test_convolutions_of_any_length_are_of_fast_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prime number of steps must not be transformed as twice that prime, which takes several times as long."""
    sizes: list[int] = []
    rfft = torch.fft.rfft
    monkeypatch.setattr(torch.fft, "rfft", lambda *a, **k: sizes.append(k.get("n", a[0].shape[-1])) or rfft(*a, **k))
    layer, x = sl.S4D(2, 8, mode="convolution").eval(), torch.randn(1, 1009, 2)
    y = layer(x)
    for size in sizes:
        assert size >= 2 * 1009 - 1
        for factor in (2, 3, 5):
            while size % factor == 0:
                size //= factor
        assert size == 1
    assert len(sizes) == 2
    layer.mode = "scan"
    assert torch.allclose(layer(x), y, atol=1e-5)


@pytest.mark.parametrize("kind", [sl.S4, sl.S4D])
def test_packed_sequences_compile(kind: type) -> None:
    layer, x, cu_seqlens = kind(4, 8).eval(), torch.randn(1, 9, 4), torch.tensor([0, 3, 3, 9])
    whole = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.allclose(whole(x, cu_seqlens=cu_seqlens), layer(x, cu_seqlens=cu_seqlens), atol=1e-5)


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
