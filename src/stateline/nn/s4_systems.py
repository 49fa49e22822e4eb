"""The linear systems inside S4D and S4: their parameters, and what a layer asks of them.

    x' = A x + B u,  y = 2 Re(C x)      one system a channel, on complex states that stand for themselves and conjugates
    S4D   A = diag(w)
    S4    A = diag(w) − Σ_r P_r P_r*,  where P* x is 2 Re Σ conj(P) x

Parameters are named and shaped as in the S4 repository, real pairs where complex, and float32 whatever the model is
cast to. Everything is sampled and raised to powers in float64, since phases of many turns must not be rounded; what
comes out has the dtype that is asked for. Nothing is written: C stays C, however long the sequences.
Suffixes: h channel, c read-outs a channel, n complex states, s = 2n their real numbers, r rank, q step in a chunk.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from stateline import checks, ops
from stateline.nn.precision import keep_wide
from stateline.ops.s4_kernel import angles
from stateline.ops.s4_scan import choice, chunked, prepared, run, steps, system_step_, system_tables, tables_for
from stateline.ops.segments import build
from stateline.theory.discretize import phi1

Made = TypeVar("Made")
RULES = ("zoh", "bilinear")
#: Re A cannot be 0, being the exponential of a parameter; this is what the S4 repository writes instead.
LEAST = 1e-4


@dataclass(frozen=True)
class Start:
    """Initial values: A (n), B (n) and P (r, n) complex128; dt log-uniform between dt_min and dt_max."""

    A: Tensor
    B: Tensor
    P: Tensor | None
    dt_min: float
    dt_max: float


class System(nn.Module, ABC):
    """h linear systems: dt = exp(inv_dt) (h, 1), A = −exp(A_real) − i·A_imag (S, n), B (1, S, n, 2), C (c, h, n, 2).

    With S < h, channel i has A and B of row i mod S.
    """

    full_precision: tuple[str, ...] = ("C", "inv_dt", "A_real", "A_imag", "B")
    no_weight_decay: tuple[str, ...] = ("C", "inv_dt", "A_real", "A_imag", "B")
    #: How many tables are kept at most: of pieces of several lengths, or at several rates.
    memories = 8
    #: Whether a state's numbers mix, so that going from chunk to chunk is a product with a matrix.
    dense = False
    inv_dt: nn.Parameter
    A_real: nn.Parameter
    A_imag: nn.Parameter
    B: nn.Parameter
    C: nn.Parameter

    def __init__(
        self, d_model: int, channels: int, n_ssm: int, start: Start, lr: float | None, made: dict[str, Any]
    ) -> None:
        super().__init__()
        states = len(start.A)
        self.inv_dt = nn.Parameter(torch.empty(d_model, 1, **made))
        self.A_real = nn.Parameter(torch.empty(n_ssm, states, **made))
        self.A_imag = nn.Parameter(torch.empty(n_ssm, states, **made))
        self.B = nn.Parameter(torch.empty(1, n_ssm, states, 2, **made))
        self.C = nn.Parameter(torch.empty(channels, d_model, states, 2, **made))
        slow = ["inv_dt", "A_real", "A_imag", "B"]
        if start.P is not None:
            self.P = nn.Parameter(torch.empty(len(start.P), n_ssm, states, 2, **made))
            slow.append("P")
        #: Learning rates that `param_groups` gives single parameters; time constants move more slowly than matrices.
        self.learning_rates = {} if lr is None else dict.fromkeys(slow, lr)
        self._kept: dict[Any, tuple[list[Tensor], Any]] = {}
        self._begin(start)

    def remembered(self, name: tuple[Any, ...], make: Callable[[], Made], *more: Tensor | None) -> Made:
        """make(), or what it gave before if parameters and `more` have the same values still.

        Only where no gradient is wanted, and on CPUs: elsewhere comparing costs more than it spares. What was made
        last is kept, under `memories` names.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not checks.can_read(self.C):
            return make()
        values = [v for v in (*self.parameters(), *more) if v is not None]
        kept = self._kept.get(name)
        if kept and len(kept[0]) == len(values) and all(map(torch.equal, kept[0], values)):
            return cast(Made, kept[1])
        made = make()
        self._kept.pop(name, None)
        for oldest in list(self._kept)[: 1 - self.memories]:
            self._kept.pop(oldest, None)
        self._kept[name] = ([v.detach().clone() for v in values], made)
        return made

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}

    @torch.no_grad()
    def _begin(self, start: Start) -> None:
        if self.C.device.type == "meta":  # where loaders build models
            return
        # computed on the CPU, so that a seed gives the same values on every device
        low, high = math.log(start.dt_min), math.log(start.dt_max)
        self.inv_dt.copy_(low + (high - low) * torch.rand(self.inv_dt.shape, device="cpu"))
        self.A_real.copy_((-start.A.real).clamp(min=LEAST).log().expand(self.A_real.shape))
        self.A_imag.copy_((-start.A.imag).expand(self.A_imag.shape))
        self.B.copy_(torch.view_as_real(start.B).expand(self.B.shape))
        self.C.copy_(torch.randn(self.C.shape, device="cpu") * 0.5**0.5)
        if start.P is not None:
            self.P.copy_(torch.view_as_real(start.P)[:, None].expand(self.P.shape))

    def continuous(self, rate: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt (h, 1) float64 · rate; w, B (h, n) and C (c, h, n) complex128."""
        B, C = (_pairs(v) for v in (self.B, self.C))
        A = torch.complex(-self.A_real.double().exp(), -self.A_imag.double())
        copies = C.shape[1] // A.shape[0]
        return self.inv_dt.double().exp() * rate, A.repeat(copies, 1), B[0].repeat(copies, 1), C

    @abstractmethod
    def scan(
        self, u: Tensor, initial: Tensor | None, rate: float, D: Tensor | None, free: bool, where: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """u (b, t, h), initial (n_seq, h, n, 2) -> y (b, t, c, h), state (n_seq, h, n, 2).

        free: y is what the initial state alone brings.   where: lengths, cu_seqlens, reverse.
        """

    @abstractmethod
    def taps(self, length: int, rate: float, dtype: torch.dtype) -> Tensor:
        """The kernel (c, h, length): y after an impulse."""

    @abstractmethod
    def step_(self, u: Tensor, state: Tensor, rate: float, D: Tensor) -> Tensor:
        """u (b, h) -> y (b, c, h), with D u, writing into the state (b, h, n, 2)."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> System:
        return super()._apply(keep_wide(fn), recurse)


class DiagonalSystem(System):
    """A diagonal; sampled by `rule`, "zoh" or "bilinear"."""

    def __init__(self, *args: Any, rule: str) -> None:
        super().__init__(*args)
        self.rule = rule

    def sampled(self, rate: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log Ā, Ā, B̄ (h, n) and C (c, h, n)."""
        dt, A, B, C = self.continuous(rate)
        z = dt * A
        if self.rule == "bilinear":
            A_bar = (1 + z / 2) / (1 - z / 2)
            return torch.where(A_bar == 0, 1e-300, A_bar).log(), A_bar, dt * B / (1 - z / 2), C
        return z, torch.exp(z), dt * B * phi1(z, quick=True), C

    def scan(
        self, u: Tensor, initial: Tensor | None, rate: float, D: Tensor | None, free: bool, where: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """u (b, t, h), initial (n_seq, h, n, 2) -> y (b, t, c, h), state (n_seq, h, n, 2)."""
        backend = choice(u.device.type, None, u.dtype)
        keep = not torch.is_grad_enabled() and backend == "cpu"
        if keep or backend == "gpu":
            segments = build("S4D", u, where["lengths"], "right", where["cu_seqlens"])
            tables = self._kept_tables(u, rate, D) if keep else self._gpu_tables(u, rate, D)
            start = None if initial is None else initial.flatten(-2)
            y, state = run(u, tables, start, segments.table, where["reverse"], backend)
            state = state.unflatten(-1, (-1, 2))
        else:
            _, A_bar, B_bar, C = self.sampled(rate)
            wide = None if D is None else D.double()
            y, state = ops.s4_scan(u, A_bar, B_bar, C, D=wide, initial_state=initial, **where)
        if free:  # y of the state without its inputs; the state's own knows them
            y = y.new_zeros(y.shape)
            if initial is not None:
                _, A_bar, B_bar, C = self.sampled(rate)
                y, _ = ops.s4_scan(torch.zeros_like(u), A_bar, B_bar, C, initial_state=initial, **where)
        return y, state

    def _kept_tables(self, u: Tensor, rate: float, D: Tensor | None) -> chunked.Tables:
        """What the C++ kernels run on, made once for all calls of a length."""

        def make() -> chunked.Tables:
            wide = None if D is None else D.double()
            made = tables_for("cpu", u, *self.sampled(rate)[1:], wide)
            return made if torch.compiler.is_compiling() else prepared(made)  # a graph keeps nothing

        return self.remembered(("tables", steps("cpu", u.shape[1]), rate, u.dtype, D is None), make, D)

    def _gpu_tables(self, u: Tensor, rate: float, D: Tensor | None) -> chunked.Tables:
        """What the GPU's kernels run on; `sampled` and its gradient would be a hundred launches there."""
        learned = (self.inv_dt, self.A_real, self.A_imag, self.B, self.C)
        return system_tables(u, *learned, D, rate, self.rule == "bilinear")

    def taps(self, length: int, rate: float, dtype: torch.dtype) -> Tensor:
        """The kernel (c, h, length), by the Vandermonde product."""
        log, _, B_bar, C = self.sampled(rate)
        return ops.s4_kernel((C * B_bar).to(_complex(dtype)), log, length)

    def step_(self, u: Tensor, state: Tensor, rate: float, D: Tensor) -> Tensor:
        """u (b, h) -> y (b, c, h), with D u, writing into the state (b, h, n, 2)."""
        if u.is_cuda and choice("cuda", None, u.dtype) == "gpu":
            learned = (self.inv_dt, self.A_real, self.A_imag, self.B, self.C)
            return system_step_(state, u, *learned, D, rate, self.rule == "bilinear")
        now = torch.view_as_complex(state)
        A_bar, B_bar, C = self.remembered(
            ("step", rate, now.dtype), lambda: tuple(v.to(now.dtype) for v in self.sampled(rate)[1:])
        )
        now.mul_(A_bar).add_(B_bar * u[..., None])  # a view: this writes into the state
        return 2 * torch.einsum("chn,bhn->bch", C, now).real + D * u[:, None]


class DPLRSystem(System):
    """A diagonal less a matrix of low rank, P (r, S, n, 2); sampled by the bilinear rule."""

    full_precision = (*System.full_precision, "P")
    no_weight_decay = (*System.no_weight_decay, "P")
    dense = True
    memories = 2  # powers of matrices: some ten megabytes each
    P: nn.Parameter

    def low_rank(self) -> Tensor:
        """P (r, h, n) complex128."""
        P = _pairs(self.P)
        return P.repeat(1, self.C.shape[1] // P.shape[1], 1)

    def advanced(self, x: Tensor, rate: float, drive: Tensor | float) -> Tensor:
        """Ā x + B̄ u for x (…, h, n) complex128 and drive u (…, h, 1) real or 0, in O(n r).

        (2/Δ − A) x⁺ = (2/Δ + A) x + 2 B u, solved by Woodbury's identity.
        """
        dt, w, B, _ = self.continuous(rate)
        P = self.low_rank()
        over = 2 / dt
        D = 1 / (over - w)
        # ⟨Q, x⟩ = 2 Re Σ conj(P) x for each row, (…, r, h)
        inner = 2 * torch.einsum("rhn,...hn->...rh", P.conj(), x).real
        t = (over + w) * x - torch.einsum("...rh,rhn->...hn", inner + 0j, P) + 2 * B * drive
        small = 2 * torch.einsum("rhn,hn,shn->hrs", P.conj(), D, P).real
        small = small + torch.eye(len(P), dtype=small.dtype, device=small.device)
        right = 2 * torch.einsum("rhn,...hn->...hr", P.conj() * D, t).real
        solved = torch.linalg.solve(small, right[..., None])[..., 0]  # (…, h, r)
        return D * (t - torch.einsum("...hr,rhn->...hn", solved + 0j, P))

    def sampled(self, rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """Ā (h, s, s), B̄ (h, s), C (c, h, s), real, float64, on states as real pairs."""
        h, n = self.C.shape[1:3]
        basis = torch.eye(2 * n, dtype=torch.float64, device=self.C.device).view(2 * n, 1, n, 2).expand(2 * n, h, n, 2)
        columns = self.advanced(torch.view_as_complex(basis.contiguous()), rate, 0.0)
        nothing = torch.zeros(h, n, dtype=torch.complex128, device=self.C.device)
        B_bar = self.advanced(nothing, rate, 1.0)
        return chunked.as_real(columns).permute(1, 2, 0), chunked.as_real(B_bar), chunked.row(2 * _pairs(self.C))

    def scan(
        self, u: Tensor, initial: Tensor | None, rate: float, D: Tensor | None, free: bool, where: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """u (b, t, h), initial (n_seq, h, n, 2) -> y (b, t, c, h), state (n_seq, h, n, 2)."""
        segments = build("S4", u, where["lengths"], "right", where["cu_seqlens"])
        q = chunked.steps(u.shape[1])
        name = ("tables", q, rate, u.dtype, D is None)
        tables = self.remembered(name, lambda: self.tables(q, rate, u.dtype, D), D)
        start = None if initial is None else initial.flatten(-2)
        padding = None if where["lengths"] is None else "right"
        y, state = chunked.run(tables, u, start, segments.table, padding=padding, reverse=where["reverse"], free=free)
        return y, state.unflatten(-1, (-1, 2))

    def tables(self, q: int, rate: float, dtype: torch.dtype, D: Tensor | None = None) -> chunked.Tables:
        """The system in chunks of q steps, a power of two; D (c, h) joins the first tap."""
        A_bar, B_bar, C = self.sampled(rate)
        powers = [A_bar]
        write, read = B_bar[:, None], (C[:, :, None] @ A_bar)  # Ā^j B̄: (h, j, s); C Ā^(j+1): (c, h, j, s)
        while write.shape[1] < q:
            write = torch.cat([write, write @ powers[-1].mT], 1)
            read = torch.cat([read, read @ powers[-1]], 2)
            powers.append(powers[-1] @ powers[-1])
        taps = torch.einsum("chs,hqs->chq", C, write)
        if D is not None:
            taps = torch.cat([taps[..., :1] + D.double()[..., None], taps[..., 1:]], -1)
        advance = chunked.Dense(tuple(power.to(dtype) for power in powers))
        return chunked.Tables(taps.to(dtype), read.to(dtype), write.flip(1).to(dtype), advance)

    def taps(self, length: int, rate: float, dtype: torch.dtype) -> Tensor:
        """The kernel (c, h, length) by its generating function: Cauchy products, Woodbury's identity, a Fourier
        transform. C̃ = C (I − Ā^length) is made on the way, in float64."""
        A_bar, _, C = self.sampled(rate)
        row, power, left = C, A_bar, length
        while left:  # C Ā^length
            row = (row[:, :, None] @ power)[:, :, 0] if left & 1 else row
            left >>= 1
            power = power @ power if left else power
        cut = torch.view_as_complex((C - row).unflatten(-1, (-1, 2))).conj() / 2  # back from real rows
        dt, w, B, _ = self.continuous(rate)
        P = self.low_rank()
        inputs, outputs = torch.cat([B[None], P]), torch.cat([cut, P.conj()])
        both = dt * inputs[:, None] * outputs[None]  # (1 + r, c + r, h, n)
        sums = ops.s4_cauchy(both.flatten(0, 1), dt * w, length).unflatten(0, both.shape[:2])
        channels, (sine, cosine) = len(cut), angles(length, w.device)
        direct, via = sums[0, :channels], sums[1:, :channels]  # B to C̃, P to C̃
        into, loop = sums[0, channels:], sums[1:, channels:]  # B to Q, P_i to Q_j
        spectrum = direct - cosine * _through(via, into, cosine * loop)
        return torch.fft.irfft(torch.complex(cosine, sine) * spectrum, n=length).to(dtype)

    def step_(self, u: Tensor, state: Tensor, rate: float, D: Tensor) -> Tensor:
        """u (b, h) -> y (b, c, h), with D u, writing into the state (b, h, n, 2); the arithmetic is float64."""
        new = self.advanced(torch.view_as_complex(state.double()), rate, u.double()[..., None])
        state.copy_(torch.view_as_real(new))
        return 2 * torch.einsum("chn,bhn->bch", _pairs(self.C), new).real.to(state.dtype) + D * u[:, None]


def _through(via: Tensor, into: Tensor, loop: Tensor) -> Tensor:
    """Σ_ij via_i [(I + loop)⁻¹]_ij into_j: via (r, c, h, k), into (r, h, k), loop (r in, r out, h, k) -> (c, h, k)."""
    rank = len(into)
    if rank == 1:
        return via[0] * into[0] / (1 + loop[0, 0])
    if rank == 2:
        (a, c), (b, d) = loop  # loop[i, j] goes from P_i to Q_j: row j, column i of the matrix
        a, d = 1 + a, 1 + d
        x, y = d * into[0] - b * into[1], a * into[1] - c * into[0]
        return (via[0] * x + via[1] * y) / (a * d - b * c)
    eye = torch.eye(rank, dtype=loop.dtype, device=loop.device)
    solved = torch.linalg.solve(loop.permute(2, 3, 1, 0) + eye, into.permute(1, 2, 0)[..., None])[..., 0]
    return torch.einsum("ichk,hki->chk", via, solved)


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.double())


def _complex(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype == torch.float64 else torch.complex64
