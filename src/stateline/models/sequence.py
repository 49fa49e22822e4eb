"""SequenceModel: a signal (b, t, c) in, one answer a sequence out, or a running answer after every sample.

    x = project(input(signal))                               (b, t, d), see models/signal_input.py
    x = x + mixer(norm(x)), block after block, a mixer by name
    answer = head(pool(norm(x)))                              pool: the mean so far, the largest, both, or the last

Each pool can be kept up sample by sample, so a stream costs constant time and memory.
Suffixes: b batch, t time, c channels of the signal, d width, o outputs.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stateline import checks
from stateline.models.backbone import MIXERS
from stateline.models.signal_input import SignalInput
from stateline.nn import Bidirectional, Mixer
from stateline.nn.mixer import Lengths, padding, zero_padding

OP = "SequenceModel"
#: What a pool keeps, one part after another.
POOLS = {"mean": ("mean",), "max": ("max",), "mean_max": ("mean", "max"), "last": ("last",)}
NORMS = ("batch", "layer")
#: How much of the running statistics of a ChannelNorm a batch replaces, once there were as many.
MOMENTUM = 0.1


@dataclass(frozen=True)
class SequenceConfig:
    """Sizes and choices of a SequenceModel.

    Args:
        channels: of the signal.   outputs: numbers in an answer: classes, or targets.
        d_model: width of the residual stream.   n_layer: blocks.
        mixer: a name of `models.MIXERS`.   mixer_args: its constructor's arguments, e.g. {"d_state": 32}.
        pool: "mean", "max", "mean_max" (both, side by side) or "last", over the samples read so far.
        own_scale: whether the model also reads each signal standardised by itself, and its level.
        missing: whether it reads which values are missing.
        bidirectional: read every sequence from both ends (`nn.Bidirectional`); such a model cannot stream.
        norm: "batch" (each channel by its mean and deviation over the training signals, which leaves amplitudes as they
            are) or "layer" (each sample by itself).
        dropout: share of what each block writes that is set to 0 in training, whole channels of a sequence at a time.
    """

    channels: int
    outputs: int
    d_model: int = 64
    n_layer: int = 2
    mixer: str = "S4D"
    mixer_args: dict[str, Any] = field(default_factory=dict)
    pool: str = "mean"
    norm: str = "batch"
    own_scale: bool = True
    missing: bool = False
    bidirectional: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("channels", "outputs", "d_model", "n_layer"):
            checks.number(OP, name, getattr(self, name), low=1, integer=True)
        checks.choice(OP, "mixer", self.mixer, tuple(MIXERS))
        checks.choice(OP, "pool", self.pool, tuple(POOLS))
        checks.choice(OP, "norm", self.norm, NORMS)
        checks.number(OP, "dropout", self.dropout, low=0, high=0.95)
        for name in ("own_scale", "missing", "bidirectional"):
            if not isinstance(getattr(self, name), bool):
                raise checks.fail(OP, f"{name} is {getattr(self, name)!r}, expected True or False.", error=TypeError)
        if not isinstance(self.mixer_args, Mapping):
            raise checks.fail(OP, f"mixer_args is {self.mixer_args!r}, expected a dict.", error=TypeError)
        known = [p for p in inspect.signature(MIXERS[self.mixer]).parameters if p not in ("d_model", "device", "dtype")]
        if unknown := sorted(set(self.mixer_args) - set(known)):
            problem = f"mixer_args has unknown keys {', '.join(unknown)}; {self.mixer} knows {', '.join(known)}."
            raise checks.fail(OP, problem)
        object.__setattr__(self, "mixer_args", dict(self.mixer_args))

    def to_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON."""
        found: dict[str, Any] = checks.plain(dataclasses.asdict(self))
        return found

    def make_norm(self) -> nn.Module:
        """One block's norm."""
        return ChannelNorm(self.d_model) if self.norm == "batch" else SampleNorm(self.d_model)

    def make_mixer(self) -> Mixer:
        """One block's mixer."""
        mixer = MIXERS[self.mixer](self.d_model, **self.mixer_args)
        if mixer.takes_gate:
            problem = f"mixer {self.mixer} with {self.mixer_args} wants a gate, which signals do not bring."
            raise checks.fail(OP, problem, "Let it learn its gate.")
        return Bidirectional(mixer) if self.bidirectional else mixer


