"""trapezoid_ssd's GPU kernels against float64 answers: values, gradients, states, steps, layouts, awkward sizes.

Buffers are poisoned and fenced (conftest.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import pairwise
from test_gpu_ops import named, on_device
from test_ops import BOUND, FLAG, LAYOUTS, check, close
from test_ops import _strided as strided
from test_trapezoid_ssd import GIVEN, PLAIN, STATE, TOKENS, case, cut, plain
from torch import Tensor
from where import DEVICE, INTERPRETED

from stateline import backends, ops
from stateline.nn import Mamba3
from stateline.ops.trapezoid_ssd import controls, gpu, reference

# Triton's interpreter cuts bfloat16 off instead of rounding, which is beyond the bound.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
#: As docs/numerics.md has it for these kernels: B and C are rounded after they are turned.
TURNED = BOUND | {torch.bfloat16: 1.2e-2}
GRID: dict[str, list[Any]] = {
    "backend": ["gpu"], "dtype": DTYPES, "layout": LAYOUTS, "h": [1, 2, 5], "g": [1, 2, 3], "r": [None, 1],
    "s": [0, 1, "half", "all"], "interleaved": FLAG, "reverse": FLAG, "bias": FLAG, "mix": [False], "D": FLAG,
    "z": FLAG, "initial": FLAG, "strided": FLAG,
}  # fmt: skip
if INTERPRETED:
    GRID |= {"h": [1, 2, 3], "t": [0, 1, 20], "p": [1, 17], "n": [2, 3, 17]}
else:
    GRID |= {"t": [0, 1, 2, 63, 64, 65, 300, 1100], "p": [1, 3, 16, 40, 64, 130], "n": [2, 3, 16, 35, 64, 128]}


@pytest.fixture(autouse=True)
def _memory_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`strided` of test_ops makes its wide tensor on the CPU."""
    full = torch.full
    monkeypatch.setattr("test_ops.torch.full", lambda *a, **k: full(*a, **{"device": DEVICE} | k))


@pytest.mark.parametrize("s", pairwise(GRID), ids=named)
def test_grid(s: dict[str, Any]) -> None:
    check(on_device(case(s | {"strided": False}), s["strided"]), s["dtype"], False)


def inputs(**options: Any) -> dict[str, Any]:
    """As a Mamba-3 layer calls it, on the device; the state put together."""
    given = plain(**options).items()
    return {k: tuple(s.to(DEVICE) for s in v) if isinstance(v, tuple) else v.to(DEVICE) for k, v in given}


def results(x: dict[str, Any], backend: str = "gpu", **how: Any) -> dict[str, Tensor]:
    """y, the state and all gradients of their sum, by name."""
    leaves = {k: v.clone().requires_grad_() for k, v in x.items() if k != "initial_state"}
    state = tuple(v.clone().requires_grad_() for v in x["initial_state"])
    y, end = ops.trapezoid_ssd(**leaves, initial_state=state, backend=backend, **how)
    out, own = (y, *end), [*leaves.values(), *state]
    grads = torch.autograd.grad(out, own, [torch.ones_like(v) for v in out])
    names = ("y", *STATE, *(f"d{k}" for k in leaves), *(f"d{k} of the state" for k in STATE))
    return dict(zip(names, (*out, *grads), strict=True))


def as_chunked(x: dict[str, Any], **how: Any) -> None:
    """`results` beside those of the chunked form in float64, which the grid's oracle confirms at smaller sizes."""
    wide = {k: tuple(s.double() for s in v) if isinstance(v, tuple) else v.double() for k, v in x.items()}
    wanted = results(wide, backend="chunked", **how)
    for name, a in results(x, **how).items():
        error = (a.double() - wanted[name]).abs().max() / wanted[name].abs().max().clamp(min=1e-3)
        bound = TURNED[torch.float32 if name in STATE else x["x"].dtype]
        assert error <= bound, f"{name}: error {error:.2e} exceeds {bound:.0e}"  # NaN exceeds it, too


@pytest.mark.skipif(INTERPRETED, reason="a layer takes the interpreter minutes")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", FLAG)
def test_a_layers_shape(dtype: torch.dtype, interleaved: bool) -> None:
    """Heads of 64 channels, 128 states, several runs of tiles, several programs that share a sum over heads."""
    x = inputs(t=1300, h=24, p=64, n=128, g=1, dtype=dtype)
    as_chunked(x | {"B": strided(x["B"]), "x": strided(x["x"])}, interleaved=interleaved)


