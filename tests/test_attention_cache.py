"""Keys and values kept in 16 bits: the same law, half the memory, in every part that keeps a state."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import small
from test_layers import BOUND
from torch.utils import _pytree as pytree

import stateline
from stateline import nn as sl
from stateline import state as states
from stateline.cli import main
from stateline.generation import SamplingConfig, Stream, generate_batch
from stateline.interop import export_model
from stateline.models import LanguageModel, ModelConfig

WIDTH, T = 24, 40
KINDS: dict[str, dict[str, Any]] = {
    "bound": {"num_heads": 4, "num_heads_kv": 2, "rotary_emb_dim": 4, "max_tokens": T},
    "window": {"num_heads": 4, "rotary_emb_dim": 6, "window": 7, "d_conv": 3},
}
CACHES = [torch.bfloat16, torch.float16]


def layer(kind: str, **options: Any) -> sl.Attention:
    torch.manual_seed(3)
    return sl.Attention(WIDTH, **KINDS[kind], **options).eval()


def in_pieces(made: sl.Attention, x: torch.Tensor) -> tuple[torch.Tensor, sl.AttentionState]:
    """Outputs of x cut three times and stepped through at the end, and the state after it."""
    state, parts = made.init_state(len(x)), []
    for piece in x[:, :30].split([11, 1, 18], 1):
        y, state = made.extend(piece, state)
        parts.append(y)
    parts += [made.step_(x[:, i], state)[:, None] for i in range(30, T)]
    return torch.cat(parts, 1), state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", CACHES)
@torch.no_grad()
def test_a_layer_of_that_dtype_loses_nothing(kind: str, cache: torch.dtype) -> None:
    """To the bit: what it would round for the cache has that dtype already."""
    plain, narrow = layer(kind).to(cache), layer(kind, cache_dtype=cache).to(cache)
    x = torch.randn(2, T, WIDTH).to(cache)
    (want, full), (got, half) = in_pieces(plain, x), in_pieces(narrow, x)
    assert torch.equal(got, want)
    assert full.keys.dtype == torch.float32
    assert half.keys.dtype == half.values.dtype == cache
    assert half.conv.dtype == torch.float32
    assert 2 * half.keys.nbytes == full.keys.nbytes
    assert torch.equal(half.keys.float(), full.keys)
    assert (got - narrow(x)).abs().max() <= BOUND[cache] * narrow(x).abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_a_wider_layer_keeps_the_law_at_the_bound_of_the_cache(
    kind: str, cache: torch.dtype, dtype: torch.dtype
) -> None:
    narrow = layer(kind, cache_dtype=cache).to(dtype)
    x = torch.randn(2, T, WIDTH, dtype=dtype)
    whole, (got, state) = narrow(x), in_pieces(narrow, x)
    error = (got - whole).abs().max() / whole.abs().max()
    assert BOUND[torch.float32] < error <= BOUND[cache]  # so it was rounded
    assert got.dtype == dtype
    assert state.keys.dtype == cache
    lengths = torch.tensor([T, 5])
    padded, after = narrow.extend(x[:, :20], narrow.init_state(2), lengths=lengths.clamp(max=20))
    alone, kept = narrow.extend(x[1:, :5], narrow.init_state(1))
    assert (padded[1, :5] - alone[0]).abs().max() <= BOUND[torch.float32] * alone.abs().max()
    rest = [narrow.step_(x[1:, 5], s) for s in (states.index(after, 1), kept)]
    assert (rest[0] - rest[1]).abs().max() <= BOUND[cache] * rest[1].abs().max()


def test_gradients_pass_through_it() -> None:
    narrow = layer("bound", cache_dtype=torch.bfloat16)
    x = torch.randn(1, T, WIDTH, requires_grad=True)
    _, state = narrow.extend(x[:, :20], narrow.init_state(1))
    y, _ = narrow.extend(x[:, 20:], state)
    got = torch.autograd.grad(y.square().sum(), x)[0]
    want = torch.autograd.grad(narrow(x)[:, 20:].square().sum(), x)[0]
    assert (got - want).abs().max() <= 2 * BOUND[torch.bfloat16] * want.abs().max()
    assert got[:, :20].abs().max() > 0


# ---- whole models ----------------------------------------------------------------------------------------------------


def hybrid(kind: str = "bound", **options: Any) -> LanguageModel:
    torch.manual_seed(2)
    return small(
        n_layer=3, vocab_size=256, d_model=24, attn_layer_idx=[1], attn_cfg=KINDS[kind] | options, d_intermediate=9
    )


def caches(state: Any) -> set[torch.dtype]:
    return {s.keys.dtype for s in state.layers if isinstance(s, sl.AttentionState)}


def test_a_model_says_it_once_for_all_states(tmp_path: Path) -> None:
    model, ids = hybrid(), torch.randint(256, (1, 30))
    assert model.cache_dtype is None
    whole, before = model(ids), model.init_state(1)
    model.cache_dtype = torch.bfloat16
    assert caches(before) == {torch.float32}
    assert caches(model.init_state(1)) == {torch.bfloat16}
    first, state = model.extend(ids[:, :20], model.init_state(1))
    rest, _ = model.extend(ids[:, 20:], state)
    assert (torch.cat([first, rest], 1) - whole).abs().max() <= BOUND[torch.bfloat16] * whole.abs().max()
    for other in (copy.deepcopy(model), stateline.prepare_for_decode(model, "int8")):
        assert other.cache_dtype == torch.bfloat16
    model.cache_dtype = None
    assert caches(model.init_state(1)) == {torch.float32}
    told = hybrid(cache_dtype=torch.float16)
    assert told.config.attn_cfg["cache_dtype"] == "float16"
    stateline.save(told, tmp_path / "m")
    assert stateline.load(tmp_path / "m").cache_dtype == torch.float16
    stateline.save(told, tmp_path / "theirs", "mamba_ssm")  # which says nothing of caches
    assert stateline.load(tmp_path / "theirs").cache_dtype is None


def test_states_and_streams_are_saved_and_go_on(tmp_path: Path) -> None:
    model = hybrid("window")
    model.cache_dtype = "bfloat16"
    _, state = model.extend(torch.randint(256, (2, 15)), model.init_state(2))
    states.save(state, tmp_path / "state", model)
    again = states.load(tmp_path / "state", model)
    for x, y in zip(pytree.tree_leaves(again), pytree.tree_leaves(state), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
    stream = Stream(model, sampling=SamplingConfig(seed=1), rollback=20)
    stream.feed("once upon a time")
    stream.save(tmp_path / "stream")
    wanted = [token.id for token in stream.tokens(15)]
    assert [token.id for token in Stream.load(tmp_path / "stream", model).tokens(15)] == wanted
    stream.rollback(15)
    assert [token.id for token in stream.tokens(15)] == wanted
    wide = model.init_state(2)
    model.cache_dtype = None
    for load in (lambda: states.load(tmp_path / "state", model), lambda: Stream.load(tmp_path / "stream", model)):
        with pytest.raises(ValueError, match=r"keys of bfloat16 .*, the model's state is float32 .*cache_dtype"):
            load()
    with pytest.raises(ValueError, match=r"in different dtypes, torch\.bfloat16 and torch\.float32.*same cache_dtype"):
        states.stack([wide, model.init_state(2)])


@pytest.mark.parametrize("packed", [False, True])
def test_engines_write_what_a_stream_writes(packed: bool) -> None:
    model = hybrid()
    model.cache_dtype = torch.bfloat16
    if packed:
        model = stateline.prepare_for_decode(model, "int8")
    prompts, greedy = ["My fellow", "War", "The economy is"], SamplingConfig(temperature=0)
    alone = ["".join(stateline.generate(model, p, max_tokens=9, sampling=greedy)) for p in prompts]
    engine = stateline.Engine(model, max_batch=2)
    assert engine.generate(prompts, max_tokens=9, sampling=greedy) == alone
    assert generate_batch(model, prompts, max_tokens=9, sampling=greedy) == alone


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stateline.save(hybrid("window"), tmp_path / "m")
    command = ["generate", "My", "--model", str(tmp_path / "m"), "--max-tokens", "4", "--greedy"]
    stream = ["--save-stream", str(tmp_path / "s")]
    assert main([*command, "--cache-dtype", "bfloat16", *stream]) == 0
    assert main([*command[:1], "--load-stream", str(tmp_path / "s"), "--model", str(tmp_path / "m")]) != 0
    assert "the model's state is float32" in capsys.readouterr().err
    assert main(["generate", "My", "--max-tokens", "4", "--cache-dtype", "bfloat16"]) != 0
    assert "cache_dtype is torch.bfloat16, and the model has no attention" in capsys.readouterr().err


def test_what_is_refused(tmp_path: Path) -> None:
    for wrong in ("int8", torch.float32, 16):
        with pytest.raises(ValueError, match=r"^Attention: cache_dtype is .*expected torch\.bfloat16, torch\.float16"):
            layer("bound", cache_dtype=wrong)
    with pytest.raises(ValueError, match="cache_dtype is 'fp8'"):
        ModelConfig(d_model=8, n_layer=1, attn_layer_idx=[0], attn_cfg={"num_heads": 2, "cache_dtype": "fp8"})
    model = hybrid(cache_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"state.*is torch\.bfloat16, ONNX models are float32"):
        export_model(model, tmp_path / "m.onnx", to="onnx")
