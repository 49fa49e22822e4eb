"""Reads layers that were trained with the S4 repository (github.com/state-spaces/s4) into `nn.S4` and `nn.S4D`.

Three layouts, told apart by their names: `S4Block` of version 4 (`layer.kernel.*`), the block of version 3 and before
(`kernel.kernel.*`), and the minimal `s4d.py` (`kernel.log_A_real`). A layer comes out with parameters of ours that say
the same: dt and −Re A as logarithms, whatever they were kept as; C as C, where the repository had turned it into
C (I − Ā^L) for the length L it had last seen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stateline import checks
from stateline.models.checkpoint import CheckpointError
from stateline.nn import S4, S4D
from stateline.nn.s4_systems import DPLRSystem

OP = "s4_layer"
#: How the repository keeps numbers above 0.
TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "relu": lambda x: F.relu(x) + 1e-4,
    "none": lambda x: x,
}
#: Names of version 3 and of the minimal layer, by those of version 4.
OLDER = {
    "log_dt": "inv_dt", "inv_w_real": "A_real", "log_w_real": "A_real", "log_A_real": "A_real", "w_imag": "A_imag",
    "L": "l_kernel",
}  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """How a layer kept its numbers; nothing in a file says so. The defaults are those of the repository's code.

    dt: of dt, "exp" or, as its configurations for training have it, "softplus" (`dt_transform`).
    real, imag: of −Re A and −Im A (`real_transform`, `imag_transform`).
    discretization: "zoh" or "bilinear" (`disc`), of diagonal layers; others are bilinear.
    """

    dt: str = "exp"
    real: str = "exp"
    imag: str = "none"
    discretization: str = "zoh"

    def __post_init__(self) -> None:
        for name in ("dt", "real", "imag"):
            checks.choice(OP, name, getattr(self, name), tuple(TRANSFORMS))
        checks.choice(OP, "discretization", self.discretization, ("zoh", "bilinear"))


def s4_layer(
    source: Mapping[str, Tensor] | str | Path,
    *,
    prefix: str = "",
    kept: Kept | None = None,
    activation: str | None = "gelu",
    final_act: str | None = "glu",
) -> S4 | S4D:
    """The layer in a state dict of the S4 repository, or in a file of one: `S4` if it has a P, else `S4D`.

    Args:
        source: names and tensors, or a file that torch.save wrote of them (or of a dict with them as "state_dict"),
            which is read as tensors alone.
        prefix: what the names of this layer begin with in a larger model, such as "s4_layers.0.".
        kept: how its numbers were kept.
        activation, final_act: of the block, as `nn.S4` takes them.

    Raises:
        CheckpointError: if names are missing, left over or of a kind there is no counterpart for.

    >>> theirs = {name: value for name, value in S4D(4, 8).state_dict().items()}
    >>> theirs = {f"layer.{k}" if not k.startswith("output") else k: v for k, v in theirs.items()}
    >>> s4_layer(theirs).d_state
    8
    """
    kept = kept or Kept()
    there = {k.removeprefix(prefix): v for k, v in _tensors(source).items() if k.startswith(prefix)}
    if not there:
        raise CheckpointError(f"{OP}: no name begins with {prefix!r}.")
    values = _renamed(there)
    for name in ("inv_dt", "A_real", "C", "D", "weight", "bias"):
        if name not in values:
            raise CheckpointError(f"{OP}: there is no {name} among {', '.join(sorted(there))}.")
    full = _unified(values, kept, minimal=any(name.endswith("log_A_real") for name in there))
    layer = _made(full, kept, activation, final_act)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            value = full.pop(name.rpartition(".")[2])
            if value.shape != parameter.shape:
                got, wanted = tuple(value.shape), tuple(parameter.shape)
                raise CheckpointError(f"{OP}: {name} has shape {got}, expected {wanted}. Is final_act as it was?")
            parameter.copy_(value)
        length = int(full.pop("l_kernel", torch.tensor(0)))
        if isinstance(layer.kernel, DPLRSystem) and length:
            _restore(layer.kernel, length)
    if full:
        raise CheckpointError(f"{OP}: {', '.join(sorted(full))} have no counterpart in nn.S4 and nn.S4D.")
    return layer


def _tensors(source: Mapping[str, Tensor] | str | Path) -> Mapping[str, Tensor]:
    if not isinstance(source, str | os.PathLike):
        return source
    try:
        # weights_only: a pickle could run any code, this reads tensors and nothing else.
        values = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{OP}: there is no file {source}.") from error
    except Exception as error:  # a damaged pickle can make its reader raise anything
        raise CheckpointError(f"{OP}: {source} is damaged or holds more than tensors: {error}") from error
    values = values.get("state_dict", values) if isinstance(values, dict) else values
    if not isinstance(values, dict):
        raise CheckpointError(f"{OP}: {source} holds a {type(values).__name__}, expected named tensors.")
    return values


def _renamed(there: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor by the last part of its version 4 name; left over ones are refused."""
    values: dict[str, Tensor] = {}
    for name, value in there.items():
        inner = name.removeprefix("layer.").removeprefix("layer.")
        if inner.startswith("output_linear.0."):
            last = inner.removeprefix("output_linear.0.")
        elif inner == "D" or inner.startswith("kernel."):
            last = inner.removeprefix("kernel.").removeprefix("kernel.")
        else:
            raise CheckpointError(f"{OP}: {name} has no counterpart in nn.S4 and nn.S4D.")
        values[OLDER.get(last, last)] = value
        if last == "w_imag":  # version 3 kept Im A itself
            values["A_imag"] = -value
    return values


