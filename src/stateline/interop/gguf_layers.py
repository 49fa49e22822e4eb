"""The kinds of layers that llama.cpp has, as tables: each weight's name there and here, and the sizes beside them.

A = −exp(A_log) there. Convolutions lie as (channels, taps), A and D of Mamba-2 as (heads, 1), its norm as (groups,
width).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stateline.interop.huggingface import beyond_mamba2
from stateline.nn import Mamba, Mamba2
from stateline.ops.ssd import check_limit

Tensors = Iterator[tuple[str, Tensor, bool]]  # name there, values, whether it is a matrix that may be rounded
Fields = Mapping[str, Any]  # metadata of a file, without the name of its architecture


@dataclass(frozen=True)
class Weight:
    """One weight: its name in a block there, and in a mixer here.

    matrix: may be rounded; others are float32.   rate: −exp(x) there.   shape: a mixer's, where it differs there.
    """

    theirs: str
    ours: str
    matrix: bool = False
    rate: bool = False
    shape: Callable[[Any], tuple[int, ...]] | None = None

    def there(self, mixer: Any) -> Tensor:
        """A mixer's values as a file holds them; zeros for the bias of a convolution that has none."""
        found = dict(mixer.named_parameters())
        values = found.get(self.ours)
        if values is None:
            values = mixer.A_log.new_zeros(mixer.conv1d.out_channels)
        values = -torch.exp(values.detach()) if self.rate else values
        return values if self.shape is None else values.reshape(self.shape(mixer))

    def here(self, values: Tensor, mixer: Any) -> Tensor:
        """What `there` gave, as a mixer holds it. Raises ValueError for values that this mixer cannot have."""
        shape = mixer.get_parameter(self.ours).shape
        wanted = shape if self.shape is None else self.shape(mixer)
        if [n for n in values.shape if n > 1] != [n for n in wanted if n > 1]:  # ones come and go in GGUF files
            raise ValueError(f"has shape {tuple(values.shape)}, expected {tuple(wanted)}")
        if self.rate:
            if not (values < 0).all():
                raise ValueError("has decay rates that are not below 0")
            values = (-values.double()).log().float()
        return values.reshape(shape)


@dataclass(frozen=True)
class Layer:
    """A kind of layer.

    arch, name: what it is called there, and in `ssm_cfg` here.   weights: a mixer's.
    sizes: (writer, mixer) writes the metadata that describe it.
    options: (metadata, d_model) gives the arguments of the mixer.
    problems: (mixer, norm_eps of the model) says what cannot be said there.
    """

    arch: str
    name: str
    weights: tuple[Weight, ...]
    sizes: Callable[[Any, Any], None]
    options: Callable[[Fields, int], dict[str, Any]]
    problems: Callable[[Any, float], list[str]]

    def tensors(self, mixer: Any) -> Tensors:
        """A mixer's weights, by their names in a block there."""
        for weight in self.weights:
            yield weight.theirs, weight.there(mixer), weight.matrix


def _taps(mixer: Any) -> tuple[int, ...]:
    return mixer.conv1d.out_channels, mixer.d_conv


def _per_head(mixer: Any) -> tuple[int, ...]:
    return mixer.nheads, 1


def _grouped(mixer: Any) -> tuple[int, ...]:
    return mixer.ngroups, mixer.d_ssm // mixer.ngroups


_IN, _OUT = Weight("ssm_in.weight", "in_proj.weight", matrix=True), Weight("ssm_out.weight", "out_proj.weight", True)
_CONV = (
    Weight("ssm_conv1d.weight", "conv1d.weight", shape=_taps),
    Weight("ssm_conv1d.bias", "conv1d.bias"),
)


def _shared_sizes(out: Any, mixer: Any) -> None:
    out.add_ssm_conv_kernel(mixer.d_conv)
    out.add_ssm_inner_size(mixer.d_inner)
    out.add_ssm_state_size(mixer.d_state)


