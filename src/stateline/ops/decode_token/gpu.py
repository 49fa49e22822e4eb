"""decode_token in CUDA C++ (gpu.cu), compiled at first use: one cooperative launch for up to 64 sequences.

Between matrices everything is float32, but what a matrix multiplies is rounded to bfloat16, in every format.
"""

from __future__ import annotations

import functools
import importlib.resources
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from stateline.ops import cuda, nvrtc
from stateline.ops.decode_token import Layer, Matrix, Network
from stateline.ops.native import double_bits
from stateline.ops.packed_linear import FORMATS

#: Of token ids; the kernel itself computes in float32.
DTYPES = frozenset({torch.int32, torch.int64})
#: Sequences of a launch; layers whose states fit into a kernel's arguments.
MOST, LAYERS = 64, 192
WARPS, TILE, PAD, STAGE = 8, 16, 20, 256 * 64
SLICE = 512  # lines of 64 bytes, of a slice of x_proj
DESCRIBED = 8 * (1 + 4 * 6 + 5)  # bytes of a layer's table
#: Of eight sequences, twice, four, eight times as many: pieces of a vector under way, tiles multiplied at once.
AT_ONCE = {1: (8, 6), 2: (6, 4), 4: (4, 3), 8: (3, 2)}
#: Stages below which fetching would wait for multiplying.
LEAST_STAGES = 5


def problem(*args: object) -> str | None:
    """Why the kernel does not cover the network among the arguments on its device, or None if it does."""
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
    if len(network.layers) > LAYERS:
        return f"{len(network.layers)} layers are more than the {LAYERS} it is told of."
    if any(layer.mlp is not None for layer in network.layers):
        return "gated MLPs are not part of it."
    if any(norm.bias is not None for norm in (network.norm, *(layer.norm for layer in network.layers))):
        return "LayerNorm is not part of it, only RMSNorm."
    first = _layers(network)[0]
    (k, _), n, r = first.taps.shape, first.A2.shape[1], first.dt_proj.columns
    if k > 8 or n % 4 or first.D.shape[0] % 4 or r > 512:
        return f"it knows up to 8 taps, multiples of 4 states and channels, ranks up to 512; these are {k}, {n}, {r}."
    if first.dt_proj.format != "bf16" or network.embedding.format != network.head.format:
        return "it reads dt_proj in bfloat16, and the embedding as the head."
    if _stages(8, n, device) < LEAST_STAGES:
        return f"{n} states leave too little shared memory."
    return None


def _layers(network: Network) -> tuple[Layer, ...]:
    """The layers, which are Mamba-1's, as `problem` has seen to."""
    return cast("tuple[Layer, ...]", network.layers)


def step(states: Sequence[Tensor], ids: Tensor, network: Network) -> Tensor:
    """ids (b) -> logits (b, v), writing into states."""
    known = _known.get(network)
    if known is None:
        known = _known[network] = _Known.of(network)
    logits = cuda.empty((ids.shape[0], network.head.rows), torch.float32, states[0])
    with torch.cuda.device(ids.device):
        for first in range(0, ids.shape[0], MOST):
            part = slice(first, first + MOST)
            known.launch([x[part] for x in states] if ids.shape[0] > MOST else states, ids[part], logits[part])
    if not states[0].is_inference():
        torch.autograd.graph.increment_version([x for x in states if not x.is_inference()])
    return logits


