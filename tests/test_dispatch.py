"""How ops reach PyTorch's machinery: modes, tensor subclasses and traces see them; second derivatives are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_ops import FLAG, leaf, plain_scan
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from stateline import backends, ops
from stateline.nn import Mamba
from stateline.ops.causal_conv1d import conv_halves

W, TAPS3 = torch.rand(8, dtype=torch.float64), torch.rand(8, 3, dtype=torch.float64)
DIFFERENTIABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "causal_conv1d": lambda x: ops.causal_conv1d(x, TAPS3, activation="silu")[0].sum(),
    "conv_halves": lambda x: sum(y.sum() for y in conv_halves(x, TAPS3[:4], None)),  # type: ignore[arg-type, return-value]  # a sum
    "selective_scan": lambda x: ops.selective_scan(x, x.abs(), -TAPS3, x[..., :3], x[..., 3:6])[0].sum(),
    "ssd": lambda x: ops.ssd(x[..., None, :2], x[..., :1].abs(), -W[:1], x[..., :3], x[..., 3:6])[0].sum(),
    "gated_scan": lambda x: ops.gated_scan(x, x, TAPS3 @ TAPS3.T / 9, activation="tanh")[0].sum(),
    "rms_norm": lambda x: ops.rms_norm(x, W)[0].sum(),
    "cross_entropy": lambda x: ops.cross_entropy(x.flatten(0, 1), torch.arange(4)).sum(),
    "Mamba": Mamba(8).double(),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_second_derivative_is_refused_however_it_is_asked_for(name: str) -> None:
    """Also where the incoming gradient is a constant, as that of a sum."""
    run, x = DIFFERENTIABLE[name], torch.rand(1, 4, 8, dtype=torch.float64)
    total = lambda v: run(v).sum()  # noqa: E731
    refused = pytest.raises(RuntimeError, match="a second derivative was asked for, it has first ones only")
    with refused:
        torch.autograd.functional.hessian(total, x)
    with refused:
        torch.func.jacrev(torch.func.jacrev(total))(x)
    v = x.requires_grad_()
    (g,) = torch.autograd.grad(total(v), v, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(total(v), v)[0], g)
    penalty = g.square().sum() + v.sum()
    with refused:
        penalty.backward()


def test_raw_ops_stay_visible_to_whoever_looks() -> None:
    """Modes, fake tensors and the profiler see each op, although nothing else makes it pass the dispatcher."""
    x, weight = leaf((2, 5), torch.float32), leaf((5,), torch.float32)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        ops.rms_norm(x, weight.requires_grad_())[0].sum().backward()
    assert {"stateline.rms_norm.default", "stateline.rms_norm_backward.default"} <= set(seen)
    with FakeTensorMode() as mode:
        y, _ = ops.rms_norm(mode.from_tensor(x), mode.from_tensor(weight))
    assert isinstance(y, FakeTensor)
    with torch.profiler.profile() as profile:
        ops.rms_norm(x, weight)
    assert "stateline::rms_norm" in {event.key for event in profile.key_averages()}
    with torch.no_grad():
        trace = torch.jit.trace(lambda *v: ops.rms_norm(*v)[0], (x, weight), check_trace=False)
    assert "stateline::rms_norm" in str(trace.graph)


def _with_each_argument() -> Iterator[Any]:
    x = plain_scan()
    token = {k: v[:, 0] if k in ("u", "dt", "B", "C", "z") else v for k, v in x.items()}
    token["state"] = token.pop("initial_state")
    taps = {
        "x": leaf((2, 6, 4), torch.float32),
        "weight": leaf((4, 3), torch.float32),
        "bias": leaf((4,), torch.float32),
    }
    state = leaf((2, 2, 4), torch.float32)
    norm = {"x": taps["x"], "weight": taps["bias"], "residual": taps["x"]}
    loss = {"logits": leaf((2, 5), torch.float32), "targets": torch.tensor([1, 4])}
    for op, arguments in (
        (ops.selective_scan, x),
        (ops.selective_scan_step_, token | {"index": torch.tensor([1, 0])}),
        (ops.causal_conv1d, taps | {"initial_state": state}),
        (ops.causal_conv1d_step_, taps | {"x": taps["x"][:, 0], "state": state, "index": torch.tensor([1, 0])}),
        (ops.rms_norm, norm),
        (ops.cross_entropy, loss),
    ):
        for name in arguments:
            yield pytest.param(op, arguments, name, id=f"{op.__name__}-{name}")


@pytest.mark.parametrize(("op", "arguments", "name"), list(_with_each_argument()))
def test_a_tensor_with_a_way_of_its_own_is_not_read_as_memory(op: Any, arguments: dict[str, Any], name: str) -> None:
    """Wrappers (DTensor, TwoTensor) have none: whatever argument is one, the dispatcher asks it."""
    plain, wrapped = ({k: v.clone() for k, v in arguments.items()} for _ in range(2))
    wrapped[name] = TwoTensor(wrapped[name], wrapped[name].clone())
    with torch.no_grad():
        wanted, got = op(**plain), op(**wrapped)
    for a, b in zip(*((v,) if isinstance(v, Tensor) else v for v in (got, wanted)), strict=True):
        assert isinstance(a, TwoTensor)
        assert torch.equal(a.a, b)


@pytest.mark.parametrize("grad", FLAG)
def test_a_trace_holds_the_op_and_not_its_result(grad: bool) -> None:
    x = plain_scan()
    run = lambda u: ops.selective_scan(**(x | {"u": u}))[0]  # noqa: E731
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(run, (x["u"],), check_trace=False)
        torch.testing.assert_close(traced(3 * x["u"]), run(3 * x["u"]))


def test_a_gated_norm_has_no_kernel_on_a_cpu_and_says_so() -> None:
    x = torch.ones(2, 4)
    assert backends.explain(ops.gated_rms_norm, x, x, x[0]).name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing faster is missing
        ops.gated_rms_norm(x, x, x[0])
    with pytest.raises(ValueError, match="backend is 'cpu', expected one of 'gpu', 'reference' or None"):
        ops.gated_rms_norm(x, x, x[0], backend="cpu")
