"""Attention: against a slow answer of another making, at the bounds of its cache, compiled."""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stateline import nn as sl
from stateline import state as states
from stateline.nn import attention
from stateline.nn.rotary import angles, rotate

WIDTH = 12
#: Every option at a value that shows, some together.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"num_heads": 3},
    "one head of keys": {"num_heads": 4, "num_heads_kv": 1, "head_dim": 5, "qkv_proj_bias": False},
    "halves turned": {"num_heads": 2, "rotary_emb_dim": 4, "rotary_emb_base": 20.0, "softmax_scale": 0.7},
    "neighbours turned": {"num_heads": 2, "num_heads_kv": 1, "rotary_emb_dim": 6, "rotary_emb_interleaved": True},
    "window": {"num_heads": 4, "num_heads_kv": 2, "window": 3, "rotary_emb_dim": 2},
    "convolution and mlp": {"num_heads": 2, "num_heads_kv": 1, "d_conv": 3, "mlp_dim": 1, "out_proj_bias": False},
}


def made(name: str, **options: Any) -> sl.Attention:
    torch.manual_seed(7)
    layer = sl.Attention(WIDTH, **{**OPTIONS[name], **options}).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer


def oracle(layer: sl.Attention, x: Tensor) -> Tensor:
    """x (t, d) -> (t, d), one token, one head and one earlier token at a time, with complex numbers for turns."""
    weights = {name: p.detach() for name, p in layer.named_parameters()}
    p, h, g = layer.head_dim, layer.num_heads, layer.num_heads_kv
    z = x @ weights["in_proj.weight"].T + weights.get("in_proj.bias", 0)
    z, mlp = z[:, : (h + 2 * g) * p], z[:, (h + 2 * g) * p :]
    if layer.d_conv:
        rows = [nn.functional.pad(z.T, (layer.d_conv - 1, 0))[:, i : i + layer.d_conv] for i in range(len(x))]
        z = torch.stack([(row * weights["conv1d.weight"][:, 0]).sum(1) + weights["conv1d.bias"] for row in rows])

    def turned(vector: Tensor, t: int) -> Tensor:
        vector, r = vector.clone(), layer.rotary_emb_dim // 2
        for i in range(r):
            pair = [2 * i, 2 * i + 1] if layer.rotary_emb_interleaved else [i, i + r]
            product = complex(*vector[pair].tolist()) * cmath.exp(1j * t * layer.rotary_emb_base ** (-i / r))
            vector[pair] = torch.tensor([product.real, product.imag], dtype=torch.float64)
        return vector

    scale, out = layer.softmax_scale or 1 / math.sqrt(p), []
    for t in range(len(x)):
        heads = []
        for i in range(h):
            j = i * g // h
            query = turned(z[t, i * p : (i + 1) * p], t)
            seen = range(0 if layer.window is None else max(0, t - layer.window + 1), t + 1)
            keys = [turned(z[s, (h + j) * p : (h + j + 1) * p], s) for s in seen]
            values = torch.stack([z[s, (h + g + j) * p : (h + g + j + 1) * p] for s in seen])
            weight = torch.tensor([math.exp(float(query @ key) * scale) for key in keys], dtype=torch.float64)
            heads.append(weight @ values / weight.sum())
        if layer.mlp_dim:
            value, gate = mlp[t].chunk(2)
            heads.append(value * gate / (1 + torch.exp(-gate)))
        out.append(torch.cat(heads))
    return torch.stack(out) @ weights["out_proj.weight"].T + weights.get("out_proj.bias", 0)


@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_what_the_formula_says(name: str) -> None:
    layer, x = made(name), torch.randn(2, 9, WIDTH, dtype=torch.float64)
    want = torch.stack([oracle(layer, row) for row in x])
    torch.testing.assert_close(layer(x), want, rtol=1e-10, atol=1e-12)
    state = layer.init_state(2, max_tokens=9)
    stepped = torch.stack([layer.step_(x[:, i], state) for i in range(9)], 1)
    torch.testing.assert_close(stepped, want, rtol=1e-10, atol=1e-12)


