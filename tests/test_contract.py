"""What every op promises besides its values: gradients, compile, export, transforms, autocast, errors, back ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_ops import BACKENDS, FLAG, USUAL, cut, leaf, plain_scan, scan_case
from torch import Tensor

from stateline import backends, ops
from stateline.ops.causal_conv1d import conv_halves

OPS = torch.ops.stateline


def scan(**x: Any) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: ops.selective_scan(**x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("complex_", FLAG)
@pytest.mark.parametrize("reverse", FLAG)
@pytest.mark.parametrize("place", ["whole", "left", "packed"])
def test_gradcheck_of_every_scan_argument(backend: str, complex_: bool, reverse: bool, place: str) -> None:
    C = "constant" if place == "left" else "token"
    s = USUAL | dict(backend=backend, dtype=torch.float64, layout=place, t=5, d=3, n=2, g=3 if reverse else 1, C=C)
    s |= {"reverse": reverse, "complex": complex_, "softplus": not reverse}
    case = scan_case(s)
    names = list(case.leaves)
    leaves = [case.leaves[k].requires_grad_() for k in names]
    assert torch.autograd.gradcheck(lambda *v: case.op(**dict(zip(names, v, strict=True))), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"reverse": True, "activation": "silu"}, {"lengths": [2, 0, 6]}], ids=str)
def test_gradcheck_of_every_convolution_argument(backend: str, options: dict[str, Any]) -> None:
    leaves = [leaf(shape, torch.float64).requires_grad_() for shape in ((3, 6, 4), (4, 3), (4,), (3, 2, 4))]
    call = lambda x, w, b, s: ops.causal_conv1d(x, w, b, initial_state=s, backend=backend, **options)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", [{}, {"lengths": [2, 0, 6]}], ids=str)
def test_gradcheck_of_halves(backend: str, where: dict[str, Any]) -> None:
    leaves = [leaf(shape, torch.float64).requires_grad_() for shape in ((3, 6, 8), (4, 3), (4,), (3, 2, 4))]
    call = lambda xz, w, b, s: conv_halves(xz, w, b, initial_state=s, backend=backend, **where)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves)
    with pytest.raises(ValueError, match="set by half of xz"):
        call(leaves[0][..., 1:], *leaves[1:])


@pytest.mark.parametrize("first", [False, True])
def test_gated_norm(first: bool) -> None:
    """Against torch's own norm, and its gradient against differences."""
    y, z, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 6), (2, 3, 6), (6,)))
    v, gate = y.unflatten(-1, (2, 3)), torch.nn.functional.silu(z).unflatten(-1, (2, 3))
    normed = torch.nn.functional.rms_norm(v if first else v * gate, (3,), None, 1e-5)
    wanted = (normed * gate if first else normed).flatten(-2) * w

    def run(*given: Tensor) -> Tensor:
        return ops.gated_rms_norm(*given, groups=2, norm_before_gate=first)

    torch.testing.assert_close(run(y, z, w), wanted)
    assert torch.autograd.gradcheck(run, (y, z, w))
    half = run(*(v.detach().bfloat16() for v in (y, z, w)))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), wanted, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_of_rms_norm(backend: str) -> None:
    leaves = [leaf(shape, torch.float64).requires_grad_() for shape in ((2, 3, 5), (5,), (2, 3, 5))]
    assert torch.autograd.gradcheck(lambda x, w, r: ops.rms_norm(x, w, residual=r, backend=backend), leaves)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_back_end_keeps_reaches_its_backward(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    from stateline.ops.selective_scan import reference

    shape, seen, backward = (5, 3), [], reference.backward

    def kept_backward(*args: object) -> tuple[Tensor | None, ...]:
        seen.append(args[-1])
        return backward(*args[:-1])

    monkeypatch.setattr(
        reference, "forward_kept", lambda *a: (*reference.forward(*a), torch.ones(shape)), raising=False
    )
    monkeypatch.setattr(reference, "kept_shape", lambda *_: shape, raising=False)
    monkeypatch.setattr(reference, "backward", kept_backward)

    def loss(u: Tensor, x: dict[str, Tensor]) -> Tensor:
        return ops.selective_scan(u, *x.values(), backend="reference")[0].square().sum()

    u = torch.randn(2, 6, 4, requires_grad=True)
    x = {"dt": torch.rand(2, 6, 4), "A": -torch.rand(4, 3), "B": torch.randn(2, 6, 3), "C": torch.randn(2, 6, 3)}
    (torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss)(u, x).backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], torch.ones(shape))
    with torch.no_grad():
        assert ops.selective_scan(u, *x.values(), backend="reference")[0].shape == u.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_of_cross_entropy(backend: str) -> None:
    targets = torch.tensor([3, -1, 0, 5])
    call = lambda x: ops.cross_entropy(x, targets, classes=6, ignore_index=-1, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaf((4, 7), torch.float64).requires_grad_())