class ChannelNorm(nn.Module):
    """Each channel of (b, t, d) by its mean and deviation: those of the batch in training, padding left out, and their
    running averages afterwards, which do not depend on what else is read."""

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("mean", torch.zeros(d_model))
        self.register_buffer("variance", torch.ones(d_model))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, padded: Tensor | None = None) -> Tensor:
        """x (…, d) -> (…, d). padded (b, t): what is no sample of x (b, t, d)."""
        mean, variance = (self._measured(x, padded)) if self.training else (self.mean, self.variance)
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias

    def _measured(self, x: Tensor, padded: Tensor | None) -> tuple[Tensor, Tensor]:
        valid = x.new_ones(x.shape[:-1]) if padded is None else (~padded).to(x.dtype)
        share = (valid / valid.sum().clamp(min=1))[..., None]
        mean = (x * share).sum((0, 1))
        variance = ((x - mean).square() * share).sum((0, 1))
        with torch.no_grad():
            self.batches += 1
            new = (1 / self.batches).clamp(min=MOMENTUM).to(x.dtype)  # a plain average to begin with
            self.mean.lerp_(mean, new)
            self.variance.lerp_(variance, new)
        return mean, variance


class SampleNorm(nn.LayerNorm):
    """Layer norm with ChannelNorm's arguments."""

    def forward(self, x: Tensor, padded: Tensor | None = None) -> Tensor:
        return super().forward(x)


@dataclass
class SequenceState:
    """What sequences carry: one state a block; pooled (b, parts · d) float64, the sum, the largest or the last vector
    so far, or two of them; count (b) int64, samples read."""

    layers: list[Any]
    pooled: Tensor
    count: Tensor


torch.export.register_dataclass(SequenceState, serialized_type_name="stateline.models.SequenceState")


