"""Mamba-1 mixers of transformers, computed by our operations: what `accelerate` gives their modules as `forward`.

Masks, caches and shapes are transformers' own: hidden states (b, t, d_model), a cache that holds the last k inputs of
the convolution (b, e, k) and the state of the scan. b batch, t time step, e inner channel, n state, k taps, g head.
Projections and norms are called as modules, so that adapters, quantised Linears and hooks take part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stateline import checks, ops
from stateline.nn.precision import wide

OP = "accelerate"
PACKED = ("seq_idx", "cu_seqlens")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Mixer = Any  # a module of transformers, which is not imported here


@dataclass(frozen=True)
class Kind:
    """How one mixer differs from the others.

    split: (mixer, (b, t, 2e)) -> u, z (b, t, e).
    select: (mixer, u) -> dt (b, t, e) before softplus, B, C (b, t, g, n), and the bias that dt still lacks, or None.
    """

    split: Callable[[Mixer, Tensor], tuple[Tensor, Tensor]]
    select: Callable[[Mixer, Tensor], tuple[Tensor, Tensor, Tensor, Tensor | None]]


def run(kind: Kind, mixer: Mixer, x: Tensor, cache: Any, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    """hidden states (b, t, d_model) -> (b, t, d_model), as `mixer` computes it; `cache` is read and written.

    mask: (b, t), 0 at padding, which is multiplied away as transformers does it.
    """
    refuse_packed(options)
    u, z = kind.split(mixer, mixer.in_proj(masked(x, mask)))
    u, ssm = convolve(mixer, u, cache, mask)
    dt, B, C, bias = kind.select(mixer, u)
    full = wide(u.dtype)
    A = -torch.exp(mixer.A_log.to(full)).flatten(0, -2)
    more = {"D": mixer.D.to(full).flatten(), "dt_bias": None if bias is None else bias.to(full).flatten()}
    if ssm is not None and in_place(u, ssm, A):
        rows = ssm.flatten(1, -2)
        y = ops.selective_scan_step_(rows, u[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], z=z[:, 0], dt_softplus=True, **more)
        y = y[:, None]
    else:
        # a copy, as the cache is written below and a gradient may still want the old values
        start = None if ssm is None else ssm.to(full, copy=True).flatten(1, -2)
        y, state = ops.selective_scan(u, dt, A, B, C, z=z, dt_softplus=True, initial_state=start, **more)
        if cache is not None:
            cache.update_recurrent_state(state.unflatten(1, mixer.A_log.shape[:-1]), mixer.layer_idx)
    return mixer.out_proj(y.to(x.dtype))


# ---- what Mamba-1 and Mamba-2 share ----------------------------------------------------------------------------------


def refuse_packed(options: dict[str, Any]) -> None:
    """Raise where a mixer is told that its rows hold several sequences."""
    for name in PACKED:
        if options.get(name) is not None:
            raise checks.fail(OP, f"{name} was given.", "Packed sequences are not supported here: pad them instead.")


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (b, t, c) with zeros where mask (b, t) is 0, in x's dtype."""
    return x if mask is None else (x * mask[:, :, None]).to(x.dtype)


