"""decode_token in CUDA C++ (gpu.cu), compiled at first use: four launches a layer, for up to 64 sequences at a time.

Between matrices everything is float32, but what a matrix multiplies is rounded to bfloat16, in every format.
"""

from __future__ import annotations

import functools
import importlib.resources
import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from stateline import backends
from stateline.ops import cuda, nvrtc
from stateline.ops.decode_token import Layer, Matrix, Network
from stateline.ops.native import double_bits
from stateline.ops.packed_linear import FORMATS

#: Of token ids; the kernels themselves compute in float32.
DTYPES = frozenset({torch.int32, torch.int64})
MOST, MOST_TILES, LONG = 64, 3, 1024  # sequences of a launch, tiles of a block, columns that are shared
#: As in the source: threads of a block, bytes of its stages; threads and sequences of a block of the scan; padding.
THREADS, ROOM = 288, 112640
SCAN, SEQUENCES, PAD = 256, 16, 20
#: Launches that are kept ready, each for states that lie elsewhere.
KEPT = 8


def problem(*args: object) -> str | None:
    """Why the kernels do not cover the network among the arguments on its device, or None if they do."""
    network = next((x for x in args if isinstance(x, Network)), None)
    if network is None:
        return None
    if network not in _problems:
        _problems[network] = _problem(network)
    return _problems[network]


