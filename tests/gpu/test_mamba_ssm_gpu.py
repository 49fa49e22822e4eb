"""The layers beside mamba_ssm's, of the same parameters, on a GPU: values, gradients, a prompt and tokens after it.

Only its Triton kernels are needed, so a copy of its sources on PYTHONPATH will do (and einops); run with
`pytest -m gpu tests/gpu/test_mamba_ssm_gpu.py`. Left out is what that library has wrong: docs/coming-from-mamba-ssm.md.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from where import INTERPRETED

from stateline import nn as ours

triton = pytest.importorskip("triton", reason="mamba_ssm computes through Triton")


def one_configuration(configs: list[Any], key: list[str], **_: Any) -> Any:
    """Instead of Triton's tuner, which tries for minutes: the configuration that needs least of a multiprocessor."""
    least = min(configs, key=lambda c: (c.num_stages * sum(c.kwargs.values()), c.num_warps, c.maxnreg or 0))
    return AUTOTUNE([least], key)


AUTOTUNE = triton.autotune
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(triton, "autotune", one_configuration)
    mamba_ssm = pytest.importorskip("mamba_ssm", reason="compares with mamba_ssm, which is not installed")

from mamba_ssm.utils.generation import InferenceParams  # noqa: E402  # known only once mamba_ssm is

pytestmark = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE, D_MODEL = "cuda", 128
#: Largest difference from float64, over the largest value there: of ours, and of theirs, whose products of float32 are
#: taken in TF32, with 10 bits.
BOUND = {torch.float32: 2e-4, torch.bfloat16: 3e-2}
THEIRS = {torch.float32: 2e-2, torch.bfloat16: 6e-2}
LAYERS = {
    "Mamba2": {},
    "Mamba2, skip a channel": {"D_has_hdim": True},
    "Mamba2, no norm": {"rmsnorm": False},
    "Mamba2, norm before gate": {"norm_before_gate": True},
    "Mamba2, two groups": {"ngroups": 2},
    "Mamba2, part through a gated unit": {"d_ssm": 128},
    "Mamba2, limited steps": {"dt_limit": (0.01, 0.05)},
    "Mamba3": {"headdim": 64},
    "Mamba3, a norm": {"headdim": 64, "is_outproj_norm": True},
    "Mamba3, two groups, all states turn": {"headdim": 64, "ngroups": 2, "rope_fraction": 1.0},
}
#: Of Mamba3, their tokens need a CUDA library of their own.
TOKENS = [name for name in LAYERS if name.startswith("Mamba2") and not {"D_has_hdim", "dt_limit"} & {*LAYERS[name]}]


def layers(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Our layer in float64, ours and theirs in `dtype`, with the same parameters."""
    torch.manual_seed(0)
    kind = name.partition(",")[0]
    options = {"headdim": 32, "d_state": 64, **LAYERS[name]}
    theirs = getattr(mamba_ssm, kind)(D_MODEL, layer_idx=0, device=DEVICE, dtype=dtype, **options)
    if hasattr(theirs, "use_mem_eff_path"):
        theirs.use_mem_eff_path = False  # the other path needs causal_conv1d's CUDA build
        theirs.chunk_size = 64  # more does not fit a multiprocessor in float32
    with torch.no_grad():
        for parameter in theirs.parameters():  # nothing stays at zero or one
            parameter.add_(0.1 * torch.randn_like(parameter))
    mine = [getattr(ours, kind)(D_MODEL, device=DEVICE, dtype=d, **options) for d in (torch.float64, dtype)]
    for layer in mine:
        layer.load_state_dict(theirs.state_dict())
    return mine[0].double(), mine[1], theirs


def near(got: Tensor, wanted: Tensor, bound: float, what: str) -> None:
    error = (got.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    assert error < bound, f"{what}: {error:.1e}"


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_those_of_mamba_ssm(name: str, dtype: torch.dtype) -> None:
    x, dy = torch.randn(2, 2, 333, D_MODEL, device=DEVICE).to(dtype).unbind()
    found = []
    for module in layers(name, dtype):
        wide = torch.float64 if not found else dtype
        u = x.to(wide, copy=True).requires_grad_()
        y = module(u)
        y.backward(dy.to(wide))
        found.append({"y": y.detach(), "input": u.grad} | {k: p.grad for k, p in module.named_parameters()})
    exact, mine, theirs = found
    assert exact.keys() == mine.keys() == theirs.keys()
    for what, value in exact.items():
        near(mine[what], value, BOUND[dtype], f"{name}, ours: {what}")
        near(theirs[what], value, THEIRS[dtype], f"{name}, theirs: {what}")


@pytest.mark.parametrize("name", TOKENS)
def test_a_prompt_and_tokens_after_it_are_those_of_mamba_ssm(name: str) -> None:
    _, layer, theirs = layers(name, torch.float32)
    x = torch.randn(2, 40, D_MODEL, device=DEVICE)
    cache = InferenceParams(max_seqlen=40, max_batch_size=2)
    bound = 4e-3  # of theirs
    with torch.no_grad():
        y, state = layer.extend(x[:, :30], layer.init_state(2))
        near(y, theirs(x[:, :30], inference_params=cache), bound, f"{name}: prompt")
        for i in range(30, 40):
            cache.seqlen_offset = i
            wanted = theirs(x[:, i : i + 1], inference_params=cache)[:, 0]
            near(layer.step_(x[:, i], state), wanted, bound, f"{name}: token {i}")
