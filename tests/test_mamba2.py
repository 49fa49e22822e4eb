"""Mamba2 beyond the law of layers: initial values, published numbers, other libraries, and bugs that they have had.

| bug seen in another library | test |
|---|---|
| packed sequences leak into each other: cu_seqlens only picks final states | test_packed_sequences_do_not_leak |
| groups of B and C tiled over heads, not interleaved | test_neighbouring_heads_share_a_group |
| gated norm over all channels instead of each group's | test_each_group_is_normalised_alone |
| dt_limit applied to the prompt and dropped while decoding | test_limits_hold_while_decoding |
| a skip weight a channel breaks the step; one of none breaks it too | test_every_skip_weight_steps |
| offsets of 32 bits: wrong far into large inputs | test_offsets_have_64_bits |
| gate and value, x and z taken in the wrong order | test_rows_of_the_projection |
| A_log rounded when a layer is built in bfloat16 | test_built_in_16_bits_it_keeps_its_time_constants |
| softplus loses small steps; the bias is rounded to the data's dtype | test_small_steps_are_not_lost |
| state kept in 16 bits | test_built_in_16_bits_it_keeps_its_time_constants |
| decoding fails under autocast | test_autocast_decodes |
| initial decay rates 1, 2, 3 … instead of a uniform draw | test_initial_values |
| padding on the left changes the result | test_left_padding_of_the_op_changes_nothing |
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from makers import edit, ids, small
from torch import Tensor, nn

import stateline
from stateline import ModelConfig, ops
from stateline import nn as sl
from stateline.interop import CheckpointError

try:
    import transformers
except ImportError:  # the `hf` extra
    if os.environ.get("CI"):
        raise
    transformers = None

needs_transformers = pytest.mark.skipif(transformers is None, reason="transformers (extra `hf`) is not installed")
GROUPED: dict[str, Any] = {"d_state": 4, "headdim": 4, "ngroups": 2}  # d_model 16: 8 heads


def layer(**options: Any) -> sl.Mamba2:
    made = sl.Mamba2(16, **(GROUPED | options)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def plain_forward(m: sl.Mamba2, x: Tensor) -> Tensor:
    """One sequence (t, d_model) by the formulas of the paper, a token and a head at a time, in float64."""
    p = {name: v.detach().double() for name, v in m.named_parameters()}
    H, P, N, G, M, E = m.nheads, m.headdim, m.d_state, m.ngroups, m.d_mlp, m.d_ssm
    rows = x.double() @ p["in_proj.weight"].T + p.get("in_proj.bias", 0)
    z0, x0, z, xBC, dt = rows.split([M, M, E, E + 2 * G * N, H], -1)
    xBC = F.conv1d(F.pad(xBC.T, (m.d_conv - 1, 0))[None], p["conv1d.weight"], p.get("conv1d.bias"), groups=m.conv_dim)
    xBC = F.silu(xBC[0].T)
    dt = F.softplus(dt + p["dt_bias"])
    dt = dt if m.dt_limit is None else dt.clamp(*m.dt_limit)
    D = p["D"].view(H, P) if m.D_has_hdim else p["D"][:, None].expand(H, P)
    S, out = torch.zeros(H, P, N, dtype=torch.float64), torch.zeros(len(x), E, dtype=torch.float64)
    for t in range(len(x)):
        for h in range(H):
            u = xBC[t, h * P : (h + 1) * P]
            g = h // (H // G)  # neighbouring heads share a group
            B = xBC[t, E + g * N : E + (g + 1) * N]
            C = xBC[t, E + (G + g) * N : E + (G + g + 1) * N]
            S[h] = torch.exp(-p["A_log"][h].exp() * dt[t, h]) * S[h] + dt[t, h] * torch.outer(u, B)
            out[t, h * P : (h + 1) * P] = S[h] @ C + D[h] * u
    if m.norm is None:
        y = out * F.silu(z)
    else:
        y = out if m.norm.norm_before_gate else out * F.silu(z)
        y = torch.cat([F.rms_norm(v, v.shape[-1:], None, m.norm.eps) for v in y.chunk(G, -1)], -1) * p["norm.weight"]
        y = y * F.silu(z) if m.norm.norm_before_gate else y
    return torch.cat([F.silu(z0) * x0, y], -1) @ p["out_proj.weight"].T + p.get("out_proj.bias", 0)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"ngroups": 1}, {"ngroups": 8, "D_has_hdim": True}, {"norm_before_gate": True, "bias": True},
        {"rmsnorm": False, "conv_bias": False, "d_conv": 2}, {"d_ssm": 16, "expand": 3}, {"dt_limit": (0.02, 0.05)},
    ],
    ids=str,
)  # fmt: skip
def test_equals_the_formulas(options: dict[str, Any]) -> None:
    m, x = layer(**options), torch.randn(2, 7, 16)
    with torch.no_grad():
        y, state = m(x), m.init_state(2)
        stepped = torch.stack([m.step_(x[:, i], state) for i in range(7)], 1)
    for got in (y, stepped):
        for row, want in zip(got, (plain_forward(m, v) for v in x), strict=True):
            assert (row - want).abs().max() < 5e-6 * want.abs().max()


def test_shapes_are_those_of_mamba2_130m() -> None:
    shapes = {name: tuple(p.shape) for name, p in sl.Mamba2(768, device="meta").named_parameters()}
    assert shapes == {
        "dt_bias": (24,), "A_log": (24,), "D": (24,), "in_proj.weight": (3352, 768), "conv1d.weight": (1792, 1, 4),
        "conv1d.bias": (1792,), "norm.weight": (1536,), "out_proj.weight": (768, 1536),
    }  # fmt: skip


def test_initial_values() -> None:
    m = sl.Mamba2(1024, headdim=2, dt_min=0.01, dt_max=0.2, A_init_range=(2, 6), conv_init=0.01)
    rates = m.A_log.exp()
    assert 2 * (1 - 1e-5) <= rates.min() < 2.1
    assert 5.9 < rates.max() <= 6 * (1 + 1e-5)
    assert abs(rates.mean() - 4) < 0.15
    assert not torch.equal(rates.sort()[0], rates)
    assert (m.D == 1).all()
    assert m.norm is not None
    assert (m.norm.weight == 1).all()
    assert 0.0099 < m.conv1d.weight.abs().max() <= 0.01
    steps = F.softplus(m.dt_bias)
    assert steps.min() >= 0.01 * (1 - 1e-4)
    assert steps.max() <= 0.2 * (1 + 1e-4)
    assert abs(steps.log().mean() - torch.tensor(0.01 * 0.2).log() / 2) < 0.1
    assert sl.Mamba2(16, headdim=4, D_has_hdim=True).D.shape == (32,)
    groups = sl.param_groups(m, 0.1)
    assert {p.dim() for p in groups[0]["params"]} == {2, 3}


GOLDEN_X, GOLDEN_Z = torch.tensor([1.0, 2, 3, 4]), torch.tensor([0.0, 1, -1, 2])


@pytest.mark.parametrize(("groups", "before", "want"), [
    (1, False, [0, 0.807625, -0.222832, 3.892186]), (2, False, [0, 2.828414, -0.160879, 2.810066]),
    (1, True, [0, 1.067779, -0.294610, 5.145942]), (2, True, [0, 1.849444, -0.228204, 3.986031]),
])  # fmt: skip
def test_published_numbers_of_the_gated_norm(groups: int, before: bool, want: list[float]) -> None:
    norm = sl.GatedRMSNorm(4, 1e-5, groups, before)
    norm.weight.data = torch.tensor([1.0, 2, 1, 2])
    assert torch.allclose(norm(GOLDEN_X, GOLDEN_Z), torch.tensor(want), atol=2e-6)
    assert norm.bfloat16()(GOLDEN_X.bfloat16(), GOLDEN_Z.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="d_model is 4, which 3 groups do not divide"):
        sl.GatedRMSNorm(4, groups=3)


def test_published_numbers_of_the_convolution() -> None:
    x, w, b = torch.tensor([1.0, 2, 3]).view(1, 3, 1), torch.tensor([[1.0, 2, 3]]), torch.tensor([0.5])
    y, taps = ops.causal_conv1d(x, w, b, initial_state=torch.tensor([4.0, 5]).view(1, 2, 1))
    assert y.flatten().tolist() == [17.5, 13.5, 14.5]
    assert taps.flatten().tolist() == [2, 3]
    y, _ = ops.causal_conv1d(x, w, b, activation="silu")
    assert torch.allclose(y.flatten(), torch.tensor([3.397407, 8.498271, 14.499993]), atol=2e-6)


# ---- bugs of others --------------------------------------------------------------------------------------------------


def test_packed_sequences_do_not_leak() -> None:
    m, x = layer(), torch.randn(1, 9, 16)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    y = m(x, cu_seqlens=bounds)
    changed = x.clone()
    changed[:, :4] += 1
    assert torch.equal(m(changed, cu_seqlens=bounds)[:, 4:], y[:, 4:])


def test_neighbouring_heads_share_a_group() -> None:
    """One group of B and C changed changes the heads of that group alone, in the scan and in the step."""
    x = torch.randn(1, 6, 4, 3)
    dt, A, B = torch.rand(1, 6, 4), -torch.rand(4), torch.randn(1, 6, 2, 5)
    other = B.clone()
    other[:, :, 1] += 1
    for backend in (None, "chunked", "reference"):
        y, z = (ops.ssd(x, dt, A, v, v, backend=backend)[0] for v in (B, other))
        assert torch.equal(y[:, :, :2], z[:, :, :2])
        assert (y[:, :, 2:] != z[:, :, 2:]).all()
        y, z = (
            ops.ssd_step_(torch.ones(1, 4, 3, 5), x[:, 0], dt[:, 0], A, v[:, 0], v[:, 0], backend=backend)
            for v in (B, other)
        )
        assert torch.equal(y[:, :2], z[:, :2])
        assert (y[:, 2:] != z[:, 2:]).all()


def test_each_group_is_normalised_alone() -> None:
    m = layer()
    assert m.norm is not None
    y, z = torch.randn(3, 32), torch.randn(3, 32)
    scaled = torch.cat([y[:, :16], 100 * y[:, 16:]], -1)
    assert torch.allclose(m.norm(y, z)[:, :16], m.norm(scaled, z)[:, :16], atol=1e-6)


def test_limits_hold_while_decoding() -> None:
    m, x = layer(dt_limit=(0.3, 0.31)), torch.randn(1, 5, 16)
    with torch.no_grad():
        state = m.init_state(1)
        stepped = torch.stack([m.step_(x[:, i], state) for i in range(5)], 1)
        assert torch.allclose(stepped, m(x), atol=1e-5)
        m.dt_limit = None
        assert not torch.allclose(stepped, m(x), atol=1e-3)


@pytest.mark.parametrize("D", [None, (4,), (4, 3)], ids=str)
def test_every_skip_weight_steps(D: tuple[int, ...] | None) -> None:
    skip = None if D is None else torch.randn(D)
    x, dt, A, B = torch.randn(2, 1, 4, 3), torch.rand(2, 1, 4), -torch.rand(4), torch.randn(2, 1, 1, 5)
    y, state = ops.ssd(x, dt, A, B, B, D=skip)
    own = torch.zeros_like(state)
    got = ops.ssd_step_(own, x[:, 0], dt[:, 0], A, B[:, 0], B[:, 0], D=skip)
    assert torch.allclose(got, y[:, 0], atol=1e-6)
    assert torch.allclose(own, state)


def test_offsets_have_64_bits() -> None:
    """Tokens beyond 2^31 numbers of a tensor whose other pages are never touched."""
    t, h, p, n = 2, 1, 4, 4
    far = 2**31 + 8
    x = torch.empty(far + p, dtype=torch.bfloat16).as_strided((1, t, h, p), (t * far, far, p, 1))
    assert x[0, -1].storage_offset() > 2**31
    x.copy_(torch.randn(1, t, h, p))
    dt, A, B = torch.rand(1, t, h), -torch.rand(h), torch.randn(1, t, 1, n)
    for backend in (None, "chunked", "reference"):
        want, got = (ops.ssd(v, dt, A, B, B, z=v, backend=backend)[0] for v in (x.clone().contiguous(), x))
        assert torch.equal(got, want)


def test_rows_of_the_projection() -> None:
    """Gate and value of the unit beside, gate z, x, B, C, dt: zero rows silence what they should and nothing else."""
    m, x = layer(d_ssm=16, rmsnorm=False, conv_bias=False), torch.randn(1, 3, 16)
    m.D.data.zero_()
    starts = dict(zip(["gate", "value", "z", "x", "B", "C", "dt"], [0, 16, 32, 48, 64, 72, 80], strict=True))
    rows = {"gate": 16, "value": 16, "z": 16, "x": 16, "B": 8, "C": 8, "dt": 4}
    assert m.in_proj.weight.shape[0] == 84
    heads = {}
    m.out_proj = nn.Identity()
    for name, start in starts.items():
        kept = m.in_proj.weight.data[start : start + rows[name]].clone()
        m.in_proj.weight.data[start : start + rows[name]] = 0
        y = m(x)
        heads[name] = (bool(y[..., :16].any()), bool(y[..., 16:].any()))
        m.in_proj.weight.data[start : start + rows[name]] = kept
    beside, through = (False, True), (True, False)
    assert heads == {
        "gate": beside, "value": beside, "z": through, "x": through, "B": through, "C": through, "dt": (True, True)
    }  # fmt: skip
    u = x @ m.in_proj.weight.T
    assert torch.allclose(m(x)[..., :16], F.silu(u[..., :16]) * u[..., 16:32], atol=1e-6)


def test_built_in_16_bits_it_keeps_its_time_constants() -> None:
    torch.manual_seed(3)
    wide = sl.Mamba2(16, **GROUPED)
    torch.manual_seed(3)
    made = sl.Mamba2(16, **GROUPED, dtype=torch.bfloat16)
    assert made.in_proj.weight.dtype == torch.bfloat16
    for name in ("A_log", "dt_bias", "D"):
        assert made.get_parameter(name).dtype == torch.float32
    assert set(made.A_log.bfloat16().float().tolist()) != set(made.A_log.tolist())
    assert wide.A_log.dtype == torch.float32
    state = made.init_state(1)
    made.step_(torch.randn(1, 16, dtype=torch.bfloat16), state)
    assert state.ssm.dtype == state.conv.dtype == torch.float32


def test_small_steps_are_not_lost() -> None:
    """softplus(−20) is 2e-9, not 0; a bias of 1/3 reaches it unrounded under bfloat16 data."""
    one = torch.ones(1, 1, 1, 1)
    for backend in (None, "chunked", "reference"):
        _, state = ops.ssd(one, one[0] * -20, -torch.ones(1), one, one, dt_softplus=True, backend=backend)
        assert state.item() == pytest.approx(2.0611536e-9, rel=1e-5)
        narrow = one.bfloat16()
        bias = torch.tensor([1 / 3])
        step = -10 * narrow[0]
        _, state = ops.ssd(
            narrow, step, -torch.ones(1), narrow, narrow, dt_bias=bias, dt_softplus=True, backend=backend
        )
        assert state.item() == pytest.approx(F.softplus(torch.tensor(-10 + 1 / 3).double()).item(), rel=1e-5)


def test_autocast_decodes() -> None:
    m, x = layer(), torch.randn(2, 3, 16)
    want, state = m(x), m.init_state(2)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = m.extend(x[:, :2], state)
        y = m.step_(x[:, 2], state)
    assert state.conv.dtype == state.ssm.dtype == torch.float32
    assert (y.float() - want[:, 2]).abs().max() < 4e-2 * want.abs().max()


def test_left_padding_of_the_op_changes_nothing() -> None:
    x, dt, A, B = torch.randn(2, 6, 4, 3), torch.rand(2, 6, 4), -torch.rand(4), torch.randn(2, 6, 1, 5)
    x[1, :4] = torch.nan
    y, state = ops.ssd(x, dt, A, B, B, lengths=[6, 2], padding_side="left")
    alone, last = ops.ssd(x[1:, 4:], dt[1:, 4:], A, B[1:, 4:], B[1:, 4:])
    assert torch.equal(y[1:, 4:], alone)
    assert torch.equal(state[1:], last)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"headdim": 5}, "d_ssm is 32, which headdim = 5 and ngroups = 2 do not divide"),
        ({"ngroups": 3}, "ngroups = 3 do not divide"), ({"d_ssm": 33}, "d_ssm is 33, expected .* at most 32"),
        ({"headdim": 16, "ngroups": 4}, "ngroups = 4 do not divide"), ({"d_state": 0}, "d_state is 0"),
        ({"A_init_range": (0, 1)}, r"A_init_range\[0\] is 0"), ({"A_init_range": 3}, "A_init_range is 3"),
        ({"dt_limit": (2, 1)}, "dt_limit is"), ({"rmsnorm": 1}, "rmsnorm is 1"), ({"dt_max": 0.0}, "dt_max"),
        ({"conv_init": -1.0}, "conv_init is -1"),
    ],
    ids=str,
)  # fmt: skip
def test_impossible_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^Mamba2: .*{message}"):
        sl.Mamba2(16, **(GROUPED | options))


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def random_hf(**options: Any) -> Any:
    config = {"hidden_size": 20, "num_hidden_layers": 2, "vocab_size": 61, "state_size": 5, "head_dim": 5}
    config |= {"num_heads": 8, "n_groups": 2, "chunk_size": 4, "bos_token_id": 3, **options}
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@needs_transformers
@pytest.mark.parametrize(
    "options",
    [
        {}, {"tie_word_embeddings": True, "n_groups": 1}, {"time_step_limit": (0.2, 0.4), "use_bias": True},
        {"hidden_size": 30, "expand": 3, "num_heads": 18, "n_groups": 6, "conv_kernel": 3, "use_conv_bias": False},
        {"layer_norm_epsilon": 1e-3, "residual_in_fp32": False, "num_hidden_layers": 1},
    ],
    ids=str,
)  # fmt: skip
def test_logits_equal_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    theirs, x = random_hf(**options), ids()
    theirs.save_pretrained(tmp_path / "a")
    ours = stateline.load(tmp_path / "a")
    with torch.no_grad():
        want = theirs(x).logits
        assert (ours(x) - want).abs().max() < 1e-4 * want.abs().max().clamp(min=1)
        _, state = ours.extend(x[:, :4], ours.init_state(2))
        assert (ours.extend(x[:, 4:], state)[0] - want[:, 4:]).abs().max() < 1e-4 * want.abs().max().clamp(min=1)
        stateline.save(ours, tmp_path / "b", "huggingface")
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
        assert type(back).__name__ == "Mamba2ForCausalLM"
        assert torch.allclose(back(x).logits, want, atol=1e-6)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    for key, value in theirs.config.to_dict().items():
        if key in written and key != "chunk_size":
            assert back.config.to_dict()[key] == value or key.endswith("token_id"), key
    assert written["bos_token_id"] == 3


def test_what_transformers_cannot_express_is_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"d_ssm": 20}, "d_ssm is 20"), ({"D_has_hdim": True}, "D_has_hdim is True"), ({"rmsnorm": False}, "rmsnorm"),
        ({"norm_before_gate": True}, "norm_before_gate"), ({"norm_eps": 1e-3}, "norm_eps is 0.001, the model's 1e-05"),
    ):  # fmt: skip
        model = small(ssm_cfg={"layer": "Mamba2", "headdim": 5, **options})
        with pytest.raises(ValueError, match=f"transformers cannot express this model: .*{message}"):
            stateline.save(model, tmp_path / "m", "huggingface")
    with pytest.raises(ValueError, match=r"the mixer's norm_eps is 0.001, mamba_ssm has only"):
        stateline.save(model, tmp_path / "m", "mamba_ssm")
    assert not (tmp_path / "m").exists()


def test_a_number_of_heads_that_contradicts_the_rest_is_named(tmp_path: Path) -> None:
    stateline.save(small(ssm_cfg={"layer": "Mamba2", "headdim": 5}), tmp_path, "huggingface")
    edit(tmp_path / "config.json", num_heads=9)
    with pytest.raises(CheckpointError, match=r"num_heads is 9, expand · hidden_size / head_dim is 8"):
        stateline.load(tmp_path)


def test_files_of_mamba_ssm_are_read_and_written(tmp_path: Path) -> None:
    """As in state-spaces/mamba2-130m, and with arguments that choose kernels or have an infinity."""
    options = {"layer": "Mamba2", "d_state": 3, "headdim": 10, "D_has_hdim": True, "dt_limit": (0.01, float("inf"))}
    model, x = small(ssm_cfg=options, pad_vocab_size_multiple=16), ids()
    stateline.save(model, tmp_path, "mamba_ssm")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["ssm_cfg"]["dt_limit"] == [0.01, float("inf")]
    stored = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    own = {k.removeprefix("backbone.layers.0.mixer.") for k in stored if k.startswith("backbone.layers.0.mixer.")}
    assert own == {
        "dt_bias", "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "norm.weight", "out_proj.weight"
    }  # fmt: skip
    edit(tmp_path / "config.json", ssm_cfg=written["ssm_cfg"] | {"chunk_size": 128, "use_mem_eff_path": True})
    again = stateline.load(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(x), model(x))


def test_a_configuration_travels_as_json(tmp_path: Path) -> None:
    config = ModelConfig(
        d_model=16, n_layer=1, vocab_size=9, ssm_cfg={"layer": "Mamba2", "headdim": 8, "dt_limit": (0.0, float("inf"))}
    )
    assert config.ssm_cfg["dt_limit"] == [0.0, None]
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config
