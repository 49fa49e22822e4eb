"""Mamba-2 mixers of transformers, computed by our operations: what `accelerate` gives their modules as `forward`.

As in `transformers_mamba`, masks, caches and shapes are transformers' own, and projections and norms are called as
modules. b batch, t time step, h head, p head width, n state, g group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stateline import ops
from stateline.interop.transformers_mamba import Mixer, convolve, in_place, masked, refuse_packed
from stateline.nn.precision import wide


@dataclass(frozen=True)
class Kind:
    """How one mixer differs from the others.

    project: (mixer, hidden states) -> (b, t, z, x, B, C and dt side by side).
    gate: (mixer, y (b, t, h·p), z (b, t, h·p)) -> (b, t, h·p), gated and normalised.
    """

    project: Callable[[Mixer, Tensor], Tensor]
    gate: Callable[[Mixer, Tensor, Tensor], Tensor]


def run(kind: Kind, mixer: Mixer, x: Tensor, cache: Any, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    """hidden states (b, t, d_model) -> (b, t, d_model), as `mixer` computes it; `cache` is read and written.

    mask: (b, t), 0 at padding, which is multiplied away as transformers does it.
    """
    refuse_packed(options)
    widths = [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads]
    z, u, dt = kind.project(mixer, masked(x, mask)).split(widths, dim=-1)
    u, ssm = convolve(mixer, u, cache, mask)
    full, shared = wide(u.dtype), mixer.n_groups * mixer.ssm_state_size
    v, B, C = u.split([mixer.intermediate_size, shared, shared], dim=-1)
    v = v.unflatten(-1, (mixer.num_heads, mixer.head_dim))
    B, C = (w.unflatten(-1, (mixer.n_groups, mixer.ssm_state_size)) for w in (B, C))
    A = -torch.exp(mixer.A_log.to(full))
    more: dict[str, Any] = {"D": mixer.D.to(full), "dt_bias": mixer.dt_bias.to(full)}
    more |= {"dt_softplus": True, "dt_limit": mixer.time_step_limit}
    if ssm is not None and in_place(u, ssm, A):
        y = ops.ssd_step_(ssm, v[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], **more)[:, None]
    else:
        # a copy, as the cache is written below and a gradient may still want the old values
        start = None if ssm is None else ssm.to(full, copy=True)
        y, state = ops.ssd(v, dt, A, B, C, initial_state=start, **more)
        if cache is not None:
            cache.update_recurrent_state(state, mixer.layer_idx)
    return mixer.out_proj(kind.gate(mixer, y.flatten(2).to(full), z).to(x.dtype))


# ---- what differs ----------------------------------------------------------------------------------------------------


def _project(mixer: Mixer, x: Tensor) -> Tensor:
    return mixer.in_proj(x)


def _project_scaled(mixer: Mixer, x: Tensor) -> Tensor:
    return mixer.in_proj(x * mixer.ssm_in_multiplier) * mixer.mup_vector


def _norm(mixer: Mixer, y: Tensor, z: Tensor) -> Tensor:
    return mixer.norm(y, z)  # which knows whether it comes before the gate


def _norm_or_gate(mixer: Mixer, y: Tensor, z: Tensor) -> Tensor:
    return mixer.norm(y, z) if mixer.mamba_rms_norm else y * F.silu(z.to(y.dtype))


MAMBA2 = Kind(_project, _norm)
SCALED = Kind(_project_scaled, _norm_or_gate)
