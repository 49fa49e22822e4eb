"""Attention: causal multi-head attention under the law of every other layer, with mamba_ssm's parameters.

    q, k, v = in_proj(input)       optionally convolved over a few tokens, then q and k turned by their places
    y[t] = Σ_s softmax_s(q[t]·k[s] · scale) v[s]   over the tokens s ≤ t, of which a window keeps the last ones
    output = out_proj(y)

Suffixes: b batch, t time step, h head, g head of keys and values, p width of a head, c tokens a cache has room for.
Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2; grouped queries: Ainslie et al. 2023, "GQA".
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stateline import checks, ops
from stateline.nn.mixer import Lengths, Mixer, check_input, zero_padding
from stateline.nn.precision import wide
from stateline.nn.rotary import angles, rotate
from stateline.ops.segments import build

OP = "Attention"
MLP_MULTIPLE = 256  # widths of mamba_ssm's inner MLP are rounded up to it
#: Entries of a mask built at once: queries are taken in blocks, so that memory grows with the length, not its square.
MASK_ENTRIES = 1 << 22
CACHE_DTYPES = (torch.bfloat16, torch.float16)
BLOCK = 256  # queries a block at least, where a window is short


@dataclass
class AttentionState:
    """What a sequence carries from token to token; of constant size, float32 (float64 in a float64 layer).

    keys, values: (b, c, g, p) the last c tokens at most, a token's place modulo c being its slot; keys are turned. In
        the layer's `cache_dtype`, if it has one.
    conv: (b, k−1, channels) the last inputs of the convolution, empty without one.
    position: (b) int64, tokens read so far.
    """

    keys: Tensor
    values: Tensor
    conv: Tensor
    position: Tensor


torch.export.register_dataclass(AttentionState, serialized_type_name="stateline.nn.AttentionState")


class _Past(NamedTuple):
    """The cache as queries look at it: keys, values (b, old, g, p) in their dtype, and what rows have read (b)."""

    keys: Tensor
    values: Tensor
    position: Tensor
    room: int


class Attention(Mixer):
    """Causal attention, (b, t, d_model) -> (b, t, d_model); arguments, parameters and names are mamba_ssm's MHA's.

    Args:
        d_model: width of input and output.   num_heads: of queries.
        num_heads_kv: heads of keys and values, which divide num_heads; query head i uses number ⌊i·g/h⌋. None: as many.
        head_dim: p, d_model / num_heads if None.
        mlp_dim: width of a gated MLP beside the attention, rounded up to a multiple of 256; 0 for none.
        qkv_proj_bias, out_proj_bias: give the projections a bias.
        softmax_scale: p^−½ if None.
        causal: True. (mamba_ssm's default is False, which cannot be continued token by token.)
        d_conv: taps of a convolution over q, k, v, without activation; 0 for none.
        rotary_emb_dim: channels of a head that are turned by a token's place, even; 0 for none.
        rotary_emb_base: their slowest angle's base.   rotary_emb_interleaved: pairs are neighbours, not halves.
        window: how many tokens a token sees, itself included; None: all before it.
        max_tokens: the longest sequence that states made without another bound have room for.
        cache_dtype: torch.bfloat16 or torch.float16, or its name: states keep keys and values in it, in half the memory
            of float32. To a layer of that dtype it makes no difference, another gets that dtype's precision. An
            attribute too, for states to come.

    The state keeps min(window, max_tokens) tokens. Without a window a longer sequence than that is refused (where
    values cannot be read, as on a GPU or in a compiled graph, outputs from there on are NaN), and `init_state` needs to
    know the bound. With a window sequences may go on for ever.

    >>> layer = Attention(16, 4, window=8, rotary_emb_dim=4)
    >>> x = torch.randn(2, 20, 16)
    >>> y, state = layer.extend(x[:, :13], layer.init_state(2))
    >>> rest, state = layer.extend(x[:, 13:], state)
    >>> torch.allclose(torch.cat([y, rest], 1), layer(x), atol=1e-5)
    True
    """

    anchor: Tensor

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        mlp_dim: int = 0,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        softmax_scale: float | None = None,
        causal: bool = True,
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
        window: int | None = None,
        max_tokens: int | None = None,
        cache_dtype: torch.dtype | str | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.cache_dtype = check_cache_dtype(OP, cache_dtype)
        self.d_model, self.num_heads = d_model, num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        for name, value in (("d_model", d_model), ("num_heads", num_heads), ("num_heads_kv", self.num_heads_kv)):
            checks.number(OP, name, value, low=1, integer=True)
        if head_dim is None and d_model % num_heads:
            raise checks.fail(
                OP, f"num_heads is {num_heads}, which does not divide d_model {d_model}.", "Set head_dim."
            )
        if num_heads % self.num_heads_kv:
            raise checks.fail(OP, f"num_heads_kv {num_heads_kv} does not divide num_heads {num_heads}.")
        self.head_dim = d_model // num_heads if head_dim is None else head_dim
        self.softmax_scale, self.rotary_emb_base = softmax_scale, rotary_emb_base
        self.rotary_emb_dim, self.rotary_emb_interleaved = rotary_emb_dim, rotary_emb_interleaved
        self.d_conv, self.window, self.max_tokens = d_conv, window, max_tokens
        self._check_options(causal, mlp_dim, qkv_proj_bias, out_proj_bias)
        self.mlp_dim = -(-mlp_dim // MLP_MULTIPLE) * MLP_MULTIPLE

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        queries, self.channels = num_heads * self.head_dim, (num_heads + 2 * self.num_heads_kv) * self.head_dim
        self.in_proj = nn.Linear(d_model, self.channels + self.mlp_dim, bias=qkv_proj_bias, **made)
        self.conv1d = (
            nn.Conv1d(self.channels, self.channels, d_conv, groups=self.channels, padding=d_conv - 1, **made)
            if d_conv
            else None
        )
        self.out_proj = nn.Linear(queries + self.mlp_dim // 2, d_model, bias=out_proj_bias, **made)
        # Says the layer's dtype and device, whatever adapters and packing make of its projections.
        self.register_buffer("anchor", torch.empty(0, **made), persistent=False)

    def _check_options(self, causal: bool, mlp_dim: int, *biases: bool) -> None:
        switches = {"qkv_proj_bias": biases[0], "out_proj_bias": biases[1], "causal": causal}
        for name, value in {**switches, "rotary_emb_interleaved": self.rotary_emb_interleaved}.items():
            if not isinstance(value, bool):
                raise checks.fail(OP, f"{name} is {value!r}, expected True or False.", error=TypeError)
        if not causal:
            raise checks.fail(OP, "causal is False; what looks ahead cannot be continued.", "Set causal to true.")
        checks.number(OP, "head_dim", self.head_dim, low=1, integer=True)
        for name, size in (("mlp_dim", mlp_dim), ("d_conv", self.d_conv)):
            checks.number(OP, name, size, low=0, integer=True)
        checks.number(OP, "rotary_emb_dim", self.rotary_emb_dim, low=0, high=self.head_dim, integer=True)
        if self.rotary_emb_dim % 2:
            raise checks.fail(OP, f"rotary_emb_dim is {self.rotary_emb_dim}, expected an even number.")
        checks.number(OP, "rotary_emb_base", self.rotary_emb_base, low=0, open_low=True)
        if self.softmax_scale is not None:
            checks.number(OP, "softmax_scale", self.softmax_scale, low=0, open_low=True)
        for name, bound in (("window", self.window), ("max_tokens", self.max_tokens)):
            if bound is not None:
                checks.number(OP, name, bound, low=1, integer=True)

    def init_state(
        self, batch: int, *, max_tokens: int | None = None, device: torch.device | str | None = None
    ) -> AttentionState:
        """The state of `batch` sequences before their first token, with room for min(window, max_tokens) tokens.

        max_tokens: the layer's own if None. Raises ValueError if neither it nor a window bounds the cache.
        """
        checks.number(OP, "batch", batch, low=0, integer=True)
        if max_tokens is not None:
            checks.number(OP, "max_tokens", max_tokens, low=1, integer=True)
        bounds = [n for n in (self.window, self.max_tokens if max_tokens is None else max_tokens) if n is not None]
        if not bounds:
            raise checks.fail(
                OP,
                "it keeps every token of a sequence, and nothing says how many may come.",
                "Give init_state max_tokens, set the model's (model.max_tokens = 8192; --room), or choose a window.",
            )
        made: dict[str, Any] = {"device": device or self.anchor.device, "dtype": wide(self.anchor.dtype)}
        kept = made if self.cache_dtype is None else made | {"dtype": self.cache_dtype}
        keys = torch.zeros(batch, min(bounds), self.num_heads_kv, self.head_dim, **kept)
        conv = torch.zeros(batch, max(self.d_conv - 1, 0), self.channels, **made)
        position = torch.zeros(batch, dtype=torch.int64, device=made["device"])
        return AttentionState(keys, torch.zeros_like(keys), conv, position)

    def forward(self, x: Tensor, *, lengths: Lengths | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """y (b, t, d_model) for whole sequences x (b, t, d_model), without a cache; arguments as for `extend`."""
        return self._run(x, None, lengths, cu_seqlens)[0]

    def extend(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        *,
        lengths: Lengths | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, AttentionState]:
        """x (b, t, d_model) -> y (b, t, d_model), state; see Mixer.

        Raises ValueError also for sequences that become longer than the state has room for.
        """
        if state is None:
            state = self.init_state(x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, device=x.device)
        y, after = self._run(x, state, lengths, cu_seqlens)
        assert after is not None
        return y, after

    @torch.no_grad()
    def step_(self, x: Tensor, state: AttentionState) -> Tensor:
        """x (b, d_model) -> y (b, d_model), writing into `state`; no gradient."""
        self._check(x, "b d_model")
        self._check_state(state, x.shape[0])
        self.check_room(state)
        qkv, mlp = self._project(x)
        if self.conv1d is not None:
            qkv = ops.causal_conv1d_step_(state.conv, qkv, *self._taps())
        position, room = state.position, state.keys.shape[1]
        q, k, v = self._heads(qkv, position)
        low, high = _range(position)
        rows, slot = torch.arange(x.shape[0], device=x.device), position % room
        state.keys[rows, slot] = k.to(state.keys.dtype)
        state.values[rows, slot] = v.to(state.values.dtype)
        used = room if high is None else min(high + 1, room)
        mask = None
        if high is None or low != high:
            mask = (torch.arange(used, device=x.device) <= position[:, None])[:, None, None]
        # all queries of a group of heads look at the same keys, as if they were so many tokens
        grouped = q.unflatten(1, (self.num_heads_kv, -1))
        keys, values = (c[:, :used].transpose(1, 2).to(q.dtype) for c in (state.keys, state.values))
        y = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=self.softmax_scale).flatten(1)
        y = self._poison(y, position, room)
        position += 1
        return self.out_proj(y if mlp is None else torch.cat([y, mlp], -1))

    # ---- the layer over many tokens ----------------------------------------------------------------------------------

    def _run(
        self, x: Tensor, state: AttentionState | None, lengths: Lengths | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, AttentionState | None]:
        self._check(x, "b t d_model")
        segments = build(OP, x, lengths, "right", cu_seqlens)
        counts = torch.full((segments.count,), x.shape[1], device=x.device)
        if segments.table is not None:
            counts = segments.table[:, 2] - segments.table[:, 1]
        if state is not None:
            self._check_state(state, segments.count)
        before = torch.zeros_like(counts) if state is None else state.position
        room = None if state is None else state.keys.shape[1]
        self._refuse_beyond(_range(before + counts)[1], room)
        qkv, mlp = self._project(zero_padding(x, lengths))
        conv = None if state is None else state.conv
        if self.conv1d is not None:
            qkv, conv = ops.causal_conv1d(
                qkv, *self._taps(), initial_state=conv, lengths=lengths, cu_seqlens=cu_seqlens
            )
        elif conv is not None:
            conv = conv.clone()  # empty, and still no alias: an exported graph tells its inputs from its outputs
        places = _places(before, x.shape[1], cu_seqlens)
        q, k, v = self._heads(qkv, places)
        parts = [(slice(None), slice(None))]
        if cu_seqlens is not None:  # one after the other: work is then the sum of their squares, not the sum's square
            parts = [(slice(i, i + 1), slice(*bounds)) for i, bounds in enumerate(pairwise(cu_seqlens.tolist()))]
        outputs, keys, values = [], [], []
        read = None if state is None else _read(before)
        for rows, time in parts:
            new = q[:, time], k[:, time], v[:, time]
            outputs.append(self._attend(*new, None if state is None else _past(state, rows, read, q.dtype)))
            if state is not None:
                where = before[rows], counts[rows]
                keys.append(_write(state.keys[rows], new[1], *where))
                values.append(_write(state.values[rows], new[2], *where))
        y = _joined(outputs, 1, q).flatten(2)
        after = None
        if state is not None and conv is not None:
            y = self._poison(y, places, state.keys.shape[1])
            after = AttentionState(
                _joined(keys, 0, state.keys), _joined(values, 0, state.values), conv, before + counts
            )
        out = self.out_proj(y if mlp is None else torch.cat([y, mlp], -1))
        return zero_padding(out, lengths), after

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, past: _Past | None) -> Tensor:
        """q (b, t, h, p), k, v (b, t, g, p), looking also at what came before -> (b, t, h, p)."""
        t, window = q.shape[1], self.window
        if past is None and (window is None or (not torch.compiler.is_compiling() and t <= window)):
            return self._attention(q, k, v, None)
        outputs = []
        for start, stop in _blocks(t, window, 0 if past is None else past.keys.shape[1]):
            first = 0 if window is None else max(0, start - window + 1)
            keys, values = k[:, first:stop], v[:, first:stop]
            mine, theirs = (torch.arange(a, stop, device=q.device) for a in (start, first))
            mask = _seen(mine[:, None], theirs, window)[None]
            if past is not None and (window is None or start < window - 1):
                keys, values = torch.cat([past.keys, keys], 1), torch.cat([past.values, values], 1)
                held = _held(past.position, past.keys.shape[1], past.room)[:, None]
                old = _seen(past.position[:, None, None] + mine[:, None], held, window) & (held >= 0)
                mask = torch.cat([old, mask.expand(old.shape[0], -1, -1)], 2)
            outputs.append(self._attention(q[:, start:stop], keys, values, mask[:, None]))
        return _joined(outputs, 1, q)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax attention, (b, t, h, p); without a mask each token sees those up to itself. Softmax is in float32."""
        group = self.num_heads // self.num_heads_kv
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if group > 1 and mask is not None and q.device.type != "cpu":
            # the GPU's only fused kernel that takes a mask wants a key head for every query head
            k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
        options: dict[str, Any] = {"scale": self.softmax_scale, "enable_gqa": group > 1}
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **options)
        return y.transpose(1, 2)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (…, d_model) -> q, k, v together (…, channels), and the MLP's value · silu(gate) if there is one."""
        if not self.mlp_dim:
            return self.in_proj(x), None
        qkv, mlp = self.in_proj(x).split([self.channels, self.mlp_dim], -1)
        value, gate = mlp.chunk(2, -1)
        return qkv, value * F.silu(gate)

    def _heads(self, qkv: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv (…, channels), places (…) -> q (…, h, p), k, v (…, g, p), turned."""
        heads = qkv.unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.num_heads, self.num_heads_kv, self.num_heads_kv], -2)
        if self.rotary_emb_dim:
            turns = angles(places, self.rotary_emb_dim, self.rotary_emb_base)
            q, k = (rotate(x, turns, interleaved=self.rotary_emb_interleaved) for x in (q, k))
        return q, k, v

    def _taps(self) -> tuple[Tensor, Tensor | None]:
        assert self.conv1d is not None
        return self.conv1d.weight.squeeze(1), self.conv1d.bias

    def check_room(self, state: AttentionState, tokens: int = 1) -> None:
        """Raise ValueError if a sequence of `state` cannot become so many tokens longer."""
        longest = _range(state.position)[1]
        self._refuse_beyond(None if longest is None else longest + tokens, state.keys.shape[1])

    # ---- what is refused ---------------------------------------------------------------------------------------------

    def _check(self, x: Tensor, form: str) -> None:
        check_input(OP, x, form, self.d_model, self.anchor.dtype)

    def _check_state(self, state: AttentionState, rows: int) -> None:
        if not isinstance(state, AttentionState):
            got = type(state).__name__
            raise checks.fail(OP, f"state is a {got}, expected an AttentionState.", "Make it with init_state.")
        sizes = checks.Sizes(OP)
        for letter, size in (("n_seq", rows), ("g", self.num_heads_kv), ("p", self.head_dim)):
            sizes.bind(letter, size, "the number of sequences" if letter == "n_seq" else "the layer")
        for name in ("keys", "values"):
            sizes.match(f"state.{name}", getattr(state, name), "n_seq c g p")
        sizes.match("state.position", state.position, "n_seq")

    def _bounded(self, room: int) -> bool:
        """Whether a state with room for so many tokens ends there, rather than forgetting the oldest."""
        return self.window is None or room < self.window

    def _refuse_beyond(self, longest: int | None, room: int | None) -> None:
        """Raise if a sequence becomes longer than its state has room for; None where that cannot be known."""
        if room is not None and longest is not None and longest > room and self._bounded(room):
            raise checks.fail(
                OP,
                f"a sequence becomes {longest} tokens long, its state has room for {room}.",
                "Make the state with a larger max_tokens (--room), or choose a window.",
            )

    def _poison(self, y: Tensor, places: Tensor, room: int) -> Tensor:
        """y (…, e) with NaN at places (…) beyond the room, where `_refuse_beyond` could not look."""
        if not self._bounded(room) or checks.can_read(places):
            return y
        return y.masked_fill((places >= room)[..., None], torch.nan)

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        heads = f"num_heads={self.num_heads}, num_heads_kv={self.num_heads_kv}, head_dim={self.head_dim}"
        return f"d_model={self.d_model}, {heads}, window={self.window}"


def check_cache_dtype(op: str, given: torch.dtype | str | None) -> torch.dtype | None:
    """What `cache_dtype` names; ValueError for anything but the 16-bit dtypes and None."""
    found = next((dtype for dtype in CACHE_DTYPES if given in (dtype, str(dtype).removeprefix("torch."))), None)
    if found is None and given is not None:
        raise checks.fail(op, f"cache_dtype is {given!r}, expected torch.bfloat16, torch.float16 or None.")
    return found


def _joined(parts: list[Tensor], dim: int, empty: Tensor) -> Tensor:
    """Tensors one after the other, a single one as it is; a copy of `empty`, which has no entries, for none."""
    if not parts:
        return empty.clone()
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _range(x: Tensor) -> tuple[int | None, int | None]:
    """Smallest and largest of x (b); None where values may not be looked at."""
    if x.numel() == 0:
        return 0, 0
    if not checks.can_read(x):
        return None, None
    low, high = x.aminmax()
    return int(low), int(high)


def _places(before: Tensor, t: int, cu_seqlens: Tensor | None) -> Tensor:
    """(b, t) each token's place in its sequence, of which `before` (n_seq) tokens were read already."""
    at = torch.arange(t, device=before.device)
    if cu_seqlens is None:
        return before[:, None] + at
    bounds = cu_seqlens.to(before.device, torch.int64)
    sequence = torch.searchsorted(bounds[1:].contiguous(), at, right=True)
    return ((before - bounds[:-1])[sequence] + at)[None]


def _held(position: Tensor, slots: int, room: int) -> Tensor:
    """(b, slots) the place of the token in each slot, after `position` (b) tokens; below 0 where there is none."""
    last = position[:, None] - 1
    return last - torch.remainder(last - torch.arange(slots, device=position.device), room)


def _read(position: Tensor) -> list[int] | None:
    """The values of position (b), so that no work goes into slots that are empty; None in a graph or its recording.

    On a GPU this waits for it, once a call: a prompt then takes the fast path of a sequence that has no past.
    """
    waits = position.is_cuda and not (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())
    return position.tolist() if waits or checks.can_read(position) else None


def _past(state: AttentionState, rows: slice, read: list[int] | None, dtype: torch.dtype) -> _Past | None:
    """What sequences have read, cut to the slots in use; None if that is nothing."""
    position, room = state.position[rows], state.keys.shape[1]
    longest = room if read is None else max(read[rows], default=0)
    if longest == 0:
        return None
    used = min(longest, room)
    return _Past(state.keys[rows, :used].to(dtype), state.values[rows, :used].to(dtype), position, room)


def _write(old: Tensor, new: Tensor, position: Tensor, counts: Tensor) -> Tensor:
    """The cache (b, c, g, p) after the first `counts` (b) of new (b, t, g, p) followed `position` (b) tokens."""
    if new.shape[1] == 0:
        return old.clone()
    index = _held(position + counts, old.shape[1], old.shape[1]) - position[:, None]
    picked = new.gather(1, index.clamp(min=0)[..., None, None].expand(-1, -1, *new.shape[2:]))
    return torch.where((index >= 0)[..., None, None], picked.to(old.dtype), old)


def _seen(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Whether a token at place `query` sees the one at place `key`; shapes broadcast."""
    near = key <= query
    return near if window is None else near & (key > query - window)


def _blocks(t: int, window: int | None, old: int) -> list[tuple[int, int]]:
    """Bounds of the queries that are taken at once; a traced graph takes them all, so that it serves any length."""
    if torch.compiler.is_compiling():
        return [(0, t)]
    size = max(1, MASK_ENTRIES // (old + t)) if window is None else max(window, BLOCK)
    return [(start, min(start + size, t)) for start in range(0, t, size)]
