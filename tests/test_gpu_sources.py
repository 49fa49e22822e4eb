"""The CUDA sources without a device: tiles fit every architecture, and each compiles for it where a compiler is."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from stateline.backends import BackendError
from stateline.ops import nvrtc
from stateline.ops.decode_token import Matrix
from stateline.ops.decode_token import gpu as token
from stateline.ops.selective_scan import gpu, gpu_plan

# Multiprocessors, shared memory of a block and of a multiprocessor: A100, RTX 3090, RTX 4090, H100, B200, RTX 5090.
DEVICES = {
    "sm_80": gpu.Limits(108, 166912, 167936),
    "sm_86": gpu.Limits(82, 101376, 102400),
    "sm_89": gpu.Limits(128, 101376, 102400),
    "sm_90": gpu.Limits(132, 232448, 233472),
    "sm_100": gpu.Limits(148, 232448, 233472),
    "sm_120": gpu.Limits(170, 101376, 102400),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plans(n: int, dtype: torch.dtype, limits: gpu.Limits) -> dict[str, list[gpu.Plan]]:
    return {
        "gpu.cu": [gpu.forward_plan(n, dtype, limits)],
        "gpu_sweep.cu": [gpu.ends_plan(n, dtype, limits)],
        "gpu_backward.cu": [gpu.backward_plan(n, dtype, limits, crowded) for crowded in (False, True)],
        "gpu_step.cu": [gpu.step_plan(dtype)],
    }


@pytest.mark.parametrize("arch", DEVICES)
def test_tiles_of_sixteen_states_fit(arch: str) -> None:
    limits = DEVICES[arch]
    assert gpu.covers(16, limits)
    assert gpu.covers(64, limits) == (limits.block > 200 * 1024)
    assert not gpu.covers(4096, limits)
    for dtype in DTYPES:
        for plan in (p for each in plans(16, dtype, limits).values() for p in each):
            assert plan.shared + 512 <= limits.block
            assert plan.resident * (plan.shared + 1536) <= limits.whole


def test_chunks_depend_on_one_sequence_alone() -> None:
    limits = DEVICES["sm_90"]
    for t, d in ((1024, 1536), (8192, 5120), (65536, 2048)):
        chunk = gpu.chunk_length(t, d, limits.processors, 4)
        assert chunk % limits.mark == 0
        assert chunk >= min(t, gpu_plan.LEAST_CHUNK)
    assert gpu.chunk_length(8192, 5120, 132, 4) < 8192


def token_options(eights: int, formats: tuple[str, str, str, str]) -> tuple[str, ...]:
    """Of a model of 130 million parameters; tiles of every number are among them."""
    sizes = ((3072, 768), (80, 1536), (768, 1536), (50280, 768))
    nothing = torch.empty(0)
    matrices = tuple(Matrix(nothing, nothing, None, f, *size) for f, size in zip(formats, sizes, strict=True))
    return token._options(token._Sizes((768, 1536, 16, 48), 4, matrices), eights, [token.cut(m, 132) for m in matrices])


@pytest.mark.full
@pytest.mark.parametrize("formats", [("bf16",) * 4, ("int8",) * 4, ("int4", "int8", "int4", "int8")])
@pytest.mark.parametrize("eights", [1, 2, 4, 8])
def test_the_token_kernels_compile(
    eights: int, formats: tuple[str, str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATELINE_CACHE", str(tmp_path))
    said = compiled(token.source(), token_options(eights, formats), "sm_90", tmp_path)
    assert not any(int(n) for n in re.findall(r"(\d+) bytes spill stores", said)), said


@pytest.mark.parametrize(
    ("rows", "inner"), [(16, 8), (80, 1536), (192, 5120), (3072, 768), (10240, 2560), (50280, 2560)]
)
def test_cuts_of_matrices_give_every_tile_to_a_block(rows: int, inner: int) -> None:
    nothing = torch.empty(0)
    tiles, slices = token.cut(Matrix(nothing, nothing, None, "bf16", rows, inner), 132)
    assert 1 <= tiles <= token.MOST_TILES
    assert slices in (1, 2, 4, 8)  # a cluster has eight blocks at most
    blocks = -(-rows // (16 * tiles))
    assert all(len(range(first, -(-rows // 16), blocks)) <= tiles for first in range(blocks))


def compiled(source: str, options: tuple[str, ...], arch: str, folder: Path) -> str:
    """What the compiler says of registers and spills; skips where there is none."""
    if shutil.which("nvcc"):
        (folder / "source.cu").write_text(source)
        command = ["nvcc", "-std=c++17", f"-arch={arch}", "-cubin", "-Xptxas", "-v", *options, "source.cu"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr
    try:
        nvrtc.compile_cubin(source, options, arch)
    except BackendError as error:
        if "was not found" in str(error):
            pytest.skip("neither nvcc nor NVRTC is here")
        raise
    return ""


@pytest.mark.full
@pytest.mark.parametrize("arch", DEVICES)
def test_sources_compile_for(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATELINE_CACHE", str(tmp_path))
    for dtype in (torch.float32, torch.bfloat16):
        for file, each in plans(16, dtype, DEVICES[arch]).items():
            said = compiled(gpu.source(file), each[0].options, arch, tmp_path)
            spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", said)]
            assert not any(spilled), f"{file} for {dtype} spills {spilled} bytes"
