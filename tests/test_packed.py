"""Packed matrices and whole-token decoding: against float64, against each other, row by row."""

from __future__ import annotations

import copy
import gc
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stateline
from stateline import LanguageModel, ModelConfig, backends, ops
from stateline.backends import BackendError
from stateline.generation.decode import explain, network_of, prepare_for_decode
from stateline.nn import PackedLinear
from stateline.ops.decode_token import decode_token_
from stateline.ops.packed_linear import FORMATS, pack, packed_linear, unpack

BACKENDS = ["reference", "cpu"] if backends.native_problem() is None else ["reference"]
needs_native = pytest.mark.skipif(len(BACKENDS) == 1, reason=f"no C++ library: {backends.native_problem()}")

#: (rows of x, rows, columns): tiles cut short in every direction, one column, several panels.
SIZES = [
    (1, 48, 33),
    (3, 17, 70),
    (7, 100, 64),
    (13, 260, 48),
    (250, 80, 129),
    (2, 1, 1),
    (5, 16, 32),
    (0, 7, 9),
    (6, 700, 600),
]


def seen(x: Tensor, format: str) -> Tensor:
    """x in float64 as the format's products see it: bfloat16, or 65279 steps between the extremes of its row."""
    if format == "bf16":
        return x.bfloat16().double()
    step = x.double().abs().amax(-1, keepdim=True) / 32639
    return torch.where(step > 0, (x.double() / step).round() * step, 0.0)


def near(a: Tensor, b: Tensor, bound: float) -> None:
    assert torch.isfinite(a).all()
    worst = (a.double() - b.double()).abs().max() if a.numel() else 0
    assert worst <= bound * max(b.abs().max().item(), 1e-30) if b.numel() else True


# ---- the format -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 32), (17, 33), (50, 100)])
def test_what_is_unpacked_is_near_what_was_packed(format: str, rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns) * torch.logspace(-6, 3, rows)[:, None]
    weight[0] = 0
    kept = unpack(*pack(weight, format), format, rows, columns)
    largest = weight.abs().amax(1, keepdim=True)
    if format == "int4":  # the scale of least squared loss may clip a few: of normal numbers 8 % are lost
        assert ((kept - weight).norm(dim=1) <= 0.15 * weight.norm(dim=1)).all()
    else:  # half a step: bfloat16 keeps 8 bits, int8 has 127 steps to the row's largest
        bound = weight.abs() * 2**-8 if format == "bf16" else largest / 253
        assert ((kept - weight).abs() <= bound).all()
    assert (kept[0] == 0).all()


def test_int4_packs_what_four_bits_can_hold_exactly() -> None:
    steps = torch.randint(-8, 8, (20, 64))
    steps[:, ::32] = -8  # every group uses its whole range
    weight = steps * torch.tensor([2.0**-i for i in range(20)])[:, None]
    assert torch.equal(unpack(*pack(weight, "int4"), "int4", 20, 64), weight)


# ---- extremes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_too_small_or_not_finite(format: str, backend: str) -> None:
    """Tiny rows are zeros, whose bias is left; an infinity or NaN shows in its whole row, and in no other."""
    weight, bias = torch.randn(20, 70), torch.randn(20)
    x = torch.randn(9, 70)
    for row, largest in enumerate((1e-45, 1e-40, 1e-35, 9.6e-35, 3.8e-34)):
        x[row] = x[row].sign() * largest
    x[5, 3], x[6, 3], x[7, 3] = math.inf, -math.inf, math.nan
    data, scales = pack(weight, format)
    y = packed_linear(x, data, scales, bias, format=format, rows=20, columns=70, backend=backend)
    assert torch.equal(y[:5], bias.expand(5, -1))
    bare = packed_linear(x[:5], data, scales, format=format, rows=20, columns=70, backend=backend)
    assert (bare == 0).all()  # which a bias would hide
    assert not torch.isfinite(y[5:8]).any()
    alone = packed_linear(x[8:], data, scales, bias, format=format, rows=20, columns=70, backend="reference")
    near(y[8:], alone, 1e-5)
    small = x[8:] / x[8].abs().max() * 1e-30  # products of steps of both are still normal numbers
    y = packed_linear(small, data, scales, format=format, rows=20, columns=70, backend=backend)
    near(y * 1e30, seen(small, format) * 1e30 @ unpack(data, scales, format, 20, 70).double().T, 1e-4)


