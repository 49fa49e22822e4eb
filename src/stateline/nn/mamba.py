"""Mamba: the selective state space layer of Mamba-1, with mamba_ssm's parameters.

    x, z = in_proj(input)          x = silu(conv(x))          dt, B, C = x_proj(x)
    y = selective_scan(x, softplus(dt_proj(dt) + bias), A = −exp(A_log), B, C) + D·x, gated by silu(z)
    output = out_proj(y)

A by zero-order hold, B by Euler. Suffixes: b batch, t time step, e inner channel, n state, k taps, r rank of dt.
Source: Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", section 3.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stateline import checks, ops
from stateline.nn.mixer import Lengths, Mixer, check_input, check_state, zero_padding
from stateline.nn.precision import keep_wide, wide
from stateline.ops.causal_conv1d import conv_halves

OP = "Mamba"


@dataclass
class MambaState:
    """What a sequence carries from token to token, float32 (float64 in a float64 layer).

    conv: (b, k−1, e) the last inputs of the convolution, oldest first.   ssm: (b, e, n) the state of the scan.
    """

    conv: Tensor
    ssm: Tensor


torch.export.register_dataclass(MambaState, serialized_type_name="stateline.nn.MambaState")


class StepSize(nn.Linear):
    """A Linear that leaves its bias out: the scan adds it before softplus, in float32, which casts do not take away."""

    full_precision = ("bias",)
    leaves_bias_out = True

    def __init__(
        self, rank: int, d_inner: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(rank, d_inner, bias=True, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(d_inner, device=device, dtype=wide(dtype)))
        self.bias._no_reinit = True  # type: ignore[attr-defined]  # the sign at which initialisers leave a bias as it is

    def forward(self, x: Tensor) -> Tensor:
        """x (…, r) -> (…, e), without the bias."""
        return F.linear(x, self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StepSize:
        # The bias and its gradient are the only vectors here; identity would not survive the replacing of parameters.
        return super()._apply(lambda tensor: keep_wide(fn)(tensor) if tensor.dim() == 1 else fn(tensor), recurse)


def check_step_range(op: str, dt_min: float, dt_max: float, floor: float) -> None:
    """Raise unless initial step sizes can be drawn from these."""
    checks.number(op, "dt_min", dt_min, low=0, open_low=True)
    checks.number(op, "dt_max", dt_max, low=dt_min)
    checks.number(op, "dt_init_floor", floor, low=0, open_low=True)


def initial_bias(count: int, dt_min: float, dt_max: float, floor: float, dtype: torch.dtype) -> Tensor:
    """(count) biases whose softplus is log-uniform in [dt_min, dt_max], at least the floor; drawn on the CPU."""
    low, high = math.log(dt_min), math.log(dt_max)
    dt = (torch.rand(count, dtype=dtype, device="cpu") * (high - low) + low).exp().clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus


class Mamba(Mixer):
    """Mamba-1, (b, t, d_model) -> (b, t, d_model); arguments, parameters and initial values are mamba_ssm's.

    Args:
        d_model: width of input and output.
        d_state: n, states a channel.   d_conv: k, taps of the convolution, the current token included.
        expand: inner width e = int(expand · d_model).
        dt_rank: rank of the step-size projection; "auto" is ⌈d_model/16⌉.
        dt_min, dt_max, dt_init_floor: initial step sizes are log-uniform in [dt_min, dt_max], at least the floor.
        dt_init, dt_scale: initial step-size weights, "random" in ± dt_rank^−½ · dt_scale or "constant" at that value.
        conv_bias, bias: give the convolution, the two outer projections a bias.
        b_c_dt_rms_eps: dt (before its projection), B and C are divided by their root mean square, this added to its
            square, as in FalconMamba; None for Mamba as it was published. (mamba_ssm has none.)

    A_log, D and dt_proj.bias stay float32 through .half(), .to(torch.bfloat16) and autocast, as does the state.
    Projections are called as modules, so adapters and quantised Linears may replace them; one that replaces `dt_proj`
    must wrap the original.

    >>> layer = Mamba(16)
    >>> x = torch.randn(2, 10, 16)
    >>> y, state = layer.extend(x[:, :4], layer.init_state(2))
    >>> rest, state = layer.extend(x[:, 4:], state)
    >>> torch.allclose(torch.cat([y, rest], 1), layer(x), atol=1e-5)
    True
    """

    no_weight_decay = ("A_log", "D")
    full_precision = ("A_log", "D")
    reversible = True

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        b_c_dt_rms_eps: float | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv)):
            checks.number(OP, name, value, low=1, integer=True)
        checks.number(OP, "expand", expand, low=0, open_low=True)
        for name, value in (("conv_bias", conv_bias), ("bias", bias)):
            if not isinstance(value, bool):
                raise checks.fail(OP, f"{name} is {value!r}, expected True or False.", error=TypeError)
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        checks.number(OP, "int(expand · d_model)", self.d_inner, low=1, integer=True)
        if b_c_dt_rms_eps is not None:
            checks.number(OP, "b_c_dt_rms_eps", b_c_dt_rms_eps, low=0, open_low=True)
        self.b_c_dt_rms_eps = b_c_dt_rms_eps
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        checks.number(OP, "dt_rank", self.dt_rank, low=1, integer=True)  # type: ignore[arg-type]  # a wrong string fails here

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        e, n, r = self.d_inner, d_state, int(self.dt_rank)
        self.in_proj = nn.Linear(d_model, 2 * e, bias=bias, **made)
        self.conv1d = nn.Conv1d(e, e, d_conv, groups=e, padding=d_conv - 1, bias=conv_bias, **made)
        self.x_proj = nn.Linear(e, r + 2 * n, bias=False, **made)
        self.dt_proj = StepSize(r, e, **made)
        full = wide(dtype)
        self.A_log = nn.Parameter(torch.empty(e, n, dtype=full, device=device))
        self.D = nn.Parameter(torch.ones(e, dtype=full, device=device))
        self.out_proj = nn.Linear(e, d_model, bias=bias, **made)
        self._init_system(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)

    @torch.no_grad()
    def _init_system(self, dt_min: float, dt_max: float, dt_init: str, dt_scale: float, dt_init_floor: float) -> None:
        check_step_range(OP, dt_min, dt_max, dt_init_floor)
        checks.number(OP, "dt_scale", dt_scale, low=0, open_low=True)
        checks.choice(OP, "dt_init", dt_init, ("random", "constant"))
        if self.A_log.device.type == "meta":  # where loaders build models: nothing to fill, whatever size a file claims
            return
        # computed on the CPU, so that a seed gives the same values on every device
        rates = torch.arange(1, self.d_state + 1, dtype=self.A_log.dtype, device="cpu")
        self.A_log.copy_(rates.log().expand(self.d_inner, -1))
        bound = int(self.dt_rank) ** -0.5 * dt_scale
        nn.init.uniform_(self.dt_proj.weight, -bound if dt_init == "random" else bound, bound)
        self.dt_proj.bias.copy_(initial_bias(self.d_inner, dt_min, dt_max, dt_init_floor, self.dt_proj.bias.dtype))

    def init_state(
        self, batch: int, *, max_tokens: int | None = None, device: torch.device | str | None = None
    ) -> MambaState:
        """Zeros for `batch` sequences; the size is constant, so `max_tokens` changes nothing."""
        checks.number(OP, "batch", batch, low=0, integer=True)
        made: dict[str, Any] = {"device": device or self.A_log.device, "dtype": wide(self.A_log.dtype)}
        conv = torch.zeros(batch, self.d_conv - 1, self.d_inner, **made)
        return MambaState(conv, torch.zeros(batch, self.d_inner, self.d_state, **made))

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
        state: MambaState | None = None,
        *,
        lengths: Lengths | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, MambaState]:
        """x (b, t, d_model) -> y (b, t, d_model), state; see Mixer."""
        return self._run(x, state, lengths=lengths, cu_seqlens=cu_seqlens)

    def _run(
        self, x: Tensor, state: MambaState | None, *, lengths: Lengths | None, **where: Any
    ) -> tuple[Tensor, MambaState]:
        self._check(x, "b t d_model")
        if state is not None:
            check_state(OP, state, MambaState)
        where["lengths"] = lengths
        xz = self.in_proj(zero_padding(x, lengths))
        taps = self._taps()
        u, same_u, z, conv = conv_halves(xz, *taps, initial_state=None if state is None else state.conv, **where)
        dt, B, C = self._select(same_u)
        A = -torch.exp(self.A_log.to(wide(u.dtype)))
        y, ssm = ops.selective_scan(
            u, dt, A, B, C, z=z, initial_state=None if state is None else state.ssm, **self._skip_and_bias(u), **where
        )
        return zero_padding(self.out_proj(y), lengths), MambaState(conv, ssm)

    @torch.no_grad()
    def step_(self, x: Tensor, state: MambaState) -> Tensor:
        """x (b, d_model) -> y (b, d_model), writing into `state`; no gradient."""
        self._check(x, "b d_model")
        check_state(OP, state, MambaState)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = ops.causal_conv1d_step_(state.conv, u, *self._taps(), activation="silu")
        dt, B, C = self._select(u)
        system = (self.A_log.to(wide(u.dtype)), B[:, None], C[:, None])
        y = ops.selective_scan_step_(state.ssm, u, dt, *system, z=z, log_A=True, **self._skip_and_bias(u))
        return self.out_proj(y)

    def _check(self, x: Tensor, form: str) -> None:
        check_input(OP, x, form, self.d_model, self.conv1d.weight.dtype)  # adapters and packing leave this one alone

    def _taps(self) -> tuple[Tensor, Tensor | None]:
        return self.conv1d.weight.squeeze(1), self.conv1d.bias

    def _select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u (…, e) -> dt (…, e) before bias and softplus, B, C (…, n)."""
        dt, B, C = self.x_proj(u).split([int(self.dt_rank), self.d_state, self.d_state], dim=-1)
        if (eps := self.b_c_dt_rms_eps) is not None:
            dt, B, C = (ops.rms_norm(v, torch.ones(v.shape[-1], device=v.device), eps=eps)[0] for v in (dt, B, C))
        return self.dt_proj(dt), B, C

    def _skip_and_bias(self, u: Tensor) -> dict[str, Any]:
        full = wide(u.dtype)
        return {"D": self.D.to(full), "dt_bias": self._step_bias().to(full), "dt_softplus": True}

    def _step_bias(self) -> Tensor:
        found = [m for m in self.dt_proj.modules() if getattr(m, "leaves_bias_out", False)]  # an adapter may wrap it
        if len(found) != 1:
            raise checks.fail(
                OP,
                f"dt_proj was replaced by {type(self.dt_proj).__name__}, which does not wrap the original.",
                "Its bias must reach the scan unrounded: exclude dt_proj from conversion, or wrap it.",
                error=TypeError,
            )
        return cast(Tensor, found[0].bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mamba:
        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(keep_wide(fn), recurse=False)  # A_log and D are this module's own parameters

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return f"d_model={self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, d_inner={self.d_inner}"
