"""The CUDA sources without a device: tiles fit every architecture, and each compiles for it where a compiler is."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from stateline import LanguageModel, ModelConfig
from stateline.backends import BackendError
from stateline.generation.decode import network_of, prepare_for_decode
from stateline.ops import nvrtc
from stateline.ops.decode_token import Heads, Matrix
from stateline.ops.decode_token import gpu as token
from stateline.ops.kalman import gpu as kalman
from stateline.ops.kalman import gpu_plan as kalman_plan
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


#: Of a model of 130 million parameters with Mamba-1, whose tiles have every number, and of odd ones with Mamba-2.
TOKENS = {
    "mamba": token._Sizes(768, 1536, 16, 48, 4, {}),
    "heads": token._Sizes(768, 1536, 128, 0, 4, {}, 24, Heads(64, 128, 1, 0.0, 1.0, 0, True, False, 1e-5)),
    "gates": token._Sizes(280, 700, 20, 0, 2, {}, 35, Heads(20, 20, 5, 0.0, 1.0, 6, True, True, 1e-5)),
    "narrow": token._Sizes(64, 96, 264, 0, 1, {}, 4, Heads(24, 264, 2, 0.0, 1.0, 0, False, False, 0.0, narrow=True)),
}


def token_sizes(kind: str, formats: tuple[str, str, str, str]) -> token._Sizes:
    """With the matrices of in_proj, x_proj, out_proj and the head."""
    of, nothing = TOKENS[kind], torch.empty(0)
    inner = 2 * of.e
    if of.heads is not None:
        inner = of.rows[0] + of.rows[1] + of.h
    beside = 0 if of.heads is None else of.heads.beside
    sizes = {"in_proj": (inner, of.d), "x_proj": (80, of.e), "out_proj": (of.d, beside + of.e), "head": (50280, of.d)}
    matrices = {
        name: Matrix(nothing, nothing, None, format, *size)
        for (name, size), format in zip(sizes.items(), formats, strict=True)
        if of.heads is None or name != "x_proj"
    }
    return of._replace(matrices=matrices)


@pytest.mark.full
@pytest.mark.parametrize("formats", [("bf16",) * 4, ("int8",) * 4, ("int4", "int8", "int4", "int8")])
@pytest.mark.parametrize("eights", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", TOKENS)
def test_the_token_kernels_compile(
    kind: str, eights: int, formats: tuple[str, str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATELINE_CACHE", str(tmp_path))
    sizes = token_sizes(kind, formats)
    cuts = {name: token.cut(m, 132, eights) for name, m in sizes.matrices.items()}
    said = compiled(token.source(sizes.kind), token._options(sizes, eights, cuts), "sm_90", tmp_path)
    assert not any(int(n) for n in re.findall(r"(\d+) bytes spill stores", said)), said


@pytest.mark.full
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, to see the PTX")
@pytest.mark.parametrize("kind", ["mamba", "heads"])
def test_what_in_proj_finds_is_stored_by_sixteen_bytes(kind: str, tmp_path: Path) -> None:
    sizes = token_sizes(kind, ("bf16",) * 4)
    options = token._options(sizes, 8, {name: token.cut(m, 132, 8) for name, m in sizes.matrices.items()})
    (tmp_path / "source.cu").write_text(token.source(sizes.kind))
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-ptx", *options, "source.cu", "-o", "source.ptx"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    (own,) = [x for x in (tmp_path / "source.ptx").read_text().split(".entry ") if x.startswith("in_proj")]
    assert re.search(r"st\.global\S*\.v4\.f32", own)
    assert not re.search(r"st\.global\S*(?<!v4)\.f32", own)  # four for one cost 3 µs a layer with 64 sequences


@pytest.mark.parametrize("kind", TOKENS)
def test_launches_of_a_token_cover_every_channel(kind: str) -> None:
    sizes = token_sizes(kind, ("bf16",) * 4)
    between = {name: blocks for name, blocks, *_ in sizes.between(9)}
    if sizes.heads is None:
        assert between == {"scan": (96, 1)}
        return
    of = sizes.heads
    lanes = {20: 8, 128: 32, 264: 64}[
        of.n
    ]  # loads of 16 bytes of a channel, rounded up: what a warp takes has 8 each lane
    rows = max(1, 32 * min(8, lanes) // lanes) if lanes <= 32 else 4
    assert between["heads"] == (-(-sizes.h * -(-of.p // rows) // token.CREW), 9)
    assert between.get("gates") == ((of.g + 1, 9) if kind == "gates" else None)
    assert sizes.rows[0] + sizes.rows[1] + sizes.h == sizes.matrices["in_proj"].rows


@pytest.mark.parametrize("eights", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("rows", "inner"), [(16, 8), (80, 1536), (192, 5120), (2560, 5120), (3072, 768), (10240, 2560), (50280, 2560)]
)
def test_cuts_of_matrices_give_every_tile_to_a_block(rows: int, inner: int, eights: int) -> None:
    nothing = torch.empty(0)
    by = token.cut(Matrix(nothing, nothing, None, "bf16", rows, inner), 132, eights)
    assert 1 <= by.tiles <= token.MOST_TILES
    assert by.slices in (1, 2, 4, 8)  # a cluster has eight blocks at most
    blocks = -(-rows // (16 * by.tiles))
    assert all(len(range(first, -(-rows // 16), blocks)) <= by.tiles for first in range(blocks))
    assert by.slices * blocks <= 132 or not by.alone
    assert by.alone == (eights == 8 and (rows, inner) == (2560, 5120))


@pytest.mark.parametrize(("rows", "inner"), [(80, 1536), (2560, 5120), (10240, 2560), (1000, 1000), (8544, 2136)])
def test_order_of_sums_does_not_depend_on_the_number_of_sequences(rows: int, inner: int) -> None:
    nothing = torch.empty(0)
    m = Matrix(nothing, nothing, None, "bf16", rows, inner)
    assert len({token.cut(m, 132, eights).slices for eights in (1, 2, 4, 8)}) == 1


@pytest.mark.parametrize(("change", "why"), [
    ({"d_state": 516},
     "it knows up to 512 states of Mamba-2, and an even width beside its heads; these are 516 and 0."),
    ({"d_ssm": 20, "expand": 1.05, "headdim": 4, "d_state": 8},
     "it knows up to 512 states of Mamba-2, and an even width beside its heads; these are 8 and 1."),
    ({"d_state": 12, "narrow": True}, "it knows multiples of 8 states where they are bfloat16; these are 12."),
])  # fmt: skip
def test_the_token_kernels_say_which_sizes_of_mamba_2_they_do_not_know(change: dict[str, Any], why: str) -> None:
    of = {"layer": "Mamba2", "headdim": 20} | {k: v for k, v in change.items() if k != "narrow"}
    model = LanguageModel(ModelConfig(vocab_size=61, d_model=20, n_layer=1, ssm_cfg=of))
    model.state_dtype = torch.bfloat16 if "narrow" in change else None
    assert token.problem(network_of(prepare_for_decode(model))) == why


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


@pytest.mark.full
@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize(("n", "m"), [(5, 3), (8, 8), (11, 2), (16, 8), (3, 20), (32, 16), (32, 32), (64, 1)])
def test_kernels_of_several_lanes_a_series_compile(
    n: int, m: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATELINE_CACHE", str(tmp_path))
    for own, arch in ((False, "sm_80"), (True, "sm_90"), (False, "sm_120")):
        variant = kalman.Variant(n, m, size, own)
        for file in kalman_plan.FEWEST:
            said = compiled(kalman.source(file), kalman.options(file, variant), arch, tmp_path)
            assert sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", said)) < 400, said
