"""The law of every layer: cut a sequence anywhere, pad it, pack it, feed it token by token, and nothing changes.

A new layer is one row of LAYERS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stateline import backends, ops
from stateline import nn as sl
from stateline.models import LanguageModel, ModelConfig
from stateline.nn.precision import full_precision_names

WIDTH, VOCABULARY = 12, 61
HEADS = {"num_heads": 4, "num_heads_kv": 2, "rotary_emb_dim": 2}

#: Largest error over largest value that a layer may differ by between two ways of feeding it.
BOUND = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
DTYPES = list(BOUND)
BACKENDS = ["reference", "cpu"] if backends.native_problem() is None else ["reference"]


class Stream(nn.Module):
    """A Block seen as a layer: the sum of what it returns is the residual stream after it."""

    def __init__(self, block: sl.Block) -> None:
        super().__init__()
        self.block = block

    def init_state(self, batch: int, **options: Any) -> Any:
        return self.block.init_state(batch, **options)

    def forward(self, x: Tensor, **where: Any) -> Tensor:
        return sum(self.block(x, **where))  # type: ignore[return-value]  # two tensors

    def extend(self, x: Tensor, state: Any, **where: Any) -> tuple[Tensor, Any]:
        y, residual, state = self.block.extend(x, None, state, **where)
        return y + residual, state

    def step_(self, x: Tensor, state: Any) -> Tensor:
        y, residual = self.block.step_(x, None, state)
        return y + residual


def block(**options: Any) -> nn.Module:
    return Stream(sl.Block(sl.Mamba(WIDTH, d_state=3), sl.RMSNorm(WIDTH), **options))


def model(**options: Any) -> nn.Module:
    return LanguageModel(ModelConfig(d_model=WIDTH, n_layer=2, vocab_size=VOCABULARY, **options))


def by_token(net: nn.Module) -> nn.Module:
    """With a gate for each token, as a statistic of a corpus gives it."""
    torch.rand(net.backbone.token_gate.shape, out=net.backbone.token_gate)
    return net


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "mamba": lambda: sl.Mamba(WIDTH),
    "mamba, odd sizes": lambda: sl.Mamba(WIDTH, 5, 3, 1.5, 2, bias=True, conv_bias=False),
    "mamba, one tap": lambda: sl.Mamba(WIDTH, d_state=1, d_conv=1),
    "mamba, normalised": lambda: sl.Mamba(WIDTH, 4, b_c_dt_rms_eps=1e-3),
    "mamba2": lambda: sl.Mamba2(WIDTH, 8, headdim=8),
    "mamba2, groups": lambda: sl.Mamba2(WIDTH, 5, 3, headdim=3, ngroups=4, D_has_hdim=True, dt_limit=(0.02, 0.9)),
    "mamba2, unit beside": lambda: sl.Mamba2(
        WIDTH, 4, 1, headdim=6, d_ssm=12, norm_before_gate=True, bias=True, conv_bias=False
    ),
    "mamba2, no norm": lambda: sl.Mamba2(WIDTH, 3, headdim=12, rmsnorm=False, expand=1),
    "mamba3": lambda: sl.Mamba3(WIDTH, 8, headdim=8),
    "mamba3, groups and norm": lambda: sl.Mamba3(
        WIDTH, 5, headdim=3, ngroups=4, rope_fraction=1.0, A_activation="softplus", is_outproj_norm=True
    ),
    "mamba3, ranks": lambda: sl.Mamba3(WIDTH, 8, headdim=6, ngroups=2, is_mimo=True, mimo_rank=3),
    "mamba3, ranks and norm, nothing turns": lambda: sl.Mamba3(
        WIDTH, 3, expand=1, headdim=4, is_mimo=True, mimo_rank=2, is_outproj_norm=True, rope_fraction=0.0
    ),
    "gated ssm": lambda: sl.GatedSSM(WIDTH),
    "gated ssm, dense": lambda: sl.GatedSSM(WIDTH, 7, "tanh", "dense"),
    "gated ssm, sigmoid": lambda: sl.GatedSSM(WIDTH, 9, "sigmoid", "dense", memory=(2, 30)),
    "s5": lambda: sl.S5(WIDTH, 8),
    "s5, blocks, ungated": lambda: sl.S5(WIDTH, 12, 3, 0.01, 0.5, activation="gelu", rate=2.0),
    "s4d": lambda: sl.S4D(WIDTH),
    "s4d, odd sizes": lambda: sl.S4D(WIDTH, 6, 3, "inv", "bilinear", n_ssm=4, activation=None, final_act=None),
    "s4d, real": lambda: sl.S4D(WIDTH, 2, init="real", rate=3.0),
    "s4d, convolution": lambda: sl.S4D(WIDTH, 8, mode="convolution"),
    "s4": lambda: sl.S4(WIDTH, 8),
    "s4, convolution": lambda: sl.S4(WIDTH, 6, 2, "legt", n_ssm=3, mode="convolution"),
    "attention": lambda: sl.Attention(WIDTH, 3, rotary_emb_dim=4, max_tokens=32),
    "attention, grouped, window": lambda: sl.Attention(
        WIDTH, 4, 2, 5, rotary_emb_dim=2, rotary_emb_interleaved=True, window=4, qkv_proj_bias=False
    ),
    "attention, convolution, mlp": lambda: sl.Attention(
        WIDTH, 2, 1, mlp_dim=10, d_conv=3, softmax_scale=0.3, window=7, max_tokens=100, out_proj_bias=False
    ),
    "attention, two tokens": lambda: sl.Attention(WIDTH, 2, window=2),
    "block": block,
    "block with mlp": lambda: block(mlp=sl.GatedMLP(WIDTH, 30), norm2=sl.LayerNorm(WIDTH), residual_in_fp32=False),
    "language model": model,
    "mamba2 language model": lambda: model(ssm_cfg={"layer": "Mamba2", "d_state": 8, "headdim": 8}),
    "gated ssm language model, gates by token": lambda: by_token(model(ssm_cfg={"layer": "GatedSSM", "gate": "given"})),
    "s5 language model": lambda: model(ssm_cfg={"layer": "S5", "d_state": 8}),
    "s4d language model": lambda: model(ssm_cfg={"layer": "S4D", "d_state": 8}),
    "language model with mlp": lambda: model(d_intermediate=16, rms_norm=False, tie_embeddings=False),
    "hybrid": lambda: model(attn_layer_idx=[1], attn_cfg={**HEADS, "max_tokens": 20}),
    "hybrid with windows and mlp": lambda: model(attn_layer_idx=[0], attn_cfg={**HEADS, "window": 3}, d_intermediate=9),
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test on one back end after another."""
    if request.param == "reference":
        monkeypatch.setattr(backends, "native_problem", lambda: "the test wants the reference")
        monkeypatch.setattr(backends, "_say_slow_once", lambda reason: None)
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    made = LAYERS[request.param]().eval()
    with torch.no_grad():
        for parameter in made.parameters():  # zeros and ones would hide what is left out
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def tokens(layer: nn.Module, b: int, t: int, dtype: torch.dtype = torch.float32) -> Tensor:
    if isinstance(layer, LanguageModel):
        return torch.randint(VOCABULARY, (b, t))
    return torch.randn(b, t, WIDTH).to(dtype)


