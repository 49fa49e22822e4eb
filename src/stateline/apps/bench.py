"""What a machine can do, and what share of it a model gets: speeds of a language model on a CPU beside its limits.

Reading a prompt is bound by arithmetic, writing token by token by memory: each step reads every weight once. So the
machine's matrix rate and read bandwidth are measured first, and every speed is told as a share of the one that bounds
it. A model that fits into the processor's caches may get more than the bandwidth of memory.
"""

from __future__ import annotations

import copy
import gc
import importlib.resources
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from stateline.apps.confidence import ratio_interval
from stateline.apps.evaluate import Document, Evaluator
from stateline.generation import Tokenizer
from stateline.models import LanguageModel, ModelConfig

PREFILL = (512, 2048)
BATCHES = (1, 8)
#: Ways to keep weights, and the dtype of matrix products in them.
PLAIN = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PREPARED = ("bf16", "int8", "int4")
FEWEST, MOST = 3, 50  # turns of a measurement


@dataclass(frozen=True)
class Effort:
    """How long to measure. seconds: of a speed, beyond its warm-up; text: bytes scored for the loss of quality."""

    seconds: float = 2.0
    buffer: int = 512 << 20
    side: int = 2048
    text: int = 8192
    model: ModelConfig = field(default_factory=lambda: ModelConfig(d_model=768, n_layer=24, vocab_size=50280))


QUICK = Effort(0.2, 128 << 20, 1024, 1024, ModelConfig(d_model=256, n_layer=6, vocab_size=8192))


@dataclass(frozen=True)
class Limits:
    """What the machine can do at most, as measured. bandwidth: bytes/s read from memory; rates: flop/s by dtype."""

    bandwidth: float
    rates: dict[str, float]


@dataclass
class Row:
    """Figures of a model with its weights kept in one way; speeds in tokens/s, shares of the limit from 0 to 1.

    prefill, decode: by tokens and by batch.   loss: bits per byte above float32's, with its 95 % interval.
    """

    weights: str
    megabytes: float
    prefill: dict[int, float] = field(default_factory=dict)
    prefill_share: dict[int, float] = field(default_factory=dict)
    decode: dict[int, float] = field(default_factory=dict)
    decode_share: dict[int, float] = field(default_factory=dict)
    bits_per_byte: float | None = None
    loss: float | None = None
    loss_interval: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Every figure, ready for JSON."""
        return asdict(self)


def prepare() -> Callable[..., Any] | None:
    """`stateline.prepare_for_decode(model, weights)`, which keeps weights in fewer bits, if this release has it."""
    import stateline

    return getattr(stateline, "prepare_for_decode", None)


def ways() -> list[str]:
    """The names of all ways to keep weights that can be measured here."""
    return [*PLAIN, *(PREPARED if prepare() else ())]


def convert(model: LanguageModel, way: str) -> Any:
    """A float32 model with its weights kept in one of `ways`; the model given is not changed."""
    if way == "float32":
        return model
    if way in PLAIN:
        return copy.deepcopy(model).to(PLAIN[way])
    make = prepare()
    assert make is not None, way
    return make(copy.deepcopy(model), weights=way)


def median_seconds(run: Callable[[], object], seconds: float) -> float:
    """The median time of a call: warm-up, then as many turns as fit in `seconds`, FEWEST to MOST of them.

    A call that takes longer than FEWEST times `seconds` by itself is timed once more, no oftener.
    """
    began = time.perf_counter()
    run()
    first = time.perf_counter() - began
    turns = 1 if first > FEWEST * seconds else int(min(MOST, max(FEWEST, seconds / max(first, 1e-9))))
    times = []
    gc.disable()
    try:
        for _ in range(turns):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
    finally:
        gc.enable()
    return statistics.median(times)


def limits(effort: Effort) -> Limits:
    """Read bandwidth and matrix rates of this machine with torch's threads.

    Bandwidth: the sum of a buffer far larger than any cache. Rates: the product of square matrices; the best of a few
    turns, since a limit is what the machine can do, not what it does on average.
    """
    buffer = torch.ones(effort.buffer // 4)
    bandwidth = effort.buffer / _least(buffer.sum, effort.seconds)
    del buffer
    rates = {}
    for name, dtype in PLAIN.items():
        a, b = (torch.randn(effort.side, effort.side).to(dtype) for _ in range(2))
        rates[name] = 2 * effort.side**3 / _least(lambda a=a, b=b: a @ b, effort.seconds)  # type: ignore[misc]
    return Limits(bandwidth, rates)


def _least(run: Callable[[], object], seconds: float) -> float:
    run()
    best, ends = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < ends:
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best


def random_model(config: ModelConfig) -> LanguageModel:
    """A model of this shape with random weights: as fast as a trained one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LanguageModel(config).eval()


@torch.inference_mode()
def measure(model: LanguageModel, way: str, machine: Limits, effort: Effort) -> Iterator[tuple[str, Row]]:
    """(what was measured, the row so far), figure by figure, of a float32 model."""
    kept = convert(model, way)
    size = weight_bytes(kept)
    row = Row(way, round(size / 1e6, 3))
    flops = 2 * sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    rate = machine.rates["float32" if way == "float32" else "bfloat16"]
    read = size if model.config.tie_embeddings else size - _embedding_bytes(kept)
    for tokens in PREFILL:
        ids = torch.randint(model.config.vocab_size, (1, tokens))
        state = kept.init_state(1)
        took = median_seconds(lambda ids=ids, state=state: kept.extend(ids, state, last_only=True), effort.seconds)  # type: ignore[misc]
        row.prefill[tokens] = tokens / took
        row.prefill_share[tokens] = tokens * flops / took / rate
        yield f"{way}, prefill of {tokens:,}", row
    for batch in BATCHES:
        ids = torch.randint(model.config.vocab_size, (batch,))
        state = kept.init_state(batch)
        took = median_seconds(lambda ids=ids, state=state: kept.step_(ids, state), effort.seconds)  # type: ignore[misc]
        row.decode[batch] = batch / took
        row.decode_share[batch] = read / took / machine.bandwidth
        yield f"{way}, decode, batch {batch}", row


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights a model keeps; what is tied counts once."""
    kept = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(kept.values())


def _embedding_bytes(model: Any) -> int:
    weight = model.backbone.embedding.weight
    return int(weight.numel() * weight.element_size())


class Quality:
    """Bits per byte of a model on the packaged excerpt, and how much of it ways to keep weights lose.

    Differences are taken block by block of the same text, so that their interval is far narrower than either figure's.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer | None, effort: Effort) -> None:
        self.model, self.tokenizer = model, tokenizer
        text = (importlib.resources.files("stateline") / "bundled" / "excerpt" / "test.txt").read_bytes()
        self.text = Document.of(text[: effort.text].decode("utf-8", "ignore"), "excerpt")
        self.exact: np.ndarray | None = None

    def add(self, row: Row) -> None:
        """Fill in a row's figures; float32's must come first."""
        evaluator = Evaluator(convert(self.model, row.weights), self.tokenizer)
        evaluator.run([self.text])
        tally = evaluator.tallies["excerpt"]
        values, sizes, _ = tally.units()
        values = values / math.log(2)
        row.bits_per_byte = evaluator.report().total.bits_per_byte
        if self.exact is None:
            assert row.weights == "float32"
            self.exact = values
        row.loss = float((values - self.exact).sum() / sizes.sum())
        row.loss_interval = ratio_interval(values - self.exact, sizes)
