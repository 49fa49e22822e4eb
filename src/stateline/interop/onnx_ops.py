"""Our operations in plain ONNX operators, so that a model runs wherever ONNX does, without our code.

selective_scan and ssd become one Scan each: the recurrence itself, token after token. Forms that work on all tokens at
once divide by products of decays, which underflow at large dt·A; here every decay is exp of a number ≤ 0, so nothing
overflows however long the input or large the step. causal_conv1d and rms_norm become a grouped Conv and a mean of
squares.

Suffixes: b batch, t time step, d channel, n state, g group, k taps, h head, p head width.
"""

# No `from __future__ import annotations` here: onnxscript reads those of the recurrence as objects.
import functools
import math
from collections.abc import Callable
from typing import Any, no_type_check

import torch

from stateline import checks

OP = "export_model"
OPSET = 18
EXTRA = 'ONNX export needs onnx, onnxscript and onnxruntime: pip install "stateline[onnx]".'

Translation = Callable[..., Any]


@functools.cache
def translations() -> dict[Callable[..., Any], Translation]:
    """torch operation -> the function that writes it in ONNX, as `torch.onnx.export(custom_translation_table=)` takes.

    Raises ImportError naming the extra if onnxscript is not installed.
    """
    import stateline.ops  # noqa: F401  # defines the operations

    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{OP}: {EXTRA} ({error})") from error
    raw = torch.ops.stateline
    return {
        raw.selective_scan.default: _selective_scan,
        raw.ssd.default: _ssd,
        raw.causal_conv1d.default: _causal_conv1d,
        raw.rms_norm.default: _rms_norm,
    }


def check_translatable(graph: torch.fx.Graph) -> None:
    """Raise ValueError naming the first operation of an exported graph that these translations cannot express."""
    known = translations()
    for node in graph.nodes:
        target = node.target
        if node.op != "call_function" or getattr(target, "namespace", None) != "stateline":
            continue
        if target not in known:
            raise checks.fail(OP, f"{target.name()} has no translation to ONNX.", 'Use to="export".')
        given = dict(zip((a.name for a in target._schema.arguments), node.args, strict=False)) | dict(node.kwargs)
        if given.get("segments") is not None:
            raise checks.fail(OP, f"{target.name()} with lengths or cu_seqlens has no translation to ONNX.")
        for name, value in given.items():
            data = value.meta.get("val") if isinstance(value, torch.fx.Node) else None
            if isinstance(data, torch.Tensor) and data.dtype != torch.float32:
                raise checks.fail(
                    OP, f"{target.name()}: {name} is {data.dtype}, ONNX models are float32.", "Export model.float()."
                )


def tidy(model: Any) -> None:
    """Name the free sizes of an exported ONNX model, and take out its notes, which hold paths of this machine."""
    ids = model.graph.inputs[0]
    free = dict(zip((str(size) for size in ids.shape), ("batch", "time"), strict=True))
    seen = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        seen += [node.graph, *node.outputs]
    for item in seen:
        item.metadata_props.clear()
        for axis, size in enumerate(getattr(item, "shape", None) or ()):
            if str(size) in free:
                item.shape[axis] = free[str(size)]


def _op() -> Any:
    from onnxscript import opset18

    return opset18


@functools.cache
@no_type_check  # the annotations inside are ONNX's, which onnxscript reads
def _recurrence() -> Any:
    """h[t] = exp(dt[t] A) h[t-1] + v[t] B[t], y[t] = C[t]·h[t] as an ONNX function."""
    from onnxscript import FLOAT, graph, script
    from onnxscript import opset18 as op
    from onnxscript.values import Opset

    stateline_opset = Opset("stateline", 1)

    @script(stateline_opset, default_opset=op)
    def selective_scan(
        h: FLOAT[None, None, None],
        dt: FLOAT[None, None, None],
        v: FLOAT[None, None, None],
        A: FLOAT[None, None],
        B: FLOAT[None, None, None, None],
        C: FLOAT[None, None, None, None],
    ) -> tuple[FLOAT[None, None, None], FLOAT[None, None, None]]:
        @graph()
        def step(
            h_bdn: FLOAT[None, None, None],
            dt_bd: FLOAT[None, None],
            v_bd: FLOAT[None, None],
            B_bdn: FLOAT[None, None, None],
            C_bdn: FLOAT[None, None, None],
        ) -> tuple[FLOAT[None, None, None], FLOAT[None, None]]:
            last = op.Constant(value_ints=[-1])
            decay = op.Exp(op.Mul(op.Unsqueeze(dt_bd, last), A))
            h_new = op.Add(op.Mul(decay, h_bdn), op.Mul(op.Unsqueeze(v_bd, last), B_bdn))
            y_bd = op.ReduceSum(op.Mul(h_new, C_bdn), last, keepdims=0)
            return h_new, y_bd

        h_end, y = op.Scan(
            h, dt, v, B, C, body=step, num_scan_inputs=4, scan_input_axes=[1, 1, 1, 1], scan_output_axes=[1]
        )
        return y, h_end

    return selective_scan


