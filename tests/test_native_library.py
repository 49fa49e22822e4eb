"""What the C++ library promises beside right values: same bits on any threads, no write outside, accuracy, forks."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from native_cases import conv, conv_inputs, scan, scan_inputs
from torch import Tensor

from stateline.backends import load_native, native_problem
from stateline.ops.rms_norm import cpu as norm

pytestmark = pytest.mark.skipif(native_problem() is not None, reason=f"no C++ library: {native_problem()}")


# ---- what the library promises --------------------------------------------------------------------


def big_results(b: int = 2) -> list[Tensor]:
    """Enough work that threads really run."""
    torch.manual_seed(7)
    inputs = scan_inputs(b=3, t=200, d=300, n=16)
    for i in (0, 1, 3, 4, 6, 9):
        inputs[i] = inputs[i][:b].contiguous()
    y, state = scan.forward(*inputs, None, False)
    out = [y, state, *scan.backward(y, state, *inputs, None, False)]
    c = conv_inputs(b=3, t=900, d=300)
    c[0], c[4] = c[0][:b].contiguous(), c[4][:b].contiguous()
    cy, cs = conv.forward(*c, None, False)
    out += [cy, *conv.backward(cy, cs, *c, None, False)]
    x = cy.reshape(-1, 300)
    ny, nh = norm.forward(x, c[2], x, 1e-5, torch.float32)
    return [*out, ny, *norm.backward(ny, nh, nh, c[2], 1e-5, torch.float32, torch.float32)]


def test_threads_do_not_change_bits():
    library, before = load_native(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = big_results()
        for own in (0, 1):
            library.sl_use_own_threads(own)
            for threads in (2, 3, 7):
                torch.set_num_threads(threads)
                for a, b in zip(want, big_results(), strict=True):
                    assert torch.equal(a, b)
    finally:
        library.sl_use_own_threads(0)
        torch.set_num_threads(before)


def test_rows_do_not_depend_on_the_batch():
    alone, together = big_results(1), big_results(3)
    per_row = (0, 1, 2, 3, 5, 6, 8, 10, 11, 12)  # y, state, du, ddt, dB, dC, dz, dinitial; conv y, dx
    for i in per_row:
        assert torch.equal(alone[i][0], together[i][0]), i


def test_guards_stay_untouched():
    """Inputs and outputs inside larger buffers: what lies around them is neither read into results nor written."""
    empty, guards = torch.empty, []

    def fenced(*shape, dtype=torch.float32, **rest):
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = torch.Size(shape).numel()
        buffer = empty(count + 128, dtype=dtype, **rest).fill_(float("nan"))
        buffer[:64], buffer[64 + count :] = -77.0, -77.0
        guards.append((buffer[:64], buffer[64 + count :]))
        return buffer[64 : 64 + count].view(shape)

    patch = pytest.MonkeyPatch()
    patch.setattr(torch, "empty", fenced)
    try:
        for d, n in ((3, 5), (17, 16), (70, 4)):
            inputs = scan_inputs(t=35, d=d, n=n)
            inputs = [fenced(x.shape, dtype=x.dtype).copy_(x) if isinstance(x, Tensor) else x for x in inputs]
            y, state = scan.forward(*inputs, None, False)
            outs = [y, state, *scan.backward(y, state, *inputs, None, False)]
            c = [fenced(x.shape, dtype=x.dtype).copy_(x) if isinstance(x, Tensor) else x for x in conv_inputs(d=d)]
            y, state = conv.forward(*c, None, False)
            outs += [y, state, *conv.backward(y, state, *c, None, False)]
            y, h = norm.forward(c[0], c[2], c[0], 1e-5, torch.bfloat16)
            outs += [y, h, *norm.backward(y, h, h, c[2], 1e-5, torch.float32, torch.bfloat16)]
            assert all(torch.isfinite(x).all() for x in outs)
    finally:
        patch.undo()
    assert len(guards) > 60
    assert all((side == -77.0).all() for pair in guards for side in pair)


def test_wrong_segments_are_refused():
    inputs = scan_inputs(t=4, d=3, n=2, sequences=1)
    for bad in ([0, 0, 5], [2, 0, 1], [0, -1, 2], [0, 3, 2], [-1, 0, 1]):
        with pytest.raises(ValueError, match="segment"):
            scan.forward(*inputs, torch.tensor([bad]), False)
        with pytest.raises(ValueError, match="segment"):
            conv.forward(*conv_inputs(t=4, sequences=1), torch.tensor([bad]), False)


def test_half_precision_data_is_computed_in_float32():
    inputs = scan_inputs()
    half = [x.half() if i in (0, 1, 3, 4, 6) else x for i, x in enumerate(inputs)]
    y, _ = scan.forward(*half, None, False)
    assert y.dtype == torch.float16
    want, _ = scan.forward(*[x.float() if i in (0, 1, 3, 4, 6) else x for i, x in enumerate(half)], None, False)
    assert torch.equal(y, want.half())
    assert scan.backward(y, inputs[9], *half, None, False)[0].dtype == torch.float16


# ---- vector functions -----------------------------------------------------------------------------

FUNCTIONS = [
    "exp2",
    "exp",
    "softplus",
    "sigmoid_of_softplus",
    "sigmoid",
    "silu",
    "silu_slope",
    "cos",
    "sin",
    "log1p",
    "bfloat16",
]


def probe(function: str, x: Tensor) -> Tensor:
    out = torch.full_like(x, float("nan"))
    record = (ctypes.c_int64 * 5)(
        FUNCTIONS.index(function), x.dtype == torch.float64, x.numel(), x.data_ptr(), out.data_ptr()
    )
    assert load_native().sl_probe(record) == 0
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vector_functions(dtype):
    # Without fused multiply-add a few roundings more; in units of the result's last place, relative error.
    fused = ctypes.CDLL(load_native()._name).sl_isa
    fused.restype = ctypes.c_char_p
    slack = 3 if fused() == b"base" else 1
    unit = (2.0**-23 if dtype == torch.float32 else 2.0**-52) * slack

    def check(function, x, want, units, floor=0.0):
        x = x.to(dtype)
        exact = want(x.double())
        got = probe(function, x).double()
        error = ((got - exact).abs() / (exact.abs() + floor)).max() / unit
        assert error < units, f"{function}: {error:.1f} units, bound {units}"

    line = torch.linspace(-20, 20, 100_001, dtype=torch.float64)
    small = torch.linspace(-1, 1, 50_001, dtype=torch.float64)
    check("exp2", line, torch.exp2, 4)
    check("exp", line, torch.exp, 4)
    check("exp", -torch.linspace(0, 80, 50_001, dtype=torch.float64), torch.exp, 4)
    softplus = lambda v: torch.log1p(torch.exp(-v.abs())) + v.clamp_min(0)  # noqa: E731
    check("softplus", line, softplus, 5)
    check("softplus", line * 4, softplus, 5)
    check("softplus", torch.tensor([1e4, 1e30, 300.0]), softplus, 2)
    check("softplus", torch.tensor([-1e4, -1e30]), softplus, 2, floor=1e-30)
    check("sigmoid_of_softplus", line, torch.sigmoid, 6)
    check("sigmoid", line * 4, torch.sigmoid, 6)
    check("silu", line, lambda v: v * torch.sigmoid(v), 6)
    check("silu_slope", line, lambda v: torch.sigmoid(v) * (1 + v * (1 - torch.sigmoid(v))), 8, floor=1e-1)
    check("cos", small, lambda v: torch.cos(2 * torch.pi * v), 4, floor=1.0)
    check("sin", small, lambda v: torch.sin(2 * torch.pi * v), 4, floor=1.0)
    check("log1p", torch.logspace(-30, 0, 10_001, dtype=torch.float64), torch.log1p, 4)


def test_exponential_at_the_edges():
    for dtype in (torch.float32, torch.float64):
        inf, nan = float("inf"), float("nan")
        got = probe("exp2", torch.tensor([0.0, -0.0, 1.0, -1.0, inf, 1e30, 1e5, -inf, -1e30, 3.0], dtype=dtype))
        assert got[[0, 1, 2, 3, 9]].tolist() == [1, 1, 2, 0.5, 8]
        assert got[4:7].tolist() == [inf, inf, inf]
        assert (got[7:9] < 1e-37).all()
        assert (got[7:9] >= 0).all()
        for function in ("exp", "softplus", "sigmoid_of_softplus", "sigmoid", "silu", "silu_slope", "bfloat16"):
            assert probe(function, torch.tensor([nan, -nan], dtype=dtype)).isnan().all(), function
        assert probe("sigmoid", torch.tensor([inf, 1e30, 0.0], dtype=dtype)).tolist() == [1, 1, 0.5]
        assert probe("softplus", torch.tensor([inf, 1e30], dtype=dtype)).tolist() == [
            inf,
            float(torch.tensor(1e30, dtype=dtype)),
        ]


def test_bfloat16_rounds_to_nearest_even():
    x = torch.cat(
        [torch.randn(1000) * 10.0**e for e in (-30, -3, 0, 30)] + [torch.tensor([float("inf"), -float("inf")])]
    )
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, -0.0])
    x = torch.cat([x, ties])
    assert torch.equal(probe("bfloat16", x), x.bfloat16().float())
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert probe("bfloat16", nans).isnan().all()


# ---- other processes ------------------------------------------------------------------------------


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(scan.__file__).resolve().parents[3])
    env = {**os.environ, "PYTHONPATH": source + os.pathsep + os.environ.get("PYTHONPATH", ""), **environment}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=60
    )


def other_instruction_sets() -> list[str]:
    if native_problem() is not None:
        return []
    library = load_native()
    library.sl_isas.restype = library.sl_isa.restype = ctypes.c_char_p
    return [name for name in library.sl_isas().decode().split() if name != library.sl_isa().decode()]


@pytest.mark.parametrize("isa", other_instruction_sets())
def test_other_instruction_sets(isa):
    """The same tests under every other instruction set that this machine runs."""
    if "STATELINE_ISA" in os.environ:
        pytest.skip("already inside such a run")
    chosen = "widths or kinds or groups or taps or rms or edges or functions or nearest or scan_step"
    chosen += " or products_against or one_call or same_bits or nan_reaches"
    files = [__file__, *(str(Path(__file__).with_name(f"test_{name}.py")) for name in ("native", "packed"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", chosen]
    result = subprocess.run(
        command, env={**os.environ, "STATELINE_ISA": isa}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert "[100%]" in result.stdout


@pytest.mark.parametrize(
    ("name", "why"), [("avx1024", "unknown"), ("neon" if os.uname().machine == "x86_64" else "avx2", "unknown")]
)
def test_unusable_instruction_sets_are_refused(name, why):
    result = run_python("from stateline.backends import load_native; load_native()", STATELINE_ISA=name)
    assert result.returncode != 0
    assert f"STATELINE_ISA is '{name}'" in result.stderr
    assert why in result.stderr


def test_forks_and_clean_exit():
    """Threads of the parent are gone in a child: it must neither hang nor compute something else; both must exit."""
    code = """
        import os, threading, torch
        from stateline.backends import load_native
        from stateline.ops.selective_scan import cpu
        torch.set_num_threads(3)
        torch.manual_seed(0)
        u, A, B = torch.rand(1, 300, 256), -torch.rand(256, 16), torch.rand(1, 300, 1, 16)
        def work():  # bytes: torch's own parallel loops do hang after a fork
            return cpu.forward(u, u, A, B, B, None, None, None, False, None, None, False)[0].numpy().tobytes()
        for own in (0, 1):
            load_native().sl_use_own_threads(own)
            want = work()
            child = os.fork()
            if child == 0:
                same = work() == want and work() == want
                grandchild = os.fork()
                if grandchild == 0:
                    os._exit(0 if work() == want else 1)
                os._exit(0 if same and os.waitpid(grandchild, 0)[1] == 0 else 1)
            assert os.waitpid(child, 0)[1] == 0
            assert work() == want
            wrong = []
            def many():
                wrong.extend(1 for _ in range(10) if work() != want)
            callers = [threading.Thread(target=many) for _ in range(4)]
            [caller.start() for caller in callers]
            [caller.join() for caller in callers]
            assert not wrong
        print("done")
    """
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"


def test_library_links_nothing_of_torch_and_exports_only_its_interface():
    """One binary for every torch and Python; nothing compiled for a wide instruction set can leak out of it."""
    try:
        path = load_native()._name
        symbols = subprocess.run(
            ["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout
        needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as missing:
        pytest.skip(f"needs binutils: {missing}")
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert names
    assert all(name.startswith("sl_") for name in names), names
    for foreign in ("torch", "omp", "python", "c10"):
        assert foreign not in needed


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded before", "loaded after"])
def test_a_fork_before_the_first_call(loaded):
    """The parent has used torch's threads, the child's first kernel must not wait for them."""
    code = f"""
        import os, signal, torch
        from stateline import backends
        from stateline.ops.selective_scan import cpu
        torch.set_num_threads(2)
        u, A, B = torch.rand(1, 300, 256), -torch.rand(256, 16), torch.rand(1, 300, 1, 16)
        torch.rand(512, 512).add(1).sum()
        if {loaded}:
            backends.load_native()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            cpu.forward(u, u, A, B, B, None, None, None, False, None, None, False)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print("done")
    """
    result = run_python(code)
    assert result.stdout.strip() == "done", result.stderr
