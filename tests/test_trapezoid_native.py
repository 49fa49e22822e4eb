"""What the C++ kernels of trapezoid_ssd promise beside right values: bits, memory, complaints, instruction sets."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trapezoid_ssd import BACKENDS, GIVEN, TOKENS, plain
from torch import Tensor

from stateline import backends

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="no C++ library")


def native(x: dict[str, Any], table: Tensor | None = None, reverse: bool = False) -> list[Tensor]:
    """Every result of the C++ kernels: y, the state and eighteen gradients."""
    from stateline.ops.trapezoid_ssd import cpu

    args = (*(x[k] for k in GIVEN), True, *x["initial_state"], table, reverse)
    results = cpu.forward(*args)
    return [*results, *cpu.backward(*results, *args)]


def ranked(**options: Any) -> dict[str, Any]:
    return plain(r=3, mix=True, **options)


def test_threads_do_not_change_bits() -> None:
    x, before = ranked(t=200, h=9, p=16, n=32, g=2), torch.get_num_threads()
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


@pytest.mark.parametrize(("h", "p", "n", "g"), [(3, 5, 7, 2), (6, 16, 16, 1), (1, 33, 4, 1)])
def test_guards_stay_untouched(h: int, p: int, n: int, g: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs and outputs inside larger buffers of NaN: what lies around them is neither read nor written."""
    from stateline.ops.trapezoid_ssd import cpu

    empty, guards = torch.empty, []

    def fenced(*shape: Any, dtype: torch.dtype = torch.float32, **rest: Any) -> Tensor:
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = torch.Size(shape).numel()
        buffer = empty(count + 128, dtype=dtype, **rest).fill_(float("nan"))
        buffer[:64], buffer[64 + count :] = -77.0, -77.0
        guards.append((buffer[:64], buffer[64 + count :]))
        return buffer[64 : 64 + count].view(shape)

    x = ranked(t=35, h=h, p=p, n=n, g=g)
    want = native(x)
    monkeypatch.setattr(torch, "empty", fenced)

    def fence(v: Any) -> Any:
        return tuple(map(fence, v)) if isinstance(v, tuple) else fenced(v.shape, dtype=v.dtype).copy_(v)

    x = {k: fence(v) for k, v in x.items()}
    for got, same_values in zip(native(x), want, strict=True):
        assert torch.equal(got, same_values)
    token = [v[:, 0] if k in TOKENS else v for k, v in ((k, x[k]) for k in GIVEN)]
    slots = fence(x["initial_state"])
    assert cpu.step(*slots, *token, True, None).isfinite().all()
    assert all(s.isfinite().all() for s in slots)
    assert len(guards) > 30
    assert all((side == -77.0).all() for pair in guards for side in pair)


@pytest.mark.full
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_other_instruction_sets(isa: str) -> None:
    """The grid and what surrounds it, where this machine runs the set and has not chosen it by itself."""
    library = backends.load_native()
    library.sl_isas.restype = ctypes.c_char_p
    if isa not in library.sl_isas().decode().split():
        pytest.skip(f"this machine does not run {isa}")
    files = [__file__, str(Path(__file__).with_name("test_trapezoid_ssd.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", "cpu or guards or tiles"]
    run = subprocess.run(command, env={**os.environ, "STATELINE_ISA": isa}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]


def test_wrong_segments_and_slots_are_refused() -> None:
    from stateline.ops.trapezoid_ssd import cpu

    x = ranked(t=4)
    one = x | {"initial_state": tuple(s[:1] for s in x["initial_state"])}
    for bad in ([0, 0, 5], [2, 0, 1], [0, -1, 2], [0, 3, 2], [-1, 0, 1]):
        with pytest.raises(ValueError, match="segment"):
            native(one, torch.tensor([bad]))
    token = [v[:, 0] if k in TOKENS else v for k, v in ((k, x[k]) for k in GIVEN)]
    with pytest.raises(ValueError, match="index"):
        cpu.step(*x["initial_state"], *token, True, torch.tensor([0, 2]))