@pytest.mark.skipif(INTERPRETED, reason="thousands of steps take the interpreter minutes")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layers_steps_over_a_long_sequence(dtype: torch.dtype) -> None:
    """Small steps that forget little: what turns a state is summed over thousands of tokens."""
    x = inputs(t=3000, h=2, p=64, n=64, g=1, dtype=dtype)
    as_chunked(x | {"dt": x["dt"] * 0.02})


@pytest.mark.parametrize("place", ["whole", "packed"])
def test_a_row_does_not_depend_on_its_batch_and_bits_repeat(place: str) -> None:
    t = 10 if INTERPRETED else 700
    dtype, h, p, n = (torch.float16, 1, 3, 16) if INTERPRETED else (torch.bfloat16, 3, 64, 64)
    x = inputs(dtype=dtype, t=t, h=h, p=p, n=n, g=1)
    rows, how = [slice(0, 1), slice(1, 2)], {}
    joined = x
    if place == "packed":
        how = {"cu_seqlens": torch.tensor([0, t - 5, 2 * t - 5], device=DEVICE)}
        joined = {k: torch.cat([v[:1, : t - 5], v[1:2]], 1) if k in TOKENS else v for k, v in x.items()}
    together, again = results(joined, **how), results(joined, **how)
    assert all(torch.equal(a, b) for a, b in zip(together.values(), again.values(), strict=True))
    for i, row in enumerate(rows):
        length = t - 5 if place == "packed" and i == 0 else t
        own = {k: v[row, :length] if k in TOKENS else v for k, v in x.items()}
        own["initial_state"] = tuple(v[row] for v in x["initial_state"])
        for name, b in results(own).items():
            if name in ("dD", "dB_bias", "dC_bias"):
                continue
            a = together[name]
            if place == "packed" and (name == "y" or name.removeprefix("d") in TOKENS):
                a = a[:, :length] if i == 0 else a[:, t - 5 :]
            else:
                a = a[row]
            assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "interleaved"), [(2, True), (16, False), (33, True), (33, False)])
@pytest.mark.parametrize("reverse", FLAG)
def test_pieces_and_steps_follow_the_whole(dtype: torch.dtype, n: int, interleaved: bool, reverse: bool) -> None:
    x = inputs(dtype=dtype, t=9, p=19, n=n, s="all" if n == 33 else "half")
    how: dict[str, Any] = {"interleaved": interleaved, "backend": "gpu"}
    whole, last = ops.trapezoid_ssd(**x, reverse=reverse, **how)
    first, second = (slice(4, None), slice(0, 4)) if reverse else (slice(0, 4), slice(4, None))
    y1, state = ops.trapezoid_ssd(**cut(x, first), reverse=reverse, **how)
    y2, state = ops.trapezoid_ssd(**(cut(x, second) | {"initial_state": state}), reverse=reverse, **how)
    bound = max(dtype, torch.float32, key=lambda d: torch.finfo(d).eps)
    close("y", torch.cat([y2, y1] if reverse else [y1, y2], 1), whole.double(), bound)
    for name, got, want in zip(STATE, state, last, strict=True):
        close(name, got, want.double(), torch.float32)
    slots = tuple(torch.randn(5, *s.shape[1:]).to(DEVICE) for s in last)
    for own, given in zip(slots, x.pop("initial_state"), strict=True):
        own[[3, 1]] = given
    kept = [s.clone() for s in slots]
    for i in reversed(range(9)) if reverse else range(9):
        y = ops.trapezoid_ssd_step_(slots, **cut(x, i), index=torch.tensor([3, 1], device=DEVICE), **how)
        close("y", y, whole[:, i].double(), bound)
    for name, own, want, before in zip(STATE, slots, last, kept, strict=True):
        close(name, own[[3, 1]], want.double(), torch.float32)
        assert torch.equal(own[[0, 2, 4]], before[[0, 2, 4]])
    kept = [s.clone() for s in slots]
    index = torch.tensor([-1, 4], dtype=torch.int32, device=DEVICE)
    y = ops.trapezoid_ssd_step_(slots, **cut(x, 0), index=index, **how)
    assert not y[0].any()
    assert y[1].any()
    assert all(torch.equal(own[:4], before[:4]) for own, before in zip(slots, kept, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(4, 40, 64, 3), (1, 3, 130, 1), (5, 1, 2, 5)], ids=str)
