"""Whole models: configuration, vocabulary, loss, compilation, and states that outlive a process."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stateline import state as states
from stateline.models import LanguageModel, ModelConfig, ModelState, checkpoint

SMALL: dict[str, Any] = {"d_model": 16, "n_layer": 2, "vocab_size": 61, "ssm_cfg": {"d_state": 4}}


def small(**options: Any) -> LanguageModel:
    return LanguageModel(ModelConfig(**{**SMALL, **options}))


def ids(b: int = 2, t: int = 7) -> Tensor:
    return torch.randint(61, (b, t))


# ---- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": -1}, "d_model is -1"), ({"d_model": 16.0}, "d_model"), ({"n_layer": 0}, "n_layer"),
        ({"vocab_size": True}, "vocab_size"), ({"vocab_size": "61"}, "vocab_size"),
        ({"d_intermediate": -8}, "d_interm"), ({"norm_eps": math.nan}, "norm_eps is nan"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"rms_norm": 1}, "rms_norm is 1"), ({"pad_vocab_size_multiple": 0}, "pad_vocab"),
        ({"tie_embeddings": None}, "tie_embeddings"),
        ({"ssm_cfg": [1]}, "ssm_cfg"), ({"ssm_cfg": {"layer": "Mamba9"}}, "Mamba9.*'Mamba1'"),
        ({"ssm_cfg": {"d_stat": 4}}, "unknown keys d_stat.*d_state"),
        ({"ssm_cfg": {"d_model": 4}}, "unknown keys d_model"),
        ({"ssm_cfg": {"dt_min": math.nan}}, "dt_min is nan"), ({"ssm_cfg": {"d_state": -4}}, "d_state is -4"),
    ],
)  # fmt: skip
def test_wrong_configurations_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ModelConfig(**{**SMALL, **options})


def test_configuration_goes_through_json_and_refuses_unknown_keys() -> None:
    config = ModelConfig(**SMALL, d_intermediate=20, norm_eps=1e-6)
    values = json.loads(json.dumps(config.to_dict()))
    assert ModelConfig.from_dict(values) == config
    with pytest.raises(ValueError, match=r"unknown keys d_modell, layers; known are d_model"):
        ModelConfig.from_dict({"layers": 2, "d_modell": 3})
    with pytest.raises(AttributeError):
        config.d_model = 3  # type: ignore[misc]  # frozen


def test_configuration_does_not_share_the_callers_dict() -> None:
    options = {"d_state": 4}
    config = ModelConfig(d_model=16, ssm_cfg=options)
    options["d_state"] = 400
    assert config.ssm_cfg == {"d_state": 4}


def test_parameter_names_are_mamba_ssms() -> None:
    mixer = ["A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight",
             "dt_proj.bias", "out_proj.weight"]  # fmt: skip
    layers = [
        f"backbone.layers.{i}.{name}" for i in range(2) for name in ["norm.weight", *(f"mixer.{m}" for m in mixer)]
    ]
    names = ["backbone.embedding.weight", *layers, "backbone.norm_f.weight", "lm_head.weight"]
    assert sorted(small().state_dict()) == sorted(names)
    more = set(small(d_intermediate=16, rms_norm=False).state_dict()) - set(names)
    ends = {"norm.bias", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc2.weight"}
    assert more == {f"backbone.layers.{i}.{end}" for i in range(2) for end in ends} | {"backbone.norm_f.bias"}


def test_tied_matrices_are_one_and_count_once() -> None:
    tied, untied = small(), small(tie_embeddings=False)
    assert tied.lm_head.weight is tied.backbone.embedding.weight
    assert tied.backbone.embedding.weight.shape == (64, 16)
    assert untied.num_parameters() - tied.num_parameters() == 64 * 16
    assert tied.bfloat16().lm_head.weight is tied.backbone.embedding.weight
    assert tied.double().lm_head.weight is tied.backbone.embedding.weight


def test_initial_values_shrink_with_depth() -> None:
    model = small(d_model=64, n_layer=9, vocab_size=1000, ssm_cfg={"bias": True}, d_intermediate=128)
    assert abs(model.backbone.embedding.weight.std() - 0.02) < 1e-3
    for layer in model.backbone.layers:
        for matrix, fan_in in ((layer.mixer.out_proj.weight, 128), (layer.mlp.fc2.weight, 128)):
            bound = fan_in**-0.5 / 3
            assert 0.95 * bound < matrix.abs().max() <= bound
        assert (layer.mixer.in_proj.bias == 0).all()
        assert (layer.mixer.out_proj.bias == 0).all()
        assert (layer.mixer.dt_proj.bias < 0).all()  # not zeroed with the others


# ---- what comes in and goes out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 61, 63])
def test_ids_outside_the_vocabulary_are_refused(bad: int) -> None:
    model, x = small(), ids()
    x[1, 3] = bad
    for call in (
        lambda: model(x), lambda: model.extend(x), lambda: model.step_(x[:, 3], model.init_state(2)),
        lambda: model.loss(x, ids()), lambda: model.loss(ids(), x), lambda: model(x, lengths=[7, 4]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"token id {bad} is outside the vocabulary, 0 to 60"):
            call()
    assert model(x, lengths=[7, 3]).isfinite().all()  # there it is padding


def test_wrong_inputs_are_named() -> None:
    model = small()
    with pytest.raises(TypeError, match="input_ids is float32"):
        model(torch.zeros(1, 2))
    with pytest.raises(TypeError, match="input_ids is bool"):
        model(torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="input_ids is a list"):
        model([[1, 2]])
    with pytest.raises(ValueError, match=r"input_ids has shape \(3,\), expected \(b, t\)"):
        model(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"input_ids has shape \(1, 3\), expected \(b,\)"):
        model.step_(torch.zeros(1, 3, dtype=torch.long), model.init_state(1))
    with pytest.raises(ValueError, match="targets has shape"):
        model.loss(ids(), ids(2, 6))
    with pytest.raises(TypeError, match="targets is float32"):
        model.loss(ids(), ids().float())
    with pytest.raises(ValueError, match="chunk is 0"):
        model.loss(ids(), ids(), chunk=0)
    with pytest.raises(ValueError, match="expected a ModelState of 2"):
        model.extend(ids(), ModelState(model.init_state(2).layers[:1]))
    with pytest.raises(ValueError, match="expected a ModelState of 2"):
        model.extend(ids(), model.init_state(2).layers)
    with pytest.raises(TypeError, match="expected a ModelConfig"):
        LanguageModel(SMALL)


def test_ids_of_32_bits_and_no_tokens_at_all() -> None:
    model, x = small(), ids()
    assert torch.equal(model(x.int()), model(x))
    assert model(x[:, :0]).shape == (2, 0, 61)
    assert model(x[:0]).shape == (0, 7, 61)
    logits, _ = model.extend(x[:, :0], model.init_state(2), last_only=True)
    assert torch.equal(logits, torch.zeros(2, 61))
    assert model.loss(x[:, :0], x[:, :0]) == 0


def test_last_only_gives_each_sequences_last_logits() -> None:
    model, x = small(), ids(3, 7)
    whole, state = model.extend(x, model.init_state(3))
    last, after = model.extend(x, model.init_state(3), last_only=True)
    assert torch.allclose(last, whole[:, -1], atol=1e-6)
    assert torch.equal(after.layers[1].ssm, state.layers[1].ssm)
    last, _ = model.extend(x, model.init_state(3), lengths=torch.tensor([2, 0, 7]), last_only=True)
    assert torch.allclose(last, torch.stack([whole[0, 1], torch.zeros(61), whole[2, 6]]), atol=1e-6)
    packed = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    whole = model(x[:1], cu_seqlens=packed)[0]
    last, _ = model.extend(x[:1], model.init_state(3), cu_seqlens=packed, last_only=True)
    assert torch.allclose(last, torch.stack([whole[2], torch.zeros(61), whole[6]]), atol=1e-6)


def test_16_bit_model_keeps_its_residual_stream_in_float32() -> None:
    seen: list[torch.dtype] = []
    for wanted in (True, False):
        model = small(residual_in_fp32=wanted).bfloat16()
        model.backbone.norm_f.register_forward_pre_hook(lambda module, args: seen.append(args[1].dtype))
        assert model(ids()).dtype == torch.bfloat16
    assert seen == [torch.float32, torch.bfloat16]


# ---- compilation -----------------------------------------------------------------------------------------------------


def calls(model: LanguageModel) -> dict[str, Any]:
    lengths = torch.tensor([7, 4])
    return {
        "forward": lambda x: model(x),
        "padded": lambda x: model(x, lengths=lengths),
        "packed": lambda x: model(x.reshape(1, 14), cu_seqlens=torch.tensor([0, 5, 14])),
        "extend": lambda x: model.extend(x, model.init_state(2), lengths=lengths, last_only=True)[0],
        "loss": lambda x: model.loss(x, x, lengths=lengths, chunk=5),
    }


@pytest.mark.parametrize("name", list(calls(small())))
def test_compiles_into_one_graph(name: str) -> None:
    torch._dynamo.reset()
    model, x = small(n_layer=1), ids()
    function = calls(model)[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    check_compiled(model, function, compiled, x)


def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    model, x = small(n_layer=1), ids()
    with torch.no_grad():  # the backward pass takes as long again to compile
        assert torch.allclose(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-5)


def check_compiled(model: LanguageModel, function: Any, compiled: Any, x: Tensor) -> None:
    for call in (function, compiled):
        model.zero_grad()
        y = call(x)
        y.square().sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        if call is function:
            want, expected = y, grads
    assert torch.allclose(y, want, atol=1e-5)
    for got, grad in zip(grads, expected, strict=True):
        assert torch.allclose(got, grad, atol=1e-4 * grad.abs().max().item())


def test_step_compiles_and_writes_into_the_state() -> None:
    torch._dynamo.reset()
    model, x = small(), ids()
    compiled = torch.compile(model.step_, fullgraph=True, backend="aot_eager")
    one, two = model.init_state(2), model.init_state(2)
    for i in range(3):
        assert torch.allclose(compiled(x[:, i], one), model.step_(x[:, i], two), atol=1e-5)
    assert torch.allclose(one.layers[1].ssm, two.layers[1].ssm, atol=1e-6)
    assert (one.layers[0].conv != 0).any()


def test_exports_with_a_state() -> None:
    class Extend(nn.Module):
        def __init__(self, model: LanguageModel) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
            return self.model.extend(x, state)

    model, x = small(), ids()
    t = torch.export.Dim("t", min=2, max=512)
    program = torch.export.export(
        Extend(model), (x, model.init_state(2)), dynamic_shapes=({1: t}, [[[None, None]] * 2]), strict=False
    )
    longer = ids(2, 11)
    got, state = program.module()(longer, model.init_state(2))
    want, wanted = model.extend(longer, model.init_state(2))
    assert torch.allclose(got, want, atol=1e-5)
    assert torch.allclose(state.layers[0].ssm, wanted.layers[0].ssm, atol=1e-5)


# ---- states of models ------------------------------------------------------------------------------------------------

CONTINUE = """
import sys, torch, stateline
from stateline import state as states
torch.set_num_threads(1)
folder = sys.argv[1]
model = stateline.load(folder + "/model")
state = states.load(folder + "/state.safetensors", model)
x = torch.load(folder + "/rest.pt")
with torch.no_grad():
    logits, state = model.extend(x, state)
    step = model.step_(x[:, 0], state)
