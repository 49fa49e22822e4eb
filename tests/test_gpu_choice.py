"""Which GPU kernels a scan gets, and what is said about it: no device is needed to ask."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from stateline import backends
from stateline.ops import nvrtc
from stateline.ops.selective_scan import gpu


def system(a: torch.dtype = torch.float32, n: int = 4, constant: str = "") -> list[Tensor]:
    """u, dt, A, B, C on the meta device, which stand for CUDA tensors here."""
    d, pair = 8, ((2,) if a.is_complex else ())
    u, A = torch.empty(2, 5, d, device="meta"), torch.empty(d, n, dtype=a, device="meta")
    token, fixed = torch.empty(2, 5, 1, n, *pair, device="meta"), torch.empty(d, n, dtype=a, device="meta")
    return [u, u, A, *(fixed if name in constant else token for name in "BC")]


SYSTEMS = {
    "the CUDA kernels run": {},
    "CUDA kernels do not cover complex A; the Triton kernel runs": {"a": torch.complex64},
    "CUDA kernels do not cover constant B; the Triton kernel runs": {"constant": "B"},
    "CUDA kernels do not cover constant C; the Triton kernel runs": {"constant": "C"},
    "CUDA kernels do not cover systems without states; the Triton kernel runs": {"n": 0},
    "CUDA kernels do not cover 4000 states, which do not fit into shared memory; the Triton kernel runs": {"n": 4000},
}


@pytest.fixture(autouse=True)
def _pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CUDA device whose compiler loads."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nvrtc, "problem", lambda _: None)
    found = backends._unavailable
    monkeypatch.setattr(backends, "_unavailable", lambda name, op, device, *rest: found(name, op, "cuda", *rest))
    monkeypatch.setattr(gpu, "_triton_is_there", lambda: True)
    monkeypatch.setattr(gpu, "_limits", lambda _: gpu.Limits(132, 232448, 233472))
    backends.gpu_problem.cache_clear()
    yield
    backends.gpu_problem.cache_clear()


@pytest.mark.parametrize("said", SYSTEMS)
def test_explain_says_which_kernels_run_and_why(said: str) -> None:
    choice = backends.explain("selective_scan", *system(**SYSTEMS[said]))
    assert (choice.name, choice.detail) == ("gpu", said)
    assert str(choice) == f"gpu ({said})"
    step = backends.explain("selective_scan_step_", torch.empty(1, device="meta"), *system(**SYSTEMS[said]))
    assert step == choice


def test_float64_stays_on_the_reference() -> None:
    choice = backends.explain("selective_scan", *(x.double() for x in system()))
    assert choice.name == "reference"
    assert choice.rejected["gpu"] == "float64 is not covered by its GPU kernels, only complex64, float32."


def test_without_a_compiler_everything_is_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "problem", lambda _: "libnvrtc.so.13 was not found.")
    why = "CUDA kernels cannot be compiled here: libnvrtc.so.13 was not found"
    assert backends.explain("selective_scan", *system()).detail == f"{why}; the Triton kernel runs"


def test_a_compiler_that_does_not_load_is_a_reason_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def absent() -> None:
        raise backends.BackendError("libnvrtc.so.13 was not found; torch's CUDA wheels bring it.")

    monkeypatch.setattr(nvrtc, "_nvrtc", absent)
    nvrtc.problem.cache_clear()
    assert nvrtc.problem(0) == "libnvrtc.so.13 was not found; torch's CUDA wheels bring it."
    nvrtc.problem.cache_clear()


@pytest.mark.parametrize("said", list(SYSTEMS)[1:])
def test_without_triton_only_the_cuda_kernels_systems_have_a_gpu_back_end(
    said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_triton_is_there", lambda: False)
    choice = backends.explain("selective_scan", *system(**SYSTEMS[said]))
    assert choice.name == "reference"
    assert choice.rejected["gpu"].endswith("needs triton, which is not installed. pip install triton")
    with pytest.raises(backends.BackendError, match="needs triton"):
        backends.explain("selective_scan", *system(**SYSTEMS[said]), backend="gpu")
    assert backends.explain("selective_scan", *system()).name == "gpu"


def pretend_triton(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module in place of the Triton kernels, imported before or not."""
    package = sys.modules["stateline.ops.selective_scan"]  # `ops.selective_scan` is the function
    module = ModuleType("gpu_triton")
    monkeypatch.setitem(sys.modules, "stateline.ops.selective_scan.gpu_triton", module)
    monkeypatch.setattr(package, "gpu_triton", module, raising=False)
    return module


def test_a_call_goes_where_explain_says(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pretend_triton(monkeypatch)
    for said, options in SYSTEMS.items():
        assert gpu._instead(*system(**options)[2:]) is (triton if "Triton" in said else None)


def test_standing_in_for_good_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_triton(monkeypatch)
    monkeypatch.setattr(nvrtc, "problem", lambda _: "libcuda.so.1 was not found")
    backends.say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="cannot be compiled here: libcuda.so.1 was not") as said:
        assert [gpu._instead(*system()[2:]) is None for _ in range(3)] == [False] * 3
    assert len(said) == 1
    backends.say_once.cache_clear()
