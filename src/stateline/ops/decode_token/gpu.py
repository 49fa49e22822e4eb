"""decode_token in CUDA C++ (gpu.cu), compiled at first use: three or four launches a layer, for up to 64 sequences.

Between matrices everything is float32, but what a matrix multiplies is rounded to bfloat16, in every format.
"""

from __future__ import annotations

import functools
import importlib.resources
import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from stateline import backends
from stateline.ops import cuda, nvrtc
from stateline.ops.decode_token import HeadLayer, Heads, Layer, Matrix, Network
from stateline.ops.native import double_bits
from stateline.ops.packed_linear import FORMATS

#: Of token ids; the kernels themselves compute in float32.
DTYPES = frozenset({torch.int32, torch.int64})
MOST, MOST_TILES, LONG = 64, 3, 1024  # sequences of a launch, tiles of a block, columns that are shared
#: As in the source: threads of a block, bytes of its stages where two share a multiprocessor; threads and sequences of
#: a block of the scan; padding.
THREADS, ROOM = 288, 112640
SCAN, SEQUENCES, PAD = 256, 16, 20
#: The same of Mamba-2's recurrence: threads and warps of a block; more states would not fit in its registers.
HEADS, CREW, MOST_STATES = 128, 4, 512
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
    return _problem_of_layers(network) or _problem_of_device(network, network.head.data.device)


def _problem_of_layers(network: Network) -> str | None:
    if not network.layers:
        return "there are no layers."
    if any(layer.mlp is not None for layer in network.layers):
        return "gated MLPs are not part of it."
    if any(norm.bias is not None for norm in (network.norm, *(layer.norm for layer in network.layers))):
        return "LayerNorm is not part of it, only RMSNorm."
    first, d = network.layers[0], network.head.columns
    k, e, n = first.taps.shape[0], first.D.shape[0], first.state_shapes["ssm"][-1]
    if k > 8 or n % 4 or e % 4 or d % 4:
        return f"it knows up to 8 taps, and multiples of 4 states, channels and width; these are {k}, {n}, {e} and {d}."
    if network.embedding.format != network.head.format:
        return "it reads the embedding as the head."
    if isinstance(first, HeadLayer):
        if n > MOST_STATES or first.heads.beside % 2:
            numbers = f"these are {n} and {first.heads.beside}"
            return f"it knows up to {MOST_STATES} states of Mamba-2, and an even width beside its heads; {numbers}."
        if first.heads.narrow and n % 8:
            return f"it knows multiples of 8 states where they are bfloat16; these are {n}."
    elif first.dt_proj.format != "bf16":
        return "it reads dt_proj in bfloat16."
    return None


