"""S4 and S4D: a linear state space a channel, as a convolution, as a scan or step by step.

    x' = A x + B u,  y = 2 Re(C x) + D u      sampled every dt seconds; A diagonal, or that less a low rank
    output = GLU(Linear(dropout(GELU(y))))

Norm and residual stand outside, as for every mixer.
Suffixes: b batch, t time step, h channel, c read-outs a channel, n complex states (half of d_state; the others are
their conjugates).
Sources: Gu, Goel & Ré 2022, "Efficiently Modeling Long Sequences with Structured State Spaces"; Gu, Gupta, Goel & Ré
2022, "On the Parameterization and Initialization of Diagonal State Space Models".
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stateline import checks
from stateline.nn.mixer import Lengths, Mixer, check_input, check_state, zero_padding
from stateline.nn.precision import keep_wide, wide
from stateline.nn.s4_systems import RULES, DiagonalSystem, DPLRSystem, Start, System
from stateline.ops import long_conv
from stateline.ops.segments import build
from stateline.theory import dplr, hippo

MODES = ("scan", "convolution")
#: Measures for S4 whose matrices are a normal one less a low rank; see stateline.theory.hippo.
MEASURES = ("legs", "legt", "lagt", "fourier")


@dataclass
class S4State:
    """What a sequence carries from step to step. x: (b, h, n, 2) the state, complex numbers as real pairs, float32."""

    x: Tensor


torch.export.register_dataclass(S4State, serialized_type_name="stateline.nn.S4State")


@dataclass(frozen=True)
class Shape:
    """Arguments that S4 and S4D share, checked; n_ssm None means one system a channel."""

    op: str
    d_model: int
    d_state: int
    channels: int
    n_ssm: int | None
    dt_min: float
    dt_max: float
    lr: float | None

    def __post_init__(self) -> None:
        if self.n_ssm is None:
            object.__setattr__(self, "n_ssm", self.d_model)
        for name in ("d_model", "d_state", "channels", "n_ssm"):
            checks.number(self.op, name, getattr(self, name), low=1, integer=True)
        if self.d_state % 2:
            problem = f"d_state is {self.d_state}, expected an even number: states are conjugate pairs."
            raise checks.fail(self.op, problem)
        if self.d_model % self.systems:
            raise checks.fail(self.op, f"n_ssm is {self.n_ssm}, which does not divide d_model = {self.d_model}.")
        checks.number(self.op, "dt_min", self.dt_min, low=0, open_low=True)
        checks.number(self.op, "dt_max", self.dt_max, low=self.dt_min)
        if self.lr is not None:
            checks.number(self.op, "lr", self.lr, low=0)

    @property
    def systems(self) -> int:
        """How many different A and B there are."""
        return self.n_ssm or self.d_model

    def start(self, A: Tensor, B: Tensor, P: Tensor | None = None) -> Start:
        """Initial values with these matrices."""
        return Start(A, B, P, self.dt_min, self.dt_max)


class _StateSpace(Mixer):
    """What S4 and S4D share: all but the system, which `kernel` is."""

    op: str
    reversible = True
    full_precision = ("D",)
    no_weight_decay = ("D",)

    def __init__(
        self, shape: Shape, kernel: System, activation: str | None, final_act: str | None, dropout: float,
        mode: str | None, rate: float, made: dict[str, Any],
    ) -> None:  # fmt: skip
        super().__init__()
        self.op = shape.op
        checks.choice(self.op, "activation", activation, ("gelu", None))
        checks.choice(self.op, "final_act", final_act, ("glu", None))
        checks.number(self.op, "dropout", dropout, low=0, high=1)
        d_model, channels = shape.d_model, shape.channels
        self.d_model, self.d_state, self.channels = d_model, shape.d_state, channels
        self.activation, self.final_act, self.dropout = activation, final_act, dropout
        self.mode, self.rate = mode, rate
        self.kernel = kernel
        self.D = nn.Parameter(torch.empty(channels, d_model, device=made["device"], dtype=wide(made["dtype"])))
        self.output_linear = nn.Sequential(nn.Linear(channels * d_model, 2 * d_model if final_act else d_model, **made))
        if self.D.device.type != "meta":
            with torch.no_grad():
                self.D.copy_(torch.randn(self.D.shape, device="cpu"))

    @property
    def mode(self) -> str | None:
        """How sequences are computed: "scan", "convolution", or None, which chooses by device."""
        return self._mode

    @mode.setter
    def mode(self, value: str | None) -> None:
        """Set how sequences are computed; raises ValueError for a name that is neither."""
        checks.choice(self.op, "mode", value, (*MODES, None))
        self._mode = value

    @property
    def rate(self) -> float:
        """Samples of the training data a sample now; dt is multiplied by it."""
        return self._rate

    @rate.setter
    def rate(self, value: float) -> None:
        """Set the rate; raises unless it is a number above 0."""
        checks.number(self.op, "rate", value, low=0, open_low=True)
        self._rate = float(value)

    def init_state(
        self, batch: int, *, max_tokens: int | None = None, device: torch.device | str | None = None
    ) -> S4State:
        """Zeros for `batch` sequences; the size is constant, so `max_tokens` changes nothing."""
        checks.number(self.op, "batch", batch, low=0, integer=True)
        made: dict[str, Any] = {"device": device or self.D.device, "dtype": wide(self.D.dtype)}
        return S4State(torch.zeros(batch, self.d_model, self.d_state // 2, 2, **made))

    def forward(
        self, x: Tensor, *, lengths: Lengths | None = None, cu_seqlens: Tensor | None = None, reverse: bool = False
    ) -> Tensor:
        """y (b, t, d) for whole sequences x (b, t, d); arguments as for `Mixer.extend`.

        reverse: run time backwards, from each sequence's last token to its first.
        """
        return self._run(x, None, False, lengths=lengths, cu_seqlens=cu_seqlens, reverse=reverse)[0]

    def extend(
        self,
        x: Tensor,
        state: S4State | None = None,
        *,
        lengths: Lengths | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, S4State]:
        """x (b, t, d_model) -> y (b, t, d_model), state; see Mixer."""
        y, end = self._run(x, state, True, lengths=lengths, cu_seqlens=cu_seqlens)
        return y, S4State(end)

    def _run(self, x: Tensor, state: S4State | None, onward: bool, **where: Any) -> tuple[Tensor, Tensor]:
        """y and the state after x, which a convolution leaves out unless it goes `onward`.

        where: lengths, cu_seqlens, and reverse if there is no state.
        """
        check_input(self.op, x, "b t d_model", self.d_model, self._dtype())
        where = {"reverse": False} | where
        segments = build(self.op, x, where["lengths"], "right", where["cu_seqlens"])
        initial = None if state is None else self._initial(state, segments.count)
        convolve = (self.mode or self._fastest(x.is_cuda, onward, where["cu_seqlens"] is not None)) == "convolution"
        with _without_autocast(x):
            u = zero_padding(x, where["lengths"]).to(wide(self.D.dtype))
            y = end = u  # of which nothing is used
            if onward or not convolve:
                y, end = self.kernel.scan(u, initial, self.rate, None if convolve else self.D, convolve, where)
            if convolve:
                taps = self.kernel.taps(max(u.shape[1], 1), self.rate, u.dtype)
                own = torch.stack([long_conv(u, k, **where)[0] for k in taps], 2) + self.D * u[:, :, None]
                y = y + own if onward else own
        return zero_padding(self._finish(y.to(x.dtype)), where["lengths"]), end

    @torch.no_grad()
    def step_(self, x: Tensor, state: S4State) -> Tensor:
        """x (b, d_model) -> y (b, d_model), writing into `state`; no gradient."""
        check_input(self.op, x, "b d_model", self.d_model, self._dtype())
        self._initial(state, x.shape[0])
        with _without_autocast(x):
            u = x.to(wide(self.D.dtype))
            y = self.kernel.step_(u, state.x, self.rate, self.D)
        return self._finish(y.to(x.dtype))

    def _fastest(self, gpu: bool, onward: bool, packed: bool) -> str:
        """How a sequence is computed where nothing says so."""
        return "convolution" if self.kernel.dense and gpu and not (onward or packed) else "scan"

    def _dtype(self) -> torch.dtype:
        """Of the data: what the projection was built in, whatever has wrapped it since."""
        return next((p.dtype for p in self.output_linear.parameters()), self.D.dtype)

    def _initial(self, state: S4State, rows: int) -> Tensor:
        """The state's numbers (rows, h, n, 2), checked."""
        check_state(self.op, state, S4State)
        sizes = checks.Sizes(self.op)
        sizes.bind("n_seq", rows, "the number of sequences")
        sizes.bind("d_model", self.d_model, "the layer")
        sizes.bind("n", self.d_state // 2, "the layer")
        sizes.bind("2", 2, "pairs")
        sizes.match("initial_state", state.x, "n_seq d_model n 2")
        checks.dtype(self.op, "initial_state", state.x, (wide(self.D.dtype),), "A state keeps full precision.")
        return state.x

    def _finish(self, y: Tensor) -> Tensor:
        """y (…, c, h) -> (…, d_model)."""
        y = y.flatten(-2)
        y = F.gelu(y) if self.activation else y
        y = F.dropout(y, self.dropout, self.training) if self.dropout else y
        y = self.output_linear(y)
        return F.glu(y, -1) if self.final_act else y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _StateSpace:
        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(keep_wide(fn), recurse=False)  # D is this module's own parameter

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        rate = "" if self.rate == 1 else f", rate={self.rate:g}"
        mode = "" if self.mode is None else f", mode={self.mode}"
        return f"d_model={self.d_model}, d_state={self.d_state}, channels={self.channels}{mode}{rate}"


class S4D(_StateSpace):
    """S4 with a diagonal state matrix, (b, t, d_model) -> (b, t, d_model).

    Args:
        d_model: width of input and output.   d_state: real states a channel, half as many complex ones and conjugates.
        channels: read-outs a channel; the output projection sees channels · d_model numbers.
        init: A at the start: "legs", "inv", "inv2", "lin", "quad", "rand" or "real" (models of decay alone).
        discretization: "zoh" (zero-order hold) or "bilinear".
        dt_min, dt_max: initial dt is log-uniform in it: about the inverse of the longest and shortest memory, in steps.
        n_ssm: how many different A and B there are, a divisor of d_model; None for one a channel.
        activation: after the state space, "gelu" or None.   final_act: after the projection, "glu" or None.
        dropout: share of the activations set to 0 in training mode.
        lr: learning rate of dt, A and B, which `param_groups` passes on; None for that of all others, 0 to keep them.
        mode: how sequences are computed, by numbers that agree: "scan", chunk by chunk as matrix products, or
            "convolution", by Fourier transforms. None is the faster: the former, but for an S4 on a GPU where no state
            is wanted and nothing is packed. An attribute, set at will.
        rate: samples of the training data a sample now: 2.0 runs a model trained at 16 kHz on 8 kHz. An attribute too.

    dt, A, B, C, D stay float32 through .half(), .to(torch.bfloat16) and autocast, as does the state.

    >>> layer = S4D(8, d_state=16)
    >>> x = torch.randn(2, 10, 8)
    >>> y, state = layer.extend(x[:, :4], layer.init_state(2))
    >>> rest, state = layer.extend(x[:, 4:], state)
    >>> torch.allclose(torch.cat([y, rest], 1), layer(x), atol=1e-5)
    True
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        channels: int = 1,
        init: str = "legs",
        discretization: str = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        n_ssm: int | None = None,
        activation: str | None = "gelu",
        final_act: str | None = "glu",
        dropout: float = 0.0,
        lr: float | None = 0.001,
        mode: str | None = None,
        rate: float = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = Shape("S4D", d_model, d_state, channels, n_ssm, dt_min, dt_max, lr)
        checks.choice("S4D", "init", init, hippo.INITS)
        checks.choice("S4D", "discretization", discretization, RULES)
        with torch.device("cpu"):  # whatever device a model is built under
            A = hippo.diagonal(init, d_state)
        full: dict[str, Any] = {"device": device, "dtype": wide(dtype)}
        start = shape.start(A, torch.ones_like(A))
        kernel = DiagonalSystem(d_model, channels, shape.systems, start, lr, full, rule=discretization)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(shape, kernel, activation, final_act, dropout, mode, rate, made)


class S4(_StateSpace):
    """S4 with a matrix that is diagonal less a low rank (DPLR), (b, t, d_model) -> (b, t, d_model).

    Args:
        init: the memory it starts with, "legs", "legt", "lagt" or "fourier", exactly: no entry of B is clipped. (Re A
            is the exponential of a parameter: 0, as legt and fourier have it, becomes −1e-4.)
        rank: rows of P; None for as many as the memory needs, 2 for legt and 1 for others. More begin as zeros.
        others: as for `S4D`. The bilinear rule samples it.

    >>> layer = S4(8, d_state=16)
    >>> x = torch.randn(2, 10, 8)
    >>> y, state = layer.extend(x[:, :4], layer.init_state(2))
    >>> rest, state = layer.extend(x[:, 4:], state)
    >>> torch.allclose(torch.cat([y, rest], 1), layer(x), atol=1e-5)
    True
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        channels: int = 1,
        init: str = "legs",
        rank: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        n_ssm: int | None = None,
        activation: str | None = "gelu",
        final_act: str | None = "glu",
        dropout: float = 0.0,
        lr: float | None = 0.001,
        mode: str | None = None,
        rate: float = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = Shape("S4", d_model, d_state, channels, n_ssm, dt_min, dt_max, lr)
        checks.choice("S4", "init", init, MEASURES)
        if rank is not None:
            checks.number("S4", "rank", rank, low=2 if init == "legt" else 1, integer=True)
        with torch.device("cpu"):  # whatever device a model is built under
            A, P, B, _ = dplr.nplr(init, d_state, rank)
        full: dict[str, Any] = {"device": device, "dtype": wide(dtype)}
        kernel = DPLRSystem(d_model, channels, shape.systems, shape.start(A, B, P), lr, full)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(shape, kernel, activation, final_act, dropout, mode, rate, made)


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off, where it is on: a context in an exported graph hides what is inside."""
    on = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if on else nullcontext()