def test_opcheck_of_raw_ops() -> None:
    x = plain_scan()
    B, C = x["B"], x["C"]
    head = (x["u"], x["dt"], x["A"], B, C, x["D"], x["z"], x["dt_bias"], True)
    table = torch.tensor([[0, 0, 7], [1, 2, 12]])
    where = (x["initial_state"], table, False)
    y, state, kept = OPS.selective_scan_kept(*head, *where, None)
    torch.library.opcheck(OPS.selective_scan.default, (*head, *where, None))
    torch.library.opcheck(OPS.selective_scan_kept.default, (*head, *where, None))
    torch.library.opcheck(OPS.selective_scan_backward.default, (y, state, *head, *where, kept, None))
    token = (x["u"][:, 0], x["dt"][:, 0], x["A"], B[:, 0], C[:, 0], x["D"], None, None, False)
    torch.library.opcheck(OPS.selective_scan_step_.default, (state, *token, torch.tensor([1, -1]), True, None))
    v, w, b = leaf((2, 6, 4), torch.float32), leaf((4, 3), torch.float32), leaf((4,), torch.float32)
    y, taps = OPS.causal_conv1d(v, w, b, True, None, None, False, None)
    torch.library.opcheck(OPS.causal_conv1d.default, (v, w, b, True, None, None, False, None))
    torch.library.opcheck(OPS.causal_conv1d_backward.default, (y, taps, v, w, b, True, taps, None, True, None))
    halves = (y, y, y, taps, torch.cat([v, v], -1), w, b, True, None, None, False, None)
    torch.library.opcheck(OPS.causal_conv1d_halves_backward.default, halves)
    torch.library.opcheck(OPS.causal_conv1d_step_.default, (taps, v[:, 0], w, b, True, None, None))
    y, h = OPS.rms_norm(v, b, None, 1e-5, torch.float32, None)
    torch.library.opcheck(OPS.rms_norm.default, (v, b, v, 1e-5, torch.float64, None))
    torch.library.opcheck(OPS.rms_norm_backward.default, (y, h, h, b, 1e-5, torch.float32, None, None))
    logits, targets = leaf((3, 8), torch.float32), torch.tensor([0, -1, 6])
    torch.library.opcheck(OPS.gated_rms_norm.default, (v, y, b, 1e-5, 1, False, None))
    torch.library.opcheck(OPS.gated_rms_norm_backward.default, (y, v, y, b, 1e-5, 1, True, None))
    loss, total = OPS.cross_entropy(logits, targets, 7, -1, None)
    torch.library.opcheck(OPS.cross_entropy.default, (logits, targets, 7, -1, None))
    torch.library.opcheck(OPS.cross_entropy_backward.default, (loss, logits, total, targets, 7, -1, None))


