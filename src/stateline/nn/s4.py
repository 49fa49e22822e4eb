"""S4D: a diagonal state space a channel, as a convolution, as a scan or step by step.

    x' = A x + B u,  y = 2 Re(C x) + D u      A diagonal, complex; sampled every dt seconds
    output = GLU(Linear(dropout(GELU(y))))

Parameters are real pairs under the names of the S4 repository. Norm and residual stand outside, as for every mixer.
Suffixes: b batch, t time step, h channel, c read-outs a channel, n complex states (half of d_state, the others are
their conjugates), q step in a chunk.
Sources: Gu, Gupta, Goel & Ré 2022, "On the Parameterization and Initialization of Diagonal State Space Models"; Gu,
Goel & Ré 2022, "Efficiently Modeling Long Sequences with Structured State Spaces".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stateline import checks
from stateline.nn import lti
from stateline.nn.mixer import Lengths, Mixer, check_input, zero_padding
from stateline.nn.precision import keep_wide, wide
from stateline.ops.segments import build

MODES = ("auto", "scan", "convolution")
RULES = ("zoh", "bilinear")
INITS = ("legs", "inv", "inv2", "lin", "quad", "real", "rand")
#: Steps of a chunk: as many as make the products within a chunk cost what the state costs (benchmarks/NOTES.md).
CHUNK = 64


class System(NamedTuple):
    """A sampled diagonal system, complex128: A_bar, B_bar (h, n), C (c, h, n)."""

    A_bar: Tensor
    B_bar: Tensor
    C: Tensor


@dataclass
class S4DState:
    """What a sequence carries from step to step. x: (b, h, n, 2) the state, complex numbers as real pairs, float32."""

    x: Tensor


torch.export.register_dataclass(S4DState, serialized_type_name="stateline.nn.S4DState")


class DiagonalKernel(nn.Module):
    """The parameters of h diagonal systems, named and shaped as the S4 repository's `SSMKernelDiag`, all float32.

    A = −exp(A_real) − i·A_imag (S, n), B (1, S, n, 2), C (c, h, n, 2), dt = exp(inv_dt) (h, 1). With S < h, channel i
    has A and B of row i mod S.
    """

    full_precision = ("C", "inv_dt", "A_real", "A_imag", "B")
    no_weight_decay = ("inv_dt", "A_real", "A_imag", "B", "C")

    def __init__(
        self, d_model: int, states: int, channels: int, n_ssm: int, lr: float | None, made: dict[str, Any]
    ) -> None:
        super().__init__()
        self.inv_dt = nn.Parameter(torch.empty(d_model, 1, **made))
        self.A_real = nn.Parameter(torch.empty(n_ssm, states, **made))
        self.A_imag = nn.Parameter(torch.empty(n_ssm, states, **made))
        self.B = nn.Parameter(torch.empty(1, n_ssm, states, 2, **made))
        self.C = nn.Parameter(torch.empty(channels, d_model, states, 2, **made))
        #: Learning rates that `param_groups` gives single parameters; time constants move more slowly than matrices.
        self.learning_rates = {} if lr is None else dict.fromkeys(("inv_dt", "A_real", "A_imag", "B"), lr)

    @torch.no_grad()
    def reset(self, A: Tensor, dt_min: float, dt_max: float) -> None:
        """Initial values: A (n) complex128, B = 1, C complex normal, dt log-uniform in [dt_min, dt_max] seconds."""
        if self.A_real.device.type == "meta":
            return
        # computed on the CPU, so that a seed gives the same values on every device
        low, high = math.log(dt_min), math.log(dt_max)
        self.inv_dt.copy_(low + (high - low) * torch.rand(self.inv_dt.shape, device="cpu"))
        self.A_real.copy_((-A.real).clamp(min=1e-4).log().expand(self.A_real.shape))
        self.A_imag.copy_((-A.imag).expand(self.A_imag.shape))
        self.B.copy_(torch.tensor([1.0, 0.0]).expand(self.B.shape))
        self.C.copy_(torch.randn(self.C.shape, device="cpu") * 0.5**0.5)

    def continuous(self, rate: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt (h, 1), A, B (h, n), C (c, h, n) in double precision: phases of many turns must not be rounded."""
        B, C = (torch.view_as_complex(v.double()) for v in (self.B, self.C))
        dt = self.inv_dt.double().exp() * rate
        A = torch.complex(-self.A_real.double().exp(), -self.A_imag.double())
        copies = C.shape[1] // A.shape[0]
        return dt, A.repeat(copies, 1), B[0].repeat(copies, 1), C

    def sampled(self, rule: str, rate: float) -> System:
        """The system sampled every rate · dt seconds by "zoh" or "bilinear"."""
        dt, A, B, C = self.continuous(rate)
        z = dt * A
        if rule == "bilinear":
            return System((1 + z / 2) / (1 - z / 2), dt * B / (1 - z / 2), C)
        tiny = z.abs() < 1e-8  # where (e^z − 1) / z is 1 + z/2 to the last digit
        ratio = torch.where(tiny, 1 + z / 2, torch.expm1(z) / torch.where(tiny, 1, z))
        return System(torch.exp(z), dt * B * ratio, C)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiagonalKernel:
        return super()._apply(keep_wide(fn), recurse)


