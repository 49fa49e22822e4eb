"""Which code runs an operation: chosen by device and dtype, or forced by `backend=`, and always explained.

gpu         Triton kernels, or CUDA C++ (module `ops.<op>.gpu`); CUDA tensors of the dtypes the module names
cpu         C++ with vector instructions, loaded through ctypes; CPU tensors
chunked     PyTorch, whole chunks as matrix products; any device; operations that have such a form
reference   PyTorch, the definition; any device, any dtype
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.resources
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from torch import Tensor

from stateline.checks import fail

#: Fastest first. A name stays a string until an op needs it, so an absent back end costs nothing.
BACKENDS = ("gpu", "cpu", "chunked", "reference")
#: Operations that have back ends: the folders of `ops`.
OPS = (
    "causal_conv1d", "cross_entropy", "decode_token", "gated_scan", "kalman", "linear_scan", "long_conv",
    "packed_linear", "rms_norm", "s4_kernel", "s4_scan", "selective_scan", "ssd", "trapezoid_ssd",
)  # fmt: skip
#: Operations that live in another's folder, and those of its back ends that they have.
BESIDE = {
    "gated_rms_norm": ("rms_norm", ("gpu", "reference")), "kalman_smooth": ("kalman", ("cpu", "reference")),
    "s4_cauchy": ("s4_kernel", ("gpu", "cpu", "reference")),
}  # fmt: skip
#: Functions of `ops` that are plain PyTorch on every device.
PLAIN = ("fuse_cascade", "fuse_parallel")
#: Operations with a second form in PyTorch, faster than the definition.
CHUNKED = ("long_conv", "s4_scan", "ssd", "trapezoid_ssd")
#: The argument whose dtype decides, where it is not the first: a scan computes in the precision of its A.
DECIDES = {"gated_scan": 2, "linear_scan": 1, "selective_scan": 2, "ssd": 2, "trapezoid_ssd": 2}
#: What `sl_layout` of a fitting library says.
LAYOUT = 4
REBUILD = "Reinstall stateline, or build it again."

_forked = False


class BackendError(RuntimeError):
    """A back end that was asked for cannot run; the message says why and what to do."""


@dataclass(frozen=True)
class Choice:
    """The back end an op will use, and why each faster one was rejected.

    detail: which of the back end's kernels run and why, where it has several and the tensors decide.
    """

    name: str
    rejected: dict[str, str] = field(default_factory=dict)
    detail: str = ""

    def __str__(self) -> str:
        reasons = "".join(f"; not {name}: {why}" for name, why in self.rejected.items())
        return self.name + (f" ({self.detail})" if self.detail else "") + reasons


def explain(op: str | Callable[..., object], *args: object, backend: str | None = None) -> Choice:
    """Say which back end `op` would use for these arguments, and why not the others.

    `op`: an operation or its name. `args`: its tensors, in its order; device and dtype decide (none: the CPU), and for
    some operations the kind of system they describe.

    >>> explain("selective_scan").name in BACKENDS
    True
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    if name.endswith("_step_"):  # the state comes first, then what the whole operation takes
        name, args = name.removesuffix("_step_"), args[1:]
    tensor = next((a for a in args if isinstance(a, Tensor)), None)
    if tensor is None:
        return choose(name, "cpu", backend)
    decisive = args[DECIDES[name]] if len(args) > DECIDES.get(name, len(args)) else tensor
    dtype = decisive.dtype if isinstance(decisive, Tensor) else tensor.dtype
    choice = choose(name, tensor.device.type, backend, dtype, args)
    if choice.name == "gpu" and hasattr(module := _module(_folder(name), "gpu"), "detail"):
        return replace(choice, detail=module.detail(*args))
    return choice


def choose(
    op: str, device: str, backend: str | None = None, dtype: torch.dtype | None = None, args: Sequence[object] = ()
) -> Choice:
    """The back end for `op` on a device type; a forced one is returned or refused, never replaced.

    `dtype`: what the op computes in, as `explain` finds it; None asks about the device alone. `args`: its tensors, for
    back ends whose `problem(*args)` says why they do not cover some of them.
    """
    name = _folder(op.removesuffix("_step_"))
    if name in PLAIN:
        return Choice("reference", detail="plain PyTorch everywhere")
    if name not in OPS:
        raise fail("explain", f"{op!r} is no operation, expected one of {', '.join((*OPS, *BESIDE))}.")
    rejected: dict[str, str] = {}
    offered = [b for b in BACKENDS if b != "chunked" or name in CHUNKED]
    if op in BESIDE:
        offered = list(BESIDE[op][1])
    for candidate in offered:
        if backend is not None and backend != candidate:
            continue
        reason = _unavailable(candidate, name, device, dtype, args)
        if reason is None:
            return Choice(candidate, rejected)
        if backend is not None:
            raise BackendError(f"{op}: backend={backend!r} cannot run here: {reason}")
        rejected[candidate] = reason
    raise fail(op, f"backend is {backend!r}, expected one of {', '.join(map(repr, offered))} or None.")