def _unified(values: dict[str, Tensor], kept: Kept, minimal: bool) -> dict[str, Tensor]:
    """Values of our parameters, float64, and l_kernel."""
    full = {k: v if k == "l_kernel" else v.detach().double() for k, v in values.items()}
    full["inv_dt"] = TRANSFORMS["exp" if minimal else kept.dt](full["inv_dt"]).log()
    full["inv_dt"] = full["inv_dt"].reshape(-1, 1) if full["inv_dt"].dim() == 1 else full["inv_dt"]
    full["A_real"] = TRANSFORMS["exp" if minimal else kept.real](full["A_real"]).log()
    if "A_imag" not in full:  # real layers, `is_real`: the factor 2 of pairs is theirs too
        full["A_imag"] = torch.zeros_like(full["A_real"])
        for name in ("B", "C"):
            if name in full:
                full[name] = torch.stack([full[name], torch.zeros_like(full[name])], -1)
    elif minimal:  # A = −exp(log_A_real) + i·A_imag
        full["A_imag"] = -full["A_imag"]
    else:
        full["A_imag"] = TRANSFORMS[kept.imag](full["A_imag"])
    if "B" not in full:
        one = torch.tensor([1.0, 0.0], dtype=torch.float64)
        full["B"] = one.expand(1, *full["A_real"].shape, 2)
    for name, how in (("inv_dt", kept.dt), ("A_real", kept.real)):
        if not full[name].isfinite().all():
            problem = f"{name} by {how!r} are not numbers above 0, so it was kept otherwise."
            raise CheckpointError(f"{OP}: {problem} Give kept=Kept({'dt' if name == 'inv_dt' else 'real'}=…).")
    for name, dims in (("D", 2), ("C", 4)):
        full[name] = full[name][None] if full[name].dim() == dims - 1 else full[name]
    full["weight"] = full["weight"].squeeze(-1) if full["weight"].dim() == 3 else full["weight"]
    return full


def _made(full: dict[str, Tensor], kept: Kept, activation: str | None, final_act: str | None) -> S4 | S4D:
    (channels, d_model, states, *pair), (n_ssm, n) = full["C"].shape, full["A_real"].shape
    if pair != [2] or states != n or full["D"].shape[-1] != d_model or d_model % n_ssm:
        raise CheckpointError(f"{OP}: C {tuple(full['C'].shape)}, A {(n_ssm, n)} and D do not fit each other.")
    if full["D"].shape[0] != channels:
        problem = f"C has {channels} read-outs, D {full['D'].shape[0]}: a bidirectional layer, which is not read."
        raise CheckpointError(f"{OP}: {problem} Its two halves are one-sided kernels; see nn.Bidirectional.")
    if full["inv_dt"].shape[1] != 1:
        raise CheckpointError(f"{OP}: there is a dt for every state (dt_tie=False), expected one a channel.")
    options = {"channels": channels, "n_ssm": n_ssm, "activation": activation, "final_act": final_act}
    if "P" in full:
        return _with_rank(S4(d_model, 2 * states, **options), full["P"])  # type: ignore[arg-type]  # checked there
    return S4D(d_model, 2 * states, discretization=kept.discretization, **options)  # type: ignore[arg-type]  # checked too


def _with_rank(layer: S4, P: Tensor) -> S4:
    layer.kernel.P = torch.nn.Parameter(layer.kernel.P.new_zeros(P.shape))
    return layer


@torch.no_grad()
def _restore(kernel: DPLRSystem, length: int) -> None:
    """C of C (I − Ā^length), which the repository keeps from its first call on."""
    A_bar, _, C = kernel.sampled(1.0)
    left = torch.eye(A_bar.shape[-1], dtype=torch.float64) - torch.linalg.matrix_power(A_bar, length)
    rows = torch.linalg.solve(left.mT, C.permute(1, 2, 0)).permute(2, 0, 1)  # x (I − Ā^L) = C
    kernel.C.copy_(torch.view_as_real(torch.view_as_complex(rows.contiguous().unflatten(-1, (-1, 2))).conj() / 2))
