"""Mamba3 beyond the law of layers: initial values, published numbers, other libraries, and bugs that they have had.

| bug seen in another library | test |
|---|---|
| the activation of A changed, and no checkpoint says which it wants | test_the_activation_of_A_is_an_argument |
| with and without ranks, other pairs of states turn | test_one_rank_is_none_with_the_same_pairs |
| decoding through the generation loop, or a prompt of one token, fails | test_generation_and_prompts_of_one_token |
| decoding takes one group, or a group a head, and nothing between | test_any_number_of_groups_decodes |
| sequence ids are accepted and ignored | test_packed_sequences_do_not_leak |
| with ranks, packed sequences all end with the batch's last token | test_packed_sequences_have_own_last_tokens |
| angles in bfloat16, and their gradients a fifth off | test_angles_and_their_gradients_are_exact |
| a model with ranks, cast to 16 bits, does not run | test_cast_to_16_bits_it_runs_and_keeps_its_parameters |
| a padded token changes the state | test_padding_does_not_reach_the_state |
| offsets of 32 bits: wrong far into large inputs | test_offsets_have_64_bits |
| softplus loses small steps | test_small_steps_are_not_lost |
| decoding fails under autocast | test_autocast_decodes |
| with ranks, no initial state, and no gradient out of the last one | test_every_form_starts_from_a_state |
| states in the weights' dtype | test_cast_to_16_bits_it_runs_and_keeps_its_parameters |
| x, z and the rest taken in the wrong order | test_rows_of_the_projection |
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from makers import edit, small
from torch import Tensor, nn

import stateline
from stateline import ModelConfig, ops
from stateline import nn as sl
from stateline.generation import Engine, SamplingConfig, Stream, generate_tokens
from stateline.ops.trapezoid_ssd.controls import heavy_tail
from stateline.ops.trapezoid_ssd.reference import turn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.plain_mamba3 import PlainMamba3  # a folder of the repository, not of the package

GROUPED: dict[str, Any] = {"d_state": 6, "headdim": 4, "ngroups": 2}  # d_model 16: 8 heads
RANKED: dict[str, Any] = GROUPED | {"is_mimo": True, "mimo_rank": 3}


def layer(**options: Any) -> sl.Mamba3:
    made = sl.Mamba3(16, **(GROUPED | options)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def plain_forward(m: sl.Mamba3, x: Tensor) -> Tensor:
    """One sequence (t, d_model) by the formulas of the paper, a token, a head and a rank at a time, in float64."""
    p = {name: v.detach().double() for name, v in m.named_parameters()}
    E, H, P, N, G, R, S = m.d_inner, m.nheads, m.headdim, m.d_state, m.ngroups, m.mimo_rank, m.num_rope_angles
    rows = x.double() @ p["in_proj.weight"].T
    z, v, B, C, dt, A, trap, angles = rows.split([E, E, R * G * N, R * G * N, H, H, H, S], -1)
    dt, blend = F.softplus(dt + p["dt_bias"]), torch.sigmoid(trap)
    A = {"heavy_tail": lambda a: torch.where(a < 0, 1 / (1 - a), 1 + a), "softplus": F.softplus}[m.A_activation](A)
    A = -A.clamp(min=m.A_floor)
    pairs = [(2 * i, 2 * i + 1) if m.rope_interleaved else (i, N // 2 + i) for i in range(S)]
    one = torch.ones(H, R, P, dtype=torch.float64)
    mix, gate, add = (p.get(f"mimo_{name}", one) for name in "xzo")

    def row(projected: Tensor, kind: str, t: int, r: int, h: int, theta: Tensor) -> Tensor:
        g = h // (H // G)  # neighbouring heads share a group
        out = (
            F.rms_norm(projected[t].view(R, G, N)[r, g], (N,), p[f"{kind}_norm.weight"], 1e-5) + p[f"{kind}_bias"][h, r]
        )
        turned = out.clone()
        for i, (a, b) in enumerate(pairs):
            c, s = theta[i].cos(), theta[i].sin()
            turned[a], turned[b] = c * out[a] - s * out[b], s * out[a] + c * out[b]
        return turned

    y = torch.zeros(len(x), E, dtype=torch.float64)
    for h in range(H):
        span = slice(h * P, (h + 1) * P)
        state, theta, before = torch.zeros(P, N, dtype=torch.float64), torch.zeros(S, dtype=torch.float64), 0.0
        for t in range(len(x)):
            theta = theta + torch.pi * angles[t].tanh() * dt[t, h]
            input_t = sum(torch.outer(mix[h, r] * v[t, span], row(B, "B", t, r, h, theta)) for r in range(R))
            decay = torch.exp(A[t, h] * dt[t, h])
            state = decay * (state + (1 - blend[t, h]) * dt[t, h] * before) + blend[t, h] * dt[t, h] * input_t
            before = input_t
            for r in range(R):
                out = state @ row(C, "C", t, r, h, theta) + p["D"][h] * mix[h, r] * v[t, span]
                if m.norm is not None:
                    out = F.rms_norm(out, (P,), p["norm.weight"][span], 1e-5)
                y[t, span] += add[h, r] * out * F.silu(gate[h, r] * z[t, span])
    return y @ p["out_proj.weight"].T


@pytest.mark.parametrize(
    "options",
    [
        {}, {"ngroups": 1, "rope_fraction": 1.0}, {"ngroups": 8, "A_activation": "softplus"}, {"is_outproj_norm": True},
        {"rope_interleaved": False}, {"rope_fraction": 0.0}, {"expand": 1, "A_floor": 1.5}, RANKED,
        RANKED | {"is_outproj_norm": True}, RANKED | {"rope_interleaved": True, "rope_fraction": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_equals_the_formulas(options: dict[str, Any]) -> None:
    m, x = layer(**options), torch.randn(2, 6, 16)
    with torch.no_grad():
        y, state = m(x), m.init_state(2)
        stepped = torch.stack([m.step_(x[:, i], state) for i in range(6)], 1)
    for got in (y, stepped):
        for row, want in zip(got, (plain_forward(m, v) for v in x), strict=True):
            assert (row - want).abs().max() < 5e-6 * want.abs().max()


@pytest.mark.parametrize("form", ["loop", "quadratic"])
def test_plain_pytorch_that_it_is_measured_beside_says_the_same(form: str) -> None:
    m, x = layer(ngroups=1), torch.randn(2, 9, 16)
    assert torch.allclose(PlainMamba3(16, form, m)(x), m(x), atol=1e-5)


def test_shapes_are_those_of_mamba3_1_5b() -> None:
    shapes = {name: tuple(p.shape) for name, p in sl.Mamba3(2048, device="meta").named_parameters()}
    assert shapes == {
        "dt_bias": (64,), "B_bias": (64, 1, 128), "C_bias": (64, 1, 128), "D": (64,), "in_proj.weight": (8672, 2048),
        "B_norm.weight": (128,), "C_norm.weight": (128,), "out_proj.weight": (2048, 4096),
    }  # fmt: skip
    ranked = sl.Mamba3(2048, is_mimo=True, is_outproj_norm=True, device="meta")
    more = {name: tuple(p.shape) for name, p in ranked.named_parameters()}
    assert more.keys() - shapes.keys() == {"mimo_x", "mimo_z", "mimo_o", "norm.weight"}
    assert (more["in_proj.weight"], more["B_bias"], more["mimo_x"]) == ((9440, 2048), (64, 4, 128), (64, 4, 64))


def test_initial_values() -> None:
    m = sl.Mamba3(1024, 16, headdim=2, dt_min=0.01, dt_max=0.2, is_mimo=True, mimo_rank=4)
    for name, value in {"D": 1, "B_bias": 1, "C_bias": 1, "mimo_x": 0.25, "mimo_z": 1, "mimo_o": 0.25}.items():
        assert (m.get_parameter(name) == value).all(), name
    steps = F.softplus(m.dt_bias)
    assert steps.min() >= 0.01 * (1 - 1e-4)
    assert steps.max() <= 0.2 * (1 + 1e-4)
    assert abs(steps.log().mean() - torch.tensor(0.01 * 0.2).log() / 2) < 0.1
    decayed = {id(p) for p in sl.param_groups(m, 0.1)[0]["params"]}
    assert decayed == {id(m.in_proj.weight), id(m.out_proj.weight)}
    assert len(sl.param_groups(sl.Mamba3(16, headdim=4), 0.1)[1]["params"]) == 6  # without ranks, nothing of theirs


def test_published_numbers_of_the_scan() -> None:
    Q = torch.tensor([[1, 0, 0.5, 0], [0, 1, 0, 1], [1, 1, 0, 0]]).view(1, 3, 1, 4)
    K = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1], [0.5, 0.5, 1, 0]]).view(1, 3, 1, 4)
    x, dt, A = (torch.tensor(v).view(1, 3, 1) for v in ([1.0, -1, 2], [0.5, 1, 0.25], [-1, -0.5, -2]))
    blend = torch.tensor([0.0, 1, -1]).sigmoid().view(1, 3, 1)
    one, D = torch.ones(1, 1, 4), torch.tensor([0.5])
    more = {"rates": torch.tensor([0.5, -1, 2]).tanh().view(1, 3, 1) / 2, "B_bias": one, "C_bias": one, "D": D}
    z = torch.tensor([1.0, 2, -1]).view(1, 3, 1, 1)
    for backend in (None, "chunked", "reference"):
        y, (angle, state, k, v) = ops.trapezoid_ssd(x[..., None], dt, A, blend, K, Q, z=z, **more, backend=backend)
        assert torch.allclose(y.flatten(), torch.tensor([1.827646, -12.283808, 0.266389]), atol=3e-6)
        assert (angle.item() % 1) * 2 * torch.pi == pytest.approx(5.373604, abs=2e-6)
        assert torch.allclose(state.flatten(), torch.tensor([-0.273146, 1.533471, 0.096495, -0.783145]), atol=2e-6)
        assert torch.allclose(k.flatten(), torch.tensor([2.104985, -0.262755, 2, 1]), atol=2e-6)
        assert v.item() == 2


def test_published_numbers_of_turning_and_of_the_activation() -> None:
    angle = torch.tensor(1.0).tanh().view(1) / 2 * 0.5
    row = torch.tensor([[1.0, 2, 3, 4]])
    assert torch.allclose(turn(row, angle, True), torch.tensor([[-1.495596, 1.662286, 3, 4]]), atol=2e-6)
    assert torch.allclose(turn(row, angle, False), torch.tensor([[-2.426291, 2, 2.028081, 4]]), atol=2e-6)
    points = torch.tensor([-3, -0.5, 0, 0.5, 3], dtype=torch.float64, requires_grad=True)
    assert torch.allclose(heavy_tail(points), torch.tensor([0.25, 2 / 3, 1, 1.5, 4], dtype=torch.float64))
    assert torch.autograd.gradcheck(heavy_tail, points + 1e-3)
    huge = torch.tensor([1.0, -1e30, 1e30], requires_grad=True)
    heavy_tail(huge).sum().backward()
    assert huge.grad is not None
    assert huge.grad.isfinite().all()


# ---- bugs of others --------------------------------------------------------------------------------------------------


def test_the_activation_of_A_is_an_argument(tmp_path: Path) -> None:
    """Stored by our format, refused where a format has no word for it, and never guessed from weights."""
    m, x = layer(), torch.randn(1, 5, 16)
    y = m(x)
    m.A_activation = "softplus"
    assert not torch.allclose(m(x), y, atol=1e-3)
    config = {"layer": "Mamba3", "d_state": 4, "headdim": 5}
    new, old = small(ssm_cfg=config), small(ssm_cfg=config | {"A_activation": "softplus"})
    for model, format, refused in ((new, "mamba_ssm", "huggingface"), (old, "huggingface", "mamba_ssm")):
        stateline.save(model, tmp_path / format, format)
        again = stateline.load(tmp_path / format)
        assert again.backbone.layers[0].mixer.A_activation == model.backbone.layers[0].mixer.A_activation
        with pytest.raises(ValueError, match=r"A_activation is '(heavy_tail|softplus)'"):
            stateline.save(model, tmp_path / "other", refused)
    edit(tmp_path / "mamba_ssm" / "config.json", ssm_cfg=config | {"A_activation": "softplus"})  # by who knows its age
    assert stateline.load(tmp_path / "mamba_ssm").backbone.layers[0].mixer.A_activation == "softplus"
    with pytest.raises(ValueError, match="A_activation is 'relu', expected one of 'heavy_tail', 'softplus'"):
        layer(A_activation="relu")


def test_one_rank_is_none_with_the_same_pairs() -> None:
    """Without ranks neighbours turn, with them states n/2 apart: another order of the states, or `rope_interleaved`."""
    m, x = layer(d_state=8, rope_fraction=1.0), torch.randn(2, 5, 16)
    weights = m.state_dict() | {name: torch.ones(8, 1, 4) for name in ("mimo_x", "mimo_z", "mimo_o")}
    options = GROUPED | {"d_state": 8, "rope_fraction": 1.0, "is_mimo": True, "mimo_rank": 1}
    same = sl.Mamba3(16, **options, rope_interleaved=True)
    same.load_state_dict(weights)
    assert torch.allclose(same(x), m(x), atol=1e-6)
    other = sl.Mamba3(16, **options)
    other.load_state_dict(weights)
    assert not torch.allclose(other(x), m(x), atol=1e-3)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    for name in ("B_norm.weight", "C_norm.weight", "B_bias", "C_bias"):
        weights[name] = weights[name][..., order]
    z_x_B_C = weights["in_proj.weight"].split([32, 32, 16, 16, 8, 8, 8, 4])
    turned = [v.view(2, 8, 16)[:, order].reshape(16, 16) if i in (2, 3) else v for i, v in enumerate(z_x_B_C)]
    other.load_state_dict(weights | {"in_proj.weight": torch.cat(turned)})
    assert torch.allclose(other(x), m(x), atol=1e-6)


@pytest.mark.parametrize("options", [GROUPED, RANKED], ids=["plain", "ranks"])
def test_generation_and_prompts_of_one_token(options: dict[str, Any], tmp_path: Path) -> None:
    """generate, a stream that is saved and goes on, and an engine say what one pass over the text says."""
    torch.manual_seed(1)
    config = ModelConfig(
        d_model=16, n_layer=2, vocab_size=256, ssm_cfg={"layer": "Mamba3", **options}, tie_embeddings=False
    )
    model = stateline.LanguageModel(config, dtype=torch.float64).eval()
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(10)
        model.lm_head.weight.mul_(3)
        want = [97]
        for _ in range(12):
            want.append(int(model(torch.tensor([want]))[0, -1].argmax()))
    assert len(set(want)) > 3
    greedy = SamplingConfig(temperature=0)
    assert [token.id for token in generate_tokens(model, "a", max_tokens=12, sampling=greedy)] == want[1:]
    stream = Stream(model, sampling=greedy)
    stream.feed("a")
    got = [token.id for token in stream.tokens(5)]
    stream.save(tmp_path / "stream")
    got += [token.id for token in Stream.load(tmp_path / "stream", model).tokens(7)]
    assert got == want[1:]
    text = "".join(stateline.generate(model, "a", max_tokens=12, sampling=greedy))
    assert Engine(model, max_batch=2).generate(["a"] * 3, max_tokens=12, sampling=greedy) == [text] * 3


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("ranks", [False, True])
def test_any_number_of_groups_decodes(groups: int, ranks: bool) -> None:
    m, x = layer(ngroups=groups, is_mimo=ranks), torch.randn(2, 4, 16)
    with torch.no_grad():
        state = m.init_state(2)
        stepped = torch.stack([m.step_(x[:, i], state) for i in range(4)], 1)
        assert torch.allclose(stepped, m(x), atol=1e-5)


@pytest.mark.parametrize("options", [GROUPED, RANKED], ids=["plain", "ranks"])
def test_packed_sequences_do_not_leak(options: dict[str, Any]) -> None:
    m, x = layer(**options), torch.randn(1, 9, 16)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    y = m(x, cu_seqlens=bounds)
    changed = x.clone()
    changed[:, :4] += 1
    assert torch.equal(m(changed, cu_seqlens=bounds)[:, 4:], y[:, 4:])


def test_packed_sequences_have_own_last_tokens() -> None:
    m, x = layer(**RANKED), torch.randn(1, 9, 16)
    _, packed = m.extend(x, m.init_state(3), cu_seqlens=torch.tensor([0, 4, 4, 9]))
    for i, (start, stop) in enumerate(((0, 4), (4, 4), (4, 9))):
        _, alone = m.extend(x[:, start:stop], m.init_state(1))
        for name in ("angle", "ssm", "k", "v"):
            assert torch.allclose(getattr(packed, name)[i], getattr(alone, name)[0], atol=1e-6), name
    assert not torch.allclose(packed.v[0], packed.v[2], atol=1e-2)


@pytest.mark.parametrize("backend", [None, "chunked"])
def test_angles_and_their_gradients_are_exact(backend: str | None) -> None:
    """After a thousand tokens of bfloat16 data, against float64."""
    torch.manual_seed(0)
    t, h, n = 1000, 2, 8
    x, B, C = (torch.randn(1, t, *w).bfloat16() for w in ((h, 4), (1, n), (1, n)))
    dt, rates = torch.rand(1, t, h), torch.randn(1, t, 3).tanh() / 2
    results = []
    for dtype in (torch.float32, torch.float64):
        data = [v if dtype == torch.float32 else v.double() for v in (x, B, C)]
        own = rates.detach().clone().to(dtype).requires_grad_()
        wide = [dt.to(dtype), -dt.to(dtype), dt.to(dtype)]
        y, state = ops.trapezoid_ssd(data[0], *wide, *data[1:], rates=own, backend=backend)
        (y.to(dtype) * torch.tensor([-1, 0.5, 0.25, 1])).sum().backward()  # exact in bfloat16
        results.append((state[0], own.grad))
    (angle, grad), (angle64, grad64) = results
    assert grad is not None
    assert grad64 is not None
    assert ((angle - angle64 + 0.5) % 1 - 0.5).abs().max() < 2e-6  # turns
    assert (grad - grad64).abs().max() < 2e-5 * grad64.abs().max()


@pytest.mark.parametrize(
    "options", [GROUPED, RANKED, RANKED | {"is_outproj_norm": True}], ids=["plain", "ranks", "norm"]
)
def test_cast_to_16_bits_it_runs_and_keeps_its_parameters(options: dict[str, Any]) -> None:
    m, x = layer(**options), torch.randn(2, 5, 16)
    want = m(x)
    values = {name: m.get_parameter(name).clone() for name in m.no_weight_decay if getattr(m, name) is not None}
    built = sl.Mamba3(16, **options, dtype=torch.bfloat16)
    m = m.to(torch.bfloat16)
    for name, value in values.items():
        assert torch.equal(m.get_parameter(name), value), name
        assert built.get_parameter(name).dtype == torch.float32
    assert m.in_proj.weight.dtype == built.B_norm.weight.dtype == torch.bfloat16
    y, state = m.extend(x[:, :4].bfloat16())
    y = torch.cat([y, m.step_(x[:, 4].bfloat16(), state)[:, None]], 1)
    assert y.dtype == torch.bfloat16
    assert {v.dtype for v in vars(state).values()} == {torch.float32}
    assert (y.float() - want).abs().max() < 3e-2 * want.abs().max()


def test_padding_does_not_reach_the_state() -> None:
    for options in (GROUPED, RANKED):
        m, x = layer(**options), torch.randn(2, 6, 16)
        x[1, 3:] = torch.nan
        y, state = m.extend(x, lengths=[6, 3])
        alone, last = m.extend(x[1:, :3])
        assert torch.allclose(y[1:, :3], alone, atol=1e-6)
        assert not y[1, 3:].any()
        for got, want in zip(vars(state).values(), vars(last).values(), strict=True):
            assert torch.allclose(got[1:], want, atol=1e-6)


def test_offsets_have_64_bits() -> None:
    """Tokens beyond 2^31 numbers of a tensor whose other pages are never touched."""
    far = 2**31 + 8
    x = torch.empty(far + 4, dtype=torch.bfloat16).as_strided((1, 2, 1, 4), (2 * far, far, 4, 1))
    assert x[0, -1].storage_offset() > 2**31
    x.copy_(torch.randn(1, 2, 1, 4))
    dt, B = torch.rand(1, 2, 1), torch.randn(1, 2, 1, 4)
    for backend in (None, "chunked", "reference"):
        want, got = (ops.trapezoid_ssd(v, dt, -dt, dt, v, B, backend=backend)[0] for v in (x.clone().contiguous(), x))
        assert torch.equal(got, want)


def test_small_steps_are_not_lost() -> None:
    """softplus(−20) is 2e-9, not 0: a token of that size still counts, in bfloat16 too."""
    for dtype in (torch.float32, torch.bfloat16):
        m = sl.Mamba3(16, **GROUPED).to(dtype)
        m.dt_bias.data.fill_(-20.0)
        m.in_proj.weight.data[-25:] = 0  # dt, A, trap and angles
        _, state = m.extend(torch.randn(1, 1, 16).to(dtype))
        want = F.softplus(torch.tensor(-20.0).double()).item() / 2 * torch.outer(state.v[0, 0], state.k[0, 0, 0])
        assert (state.ssm[0, 0] - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("options", [GROUPED, RANKED], ids=["plain", "ranks"])
def test_autocast_decodes(options: dict[str, Any]) -> None:
    m, x = layer(**options), torch.randn(2, 3, 16)
    want, state = m(x), m.init_state(2)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = m.extend(x[:, :2], state)
        y = m.step_(x[:, 2], state)
    assert {v.dtype for v in vars(state).values()} == {torch.float32}
    assert (y.float() - want[:, 2]).abs().max() < 4e-2 * want.abs().max()


def test_every_form_starts_from_a_state() -> None:
    for options in (GROUPED, RANKED):
        m, x = layer(**options).double(), torch.randn(2, 7, 16, dtype=torch.float64)
        _, state = m.extend(x[:, :3])
        kept = [v.detach().clone().requires_grad_() for v in vars(state).values()]
        y, _ = m.extend(x[:, 3:], sl.Mamba3State(*kept))
        assert torch.allclose(y, m(x)[:, 3:], atol=1e-12)
        assert all(g.any() for g in torch.autograd.grad(y.square().sum(), kept))


def test_rows_of_the_projection() -> None:
    """Gate z, x, B, C, dt, A, trap, angles: zero rows silence what they should and nothing else."""
    m, x = layer(), torch.randn(1, 4, 16)
    m.D.data.zero_()
    sizes = {"z": 32, "x": 32, "B": 12, "C": 12, "dt": 8, "A": 8, "trap": 8, "angles": 1}
    assert m.in_proj.weight.shape[0] == sum(sizes.values())
    m.out_proj = nn.Identity()  # type: ignore[assignment]  # to look at what it gets
    whole, start = m(x), 0
    for name, size in sizes.items():
        kept = m.in_proj.weight.data[start : start + size].clone()
        m.in_proj.weight.data[start : start + size] = 0
        y, state = m.extend(x)
        m.in_proj.weight.data[start : start + size] = kept
        start += size
        assert not torch.allclose(y, whole, atol=1e-4), name
        assert bool(y.any()) == (name not in ("z", "x")), name
        assert bool(state.v.any()) == (name != "x"), name
        assert bool(state.angle.any()) == (name != "angles"), name
        assert name != "B" or torch.allclose(state.k[:, :, :, 2:], m.B_bias[None, :, :, 2:]), name


@pytest.mark.parametrize("options", [GROUPED, RANKED], ids=["plain", "ranks"])
def test_it_reads_from_both_sides(options: dict[str, Any]) -> None:
    both, x = sl.Bidirectional(layer(**options)), torch.randn(2, 5, 16)
    y = both(x, lengths=[5, 3])
    back = both.back
    assert isinstance(back, sl.Mamba3)
    want = both.ahead(x[1:, :3]) + back(x[1:, :3].flip(1)).flip(1)
    assert torch.allclose(y[1:, :3], want, atol=1e-6)
    assert sl.Scan2d(layer(**options))(torch.randn(2, 3, 4, 16)).shape == (2, 3, 4, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"headdim": 5}, "the inner width is 32, which headdim = 5 and ngroups = 2 do not divide"),
        ({"ngroups": 3}, "ngroups = 3 do not divide"), ({"d_state": 0}, "d_state is 0"),
        ({"mimo_rank": 0}, "mimo_rank"),
        ({"rope_fraction": 1.5}, "rope_fraction is 1.5, expected .* at most 1"), ({"A_floor": -1.0}, "A_floor is -1"),
        ({"is_mimo": 1}, "is_mimo is 1, expected True or False"), ({"dt_max": 0.0}, "dt_max"),
        ({"rope_interleaved": "yes"}, "rope_interleaved is 'yes'"), ({"expand": 0}, "expand is 0"),
    ],
    ids=str,
)  # fmt: skip
def test_impossible_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^Mamba3: .*{message}"):
        sl.Mamba3(16, **(GROUPED | options))