def random_state(layer: nn.Module, rows: int) -> Any:
    """A state as one may be met: any values, after a few tokens."""

    def some(x: Tensor) -> Tensor:
        return torch.randn_like(x) if x.is_floating_point() else torch.randint_like(x, 1, 6)

    return pytree.tree_map(some, layer.init_state(rows))


def floats(state: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(state) if x.is_floating_point()]


def close(got: Any, want: Any, dtype: torch.dtype) -> None:
    for x, y in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert y.is_floating_point() or torch.equal(x, y)
        if y.numel() and y.is_floating_point():
            error = (x - y).abs().max().item() / max(y.abs().max().item(), 1e-3)
            assert error <= BOUND[dtype], f"relative error {error}"


def cuts(t: int) -> list[list[int]]:
    """Ways to split t tokens, with empty pieces and single tokens among them."""
    return [[0, t, 0], [1, t - 1], [2, 0, 1, t - 3], [1] * t]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_split_is_the_whole(layer: nn.Module, backend: str, dtype: torch.dtype) -> None:
    layer = layer.to(dtype)
    x = tokens(layer, 2, 9, dtype)
    whole, end = layer.extend(x, layer.init_state(2))
    close(layer(x), whole, dtype)
    for sizes in cuts(9):
        state, pieces = layer.init_state(2), []
        for piece in x.split(sizes, 1):
            before = pytree.tree_map(torch.clone, state)
            y, after = layer.extend(piece, state)
            assert all(map(torch.equal, pytree.tree_leaves(state), pytree.tree_leaves(before))), "it changed its input"
            pieces, state = [*pieces, y], after
        close(torch.cat(pieces, 1), whole, dtype)
        close(state, end, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_is_extend_by_one_token(layer: nn.Module, backend: str, dtype: torch.dtype) -> None:
    layer = layer.to(dtype)
    for b, t in [(0, 1), (1, 2), (3, 6)]:
        x = tokens(layer, b, t, dtype)
        state, stepped = layer.init_state(b), layer.init_state(b)
        memory = [s.data_ptr() for s in pytree.tree_leaves(stepped)]
        for i in range(t):
            y, state = layer.extend(x[:, i : i + 1], state)
            z = layer.step_(x[:, i], stepped)
            assert not z.requires_grad
            close(z, y[:, 0].detach(), dtype)
            close(stepped, pytree.tree_map(torch.detach, state), dtype)
        assert memory == [s.data_ptr() for s in pytree.tree_leaves(stepped)], "not in place"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_rows_equal_their_sequences_alone(layer: nn.Module, backend: str, dtype: torch.dtype) -> None:
    layer = layer.to(dtype)
    lengths, x = [4, 0, 7, 1], tokens(layer, 4, 7, dtype)
    start = random_state(layer, 4)
    for i, n in enumerate(lengths):
        x[i, n:] = torch.nan if x.is_floating_point() else -1  # padding is skipped, not multiplied away
    ys, ends = layer.extend(x, start, lengths=torch.tensor(lengths))
    ys.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    for i, n in enumerate(lengths):
        y, end = layer.extend(x[i : i + 1, :n], pytree.tree_map(lambda s, i=i: s[i : i + 1], start))
        close(ys[i : i + 1, :n], y, dtype)
        close(pytree.tree_map(lambda s, i=i: s[i : i + 1], ends), end, dtype)
    if not isinstance(layer, Stream):  # its second norm may have a bias
        assert (ys[0, 4:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences_equal_themselves_alone(layer: nn.Module, backend: str, dtype: torch.dtype) -> None:
    layer = layer.to(dtype)
    bounds, x = [0, 3, 3, 4, 9], tokens(layer, 1, 9, dtype)
    start = random_state(layer, 4)
    packed = torch.tensor(bounds, dtype=torch.int32)
    ys, ends = layer.extend(x, start, cu_seqlens=packed)
    fresh = layer(x, cu_seqlens=packed)
    for i, (a, b) in enumerate(pairwise(bounds)):
        y, end = layer.extend(x[:, a:b], pytree.tree_map(lambda s, i=i: s[i : i + 1], start))
        close(ys[:, a:b], y, dtype)
        close(pytree.tree_map(lambda s, i=i: s[i : i + 1], ends), end, dtype)
        close(fresh[:, a:b], layer(x[:, a:b]), dtype)


def test_gradients_flow_through_the_state(layer: nn.Module, backend: str) -> None:
    layer = layer.double()
    x = tokens(layer, 2, 8, torch.float64)
    start = random_state(layer, 2)
    leaves = [*layer.parameters(), *(s.requires_grad_() for s in floats(start))]

    def grads(sizes: list[int]) -> tuple[Tensor | None, ...]:
        state, total = start, torch.zeros((), dtype=torch.float64)
        for piece in x.split(sizes, 1):
            y, state = layer.extend(piece, state)
            total = total + y.square().sum()
        total = total + sum(s.square().sum() for s in floats(state))
        return torch.autograd.grad(total, leaves, allow_unused=True)

    whole = grads([8])
    # A convolution with one tap has an empty state, and PyTorch may call its gradient unused.
    assert all(g is not None and (g != 0).any() for g, p in zip(whole, leaves, strict=True) if p.numel())
    for split in ([3, 5], [1, 0, 2, 5]):
        for g, w in zip(grads(split), whole, strict=True):
            if w is not None and w.numel():
                assert (g - w).abs().max() <= 1e-10 * w.abs().max()


def test_full_precision_survives_every_cast(layer: nn.Module) -> None:
    exact = full_precision_names(layer)
    if any(isinstance(m, sl.Mamba | sl.Mamba2) for m in layer.modules()):
        bias = "dt_bias" if any(isinstance(m, sl.Mamba2) for m in layer.modules()) else "dt_proj.bias"
        assert {name.rpartition("mixer.")[2].removeprefix("block.") for name in exact} >= {"A_log", "D", bias}
    values = {name: layer.state_dict()[name].clone() for name in exact}
    x = tokens(layer, 1, 3)
    for cast in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to("cpu"),
        lambda m: m.to("cpu", torch.bfloat16),
    ):
        layer = cast(layer.float())
        for name, parameter in layer.named_parameters():
            if name in exact:
                assert parameter.dtype == torch.float32
                assert torch.equal(parameter, values[name]), f"{name} was rounded"
            else:
                assert parameter.dtype == layer_dtype(layer)
        assert {s.dtype for s in floats(layer.init_state(1))} == {torch.float32}
        _, state = layer.extend(x.to(layer_dtype(layer)) if x.is_floating_point() else x, layer.init_state(1))
        assert {s.dtype for s in floats(state)} == {torch.float32}
    layer = layer.double()
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert {s.dtype for s in floats(layer.init_state(1))} == {torch.float64}
    layer = layer.bfloat16()
    assert {layer.state_dict()[name].dtype for name in exact} <= {torch.float32}


def layer_dtype(layer: nn.Module) -> torch.dtype:
    return next(m.weight.dtype for m in layer.modules() if isinstance(m, nn.Linear))


def test_casts_keep_gradients_and_moves_to_meta(layer: nn.Module) -> None:
    x = tokens(layer, 1, 4)
    layer(x).float().sum().backward()
    layer = layer.bfloat16()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype, name
    empty = layer.to("meta")
    assert all(p.is_meta for p in empty.parameters())
    assert {empty.state_dict()[n].dtype for n in full_precision_names(empty)} <= {torch.float32}


def test_autocast_rounds_neither_state_nor_time_constants(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spied(scan: Callable[..., Any]) -> Callable[..., Any]:
        def spy(u: Tensor, dt: Tensor, A: Tensor, *rest: Any, **options: Any) -> Any:
            seen.append((u.dtype, A.dtype, options["D"].dtype, options["dt_bias"].dtype))
            return scan(u, dt, A, *rest, **options)

        return spy

    for name in ("selective_scan", "ssd"):
        monkeypatch.setattr(ops, name, spied(getattr(ops, name)))
    x = tokens(layer, 2, 5)
    want = layer(x)
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer.extend(x, layer.init_state(2))
        z = layer.step_(x[:, 0], layer.init_state(2))
    if any(isinstance(m, sl.Mamba) for m in layer.modules()):
        assert set(seen) == {(torch.bfloat16, torch.float32, torch.float32, torch.float32)}
    assert {s.dtype for s in floats(state)} == {torch.float32}
    scale = want.abs().max()
    assert (y.float() - want).abs().max() <= 4e-2 * scale
    assert (z.float() - want[:, 0]).abs().max() <= 4e-2 * scale
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


class Adapter(nn.Module):
    """A low-rank adapter as libraries write them: it wraps a Linear and shows none of its attributes."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_adapters_may_wrap_every_projection(layer: nn.Module) -> None:
    x = tokens(layer, 2, 5)
    before = layer(x)
    wrapped = 0
    for module in list(layer.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Adapter(child))
                nn.init.zeros_(getattr(module, name).up.weight)
                wrapped += 1
    assert wrapped >= (1 if any(isinstance(m, sl.S4 | sl.S4D) for m in layer.modules()) else 2)  # one projection
    assert torch.allclose(layer(x), before, atol=1e-6), "an adapter that adds nothing changed the output"
    for module in layer.modules():
        if isinstance(module, Adapter):
            nn.init.normal_(module.up.weight, std=0.1)
    y = layer(x)
    assert not torch.allclose(y, before, atol=1e-3)
    y.square().sum().backward()
    for name, parameter in layer.named_parameters():
        if ".down." in name or ".up." in name:
            assert parameter.grad is not None, name
            assert (parameter.grad != 0).any(), name
    state = layer.init_state(2)
    assert torch.allclose(torch.stack([layer.step_(x[:, i], state) for i in range(5)], 1), y, atol=1e-4)


def test_a_replaced_step_projection_is_refused() -> None:
    layer = sl.Mamba(8)
    layer.dt_proj = nn.Linear(1, 16)
    with pytest.raises(TypeError, match="dt_proj was replaced by Linear"):
        layer(torch.randn(1, 2, 8))


def test_initial_values_are_the_papers() -> None:
    layer = sl.Mamba(512, dt_min=0.01, dt_max=0.2)
    assert torch.equal(layer.A_log[7], torch.arange(1, 17).float().log())
    assert (layer.D == 1).all()
    steps = torch.nn.functional.softplus(layer.dt_proj.bias)
    assert steps.min() >= 0.01 * (1 - 1e-4)
    assert steps.max() <= 0.2 * (1 + 1e-4)
    assert abs(steps.log().mean() - (torch.tensor(0.01 * 0.2).log() / 2)) < 0.1  # log-uniform
    bound = 32**-0.5
    assert 0.99 * bound < layer.dt_proj.weight.abs().max() <= bound
    assert (sl.Mamba(32, dt_init="constant", dt_scale=3.0).dt_proj.weight == 2**-0.5 * 3.0).all()
    floored = sl.Mamba(32, dt_min=1e-6, dt_max=1e-5, dt_init_floor=1e-3).dt_proj.bias
    assert torch.allclose(torch.nn.functional.softplus(floored), torch.tensor(1e-3), rtol=1e-4)


def test_shapes_are_those_of_mamba_130m() -> None:
    shapes = {name: tuple(p.shape) for name, p in sl.Mamba(768, device="meta").named_parameters()}
    assert shapes == {
        "in_proj.weight": (3072, 768), "conv1d.weight": (1536, 1, 4), "conv1d.bias": (1536,),
        "x_proj.weight": (80, 1536), "dt_proj.weight": (1536, 48), "dt_proj.bias": (1536,),
        "A_log": (1536, 16), "D": (1536,), "out_proj.weight": (768, 1536),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 0}, "d_model is 0"), ({"d_state": -1}, "d_state"), ({"d_conv": 0}, "d_conv"),
        ({"expand": float("nan")}, "expand is nan"), ({"dt_rank": "all"}, "dt_rank"), ({"dt_rank": 0}, "dt_rank"),
        ({"dt_min": -1.0}, "dt_min"), ({"dt_max": 1e-9}, "dt_max"), ({"dt_init": "zeros"}, "dt_init"),
        ({"bias": "yes"}, "bias is 'yes'"), ({"d_model": 1, "expand": 0.5}, "expand"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^Mamba: .*{message}"):
        sl.Mamba(**{"d_model": 8, **options})


def test_wrong_states_and_lengths_are_refused(layer: nn.Module) -> None:
    x = tokens(layer, 2, 3)
    with pytest.raises(ValueError, match=r"initial_state|state\.keys has shape \(3"):
        layer.extend(x, layer.init_state(3))
    with pytest.raises(ValueError, match="lengths"):
        layer(x, lengths=[3])
    with pytest.raises(ValueError, match="lengths and cu_seqlens"):
        layer(x, lengths=[3, 3], cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(TypeError, match="lengths"):
        layer(x, lengths=[3.0, 3.0])
    with pytest.raises(ValueError, match="batch"):
        layer.init_state(-1)


@pytest.mark.parametrize("compiled", [False, True])
def test_inputs_of_another_width_or_dtype_are_named(compiled: bool) -> None:
    layer = sl.Mamba(16)
    forward = torch.compile(layer, backend="eager") if compiled else layer
    state = layer.init_state(2)
    for shape in ((2, 5, 8), (2, 16)):
        with pytest.raises(ValueError, match=r"^Mamba: x has shape .*, expected \(b, t, d_model\)"):
            layer(torch.randn(shape))
    for shape in ((2, 8), (2, 1, 16)):
        with pytest.raises(ValueError, match=r"^Mamba: x has shape .*, expected \(b, d_model\)"):
            layer.step_(torch.randn(shape), state)
    for wrong in (torch.float64, torch.bfloat16, torch.int64):
        with pytest.raises(TypeError, match=r"^Mamba: x is .*, expected one of float32"):
            layer(torch.ones(2, 5, 16, dtype=wrong))
        with pytest.raises(TypeError, match=r"^Mamba: x is .*, expected one of float32"):
            layer.step_(torch.ones(2, 16, dtype=wrong), state)
    with torch.autocast("cpu", torch.bfloat16):
        assert forward(torch.ones(2, 5, 16, dtype=torch.float16)).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"^Mamba: x is float64"):
            layer(torch.ones(2, 5, 16, dtype=torch.float64))


@pytest.mark.parametrize("norm", [sl.RMSNorm, sl.LayerNorm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_norms_add_in_full_precision_and_round_once(norm: type[nn.Module], dtype: torch.dtype) -> None:
    layer = norm(33).to(dtype)
    nn.init.normal_(layer.weight)
    x, residual = torch.randn(2, 5, 33).to(dtype), torch.randn(2, 5, 33)
    y, h = layer(x, residual, residual_dtype=torch.float32)
    exact = x.double() + residual.double()
    assert (h - exact).abs().max() < 1e-6
    centred = exact - exact.mean(-1, keepdim=True) if norm is sl.LayerNorm else exact
    want = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight.double()
    assert y.dtype == dtype
    assert (y - want).abs().max() < {torch.bfloat16: 2**-8, torch.float32: 1e-6, torch.float64: 1e-6}[
        dtype
    ] * want.abs().max()


def test_mlp_takes_the_value_first() -> None:
    mlp = sl.GatedMLP(4, 100)
    x = torch.randn(3, 4)
    value, gate = (x @ mlp.fc1.weight.T)[:, :128], (x @ mlp.fc1.weight.T)[:, 128:]
    assert torch.allclose(mlp(x), (value * gate * gate.sigmoid()) @ mlp.fc2.weight.T, atol=1e-6)


def test_param_groups_decay_matrices_alone() -> None:
    net = model(d_intermediate=16)
    groups = sl.param_groups(net, 0.1)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    ids = [id(p) for g in groups for p in g["params"]]
    assert len(ids) == len(set(ids)) == len(list(net.parameters()))
    decayed = {n for n, p in net.named_parameters() if any(p is q for q in groups[0]["params"])}
    kinds = {n.split(".", 3)[-1] for n in decayed}
    assert kinds == {
        "mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.x_proj.weight", "mixer.dt_proj.weight",
        "mixer.out_proj.weight", "mlp.fc1.weight", "mlp.fc2.weight",
    }  # fmt: skip
    untied = sl.param_groups(model(tie_embeddings=False).bfloat16(), 0.1)
    assert max(p.shape[0] for p in untied[0]["params"] if p.shape[1] == WIDTH) >= VOCABULARY
    torch.optim.AdamW(groups)
    with pytest.raises(ValueError, match="weight_decay"):
        sl.param_groups(net, float("nan"))
