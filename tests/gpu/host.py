"""What stands in for a GPU in tests of indices: CUDA kernels whose lanes meet at `MEET` and `ANY`, by a C++ compiler.

A warp is a loop over its lanes from one meeting to the next, blocks run one after the other, and shared memory is
exactly as large as the launch says, full of NaN, between guards.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path

GUARD = 64
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
#: As on a GPU, an address that does not suit what is read or written there ends the process.
ALIGNED = ("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")
AHEAD = """
#include <cmath>
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#ifdef ROWS
#define WIDTH (ROWS * COLUMNS < 32 ? 32 : ROWS * COLUMNS)
#else
#define WIDTH 32
#endif
#define MEET()
#define HERE(x)
#define SOON(address)
#ifdef LAST_LANE_FIRST
#define EACH_LANE(count) for (int own = WIDTH - 1; own >= 0; --own) if (const Lane x(own); x.series < (count))
#endif
#define ANY(x) any(x)
using std::log;
static struct { long long x; } blockIdx;
static const struct { int x; } threadIdx = {0};
static unsigned char* shared_bytes;
static void* shared_memory() { return shared_bytes; }
static bool any(const bool (&x)[WIDTH]) {
    bool found = false;
    for (bool one : x) found |= one;
    return found;
}
"""
BEHIND = """
template <class Record> static void run(void (*kernel)(Record), const void* record, long long blocks, unsigned char* shared, long long size) {
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        for (long long i = 0; i < size; ++i) shared[i] = 0xff;
        shared_bytes = shared, kernel(*(const Record*)record);
    }
}
"""  # noqa: E501  # C++
LAUNCHER = """
extern "C" void launch_%(name)s(const void* record, long long blocks, unsigned char* shared, long long size) {
    run(%(name)s, record, blocks, shared, size);
}
"""


class Library:
    """The kernels of one source, launched as `nvrtc.Library` launches them, on the memory of CPU tensors."""

    def __init__(self, source: str, options: Sequence[str], names: Sequence[str]) -> None:
        assert COMPILER is not None
        self._folder = tempfile.TemporaryDirectory()
        text, made = Path(self._folder.name) / "kernels.cpp", Path(self._folder.name) / "kernels.so"
        text.write_text(AHEAD + source + BEHIND + "".join(LAUNCHER % {"name": name} for name in names))
        flags = ["-O0", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-w", *ALIGNED]
        given = [o for o in options if o.startswith("-D")]
        subprocess.run([COMPILER, *flags, *given, str(text), "-o", str(made)], check=True)
        self._library = ctypes.CDLL(str(made))

    def launch(self, name: str, blocks: int, threads: int, shared: int, record: Sequence[int]) -> None:
        """Run `name`. Raises AssertionError if it writes beside its shared memory."""
        memory = ctypes.create_string_buffer(b"\x5a" * (shared + 2 * GUARD + 15), shared + 2 * GUARD + 15)
        start = -(ctypes.addressof(memory) + GUARD) % 16 + GUARD
        fields = array("q", record)
        where = ctypes.c_void_p(ctypes.addressof(memory) + start)
        address, count, size = (
            ctypes.c_void_p(fields.buffer_info()[0]),
            ctypes.c_longlong(blocks),
            ctypes.c_longlong(shared),
        )
        getattr(self._library, f"launch_{name}")(address, count, where, size)
        around = memory.raw[start - GUARD : start] + memory.raw[start + shared : start + shared + GUARD]
        assert set(around) == {0x5A}, f"{name} wrote beside its shared memory"


@functools.cache
def kalman(file: str, variant: object, device: int, extra: tuple[str, ...] = ()) -> Library:
    """What `stateline.ops.kalman.gpu.library` returns, compiled with `extra` options."""
    from stateline.ops.kalman import gpu

    names: tuple[str, ...] = ("kalman_forward", "first_failure")
    if file.endswith("backward.cu"):
        names = ("kalman_backward",)
    elif file == "gpu_common.cu":
        names = ("kalman_lead", "kalman_follow", "kalman_spread")
    return Library(gpu.source(file), (*gpu.options(file, variant), *extra), names)  # type: ignore[arg-type]  # a Variant
