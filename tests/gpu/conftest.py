"""GPU kernels on a CUDA device, or at small sizes under Triton's interpreter (TRITON_INTERPRET=1) on any machine."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import host
import pytest
import torch
from torch import Tensor
from where import INTERPRETED

from stateline import backends
from stateline.ops import cuda

HERE = Path(__file__).parent
GUARD, PATTERN = 256, 0x5A


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not INTERPRETED and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device; TRITON_INTERPRET=1 runs the kernels without"))


@functools.cache
def _patch_helpers_once() -> None:
    """Triton wraps its whole language anew for every call of a helper and never takes that back; once is enough."""
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang(tl.zeros.fn)
    patch = interpreter._patch_lang_tensor

    def with_index(tensor: Any, scope: Any) -> None:
        """numpy no longer takes an array of one number for an index, as Triton's does."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = with_index
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **options: self.rewrite()(*args, **options)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter the GPU back end takes CPU tensors, and cuts time finely: little work, many cuts."""
    if INTERPRETED:
        from stateline.ops.causal_conv1d import gpu as conv

        _patch_helpers_once()
        monkeypatch.setattr(backends, "_unavailable", lambda name, *_: None if name == "gpu" else "the test wants gpu")
        monkeypatch.setattr(conv, "plan_forward", lambda *_: conv.Plan(2, 4, 32, 1))
        monkeypatch.setattr(conv, "plan_backward", lambda *_: conv.Plan(4, 8, 32, 1))
        from stateline.ops.selective_scan import gpu_triton as scan

        monkeypatch.setattr(scan, "plan", lambda *_: scan.Plan(4, 2, 32, 2))
        from stateline.ops.gated_scan import gpu as gated

        monkeypatch.setattr(gated, "plan", lambda n, dense, _: gated.Plan(4, cuda.power_of_2(n) if dense else 16, 1))
        from stateline.ops.ssd import gpu as ssd

        def small(t: int, h: int, p: int, n: int, *_: object) -> ssd.Plan:
            return ssd.Plan(4, 8, 16, max(16, cuda.power_of_2(n)), 2, (1,) * 4, (1,) * 4)

        monkeypatch.setattr(ssd, "plan", small)
        from stateline.ops.kalman import gpu as kalman

        monkeypatch.setattr(kalman, "library", host.kalman)  # CUDA C++, which no interpreter knows
        monkeypatch.setattr(ssd, "PRECISION", "ieee")  # the interpreter knows no products in parts
        from stateline.ops.trapezoid_ssd import controls

        monkeypatch.setattr(controls, "_on_gpu", lambda _: True)


@pytest.fixture(autouse=True)
def _fenced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What kernels write into is full of NaN, or the largest number, between guard bytes, which must survive."""
    buffers = []

    def empty(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        edge = GUARD // dtype.itemsize
        raw = like.new_empty(2 * edge + count, dtype=dtype)  # of this dtype, as memory without a fence would be
        nothing = float("nan") if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).max
        buffers.append((raw.view(torch.uint8).fill_(PATTERN), size))
        inner = raw[edge : edge + count].fill_(nothing)
        return inner.view(shape)

    monkeypatch.setattr(cuda, "empty", empty)
    yield
    for raw, size in buffers:
        assert (raw[:GUARD] == PATTERN).all(), "a kernel wrote before its buffer"
        assert (raw[GUARD + size :] == PATTERN).all(), "a kernel wrote past its buffer"
