"""Mamba3: the state space layer of Mamba-3, of one input or of several ranks a head, with mamba_ssm's parameters.

    z, x, B, C, dt, A, trap, angles = in_proj(input)          B, C = RMSNorm(B), RMSNorm(C) over each head's states
    dt = softplus(dt + dt_bias)     A = −f(A)     blend = sigmoid(trap)     rates = π tanh(angles)
    y = trapezoid_ssd(x, dt, A, blend, B + B_bias, C + C_bias, turned by rates) + D·x, gated by silu(z)
    output = out_proj(y)

No convolution, and no activation of x, B and C: the trapezoid reads the token before, the biases and the turning do the
rest. With ranks (MIMO), x, z and y are scaled a rank by mimo_x, mimo_z and mimo_o, and what ranks put out is added up.
A by zero-order hold, B by a trapezoid whose weight the data chooses.
Suffixes: b batch, t time step, h head, p head width, n state, g group, r rank, s pairs of states that turn.
Source: Lahoti et al. 2026, "Mamba-3: Improved Sequence Modeling using State Space Principles".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from stateline import checks, ops
from stateline.nn.mamba import check_step_range, initial_bias
from stateline.nn.mixer import Lengths, Mixer, check_input, check_state, zero_padding
from stateline.nn.norm import GatedRMSNorm, RMSNorm
from stateline.nn.precision import keep_wide, wide
from stateline.ops.parts import split
from stateline.ops.trapezoid_ssd.controls import A_ACTIVATIONS, controls

OP = "Mamba3"
System = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # x, dt, A, blend, B, C


@dataclass
class Mamba3State:
    """What a sequence carries from token to token, float32 (float64 in a float64 layer).

    angle: (b, h, s) how far B and C have turned, in turns.   ssm: (b, h, p, n) the state.
    k: (b, h, r, n) the last token's B, biased and turned.   v: (b, h, p) its x.
    """

    angle: Tensor
    ssm: Tensor
    k: Tensor
    v: Tensor


torch.export.register_dataclass(Mamba3State, serialized_type_name="stateline.nn.Mamba3State")


class Mamba3(Mixer):
    """Mamba-3, (b, t, d_model) -> (b, t, d_model); arguments, parameters and initial values are mamba_ssm's.

    Args:
        d_model: width of input and output.
        d_state: n, states a channel.   expand: inner width d_inner = int(expand · d_model).
        headdim: p; the layer has d_inner / headdim heads.   ngroups: g, groups of heads that share B and C.
        rope_fraction: share of the states that turn, in pairs, 0 to 1.
        rope_interleaved: pairs are neighbours (2i, 2i + 1), otherwise (i, i + n/2); None is as mamba_ssm has it:
            neighbours, and n/2 apart with is_mimo.
        A_activation: "heavy_tail", mamba_ssm's since June 2026, or "softplus", its earlier one and
            flash-linear-attention's. No checkpoint says which, and the other gives wrong numbers without an error.
        A_floor: least −A.   dt_min, dt_max, dt_init_floor: initial step sizes are log-uniform in [dt_min, dt_max], at
            least the floor.
        is_outproj_norm: normalise every head before the gate.   norm_eps: of all norms.
        is_mimo: mimo_rank inputs and outputs share each state. Without it, mimo_rank is not looked at.

    dt_bias, B_bias, C_bias, D and mimo_* stay float32 through .half(), .to(torch.bfloat16) and autocast, as does the
    state.
    Projections are called as modules, so adapters and quantised Linears may replace them.

    >>> layer = Mamba3(16, 8, headdim=8)
    >>> x = torch.randn(2, 10, 16)
    >>> y, state = layer.extend(x[:, :4], layer.init_state(2))
    >>> rest, state = layer.extend(x[:, 4:], state)
    >>> torch.allclose(torch.cat([y, rest], 1), layer(x), atol=1e-5)
    True
    """

    mimo_x: nn.Parameter | None
    mimo_z: nn.Parameter | None
    mimo_o: nn.Parameter | None
    no_weight_decay = ("dt_bias", "B_bias", "C_bias", "D", "mimo_x", "mimo_z", "mimo_o")
    full_precision = no_weight_decay
    reversible = True

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        rope_interleaved: bool | None = None,
        A_activation: str = "heavy_tail",
        A_floor: float = 1e-4,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        is_outproj_norm: bool = False,
        is_mimo: bool = False,
        mimo_rank: int = 4,
        norm_eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "d_state": d_state, "headdim": headdim, "ngroups": ngroups, "mimo_rank": mimo_rank}
        flags = {"is_outproj_norm": is_outproj_norm, "is_mimo": is_mimo}
        _check_options(sizes, flags if rope_interleaved is None else flags | {"rope_interleaved": rope_interleaved})
        checks.number(OP, "expand", expand, low=0, open_low=True)
        checks.number(OP, "rope_fraction", rope_fraction, low=0, high=1)
        checks.number(OP, "A_floor", A_floor, low=0)
        checks.choice(OP, "A_activation", A_activation, tuple(A_ACTIVATIONS))
        self.d_model, self.d_state, self.expand, self.headdim, self.ngroups = d_model, d_state, expand, headdim, ngroups
        self.rope_fraction, self.A_activation, self.A_floor = rope_fraction, A_activation, A_floor
        self.is_outproj_norm, self.is_mimo, self.mimo_rank = is_outproj_norm, is_mimo, mimo_rank if is_mimo else 1
        self.rope_interleaved = (not is_mimo) if rope_interleaved is None else rope_interleaved
        self.d_inner = int(expand * d_model)
        checks.number(OP, "int(expand · d_model)", self.d_inner, low=1, integer=True)
        if self.d_inner % headdim or (self.d_inner // headdim) % ngroups:
            raise checks.fail(
                OP,
                f"the inner width is {self.d_inner}, which headdim = {headdim} and ngroups = {ngroups} do not divide "
                "into heads of equal groups.",
                "Choose them so that expand · d_model = ngroups · (a whole number) · headdim.",
            )
        self.nheads, self.num_rope_angles = self.d_inner // headdim, int(d_state * rope_fraction) // 2

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        full: dict[str, Any] = {"device": device, "dtype": wide(dtype)}
        h, r, n, p = self.nheads, self.mimo_rank, d_state, headdim
        self.in_proj = nn.Linear(d_model, sum(self._widths()), bias=False, **made)
        self.dt_bias = nn.Parameter(torch.empty(h, **full))
        self.B_bias, self.C_bias = (nn.Parameter(torch.ones(h, r, n, **full)) for _ in "BC")
        self.B_norm, self.C_norm = (RMSNorm(n, norm_eps, **made) for _ in "BC")
        for name, value in (("mimo_x", 1 / r), ("mimo_z", 1.0), ("mimo_o", 1 / r)):
            mix = nn.Parameter(torch.full((h, r, p), value, **full)) if is_mimo else None
            self.register_parameter(name, mix)
        self.D = nn.Parameter(torch.ones(h, **full))
        self.norm = GatedRMSNorm(self.d_inner, norm_eps, h, True, **made) if is_outproj_norm else None
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False, **made)
        check_step_range(OP, dt_min, dt_max, dt_init_floor)
        if (
            self.dt_bias.device.type != "meta"
        ):  # where loaders build models: nothing to fill, whatever size a file claims
            with torch.no_grad():  # drawn on the CPU, so that a seed gives the same values on every device
                self.dt_bias.copy_(initial_bias(h, dt_min, dt_max, dt_init_floor, self.dt_bias.dtype))

    def init_state(
        self, batch: int, *, max_tokens: int | None = None, device: torch.device | str | None = None
    ) -> Mamba3State:
        """Zeros for `batch` sequences; the size is constant, so `max_tokens` changes nothing."""
        checks.number(OP, "batch", batch, low=0, integer=True)
        made: dict[str, Any] = {"device": device or self.dt_bias.device, "dtype": wide(self.dt_bias.dtype)}
        h, p, n = self.nheads, self.headdim, self.d_state
        shapes = ((h, self.num_rope_angles), (h, p, n), (h, self.mimo_rank, n), (h, p))
        return Mamba3State(*(torch.zeros(batch, *shape, **made) for shape in shapes))

    def forward(
        self, x: Tensor, *, lengths: Lengths | None = None, cu_seqlens: Tensor | None = None, reverse: bool = False
    ) -> Tensor:
        """x (b, t, d_model) -> y (b, t, d_model) for whole sequences; see Mixer.

        reverse: run time backwards, from each sequence's last token to its first; nothing is copied for it.
        """
        return self._run(x, None, lengths=lengths, cu_seqlens=cu_seqlens, reverse=reverse)[0]

    def extend(
        self,
        x: Tensor,
        state: Mamba3State | None = None,
        *,
        lengths: Lengths | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Mamba3State]:
        """x (b, t, d_model) -> y (b, t, d_model), state; see Mixer."""
        return self._run(x, state, lengths=lengths, cu_seqlens=cu_seqlens)

    def _run(
        self, x: Tensor, state: Mamba3State | None, *, lengths: Lengths | None, **where: Any
    ) -> tuple[Tensor, Mamba3State]:
        check_input(OP, x, "b t d_model", self.d_model, self.B_norm.weight.dtype)
        z, system, options = self._system(self.in_proj(zero_padding(x, lengths)))
        initial = None if state is None else _parts(state)
        y, end = ops.trapezoid_ssd(*system, **options | where | {"initial_state": initial, "lengths": lengths})
        return zero_padding(self._finish(y, z), lengths), Mamba3State(*end)

    @torch.no_grad()
    def step_(self, x: Tensor, state: Mamba3State) -> Tensor:
        """x (b, d_model) -> y (b, d_model), writing into `state`; no gradient."""
        check_input(OP, x, "b d_model", self.d_model, self.B_norm.weight.dtype)
        z, system, options = self._system(self.in_proj(x))
        return self._finish(ops.trapezoid_ssd_step_(_parts(state), *system, **options), z)

    def _widths(self) -> list[int]:
        """Rows of in_proj: gate, x, B, C (ranks slowest), step size, rate, trapezoid, angles."""
        shared, h = self.mimo_rank * self.ngroups * self.d_state, self.nheads
        return [self.d_inner, self.d_inner, shared, shared, h, h, h, self.num_rope_angles]

    def _system(self, projected: Tensor) -> tuple[Tensor, System, dict[str, Any]]:
        """z (…, h, p), the system's tensors, and its other arguments."""
        full, widths = wide(projected.dtype), self._widths()
        z, x, B, C, narrow = split(projected, [*widths[:4], sum(widths[4:])])
        dt, A, blend, rates = controls(narrow, self.dt_bias.to(full), self.A_activation, self.A_floor)
        ranks = (self.mimo_rank, self.ngroups, self.d_state)
        B, C = (norm(v.unflatten(-1, ranks))[0] for norm, v in ((self.B_norm, B), (self.C_norm, C)))
        options: dict[str, Any] = {"D": self.D.to(full), "interleaved": self.rope_interleaved}
        options |= {"B_bias": self.B_bias.to(full), "C_bias": self.C_bias.to(full)}
        options["rates"] = rates if self.num_rope_angles else None
        x, z = (v.unflatten(-1, (self.nheads, self.headdim)) for v in (x, z))
        mix, z_mix, y_mix = (None if v is None else v.to(full) for v in (self.mimo_x, self.mimo_z, self.mimo_o))
        options |= {"mix": mix} if self.norm is not None else {"mix": mix, "z": z, "z_mix": z_mix, "y_mix": y_mix}
        return z, (x, dt, A, blend, B, C), options

    def _finish(self, y: Tensor, z: Tensor) -> Tensor:
        """y (…, h, p), or (…, h, r, p) before norm and gate, and z (…, h, p) -> (…, d_model)."""
        if self.norm is None:
            return self.out_proj(y.flatten(-2))
        if not self.is_mimo:
            return self.out_proj(self.norm(y.flatten(-3), z.flatten(-2)))
        full = wide(y.dtype)
        gate = z.to(full).unsqueeze(-2) * cast(Tensor, self.mimo_z).to(full)
        y, gate = (v.transpose(-3, -2).flatten(-2) for v in (y, gate))  # a weight a channel, shared by ranks
        normed = self.norm(y.to(full), gate).unflatten(-1, (self.nheads, self.headdim)).transpose(-3, -2)
        return self.out_proj((normed * cast(Tensor, self.mimo_o).to(full)).sum(-2).flatten(-2).to(z.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mamba3:
        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(keep_wide(fn), recurse=False)  # the module's own parameters are all in full precision

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        sizes = f"d_model={self.d_model}, d_state={self.d_state}, d_inner={self.d_inner}, headdim={self.headdim}"
        return f"{sizes}, ngroups={self.ngroups}, mimo_rank={self.mimo_rank}, A_activation={self.A_activation!r}"


def _parts(state: Mamba3State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_state(OP, state, Mamba3State)
    return state.angle, state.ssm, state.k, state.v


def _check_options(sizes: dict[str, int], flags: dict[str, bool]) -> None:
    for name, value in sizes.items():
        checks.number(OP, name, value, low=1, integer=True)
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise checks.fail(OP, f"{name} is {flag!r}, expected True or False.", error=TypeError)
