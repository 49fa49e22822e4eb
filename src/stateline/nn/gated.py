"""GatedSSM: a state space layer whose new state is gated as a whole, linear or with an activation.

    h[t+1] = f(A h[t] + B u[t]) ⊙ σ(W u[t] + w)          y[t] = C h[t] + D u[t]

y[t] reads the state *before* u[t]: a token reaches its own output through D alone, and what it writes into the state is
seen from the next output on. B is `in_proj`, W and w are `gate_proj`, C is `out_proj`, D is `skip_proj`, a matrix too.
Suffixes: b batch, t time step, n state.

With f = identity and a diagonal A, h[t+1] = (g A) h[t] + g B u[t] is a linear recurrence with a decay chosen by the
token, as in Martin & Cundy 2018, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length", section 2; with
another f it is a recurrent network with one gate. Initial gates follow Tallec & Ollivier 2018, "Can recurrent neural
networks warp time?", section 2: lifetimes spread over all that a stream may need.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stateline import checks, ops
from stateline.nn.mixer import Lengths, Mixer, check_input, check_state, zero_padding
from stateline.nn.precision import keep_wide, wide
from stateline.ops.gated_scan import ACTIVATIONS

OP = "GatedSSM"
TRANSITIONS = ("diagonal", "dense")
GATES = ("learned", "given")


@dataclass
class GatedSSMState:
    """What a sequence carries from token to token. h: (b, n), float32 (float64 in a float64 layer)."""

    h: Tensor


torch.export.register_dataclass(GatedSSMState, serialized_type_name="stateline.nn.GatedSSMState")


class GatedSSM(Mixer):
    """A gated state space layer, (b, t, d_model) -> (b, t, d_model).

    Args:
        d_model: width of input and output.   d_state: n, numbers in the state; d_model if None.
        activation: f, one of "identity", "relu", "tanh", "sigmoid".
        transition: "diagonal", A = tanh(A_raw), which no training can make unstable, or "dense", A itself; on a GPU
            up to 128 states, beyond which it runs in PyTorch, a step at a time.
        gate: "learned", σ(W u + w), or "given": then every call needs `gate=`.
        memory: (low, high) in tokens, between which initial lifetimes are log-uniform.

    Initial values: of state i with lifetime τ, A_raw gives A = e^(−1/τ), and w = log τ a gate of τ / (1 + τ) for u = 0.
    A dense A is a random rotation times e^(−1/high), all of whose singular values are below 1: whatever the gates, two
    states approach each other. Training may leave that region; with tanh and sigmoid, states then still stay within 1.
    Where f has no bound, rows of B are scaled by √(1 − (A g)²), so that states start near the size of their inputs.

    A and A_raw stay float32 through .half(), .to(torch.bfloat16) and autocast, as does the state. Projections are
    called as modules, so adapters and quantised Linears may replace them.

    >>> layer = GatedSSM(16)
    >>> x = torch.randn(2, 10, 16)
    >>> y, state = layer.extend(x[:, :4], layer.init_state(2))
    >>> rest, state = layer.extend(x[:, 4:], state)
    >>> torch.allclose(torch.cat([y, rest], 1), layer(x), atol=1e-5)
    True
    """

    reversible = True
    no_weight_decay = ("A", "A_raw")
    full_precision = ("A", "A_raw")
    anchor: Tensor

    def __init__(
        self,
        d_model: int,
        d_state: int | None = None,
        activation: str = "identity",
        transition: str = "diagonal",
        gate: str = "learned",
        memory: tuple[float, float] | list[float] = (1, 1000),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.number(OP, "d_model", d_model, low=1, integer=True)
        self.d_model, self.d_state = d_model, d_model if d_state is None else d_state
        checks.number(OP, "d_state", self.d_state, low=1, integer=True)
        checks.choice(OP, "activation", activation, ACTIVATIONS)
        checks.choice(OP, "transition", transition, TRANSITIONS)
        checks.choice(OP, "gate", gate, GATES)
        if not isinstance(memory, list | tuple) or len(memory) != 2:
            raise checks.fail(OP, f"memory is {memory!r}, expected two numbers of tokens (low, high).")
        checks.number(OP, "memory[0]", memory[0], low=0, open_low=True)
        checks.number(OP, "memory[1]", memory[1], low=memory[0])
        self.activation, self.takes_gate = activation, gate == "given"

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        full: dict[str, Any] = {"device": device, "dtype": wide(dtype)}
        n, dense = self.d_state, transition == "dense"
        self.in_proj = nn.Linear(d_model, n, bias=False, **made)
        self.gate_proj = None if self.takes_gate else nn.Linear(d_model, n, **made)
        self.A = nn.Parameter(torch.empty(n, n, **full)) if dense else None
        self.A_raw = None if dense else nn.Parameter(torch.empty(n, **full))
        self.skip_proj = nn.Linear(d_model, d_model, bias=False, **made)
        self.out_proj = nn.Linear(n, d_model, bias=False, **made)
        # Says the layer's dtype, whatever adapters and packing make of its projections.
        self.register_buffer("anchor", torch.empty(0, **made), persistent=False)
        self._init_system(*memory)

    @torch.no_grad()
    def _init_system(self, low: float, high: float) -> None:
        if (
            self.anchor.device.type == "meta"
        ):  # where loaders build models: nothing to fill, whatever size a file claims
            return
        # computed on the CPU, so that a seed gives the same values on every device
        n, full = self.d_state, {"dtype": torch.float64, "device": "cpu"}
        tau = torch.exp(math.log(low) + math.log(high / low) * torch.rand(n, **full))  # type: ignore[call-overload]  # a dict
        keep = torch.exp(-1 / tau)
        if self.A_raw is not None:
            self.A_raw.copy_(torch.atanh(keep))
        if self.A is not None:
            keep = torch.full_like(tau, math.exp(-1 / high))
            self.A.copy_(torch.linalg.qr(torch.randn(n, n, **full))[0] * keep)  # type: ignore[call-overload]  # a dict
        if self.gate_proj is not None:
            self.gate_proj.bias.copy_(tau.log())
            keep = keep * tau / (1 + tau)
        if self.activation in ("identity", "relu"):
            self.in_proj.weight *= (1 - keep**2).sqrt().to(self.in_proj.weight)[:, None]

    def init_state(
        self, batch: int, *, max_tokens: int | None = None, device: torch.device | str | None = None
    ) -> GatedSSMState:
        """Zeros for `batch` sequences; the size is constant, so `max_tokens` changes nothing."""
        checks.number(OP, "batch", batch, low=0, integer=True)
        return GatedSSMState(
            torch.zeros(batch, self.d_state, device=device or self.anchor.device, dtype=wide(self.anchor.dtype))
        )

    def forward(
        self,
        x: Tensor,
        *,
        gate: Tensor | None = None,
        lengths: Lengths | None = None,
        cu_seqlens: Tensor | None = None,
        reverse: bool = False,
    ) -> Tensor:
        """x (b, t, d_model) -> y (b, t, d_model) for whole sequences; `gate` as for `extend`.

        reverse: run time backwards, from each sequence's last token to its first.
        """
        return self._run(x, None, gate, lengths=lengths, cu_seqlens=cu_seqlens, reverse=reverse)[0]

    def extend(
        self,
        x: Tensor,
        state: GatedSSMState | None = None,
        *,
        gate: Tensor | None = None,
        lengths: Lengths | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, GatedSSMState]:
        """x (b, t, d_model) -> y (b, t, d_model), state; see Mixer.

        gate: (b, t), or (b, t, n), what multiplies the new state instead of σ(W u + w), as it is: in [0, 1], say.
        """
        return self._run(x, state, gate, lengths=lengths, cu_seqlens=cu_seqlens)

    def _run(
        self, x: Tensor, state: GatedSSMState | None, gate: Tensor | None, *, lengths: Lengths | None, **where: Any
    ) -> tuple[Tensor, GatedSSMState]:
        check_input(OP, x, "b t d_model", self.d_model, self.anchor.dtype)
        x = zero_padding(x, lengths)
        if state is not None:
            check_state(OP, state, GatedSSMState)
        start = None if state is None else state.h
        v, g, A = self._system(x, gate)
        options: dict[str, Any] = {"activation": self.activation, "initial_state": start, "lengths": lengths}
        h, last = ops.gated_scan(v, g, A, **options, **where)
        return zero_padding(self._read(h, x), lengths), GatedSSMState(last)

    @torch.no_grad()
    def step_(self, x: Tensor, state: GatedSSMState, *, gate: Tensor | None = None) -> Tensor:
        """x (b, d_model) -> y (b, d_model), writing into `state`; gate (b) or (b, n). No gradient."""
        check_input(OP, x, "b d_model", self.d_model, self.anchor.dtype)
        check_state(OP, state, GatedSSMState)
        h = ops.gated_scan_step_(state.h, *self._system(x, gate), activation=self.activation)
        return self._read(h, x)

    def transition(self) -> Tensor:
        """A as the recurrence uses it, (n), or (n, n) if it is dense."""
        if self.A is not None:
            return self.A
        assert self.A_raw is not None
        return torch.tanh(self.A_raw)

    def _system(self, x: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """v and g (…, n) of tokens x (…, d_model), and A."""
        v = self.in_proj(x)
        return v, self._gate(x, gate, v), self.transition().to(wide(v.dtype))

    def _gate(self, x: Tensor, gate: Tensor | None, v: Tensor) -> Tensor:
        if gate is None:
            if self.gate_proj is None:
                raise checks.fail(
                    OP, "its gate is given, and this call gives none.", "Pass gate=, (b, t) or (b, t, n)."
                )
            return torch.sigmoid(self.gate_proj(x).to(wide(v.dtype)))  # 16 bits cannot tell 0.999 from 1
        sizes = checks.Sizes(OP)
        lead = " ".join("bt"[: x.dim() - 1])
        sizes.match("x", x, f"{lead} d_model")
        sizes.bind("n", self.d_state, "the layer")
        sizes.match("gate", gate, f"{lead} n" if isinstance(gate, Tensor) and gate.dim() == x.dim() else lead)
        checks.dtype(OP, "gate", gate, checks.REAL_DTYPES)
        gate = gate if gate.dim() == x.dim() else gate[..., None]
        return gate.to(wide(v.dtype)).expand(v.shape)

    def _read(self, h: Tensor, x: Tensor) -> Tensor:
        """C h + D u."""
        return self.out_proj(h) + self.skip_proj(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GatedSSM:
        if recurse:
            for child in self.children():
                child._apply(fn)
        anchor = fn(self.anchor)
        super()._apply(keep_wide(fn), recurse=False)  # A and A_raw are this module's own parameters
        self.anchor = anchor
        return self

    def extra_repr(self) -> str:
        """Sizes and choices, for print(model)."""
        kind = "dense" if self.A is not None else "diagonal"
        gate = "given" if self.takes_gate else "learned"
        return f"d_model={self.d_model}, d_state={self.d_state}, activation={self.activation!r}, A {kind}, gate {gate}"