@dataclass(frozen=True)
class _Known:
    """What the kernel reads of a network, found once."""

    widths: tuple[int, ...]  # d, e, n, r
    taps: int
    slices: int  # of x_proj, whose few tiles would keep few blocks busy
    fixed: tuple[int, ...]
    table: Tensor
    formats: tuple[str, ...]
    scratch: dict[tuple[int, int], tuple[Tensor, list[int]]]

    @classmethod
    def of(cls, network: Network) -> _Known:
        first = _layers(network)[0]
        k, e = first.taps.shape
        table = [number for layer in _layers(network) for number in _layer(layer)]
        fixed = (double_bits(network.eps), network.norm.weight.data_ptr())
        matrices = (first.in_proj, first.x_proj, first.out_proj, network.head)
        return cls(
            (network.head.columns, e, first.A2.shape[1], first.dt_proj.columns),
            k,
            _slices(first.x_proj),
            (*fixed, *_matrix(network.embedding), *_matrix(network.head)),
            torch.tensor(table, dtype=torch.int64).to(network.head.data.device),
            tuple(m.format for m in matrices),
            {},
        )

    def launch(self, states: Sequence[Tensor], ids: Tensor, logits: Tensor) -> None:
        """One launch on the current stream, for at most 64 sequences."""
        b, device = ids.shape[0], ids.device
        tiles = next(n for n in (1, 2, 4, 8) if 8 * n >= b)
        blocks = torch.cuda.get_device_properties(device).multi_processor_count
        stages = _stages(tiles, self.widths[2], device)
        scratch = self._scratch(tiles, device)
        addresses = [x.data_ptr() for x in states]
        record = [
            len(addresses) // 2, b, *self.widths, *self.fixed, self.table.data_ptr(), ids.data_ptr(), logits.data_ptr(),
            *scratch, stages, *addresses, *[0] * (2 * LAYERS - len(addresses)),
        ]  # fmt: skip
        library = _library(tiles, self.taps, self.slices > 1, self.formats, device.index)
        shared = stages * (STAGE + 16) + _shared(tiles, self.widths[2])
        library.launch("decode_token", blocks, 32 * (WARPS + 1), shared, record, cooperative=True)

    def _scratch(self, tiles: int, device: torch.device) -> list[int]:
        """Where vectors between phases lie, and where blocks meet; each stream has its own, since launches may overlap.

        One piece of memory, zero at first: a graph that is the first to want it fills it at every replay.
        """
        key = tiles, torch.cuda.current_stream(device).cuda_stream
        if key not in self.scratch:
            d, e, n, r = self.widths
            parts = self.slices * -(-(r + 2 * n) // TILE) * TILE if self.slices > 1 else 0
            numbers = [4 * 8 * tiles * size for size in (d, e, e, 2 * n, -(-d // TILE), parts)]
            vectors = [2 * 8 * tiles * 64 * -(-size // 64) for size in (d, e, e, r)]
            ends = list(itertools.accumulate(-(-size // 256) * 256 for size in (*numbers, *vectors, 256)))
            self.scratch[key] = torch.zeros(ends[-1], dtype=torch.uint8, device=device), [0, *ends[:-1]]
        memory, places = self.scratch[key]
        return [memory.data_ptr() + place for place in places]


_known: WeakKeyDictionary[Network, _Known] = WeakKeyDictionary()
_problems: WeakKeyDictionary[Network, str | None] = WeakKeyDictionary()


def _matrix(m: Matrix) -> tuple[int, ...]:
    bias = 0 if m.bias is None else m.bias.data_ptr()
    return m.data.data_ptr(), m.scales.data_ptr(), bias, FORMATS.index(m.format), m.rows, m.columns


def _slices(m: Matrix) -> int:
    lines = -(-m.columns // {"bf16": 2, "int8": 4, "int4": 8}[m.format])
    return -(-lines // SLICE) if lines > 2 * SLICE else 1


def _layer(layer: Layer) -> Iterator[int]:
    matrices = (layer.in_proj, layer.x_proj, layer.dt_proj, layer.out_proj)
    own = (layer.taps, layer.conv_bias, layer.A2, layer.D, layer.dt_bias)
    return itertools.chain(
        (layer.norm.weight.data_ptr(),),
        (number for m in matrices for number in _matrix(m)),
        (0 if x is None else x.data_ptr() for x in own),
    )


def _shared(tiles: int, n: int) -> int:
    """Bytes of shared memory beside the stages."""
    columns, (slots, at_once) = 8 * tiles, AT_ONCE[tiles]
    own = max(slots * tiles * 512, at_once * columns * PAD * 4)
    channels = {1: 4, 2: 4, 4: 2, 8: 1}[tiles]
    return WARPS * own + 2 * DESCRIBED + 4 * columns * (1 + 2 * n + channels * (PAD + 2 * TILE))


@functools.cache
def _stages(tiles: int, n: int, device: torch.device) -> int:
    of: Any = torch.cuda.get_device_properties(device)  # torch's types leave out half of it
    return min(12, (of.shared_memory_per_block_optin - 1024 - _shared(tiles, n)) // (STAGE + 16))


def source() -> str:
    """The kernel, as it is compiled."""
    folder = importlib.resources.files("stateline.ops.decode_token")
    return "".join((folder / part).read_text() for part in ("gpu_common.cuh", "gpu.cu"))


@functools.cache
def _library(tiles: int, taps: int, split: bool, formats: tuple[str, ...], device: int) -> nvrtc.Library:
    names = ("IN", "X", "OUT", "HEAD")
    slots, at_once = AT_ONCE[tiles]
    options = {"NB": tiles, "SLOTS": slots, "TM": at_once, "TAPS": taps, "SPLIT": int(split), "LAYERS": LAYERS}
    options |= {name: FORMATS.index(f) for name, f in zip(names, formats, strict=True)}
    return nvrtc.Library(source(), [f"-D{name}={value}" for name, value in options.items()], device)