def _problem(network: Network) -> str | None:
    if any(not isinstance(layer, Layer) for layer in network.layers):
        return "it knows Mamba-1 alone, these are layers of Mamba-2."
    device = network.head.data.device
    if torch.cuda.get_device_capability(device) < (9, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 9.0, which it needs."
    if not network.layers:
        return "there are no layers."
    if any(layer.mlp is not None for layer in network.layers):
        return "gated MLPs are not part of it."
    if any(norm.bias is not None for norm in (network.norm, *(layer.norm for layer in network.layers))):
        return "LayerNorm is not part of it, only RMSNorm."
    first = _layers(network)[0]
    (k, e), n, r, d = first.taps.shape, first.A2.shape[1], first.dt_proj.columns, network.head.columns
    if k > 8 or n % 4 or e % 4 or d % 4:
        return f"it knows up to 8 taps, and multiples of 4 states, channels and width; these are {k}, {n}, {e} and {d}."
    if first.dt_proj.format != "bf16" or network.embedding.format != network.head.format:
        return "it reads dt_proj in bfloat16, and the embedding as the head."
    of: Any = torch.cuda.get_device_properties(device)  # torch's types leave out half of it
    if scan_shared(n, r) > of.shared_memory_per_block_optin - 1024:
        return f"{n} states and a rank of {r} leave too little shared memory."
    return None


def _layers(network: Network) -> tuple[Layer, ...]:
    """The layers, which are Mamba-1's, as `problem` has seen to."""
    return cast("tuple[Layer, ...]", network.layers)


def step(states: Sequence[Tensor], ids: Tensor, network: Network) -> Tensor:
    """ids (b) -> logits (b, v), writing into states."""
    known = _known.get(network)
    if known is None:
        known = _known[network] = _Known.of(network)
    if ids.shape[0] > MOST:
        backends.say_once(
            f"decode_token: more than {MOST} sequences take several rounds of launches. From twice as many on, a GPU "
            "is faster with the model as it was before it was packed."
        )
    logits = cuda.empty((ids.shape[0], network.head.rows), torch.float32, states[0])
    with torch.cuda.device(ids.device):
        for first in range(0, ids.shape[0], MOST):
            part = slice(first, first + MOST)
            known.launch([x[part] for x in states] if ids.shape[0] > MOST else states, ids[part], logits[part])
    if not states[0].is_inference():
        torch.autograd.graph.increment_version([x for x in states if not x.is_inference()])
    return logits


class Cut(NamedTuple):
    """How a matrix is dealt out: tiles of 16 rows a block takes, blocks that share their columns."""

    tiles: int
    slices: int


def cut(m: Matrix, processors: int) -> Cut:
    """How to deal out a matrix (timings: benchmarks/NOTES.md): from its sizes, as a sequence's bits depend on slices.

    As few tiles a block as leave two blocks a multiprocessor. Columns are shared, which costs two meetings of a
    cluster, where tiles are few or sums long.
    """
    tiles, most = -(-m.rows // 16), 2 * processors
    if tiles < processors // 4:
        return Cut(-(-8 * tiles // most), 8)
    if m.columns >= LONG and 4 * -(-tiles // MOST_TILES) <= most:
        return Cut(-(-4 * tiles // most), 4)
    return Cut(min(MOST_TILES, -(-tiles // most)), 1)


def scan_shared(n: int, rank: int) -> int:
    """Bytes of shared memory of a block of the scan."""
    return 4 * SEQUENCES * (2 * n + 64 + 4 * PAD) + 64 * -(-rank // 2)


@dataclass(frozen=True)
class _Known:
    """What the kernels read of a network, found once."""

    network: _Sizes
    begins: tuple[int, ...]  # epsilon, embedding, head
    layers: list[tuple[int, ...]]  # each one's numbers, as `struct Layer` has them
    norms: tuple[int, ...]  # the first layer's, …, the final one
    scratch: dict[tuple[int, int], tuple[Tensor, list[int]]] = field(default_factory=dict)
    tokens: dict[tuple[int, ...], list[nvrtc.Launch]] = field(default_factory=dict)
    #: Threads on one stream share its scratch memory: all launches of a token come before any of another's.
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, network: Network) -> _Known:
        layers = [tuple(_layer(layer)) for layer in _layers(network)]
        begins = (double_bits(network.eps), *_matrix(network.embedding), *_matrix(network.head))
        norms = (*(layer[0] for layer in layers), network.norm.weight.data_ptr())
        return cls(_Sizes.of(network), begins, layers, norms)

    def launch(self, states: Sequence[Tensor], ids: Tensor, logits: Tensor) -> None:
        """A token of at most 64 sequences, on the current stream."""
        addresses = [x.data_ptr() for x in states]
        key = (len(ids), torch.cuda.current_stream(ids.device).cuda_stream, *addresses)
        with self.lock:
            if key not in self.tokens:
                while len(self.tokens) >= KEPT:
                    self.tokens.pop(next(iter(self.tokens)))
                self.tokens[key] = self._prepared(len(ids), addresses, ids.device)
            launches = self.tokens[key]
            launches[0].fields[IDS] = ids.data_ptr()
            launches[-1].fields[LOGITS] = logits.data_ptr()
            for run in launches:
                run()

    def _prepared(self, b: int, states: list[int], device: torch.device) -> list[nvrtc.Launch]:
        sizes, eights = self.network, next(n for n in (1, 2, 4, 8) if 8 * n >= b)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        cuts = [cut(m, processors) for m in sizes.matrices]
        library = _library(_options(sizes, eights, cuts), device.index)
        fixed = [b, *sizes.widths, *self.begins, 0, 0, *self._scratch(eights, device)]
        nothing, last = [0] * len(self.layers[0]), len(self.layers)
        d, e, n, r = sizes.widths

        def product(name: str, which: int, record: list[int]) -> nvrtc.Launch:
            tiles, slices = cuts[which]
            blocks = -(-sizes.matrices[which].rows // (16 * tiles)) * slices
            return library.prepare(name, (blocks, 1), THREADS, ROOM, record, slices)

        first = [*fixed, *nothing, self.norms[0], 0, 0, 0]
        launches = [library.prepare("embed", (-(-(-(-d // 16) * b) // 16), 1), 256, 0, first, 0)]
        for i, layer in enumerate(self.layers):
            record = [*fixed, *layer, self.norms[i + 1], int(i + 1 == last), *states[2 * i : 2 * i + 2]]
            launches += [product("in_proj", 0, record), product("x_proj", 1, record)]
            scans = (-(-e // 16), -(-b // SEQUENCES))
            launches += [library.prepare("scan", scans, SCAN, scan_shared(n, r), record, 1)]
            launches += [product("out_proj", 2, record)]
        return [*launches, product("head", 3, [*fixed, *nothing, 0, 1, 0, 0])]

    def _scratch(self, eights: int, device: torch.device) -> list[int]:
        """Where vectors between kernels lie, whatever was there; each stream has its own, as launches may overlap."""
        key = eights, torch.cuda.current_stream(device).cuda_stream
        if key not in self.scratch:
            d, e, n, r = self.network.widths
            numbers = [4 * 8 * eights * size for size in (d, e, e, 2 * n, -(-d // 64) * 4)]
            vectors = [2 * 8 * eights * 32 * -(-size // 32) for size in (d, e, e, r)]
            ends = list(itertools.accumulate(-(-size // 256) * 256 for size in (*numbers, *vectors)))
            like = torch.empty(0, device=device)
            self.scratch[key] = cuda.empty((ends[-1],), torch.uint8, like), [0, *ends[:-1]]
        memory, places = self.scratch[key]
        return [memory.data_ptr() + place for place in places]


#: Fields of the kernels' record that change with every token.
IDS, LOGITS = 18, 19


class _Sizes(NamedTuple):
    """What kernels are compiled for; widths d, e, n, r."""

    widths: tuple[int, ...]
    taps: int
    matrices: tuple[Matrix, ...]  # in_proj, x_proj, out_proj, head, without their memory

    @classmethod
    def of(cls, network: Network) -> _Sizes:
        first, nothing = _layers(network)[0], torch.empty(0)
        matrices = (first.in_proj, first.x_proj, first.out_proj, network.head)
        bare = tuple(m._replace(data=nothing, scales=nothing, bias=None) for m in matrices)
        widths = (network.head.columns, first.taps.shape[1], first.A2.shape[1], first.dt_proj.columns)
        return cls(widths, first.taps.shape[0], bare)


_known: WeakKeyDictionary[Network, _Known] = WeakKeyDictionary()
_problems: WeakKeyDictionary[Network, str | None] = WeakKeyDictionary()


def _matrix(m: Matrix) -> tuple[int, ...]:
    bias = 0 if m.bias is None else m.bias.data_ptr()
    return m.data.data_ptr(), m.scales.data_ptr(), bias, FORMATS.index(m.format), m.rows, m.columns


def _layer(layer: Layer) -> Iterator[int]:
    matrices = (layer.in_proj, layer.x_proj, layer.dt_proj, layer.out_proj)
    own = (layer.taps, layer.conv_bias, layer.A2, layer.D, layer.dt_bias)
    return itertools.chain(
        (layer.norm.weight.data_ptr(),),
        (number for m in matrices for number in _matrix(m)),
        (0 if x is None else x.data_ptr() for x in own),
    )


def source() -> str:
    """The kernels, as they are compiled."""
    folder = importlib.resources.files("stateline.ops.decode_token")
    return "".join((folder / part).read_text() for part in ("gpu_matrix.cuh", "gpu_product.cuh", "gpu.cu"))


def _options(sizes: _Sizes, eights: int, cuts: Sequence[Cut]) -> tuple[str, ...]:
    options = {"NB": eights, "TAPS": sizes.taps, "STATES": sizes.widths[2]}
    for name, m, (tiles, slices) in zip(("IN", "X", "OUT", "HEAD"), sizes.matrices, cuts, strict=True):
        options |= {name: FORMATS.index(m.format), f"T_{name}": tiles, f"S_{name}": slices}
        options[f"W_{name}"] = int(m.columns % 32 == 0)
    return tuple(f"-D{name}={value}" for name, value in options.items())


@functools.cache
def _library(options: tuple[str, ...], device: int) -> nvrtc.Library:
    return nvrtc.Library(source(), options, device)