def _problem_of_device(network: Network, device: torch.device) -> str | None:
    if torch.cuda.get_device_capability(device) < (9, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 9.0, which it needs."
    first = network.layers[0]
    if isinstance(first, Layer):
        n, r = first.A2.shape[1], first.dt_proj.columns
        of: Any = torch.cuda.get_device_properties(device)  # torch's types leave out half of it
        if scan_shared(n, r) > of.shared_memory_per_block_optin - 1024:
            return f"{n} states and a rank of {r} leave too little shared memory."
    return None


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
    """How a matrix is dealt out: tiles of 16 rows a block takes, blocks that share their columns.

    alone: a block has a multiprocessor for itself, else there are two.
    """

    tiles: int
    slices: int
    alone: bool = False


def cut(m: Matrix, processors: int, eights: int) -> Cut:
    """How to deal out a matrix (timings: benchmarks/NOTES.md): from its sizes, as a sequence's bits depend on slices.

    As few tiles a block as leave two blocks a multiprocessor. Columns are shared, which costs two meetings of a
    cluster, where tiles are few or sums long. Where two blocks share them and there are more than 32 sequences, a
    multiprocessor has one block of three tiles rather than here two blocks of two tiles and there one.
    """
    tiles, most = -(-m.rows // 16), 2 * processors
    if tiles < processors // 4:
        return Cut(-(-8 * tiles // most), 8)
    if m.columns >= LONG and 4 * -(-tiles // MOST_TILES) <= most:
        slices = 2 if 2 * tiles >= processors else 4
        of_one = -(-slices * tiles // processors)
        if eights == 8 and slices == 2 and of_one == MOST_TILES:
            return Cut(of_one, slices, alone=True)
        return Cut(-(-slices * tiles // most), slices)
    return Cut(min(MOST_TILES, -(-tiles // most)), 1)


def head_blocks(heads: Heads, h: int) -> int:
    """Blocks of a sequence of Mamba-2's recurrence."""
    vectors = heads.n // (8 if heads.narrow else 4)  # of 16 bytes, of which a lane takes 8 at once
    lanes = min(32, cuda.power_of_2(vectors))
    steps = min(lanes, max(1, 8 // cuda.power_of_2(-(-vectors // 32))))
    return -(-h * -(-heads.p // (steps * 32 // lanes)) // CREW)


def scan_shared(n: int, rank: int) -> int:
    """Bytes of shared memory of a block of the scan."""
    return 4 * SEQUENCES * (2 * n + 64 + 4 * PAD) + 64 * -(-rank // 2)


@dataclass(frozen=True)
class _Known:
    """What the kernels read of a network, found once."""

    network: _Sizes
    begins: tuple[int, ...]  # epsilon, limits, embedding, head
    layers: list[tuple[int, ...]]  # each one's numbers, as `struct Layer` has them
    norms: tuple[int, ...]  # the first layer's, …, the final one
    scratch: dict[tuple[int, int], tuple[Tensor, list[int]]] = field(default_factory=dict)
    tokens: dict[tuple[int, ...], list[nvrtc.Launch]] = field(default_factory=dict)
    #: Threads on one stream share its scratch memory: all launches of a token come before any of another's.
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, network: Network) -> _Known:
        layers = [tuple(_layer(layer)) for layer in network.layers]
        sizes = _Sizes.of(network)
        begins = (double_bits(network.eps), *sizes.limits, *_matrix(network.embedding), *_matrix(network.head))
        norms = (*(layer[0] for layer in layers), network.norm.weight.data_ptr())
        return cls(sizes, begins, layers, norms)

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
        cuts = {name: cut(m, processors, eights) for name, m in sizes.matrices.items()}
        library = _library(sizes.kind, _options(sizes, eights, cuts), device.index)
        fixed = [b, *sizes.widths, *sizes.rows, *self.begins, 0, 0, *self._scratch(eights, device)]
        nothing, last = [0] * len(self.layers[0]), len(self.layers)
        d = sizes.widths[0]

        def product(name: str, record: list[int]) -> nvrtc.Launch:
            m, by = sizes.matrices[name], cuts[name]
            blocks = -(-m.rows // (16 * by.tiles)) * by.slices
            return library.prepare(name, (blocks, 1), THREADS, ROOM << by.alone, record, by.slices)

        first = [*fixed, *nothing, self.norms[0], 0, 0, 0]
        launches = [library.prepare("embed", (-(-(-(-d // 16) * b) // 16), 1), 256, 0, first, 0)]
        for i, layer in enumerate(self.layers):
            record = [*fixed, *layer, self.norms[i + 1], int(i + 1 == last), *states[2 * i : 2 * i + 2]]
            between = [library.prepare(*of, record, 1) for of in sizes.between(b)]
            if "x_proj" in cuts:
                between.insert(0, product("x_proj", record))
            launches += [product("in_proj", record), *between, product("out_proj", record)]
        return [*launches, product("head", [*fixed, *nothing, 0, 1, 0, 0])]

    def _scratch(self, eights: int, device: torch.device) -> list[int]:
        """Where vectors between kernels lie, whatever was there; each stream has its own, as launches may overlap."""
        key = eights, torch.cuda.current_stream(device).cuda_stream
        if key not in self.scratch:
            numbers = [4 * 8 * eights * size for size in self.network.numbers]
            vectors = [2 * 8 * eights * 32 * -(-size // 32) for size in self.network.vectors]
            ends = list(itertools.accumulate(-(-size // 256) * 256 for size in (*numbers, *vectors)))
            like = torch.empty(0, device=device)
            self.scratch[key] = cuda.empty((ends[-1],), torch.uint8, like), [0, *ends[:-1]]
        memory, places = self.scratch[key]
        return [memory.data_ptr() + place for place in places]


#: Fields of the kernels' record that change with every token.
IDS, LOGITS = 24, 25


class _Sizes(NamedTuple):
    """What kernels are compiled for."""

    d: int
    e: int
    n: int
    r: int  # rank of the step size, 0 of Mamba-2
    taps: int
    matrices: dict[str, Matrix]  # without their memory
    h: int = 0
    heads: Heads | None = None

    @classmethod
    def of(cls, network: Network) -> _Sizes:
        first, nothing = network.layers[0], torch.empty(0)
        names = ("in_proj", "out_proj") if isinstance(first, HeadLayer) else ("in_proj", "x_proj", "out_proj")
        matrices = {name: getattr(first, name) for name in names} | {"head": network.head}
        bare = {name: m._replace(data=nothing, scales=nothing, bias=None) for name, m in matrices.items()}
        d, e, k = network.head.columns, first.D.shape[0], first.taps.shape[0]
        if isinstance(first, HeadLayer):
            return cls(d, e, first.heads.n, 0, k, bare, first.A.shape[0], first.heads)
        return cls(d, e, first.A2.shape[1], first.dt_proj.columns, k, bare)

    @property
    def kind(self) -> str:
        """The part of the source that is for these layers alone."""
        return "gpu_heads.cu" if self.heads else "gpu_scan.cu"

    @property
    def widths(self) -> tuple[int, ...]:
        """d, e, n, r."""
        return self.d, self.e, self.n, self.r

    @property
    def rows(self) -> tuple[int, int, int]:
        """Of in_proj: in front of those that are convolved, these, and how far sequences of the others lie apart."""
        if self.heads is None:
            return 0, self.e, self.e
        before = 2 * self.heads.beside + self.e
        return before, self.e + 2 * self.heads.g * self.n, -(-(before + self.h) // 4) * 4

    @property
    def limits(self) -> tuple[int, ...]:
        """Of the step size, and the epsilon of the norm before out_proj."""
        numbers = (self.heads.low, self.heads.high, self.heads.eps) if self.heads else (0.0, 0.0, 0.0)
        return tuple(map(double_bits, numbers))

    @property
    def direct(self) -> bool:
        """Of Mamba-2: whether what out_proj reads needs no kernel more."""
        x = self.heads
        return x is None or not (x.beside or x.gate_last or (x.g > 1 and x.normalise))

    @property
    def blocks(self) -> int:
        """Of the recurrence of Mamba-2, for a sequence."""
        return head_blocks(self.heads, self.h) if self.heads else 0

    @property
    def numbers(self) -> tuple[int, ...]:
        """Float32 numbers of a sequence between kernels: h, u, z, bc, squares, y, parts."""
        bc, y = 0 if self.heads else 2 * self.n, 0 if self.direct else self.e
        return self.d, self.rows[1], self.rows[2], bc, -(-self.d // 64) * 4, y, -(-self.blocks // 4) * 4

    @property
    def vectors(self) -> tuple[int, ...]:
        """Bfloat16 numbers that matrices read: hf, uf, yf, rf."""
        return self.d, 0 if self.heads else self.e, self.matrices["out_proj"].columns, self.r

    def between(self, b: int) -> list[tuple[str, tuple[int, int], int, int]]:
        """Launches of single blocks in front of out_proj: name, blocks, threads, shared bytes."""
        if self.heads is None:
            return [("scan", (-(-self.e // 16), -(-b // SEQUENCES)), SCAN, scan_shared(self.n, self.r))]
        last = ("gates", (self.heads.g + (self.heads.beside > 0), b), 256, 0)
        return [("heads", (self.blocks, b), HEADS, 0), *([] if self.direct else [last])]


_known: WeakKeyDictionary[Network, _Known] = WeakKeyDictionary()
_problems: WeakKeyDictionary[Network, str | None] = WeakKeyDictionary()


NO_MATRIX = (0,) * 6


def _matrix(m: Matrix) -> tuple[int, ...]:
    bias = 0 if m.bias is None else m.bias.data_ptr()
    return m.data.data_ptr(), m.scales.data_ptr(), bias, FORMATS.index(m.format), m.rows, m.columns


def _layer(layer: Layer | HeadLayer) -> Iterator[int]:
    matrices: tuple[Matrix | None, ...] = (layer.in_proj, None, None, layer.out_proj)
    own: tuple[Tensor | None, ...]
    if isinstance(layer, HeadLayer):
        own = (layer.A, layer.D, layer.dt_bias, layer.scale)
    else:
        matrices = (layer.in_proj, layer.x_proj, layer.dt_proj, layer.out_proj)
        own = (layer.A2, layer.D, layer.dt_bias, None)
    return itertools.chain(
        (layer.norm.weight.data_ptr(),),
        (number for m in matrices for number in (_matrix(m) if m else NO_MATRIX)),
        (0 if x is None else x.data_ptr() for x in (layer.taps, layer.conv_bias, *own)),
    )


def source(kind: str) -> str:
    """The kernels, as they are compiled, for layers of a kind."""
    folder = importlib.resources.files("stateline.ops.decode_token")
    return "".join((folder / part).read_text() for part in ("gpu_matrix.cuh", "gpu_product.cuh", "gpu.cu", kind))


#: Of products, by the matrix's name.
_LETTERS = {"in_proj": "IN", "x_proj": "X", "out_proj": "OUT", "head": "HEAD"}


def _options(sizes: _Sizes, eights: int, cuts: dict[str, Cut]) -> tuple[str, ...]:
    options = {"NB": eights, "TAPS": sizes.taps, "STATES": sizes.n, "HEADS": sizes.h, "BESIDE": 0}
    if x := sizes.heads:
        options |= {"WIDTH": x.p, "NGROUPS": x.g, "BESIDE": x.beside, "BLOCKS": sizes.blocks, "WIDE": int(not x.narrow)}
        options |= {"NORMALISE": int(x.normalise), "GATE_LAST": int(x.gate_last)}
    for name, m in sizes.matrices.items():
        letters = _LETTERS[name]
        options |= {
            letters: FORMATS.index(m.format),
            f"T_{letters}": cuts[name].tiles,
            f"S_{letters}": cuts[name].slices,
            f"A_{letters}": int(cuts[name].alone),
        }
        options[f"W_{letters}"] = int(m.columns % 32 == 0)
    return tuple(f"-D{name}={value}" for name, value in options.items())


@functools.cache
def _library(kind: str, options: tuple[str, ...], device: int) -> nvrtc.Library:
    return nvrtc.Library(source(kind), options, device)