def _unavailable(name: str, op: str, device: str, dtype: torch.dtype | None, args: Sequence[object] = ()) -> str | None:
    """Why a back end cannot serve `op` on tensors of this device type and dtype, or None if it can."""
    if name == "gpu":
        if device != "cuda":
            return f"needs CUDA tensors, these are on {device}"
        why = gpu_problem(op, dtype)
        if why is None and hasattr(module := _module(op, "gpu"), "problem"):
            why = module.problem(*args)
        return why
    if name == "cpu":
        if device != "cpu":
            return f"needs CPU tensors, these are on {device}"
        why = native_problem()
        if why is None and hasattr(module := _module(op, "cpu"), "problem"):
            why = module.problem(*args)
        return why
    return None


@functools.cache
def gpu_problem(op: str, dtype: torch.dtype | None = None) -> str | None:
    """Why `op` has no GPU kernel for CUDA tensors of `dtype` here, or None if it has.

    A back end's module imports what it needs (Triton) and names the dtypes it computes in, `DTYPES`; a module that is
    there and does not load for any other reason raises in full.
    """
    if importlib.util.find_spec(f"stateline.ops.{op}.gpu") is None:
        return f"GPU kernels of {op} are not part of this release."
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device."
    try:
        module = _module(op, "gpu")
    except ModuleNotFoundError as error:
        if (error.name or "stateline").partition(".")[0] == "stateline":
            raise
        return f"needs {error.name}, which is not installed. pip install {error.name}"
    if dtype is not None and dtype not in module.DTYPES:
        covered = ", ".join(sorted(str(d).removeprefix("torch.") for d in module.DTYPES))
        return f"{str(dtype).removeprefix('torch.')} is not covered by its GPU kernels, only {covered}."
    return None


def kernel(
    op: str, device: str, backend: str | None, dtype: torch.dtype | None = None, args: Sequence[object] = ()
) -> ModuleType:
    """The module that holds `forward`, `backward` and `step` of `op` for this device, dtype and, for some, `args`.

    Warns once for each reason when the slow reference stands in for a faster back end.
    """
    choice = choose(op, device, backend, dtype, args)
    if backend is None and choice.name == "reference":
        faster = {"cpu": "cpu", "cuda": "gpu"}.get(device)
        if faster in choice.rejected:
            _say_slow_once(choice.rejected[faster])
    return _module(_folder(op), choice.name)


def _folder(op: str) -> str:
    return BESIDE[op][0] if op in BESIDE else op


@functools.cache
def _module(op: str, backend: str) -> ModuleType:
    return importlib.import_module(f"stateline.ops.{op}.{backend}")


@functools.cache
def _say_slow_once(reason: str) -> None:
    warnings.warn(
        f"stateline runs on its slow reference: {reason} Results are the same, only slower.",
        RuntimeWarning,
        stacklevel=2,
    )


@functools.cache
def say_once(message: str) -> None:
    """Warn, the first time."""
    warnings.warn(message, RuntimeWarning, stacklevel=2)


@functools.cache
def native_problem() -> str | None:
    """Why the C++ library cannot be used, or None if it can."""
    try:
        load_native()
    except BackendError as error:
        return str(error)
    return None


@functools.cache
def load_native() -> ctypes.CDLL:
    """The C++ library. Raises BackendError saying why it is absent or broken."""
    if os.environ.get("STATELINE_DISABLE_NATIVE", "0") not in ("", "0"):
        raise BackendError("the C++ library is switched off by STATELINE_DISABLE_NATIVE.")
    # Not Path(__file__).parent: an editable install keeps the library elsewhere.
    with importlib.resources.as_file(importlib.resources.files("stateline") / "_native.so") as path:
        if not path.exists():
            raise BackendError(
                "the C++ library was not built (no compiler at install time?). Install one, then reinstall stateline."
            )
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise BackendError(
                f"the C++ library does not load: {error}. Reinstall stateline on this machine."
            ) from error
    try:
        layout = library.sl_layout()
        library.sl_isa_problem.restype = ctypes.c_char_p
        problem = library.sl_isa_problem().decode()
        if _forked:  # OpenMP does not survive a fork
            library.sl_use_own_threads(1)
    except AttributeError as error:
        raise BackendError(f"{path} is not stateline's library, or an old one ({error}). {REBUILD}") from error
    if layout != LAYOUT:
        raise BackendError(f"{path} has records of layout {layout}, this release {LAYOUT}. {REBUILD}")
    if problem:
        raise BackendError(problem)
    return library


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