class SequenceModel(nn.Module):
    """What is read of signals (b, t, w) -> answers (b, o): logits of classes, or standardised targets.

    input: makes what the model reads, x (b, t, input.width), of signals (b, t, c), a SignalInput; all else takes x.

    >>> model = SequenceModel(SequenceConfig(channels=3, outputs=2)).eval()
    >>> x, _ = model.input.extend(torch.randn(1, 20, 3))
    >>> first, state = model.extend(x[:, :8], model.init_state(1))
    >>> last, state = model.extend(x[:, 8:], state)
    >>> torch.allclose(last, model(x), atol=1e-5)
    True
    """

    def __init__(self, config: SequenceConfig) -> None:
        super().__init__()
        self.config = config
        self.input = SignalInput(config.channels, own=config.own_scale, missing=config.missing)
        d = config.d_model
        self.project = nn.Linear(self.input.width, d)
        self.mixers = nn.ModuleList(config.make_mixer() for _ in range(config.n_layer))
        self.norms = nn.ModuleList(config.make_norm() for _ in range(config.n_layer))
        self.norm_f = config.make_norm()
        self.head = nn.Linear(len(POOLS[config.pool]) * d, config.outputs)

    def forward(self, x: Tensor, *, lengths: Lengths | None = None) -> Tensor:
        """What is read of signals, x (b, t, w) -> answers (b, o) to each as a whole. lengths (b): valid samples."""
        features = self._features(x, lengths)
        b, t = x.shape[:2]
        count = torch.full((b,), t, device=x.device) if lengths is None else torch.as_tensor(lengths, device=x.device)
        pooled = self._pool(features, count, None if lengths is None else padding(x, lengths))
        return self._answer(pooled, count)

    def init_state(
        self, batch: int, *, max_tokens: int | None = None, device: torch.device | str | None = None
    ) -> SequenceState:
        """The state of `batch` signals before their first sample. Raises TypeError for a bidirectional model."""
        device = device or self.head.weight.device
        layers = [mixer.init_state(batch, max_tokens=max_tokens, device=device) for _, mixer in self._blocks()]
        made: dict[str, Any] = {"dtype": torch.float64, "device": device}
        lowest = (-math.inf if part == "max" else 0.0 for part in POOLS[self.config.pool])
        pooled = torch.cat([torch.full((batch, self.config.d_model), low, **made) for low in lowest], -1)
        return SequenceState(layers, pooled, torch.zeros(batch, dtype=torch.int64, device=device))

    def extend(
        self, x: Tensor, state: SequenceState | None = None, *, lengths: Lengths | None = None
    ) -> tuple[Tensor, SequenceState]:
        """Continue by x (b, t, w): (answers (b, o) to all that was read so far, new state)."""
        state = self.init_state(x.shape[0], device=x.device) if state is None else state
        x = self.project(zero_padding(x, lengths))
        layers = []
        for (norm, mixer), given in zip(self._blocks(), state.layers, strict=True):
            y, new = mixer.extend(norm(x), given, lengths=lengths)
            x = x + y
            layers.append(new)
        features = zero_padding(self.norm_f(x), lengths)
        b, t = x.shape[:2]
        here = torch.full((b,), t, device=x.device) if lengths is None else torch.as_tensor(lengths, device=x.device)
        pooled = self._pool(features.double(), here, None if lengths is None else padding(x, lengths))
        pooled = self._joined(state.pooled, pooled, here[:, None] > 0)
        count = state.count + here
        return self._answer(pooled, count), SequenceState(layers, pooled, count)

    @torch.no_grad()
    def step_(self, x: Tensor, state: SequenceState) -> Tensor:
        """One sample x (b, w) -> answers (b, o), writing into `state`. No gradient."""
        x = self.project(x)
        for (norm, mixer), given in zip(self._blocks(), state.layers, strict=True):
            x = x + mixer.step_(norm(x), given)
        feature = self.norm_f(x).double().repeat(1, len(POOLS[self.config.pool]))
        state.pooled.copy_(self._joined(state.pooled, feature, torch.ones_like(state.count, dtype=torch.bool)[:, None]))
        state.count += 1
        return self._answer(state.pooled, state.count)

    def _features(self, x: Tensor, lengths: Lengths | None) -> Tensor:
        x = self.project(zero_padding(x, lengths))
        padded = None if lengths is None else padding(x, lengths)
        for norm, mixer in self._blocks():
            x = x + self._thinned(mixer(norm(x, padded), lengths=lengths))
        return zero_padding(self.norm_f(x, padded), lengths)

    def _thinned(self, x: Tensor) -> Tensor:
        """Dropout of whole channels of a sequence: what one sample loses, its neighbours would give away."""
        p = self.config.dropout
        return x * F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), p) if p and self.training else x

    def _pool(self, features: Tensor, count: Tensor, padded: Tensor | None) -> Tensor:
        """features (b, t, d), 0 at padding -> (b, parts · d): their sum, largest or last, or two of them."""
        return torch.cat([_pooled(part, features, count, padded) for part in POOLS[self.config.pool]], -1)

    def _joined(self, before: Tensor, after: Tensor, read: Tensor) -> Tensor:
        """The pool of all samples from those of the samples before and after; read (b, 1): rows that have any after."""
        joins: dict[str, Any] = {"mean": torch.add, "max": torch.maximum, "last": lambda a, b: torch.where(read, b, a)}
        parts = POOLS[self.config.pool]
        pairs = zip(parts, before.chunk(len(parts), -1), after.chunk(len(parts), -1), strict=True)
        return torch.cat([joins[part](a, b) for part, a, b in pairs], -1)

    def _answer(self, pooled: Tensor, count: Tensor) -> Tensor:
        """The head on the pool; of nothing, on zeros."""
        parts = POOLS[self.config.pool]
        samples = count.clamp(min=1)[:, None]
        chunks = zip(parts, pooled.chunk(len(parts), -1), strict=True)
        pooled = torch.cat([x / samples if part == "mean" else x for part, x in chunks], -1)
        pooled = pooled.masked_fill((count == 0)[:, None], 0)
        return cast(Tensor, self.head(pooled.to(self.head.weight.dtype)))

    def _blocks(self) -> list[tuple[nn.Module, Mixer]]:
        return list(zip(self.norms, cast("list[Mixer]", list(self.mixers)), strict=True))


def _pooled(part: str, features: Tensor, count: Tensor, padded: Tensor | None) -> Tensor:
    """features (b, t, d), 0 at padding -> (b, d), one part of a pool."""
    b, t, d = features.shape
    if part == "mean":
        return features.sum(1)
    if part == "max":
        if t == 0:
            return features.new_full((b, d), -math.inf)
        return (features if padded is None else features.masked_fill(padded[..., None], -math.inf)).amax(1)
    if t == 0:
        return features.new_zeros(b, d)
    at = (count.long() - 1).clamp(min=0)[:, None, None].expand(-1, 1, d)
    return features.gather(1, at)[:, 0]
