"""ONNX models in onnxruntime: every batch, length and continuation as ours, within the published float32 bounds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from makers import contents, small
from test_layers import BOUND as LAYER_BOUND
from test_ops import BOUND as OP_BOUND
from torch import Tensor
from torch.utils import _pytree as pytree

import stateline
from stateline import LanguageModel, ops
from stateline.cli import main
from stateline.interop import export, export_model, onnx_ops

onnx = pytest.importorskip("onnx", reason='needs the extra "onnx"')
ort = pytest.importorskip("onnxruntime", reason='needs the extra "onnx"')
pytest.importorskip("onnxscript", reason='needs the extra "onnx"')

Run = Callable[..., list[Tensor]]


def session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options)


def runner(path: Path) -> Run:
    """The model as a function of tensors, in the order of its inputs."""
    made = session(path)
    names = [i.name for i in made.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        out = made.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
        return [torch.from_numpy(x) for x in out]

    return run


def close(got: list[Tensor], want: Any, bound: float) -> None:
    for x, y in zip(got, pytree.tree_leaves(want), strict=True):
        assert x.shape == y.shape
        assert x.isfinite().all()
        if not y.numel():
            continue
        error = (x - y).abs().max().item() / max(y.abs().max().item(), 1e-3)
        assert error <= bound, f"relative error {error}"


MAMBA2 = {"layer": "Mamba2", "headdim": 10, "d_state": 6, "ngroups": 2, "dt_limit": (None, 0.09)}


@pytest.fixture(scope="module", params=[{}, MAMBA2], ids=["Mamba1", "Mamba2"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    torch.manual_seed(4)
    return small(d_intermediate=16, ssm_cfg=request.param)


@pytest.fixture(scope="module")
def path(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(model, tmp_path_factory.mktemp("onnx") / "model.onnx", "onnx")


@pytest.fixture(scope="module")
def run(path: Path) -> Run:
    return runner(path)


@pytest.mark.full  # an export takes seconds
@pytest.mark.parametrize("bound", [{"window": 5}, {"max_tokens": 20}], ids=str)
@torch.no_grad()
def test_hybrids_go_on_too(bound: dict[str, int], tmp_path: Path) -> None:
    attention = {"num_heads": 2, "num_heads_kv": 1, "rotary_emb_dim": 4, **bound}
    model, x = small(attn_layer_idx=[1], attn_cfg=attention), torch.randint(61, (3, 11))
    made = session(export_model(model, tmp_path / "model.onnx", "onnx"))
    names, state, logits = [i.name for i in made.get_inputs()], model.init_state(3), []
    assert names[-4:] == [f"state.layers.1.{name}" for name in ("keys", "values", "conv", "position")]
    given = pytree.tree_leaves(state)
    for piece in x.split([4, 1, 6], 1):
        first, *given = made.run(None, {n: np.asarray(v) for n, v in zip(names, [piece, *given], strict=True)})
        logits.append(torch.from_numpy(first))
    close([torch.cat(logits, 1)], model(x), 1e-5)


@pytest.mark.parametrize("t", [1, 2, 7, 64])
@pytest.mark.parametrize("b", [1, 3])
@torch.no_grad()
def test_any_length_and_its_continuation(model: LanguageModel, run: Run, b: int, t: int) -> None:
    x, state = torch.randint(61, (b, t)), model.init_state(b)
    got = run(x, *pytree.tree_leaves(state))
    want, state = model.extend(x, state)
    close(got, (want, state), LAYER_BOUND[torch.float32])
    got = run(x[:, :1], *got[1:])  # from onnxruntime's own state
    close(got, model.extend(x[:, :1], state), LAYER_BOUND[torch.float32])


@torch.no_grad()
def test_a_split_is_the_whole(model: LanguageModel, run: Run) -> None:
    x, state, logits = torch.randint(61, (2, 30)), pytree.tree_leaves(model.init_state(2)), []
    for piece in x.split([1, 12, 1, 16], 1):
        out, *state = run(piece, *state)
        logits.append(out)
    close([torch.cat(logits, 1)], model(x), LAYER_BOUND[torch.float32])


@torch.no_grad()
@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_long_input_with_huge_and_tiny_steps(layer: str, tmp_path: Path) -> None:
    """2,048 tokens whose dt·A reaches from under 1e-6 to thousands: no decay overflows or loses its small part."""
    wild = small(n_layer=1, ssm_cfg={"layer": layer} | ({"headdim": 5, "d_state": 5} if layer == "Mamba2" else {}))
    mixer = wild.backbone.layers[0].mixer
    bias = mixer.dt_bias if layer == "Mamba2" else mixer.dt_proj.bias
    bias.copy_(torch.linspace(-16, 30, bias.numel()))
    mixer.A_log.copy_(torch.linspace(-3, 6, mixer.A_log.numel()).view_as(mixer.A_log))
    run = runner(export_model(wild, tmp_path / "wild.onnx", "onnx"))
    x, state = torch.randint(61, (1, 2048)), wild.init_state(1)
    close(run(x, *pytree.tree_leaves(state)), wild.extend(x, state), LAYER_BOUND[torch.float32])


class Calls(torch.nn.Module):
    """Every way of calling the operations that a layer may use, as one graph."""

    def forward(self, u: Tensor, A: Tensor, B: Tensor, h: Tensor, w: Tensor) -> list[Tensor]:
        dt = u * 4 - 3
        constant, d = B[0, 0, 0], w[:, 0]
        return [
            *ops.selective_scan(u, dt.abs(), A, B, B),
            *ops.selective_scan(u, dt, A, B, B * 2, D=d, z=u, dt_bias=d, dt_softplus=True, initial_state=h),
            *ops.selective_scan(u, dt, A, constant.expand_as(A), B, dt_softplus=True, reverse=True, initial_state=h),
            *ops.causal_conv1d(u, w),
            *ops.causal_conv1d(u, w, d, activation="silu", initial_state=h[:, :, :2].mT, reverse=True),
            *ops.causal_conv1d(u, w[:, :1], d),
            *ops.rms_norm(u, d),
            *ops.rms_norm(u, d, residual=dt, eps=1e-2),
            *self.heads(u, A, B, h),
        ]

    def heads(self, u: Tensor, A: Tensor, B: Tensor, h: Tensor) -> list[Tensor]:
        """ssd, with a head for each channel of u."""
        x, rates, state = u[..., None] * B[:, :, :1], A[:, 0], h[..., None] * h[:, :, None]
        both: dict[str, Any] = {"dt_softplus": True, "return_decay": True}
        return [
            *ops.ssd(x, u.abs(), rates, B, B),
            *ops.ssd(x, u, rates, B, B * 2, D=rates, z=x, dt_bias=rates, initial_state=state, **both),
            *ops.ssd(x, u, rates, B[:, :, 0], B[:, :, 1], D=A, dt_limit=(0.2, 0.9), reverse=True, **both),
        ]


def convert(module: torch.nn.Module, args: tuple[Tensor, ...], shapes: Any, path: Path) -> Run:
    program = torch.export.export(module, args, dynamic_shapes=shapes, strict=False)
    onnx_ops.check_translatable(program.graph)
    with export._quiet():
        made = torch.onnx.export(program, custom_translation_table=onnx_ops.translations(), opset_version=18)
    assert made is not None
    made.save(str(path))
    return runner(path)


@torch.no_grad()
def test_every_operation_in_every_form(tmp_path: Path) -> None:
    b, t = torch.export.Dim("b"), torch.export.Dim("t")

    def args(b: int, t: int, d: int = 6, n: int = 4, g: int = 3) -> tuple[Tensor, ...]:
        A = -torch.rand(d, n) * 3
        return torch.randn(b, t, d), A, torch.randn(b, t, g, n), torch.randn(b, d, n), torch.randn(d, 3)

    token = {0: b, 1: t}
    run = convert(Calls(), args(2, 5), (token, None, token, {0: b}, None), tmp_path / "ops.onnx")
    for size in ((1, 1), (2, 3), (3, 40)):
        given = args(*size)
        close(run(*given), Calls()(*given), OP_BOUND[torch.float32])


def test_the_file_is_valid_small_and_tells_nothing_of_this_machine(model: LanguageModel, path: Path) -> None:
    made = onnx.load(path)
    onnx.checker.check_model(made, full_check=True)
    assert {node.domain for node in made.graph.node} == {""}, "operators beyond ONNX's own"
    names = [[v.name for v in side] for side in (made.graph.input, made.graph.output)]
    states = [f"state.layers.{i}.{part}" for i in range(2) for part in ("conv", "ssm")]
    assert names == [["input_ids", *states], ["logits", *(f"new_{name}" for name in states)]]
    ids, conv, ssm = (session(path).get_inputs()[i].shape for i in (0, 1, 2))
    state = model.init_state(1).layers[0]
    assert (ids, conv, ssm) == (["batch", "time"], *(["batch", *x.shape[1:]] for x in (state.conv, state.ssm)))
    size, weights = path.stat().st_size, 4 * model.num_parameters()
    assert sum(len(i.raw_data) for i in made.graph.initializer) == weights, "the tied matrix is stored twice"
    graph = 35_000 if model.config.ssm_cfg.get("layer") == "Mamba2" else 25_000  # splits of heads and groups
    assert size < weights + graph, "notes are stored besides the weights"
    assert str(Path(stateline.__file__).parent).encode() not in path.read_bytes()
    (config,) = (p.value for p in made.metadata_props if p.key == "stateline.config")
    assert json.loads(config) == model.config.to_dict()


@pytest.mark.full
@torch.no_grad()
def test_large_models_keep_their_weights_beside(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SINGLE_FILE_BYTES", 100)
    path = export_model(model, tmp_path / "big.onnx", "onnx")
    assert sorted(contents(tmp_path)) == ["big.onnx", "big.onnx.data"]
    x, state = torch.randint(61, (1, 3)), model.init_state(1)
    close(runner(path)(x, *pytree.tree_leaves(state)), model.extend(x, state), LAYER_BOUND[torch.float32])


class Padded(torch.nn.Module):
    def forward(self, x: Tensor, w: Tensor, lengths: Tensor) -> Tensor:
        return ops.causal_conv1d(x, w, lengths=lengths)[0]


def test_what_onnx_cannot_express_is_refused_before_any_work(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = small(n_layer=1).bfloat16()
    with pytest.raises(ValueError, match=r"embedding.weight is torch.bfloat16, ONNX models are float32. Export model"):
        export_model(half, tmp_path / "x", "onnx")

    def check(module: torch.nn.Module, *args: Tensor) -> None:
        onnx_ops.check_translatable(torch.export.export(module, args, strict=False).graph)

    x, w = torch.randn(2, 3, 4), torch.randn(4, 2)
    with pytest.raises(ValueError, match="stateline::causal_conv1d with lengths or cu_seqlens has no translation"):
        check(Padded(), x, w, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"stateline::causal_conv1d: x is torch.float64, ONNX models are float32"):
        check(Plain(), x.double(), w.double())
    known = onnx_ops.translations()
    monkeypatch.setattr(onnx_ops, "translations", lambda: {k: v for k, v in known.items() if "conv" not in k.name()})
    with pytest.raises(ValueError, match="stateline::causal_conv1d has no translation to ONNX"):
        check(Plain(), x, w)
    monkeypatch.undo()
    onnx_ops.translations.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r'pip install "stateline\[onnx\]"'):
        export_model(model, tmp_path / "x", "onnx")
    assert not contents(tmp_path)


class Plain(torch.nn.Module):
    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return ops.causal_conv1d(x, w)[0]


@torch.no_grad()
def test_command_line_makes_float32_of_16_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = small(n_layer=1).bfloat16()
    stateline.save(half, tmp_path / "model")
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "out.onnx"), "--to", "onnx"]) == 0
    assert "out.onnx: onnx, " in capsys.readouterr().out
    full = stateline.load(tmp_path / "model", dtype=torch.float32)
    x, state = torch.randint(61, (1, 5)), full.init_state(1)
    got = runner(tmp_path / "out.onnx")(x, *pytree.tree_leaves(state))
    close(got, full.extend(x, state), LAYER_BOUND[torch.float32])