# ---- products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("m", "rows", "columns"), SIZES)
def test_products_against_float64(backend: str, format: str, m: int, rows: int, columns: int, poisoned: None) -> None:
    weight, x, bias = torch.randn(rows, columns), torch.randn(m, columns), torch.randn(rows)
    data, scales = pack(weight, format)
    arguments: dict[str, Any] = {"format": format, "rows": rows, "columns": columns, "backend": backend}
    y = ops.packed_linear(x, data, scales, bias, **arguments)
    expected = seen(x, format) @ unpack(data, scales, format, rows, columns).double().T + bias
    near(y, expected, 2e-5)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        narrow = ops.packed_linear(x.to(dtype), data, scales, None, **arguments)
        assert narrow.dtype == dtype
        same = ops.packed_linear(x.to(dtype).float(), data, scales, None, **arguments)
        assert torch.equal(narrow, same.to(dtype))


@needs_native
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_has_the_same_bits_in_any_batch(format: str) -> None:
    x = torch.randn(19, 200)
    data, scales = pack(torch.randn(90, 200), format)
    together = ops.packed_linear(x, data, scales, format=format, rows=90, columns=200, backend="cpu")
    for i in range(19):
        alone = ops.packed_linear(x[i : i + 1], data, scales, format=format, rows=90, columns=200, backend="cpu")
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", FORMATS)
def test_nan_reaches_its_own_row_alone(backend: str, format: str) -> None:
    x = torch.randn(3, 40)
    x[1, 7] = math.nan
    data, scales = pack(torch.randn(20, 40), format)
    y = ops.packed_linear(x, data, scales, format=format, rows=20, columns=40, backend=backend)
    assert y[1].isnan().all()
    assert y[::2].isfinite().all()


def test_the_raw_operation_is_well_formed() -> None:
    data, scales = pack(torch.randn(20, 40), "int8")
    arguments = (torch.randn(3, 40), data, scales, torch.randn(20), "int8", 20, 40, None)
    torch.library.opcheck(torch.ops.stateline.packed_linear.default, arguments)


PACKED = dict(zip(("data", "scales"), pack(torch.randn(20, 40), "int8"), strict=True))
GOOD: dict[str, Any] = PACKED | {"x": torch.randn(3, 40), "format": "int8", "rows": 20, "columns": 40}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"format": "int3"}, ValueError, "format is 'int3', expected one of 'bf16', 'int8', 'int4'"),
    ({"x": torch.randn(3, 39)}, ValueError, r"x has shape \(3, 39\), expected .* columns = 40"),
    ({"x": torch.ones(3, 40, dtype=torch.int32)}, TypeError, "x is int32"),
    ({"format": "int4"}, ValueError, "data has 1280 bytes, expected 1024"),
    ({"scales": torch.ones(20)}, ValueError, "scales has 20 numbers, expected 32"),
    ({"bias": torch.ones(19)}, ValueError, r"bias has shape \(19,\)"),
    (
        {"x": torch.randn(3, 40, requires_grad=True)},
        RuntimeError,
        "x wants a gradient, packed matrices have none. Use torch.no_grad",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m[:24] for _, _, m in BAD])
def test_bad_input_gets_one_clear_error(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^packed_linear: " + message):
        ops.packed_linear(**(GOOD | change))


# ---- a whole token --------------------------------------------------------------------------------------------------

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"d_model": 64, "n_layer": 2},
    "odd": {
        "d_model": 37,
        "n_layer": 3,
        "ssm_cfg": {"d_state": 5, "d_conv": 3, "expand": 3, "bias": True, "dt_rank": 7},
    },
    "mlp": {"d_model": 48, "n_layer": 2, "d_intermediate": 100, "tie_embeddings": False, "ssm_cfg": {"d_state": 20}},
    "layernorm": {
        "d_model": 20,
        "n_layer": 1,
        "rms_norm": False,
        "ssm_cfg": {"conv_bias": False, "d_conv": 1, "d_state": 1},
    },
    "heads": {"d_model": 64, "n_layer": 2, "ssm_cfg": {"layer": "Mamba2", "headdim": 32}},
    "heads, odd": {
        "d_model": 37,
        "n_layer": 3,
        "ssm_cfg": {
            "layer": "Mamba2", "headdim": 3, "expand": 3, "d_state": 5, "d_conv": 3, "bias": True, "ngroups": 37,
            "dt_limit": (0.01, 0.05),
        },
    },
    "heads, beside": {
        "d_model": 40,
        "n_layer": 2,
        "d_intermediate": 100,
        "tie_embeddings": False,
        "ssm_cfg": {
            "layer": "Mamba2", "headdim": 20, "d_ssm": 60, "d_state": 19, "ngroups": 3, "norm_before_gate": True,
            "D_has_hdim": True,
        },
    },
    "heads, bare": {
        "d_model": 20,
        "n_layer": 1,
        "rms_norm": False,
        "ssm_cfg": {
            "layer": "Mamba2", "headdim": 40, "conv_bias": False, "d_conv": 1, "d_state": 1, "rmsnorm": False,
            "dt_limit": (None, 0.02),
        },
    },
}  # fmt: skip
VOCABULARY = 61