def _selective_scan(
    u: Any, dt: Any, A: Any, B: Any, C: Any, D: Any = None, z: Any = None, dt_bias: Any = None,
    dt_softplus: bool = False, initial_state: Any = None, segments: Any = None, reverse: bool = False,
    backend: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """The raw operation's arguments -> y (b, t, d), state (b, d, n)."""
    op, (d, n) = _op(), A.shape
    dt = dt if dt_bias is None else op.Add(dt, dt_bias)
    dt = _softplus(dt) if dt_softplus else dt
    B, C = (_per_token(x, u, d) for x in (B, C))
    v = op.Mul(dt, u)
    initial_state = _zeros(u, d, n) if initial_state is None else initial_state
    if reverse:
        dt, v, B, C = (_flip(x) for x in (dt, v, B, C))
    y, state = _recurrence()(initial_state, dt, v, A, B, C)
    return _finish(y, u, D, z, reverse), state


@functools.cache
@no_type_check
def _head_recurrence() -> Any:
    """S[t] = decay[t] S[t-1] + v[t]⊗B[t], y[t] = S[t] C[t] as an ONNX function."""
    from onnxscript import FLOAT, graph, script
    from onnxscript import opset18 as op
    from onnxscript.values import Opset

    stateline_opset = Opset("stateline", 1)

    @script(stateline_opset, default_opset=op)
    def ssd(
        S: FLOAT[None, None, None, None],
        decay: FLOAT[None, None, None],
        v: FLOAT[None, None, None, None],
        B: FLOAT[None, None, None, None],
        C: FLOAT[None, None, None, None],
    ) -> tuple[FLOAT[None, None, None, None], FLOAT[None, None, None, None]]:
        @graph()
        def step(
            S_bhpn: FLOAT[None, None, None, None],
            decay_bh: FLOAT[None, None],
            v_bhp: FLOAT[None, None, None],
            B_bhn: FLOAT[None, None, None],
            C_bhn: FLOAT[None, None, None],
        ) -> tuple[FLOAT[None, None, None, None], FLOAT[None, None, None]]:
            last = op.Constant(value_ints=[-1])
            two = op.Constant(value_ints=[-2, -1])
            drive = op.Mul(op.Unsqueeze(v_bhp, last), op.Unsqueeze(B_bhn, op.Constant(value_ints=[-2])))
            S_new = op.Add(op.Mul(op.Unsqueeze(decay_bh, two), S_bhpn), drive)
            y_bhp = op.ReduceSum(op.Mul(S_new, op.Unsqueeze(C_bhn, op.Constant(value_ints=[-2]))), last, keepdims=0)
            return S_new, y_bhp

        S_end, y = op.Scan(
            S, decay, v, B, C, body=step, num_scan_inputs=4, scan_input_axes=[1, 1, 1, 1], scan_output_axes=[1]
        )
        return y, S_end

    return ssd


def _ssd(
    x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any = None, z: Any = None, dt_bias: Any = None,
    dt_softplus: bool = False, dt_low: float = -math.inf, dt_high: float = math.inf, initial_state: Any = None,
    segments: Any = None, reverse: bool = False, backend: Any = None,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """The raw operation's arguments -> y (b, t, h, p), state (b, h, p, n), decay (b, h)."""
    op, (h, p), n = _op(), x.shape[2:], B.shape[3]
    dt = dt if dt_bias is None else op.Add(dt, dt_bias)
    dt = _softplus(dt) if dt_softplus else dt
    dt = dt if dt_low == -math.inf else op.Max(dt, op.Constant(value_float=dt_low))
    dt = dt if dt_high == math.inf else op.Min(dt, op.Constant(value_float=dt_high))
    B, C = (_per_token(v, x, h) for v in (B, C))
    v, decay = op.Mul(op.Unsqueeze(dt, _ints(-1)), x), op.Exp(op.Mul(dt, A))
    initial_state = _zeros(x, h, p, n) if initial_state is None else initial_state
    if reverse:
        decay, v, B, C = (_flip(w) for w in (decay, v, B, C))
    y, state = _head_recurrence()(initial_state, decay, v, B, C)
    D = D if D is None or len(D.shape) == 2 else op.Unsqueeze(D, _ints(-1))
    whole = op.Exp(op.Mul(op.ReduceSum(dt, _ints(1), keepdims=0), A))
    return _finish(y, x, D, z, reverse), state, whole


def _finish(y: Any, u: Any, D: Any, z: Any, reverse: bool) -> Any:
    """(y + D u) · silu(z) of a recurrence's output, which ran backwards if `reverse`."""
    op = _op()
    y = _flip(y) if reverse else y
    y = y if D is None else op.Add(y, op.Mul(D, u))
    return y if z is None else op.Mul(y, op.Mul(z, op.Sigmoid(z)))


def _zeros(like: Any, *shape: int) -> Any:
    """Zeros (b, *shape) for the batch of another tensor."""
    op = _op()
    b = op.Shape(like, start=0, end=1)
    return op.Expand(op.Constant(value_float=0.0), op.Concat(b, _ints(*shape), axis=0))


def _per_token(x: Any, u: Any, d: int) -> Any:
    """B or C as (b or 1, t, d or 1, n): constants repeated over time, groups over their channels."""
    op = _op()
    if len(x.shape) == 2:
        shape = op.Concat(_ints(1), op.Shape(u, start=1, end=2), _ints(*x.shape), axis=0)
        return op.Expand(x, shape)
    g = x.shape[2]
    return x if g == 1 else op.Gather(x, _ints(*(i * g // d for i in range(d))), axis=2)


def _causal_conv1d(
    x: Any, weight: Any, bias: Any = None, silu: bool = False, initial_state: Any = None, segments: Any = None,
    reverse: bool = False, backend: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """The raw operation's arguments -> y (b, t, d), state (b, k-1, d)."""
    op, (d, k) = _op(), weight.shape
    initial_state = _zeros(x, k - 1, d) if initial_state is None else initial_state
    padded = op.Concat(initial_state, _flip(x) if reverse else x, axis=1)
    taps = op.Unsqueeze(weight, _ints(1))
    y = op.Conv(op.Transpose(padded, perm=[0, 2, 1]), *([taps] if bias is None else [taps, bias]), group=d)
    y = op.Transpose(y, perm=[0, 2, 1])
    y = _flip(y) if reverse else y
    ends = op.Shape(padded, start=1, end=2)
    state = op.Slice(padded, op.Sub(ends, _ints(k - 1)), ends, _ints(1))
    return op.Mul(y, op.Sigmoid(y)) if silu else y, state


def _rms_norm(
    x: Any, weight: Any, residual: Any, eps: float, residual_dtype: Any, backend: Any = None
) -> tuple[Any, Any]:
    """The raw operation's arguments -> y, h (…, d), all float32."""
    op = _op()
    h = op.Identity(x) if residual is None else op.Add(x, residual)
    mean = op.ReduceMean(op.Mul(h, h), _ints(-1), keepdims=1)
    scale = op.Sqrt(op.Add(mean, op.Constant(value_float=float(eps))))
    return op.Mul(op.Div(h, scale), weight), h


def _softplus(x: Any) -> Any:
    """log(1 + exp(x)) without overflow, and without losing small values to the 1, as the definition has it.

    ONNX has no log1p; log(w)·e/(w−1) with w = 1 + e is exact where w is rounded, since both factors share the error.
    """
    op = _op()
    one = op.Constant(value_float=1.0)
    e = op.Exp(op.Neg(op.Abs(x)))
    w = op.Add(one, e)
    lost = op.Equal(w, one)
    ratio = op.Div(op.Mul(op.Log(w), e), op.Where(lost, one, op.Sub(w, one)))
    return op.Add(op.Relu(x), op.Where(lost, e, ratio))


def _ints(*values: int) -> Any:
    return _op().Constant(value_ints=list(values))


def _flip(x: Any) -> Any:
    """x (b, t, …) backwards in time."""
    return _op().Slice(x, _ints(-1), _ints(torch.iinfo(torch.int64).min), _ints(1), _ints(-1))
