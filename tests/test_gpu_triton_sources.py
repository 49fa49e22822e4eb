"""Triton kernels without a device: each compiles for every architecture, and its tiles fit into shared memory."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from stateline.ops import cuda

# Bytes of shared memory that a block may have: A100, RTX 3090, RTX 4090, H100, RTX 5090.
DEVICES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 120: 101376}
KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64", torch.float64: "fp64", torch.int32: "i32"}


def compiled(arch: int, function: Any, arguments: tuple[Any, ...], constants: tuple[Any, ...], warps: int) -> int:
    """Shared memory that a kernel takes, compiled as a launch of these (meta) tensors would be."""
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds: dict[str, str] = {}
    fixed: dict[str, Any] = {}
    aligned = {}
    for i, (name, x) in enumerate(zip(function.arg_names, (*arguments, *constants), strict=True)):
        if i >= len(arguments) or x is None:
            kinds[name], fixed[name] = "constexpr", x
            continue
        kinds[name] = "*" + KINDS[x.dtype] if isinstance(x, torch.Tensor) else "fp32" if isinstance(x, float) else "i32"
        free = function.params[i].do_not_specialize
        if isinstance(x, torch.Tensor) or (isinstance(x, int) and x % 16 == 0 and not free):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, kinds, fixed, aligned)
    built = build(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    return int(built.metadata.shared)


@pytest.fixture
def taken(arch: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Shared memory of each kernel, which is compiled instead of launched."""
    from stateline.ops.ssd import gpu

    found: dict[str, int] = {}

    def launch(self: Any, grid: Any, arguments: Any, constants: Any, warps: int) -> None:
        name = self._function.__name__
        found[name] = max(found.get(name, 0), compiled(arch, self._function, arguments, constants, warps))

    monkeypatch.setattr(cuda.Kernel, "__call__", launch)
    monkeypatch.setattr(gpu, "_memory", lambda _: DEVICES[arch])
    return found


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.full
@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", DEVICES)
def test_ssd_compiles_and_fits(arch: int, dtype: torch.dtype, taken: dict[str, int]) -> None:
    from stateline.ops.ssd import gpu

    b, t, h, p, n = 2, 256, 20, 64, 128
    with torch.device("meta"):
        x, B = torch.empty(b, t, h, p, dtype=dtype), torch.empty(b, t, 1, n, dtype=dtype)
        dt, A, state = torch.empty(b, t, h, dtype=dtype), torch.empty(h), torch.empty(b, h, p, n)
        inputs = (x, dt, A, B, B, A, x, A, True, 0.0, 1.0, state, None, False)
        gpu.forward(*inputs)
        gpu.backward(x, state, torch.empty(b, h), *inputs)
        gpu.step(state, *(v[:, 0] for v in (x, dt)), A, B[:, 0], B[:, 0], A, None, A, True, 0.0, 1.0, None)
    assert set(taken) >= {"prepare", "sweep", "combine", "outputs", "inputs", "projections", "finish", "add", "step"}
    assert max(taken.values()) <= DEVICES[arch], taken


@pytest.mark.full
@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", DEVICES)
def test_trapezoid_ssd_compiles_and_fits(arch: int, dtype: torch.dtype, taken: dict[str, int]) -> None:
    from stateline.ops.trapezoid_ssd import gpu

    b, t, h, p, n, s = 2, 256, 4, 64, 128, 32
    with torch.device("meta"):
        x, B, bias = torch.empty(b, t, h, p, dtype=dtype), torch.empty(b, t, 1, 1, n, dtype=dtype), torch.empty(h, 1, n)
        dt, rates, D = torch.empty(b, t, h), torch.empty(b, t, s), torch.empty(h)
        state = (torch.empty(b, h, s), torch.empty(b, h, p, n), torch.empty(b, h, 1, n), torch.empty(b, h, p))
        inputs = (x, dt, dt, dt, B, B, rates, bias, bias, None, D, x, None, None, True)
        y, _, ssm, k, _, *kept = gpu.forward_kept(*inputs, *state, None, False)
        gpu.backward(y, *state, *inputs, *state, None, False)
        gpu.backward(y, *state, *inputs, *state, None, False, kept=(*kept, ssm, k))
        token = [v[:, 0] if v is not None and v.dim() > 2 and v is not bias else v for v in inputs[:14]]
        gpu.step(*state, *token, True, None)
    before = {"prepare", "spans", "wind", "follow", "sweep", "combine", "outputs", "step"}
    before.add("gather" if dtype == torch.bfloat16 else "turn")
    assert set(taken) == before | {"unmoved", "inputs", "projections", "unturn", "finish", "reduce"}
    assert max(taken.values()) <= DEVICES[arch], taken