def model_of(name: str, vocab_size: int = VOCABULARY) -> LanguageModel:
    model = LanguageModel(ModelConfig(vocab_size=vocab_size, **CONFIGS[name])).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases start as ones and zeros, which hide mistakes
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@needs_native
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_token_in_one_call_is_the_reference_the_layers_and_extend(name: str, weights: str, poisoned: None) -> None:
    packed = prepare_for_decode(model_of(name), weights)
    assert explain(packed) is None
    network, ids = network_of(packed), torch.randint(VOCABULARY, (3, 12))
    whole = packed(ids)
    one, layers, reference = packed.init_state(3), packed.init_state(3), packed.init_state(3)
    tensors = [x for layer in reference.layers for x in (layer.conv, layer.ssm)]
    for t in range(ids.shape[1]):
        y = packed.step_(ids[:, t], one)
        near(y, whole[:, t], 5e-4)
        near(y, packed._logits(packed.backbone.step_(ids[:, t], layers)), 5e-4)
        near(y, decode_token_(tensors, ids[:, t], network, backend="reference")[:, :VOCABULARY], 5e-3)
    for a, b in zip(one.layers, layers.layers, strict=True):
        near(a.ssm, b.ssm, 5e-4)
        near(a.conv, b.conv, 5e-4)


@needs_native
def test_ids_that_moved_to_another_device_are_refused() -> None:
    packed = prepare_for_decode(model_of("odd"))
    state, ids = packed.init_state(3), torch.zeros(3, dtype=torch.int64)
    packed.step_(ids, state)  # from here on the state's tensors are known
    with pytest.raises(ValueError, match=r"^decode_token: layer 0's conv state is .* on cpu, expected .* on meta\."):
        packed.step_(ids.to("meta"), state)


@needs_native
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", ["odd", "heads, odd", "heads, beside"])
def test_a_sequence_has_the_same_bits_alone_in_a_batch_and_on_any_number_of_threads(name: str, weights: str) -> None:
    packed = prepare_for_decode(model_of(name), weights)
    ids = torch.randint(VOCABULARY, (9, 6))
    before = torch.get_num_threads()
    try:
        results = []
        for rows, threads in ((slice(None), 1), (slice(None), 3), (slice(4, 5), 2)):
            torch.set_num_threads(threads)
            state = packed.init_state(ids[rows].shape[0])
            logits = torch.stack([packed.step_(ids[rows, t], state) for t in range(6)], 1)
            results.append(logits)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0][4:5], results[2])


@needs_native
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", ["odd", "heads, odd", "heads, beside"])
@torch.no_grad()
def test_a_prompt_has_the_same_bits_alone_and_in_a_batch(name: str, weights: str) -> None:
    packed = prepare_for_decode(model_of(name), weights)
    ids = torch.randint(VOCABULARY, (7, 40))
    assert torch.equal(packed(ids)[3:4], packed(ids[3:4]))


@pytest.mark.parametrize(("weights", "bound"), [("bf16", 0.02), ("int8", 0.04), ("int4", 0.5)])
@pytest.mark.parametrize("name", ["plain", "heads"])
def test_packing_loses_what_its_bits_lose(name: str, weights: str, bound: float) -> None:
    model = model_of(name)
    ids = torch.randint(VOCABULARY, (2, 30))
    with torch.no_grad():
        near(prepare_for_decode(model, weights)(ids), model(ids), bound)


@pytest.mark.parametrize(("weights", "loss"), [("bf16", 0.002), ("int8", 0.004), ("int4", 0.05)])
def test_the_bundled_model_keeps_its_bits_per_byte(weights: str, loss: float) -> None:
    model = stateline.load("bundled")
    text = (Path(stateline.__file__).parent / "bundled" / "excerpt" / "test.txt").read_bytes()[:2000]
    ids = torch.tensor([list(text)])

    def bits(m: LanguageModel) -> float:
        with torch.no_grad():
            return nn.functional.cross_entropy(m(ids[:, :-1])[0], ids[0, 1:]).item() / math.log(2)

    assert bits(prepare_for_decode(model, weights)) < bits(model) + loss