def _shared_options(fields: Fields, d_model: int) -> dict[str, Any]:
    expand = fields["ssm.inner_size"] / d_model
    return {
        "d_state": fields["ssm.state_size"],
        "d_conv": fields["ssm.conv_kernel"],
        "expand": int(expand) if expand == int(expand) else expand,
    }


def _shared_problems(mixer: Any) -> list[str]:
    return [] if mixer.in_proj.bias is None else ["bias is True (the projections have none there)"]


# ---- Mamba-1 ---------------------------------------------------------------------------------------------------------


def _mamba_sizes(out: Any, mixer: Mamba) -> None:
    _shared_sizes(out, mixer)
    out.add_ssm_time_step_rank(int(mixer.dt_rank))
    out.add_ssm_dt_b_c_rms(False)


def _mamba_problems(mixer: Mamba, norm_eps: float) -> list[str]:
    problems = _shared_problems(mixer)
    if mixer.d_inner != 2 * mixer.d_model:
        problems.append(f"expand is {mixer.expand} (2 only there)")
    if mixer.b_c_dt_rms_eps is not None:
        problems.append("b_c_dt_rms_eps is set (norms of dt, B and C have the other norms' eps there)")
    return problems


def _mamba_options(fields: Fields, d_model: int) -> dict[str, Any]:
    if fields.get("ssm.dt_b_c_rms"):
        raise ValueError("its step sizes, B and C are normalised, as Falcon Mamba's are, which is not supported")
    return _shared_options(fields, d_model) | {"dt_rank": fields["ssm.time_step_rank"]}


MAMBA = Layer(
    "mamba",
    "Mamba1",
    (
        _IN,
        *_CONV,
        Weight("ssm_x.weight", "x_proj.weight", matrix=True),
        Weight("ssm_dt.weight", "dt_proj.weight", matrix=True),
        Weight("ssm_dt.bias", "dt_proj.bias"),
        Weight("ssm_a", "A_log", rate=True),
        Weight("ssm_d", "D"),
        _OUT,
    ),
    _mamba_sizes,
    _mamba_options,
    _mamba_problems,
)


# ---- Mamba-2 ---------------------------------------------------------------------------------------------------------


def _mamba2_sizes(out: Any, mixer: Mamba2) -> None:
    _shared_sizes(out, mixer)
    out.add_ssm_time_step_rank(mixer.nheads)  # which is what it calls the number of heads
    out.add_ssm_group_count(mixer.ngroups)


def _mamba2_options(fields: Fields, d_model: int) -> dict[str, Any]:
    heads, inner = fields["ssm.time_step_rank"], fields["ssm.inner_size"]
    if not heads or inner % heads:
        raise ValueError(f"{heads} heads do not divide its inner size of {inner}")
    return _shared_options(fields, d_model) | {"headdim": inner // heads, "ngroups": fields["ssm.group_count"]}


def _mamba2_problems(mixer: Mamba2, norm_eps: float) -> list[str]:
    problems = _shared_problems(mixer) + beyond_mamba2(mixer, norm_eps)
    low, high = check_limit("save", mixer.dt_limit)
    if low > 0 or high < math.inf:
        problems.append(f"dt_limit is {mixer.dt_limit} (step sizes have no limits there)")
    return problems


MAMBA2 = Layer(
    "mamba2",
    "Mamba2",
    (
        _IN,
        *_CONV,
        Weight("ssm_dt.bias", "dt_bias"),
        Weight("ssm_a", "A_log", rate=True, shape=_per_head),
        Weight("ssm_d", "D", shape=_per_head),
        Weight("ssm_norm.weight", "norm.weight", shape=_grouped),
        _OUT,
    ),
    _mamba2_sizes,
    _mamba2_options,
    _mamba2_problems,
)

LAYERS: dict[type, Layer] = {Mamba: MAMBA, Mamba2: MAMBA2}
