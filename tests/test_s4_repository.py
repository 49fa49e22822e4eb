"""Layers of the S4 repository: each of its layouts computes the same here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stateline import nn as sl
from stateline.interop.s4_repository import Kept, s4_layer
from stateline.models.checkpoint import CheckpointError

D, N = 6, 4


def block(layer: sl.S4 | sl.S4D) -> dict[str, Tensor]:
    """Our layer under the names of version 4's block."""
    return {k if k.startswith("output") else f"layer.{k}": v.clone() for k, v in layer.state_dict().items()}


def some(kind: type = sl.S4D, **options: Any) -> Any:
    layer = kind(D, 2 * N, **options).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return layer


def same(theirs: dict[str, Tensor], want: Any, **options: Any) -> Any:
    got, x = s4_layer(theirs, **options).eval(), torch.randn(2, 40, D)
    assert type(got) is type(want)
    assert torch.allclose(got(x).double(), want(x.double()), atol=1e-5)
    return got


@pytest.mark.parametrize("options", [
    {}, {"n_ssm": 2, "channels": 3}, {"kind": sl.S4}, {"kind": sl.S4, "init": "legt", "n_ssm": 3},
    {"discretization": "bilinear", "activation": None, "final_act": None},
])  # fmt: skip
def test_blocks_of_version_4(options: dict[str, Any], tmp_path: Path) -> None:
    layer = some(**options)
    kept = Kept(discretization=options.get("discretization", "zoh"))
    acts = {k: v for k, v in options.items() if k in ("activation", "final_act")}
    same(block(layer), layer, kept=kept, **acts)
    torch.save({"state_dict": {f"m.0.{k}": v for k, v in block(layer).items()}}, tmp_path / "a.pt")
    same(tmp_path / "a.pt", layer, kept=kept, prefix="m.0.", **acts)  # type: ignore[arg-type]  # a path, as users give


@pytest.mark.parametrize("length", [64, 100])
def test_c_that_was_rewritten_for_a_length_is_given_back(length: int) -> None:
    """From its first call on the repository keeps C (I − Ā^L) under the name C, and L in a buffer."""
    layer = some(sl.S4)
    theirs = block(layer)
    A, _, C = layer.kernel.sampled(1.0)
    cut = C - (C[:, :, None] @ torch.linalg.matrix_power(A, length))[:, :, 0]
    theirs["layer.kernel.C"] = torch.view_as_real(
        (torch.view_as_complex(cut.unflatten(-1, (-1, 2))).conj() / 2).resolve_conj()
    )
    theirs["layer.kernel.l_kernel"] = torch.tensor(length)
    same(theirs, layer)
    theirs["layer.kernel.l_kernel"] = torch.tensor(0)
    with pytest.raises(AssertionError):
        same(theirs, layer)


def test_other_ways_to_keep_positive_numbers() -> None:
    layer = some(sl.S4)
    theirs = block(layer)
    for name in ("inv_dt", "A_real"):
        value = theirs[f"layer.kernel.{name}"].exp()
        theirs[f"layer.kernel.{name}"] = value + torch.log(-torch.expm1(-value))  # softplus⁻¹
    same(theirs, layer, kept=Kept(dt="softplus", real="softplus"))
    with pytest.raises(ValueError, match="dt is 'log'"):
        Kept(dt="log")


def test_blocks_of_version_3() -> None:
    layer = some(sl.S4)
    names = {"inv_dt": "log_dt", "A_real": "inv_w_real", "A_imag": "w_imag"}
    theirs = {}
    for name, value in layer.state_dict().items():
        last = name.rpartition(".")[2]
        value = value.flatten() if last == "inv_dt" else -value if last == "A_imag" else value
        kernel = name.startswith("kernel.")
        theirs[f"kernel.kernel.{names.get(last, last)}" if kernel else name] = value
    same(theirs | {"kernel.kernel.L": torch.tensor(0)}, layer)


def test_the_minimal_layer() -> None:
    """Its own formula: A with positive imaginary parts, no B, a convolution of width 1 after it."""
    theirs = {
        "kernel.C": torch.randn(D, N, 2), "kernel.log_dt": torch.rand(D) - 3, "kernel.log_A_real": torch.randn(D, N),
        "kernel.A_imag": torch.arange(N).expand(D, N) * 3.0, "D": torch.randn(D),
        "output_linear.0.weight": torch.randn(2 * D, D, 1), "output_linear.0.bias": torch.randn(2 * D),
    }  # fmt: skip
    x = torch.randn(2, 50, D)
    A = -theirs["kernel.log_A_real"].exp() + 1j * theirs["kernel.A_imag"]
    z = A * theirs["kernel.log_dt"].exp()[:, None]
    C = torch.view_as_complex(theirs["kernel.C"]) * (z.exp() - 1) / A
    K = 2 * torch.einsum("hn,hnl->lh", C, (z[..., None] * torch.arange(50)).exp()).real
    y = sum((F.pad(x[:, : 50 - i], (0, 0, i, 0)) * K[i] for i in range(50)), x * theirs["D"])
    y = F.conv1d(F.gelu(y).mT, theirs["output_linear.0.weight"], theirs["output_linear.0.bias"]).mT
    layer = s4_layer(theirs)
    assert torch.allclose(layer(x), F.glu(y, -1), atol=1e-4)
    state = layer.init_state(2)
    assert torch.allclose(torch.stack([layer.step_(x[:, i], state) for i in range(50)], 1), layer(x), atol=1e-5)


def test_real_layers_become_pairs_without_imaginary_parts() -> None:
    layer = some(init="real")
    with torch.no_grad():
        layer.kernel.A_imag.zero_()
        layer.kernel.B[..., 1] = 0
        layer.kernel.C[..., 1] = 0
    theirs = block(layer)
    del theirs["layer.kernel.A_imag"]
    for name in ("B", "C"):
        theirs[f"layer.kernel.{name}"] = theirs[f"layer.kernel.{name}"][..., 0]
    same(theirs, layer)


def test_what_has_no_counterpart_is_refused(tmp_path: Path) -> None:
    theirs = block(some())
    for change, message in [
        ({"layer.kernel.Z": torch.ones(1)}, "Z have no counterpart"),
        ({"input_gate.weight": torch.ones(1)}, "input_gate.weight has no counterpart"),
        ({"layer.kernel.C": torch.ones(2, D, N, 2)}, "bidirectional"),
        ({"layer.kernel.inv_dt": torch.ones(D, N)}, "dt_tie"),
        ({"layer.kernel.C": torch.ones(1, D, N + 1, 2)}, "do not fit"),
        ({"output_linear.0.weight": torch.ones(D, D), "output_linear.0.bias": torch.ones(D)}, "Is final_act"),
    ]:
        with pytest.raises(CheckpointError, match=f"^s4_layer: .*{message}"):
            s4_layer(theirs | change)
    for how, name in ((Kept(real="none"), "A_real"), (Kept(dt="none"), "inv_dt")):  # logarithms are below 0
        with pytest.raises(CheckpointError, match=rf"^s4_layer: {name} by 'none' are not numbers above 0.*Give kept"):
            s4_layer(theirs, kept=how)
    del theirs["layer.D"]
    with pytest.raises(CheckpointError, match="there is no D among"):
        s4_layer(theirs)
    with pytest.raises(CheckpointError, match="no name begins with 'x'"):
        s4_layer(theirs, prefix="x")
    with pytest.raises(CheckpointError, match="there is no file"):
        s4_layer(tmp_path / "none.pt")
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="damaged"):
        s4_layer(tmp_path / "bad.pt")