def test_step(dtype: torch.dtype, sizes: tuple[int, int, int, int]) -> None:
    h, p, n, g = sizes
    for options in ({}, {"z": False, "D": False, "bias": False, "s": 0}, {"s": "all", "interleaved": False, "r": 1}):
        x = plain(t=1, h=h, p=p, n=n, g=g, dtype=dtype, **options)
        token, state = cut(x, 0), x.pop("initial_state")
        token.pop("initial_state", None)
        right, mine = tuple(s.double() for s in state), tuple(s.clone().to(DEVICE) for s in state)
        given = {k: v.double() for k, v in token.items()}
        how = {"interleaved": options.get("interleaved", True)}
        fields = [given.get(k) for k in GIVEN]
        fields[4:6] = [v if v.dim() == 4 else v.unsqueeze(1) for v in fields[4:6]]
        want = reference.step(*right, *fields, how["interleaved"], None)
        y = ops.trapezoid_ssd_step_(mine, **{k: v.to(DEVICE) for k, v in token.items()}, **how, backend="gpu")
        close("y", y.cpu().view(want.shape), want, dtype)
        for name, a, b in zip(STATE, mine, right, strict=True):
            close(name, a.cpu(), b, torch.float32)


@pytest.mark.parametrize("absent", ["rates", "B_bias", "C_bias", "D", "z", "initial_state"])
def test_each_option_absent(absent: str) -> None:
    s = PLAIN | {"backend": "gpu", "t": 5, "p": 3, "n": 4, "s": 0 if absent == "rates" else "half"}
    given = case(s | {"initial": absent != "initial_state", "D": absent != "D", "z": absent != "z"})
    if absent in ("B_bias", "C_bias"):
        del given.leaves[absent]
    check(on_device(given, False), torch.float32, False)


@pytest.mark.parametrize("which", [k for k in GIVEN if k not in ("mix", "z_mix", "y_mix")])
def test_nan_is_passed_on(which: str) -> None:
    x = inputs(t=3)
    x[which].view(-1)[0] = float("nan")
    y, _ = ops.trapezoid_ssd(**x, backend="gpu")
    assert y[0, 0, 0, 0].isnan()


@pytest.mark.parametrize("sizes", [(0, 7), (2, 0)], ids=str)
def test_sizes_of_zero(sizes: tuple[int, int]) -> None:
    b, t = sizes
    x = {k: v[:b, :t] if k in TOKENS else v for k, v in inputs(t=7).items()}
    x["initial_state"] = tuple(v[:b] for v in x["initial_state"])
    found = results(x)
    assert found["y"].shape == x["x"].shape
    for name, given in zip(STATE, x["initial_state"], strict=True):
        assert torch.equal(found[name], given)
        assert torch.equal(found[f"d{name} of the state"], torch.ones_like(given))
    for name in ("dD", "dB_bias", "dC_bias"):
        assert not found[name].any()


def test_a_system_that_is_not_covered_is_refused_by_name() -> None:
    x = [torch.empty(2, 5, 4, 6), *(torch.empty(2, 5, 4) for _ in range(3)), torch.empty(2, 5, 3, 2, 8)]
    assert gpu.problem(*x) == "its GPU kernels compute one rank, not 3."
    x[4] = x[4][:, :, 0]
    assert gpu.problem(*x) is None
    assert "no scales of ranks" in str(gpu.problem(*x, x[4], None, None, None, torch.empty(4, 1, 6)))
    x[4] = torch.empty(2, 5, 2, 300)
    assert gpu.problem(*x) == "its GPU kernels hold 1 to 128 states, not 300."
    assert gpu.problem(torch.empty(2, 4, 6), *x[1:4], torch.empty(2, 2, 300)) is None
    assert "need heads" in str(gpu.problem(torch.empty(2, 5, 4, 0), *x[1:4], x[4][..., :8]))


needs_cuda = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no device")


@needs_cuda
def test_cuda_tensors_take_these_kernels_by_themselves() -> None:
    x = inputs(dtype=torch.bfloat16, p=64, n=128)
    system = [x[k] for k in GIVEN[:6]]
    explain = backends.explain
    assert str(explain(ops.trapezoid_ssd, *system)) == "gpu (matrix products of bfloat16, summed in float32)"
    assert explain(ops.trapezoid_ssd, *(v.double() for v in system)).name == "chunked"
    ranked = [*system[:4], *(torch.randn(2, 12, 4, 2, 128, device=DEVICE) for _ in "BC")]
    assert "one rank, not 4" in explain(ops.trapezoid_ssd, *ranked).rejected["gpu"]
    assert torch.equal(ops.trapezoid_ssd(**x)[0], ops.trapezoid_ssd(**x, backend="gpu")[0])
    assert ops.trapezoid_ssd(*ranked)[0].shape == (2, 12, 4, 4, 64)


