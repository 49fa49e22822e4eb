"""S5: one diagonal state space system that reads and writes all channels at once, run as a scan.

    x' = A x + B u        y = 2 Re(C x) + D·u        output = g ⊙ sigmoid(gate(g)), g = GELU(y)

A is diagonal and complex; of each pair of conjugate states one is kept, which is why the real part counts twice. A and
B are discretised by zero-order hold, each state with a step size of its own. It starts as the normal part of
HiPPO-LegS, which remembers by Legendre polynomials, in blocks.
Suffixes: b batch, t time step, d channel, n real state, p = n/2 complex state.
Source: Smith, Warrington & Linderman 2023, "Simplified State Space Layers for Sequence Modeling", sections 3 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stateline import checks, ops
from stateline.nn.mixer import Lengths, Mixer, check_input, check_state, zero_padding
from stateline.nn.precision import keep_wide, wide
from stateline.theory.discretize import phi1
from stateline.theory.dplr import nplr

OP = "S5"
ACTIVATIONS = ("gated", "gelu", None)


@dataclass
class S5State:
    """What a sequence carries from token to token, float32 (float64 in a float64 layer).

    ssm: (b, p, 2) the states' real and imaginary parts.
    """

    ssm: Tensor


torch.export.register_dataclass(S5State, serialized_type_name="stateline.nn.S5State")


class S5(Mixer):
    """S5, (b, t, d_model) -> (b, t, d_model): cheap where a few hundred states, shared by all channels, are enough.

    Args:
        d_model: width of input and output.
        d_state: n, real states of the whole layer; even. Half as many complex ones are kept. None: as many as channels,
            or the next multiple of 2 · blocks.
        blocks: the initial system is so many copies of a HiPPO system of d_state / blocks states, which is even.
        dt_min, dt_max: initial step sizes, one a state, are log-uniform between them.
        activation: "gated", as published: GELU, times the sigmoid of a projection of it; "gelu"; None for the linear
            system alone.
        lr: learning rate of A and the step sizes, which `param_groups` passes on; None for that of all others, 0 to
            keep them. B and C learn as any matrix, with weight decay: of the published runs, so do those for images
            and ListOps; others slow B down too.
        rate: sampling rate at which the model was trained, over that of its input: 2 where there are only half as many
            samples a second. An attribute, to be changed at will.

    B and C are Linears: B's rows are the real and imaginary part of each state in turn, C's columns those of 2·C, the
    imaginary ones negative. A_log (the logarithm of −Re A), A_imag, log_dt and D stay float32 through .half(),
    .to(torch.bfloat16) and autocast, as does the state. Scan and steps compute the same recurrence.

    >>> layer = S5(16, d_state=32)
    >>> x = torch.randn(2, 10, 16)
    >>> y, state = layer.extend(x[:, :4], layer.init_state(2))
    >>> rest, state = layer.extend(x[:, 4:], state)
    >>> torch.allclose(torch.cat([y, rest], 1), layer(x), atol=1e-5)
    True
    """

    no_weight_decay = ("A_log", "A_imag", "log_dt", "D")
    full_precision = no_weight_decay
    reversible = True

    def __init__(
        self,
        d_model: int,
        d_state: int | None = None,
        blocks: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        activation: str | None = "gated",
        lr: float | None = 0.001,
        rate: float = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("blocks", blocks)):
            checks.number(OP, name, value, low=1, integer=True)
        if d_state is None:
            d_state = -(-d_model // (2 * blocks)) * 2 * blocks
        checks.number(OP, "d_state", d_state, low=1, integer=True)
        if lr is not None:
            checks.number(OP, "lr", lr, low=0)
        if d_state % (2 * blocks):
            problem = f"d_state is {d_state} and blocks is {blocks}, expected a multiple of 2 · blocks."
            raise checks.fail(OP, problem, "States come in conjugate pairs.")
        checks.number(OP, "dt_min", dt_min, low=0, open_low=True)
        checks.number(OP, "dt_max", dt_max, low=dt_min)
        checks.choice(OP, "activation", activation, ACTIVATIONS)
        self.d_model, self.d_state, self.blocks, self.activation = d_model, d_state, blocks, activation
        self.rate = rate
        #: Learning rates that `param_groups` gives single parameters; time constants move more slowly than matrices.
        self.learning_rates = {} if lr is None else dict.fromkeys(("A_log", "A_imag", "log_dt"), lr)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        full: dict[str, Any] = {"device": device, "dtype": wide(dtype)}
        p = d_state // 2
        self.B = nn.Linear(d_model, d_state, bias=False, **made)
        self.C = nn.Linear(d_state, d_model, bias=False, **made)
        self.A_log, self.A_imag, self.log_dt = (nn.Parameter(torch.empty(p, **full)) for _ in range(3))
        self.D = nn.Parameter(torch.empty(d_model, **full))
        self.gate = nn.Linear(d_model, d_model, **made) if activation == "gated" else None
        if self.D.device.type != "meta":  # where loaders build models: nothing to fill, whatever size a file claims
            with torch.device("cpu"):
                self._initialise(dt_min, dt_max)

    @property
    def rate(self) -> float:
        """Samples of the training data a sample now; dt is multiplied by it."""
        return self._rate

    @rate.setter
    def rate(self, value: float) -> None:
        """Set the rate; raises unless it is a number above 0."""
        checks.number(OP, "rate", value, low=0, open_low=True)
        self._rate = float(value)

    @torch.no_grad()
    def _initialise(self, dt_min: float, dt_max: float) -> None:
        """Drawn on the CPU, so that a seed gives the same values on every device."""
        n, j = self.d_state, self.blocks
        A, _, _, V = nplr("legs", n // j)
        self.A_log.copy_((-A.real).log().repeat(j))
        self.A_imag.copy_(A.imag.repeat(j))
        self.log_dt.copy_(torch.rand(n // 2) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min))
        B = torch.randn(j, n // j, self.d_model, dtype=torch.float64).to(torch.complex128) / self.d_model**0.5
        C = torch.randn(self.d_model, j, n // j, dtype=torch.float64).to(torch.complex128) / n**0.5
        B, C = torch.einsum("mk,jmd->jkd", V.conj_physical(), B), torch.einsum("djm,mk->djk", C, V)
        self.B.weight.copy_(torch.view_as_real(B.flatten(0, 1)).transpose(1, 2).flatten(0, 1))
        self.C.weight.copy_(torch.view_as_real(2 * C.flatten(1).conj_physical()).flatten(1))
        self.D.copy_(torch.randn(self.d_model))

    def init_state(
        self, batch: int, *, max_tokens: int | None = None, device: torch.device | str | None = None
    ) -> S5State:
        """Zeros for `batch` sequences; the size is constant, so `max_tokens` changes nothing."""
        checks.number(OP, "batch", batch, low=0, integer=True)
        made: dict[str, Any] = {"device": device or self.D.device, "dtype": wide(self.D.dtype)}
        return S5State(torch.zeros(batch, self.d_state // 2, 2, **made))

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
        state: S5State | None = None,
        *,
        lengths: Lengths | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, S5State]:
        """x (b, t, d_model) -> y (b, t, d_model), state; see Mixer."""
        return self._run(x, state, lengths=lengths, cu_seqlens=cu_seqlens)

    def _run(
        self, x: Tensor, state: S5State | None, *, lengths: Lengths | None, **where: Any
    ) -> tuple[Tensor, S5State]:
        self._check(x, "b t d_model")
        x = zero_padding(x, lengths)
        decay, gain = self._system()
        start = None if state is None else torch.view_as_complex(self._carried(state).contiguous())
        h, end = ops.linear_scan(decay, self._drive(x, gain), initial_state=start, lengths=lengths, **where)
        return zero_padding(self._read(h, x), lengths), S5State(torch.view_as_real(end))

    @torch.no_grad()
    def step_(self, x: Tensor, state: S5State) -> Tensor:
        """x (b, d_model) -> y (b, d_model), writing into `state`; no gradient."""
        self._check(x, "b d_model")
        decay, gain = self._system()
        h = ops.linear_scan_step_(torch.view_as_complex(self._carried(state)), decay, self._drive(x, gain))
        return self._read(h, x)

    def _check(self, x: Tensor, form: str) -> None:
        weight = getattr(self.B, "weight", None)  # an adapter has none, and judges by itself
        own = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else x.dtype
        check_input(OP, x, form, self.d_model, own)

    def _carried(self, state: S5State) -> Tensor:
        """The state's numbers (…, p, 2), of which `linear_scan` checks how many there are."""
        check_state(OP, state, S5State)
        checks.dtype(OP, "initial_state", state.ssm, (wide(self.D.dtype),), "A state keeps full precision.")
        return state.ssm

    def _system(self) -> tuple[Tensor, Tensor]:
        """By zero-order hold: exp(A dt) and (exp(A dt) − 1) / A, complex (p)."""
        full = wide(self.A_log.dtype)
        real, imaginary = -self.A_log.to(full).exp(), self.A_imag.to(full)
        dt = self.log_dt.to(full).exp() * self.rate
        z = torch.complex(real * dt, imaginary * dt)
        return z.exp(), dt * phi1(z, quick=True)

    def _drive(self, x: Tensor, gain: Tensor) -> Tensor:
        """x (…, d_model) -> what enters the states, complex (…, p)."""
        pairs = self.B(x).to(gain.real.dtype).unflatten(-1, (-1, 2))
        return torch.view_as_complex(pairs) * gain

    def _read(self, h: Tensor, x: Tensor) -> Tensor:
        """States, complex (…, p), and x (…, d_model) -> output (…, d_model)."""
        y = self.C(torch.view_as_real(h).flatten(-2).to(x.dtype))
        y = y + (x.to(self.D.dtype) * self.D).to(y.dtype)
        if self.activation is None:
            return y
        y = F.gelu(y)
        return y if self.gate is None else y * torch.sigmoid(self.gate(y))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> S5:
        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(keep_wide(fn), recurse=False)  # the module's own parameters are all in full precision

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return f"d_model={self.d_model}, d_state={self.d_state}, blocks={self.blocks}, rate={self.rate:g}"
