"""The CUDA kernels of selective_scan against the reference in float64: values, gradients, awkward sizes, determinism.

Memory that a kernel leaves unwritten is NaN (torch fills `empty` under deterministic algorithms).
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from stateline import backends, ops
from stateline.ops import cuda, nvrtc
from stateline.ops.selective_scan import gpu, reference

pytestmark = pytest.mark.gpu

#: Published bounds (docs/numerics.md): largest error over largest value.
BOUND = {torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "softplus", "initial_state")


@pytest.fixture(autouse=True)
def _poisoned():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(b, t, d, n, g=1, dtype=torch.float32, extras=True, sequences=None, seed=0):
    """Arguments of `reference.forward` up to the initial state, on the CPU."""
    make = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=make)

    u, z = randn(b, t, d).to(dtype), randn(b, t, d).to(dtype)
    A = -torch.rand(d, n, generator=make) * 8
    B, C = randn(b, t, g, n).to(dtype), randn(b, t, g, n).to(dtype)
    if not extras:
        return [u, (0.2 * torch.rand(b, t, d, generator=make)).to(dtype), A, B, C, None, None, None, False, None]
    h0 = randn(b if sequences is None else sequences, d, n)
    return [u, randn(b, t, d).to(dtype), A, B, C, randn(d), z, randn(d) - 3, True, h0]


def moved(args, device=None, dtype=None):
    return [x.to(device=device, dtype=dtype) if isinstance(x, Tensor) else x for x in args]


def near(got: Tensor, want: Tensor, bound: float, what: str) -> None:
    got = got.cpu().double()
    assert got.shape == want.shape, what
    if not want.numel():
        return
    assert got.isfinite().all(), f"{what}: {(~got.isfinite()).sum()} of {got.numel()} values are not finite"
    error = (got - want).abs().max() / want.abs().max().clamp_min(1e-3)
    assert error < bound, f"{what}: error {error:.2e}, bound {bound:.0e}"


def check(args, segments=None, reverse=False):
    table = None if segments is None else torch.tensor(segments, dtype=torch.int64).reshape(-1, 3)
    on_gpu, wide = moved(args, "cuda"), moved(args, dtype=torch.float64)
    where = (None if table is None else table.cuda(), reverse)
    bound = BOUND[args[0].dtype]
    y, state = gpu.forward(*on_gpu, *where)
    want_y, want_state = reference.forward(*wide, table, reverse)
    assert y.dtype == args[0].dtype
    near(y, want_y, bound, "y")
    near(state, want_state, BOUND[torch.float32], "state")
    dy, dstate = torch.randn(want_y.shape).to(args[0].dtype), torch.randn(want_state.shape)
    got = gpu.backward(dy.cuda(), dstate.cuda(), *on_gpu, *where)
    want = reference.backward(dy.double(), dstate.double(), *wide, table, reverse)
    given = [x for name, x in zip(NAMES, args, strict=True) if name != "softplus"]
    for name, x, mine, right in zip([n for n in NAMES if n != "softplus"], given, got, want, strict=True):
        assert (mine is None) == (right is None), name
        if mine is not None:
            assert mine.dtype == x.dtype
            near(mine, right, bound, f"gradient of {name}")


@pytest.mark.parametrize(
    ("b", "t", "d", "n", "g"),
    [
        (1, 1, 1, 1, 1),
        (2, 33, 17, 16, 1),
        (2, 64, 32, 16, 1),
        (3, 65, 40, 5, 1),
        (2, 129, 96, 16, 3),
        (2, 100, 80, 16, 4),
        (1, 130, 70, 3, 4),
        (2, 100, 64, 64, 2),
        (1, 200, 48, 33, 1),
        (2, 0, 8, 4, 1),
        (0, 5, 8, 4, 1),
        (2, 4500, 33, 16, 1),
    ],
)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_sizes(b, t, d, n, g, dtype):
    check(inputs(b, t, d, n, g, dtype))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_bare_arguments(dtype, reverse):
    check(inputs(2, 150, 40, 16, dtype=dtype, extras=False), reverse=reverse)


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "initial_state"])
def test_each_option_absent(absent):
    args = inputs(2, 90, 40, 16)
    args[NAMES.index(absent)] = None
    check(args)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_segments(dtype, reverse):
    packed = [(0, 0, 70), (0, 70, 70), (0, 70, 71), (0, 71, 200), (0, 200, 263)]
    check(inputs(1, 263, 40, 16, dtype=dtype, sequences=5), packed, reverse)
    padded = [(0, 0, 100), (1, 0, 0), (2, 30, 100), (3, 0, 61)]
    check(inputs(4, 100, 40, 16, dtype=dtype, sequences=4), padded, reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_chunks_of_long_sequences(reverse):
    check(inputs(1, 9000, 20, 4, dtype=torch.bfloat16), reverse=reverse)
    table = [(0, 0, 5001), (0, 5001, 5002), (0, 5002, 9000)]
    check(inputs(1, 9000, 20, 4, sequences=3), table, reverse)


def test_nothing_is_forgotten_where_A_is_0():
    args = inputs(1, 6000, 8, 4)
    args[2] = torch.zeros_like(args[2])
    args[1] = args[1] - 4
    check(args)


def test_strides_and_mixed_dtypes():
    args = inputs(2, 70, 40, 16)
    args[0] = torch.randn(2, 40, 70).transpose(1, 2)
    args[3] = torch.randn(2, 70, 1, 35)[..., 2:18]
    args[6] = torch.randn(2, 70, 81)[..., 1:41]
    check(args)
    args[0] = args[0].bfloat16()  # what is given as float32 keeps its precision; y and u's gradient are rounded
    check(args)


def test_a_row_does_not_depend_on_its_batch_and_bits_repeat():
    args = moved(inputs(3, 4500, 64, 16, dtype=torch.bfloat16), "cuda")
    dy, dstate = torch.randn(3, 4500, 64, device="cuda").bfloat16(), torch.randn(3, 64, 16, device="cuda")
    alone = [x[1:2] if isinstance(x, Tensor) and x.shape[0] == 3 else x for x in args]
    together = [*gpu.forward(*args, None, False), *gpu.backward(dy, dstate, *args, None, False)]
    again = [*gpu.forward(*args, None, False), *gpu.backward(dy, dstate, *args, None, False)]
    single = [*gpu.forward(*alone, None, False), *gpu.backward(dy[1:2], dstate[1:2], *alone, None, False)]
    for x, y, z in zip(together, again, single, strict=True):
        assert torch.equal(x, y)
        if x.shape[0] == 3:
            assert torch.equal(x[1:2], z)


@pytest.mark.parametrize("case", [(2, 150, 40, 16, 1), (1, 4500, 33, 16, 3), (2, 70, 40, 39, 2)])
def test_what_the_forward_pass_keeps_changes_nothing(case):
    args = moved(inputs(*case, dtype=torch.bfloat16), "cuda")
    b, t, d, n, _ = case
    dy, dstate = torch.randn(b, t, d, device="cuda").bfloat16(), torch.randn(b, d, n, device="cuda")
    y, state, kept = gpu.forward_kept(*args, None, False)
    assert kept.shape == gpu.kept_shape(args[0], *args[2:5], None)
    assert all(map(torch.equal, (y, state), gpu.forward(*args, None, False)))
    with_it = gpu.backward(dy, dstate, *args, None, False, kept)
    assert all(map(torch.equal, with_it, gpu.backward(dy, dstate, *args, None, False)))


def test_three_blocks_a_multiprocessor_give_the_same_bits(monkeypatch):
    args = moved(inputs(2, 300, 70, 16, dtype=torch.bfloat16), "cuda")
    grads = [torch.randn(2, 300, 70, device="cuda").bfloat16(), torch.randn(2, 70, 16, device="cuda")]
    plan, runs = gpu.backward_plan, []
    for crowded in (False, True):
        monkeypatch.setattr(gpu, "_crowded", lambda p, call, c=crowded: plan(call.n, call.dtype, call.limits, c))
        runs.append(gpu.backward(*grads, *args, None, False))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_tiles_of_a_device_with_less_shared_memory(monkeypatch, dtype):
    monkeypatch.setattr(gpu, "_limits", lambda _: gpu.Limits(132, 101376, 102400))
    check(inputs(2, 133, 40, 16, 2, dtype))
    check(inputs(1, 4500, 33, 5, dtype=dtype), reverse=True)
    check(inputs(1, 130, 40, 16, dtype=dtype, sequences=3), [(0, 0, 64), (0, 64, 97), (0, 97, 130)])


def test_raw_ops_have_the_shapes_that_tracing_expects(monkeypatch):
    monkeypatch.setattr(cuda, "empty", lambda shape, dtype, like: like.new_empty(shape, dtype=dtype))  # no fences
    u, dt, A, B, C, D, z, bias, softplus, state = moved(inputs(2, 70, 40, 16), "cuda")
    head, where = (u, dt, A, B, C, D, z, bias, softplus), (state, None, False)
    raw, checks = torch.ops.stateline, ("test_schema", "test_faketensor")
    for op in (raw.selective_scan, raw.selective_scan_kept):
        torch.library.opcheck(op.default, (*head, *where, None), test_utils=checks)
    kept = raw.selective_scan_kept(*head, *where, None)[2]
    torch.library.opcheck(raw.selective_scan_backward.default, (u, state, *head, *where, kept, None), test_utils=checks)


def test_gradients_of_the_operation():
    args = moved(inputs(2, 300, 40, 16), "cuda")
    leaves = {n: x.requires_grad_() for n, x in zip(NAMES, args, strict=True) if n != "softplus"}
    options = {n: leaves[n] for n in list(leaves)[5:]}
    y, state = ops.selective_scan(*args[:5], **options, dt_softplus=True)
    dy, dstate = torch.randn_like(y), torch.randn_like(state)
    got = torch.autograd.grad((y, state), list(leaves.values()), (dy, dstate))
    wide = moved([x.detach() if isinstance(x, Tensor) else x for x in args], "cpu", torch.float64)
    want = reference.backward(dy.cpu().double(), dstate.cpu().double(), *wide, None, False)
    for name, a, b in zip(leaves, got, want, strict=True):
        near(a, b, BOUND[torch.float32], f"gradient of {name}")


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(
    ("b", "d", "n", "g"), [(4, 40, 16, 1), (4, 40, 5, 3), (4, 64, 64, 2), (1, 33, 20, 1), (7, 40, 16, 4)]
)
def test_step(dtype, b, d, n, g):
    args = inputs(b, 1, d, n, g, dtype, sequences=9)
    u, dt, A, B, C, D, z, bias, softplus, state = args
    token = [x[:, 0] for x in (u, dt)] + [A, B[:, 0], C[:, 0], D, z[:, 0], bias]
    slots = torch.tensor([5, -1, 0, 2, 8, 3, 1])[:b]
    for index in (None, slots, slots.int()):
        h = state[:b] if index is None else state
        mine, right = h.clone().cuda(), h.double()
        y = gpu.step(mine, *moved(token, "cuda"), softplus, None if index is None else index.cuda())
        want = reference.step(right, *moved(token, dtype=torch.float64), softplus, index)
        near(y, want, BOUND[dtype], "y")
        near(mine, right, BOUND[torch.float32], "state")
        mine = h.clone().cuda()
        token[2] = (-A).log()
        y = gpu.step_log_A(mine, *moved(token, "cuda"), softplus, None if index is None else index.cuda())
        token[2] = A
        near(y, want, BOUND[dtype], "y of log A")
        near(mine, right, BOUND[torch.float32], "state of log A")


def other_systems() -> dict[str, list[Any]]:
    """Arguments that the CUDA kernels do not cover, by what is unusual about them."""
    found = {kind: inputs(2, 20, 8, 4) for kind in ("constant B", "complex A")}
    found["constant B"][3] = torch.randn(8, 4)
    found["complex A"][2] = torch.complex(found["complex A"][2], torch.randn(8, 4))
    found["complex A"][3:5] = torch.randn(2, 20, 1, 4, 2), torch.randn(2, 20, 1, 4, 2)
    found["complex A"][-1] = None
    return found | {"400 states": inputs(2, 20, 8, 400), "systems without states": inputs(2, 20, 8, 0)}


@pytest.mark.parametrize("kind", other_systems())
def test_systems_beyond_the_cuda_kernels_run_on_triton_and_say_so(kind):
    args = other_systems()[kind]
    u, dt, A, B, C, D, z, bias, softplus, state = moved(args, "cuda")
    options = {"D": D, "z": z, "dt_bias": bias, "dt_softplus": softplus, "initial_state": state}
    choice = backends.explain("selective_scan", u, dt, A, B, C)
    assert choice.name == "gpu"
    assert choice.detail.startswith(f"CUDA kernels do not cover {kind}")
    assert choice.detail.endswith("; the Triton kernel runs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, _ = ops.selective_scan(u, dt, A, B, C, **options, backend="gpu")
        again, _ = ops.selective_scan(u, dt, A, B, C, **options)
    assert torch.equal(y, again)
    near(y, reference.forward(*args, None, False)[0].double(), BOUND[torch.float32], "y")


def test_covered_systems_take_the_cuda_kernels():
    u, dt, A, B, C = moved(inputs(2, 20, 8, 4)[:5], "cuda")
    assert str(backends.explain("selective_scan", u, dt, A, B, C)) == "gpu (the CUDA kernels run)"
    wide = backends.explain("selective_scan", *(x.double() for x in (u, dt, A, B, C)))
    assert (wide.name, wide.rejected["gpu"][:23]) == ("reference", "float64 is not covered ")


def test_without_nvrtc_triton_stands_in_and_says_so_once(monkeypatch):
    args = moved(inputs(2, 150, 40, 16, dtype=torch.bfloat16), "cuda")
    usual = [*gpu.forward(*args, None, False), *gpu.backward(args[0], args[-1], *args, None, False)]
    monkeypatch.setattr(nvrtc, "problem", lambda device: "libnvrtc.so.13 was not found.")
    backends.say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"cannot be compiled here: libnvrtc.so.13 was not found; ") as said:
        other = [*gpu.forward(*args, None, False), *gpu.backward(args[0], args[-1], *args, None, False)]
    assert len(said) == 1
    for a, b in zip(usual, other, strict=True):
        near(a, b.cpu().double(), 2 * BOUND[torch.bfloat16], "CUDA and Triton")
    assert not all(torch.equal(a, b) for a, b in zip(usual, other, strict=True)), "the same kernels ran"