# ---- prepared models ------------------------------------------------------------------------------------------------


def test_the_model_itself_stays_as_it_was() -> None:
    model = model_of("mlp")
    before = copy.deepcopy(model.state_dict())
    prepare_for_decode(model, "int4")
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert isinstance(model.lm_head, nn.Linear)


def test_a_tied_matrix_is_kept_once() -> None:
    packed = prepare_for_decode(model_of("plain"), "int8")
    assert packed.lm_head.matrix is packed.backbone.embedding.matrix


def test_generating_goes_on_from_a_state_of_the_model() -> None:
    model = stateline.load("bundled")
    packed = prepare_for_decode(model, "bf16")
    greedy = stateline.generation.SamplingConfig(temperature=0)
    texts = [
        "".join(stateline.generate(m, "My fellow citizens", max_tokens=12, sampling=greedy)) for m in (model, packed)
    ]
    assert texts[0] == texts[1]
    with torch.no_grad():
        _, state = model.extend(torch.tensor([list(b"The state of the Uni")]))
        assert bytes([int(packed.step_(torch.tensor([ord("o")]), state).argmax())]) == b"n"


def test_copies_step_with_their_own_weights() -> None:
    packed = prepare_for_decode(model_of("plain"), "int8")
    twin = copy.deepcopy(packed)
    packed.step_(torch.tensor([1]), packed.init_state(1))
    twin.backbone.norm_f.weight.zero_()
    assert (twin.step_(torch.tensor([1]), twin.init_state(1)) == 0).all()
    assert (packed.step_(torch.tensor([1]), packed.init_state(1)) != 0).any()


@pytest.mark.parametrize("change", ["half", "double", "bfloat16", "share_memory", "load", "assign", "pickle"])
@pytest.mark.parametrize("name", ["mlp", "heads, beside"])
def test_a_prepared_model_survives_what_is_done_to_models(name: str, change: str) -> None:
    """The native call reads memory that others may move, cast or fill."""
    packed = prepare_for_decode(model_of(name), "int4")
    other = prepare_for_decode(model_of(name), "int4")
    token, before = torch.tensor([5]), packed.init_state(1)
    expected = packed.step_(token, before)
    if change in ("load", "assign"):
        expected = other.step_(token, other.init_state(1))
        packed.load_state_dict(other.state_dict(), assign=change == "assign")
    elif change == "pickle":
        file = io.BytesIO()
        torch.save(packed, file)
        file.seek(0)
        packed = torch.load(file, weights_only=False)
    else:
        getattr(packed, change)()
        gc.collect()
    state = packed.init_state(1)
    with torch.no_grad():
        assert torch.equal(packed.step_(token, state), expected)
        near(packed(token[None])[:, 0], expected, 5e-4)
    assert packed.step_(token, before).isfinite().all()


def test_casts_leave_packed_matrices_alone() -> None:
    layer = PackedLinear.pack(nn.Linear(40, 9), "int4")
    before = layer(torch.ones(1, 40))
    assert torch.equal(layer.to(torch.bfloat16).double().half()(torch.ones(1, 40)), before)


