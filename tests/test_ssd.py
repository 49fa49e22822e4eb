"""ssd beyond the grid of test_ops: splits, steps, gradients by differences, compile, export, errors, back ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_ops import BACKENDS, BOUND, DTYPES, FLAG, close, leaf, same, ssd_case
from torch import Tensor

from stateline import backends, ops

OPS = torch.ops.stateline
FORMS = [*BACKENDS, "chunked"]
#: A call as a Mamba-2 layer makes it; tests change what they are about.
PLAIN: dict[str, Any] = {
    "backend": None, "dtype": torch.float32, "layout": "whole", "t": 12, "h": 4, "p": 6, "n": 5, "g": 2, "D": "head",
    "z": True, "dt_bias": True, "softplus": True, "limit": False, "initial": True, "reverse": False,
}  # fmt: skip
TOKENS = ("x", "dt", "B", "C", "z")


def plain(**options: Any) -> dict[str, Tensor]:
    return ssd_case(PLAIN | options).leaves


def cut(x: dict[str, Tensor], span: slice | int) -> dict[str, Tensor]:
    return {k: v[:, span] if k in TOKENS else v for k, v in x.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reverse", FLAG)
def test_a_split_is_bit_equal_to_the_whole(backend: str, dtype: torch.dtype, reverse: bool) -> None:
    x = plain(t=75, p=19, n=7, dtype=dtype)
    how: dict[str, Any] = {"dt_softplus": True, "reverse": reverse, "backend": backend}
    whole, last = ops.ssd(**x, **how)
    for k in (0, 1, 32, 50, 75):
        first, second = (slice(k, None), slice(0, k)) if reverse else (slice(0, k), slice(k, None))
        y1, state = ops.ssd(**cut(x, first), **how)
        y2, state = ops.ssd(**(cut(x, second) | {"initial_state": state}), **how)
        same(torch.cat([y2, y1] if reverse else [y1, y2], 1), whole, backend)
        same(state, last, backend)


@pytest.mark.parametrize("backend", FORMS)
def test_a_row_does_not_depend_on_its_batch(backend: str) -> None:
    x = plain(t=70, p=16, n=16, g=1)
    y, state = ops.ssd(**x, dt_softplus=True, backend=backend)
    for i in range(2):
        row = {k: v[i : i + 1] if k in (*TOKENS, "initial_state") else v for k, v in x.items()}
        yi, si = ops.ssd(**row, dt_softplus=True, backend=backend)
        if backend == "cpu":
            assert torch.equal(yi[0], y[i])
            assert torch.equal(si[0], state[i])
        else:  # library matrix products
            close("y", yi[0], y[i].double(), torch.float32)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 16, 33])
def test_steps_follow_the_scan(backend: str, dtype: torch.dtype, n: int) -> None:
    x = plain(t=7, p=19, n=n, D="channel", dtype=dtype)
    how: dict[str, Any] = {"dt_softplus": True, "dt_limit": (0.1, 2.0), "backend": backend}
    whole, last = ops.ssd(**x, **how)
    slots = torch.randn(5, *last.shape[1:], dtype=last.dtype)
    start = x.pop("initial_state")
    slots[[3, 1]] = start
    kept = slots.clone()
    for t in range(7):
        y = ops.ssd_step_(slots, **cut(x, t), index=torch.tensor([3, 1]), **how)
        close("y", y, whole[:, t].double(), dtype)
    close("state", slots[[3, 1]], last.double(), last.dtype)
    assert torch.equal(slots[[0, 2, 4]], kept[[0, 2, 4]])
    before = slots.clone()
    y = ops.ssd_step_(slots, **cut(x, 0), index=torch.tensor([-1, 4], dtype=torch.int32), **how)
    assert not y[0].any()
    assert y[1].any()
    assert torch.equal(slots[:4], before[:4])
    for log_A in (False, True):
        own, token = start.clone(), cut(x, 0)
        y = ops.ssd_step_(own, **token | ({"A": token["A"].neg().log()} if log_A else {}), log_A=log_A, **how)
        close("y", y, whole[:, 0].double(), dtype)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("place", ["whole", "left", "packed"])
def test_gradcheck_of_every_argument(backend: str, place: str) -> None:
    s = PLAIN | dict(backend=backend, dtype=torch.float64, layout=place, t=5, h=3, p=2, n=2, g=2)
    case = ssd_case(s | {"reverse": place == "left", "D": "channel" if place == "packed" else "head"})
    names = list(case.leaves)
    leaves = [case.leaves[k].requires_grad_() for k in names]
    assert torch.autograd.gradcheck(lambda *v: case.op(**dict(zip(names, v, strict=True))), leaves)


@pytest.mark.parametrize("backend", FORMS)
def test_halves_of_a_sequence_join_by_state_and_total_decay(backend: str) -> None:
    x = plain(t=90, initial=False)
    how: dict[str, Any] = {"dt_softplus": True, "backend": backend}
    x["dt"] = x["dt"] - 5
    _, whole = ops.ssd(**x, **how)
    _, first, _ = ops.ssd(**cut(x, slice(0, 40)), return_decay=True, **how)
    _, second, decay = ops.ssd(**cut(x, slice(40, None)), return_decay=True, **how)
    close("state", second + decay[..., None, None] * first, whole.double(), torch.float32)
    _, _, none = ops.ssd(**cut(x, slice(0, 0)), return_decay=True, **how)
    assert (none == 1).all()


@pytest.mark.parametrize("reverse", FLAG)
def test_gradients_of_a_sequence_of_many_tiles(reverse: bool) -> None:
    """Long enough that the C++ gradient marks states coarsely, then finely."""
    x = {k: v[:1] if k in (*TOKENS, "initial_state") else v for k, v in plain(t=32 * 300 + 5, h=1, p=2, n=2).items()}
    grads = []
    for backend in (BACKENDS[-1], "chunked"):
        leaves = {k: v.double().requires_grad_() for k, v in x.items()}
        y, state = ops.ssd(**leaves, dt_softplus=True, reverse=reverse, backend=backend)
        grads.append(torch.autograd.grad(y.square().sum() + state.sum(), list(leaves.values())))
    for name, got, want in zip(x, *grads, strict=True):
        close(name, got, want, torch.float64)


def test_opcheck_of_raw_ops() -> None:
    x = plain()
    head = (*(x[k] for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")), True, 0.0, 3.0)
    where = (x["initial_state"], torch.tensor([[0, 0, 7], [1, 2, 12]]), False, None)
    y, state, decay = OPS.ssd(*head, *where)
    torch.library.opcheck(OPS.ssd.default, (*head, *where))
    torch.library.opcheck(OPS.ssd_kept.default, (*head, *where))
    torch.library.opcheck(OPS.ssd_backward.default, (y, state, decay, *head, *where, None))
    token = (*(cut(x, 0)[k] for k in ("x", "dt", "A", "B", "C")), None, None, None, False, 0.0, 3.0)
    torch.library.opcheck(OPS.ssd_step_.default, (state, *token, torch.tensor([1, -1]), False, None))


def test_compiles_whole_and_exports_with_dynamic_sizes() -> None:
    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, S: Tensor, lengths: Tensor) -> Tensor:
        y, state = ops.ssd(x, dt, A, B, 2 * B, dt_softplus=True, dt_limit=(0.0, 4.0), initial_state=S, lengths=lengths)
        return y.square().sum() + state.sum()

    class Layer(torch.nn.Module):
        def forward(self, *x: Tensor) -> Tensor:
            return run(*x)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for t in (9, 5):
        x = plain(t=t)
        args = [x[k].requires_grad_() for k in ("x", "dt", "A", "B", "initial_state")]
        lengths = torch.tensor([t, 2])
        wanted = torch.autograd.grad(run(*args, lengths), args)
        for got, want in zip(torch.autograd.grad(compiled(*args, lengths), args), wanted, strict=True):
            torch.testing.assert_close(got, want)
    t = torch.export.Dim("t")
    fixed = [v.detach() for v in args]
    program = torch.export.export(
        Layer(), (*fixed, lengths), dynamic_shapes={"x": ({1: t}, {1: t}, None, {1: t}, None, None)}
    )
    longer = plain(t=31)
    other = [longer[k] for k in ("x", "dt", "A", "B", "initial_state")]
    torch.testing.assert_close(program.module()(*other, lengths), run(*other, lengths))


@pytest.mark.parametrize("backend", FORMS)
def test_mixed_dtypes_as_autocast_gives_them(backend: str) -> None:
    x = plain()
    mixed = x | {"x": x["x"].bfloat16(), "B": x["B"].bfloat16(), "z": x["z"].half()}
    wide = {k: v.float() for k, v in mixed.items()}
    y, state = ops.ssd(**mixed, dt_softplus=True, backend=backend)
    y32, state32 = ops.ssd(**wide, dt_softplus=True, backend=backend)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(state, state32)
    torch.testing.assert_close(y, y32.bfloat16())


@pytest.mark.parametrize("backend", FORMS)
def test_large_steps_and_small_ones(backend: str) -> None:
    """Decays that vanish, and raw step sizes where a naive softplus is exactly 0 or overflows."""
    x = plain(t=66, z=False, dt_bias=False)
    x["dt"] = torch.linspace(-40, 90, 66)[None, :, None].expand(2, 66, 4).contiguous()
    y, state = ops.ssd(**x, dt_softplus=True, backend=backend)
    y64, state64 = ops.ssd(**{k: v.double() for k, v in x.items()}, dt_softplus=True, backend="reference")
    close("y", y, y64, torch.float32)
    close("state", state, state64, torch.float32)
    assert y.isfinite().all()


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("which", ["x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state"])
def test_nan_is_passed_on(backend: str, which: str) -> None:
    x = plain(t=3)
    x[which].view(-1)[0] = float("nan")
    y, _ = ops.ssd(**x, dt_softplus=True, backend=backend)
    assert y[0, 0, 0, 0].isnan()


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("empty", ["p", "n", "b"])
def test_sizes_of_zero(backend: str, empty: str) -> None:
    sizes = {"b": 2, "p": 3, "n": 4} | {empty: 0}
    b, p, n = sizes.values()
    x, B = torch.randn(b, 40, 2, p, requires_grad=True), torch.randn(b, 40, 1, n)
    y, state = ops.ssd(x, torch.rand(b, 40, 2), -torch.rand(2), B, B, D=torch.ones(2), backend=backend)
    assert (y.shape, state.shape) == ((b, 40, 2, p), (b, 2, p, n))
    assert torch.equal(y, x) or n
    (y.sum() + state.sum()).backward()
    assert x.grad is not None
    y = ops.ssd_step_(
        state.detach(), x.detach()[:, 0], torch.rand(b, 2), -torch.rand(2), B[:, 0], B[:, 0], backend=backend
    )
    assert y.shape == (b, 2, p)


@pytest.mark.parametrize("backend", FORMS)
def test_an_input_state_is_never_changed(backend: str) -> None:
    x = plain()
    before = x["initial_state"].clone()
    _, state = ops.ssd(**x, backend=backend)
    state.add_(1)
    assert torch.equal(x["initial_state"], before)
    _, state = ops.ssd(**cut(x, slice(0, 0)), backend=backend)
    assert torch.equal(state, before)
    assert state.data_ptr() != x["initial_state"].data_ptr()


X = plain()
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": X["x"][..., 0]}, ValueError, r"x has shape \(2, 12, 4\), expected \(b, t, h, p\)"),
    ({"dt": X["dt"][..., :3]}, ValueError, r"dt has shape .* with h = 4 \(set by x\)"),
    ({"A": X["A"].bfloat16()}, TypeError, "A is bfloat16, expected one of float32. A keeps full precision"),
    ({"A": X["x"][0, 0]}, ValueError, r"A has shape \(4, 6\), expected \(h,\)"),
    ({"B": X["B"].transpose(2, 3)}, ValueError, r"C has shape .* g = 5 \(set by B\)|B has shape"),
    ({"C": X["C"][:, :, :0], "B": X["B"][:, :, :0]}, ValueError, "expected at least one group"),
    ({"D": X["D"].half()}, TypeError, "D is float16.*Keep D out of casts"),
    ({"D": torch.zeros(4, 5)}, ValueError, r"D has shape \(4, 5\), expected \(h, p\) with p = 6 .*Or give one a head"),
    ({"initial_state": X["initial_state"].bfloat16()}, TypeError, "initial_state is bfloat16.*does not drift"),
    ({"initial_state": X["initial_state"][:1]}, ValueError, r"n_seq = 2 \(set by the number of sequences\)"),
    ({"dt_limit": (2.0, 1.0)}, ValueError, r"dt_limit is \(2.0, 1.0\), expected two numbers"),
    ({"dt_limit": (float("nan"), 1.0)}, ValueError, "dt_limit is .*expected two numbers"),
    ({"dt_limit": 3}, ValueError, "dt_limit is 3, expected two numbers"),
    ({"lengths": [1, 2], "cu_seqlens": torch.tensor([0, 12])}, ValueError, "lengths and cu_seqlens were both given"),
    ({"backend": "tpu"}, ValueError, "expected one of 'gpu', 'cpu', 'chunked', 'reference' or None"),
    ({"x": X["x"].to("meta")}, ValueError, "dt is on cpu, x is on meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_bad_input_gets_one_clear_error(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^ssd: .*" + message):
        ops.ssd(**(X | change))


def test_explain_says_which_form_runs() -> None:
    assert backends.explain(ops.ssd, X["x"]).name == ("cpu" if "cpu" in BACKENDS else "chunked")
    with pytest.raises(ValueError, match="backend is 'chunked', expected one of 'gpu', 'cpu', 'reference'"):
        backends.choose("selective_scan", "cpu", "chunked")


def test_a_step_between_forward_and_backward_is_refused() -> None:
    x = plain()
    x["dt"].requires_grad_()
    y, _ = ops.ssd(**x)
    token = {k: v.detach() for k, v in cut(x, 0).items()}
    ops.ssd_step_(token.pop("initial_state"), **token)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_soak_of_a_quarter_million_steps() -> None:
    """bfloat16 data through many calls: no NaN, and the state stays as near float64's as it began."""
    steps = 250_000 if "cpu" in BACKENDS else 20_000
    state, exact = None, None
    A = -torch.tensor([0.5, 16.0])
    for i in range(10):
        torch.manual_seed(i)
        x, dt, B, C = (leaf((1, steps // 10, *w), torch.bfloat16) for w in ((2, 3), (2,), (4,), (4,)))
        y, state = ops.ssd(x, dt, A, B, C, dt_softplus=True, initial_state=state)
        wide = (x.double(), dt.double(), A.double(), B.double(), C.double())
        y64, exact = ops.ssd(*wide, dt_softplus=True, initial_state=exact)
        assert y.isfinite().all()
        close("y", y, y64, torch.bfloat16)
    assert (state.double() - exact).abs().max() / exact.abs().max() < BOUND[torch.float32]


# ---- what the C++ library promises beside right values ---------------------------------------------------------------

needs_native = pytest.mark.skipif("cpu" not in BACKENDS, reason="no C++ library")
NATIVE = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")


def native(x: dict[str, Tensor], table: Tensor | None = None, reverse: bool = False) -> list[Tensor]:
    """Every result of the C++ kernels: y, state, decay and nine gradients."""
    from stateline.ops.ssd import cpu

    args = (*(x[k] for k in NATIVE), True, 0.0, 3.0, x["initial_state"], table, reverse)
    results = cpu.forward(*args)
    return [*results, *cpu.backward(*results, *args)]


@needs_native
def test_threads_do_not_change_bits() -> None:
    x, before = plain(t=200, h=9, p=16, n=32, g=2), torch.get_num_threads()
    library = backends.load_native()
    try:
        torch.set_num_threads(1)
        want = native(x)
        for own in (0, 1):
            library.sl_use_own_threads(own)
            for threads in (2, 5):
                torch.set_num_threads(threads)
                for a, b in zip(want, native(x), strict=True):
                    assert torch.equal(a, b)
    finally:
        library.sl_use_own_threads(0)
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize(("h", "p", "n", "g"), [(3, 5, 7, 2), (6, 16, 16, 1), (1, 33, 4, 1)])
def test_guards_stay_untouched(h: int, p: int, n: int, g: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs and outputs inside larger buffers of NaN: what lies around them is neither read nor written."""
    from stateline.ops.ssd import cpu

    empty, guards = torch.empty, []

    def fenced(*shape: Any, dtype: torch.dtype = torch.float32, **rest: Any) -> Tensor:
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = torch.Size(shape).numel()
        buffer = empty(count + 128, dtype=dtype, **rest).fill_(float("nan"))
        buffer[:64], buffer[64 + count :] = -77.0, -77.0
        guards.append((buffer[:64], buffer[64 + count :]))
        return buffer[64 : 64 + count].view(shape)

    x = plain(t=35, h=h, p=p, n=n, g=g, D="channel")
    want = native(x)
    monkeypatch.setattr(torch, "empty", fenced)
    x = {k: fenced(v.shape, dtype=v.dtype).copy_(v) for k, v in x.items()}
    for got, same_values in zip(native(x), want, strict=True):
        assert torch.equal(got, same_values)
    token = [v[:, 0] if k in TOKENS else v for k, v in ((k, x[k]) for k in NATIVE)]
    slots = fenced((2, h, p, n)).copy_(x["initial_state"])
    assert cpu.step(slots, *token, True, 0.0, 3.0, None).isfinite().all()
    assert slots.isfinite().all()
    assert len(guards) > 15
    assert all((side == -77.0).all() for pair in guards for side in pair)


@needs_native
def test_wrong_segments_and_slots_are_refused() -> None:
    from stateline.ops.ssd import cpu

    x = plain(t=4)
    for bad in ([0, 0, 5], [2, 0, 1], [0, -1, 2], [0, 3, 2], [-1, 0, 1]):
        with pytest.raises(ValueError, match="segment"):
            native(x | {"initial_state": x["initial_state"][:1]}, torch.tensor([bad]))
    token = [v[:, 0] if k in TOKENS else v for k, v in ((k, x[k]) for k in NATIVE)]
    with pytest.raises(ValueError, match="index"):
        cpu.step(x["initial_state"], *token, True, 0.0, 3.0, torch.tensor([0, 2]))
