"""Mamba2: the state space dual layer of Mamba-2, with mamba_ssm's parameters.

    z, xBC, dt = in_proj(input)                 x, B, C = silu(conv(xBC))
    y = ssd(x, softplus(dt + dt_bias), A = −exp(A_log), B, C) + D·x
    output = out_proj(RMSNorm(y · silu(z)))

One decay a head. A by zero-order hold, B by Euler.
Suffixes: b batch, t time step, h head, p head width, n state, g group, k taps.
Source: Dao & Gu 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
Space Duality", section 7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stateline import checks, ops
from stateline.nn.mamba import check_step_range, initial_bias
from stateline.nn.mixer import Lengths, Mixer, check_input, check_state, zero_padding
from stateline.nn.norm import GatedRMSNorm
from stateline.nn.precision import keep_wide, wide
from stateline.ops.parts import split
from stateline.ops.ssd import Limit, check_limit

OP = "Mamba2"


@dataclass
class Mamba2State:
    """What a sequence carries from token to token, float32 (float64 in a float64 layer; ssm in `state_dtype`, if set).

    conv: (b, k−1, h·p + 2·g·n) the last inputs of the convolution, oldest first.   ssm: (b, h, p, n) the state.
    """

    conv: Tensor
    ssm: Tensor


torch.export.register_dataclass(Mamba2State, serialized_type_name="stateline.nn.Mamba2State")


class Mamba2(Mixer):
    """Mamba-2, (b, t, d_model) -> (b, t, d_model); arguments, parameters and initial values are mamba_ssm's.

    Args:
        d_model: width of input and output.
        d_state: n, states a channel.   d_conv: k, taps of the convolution, the current token included.
        conv_init: bound of uniform initial taps; None is PyTorch's.
        expand: inner width d_inner = int(expand · d_model).
        headdim: p; the layer has d_ssm / headdim heads.
        d_ssm: channels that go through the recurrence; the d_inner − d_ssm others through a gated unit beside it.
        ngroups: g, groups of heads that share B and C, and of channels that are normalised together.
        A_init_range: initial −A is uniform in it.   D_has_hdim: a skip weight a channel, not one a head.
        rmsnorm: normalise before out_proj; norm_before_gate: and gate after that, not before.
        dt_min, dt_max, dt_init_floor: initial step sizes are log-uniform in [dt_min, dt_max], at least the floor.
        dt_limit: (low, high) of step sizes, at training and at decoding; None for none, also for one of them.
        bias, conv_bias: give the two projections, the convolution a bias.   norm_eps: of the norm.

    A_log, D and dt_bias stay float32 through .half(), .to(torch.bfloat16) and autocast, as does the state.
    Projections are called as modules, so adapters and quantised Linears may replace them.
    `state_dtype`: set to torch.bfloat16, states made from then on keep ssm in it, in half the memory: computed in
    float32, rounded as they are stored (docs/numerics.md says what that costs).

    >>> layer = Mamba2(16, headdim=8)
    >>> x = torch.randn(2, 10, 16)
    >>> y, state = layer.extend(x[:, :4], layer.init_state(2))
    >>> rest, state = layer.extend(x[:, 4:], state)
    >>> torch.allclose(torch.cat([y, rest], 1), layer(x), atol=1e-5)
    True
    """

    no_weight_decay = ("A_log", "D", "dt_bias")
    full_precision = ("A_log", "D", "dt_bias")
    reversible = True

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: Sequence[float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: Limit | None = None,
        bias: bool = False,
        conv_bias: bool = True,
        norm_eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "d_state": d_state, "d_conv": d_conv, "headdim": headdim, "ngroups": ngroups}
        flags = {"D_has_hdim": D_has_hdim, "rmsnorm": rmsnorm, "norm_before_gate": norm_before_gate, "bias": bias}
        _check_options(sizes, flags | {"conv_bias": conv_bias})
        checks.number(OP, "expand", expand, low=0, open_low=True)
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.headdim, self.ngroups, self.D_has_hdim, self.rmsnorm = headdim, ngroups, D_has_hdim, rmsnorm
        self.d_inner = int(expand * d_model)
        checks.number(OP, "int(expand · d_model)", self.d_inner, low=1, integer=True)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        checks.number(OP, "d_ssm", self.d_ssm, low=1, high=self.d_inner, integer=True)
        if self.d_ssm % headdim or self.d_ssm % ngroups or (self.d_ssm // headdim) % ngroups:
            raise checks.fail(
                OP,
                f"d_ssm is {self.d_ssm}, which headdim = {headdim} and ngroups = {ngroups} do not divide into heads of "
                "equal groups.",
                "Choose headdim and ngroups so that d_ssm = ngroups · (a whole number) · headdim.",
            )
        self.nheads, self.d_mlp = self.d_ssm // headdim, self.d_inner - self.d_ssm
        check_limit(OP, dt_limit)
        self.dt_limit = None if dt_limit is None else tuple(dt_limit)
        self._state_dtype: torch.dtype | None = None

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv_dim = self.d_ssm + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, sum(self._widths()), bias=bias, **made)
        self.conv1d = nn.Conv1d(
            self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim, padding=d_conv - 1, bias=conv_bias, **made
        )
        full: dict[str, Any] = {"device": device, "dtype": wide(dtype)}
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, **full))
        self.A_log = nn.Parameter(torch.empty(self.nheads, **full))
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, **full))
        self.norm = GatedRMSNorm(self.d_ssm, norm_eps, ngroups, norm_before_gate, **made) if rmsnorm else None
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **made)
        self._init_system(conv_init, A_init_range, dt_min, dt_max, dt_init_floor)

    @torch.no_grad()
    def _init_system(
        self, conv_init: float | None, A_init_range: Sequence[float], dt_min: float, dt_max: float, dt_init_floor: float
    ) -> None:
        check_step_range(OP, dt_min, dt_max, dt_init_floor)
        if conv_init is not None:
            checks.number(OP, "conv_init", conv_init, low=0)
        if not isinstance(A_init_range, list | tuple) or len(A_init_range) != 2:
            raise checks.fail(OP, f"A_init_range is {A_init_range!r}, expected two numbers (low, high).")
        low, high = A_init_range
        checks.number(OP, "A_init_range[0]", low, low=0, open_low=True)
        checks.number(OP, "A_init_range[1]", high, low=low)
        if self.A_log.device.type == "meta":  # where loaders build models: nothing to fill, whatever size a file claims
            return
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        # computed on the CPU, so that a seed gives the same values on every device
        self.dt_bias.copy_(initial_bias(self.nheads, dt_min, dt_max, dt_init_floor, self.dt_bias.dtype))
        uniform = torch.rand(self.nheads, dtype=self.A_log.dtype, device="cpu")
        self.A_log.copy_((low + (high - low) * uniform).log())

    @property
    def state_dtype(self) -> torch.dtype | None:
        """What states made from now on keep ssm in: torch.bfloat16, or None for the layer's full precision."""
        return self._state_dtype

    @state_dtype.setter
    def state_dtype(self, dtype: torch.dtype | str | None) -> None:
        """Choose it, or its name; ValueError for another dtype, or in a float64 layer."""
        chosen = check_state_dtype(OP, dtype)
        if chosen is not None and self.A_log.dtype == torch.float64:
            raise checks.fail(OP, f"state_dtype is {chosen} in a float64 layer, whose states are float64.")
        self._state_dtype = chosen

    def init_state(
        self, batch: int, *, max_tokens: int | None = None, device: torch.device | str | None = None
    ) -> Mamba2State:
        """Zeros for `batch` sequences; the size is constant, so `max_tokens` changes nothing."""
        checks.number(OP, "batch", batch, low=0, integer=True)
        made: dict[str, Any] = {"device": device or self.A_log.device, "dtype": wide(self.A_log.dtype)}
        conv = torch.zeros(batch, self.d_conv - 1, self.conv_dim, **made)
        kept = made if self.state_dtype is None else made | {"dtype": self.state_dtype}
        return Mamba2State(conv, torch.zeros(batch, self.nheads, self.headdim, self.d_state, **kept))

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
        state: Mamba2State | None = None,
        *,
        lengths: Lengths | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Mamba2State]:
        """x (b, t, d_model) -> y (b, t, d_model), state; see Mixer."""
        return self._run(x, state, lengths=lengths, cu_seqlens=cu_seqlens)

    def _run(
        self, x: Tensor, state: Mamba2State | None, *, lengths: Lengths | None, **where: Any
    ) -> tuple[Tensor, Mamba2State]:
        check_input(OP, x, "b t d_model", self.d_model, self.conv1d.weight.dtype)
        if state is not None:
            check_state(OP, state, Mamba2State)
        where["lengths"] = lengths
        beside, z, u, dt = self._split(self.in_proj(zero_padding(x, lengths)))
        u, conv = ops.causal_conv1d(
            u, *self._taps(), activation="silu", initial_state=None if state is None else state.conv, **where
        )
        start = None if state is None else state.ssm.to(wide(u.dtype)) if self.state_dtype else state.ssm
        options = self._options(u, z) | where | {"initial_state": start}
        x, A, B, C = self._system(u)
        y, ssm = ops.ssd(x, dt, -torch.exp(A), B, C, **options)
        ssm = ssm if self.state_dtype is None else ssm.to(self.state_dtype)
        return zero_padding(self._finish(y, z, beside), lengths), Mamba2State(conv, ssm)

    @torch.no_grad()
    def step_(self, x: Tensor, state: Mamba2State) -> Tensor:
        """x (b, d_model) -> y (b, d_model), writing into `state`; no gradient."""
        check_input(OP, x, "b d_model", self.d_model, self.conv1d.weight.dtype)
        check_state(OP, state, Mamba2State)
        beside, z, u, dt = self._split(self.in_proj(x))
        u = ops.causal_conv1d_step_(state.conv, u, *self._taps(), activation="silu")
        x, A, B, C = self._system(u)
        y = ops.ssd_step_(state.ssm, x, dt, A, B, C, log_A=True, **self._options(u, z))
        return self._finish(y, z, beside)

    def _widths(self) -> list[int]:
        """Rows of in_proj: gate and value of the unit beside, gate, what goes into the convolution, step size."""
        return [self.d_mlp, self.d_mlp, self.d_ssm, self.conv_dim, self.nheads]

    def _split(self, projected: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        gate, value, z, u, dt = split(projected, self._widths())
        return (F.silu(gate) * value if self.d_mlp else None), z, u, dt

    def _taps(self) -> tuple[Tensor, Tensor | None]:
        return self.conv1d.weight.squeeze(1), self.conv1d.bias

    def _system(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u (…, conv_dim) -> x (…, h, p), log(−A) (h), B, C (…, g, n)."""
        shared = self.ngroups * self.d_state
        x, B, C = split(u, [self.d_ssm, shared, shared])
        B, C = (v.unflatten(-1, (self.ngroups, self.d_state)) for v in (B, C))
        return x.unflatten(-1, (self.nheads, self.headdim)), self.A_log.to(wide(u.dtype)), B, C

    def _options(self, u: Tensor, z: Tensor) -> dict[str, Any]:
        full = wide(u.dtype)
        D = self.D.to(full)
        options: dict[str, Any] = {"D": D.view(self.nheads, self.headdim) if self.D_has_hdim else D}
        options |= {"dt_bias": self.dt_bias.to(full), "dt_softplus": True, "dt_limit": self.dt_limit}
        return options | {"z": None if self._gates(z) else z.unflatten(-1, (self.nheads, self.headdim))}

    def _gates(self, z: Tensor) -> bool:
        """Whether the norm gates by itself: where it comes before the gate, and on a GPU, whose scan would have to find
        its output again for the gate's gradient."""
        return self.norm is not None and (self.norm.norm_before_gate or z.is_cuda)

    def _finish(self, y: Tensor, z: Tensor, beside: Tensor | None) -> Tensor:
        """y (…, h, p), z (…, h·p) -> (…, d_model)."""
        y = y.flatten(-2)
        if self.norm is not None:
            y = self.norm(y, z if self._gates(z) else None)
        return self.out_proj(y if beside is None else torch.cat([beside, y], -1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mamba2:
        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(keep_wide(fn), recurse=False)  # A_log, D and dt_bias are this module's own parameters

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        sizes = f"d_model={self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, d_inner={self.d_inner}"
        return f"{sizes}, headdim={self.headdim}, ngroups={self.ngroups}"


def check_state_dtype(op: str, given: torch.dtype | str | None) -> torch.dtype | None:
    """What `state_dtype` names; ValueError for anything but bfloat16 and None."""
    if given is not None and given not in (torch.bfloat16, "bfloat16"):
        raise checks.fail(op, f"state_dtype is {given!r}, expected torch.bfloat16 or None.")
    return None if given is None else torch.bfloat16


def _check_options(sizes: dict[str, int], flags: dict[str, bool]) -> None:
    for name, value in sizes.items():
        checks.number(OP, name, value, low=1, integer=True)
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise checks.fail(OP, f"{name} is {flag!r}, expected True or False.", error=TypeError)
