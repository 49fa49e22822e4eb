"""One token through a whole model: against the reference, in any batch, after any other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from where import INTERPRETED

from stateline import LanguageModel, ModelConfig
from stateline.generation.decode import explain, network_of, prepare_for_decode
from stateline.models import ModelState
from stateline.ops.decode_token import decode_token_
from stateline.ops.packed_linear import FORMATS, pack, packed_linear

pytestmark = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="needs a device of compute capability 9.0; the kernel is CUDA C++, which no interpreter runs",
)
VOCABULARY = 1003
CONFIGS = {
    "plain": {"d_model": 256, "n_layer": 2},
    "odd": {
        "d_model": 280,
        "n_layer": 3,
        "tie_embeddings": False,
        "ssm_cfg": {"d_state": 20, "d_conv": 2, "bias": True},
    },
    "wide": {"d_model": 1040, "n_layer": 1, "ssm_cfg": {"d_state": 64, "dt_rank": 300, "conv_bias": False}},
    "small": {"d_model": 8, "n_layer": 2, "ssm_cfg": {"d_state": 4, "d_conv": 2}},
    # so large that its matrices are dealt out differently for many sequences
    "large": {"d_model": 2136, "n_layer": 1},
    "heads": {"d_model": 256, "n_layer": 2, "ssm_cfg": {"layer": "Mamba2"}},
    "heads, odd": {
        "d_model": 280,
        "n_layer": 3,
        "tie_embeddings": False,
        "ssm_cfg": {
            "layer": "Mamba2", "headdim": 20, "expand": 2.5, "d_state": 20, "d_conv": 2, "bias": True, "ngroups": 5,
            "dt_limit": (0.01, 0.05), "D_has_hdim": True,
        },
    },
    "heads, beside": {
        "d_model": 136,
        "n_layer": 2,
        "ssm_cfg": {
            "layer": "Mamba2", "headdim": 24, "d_ssm": 168, "d_state": 12, "norm_before_gate": True, "conv_bias": False,
            "dt_limit": (None, 0.02),
        },
    },
    "heads, wide": {"d_model": 1040, "n_layer": 1, "ssm_cfg": {"layer": "Mamba2", "headdim": 40, "d_state": 260}},
    "heads, large": {"d_model": 2136, "n_layer": 1, "ssm_cfg": {"layer": "Mamba2", "headdim": 48}},
    "heads, bare": {
        "d_model": 8,
        "n_layer": 2,
        "ssm_cfg": {"layer": "Mamba2", "headdim": 16, "d_state": 4, "d_conv": 1, "rmsnorm": False},
    },
}  # fmt: skip


def prepared(name: str, weights: str) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=VOCABULARY, **CONFIGS[name])).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases start as ones and zeros, which hide mistakes
            parameter.data += 0.1 * torch.randn_like(parameter)
    return prepare_for_decode(model.cuda(), weights)


def random_state(model: LanguageModel, b: int) -> ModelState:
    state = model.init_state(b)
    for x in tensors(state):
        x.normal_()
    return state


def tensors(state: ModelState) -> list[Tensor]:
    return [x for layer in state.layers for x in (layer.conv, layer.ssm)]


def distance(a: Tensor, b: Tensor) -> float:
    assert torch.isfinite(a).all()
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("b", [1, 9, 20, 40, 70])
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_is_the_reference(name: str, weights: str, b: int) -> None:
    model = prepared(name, weights)
    assert explain(model) is None
    network, state = network_of(model), random_state(model, b)
    other = [x.clone() for x in tensors(state)]
    for _ in range(3):
        ids = torch.randint(VOCABULARY, (b,), device="cuda")
        y = model.step_(ids, state)
        expected = decode_token_(other, ids, network, backend="reference")[:, :VOCABULARY]
        # x is rounded to eight bits before every matrix, the reference rounds it to sixteen for integers
        assert distance(y, expected) < 1e-2
    for a, expected in zip(tensors(state), other, strict=True):
        if a.numel():
            assert distance(a, expected) < 1e-2


@pytest.mark.parametrize("b", [1, 20])
@pytest.mark.parametrize("d_state", [8, 24, 128, 264])
def test_states_of_mamba_2_in_bfloat16(d_state: int, b: int) -> None:
    config = ModelConfig(
        vocab_size=VOCABULARY, d_model=64, n_layer=2, ssm_cfg={"layer": "Mamba2", "d_state": d_state, "headdim": 32}
    )
    plain = LanguageModel(config).eval().cuda()
    plain.state_dtype = torch.bfloat16
    model = prepare_for_decode(plain, "bf16")
    assert explain(model) is None
    network, state = network_of(model), random_state(model, b)
    assert state.layers[0].ssm.dtype == torch.bfloat16
    other = [x.clone() for x in tensors(state)]
    for _ in range(3):
        ids = torch.randint(VOCABULARY, (b,), device="cuda")
        y = model.step_(ids, state)
        assert distance(y, decode_token_(other, ids, network, backend="reference")[:, :VOCABULARY]) < 1e-2
    for a, expected in zip(tensors(state), other, strict=True):
        assert distance(a, expected) < 1e-2


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", ["odd", "large", "heads", "heads, odd", "heads, large"])
def test_a_sequence_has_the_same_bits_in_any_batch(name: str, weights: str) -> None:
    model = prepared(name, weights)
    ids = torch.randint(VOCABULARY, (70, 4), device="cuda")
    whole = random_state(model, 70)
    for rows in (slice(0, 1), slice(3, 12), slice(20, 50), slice(5, 69)):
        part, alone = [x[rows].clone() for x in tensors(whole)], model.init_state(ids[rows].shape[0])
        both = [x.clone() for x in tensors(whole)]
        network = network_of(model)
        for t in range(4):
            y = decode_token_(both, ids[:, t].contiguous(), network, backend="gpu")
            z = decode_token_(part, ids[rows, t].contiguous(), network, backend="gpu")
            assert torch.equal(y[rows], z)
        for a, b in zip(part, both, strict=True):
            assert torch.equal(a, b[rows])
        assert len(tensors(alone)) == len(part)


@pytest.mark.parametrize("name", ["plain", "heads", "heads, beside"])
def test_a_captured_graph_goes_on_as_calls_do(name: str) -> None:
    model = prepared(name, "bf16")
    ids = torch.randint(VOCABULARY, (3,), device="cuda")
    state = random_state(model, 3)
    model.step_(ids, state)
    other = [x.clone() for x in tensors(state)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model.step_(ids, state)
    network = network_of(model)
    for _ in range(3):
        ids.random_(VOCABULARY)
        graph.replay()
        assert torch.equal(logits, decode_token_(other, ids, network, backend="gpu")[:, :VOCABULARY])


def test_an_id_outside_the_vocabulary_is_nan_in_its_row_alone() -> None:
    model = prepared("plain", "bf16")
    state = random_state(model, 3)
    y = model.step_(torch.tensor([1, 10**9, -1], device="cuda"), state)
    assert torch.isfinite(y[0]).all()
    assert torch.isnan(y[1:]).all()


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", ["plain", "heads"])
def test_a_prompt_goes_on_token_by_token(name: str, weights: str) -> None:
    model = prepared(name, weights)
    ids = torch.randint(VOCABULARY, (2, 40), device="cuda")
    whole, (_, state) = model(ids), model.extend(ids[:, :20])
    for t in range(20, 40):
        assert distance(model.step_(ids[:, t], state), whole[:, t]) < 2e-2


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("m", "rows", "columns"), [(1, 48, 33), (7, 100, 64), (250, 80, 129), (0, 7, 9), (2, 1, 1)])
def test_products_of_many_rows(m: int, rows: int, columns: int, format: str) -> None:
    data, scales = (x.cuda() for x in pack(torch.randn(rows, columns), format))
    x, bias = torch.randn(m, columns, device="cuda"), torch.randn(rows, device="cuda")
    given = {"format": format, "rows": rows, "columns": columns}
    y = packed_linear(x, data, scales, bias, **given, backend="gpu")
    expected = packed_linear(x, data, scales, bias, **given, backend="reference")
    assert torch.equal(y.isfinite(), torch.ones_like(y, dtype=torch.bool))
    if m:
        assert distance(y, expected) < 6e-3