torch.save((logits, step, state.layers[1].ssm), folder + "/out.pt")
"""


def test_a_state_continues_in_another_process_to_the_last_bit(tmp_path: Path) -> None:
    model, x = small().eval(), ids(2, 12)
    checkpoint.save(model, tmp_path / "model")
    with torch.no_grad():
        _, state = model.extend(x[:, :5], model.init_state(2))
    states.save(state, tmp_path / "state.safetensors", model)
    torch.save(x[:, 5:], tmp_path / "rest.pt")
    subprocess.run([sys.executable, "-c", CONTINUE, str(tmp_path)], check=True)
    with torch.no_grad():
        logits, state = model.extend(x[:, 5:], state)
        step = model.step_(x[:, 5], state)
    for got, want in zip(torch.load(tmp_path / "out.pt"), (logits, step, state.layers[1].ssm), strict=True):
        assert torch.equal(got, want)


def test_states_can_be_picked_stacked_and_copied() -> None:
    model, x = small().eval(), ids(3, 6)
    with torch.no_grad():
        _, state = model.extend(x, model.init_state(3))
        fork = states.stack([states.index(state, [2]), states.index(state, 0)])
        branch = states.clone(fork)
        model.step_(x[[2, 0], 0], branch)
        want, _ = model.extend(x[:, :1], state)
        got, _ = model.extend(x[[2, 0], :1], fork)
    assert torch.allclose(got, want[[2, 0]], atol=1e-5)
    assert not torch.equal(branch.layers[0].ssm, fork.layers[0].ssm)