@pytest.mark.full
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("arch", DEVICES)
def test_gated_scan_compiles(arch: int, dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from stateline.ops.gated_scan import gpu

    taken: dict[str, int] = {}

    def launch(self: Any, grid: Any, arguments: Any, constants: Any, warps: int) -> None:
        taken[self._function.__name__] = compiled(arch, self._function, arguments, constants, warps)

    monkeypatch.setattr(cuda.Kernel, "__call__", launch)
    with torch.device("meta"):
        v, A = torch.empty(2, 64, 128, dtype=torch.bfloat16), torch.empty(128, 128) if dense else torch.empty(128)
        h, state, table = torch.empty(2, 64, 128), torch.empty(3, 128), torch.empty(3, 3, dtype=torch.int64)
        gpu.forward(v, v, A, "tanh", state, table, False)
        gpu.backward(h, state, h, v, v, A, "tanh", table, True)
        gpu.step(state, v[:, 0], v[:, 0], A, "sigmoid", None)
        gpu.forward(v, v, A, "identity", state, table, False)
        gpu.backward(h, state, h, v, v, A, "identity", table, True)
    assert set(taken) >= {"forward", "backward", "step", *([] if dense else ["linear_forward", "linear_backward"])}
    assert max(taken.values()) <= DEVICES[arch], taken


@pytest.mark.full
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("constant", [False, True])
def test_linear_scan_compiles(dtype: torch.dtype, constant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from stateline.ops.linear_scan import gpu

    taken: dict[str, int] = {}

    def launch(self: Any, grid: Any, arguments: Any, constants: Any, warps: int) -> None:
        taken[self._function.__name__] = compiled(90, self._function, arguments, constants, warps)

    monkeypatch.setattr(cuda.Kernel, "__call__", launch)
    wide = dtype if dtype.is_complex else torch.float32
    with torch.device("meta"):
        b, state = torch.empty(2, 1000, 256, dtype=dtype), torch.empty(2, 256, dtype=wide)
        a, table = torch.empty(256 if constant else b.shape, dtype=wide), torch.empty(2, 3, dtype=torch.int64)
        for segments, start in ((None, state), (table, state), (None, None)):
            gpu.forward(a, b, start, segments, False)
            gpu.backward(b, state, a, b, b, start, segments, True)
        gpu.step(state, a if constant else a[:, 0], b[:, 0], None)
    assert set(taken) == {"summarise", "carry", "forward", "backward", "step"} | ({"reduce"} if constant else set())


@pytest.mark.full
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("arch", DEVICES)
def test_s4_kernel_compiles_and_fits(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from stateline.ops.s4_kernel import gpu

    taken: dict[str, int] = {}

    def launch(self: Any, grid: Any, arguments: Any, constants: Any, warps: int) -> None:
        taken[self._function.__name__] = compiled(arch, self._function, arguments, constants, warps)

    monkeypatch.setattr(cuda.Kernel, "__call__", launch)
    with torch.device("meta"):
        c, z = torch.empty(1, 4, 32, dtype=torch.complex64), torch.empty(4, 32, dtype=torch.complex128)
        gpu.forward(c, z, 1024)
        gpu.backward(torch.empty(1, 4, 1024), c, z)
        real = torch.empty(4, 4, 32, dtype=torch.float64)
        inputs = (real, real, real[0], real[0], *(torch.empty(513, dtype=torch.float64) for _ in "sc"))
        gpu.cauchy(*inputs)
        gpu.cauchy_backward(torch.empty(4, 4, 513, 2, dtype=torch.float64), *inputs)
    assert set(taken) == {"forward", "backward", "cauchy", "cauchy_backward"}
    assert max(taken.values()) <= DEVICES[arch], taken


@pytest.mark.full
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("arch", DEVICES)
def test_s4_scan_compiles_and_fits(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from stateline.ops.s4_scan import gpu

    taken: dict[str, int] = {}

    def launch(self: Any, grid: Any, arguments: Any, constants: Any, warps: int) -> None:
        taken[self._function.__name__] = compiled(arch, self._function, arguments, constants, warps)

    monkeypatch.setattr(cuda.Kernel, "__call__", launch)
    with torch.device("meta"):
        u, h, n = torch.empty(2, 200, 16, dtype=torch.bfloat16), 16, 32
        A, C = torch.empty(h, n, dtype=torch.complex128), torch.empty(1, h, n, dtype=torch.complex128)
        D = torch.empty(1, h, dtype=torch.float64)
        state, pairs = torch.empty(2, h, 2 * n), torch.empty(1, h, n, 2)
        learned = (torch.empty(h, 1), torch.empty(h, n), torch.empty(h, n), pairs, pairs, D.float(), 1.0, False)
        for q in (16, 64):
            made = gpu.tables(A, A, C, D, q)
            gpu.tables_backward(*made, A, A, C, D)
            gpu.system_backward(*gpu.system(*learned, q), *learned)
            gpu.forward(u, *made, state, None, False)
            gpu.backward(u[:, :, None], state, u, *made, state, None, True)
        gpu.step(state, u[:, 0], pairs[0], pairs[0], pairs, D, None)
    products = {"project", "outputs", "inputs", "outer", "taps_back"}
    assert set(taken) == products | {"pack", "unpack", "advance", "retreat", "powers_back", "step"} | {
        "sample", "sample_back", "tables", "tables_back",
    }  # fmt: skip
    assert max(taken.values()) <= DEVICES[arch], taken
