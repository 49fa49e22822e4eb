"""CUDA C++ at run time: compiled once for the device's architecture, kept on disk, launched through the driver.

Nothing is needed but what torch's CUDA wheels bring (libnvrtc) and the driver (libcuda). Kernels take one argument by
value, a record of eight-byte fields. Compiled code is kept under $STATELINE_CACHE, else $XDG_CACHE_HOME/stateline, else
~/.cache/stateline, by the hash of source, options, architecture and compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
import tempfile
import warnings
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch

from stateline.backends import BackendError

_DYNAMIC_SHARED, _CARVEOUT = 8, 9  # CU_FUNC_ATTRIBUTE_…
_CLUSTER, _EARLY = 4, 6  # CU_LAUNCH_ATTRIBUTE_…
_Pointer, _Number = ctypes.c_void_p, ctypes.c_uint


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    major = (torch.version.cuda or "0").partition(".")[0]
    name = f"libnvrtc.so.{major}"
    places = [name, *(str(p) for base in sys.path for p in Path(base).glob(f"nvidia/*/lib/{name}"))]
    for place in places:
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    raise BackendError(f"{name} was not found; torch's CUDA wheels bring it. pip install nvidia-cuda-nvrtc")


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("id", _Number), ("pad", _Number), ("value", _Number * 16)]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", _Number * 3),
        ("block", _Number * 3),
        ("shared", _Number),
        ("stream", _Pointer),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", _Number),
    ]


@functools.cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuLaunchKernel.argtypes = [_Pointer, *[_Number] * 7, _Pointer, _Pointer, _Pointer]
    driver.cuLaunchKernelEx.argtypes = [ctypes.POINTER(_Config), _Pointer, _Pointer, _Pointer]
    return driver


@functools.cache
def problem(device: int) -> str | None:
    """Why nothing can be compiled for a device and launched here, or None if it can."""
    try:
        compiler = _nvrtc()
        _driver()
        # A compiler may be older than the device.
        _compile(compiler, "__global__ void nothing() {}", [f"--gpu-architecture={_architecture(device)}"])
    except (BackendError, OSError) as error:
        return str(error)
    return None


def _architecture(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise BackendError(f"{what} failed: {(text.value or b'unknown error').decode()} ({code}).")


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    own, cache = os.environ.get("STATELINE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    return Path(cache or Path("~/.cache").expanduser()) / "stateline"  # ~ stays where there is no home


def compile_cubin(source: str, options: Sequence[str], arch: str) -> bytes:
    """Machine code of `source` for `arch` ("sm_90"), from the cache if it is there.

    Raises BackendError with the compiler's words if it does not compile.
    """
    nvrtc = _nvrtc()
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    options = [f"--gpu-architecture={arch}", "--std=c++17", *options]
    key = hashlib.sha256("\0".join([source, *options, f"{major.value}.{minor.value}"]).encode()).hexdigest()
    path = cache_folder() / f"{key}.cubin"
    if path.is_file():
        cubin, kept = path.read_bytes()[:-32], path.read_bytes()[-32:]
        if hashlib.sha256(cubin).digest() == kept:
            return cubin
    cubin = _compile(nvrtc, source, options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, cubin + hashlib.sha256(cubin).digest())  # a damaged one is compiled again
    except OSError as error:
        warnings.warn(
            f"stateline cannot keep compiled GPU kernels in {path.parent} ({error}); each process will compile them "
            "again. Set STATELINE_CACHE to a folder that can be written.",
            RuntimeWarning,
            stacklevel=2,
        )
    return cubin


def _write_whole(path: Path, content: bytes) -> None:
    """All of it or nothing, whoever else compiles the same."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise


def _compile(nvrtc: ctypes.CDLL, source: str, options: Sequence[str]) -> bytes:
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"stateline.cu", 0, None, None)
    flags = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), flags)
    size = ctypes.c_size_t()
    if failed:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise BackendError(f"a GPU kernel does not compile with {' '.join(options)}:\n{log.value.decode()}")
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw


class Library:
    """The kernels of one source on one device, whose context must be current."""

    def __init__(self, source: str, options: Sequence[str], device: int) -> None:
        self._device = device
        self._code = compile_cubin(source, options, _architecture(device))
        self._module = ctypes.c_void_p()
        self._functions: dict[str, tuple[ctypes.c_void_p, int]] = {}
        _check(_driver().cuModuleLoadData(ctypes.byref(self._module), self._code), "loading GPU kernels")

    def _function(self, name: str, shared: int) -> ctypes.c_void_p:
        function, allowed = self._functions.get(name, (ctypes.c_void_p(), -1))
        if allowed < 0:
            found = _driver().cuModuleGetFunction(ctypes.byref(function), self._module, name.encode())
            _check(found, f"finding the GPU kernel {name}")
            _check(_driver().cuFuncSetAttribute(function, _CARVEOUT, 100), f"setting up {name}")
        if shared > allowed:
            _check(_driver().cuFuncSetAttribute(function, _DYNAMIC_SHARED, shared), f"{name}: {shared} shared bytes")
            self._functions[name] = (function, shared)
        return function

    def launch(self, name: str, blocks: int, threads: int, shared: int, record: Sequence[int]) -> None:
        """Run `name` on the current stream. `record`: its argument, a whole number for each field."""
        if blocks == 0:
            return
        function = self._function(name, shared)
        fields = array("q", record)  # three times as fast as an array of ctypes
        arguments = _Pointer(fields.buffer_info()[0])
        stream = torch._C._cuda_getCurrentRawStream(self._device)  # without making a torch.cuda.Stream
        call = (function, blocks, 1, 1, threads, 1, 1, shared, stream, ctypes.byref(arguments), None)
        if code := _driver().cuLaunchKernel(*call):
            _check(code, f"launching {name}")

    def prepare(
        self, name: str, blocks: tuple[int, int], threads: int, shared: int, record: Sequence[int], cluster: int
    ) -> Launch:
        """`name` ready to run on what is the current stream now.

        cluster: neighbouring blocks that run side by side and see each other's shared memory; they may start before the
            kernel in front has ended, for which they wait by themselves. 0: single blocks, after everything in front.
        """
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        attributes = ((_CLUSTER, (cluster, 1, 1)), (_EARLY, (1,)))[cluster == 1 :] if cluster else ()
        own = (_Attribute * len(attributes))(*(_Attribute(which, 0, value) for which, value in attributes))
        config = _Config((*blocks, 1), (threads, 1, 1), shared, stream, own, len(attributes))
        return Launch(name, self._function(name, shared), config, array("q", record))


class Launch:
    """A kernel with all it is launched with. `fields`: its argument, which may be changed between calls."""

    def __init__(self, name: str, function: ctypes.c_void_p, config: _Config, fields: array[int]) -> None:
        self.fields = fields
        self._name, self._kept = name, config
        self._arguments = _Pointer(fields.buffer_info()[0])
        self._call = (ctypes.byref(config), function, ctypes.byref(self._arguments), None)
        self._launch = _driver().cuLaunchKernelEx

    def __call__(self) -> None:
        """Run it."""
        if code := self._launch(*self._call):
            _check(code, f"launching {self._name}")