class S4D(Mixer):
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
        lr: learning rate of dt, A and B, which `param_groups` passes on; None for that of all others.
        mode: how sequences are computed, by numbers that agree: "scan" (chunk by chunk as matrix products),
            "convolution" (by Fourier transforms), "auto" (what is faster). An attribute, set at will.
        rate: samples of the training data a sample now: 2.0 runs a model trained at 16 kHz on 8 kHz. An attribute too.

    dt, A, B, C, D stay float32 through .half(), .to(torch.bfloat16) and autocast, as does the state.

    >>> layer = S4D(8, d_state=16)
    >>> x = torch.randn(2, 10, 8)
    >>> y, state = layer.extend(x[:, :4], layer.init_state(2))
    >>> rest, state = layer.extend(x[:, 4:], state)
    >>> torch.allclose(torch.cat([y, rest], 1), layer(x), atol=1e-5)
    True
    """

    op = "S4D"
    reversible = True
    full_precision = ("D",)
    no_weight_decay = ("D",)

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
        mode: str = "auto",
        rate: float = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        n_ssm = d_model if n_ssm is None else n_ssm
        self._check(d_model, d_state, channels, n_ssm, dt_min, dt_max, dropout, lr)
        checks.choice(self.op, "init", init, INITS)
        checks.choice(self.op, "discretization", discretization, RULES)
        checks.choice(self.op, "activation", activation, ("gelu", None))
        checks.choice(self.op, "final_act", final_act, ("glu", None))
        self.d_model, self.d_state, self.channels, self.init = d_model, d_state, channels, init
        self.discretization, self.activation, self.final_act = discretization, activation, final_act
        self.dropout, self.mode, self.rate = dropout, mode, rate
        full: dict[str, Any] = {"device": device, "dtype": wide(dtype)}
        self.kernel = DiagonalKernel(d_model, d_state // 2, channels, n_ssm, lr, full)
        self.D = nn.Parameter(torch.empty(channels, d_model, **full))
        self.output_linear = nn.Sequential(
            nn.Linear(channels * d_model, 2 * d_model if final_act else d_model, device=device, dtype=dtype)
        )
        self.kernel.reset(_diagonal(init, d_state // 2), dt_min, dt_max)
        if self.D.device.type != "meta":
            with torch.no_grad():
                self.D.copy_(torch.randn(self.D.shape, device="cpu"))

    def _check(
        self, d_model: int, d_state: int, channels: int, n_ssm: int, dt_min: float, dt_max: float, dropout: float,
        lr: float | None,
    ) -> None:  # fmt: skip
        for name, value in (("d_model", d_model), ("d_state", d_state), ("channels", channels), ("n_ssm", n_ssm)):
            checks.number(self.op, name, value, low=1, integer=True)
        if d_state % 2:
            raise checks.fail(self.op, f"d_state is {d_state}, expected an even number: states are conjugate pairs.")
        if d_model % n_ssm:
            raise checks.fail(self.op, f"n_ssm is {n_ssm}, which does not divide d_model = {d_model}.")
        checks.number(self.op, "dt_min", dt_min, low=0, open_low=True)
        checks.number(self.op, "dt_max", dt_max, low=dt_min)
        checks.number(self.op, "dropout", dropout, low=0, high=1)
        if lr is not None:
            checks.number(self.op, "lr", lr, low=0)

    @property
    def mode(self) -> str:
        """How sequences are computed: "auto", "scan" or "convolution"."""
        return self._mode

    @mode.setter
    def mode(self, value: str) -> None:
        """Set how sequences are computed; raises ValueError for a name that is none of the three."""
        checks.choice(self.op, "mode", value, MODES)
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
    ) -> S4DState:
        """Zeros for `batch` sequences; the size is constant, so `max_tokens` changes nothing."""
        checks.number(self.op, "batch", batch, low=0, integer=True)
        made: dict[str, Any] = {"device": device or self.D.device, "dtype": wide(self.D.dtype)}
        return S4DState(torch.zeros(batch, self.d_model, self.d_state // 2, 2, **made))

    def forward(
        self, x: Tensor, *, lengths: Lengths | None = None, cu_seqlens: Tensor | None = None, reverse: bool = False
    ) -> Tensor:
        """y (b, t, d) for whole sequences x (b, t, d); arguments as for `Mixer.extend`.

        reverse: run time backwards, from each sequence's last token to its first.
        """
        if not reverse:
            return self.extend(x, None, lengths=lengths, cu_seqlens=cu_seqlens)[0]
        back = _backwards(self.op, x, lengths, cu_seqlens)
        y = self.extend(x.gather(1, back), None, lengths=lengths, cu_seqlens=cu_seqlens)[0]
        return y.gather(1, back[..., :1].expand(y.shape))

    def extend(
        self,
        x: Tensor,
        state: S4DState | None = None,
        *,
        lengths: Lengths | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, S4DState]:
        """x (b, t, d_model) -> y (b, t, d_model), state; see Mixer."""
        check_input(self.op, x, "b t d_model", self.d_model, self._dtype())
        segments = build(self.op, x, lengths, "right", cu_seqlens)
        initial = None if state is None else self._initial(state, segments.count)
        x = zero_padding(x, lengths)
        with torch.autocast(x.device.type, enabled=False):
            u = x.to(wide(self.D.dtype))
            tables = self._tables(min(CHUNK, 1 << max(0, x.shape[1] - 1).bit_length()), u.dtype)
            y, end = lti.run(tables, u, initial, segments.table, padded=lengths is not None)
            y = y + self.D * u[:, :, None]
        y = zero_padding(self._finish(y.to(x.dtype)), lengths)
        return y, S4DState(end.unflatten(-1, (-1, 2)))

    @torch.no_grad()
    def step_(self, x: Tensor, state: S4DState) -> Tensor:
        """x (b, d_model) -> y (b, d_model), writing into `state`; no gradient."""
        check_input(self.op, x, "b d_model", self.d_model, self._dtype())
        self._initial(state, x.shape[0])
        with torch.autocast(x.device.type, enabled=False):
            u = x.to(wide(self.D.dtype))
            now = torch.view_as_complex(state.x)
            A_bar, B_bar, C = (v.to(now.dtype) for v in self.kernel.sampled(self.discretization, self.rate))
            now.mul_(A_bar).add_(B_bar * u[..., None])  # a view: this writes into state.x
            y = 2 * torch.einsum("chn,bhn->bch", C, now).real + self.D * u[:, None]
        return self._finish(y.to(x.dtype))

    def _dtype(self) -> torch.dtype:
        """Of the data: what the projection was built in, whatever has wrapped it since."""
        return next((p.dtype for p in self.output_linear.parameters()), self.D.dtype)

    def _initial(self, state: S4DState, rows: int) -> Tensor:
        """The state's numbers as (rows, h, 2n), checked."""
        sizes = checks.Sizes(self.op)
        sizes.bind("n_seq", rows, "the number of sequences")
        sizes.bind("d_model", self.d_model, "the layer")
        sizes.bind("n", self.d_state // 2, "the layer")
        sizes.bind("2", 2, "pairs")
        sizes.match("initial_state", state.x, "n_seq d_model n 2")
        checks.dtype(self.op, "initial_state", state.x, (wide(self.D.dtype),), "A state keeps full precision.")
        return state.x.flatten(-2)

    def _tables(self, q: int, dtype: torch.dtype) -> lti.Tables:
        """The system in chunks of q steps."""
        A_bar, B_bar, C = self.kernel.sampled(self.discretization, self.rate)
        powers = _powers(A_bar, q + 1)  # (q + 1, h, n)
        taps = 2 * torch.einsum("chn,qhn->chq", C * B_bar, powers[:q]).real
        read = (
            2 * torch.einsum("chn,qhn->chqn", C, powers[1:]).conj().resolve_conj()
        )  # Re(c·x) = (Re c, −Im c)·(Re x, Im x)
        write = (powers[:q].flip(0) * B_bar).transpose(0, 1).contiguous()  # (h, q, n)
        narrow = torch.complex128 if dtype == torch.float64 else torch.complex64
        return lti.Tables(
            taps.to(dtype),
            lti.as_real(read.resolve_conj().to(narrow)),
            lti.as_real(write.to(narrow)),
            lti.Diagonal(powers.to(narrow)),
        )

    def _finish(self, y: Tensor) -> Tensor:
        """y (…, c, h) -> (…, d_model)."""
        y = y.flatten(-2)
        y = F.gelu(y) if self.activation else y
        y = self.output_linear(F.dropout(y, self.dropout, self.training))
        return F.glu(y, -1) if self.final_act else y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> S4D:
        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(keep_wide(fn), recurse=False)  # D is this module's own parameter

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        rate = "" if self.rate == 1 else f", rate={self.rate:g}"
        sizes = f"d_model={self.d_model}, d_state={self.d_state}, channels={self.channels}"
        return f"{sizes}, init={self.init}, {self.discretization}, mode={self.mode}{rate}"


def _powers(A_bar: Tensor, count: int) -> Tensor:
    """Ā^0 … Ā^(count−1), (count, h, n), each from about log2(count) products."""
    powers = torch.stack([torch.ones_like(A_bar), A_bar])
    while powers.shape[0] < count:
        powers = torch.cat([powers, powers * (powers[-1] * A_bar)])
    return powers[:count]


def _backwards(op: str, x: Tensor, lengths: Lengths | None, cu_seqlens: Tensor | None) -> Tensor:
    """(b, t, d): for each place the token that stands there when every sequence is turned round."""
    b, t, d = x.shape
    here = torch.arange(t, device=x.device)
    table = build(op, x, lengths, "right", cu_seqlens).table
    if table is None:
        there = (t - 1 - here).expand(b, t)
    elif lengths is not None:
        there = (table[:, 2:] - 1 - here).clamp(min=-1)
        there = torch.where(there < 0, here, there)
    else:
        owner = torch.searchsorted(table[:, 2].contiguous(), here, right=True)
        there = (table[owner, 1] + table[owner, 2] - 1 - here)[None]
    return there[..., None].expand(b, t, d)


def _diagonal(init: str, states: int) -> Tensor:
    """Initial A (n), complex128, imaginary parts negative, of the papers' names."""
    n = torch.arange(states, dtype=torch.float64)
    real, imag = torch.full_like(n, 0.5), torch.zeros_like(n)
    if init == "lin":
        imag = math.pi * n
    elif init == "inv":
        imag = 2 * states / math.pi * (2 * states / (2 * n + 1) - 1)
    elif init == "inv2":
        imag = 2 * states / math.pi * (2 * states / (n + 1) - 1)
    elif init == "quad":
        imag = (1 + 2 * n) ** 2 / math.pi
    elif init == "rand":
        imag = torch.randn(states, dtype=torch.float64).exp()
    elif init == "real":
        real = n + 1
    else:
        r = (2 * torch.arange(2 * states, dtype=torch.float64) + 1).sqrt()
        skew = (r[:, None] * r).tril(-1) / 2
        imag = torch.linalg.eigvalsh(1j * (skew - skew.T)).flip(0)[:states]  # of the normal part of HiPPO-LegS
    return torch.complex(-real, -imag)