def test_compiles_whole_with_gradients_and_dynamic_length() -> None:
    x = {k: v.requires_grad_() for k, v in plain_scan(t=9).items()}

    def run(lengths: Tensor, **x: Tensor) -> Tensor:
        taps = x["A"][:, :3]
        v, _ = ops.causal_conv1d(x["u"], taps, activation="silu", lengths=lengths)
        y, state = ops.selective_scan(**(x | {"u": v}), dt_softplus=True, lengths=lengths)
        y, _ = ops.rms_norm(y, x["D"])
        return y.square().sum() + state.sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for t in (9, 5, 12):
        part = cut({k: v.detach() for k, v in (x if t <= 9 else plain_scan(t=12)).items()}, slice(0, t))
        part = {k: v.requires_grad_() for k, v in part.items()}
        lengths = torch.tensor([t, t // 2])
        wanted = torch.autograd.grad(run(lengths, **part), list(part.values()))
        got = torch.autograd.grad(compiled(lengths, **part), list(part.values()))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("strict", FLAG)
def test_exports_with_state_and_dynamic_sizes(strict: bool) -> None:
    class Layer(torch.nn.Module):
        def forward(self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            return ops.selective_scan(u, dt, A, B, B, initial_state=h)

    x = plain_scan()
    args = (x["u"], x["dt"], x["A"], x["B"][:, :, 0], x["initial_state"])
    b, t = torch.export.Dim("b"), torch.export.Dim("t")
    token = {0: b, 1: t}
    program = torch.export.export(Layer(), args, dynamic_shapes=(token, token, None, token, {0: b}), strict=strict)
    other = plain_scan(t=31)
    args = (other["u"], other["dt"], other["A"], other["B"][:, :, 0], other["initial_state"])
    for a, b_ in zip(program.module()(*args), Layer()(*args), strict=True):
        torch.testing.assert_close(a, b_)


def test_functional_transforms() -> None:
    x = plain_scan(dtype=torch.float64)

    def energy(u: Tensor) -> Tensor:
        y, state = ops.selective_scan(**(x | {"u": u}))
        return y.square().sum() + state.sum()

    u = x["u"].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(energy(u), u)
    torch.testing.assert_close(torch.func.grad(energy)(x["u"]), wanted)
    batch = torch.stack([x["u"], 2 * x["u"]])
    each = torch.stack([torch.func.grad(energy)(v) for v in batch])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(energy))(batch), each)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(energy, (x["u"],), (x["u"],))
    with torch.no_grad(), pytest.raises((NotImplementedError, RuntimeError)):  # not zero tangents either
        torch.func.jvp(energy, (x["u"],), (x["u"],))
    (g,) = torch.autograd.grad(energy(u), u, create_graph=True)
    with pytest.raises(RuntimeError):  # first derivatives only: said, not silently zero
        torch.autograd.grad(g.sum(), u)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    x = {k: v.requires_grad_() for k, v in plain_scan().items()}
    run = lambda: ops.selective_scan(**x, dt_softplus=True)[0].square().sum()  # noqa: E731
    wanted = torch.autograd.grad(run(), list(x.values()), allow_unused=True)
    again = torch.utils.checkpoint.checkpoint(run, use_reentrant=False)
    got = torch.autograd.grad(again, list(x.values()), allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_as_autocast_gives_them(backend: str) -> None:
    x = plain_scan()
    mixed = x | {"u": x["u"].bfloat16(), "B": x["B"].bfloat16(), "z": x["z"].half()}
    wide = {k: v.float() for k, v in mixed.items()}
    y, state = ops.selective_scan(**mixed, dt_softplus=True, backend=backend)
    y32, state32 = ops.selective_scan(**wide, dt_softplus=True, backend=backend)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(state, state32)
    torch.testing.assert_close(y, y32.bfloat16())


# ---- bad input ------------------------------------------------------------------------------------------------------

X = plain_scan()
V = {"x": torch.randn(2, 6, 4), "weight": torch.randn(4, 3)}
NAN_STATE = torch.zeros(2, 5, 4, dtype=torch.bfloat16)
BAD_SCANS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"u": X["u"][0]}, ValueError, r"u has shape \(12, 5\), expected \(b, t, d\)"),
    ({"u": [1.0]}, TypeError, "u is a list, expected a tensor"),
    ({"u": X["u"].long()}, TypeError, "u is int64, expected one of float32"),
    ({"dt": X["dt"][:, :3]}, ValueError, r"dt has shape \(2, 3, 5\), expected \(b, t, d\) with t = 12 \(set by u\)"),
    ({"A": X["A"].bfloat16()}, TypeError, "A is bfloat16, expected one of float32, complex64. A keeps full precision"),
    ({"A": X["A"].T}, ValueError, r"A has shape \(4, 5\), expected \(d, n\) with d = 5"),
    ({"B": X["B"].transpose(2, 3)}, ValueError, "n = 4 .set by A.. Or give a constant"),
    ({"B": X["A"].double()}, TypeError, "B is float64, expected one of float32. A constant B has A's dtype"),
    ({"C": X["C"].repeat(1, 1, 5, 1)}, ValueError, r"C has shape \(2, 12, 5, 4\), .* g = 1 \(set by B\)"),
    ({"C": X["C"][:1]}, ValueError, r"C has shape .* b = 2"),
    ({"B": X["B"][:, :, :0], "C": X["C"][:, :, :0]}, ValueError, "B has shape .*expected at least one group"),
    ({"D": X["D"].half()}, TypeError, "D is float16, expected one of float32. Keep D out of casts"),
    ({"initial_state": NAN_STATE}, TypeError, "initial_state is bfloat16.*does not drift"),
    ({"initial_state": X["initial_state"][:1]}, ValueError, r"n_seq = 2 \(set by the number of sequences\)"),
    ({"lengths": torch.tensor([3])}, ValueError, r"lengths has shape \(1,\), expected \(b,\) with b = 2"),
    ({"lengths": torch.tensor([3, 13])}, ValueError, r"lengths is \[3, 13\], expected values from 0 to t = 12"),
    ({"lengths": torch.tensor([3.0, 2.0])}, TypeError, "lengths is torch.float32, expected int32 or int64"),
    ({"lengths": [1, 2], "cu_seqlens": torch.tensor([0, 12])}, ValueError, "lengths and cu_seqlens were both given"),
    ({"cu_seqlens": torch.tensor([0, 12])}, ValueError, "cu_seqlens needs a batch of 1, got 2"),
    ({"padding_side": "centre"}, ValueError, "padding_side is 'centre', expected one of 'right', 'left'"),
    ({"backend": "tpu"}, ValueError, "backend is 'tpu', expected one of 'gpu', 'cpu', 'reference' or None"),
    ({"u": X["u"].to("meta")}, ValueError, "dt is on cpu, u is on meta"),
    ({"u": X["u"].to_sparse()}, TypeError, r"u is sparse_coo, expected a dense tensor. u.to_dense\(\) makes one"),
    ({"A": X["A"].to_sparse()}, TypeError, "A is sparse_coo, expected a dense tensor"),
    ({"u": torch._efficientzerotensor(X["u"].shape)}, TypeError, r"u is zeros without memory .*u.clone\(\) makes one"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), BAD_SCANS, ids=lambda v: str(v)[:40] if isinstance(v, str) else ""
)
def test_bad_scan_input_gets_one_clear_error(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^selective_scan: .*" + message):
        ops.selective_scan(**(X | change))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_are_refused(layout: torch.layout) -> None:
    with pytest.raises(TypeError, match=r"^selective_scan: u is nested, expected a dense tensor. u.to_padded_tensor"):
        ops.selective_scan(**(X | {"u": torch.nested.nested_tensor([X["u"][0]], layout=layout)}))


def test_bad_packing_gets_one_clear_error() -> None:
    one = {k: v[:1] if k in ("u", "dt", "B", "C", "z") else v for k, v in X.items() if k != "initial_state"}
    for bounds in ([0, 5, 4, 12], [1, 12], [0, 11], []):
        with pytest.raises(ValueError, match="cu_seqlens"):
            ops.selective_scan(**one, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


def test_no_sequences_are_a_list_of_no_lengths() -> None:
    none = {k: v[:0] if k in ("u", "dt", "B", "C", "z") else v for k, v in X.items() if k != "initial_state"}
    y, state = ops.selective_scan(**none, lengths=[])
    assert (y.shape, state.shape) == ((0, 12, 5), (0, 5, 4))


TAPS = torch.zeros(3, 2, 4)
TOKEN = {"x": V["x"][:, 0], "weight": V["weight"]}
BAD_CALLS: list[tuple[Callable[..., Any], dict[str, Any], type[Exception], str]] = [
    (ops.causal_conv1d, V | {"weight": V["weight"][:, None]}, ValueError, "as .d, 1, k.: pass weight.squeeze"),
    (ops.causal_conv1d, V | {"weight": V["weight"][:, :0]}, ValueError, "weight has no taps"),
    (ops.causal_conv1d, V | {"weight": V["weight"].to_sparse()}, TypeError, "weight is sparse_coo, expected a dense"),
    (ops.rms_norm, {"x": V["x"].to_sparse(), "weight": torch.ones(4)}, TypeError, "x is sparse_coo, expected a dense"),
    (ops.causal_conv1d, V | {"activation": "gelu"}, ValueError, "activation is 'gelu', expected one of None, 'silu'"),
    (ops.causal_conv1d, V | {"initial_state": TAPS}, ValueError, "n_seq = 2 .set by the number of sequences."),
    (ops.causal_conv1d, V | {"initial_state": torch.zeros(2, 3, 4)}, ValueError, "k-1 = 2 .set by weight."),
    (ops.causal_conv1d_step_, TOKEN | {"state": TAPS}, ValueError, "state has 3 rows for a batch of 2"),
    (ops.causal_conv1d_step_, TOKEN | {"state": torch.zeros(2, 2, 8)[..., ::2]}, ValueError, "not contiguous"),
    (ops.causal_conv1d_step_, TOKEN | {"state": TAPS, "index": torch.tensor([1, 3])}, ValueError, "slots below 3"),
    (ops.causal_conv1d_step_, TOKEN | {"state": TAPS, "index": torch.tensor([1, 1])}, ValueError, "distinct"),
    (ops.rms_norm, {"x": V["x"], "weight": torch.ones(3)}, ValueError, r"weight has shape \(3,\)"),
    (ops.rms_norm, {"x": V["x"], "weight": torch.ones(4), "eps": float("nan")}, ValueError, "eps is nan"),
    (ops.rms_norm, {"x": V["x"], "weight": torch.ones(4), "residual": torch.ones(4)}, ValueError, "residual has"),
    (ops.rms_norm, {"x": torch.tensor(1.0), "weight": torch.ones(4)}, TypeError, "expected a tensor"),
    (ops.gated_rms_norm, {"y": V["x"], "z": V["x"][:1], "weight": torch.ones(4)}, ValueError, "one gates the other"),
    (ops.gated_rms_norm, {"y": V["x"], "z": V["x"], "weight": torch.ones(4), "groups": 3}, ValueError, "3 groups do"),
]


@pytest.mark.parametrize(("op", "arguments", "error", "message"), BAD_CALLS, ids=lambda v: v if type(v) is str else "")
def test_other_bad_input_gets_one_clear_error(
    op: Callable[..., Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        op(**arguments)


# ---- back ends ------------------------------------------------------------------------------------------------------


def test_explain_names_the_back_end_and_the_reason() -> None:
    choice = backends.explain(ops.selective_scan, torch.zeros(1))
    assert choice.name == BACKENDS[-1]
    meta = backends.explain("selective_scan", torch.zeros(1, device="meta"))
    wrong = {"gpu": "needs CUDA tensors, these are on meta", "cpu": "needs CPU tensors, these are on meta"}
    assert meta == backends.Choice("reference", wrong)
    with pytest.raises(ValueError, match="'nonsense' is no operation, expected one of causal_conv1d"):
        backends.explain("nonsense")
    for name in ops.__all__:
        assert backends.explain(getattr(ops, name)) == backends.explain(name)
    for backend in ("cpu", "gpu"):
        with pytest.raises(backends.BackendError, match=f"backend='{backend}' cannot run here: needs C"):
            backends.explain("selective_scan", torch.zeros(1, device="meta"), backend=backend)
    with pytest.raises(backends.BackendError, match="needs CUDA tensors, these are on cpu"):
        ops.causal_conv1d(torch.ones(1, 3, 1), torch.ones(1, 2), backend="gpu")


@pytest.fixture
def cuda_and(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[object], None]]:
    """Pretends that there is a CUDA device, and that importing a GPU back end gives the module, or raises the error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    backends.gpu_problem.cache_clear()

    def found(result: object) -> None:
        def load(op: str, backend: str) -> object:
            if backend == "gpu" and isinstance(result, Exception):
                raise result
            return result if backend == "gpu" else (op, backend)

        monkeypatch.setattr(backends, "_module", load)

    yield found
    backends.gpu_problem.cache_clear()


def test_the_gpu_back_end_is_chosen_by_device_and_dtype(cuda_and: Callable[[object], None]) -> None:
    kernels = SimpleNamespace(DTYPES=frozenset({torch.float32, torch.bfloat16}))
    cuda_and(kernels)
    assert backends.choose("rms_norm", "cuda", dtype=torch.bfloat16) == backends.Choice("gpu")
    assert backends.kernel("rms_norm", "cuda", None, torch.float32) is kernels
    assert backends.choose("rms_norm", "cpu", dtype=torch.bfloat16).name != "gpu"
    double = backends.choose("rms_norm", "cuda", dtype=torch.float64)
    assert double.name == "reference"
    assert double.rejected["gpu"] == "float64 is not covered by its GPU kernels, only bfloat16, float32."
    with pytest.raises(backends.BackendError, match=r"backend='gpu' cannot run here: float64 is not covered"):
        backends.kernel("rms_norm", "cuda", "gpu", torch.float64)
    backends._say_slow_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="slow reference: float64 is not covered"):
        assert backends.kernel("rms_norm", "cuda", None, torch.float64) == ("rms_norm", "reference")
    backends._say_slow_once.cache_clear()


def test_a_gpu_back_end_without_its_package_says_which(cuda_and: Callable[[object], None]) -> None:
    cuda_and(ModuleNotFoundError("No module named 'triton'", name="triton"))
    assert (
        backends.choose("rms_norm", "cuda").rejected["gpu"]
        == "needs triton, which is not installed. pip install triton"
    )


@pytest.mark.parametrize("error", [ModuleNotFoundError("gone", name="stateline.ops.gone"), SyntaxError("broken")])
def test_a_broken_gpu_back_end_raises_in_full(cuda_and: Callable[[object], None], error: Exception) -> None:
    cuda_and(error)
    with pytest.raises(type(error), match=error.msg):
        backends.choose("rms_norm", "cuda")


def test_an_op_without_gpu_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.gpu_problem.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert backends.gpu_problem("rms_norm") == "GPU kernels of rms_norm are not part of this release."
    backends.gpu_problem.cache_clear()


def test_the_precision_of_a_scan_is_that_of_its_a(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(backends, "_unavailable", lambda name, op, device, dtype, args: seen.append(dtype))
    u, A = torch.zeros(1, 2, 3), torch.zeros(3, 4, dtype=torch.complex64)
    backends.explain(ops.selective_scan, u, u, A)
    backends.explain(ops.selective_scan, u)
    backends.explain(ops.causal_conv1d, u.bfloat16(), u)
    assert seen == [torch.complex64, torch.float32, torch.bfloat16]


WITHOUT = """
import os, sys, warnings, torch
{prepare}
import stateline
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        y, _ = stateline.ops.causal_conv1d(torch.ones(1, 3, 1), torch.ones(1, 2))
assert y[0, :, 0].tolist() == [1, 2, 2]
said = [str(w.message) for w in caught if "slow reference" in str(w.message)]
print(len(said), said[0])
print(stateline.backends.explain("causal_conv1d"))
try:
    stateline.ops.causal_conv1d(torch.ones(1, 3, 1), torch.ones(1, 2), backend="cpu")
except stateline.backends.BackendError as error:
    print("refused", error)
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_between_forward_and_backward_is_refused(backend: str) -> None:
    """The state that a graph saved was written in place: autograd must see it."""
    x = plain_scan()
    x["dt"].requires_grad_()
    y, _ = ops.selective_scan(**x, backend=backend)
    token = {k: v.detach()[:, 0] if k in ("u", "dt", "z", "B", "C") else v for k, v in x.items()}
    ops.selective_scan_step_(token.pop("initial_state"), **token, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="builds a foreign library with cc")
FOREIGN = """
import importlib.resources, pathlib
real = importlib.resources.files
import subprocess
broken = pathlib.Path(sys.argv[1]); source = broken / "x.c"; source.write_text("int nothing(void) { return 0; }")
subprocess.run(["cc", "-shared", "-o", str(broken / "_native.so"), str(source)], check=True)
importlib.resources.files = lambda name: broken if name == "stateline" else real(name)
"""

BREAK = """
import importlib.resources, pathlib
real = importlib.resources.files
broken = pathlib.Path(sys.argv[1]); (broken / "_native.so").write_bytes(b"not a library")
importlib.resources.files = lambda name: broken if name == "stateline" else real(name)
"""


@pytest.mark.parametrize(("prepare", "reason"), [
    ("os.environ['STATELINE_DISABLE_NATIVE'] = '1'", "switched off"),
    (BREAK, "does not load"),
    (BREAK.replace("; (broken / \"_native.so\").write_bytes(b\"not a library\")", ""), "was not built"),
    pytest.param(FOREIGN, "is not stateline's library", marks=needs_compiler),
], ids=["disabled", "broken", "absent", "foreign"])  # fmt: skip
def test_without_the_library_everything_works_and_says_so_once(prepare: str, reason: str, tmp_path: Any) -> None:
    code = WITHOUT.format(prepare=prepare)
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    said, explained, refused = run.stdout.splitlines()
    assert said.startswith("1 stateline runs on its slow reference")
    assert explained.startswith("reference; not gpu: needs CUDA tensors, these are on cpu; not cpu: ")
    assert refused.startswith("refused")
    assert all(reason in line for line in (said, explained, refused))