def convolve(mixer: Mixer, u: Tensor, cache: Any, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """u (b, t, c) after the convolution, silu and the mask; the scan's state of the cache, None before the first token.

    The cache's last inputs are read and written; its state of the scan is for the caller to write.
    """
    taps = _taps(mixer)
    conv, ssm = (None, None) if cache is None else _states(cache, mixer.layer_idx)
    before = None if conv is None else _before(conv, taps.shape[1], u.dtype)
    if cache is not None:
        cache.update_conv_state(u.transpose(1, 2), mixer.layer_idx, conv_kernel_size=mixer.conv_kernel_size)
    u, _ = ops.causal_conv1d(u, taps, mixer.conv1d.bias, activation="silu", initial_state=before)
    return masked(u, mask), ssm


def in_place(u: Tensor, ssm: Tensor, A: Tensor) -> bool:
    """Whether one token may advance the cache's own memory: without a gradient, in the form that a step needs."""
    if u.shape[1] != 1 or (torch.is_grad_enabled() and (u.requires_grad or A.requires_grad)):
        return False
    return ssm.dtype == A.dtype and ssm.is_contiguous()


def _taps(mixer: Mixer) -> Tensor:
    """The convolution's weights (e, k); raises where something else than a Conv1d would be passed over."""
    if type(mixer.conv1d) is not nn.Conv1d:
        raise checks.fail(
            OP,
            f"conv1d is a {type(mixer.conv1d).__name__}, expected torch.nn.Conv1d.",
            "Its weights alone are read: leave it out of adapters and quantisation, or restore(model) first.",
            error=TypeError,
        )
    return mixer.conv1d.weight.squeeze(1)


def _states(cache: Any, layer: int) -> tuple[Tensor | None, Tensor | None]:
    """The last inputs of the convolution (b, e, at least k) and the scan's state; None before the first token."""
    if not cache.has_previous_state(layer):
        return None, None
    return cache.layers[layer].conv_states[0], cache.layers[layer].recurrent_states[0]


def _before(conv: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """The k−1 inputs before the next one, (b, k−1, e), of a cache's (b, e, at least k), newest last; a copy."""
    last = conv[..., conv.shape[-1] - (k - 1) :]
    return last.transpose(1, 2).to(wide(dtype), copy=True).contiguous()


# ---- what differs ----------------------------------------------------------------------------------------------------


def _halves(mixer: Mixer, projected: Tensor) -> tuple[Tensor, Tensor]:
    u, z = projected.chunk(2, dim=-1)
    return u, z


def _select(mixer: Mixer, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    n = mixer.ssm_state_size
    dt, B, C = mixer.x_proj(u).split([mixer.time_step_rank, n, n], dim=-1)
    return _step_sizes(mixer.dt_proj, dt, B, C)


def _select_normed(mixer: Mixer, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    n = mixer.ssm_state_size
    dt, B, C = mixer.x_proj(u).split([mixer.time_step_rank, n, n], dim=-1)
    return _step_sizes(mixer.dt_proj, mixer.dt_layernorm(dt), mixer.b_layernorm(B), mixer.c_layernorm(C))


def _step_sizes(project: nn.Module, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dt projected. A plain Linear leaves its bias to the scan, which adds it in float32; anything else is called."""
    plain = type(project) is nn.Linear and not any(getattr(project, name) for name in HOOKS)
    if plain and "forward" not in project.__dict__:  # accelerate's hooks live there
        return F.linear(dt, project.weight), B[:, :, None], C[:, :, None], project.bias  # type: ignore[return-value, arg-type]  # Linear
    return project(dt), B[:, :, None], C[:, :, None], None


def _interleaved(mixer: Mixer, projected: Tensor) -> tuple[Tensor, Tensor]:
    u, z = projected.unflatten(-1, (-1, 2)).unbind(-1)
    return u, z


def _select_by_head(mixer: Mixer, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Each head has projections of its own, which are bare parameters in transformers too."""
    n = mixer.ssm_state_size
    heads = u.unflatten(-1, (mixer.n_mamba_heads, -1))
    made = torch.einsum("btgp,gop->btgo", heads, mixer.x_proj_weight.to(u.dtype))
    dt, B, C = made.split([mixer.time_step_rank, n, n], dim=-1)
    dt = torch.einsum("btgr,gpr->btgp", dt, mixer.dt_proj_weight.to(u.dtype)).flatten(2)
    return dt, B, C, mixer.dt_proj_bias


MAMBA = Kind(_halves, _select)
NORMED = Kind(_halves, _select_normed)
HEADS = Kind(_interleaved, _select_by_head)