def test_adapters_round_a_linear_are_kept_and_said() -> None:
    model = model_of("plain")

    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.extra = base, nn.Linear(base.in_features, base.out_features, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.extra(x)

    mixer: Any = model.backbone.layers[1].mixer
    mixer.in_proj = Adapter(mixer.in_proj)
    packed = prepare_for_decode(model, "bf16")
    assert "in_proj is a Adapter" in (explain(packed) or "") or backends.native_problem()
    ids = torch.randint(VOCABULARY, (1, 5))
    with torch.no_grad():
        near(packed(ids), model(ids), 0.02)
        near(packed.step_(ids[:, 0], packed.init_state(1)), packed(ids)[:, 0], 1e-3)


@needs_native
def test_mixed_stacks_go_layer_by_layer_and_say_so() -> None:
    model = model_of("heads")
    model.backbone.layers[1].mixer = stateline.nn.Mamba(64)
    packed = prepare_for_decode(model)
    assert explain(packed) == "some blocks hold Mamba and others Mamba2, the native call knows stacks of one of them"
    ids = torch.randint(VOCABULARY, (2, 5))
    state = packed.init_state(2)
    with torch.no_grad():
        logits = torch.stack([packed.step_(ids[:, t], state) for t in range(5)], 1)
        near(logits, packed(ids), 5e-4)


@needs_native
def test_nan_in_one_sequence_reaches_no_other_and_states_are_kept_finite_where_they_were() -> None:
    packed = prepare_for_decode(model_of("heads"), "bf16")
    state = packed.init_state(3)
    state.layers[0].ssm[1, 0, 0, 0] = math.nan
    logits = packed.step_(torch.tensor([1, 1, 1]), state)
    assert logits[1].isnan().all()
    assert torch.equal(logits[0], logits[2])
    assert logits[0].isfinite().all()
    packed.backbone.layers[1].mixer.A_log.fill_(math.nan)  # type: ignore[operator, union-attr]  # parameters of ours
    broken = copy.deepcopy(packed)
    assert broken.step_(torch.tensor([1]), broken.init_state(1)).isnan().all()


@pytest.mark.parametrize(("name", "why"), [
    ("mlp", "gated MLPs are not part of it."),
    ("layernorm", "LayerNorm is not part of it, only RMSNorm."),
    ("heads, beside", "gated MLPs are not part of it."),
    ("heads, bare", "LayerNorm is not part of it, only RMSNorm."),
    ("odd", "it knows up to 8 taps, and multiples of 4 states, channels and width; these are 3, 5, 111 and 37."),
    ("heads, odd", "it knows up to 8 taps, and multiples of 4 states, channels and width; these are 3, 5, 111 and 37."),
])  # fmt: skip
def test_the_token_kernels_on_gpus_say_what_they_do_not_know(name: str, why: str) -> None:
    from stateline.ops.decode_token import gpu

    assert gpu.problem(network_of(prepare_for_decode(model_of(name)))) == why


def test_what_cannot_be_prepared_or_saved_is_refused(tmp_path: Path) -> None:
    packed = prepare_for_decode(model_of("plain"))
    with pytest.raises(TypeError, match="packed already"):
        prepare_for_decode(packed)
    with pytest.raises(ValueError, match="weights is 'int2', expected one of 'bf16', 'int8', 'int4'"):
        prepare_for_decode(model_of("plain"), "int2")
    with pytest.raises(TypeError, match="model is a Linear, expected a LanguageModel"):
        prepare_for_decode(nn.Linear(2, 2))  # type: ignore[arg-type]
    for format in ("stateline", "mamba_ssm", "huggingface"):
        with pytest.raises(TypeError, match=r"packed for decoding.*Save the model it was prepared from"):
            stateline.save(packed, tmp_path / format, format=format)
    with pytest.raises(ValueError, match="token id 61 is outside the vocabulary, 0 to 60"):
        packed.step_(torch.tensor([61]), packed.init_state(1))
    with pytest.raises(ValueError, match=r"layer 0's conv state is .* on meta, expected .* on cpu"):
        packed.step_(torch.tensor([1]), packed.init_state(1, device="meta"))
    hooked = model_of("plain")
    hooked.backbone.layers[0].mixer.in_proj.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"layers.0.mixer.in_proj has forward hooks"):
        prepare_for_decode(hooked)
    wrapped: Any = model_of("plain")
    wrapped.lm_head = nn.Sequential(wrapped.lm_head)
    with pytest.raises(TypeError, match="lm_head and embedding are Sequential and Embedding"):
        prepare_for_decode(wrapped)
    with pytest.raises(ValueError, match=r"layer 0's conv state is .*expected contiguous float32 .2, 3, 128."):
        packed.step_(torch.tensor([1, 2]), packed.init_state(1))


def test_without_the_library_a_token_goes_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise BackendError("no compiler here")

    model = model_of("plain")
    with_library = prepare_for_decode(model, "int8")
    monkeypatch.setattr(backends, "load_native", broken)
    backends.native_problem.cache_clear()
    try:
        packed = prepare_for_decode(model, "int8")
        assert explain(packed) == "no compiler here"
        assert packed.token_step is None
        backends._say_slow_once.cache_clear()
        with pytest.warns(RuntimeWarning, match="slow reference"):
            y = packed.step_(torch.tensor([3]), packed.init_state(1))
    finally:
        monkeypatch.undo()
        backends.native_problem.cache_clear()
        backends._say_slow_once.cache_clear()
    near(y, with_library.step_(torch.tensor([3]), with_library.init_state(1)), 1e-4)