def test_heads_turns_and_window_are_those_of_mistral() -> None:
    """Another library's idea of grouped queries, of the pairing that is not interleaved, and of what a window holds."""
    mistral = pytest.importorskip("transformers.models.mistral", reason='needs the extra "hf"')
    config = mistral.MistralConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, sliding_window=5,
        intermediate_size=8, vocab_size=11,
    )  # fmt: skip
    model, seen = mistral.MistralModel(config).eval(), {}
    theirs = model.layers[0].self_attn
    ours = sl.Attention(32, 4, 2, rotary_emb_dim=8, window=5, qkv_proj_bias=False, out_proj_bias=False)
    with torch.no_grad():
        ours.in_proj.weight.copy_(torch.cat([p.weight for p in (theirs.q_proj, theirs.k_proj, theirs.v_proj)]))
        ours.out_proj.weight.copy_(theirs.o_proj.weight)

    def keep(module: nn.Module, args: Any, given: dict[str, Any], out: Any) -> None:
        seen.update(x=given["hidden_states"], y=out[0])

    theirs.register_forward_hook(keep, with_kwargs=True)
    model(torch.randint(11, (2, 20)))
    torch.testing.assert_close(ours(seen["x"]), seen["y"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("window", [None, 5, 300])
def test_blocks_of_queries_change_nothing(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences are looked at in blocks; here they are short, and there are many."""
    layer, x = made("halves turned", window=window), torch.randn(1, 700, WIDTH, dtype=torch.float64)
    head, after = layer.extend(x[:, :100], layer.init_state(1, max_tokens=700))
    with torch.no_grad():
        whole = layer(x)
        monkeypatch.setattr(attention, "BLOCK", 7)
        monkeypatch.setattr(attention, "MASK_ENTRIES", 5000)
        assert len(attention._blocks(600, window, 100)) > 1
        torch.testing.assert_close(layer(x), whole, rtol=1e-10, atol=1e-12)
        rest, _ = layer.extend(x[:, 100:], after)
    torch.testing.assert_close(torch.cat([head, rest], 1), whole, rtol=1e-10, atol=1e-12)


def test_memory_of_a_window_does_not_grow_with_the_square_of_the_length() -> None:
    sizes = [sum((b - a) * (b - max(0, a - 31)) for a, b in attention._blocks(t, 32, 0)) for t in (4096, 8192)]
    assert sizes[1] < 2.1 * sizes[0]


def test_rotation_has_the_published_values() -> None:
    """(1, 2, 3, 4), its first pair turned by ½·π·tanh(1), by either pairing."""
    x, turn = torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([0.5 * math.pi * math.tanh(1), 0])
    close = {"rtol": 0, "atol": 2e-6}
    neighbours, halves = (rotate(x, turn, interleaved=pairing)[0] for pairing in (True, False))
    torch.testing.assert_close(neighbours, torch.tensor([-1.495596, 1.662286, 3, 4]), **close)
    torch.testing.assert_close(halves, torch.tensor([-2.426291, 2, 2.028081, 4]), **close)


def test_places_far_into_a_stream_keep_their_angles() -> None:
    """Attention of turned keys depends on distances alone, after a hundred million tokens too."""
    q, k = torch.randn(2, 1, 1, 8)

    def product(place: int) -> Tensor:
        turns = [angles(torch.tensor([p]), 8, 1e4) for p in (place + 3, place)]
        return (rotate(q, turns[0], interleaved=False) * rotate(k, turns[1], interleaved=False)).sum()

    torch.testing.assert_close(product(100_000_000), product(0), rtol=1e-5, atol=1e-5)


def test_softmax_is_in_float32_whatever_the_layer() -> None:
    layer = made("plain").to(torch.bfloat16)
    x = torch.randn(1, 600, WIDTH, dtype=torch.bfloat16)
    exact = made("plain")
    exact.load_state_dict(layer.state_dict())
    error = (layer(x).double() - exact(x.double())).abs().max() / exact(x.double()).abs().max()
    assert error < 1e-2  # 600 weights added in bfloat16 would lose all but the first hundreds


# ---- what a state has room for ---------------------------------------------------------------------------------------


def test_a_cache_needs_a_bound_and_keeps_it() -> None:
    layer, x = made("plain"), torch.randn(2, 6, WIDTH, dtype=torch.float64)
    assert layer(x).shape == x.shape  # a whole sequence needs no cache
    for call in (lambda: layer.init_state(2), lambda: layer.extend(x)):
        with pytest.raises(ValueError, match=r"^Attention: it keeps every token.*Give init_state max_tokens"):
            call()
    with pytest.raises(ValueError, match="max_tokens is 0"):
        layer.init_state(2, max_tokens=0)
    state = layer.init_state(2, max_tokens=5)
    before = states.clone(state)
    with pytest.raises(ValueError, match=r"becomes 6 tokens long, its state has room for 5\. Make the state with"):
        layer.extend(x, state)
    _, state = layer.extend(x, state, lengths=[5, 2])
    full = states.clone(state)
    with pytest.raises(ValueError, match="becomes 6 tokens long"):
        layer.step_(x[:, 0], state)
    assert all(map(torch.equal, pytree.tree_leaves(state), pytree.tree_leaves(full)))
    convolved = made("convolution and mlp")
    _, narrow = convolved.extend(x[:, :3], convolved.init_state(2, max_tokens=3))
    kept = states.clone(narrow)
    with pytest.raises(ValueError, match="becomes 4 tokens long"):
        convolved.step_(x[:, 3], narrow)
    assert all(map(torch.equal, pytree.tree_leaves(narrow), pytree.tree_leaves(kept)))
    with pytest.raises(ValueError, match="becomes 7 tokens long"):
        layer.extend(x[:1], state, cu_seqlens=torch.tensor([0, 2, 6]))
    layer.step_(x[:1, 0], states.index(state, 1))  # the other row has room
    assert not any(x.any() for x in pytree.tree_leaves(before))


def test_a_window_goes_on_for_ever_in_constant_memory() -> None:
    layer, x = made("window"), torch.randn(1, 50, WIDTH, dtype=torch.float64)
    state, whole = layer.init_state(1), layer(x)
    size = states.num_bytes(state)
    assert state.keys.shape[1] == 3
    for i in range(50):
        torch.testing.assert_close(layer.step_(x[:, i], state), whole[:, i], rtol=1e-10, atol=1e-12)
    assert states.num_bytes(state) == size
    assert layer.init_state(1, max_tokens=1000).keys.shape[1] == 3
    narrow = layer.init_state(1, max_tokens=2)  # less room than the window: a bound again
    with pytest.raises(ValueError, match="room for 2"):
        layer.extend(x, narrow)


def test_where_values_cannot_be_read_a_full_state_gives_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nothing waits for positions; a wrong text would go unnoticed, NaN does not."""
    layer, x = made("halves turned"), torch.randn(2, 6, WIDTH, dtype=torch.float64)
    whole, (_, filled) = layer(x), layer.extend(x, layer.init_state(2, max_tokens=6), lengths=[3, 1])
    rest = layer.extend(x[:, 3:5], filled)[0]
    with torch.no_grad():
        monkeypatch.setattr(attention.checks, "can_read", lambda tensor: False)
        y, _ = layer.extend(x, layer.init_state(2, max_tokens=4))
        assert y[:, 4:].isnan().all()
        torch.testing.assert_close(y[:, :4], whole[:, :4])
        torch.testing.assert_close(layer.extend(x[:, 3:5], filled)[0], rest)
        state = layer.init_state(2, max_tokens=4)
        stepped = torch.stack([layer.step_(x[:, i], state) for i in range(6)], 1)
        assert stepped[:, 4:].isnan().all()
        torch.testing.assert_close(stepped[:, :4], whole[:, :4])


def test_empty_slots_are_never_read() -> None:
    layer, x = made("halves turned"), torch.randn(2, 4, WIDTH, dtype=torch.float64)
    state = layer.init_state(2, max_tokens=9)
    state.keys.fill_(torch.nan)
    state.values.fill_(torch.nan)
    _, state = layer.extend(x[:, :3], state)
    torch.testing.assert_close(layer.extend(x[:, 3:], state)[0][:, 0], layer(x)[:, 3])
    torch.testing.assert_close(layer.step_(x[:, 3], state), layer(x)[:, 3])


@pytest.mark.parametrize("name", ["halves turned", "window"])
def test_rows_of_a_state_have_places_of_their_own(name: str) -> None:
    layer, x = made(name), torch.randn(3, 12, WIDTH, dtype=torch.float64)
    whole, lengths = layer(x), [7, 0, 2]
    _, state = layer.extend(x[:, :7], layer.init_state(3, max_tokens=12), lengths=lengths)
    for i in range(3):
        y = layer.step_(torch.stack([row[n + i] for row, n in zip(x, lengths, strict=True)]), state)
        want = torch.stack([row[n + i] for row, n in zip(whole, lengths, strict=True)])
        torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-12)
    assert state.position.tolist() == [10, 3, 5]


def test_a_prompt_leaves_the_convolution_its_own_inputs() -> None:
    """mamba_ssm keeps what came out of it, and a prompt's continuation starts from wrong inputs."""
    layer, x = made("convolution and mlp"), torch.randn(1, 8, WIDTH, dtype=torch.float64)
    _, state = layer.extend(x[:, :5], layer.init_state(1, max_tokens=8))
    torch.testing.assert_close(state.conv, layer.in_proj(x[:, 3:5])[..., : layer.channels])
    stepped = torch.stack([layer.step_(x[:, i], state) for i in range(5, 8)], 1)
    torch.testing.assert_close(stepped, layer(x)[:, 5:], rtol=1e-10, atol=1e-12)


def test_a_state_shares_no_memory_with_the_one_before() -> None:
    layer, x = made("convolution and mlp"), torch.randn(2, 3, WIDTH, dtype=torch.float64)
    _, before = layer.extend(x, layer.init_state(2, max_tokens=9))
    kept = states.clone(before)
    for piece in (x[:, :0], x):
        layer.step_(x[:, 0], layer.extend(piece, before)[1])
        assert all(map(torch.equal, pytree.tree_leaves(before), pytree.tree_leaves(kept)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads is 5, which does not divide d_model 12"), ({"num_heads": 0}, "num_heads is 0"),
        ({"num_heads_kv": 3}, "num_heads_kv 3 does not divide num_heads 4"), ({"head_dim": 0}, "head_dim is 0"),
        ({"causal": False}, "causal is False; what looks ahead"), ({"d_conv": -1}, "d_conv is -1"),
        ({"rotary_emb_dim": 3}, "rotary_emb_dim is 3, expected"), ({"rotary_emb_dim": 8}, "rotary_emb_dim is 8"),
        ({"rotary_emb_base": 0.0}, "rotary_emb_base"), ({"softmax_scale": -1.0}, "softmax_scale"),
        ({"window": 0}, "window is 0"), ({"max_tokens": 1.5}, "max_tokens is 1.5"), ({"mlp_dim": None}, "mlp_dim"),
        ({"qkv_proj_bias": 1}, "qkv_proj_bias is 1"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^Attention: {message}"):
        sl.Attention(**{"d_model": WIDTH, "num_heads": 4, **options})


def test_foreign_states_are_refused() -> None:
    layer, x = made("plain"), torch.randn(1, 2, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match="state is a MambaState, expected an AttentionState"):
        layer.extend(x, sl.Mamba(WIDTH).init_state(1))
    with pytest.raises(ValueError, match=r"state.keys has shape \(1, 4, 1, 5\), expected"):
        layer.extend(x, made("one head of keys").init_state(1, max_tokens=4))


def test_it_compiles_in_one_graph() -> None:
    layer, x = made("window").eval(), torch.randn(2, 7, WIDTH, dtype=torch.float64)
    state = layer.init_state(2, max_tokens=20)
    want, after = layer.extend(x, layer.extend(x, state)[1])
    extend = torch.compile(layer.extend, backend="eager", fullgraph=True)
    got, end = extend(x, extend(x, state)[1])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(end.keys, after.keys)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
