"""States of Mamba-2 kept in bfloat16: half the memory, computed in float32, in every part that keeps a state."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import small
from torch import Tensor
from torch.utils import _pytree as pytree

import stateline
from stateline import ops
from stateline import state as states
from stateline.cli import main
from stateline.generation import SamplingConfig, Stream
from stateline.generation.decode import explain, network_of
from stateline.interop import export_model
from stateline.models import LanguageModel
from stateline.nn import Mamba2
from stateline.ops.decode_token import decode_token_
from stateline.ops.decode_token import gpu as token_on_gpus

BF16 = torch.bfloat16
T = 24
#: Largest error over largest value after T tokens, each of which rounds the state to 8 bits.
BOUND = 2e-2


def layer(**options: Any) -> Mamba2:
    torch.manual_seed(3)
    return Mamba2(16, d_state=8, headdim=4, **options).eval()


def model(**options: Any) -> LanguageModel:
    torch.manual_seed(2)
    return small(vocab_size=256, d_model=16, ssm_cfg={"layer": "Mamba2", "headdim": 8, "d_state": 8}, **options)


def kept(state: Any) -> set[torch.dtype]:
    return {s.ssm.dtype for s in state.layers} | {s.conv.dtype for s in state.layers}


def near(a: Tensor, b: Tensor, bound: float = BOUND) -> None:
    assert (a - b).abs().max() <= bound * b.abs().max()


@torch.no_grad()
def test_tokens_and_pieces_stay_near_the_whole() -> None:
    wide, narrow, x = layer(), layer(), torch.randn(2, T, 16)
    narrow.state_dtype = "bfloat16"
    assert narrow.init_state(2).ssm.dtype == BF16
    assert narrow.init_state(2).conv.dtype == torch.float32
    whole, last = wide(x), wide.extend(x)[1]
    parts, state = [], None
    for piece in x[:, :10].split([4, 1, 5], 1):
        y, state = narrow.extend(piece, state)
        assert state.ssm.dtype == BF16
        parts.append(y)
    assert state is not None
    before = state.ssm.clone()
    narrow.extend(x[:, 10:], state)
    assert torch.equal(state.ssm, before)
    parts += [narrow.step_(x[:, i], state)[:, None] for i in range(10, T)]
    near(torch.cat(parts, 1), whole)
    near(state.ssm.float(), last.ssm)


@torch.no_grad()
def test_a_step_is_computed_in_float32_and_rounded_once() -> None:
    x, dt, B = torch.randn(3, 4, 5), torch.rand(3, 4), torch.randn(3, 2, 7)
    A, start = -torch.rand(4), torch.randn(4, 4, 5, 7).to(BF16)
    index = torch.tensor([2, -1, 0])
    for log_A in (False, True):
        narrow, wide = start.clone(), start.float()
        given = (x, dt, A.neg().log() if log_A else A, B, B)
        y = ops.ssd_step_(narrow, *given, log_A=log_A, index=index)
        assert torch.equal(y, ops.ssd_step_(wide, *given, log_A=log_A, index=index))
        assert torch.equal(narrow, wide.to(BF16))
        near(y, ops.ssd_step_(start.float(), x, dt, A, B, B, index=index), 1e-6)
    with pytest.raises(TypeError, match=r"^ssd_step_: state is float16"):
        ops.ssd_step_(start.half(), x, dt, A, B, B, index=index)
    with pytest.raises(TypeError, match=r"^ssd_step_: state is bfloat16"):
        ops.ssd_step_(start, x.double(), dt, A.double(), B, B, index=index)


def test_a_model_says_it_once_and_streams_and_files_go_on(tmp_path: Path) -> None:
    m, ids = model(), torch.randint(256, (1, T))
    whole, before = m(ids), m.init_state(1)
    m.state_dtype = BF16
    assert kept(before) == {torch.float32}
    assert kept(m.init_state(1)) == {torch.float32, BF16}
    assert copy.deepcopy(m).state_dtype == BF16
    first, state = m.extend(ids[:, :9], m.init_state(1))
    rest, state = m.extend(ids[:, 9:], state)
    near(torch.cat([first, rest], 1), whole)
    states.save(state, tmp_path / "state", m)
    for x, y in zip(*map(pytree.tree_leaves, (states.load(tmp_path / "state", m), state)), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
    greedy = SamplingConfig(temperature=0)
    stream = Stream(m, sampling=greedy, rollback=9)
    stream.feed("once upon a time")
    stream.save(tmp_path / "stream")
    wanted = [token.id for token in stream.tokens(9)]
    assert [token.id for token in Stream.load(tmp_path / "stream", m).tokens(9)] == wanted
    stream.rollback(9)
    assert [token.id for token in stream.tokens(9)] == wanted
    prompts = ["My fellow", "War", "The economy is"]
    alone = ["".join(stateline.generate(m, p, max_tokens=9, sampling=greedy)) for p in prompts]
    assert stateline.Engine(m, max_batch=2).generate(prompts, max_tokens=9, sampling=greedy) == alone
    m.state_dtype = None
    assert kept(m.init_state(1)) == {torch.float32}
    with pytest.raises(ValueError, match=r"ssm of bfloat16 .*, the model's state is float32 .*state_dtype"):
        states.load(tmp_path / "state", m)


@torch.no_grad()
def test_packed_models_go_layer_by_layer_on_cpus_and_say_so() -> None:
    m = model()
    m.state_dtype = BF16
    packed = stateline.prepare_for_decode(m)
    assert explain(packed) in (
        "it keeps states in float32, these are bfloat16.",
        explain(stateline.prepare_for_decode(model())),
    )
    assert explain(packed) is not None
    network, state, ids = network_of(packed), packed.init_state(2), torch.randint(256, (2, 5))
    assert token_on_gpus._problem_of_layers(network) is None
    own = [x.clone() for layer in state.layers for x in (layer.conv, layer.ssm)]
    for t in range(5):
        y = packed.step_(ids[:, t], state)
        near(y, decode_token_(own, ids[:, t], network, backend="reference")[:, :256], 1e-2)
    assert own[1].dtype == BF16
    with pytest.raises(ValueError, match=r"^decode_token: layer 0's ssm state is torch\.float32 .*contiguous bfloat16"):
        decode_token_([x.float() for x in own], ids[:, 0], network, backend="reference")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stateline.save(model(), tmp_path / "m")
    command = ["generate", "My", "--max-tokens", "4", "--greedy", "--state-dtype", "bfloat16"]
    assert main([*command, "--model", str(tmp_path / "m")]) == 0
    assert main(command) != 0
    assert "state_dtype is torch.bfloat16, and the model has no Mamba2" in capsys.readouterr().err


def test_what_is_refused(tmp_path: Path) -> None:
    for wrong in ("float16", torch.float16, 16):
        with pytest.raises(ValueError, match=r"^Mamba2: state_dtype is .*, expected torch\.bfloat16 or None"):
            layer().state_dtype = wrong  # type: ignore[assignment]  # as a user might
    with pytest.raises(ValueError, match="in a float64 layer"):
        layer(dtype=torch.float64).state_dtype = BF16
    with pytest.raises(ValueError, match="the model has no Mamba2 to use it"):
        small(n_layer=1).state_dtype = BF16
    packed = stateline.prepare_for_decode(model())
    with pytest.raises(ValueError, match=r"packed for decoding\. Set it on the model that prepare_for_decode is given"):
        packed.state_dtype = BF16
    m = model()
    m.state_dtype = BF16
    with pytest.raises(ValueError, match=r"state_dtype is torch\.bfloat16, ONNX models are float32"):
        export_model(m, tmp_path / "m.onnx", to="onnx")