@needs_cuda
def test_a_graph_replays_forward_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # guard bytes are filled by launches that a graph would replay
    x = inputs(dtype=torch.bfloat16, t=130, p=64, n=64)
    state = tuple(torch.zeros_like(s) for s in x["initial_state"])
    token = {k: v for k, v in cut(x, 0).items() if k != "initial_state"}

    def run() -> tuple[Tensor, Tensor]:
        how: dict[str, Any] = {"backend": "gpu"}
        return ops.trapezoid_ssd(**x, **how)[0], ops.trapezoid_ssd_step_(state, **token, **how)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        out = run()
    x["x"].copy_(torch.randn_like(x["x"]))
    for part in state:
        part.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out[0], ops.trapezoid_ssd(**x, backend="gpu")[0])
    for part in state:
        part.zero_()
    assert torch.equal(out[1], ops.trapezoid_ssd_step_(state, **token, backend="gpu"))


@pytest.mark.parametrize("activation", controls.A_ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "h", "s"), [((2, 17), 5, 3), ((1, 16), 32, 0), ((33,), 3, 20), ((0, 4), 2, 2)])
def test_controls(shape: tuple[int, ...], h: int, s: int, dtype: torch.dtype, activation: str) -> None:
    """Values to the digit wherever they lie, down to e^−45, whose argument float32 knows to 45 · 6·10⁻⁸."""
    torch.manual_seed(0)
    wider = (
        torch.randn(*shape, 2 + 3 * h + s, device=DEVICE)
        * torch.tensor([12.0, 1.0, 1e-3], device=DEVICE)[torch.randint(3, (*shape, 2 + 3 * h + s), device=DEVICE)]
    )
    raw, bias = wider.to(dtype)[..., 2:], torch.randn(h, device=DEVICE)
    slopes = [torch.randn(*shape, n, device=DEVICE) for n in (h, h, h, s)]

    def run(of: Any, *given: Tensor) -> tuple[Any, Any]:
        leaves = [v.detach().requires_grad_() for v in given]
        out = of(*leaves, activation, 0.3)
        return out, torch.autograd.grad(out, leaves, [v.to(o.dtype) for v, o in zip(slopes, out, strict=True)])

    (got, grads), (want, exact) = run(controls.controls, raw, bias), run(controls.formula, raw.double(), bias.double())
    for name, a, b in zip(("dt", "A", "blend", "rates"), got, want, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=5e-6, atol=1e-30, msg=lambda m, name=name: f"{name}: {m}")
    rough = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(grads[0].double(), exact[0], rtol=rough, atol=1e-6)
    torch.testing.assert_close(grads[1].double(), exact[1], rtol=1e-5, atol=1e-5)


@needs_cuda
def test_a_layer_follows_itself_in_float64() -> None:
    torch.manual_seed(0)
    layer, x = Mamba3(256, device=DEVICE), torch.randn(2, 300, 256, device=DEVICE)
    exact = Mamba3(256, dtype=torch.float64)
    exact.load_state_dict({k: v.cpu().double() for k, v in layer.state_dict().items()})
    close("y", layer(x).cpu(), exact(x.cpu().double()), torch.float32)


@needs_cuda
def test_beyond_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # guard bytes would take as much memory again
    t, h, p, n, tail = 1_100_000, 32, 64, 2, 300
    x = torch.zeros(1, t, h, p, dtype=torch.bfloat16, device=DEVICE)
    x[0, -tail:] = torch.randn(tail, h, p, device=DEVICE)
    dt = torch.ones(1, t, h, device=DEVICE)
    B = torch.ones(1, t, 1, n, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        y, state = ops.trapezoid_ssd(x, dt, -0.1 * dt, 0.5 * dt, B, B, backend="gpu")
        end = slice(t - tail, t)
        cut_dt = dt[:, end]
        y_tail, tail_state = ops.trapezoid_ssd(
            x[:, end], cut_dt, -0.1 * cut_dt, 0.5 * cut_dt, B[:, end], B[:, end], backend="gpu"
        )
    assert not y[0, : t - tail : 1000].any()
    close("y", y[:, -tail:], y_tail.double(), torch.bfloat16)
    close("state", state[1], tail_state[1].double(), torch.float32)
