"""The cases that a release is judged by: the machine's limits, import, scan, block, long context.

A case makes its candidates when asked; the others are compared with the first. b batch, t time, d channel, n state.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks import measure, peers
from benchmarks.measure import Work
from torch import Tensor, nn

from stateline import ops
from stateline.models import LanguageModel, ModelConfig
from stateline.nn import Mamba, Mamba2, Mamba3

OURS = "stateline"
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
LOOP_LIMIT = 2048  # the hand-written loop is timed up to this length


@dataclass(frozen=True)
class Case:
    """One row a candidate. `make(with_peers)` gives them; `tokens` read in a call turn times into tokens per second."""

    op: str
    shape: str
    dtype: str
    make: Callable[[bool], dict[str, Work]]
    tokens: int | None = None
    extra: Callable[[], dict[str, Any]] = field(default=dict)


def cases() -> Iterator[Case]:
    """Every case, cheapest first."""
    yield from limits()
    yield from imports()
    yield from scans()
    yield from lengths()
    yield from blocks()
    yield from long_context()


def scan_inputs(b: int, t: int, d: int, n: int) -> dict[str, Tensor]:
    """Inputs as a trained model has them: dt around 0.02, A from -1 to -n."""
    torch.manual_seed(0)
    A = -torch.arange(1.0, n + 1).repeat(d, 1)
    dt = F.softplus(torch.randn(b, t, d) * 0.5 - 4)
    return {"u": torch.randn(b, t, d), "dt": dt, "A": A, "B": torch.randn(b, t, n), "C": torch.randn(b, t, n)}


def without_grad(run: Work) -> Work:
    """The same work under no_grad."""

    def quiet() -> object:
        with torch.no_grad():
            return run()

    return quiet


def with_backward(forward: Callable[..., Tensor], leaves: dict[str, Tensor]) -> Work:
    """Forward and gradients of all `leaves`."""
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    return lambda: torch.autograd.grad(forward(**leaves).sum(), list(leaves.values()))


def scans() -> Iterator[Case]:
    """The recurrence alone, at the shape of a 130M block."""
    b, t, d, n = 1, 2048, 1536, 16

    def ours(**x: Tensor) -> Tensor:
        return ops.selective_scan(**x)[0]

    def forward(with_peers: bool) -> dict[str, Work]:
        x = scan_inputs(b, t, d, n)
        loop = {"torch loop": without_grad(lambda: peers.torch_loop(**x))} if with_peers else {}
        return {OURS: without_grad(lambda: ours(**x)), **loop}

    def both(with_peers: bool) -> dict[str, Work]:
        x = scan_inputs(b, t, d, n)
        return {OURS: with_backward(ours, x)} | (
            {"torch loop": with_backward(peers.torch_loop, x)} if with_peers else {}
        )

    yield Case("selective_scan fwd", f"b{b} t{t} d{d} n{n}", "float32", forward, b * t)
    yield Case("selective_scan fwd+bwd", f"b{b} t{t} d{d} n{n}", "float32", both, b * t)


def lengths() -> Iterator[Case]:
    """Time against length: what `benchmarks.plot` draws."""
    for t in LENGTHS:

        def make(with_peers: bool, t: int = t) -> dict[str, Work]:
            x = scan_inputs(1, t, 256, 16)
            work: dict[str, Work] = {OURS: without_grad(lambda: ops.selective_scan(**x))}
            if with_peers and t <= LOOP_LIMIT:
                work["torch loop"] = without_grad(lambda: peers.torch_loop(**x))
            return work

        yield Case("selective_scan length", f"b1 t{t} d256 n16", "float32", make, t)


def blocks() -> Iterator[Case]:
    """A block of each generation with its projections. Peers are timed in float32, where they are fastest."""
    d, t = 768, 2048
    generations: tuple[tuple[str, Any, Callable[[int], dict[str, nn.Module]]], ...] = (
        ("Mamba", Mamba, peers.blocks), ("Mamba2", Mamba2, peers.blocks_of_mamba2),
        ("Mamba3", Mamba3, peers.blocks_of_mamba3),
        ("Mamba3 of 4 ranks", functools.partial(Mamba3, is_mimo=True), lambda d: {}),
    )  # fmt: skip
    #: Minutes, and gigabytes: transformers' backward pass of Mamba-1, and all states of a loop.
    too_slow = (("Mamba", "transformers"), ("Mamba3", "torch loop"))

    def run(layer: nn.Module, x: Tensor, backward: bool) -> Work:
        if not backward:
            return without_grad(lambda: layer(x))
        x = x.clone().requires_grad_()
        return lambda: torch.autograd.grad(layer(x).sum(), [x, *(p for p in layer.parameters() if p.requires_grad)])

    for label, ours, theirs in generations:
        for dtype, backward in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):

            def make(
                with_peers: bool, label: str = label, dtype: torch.dtype = dtype, backward: bool = backward,
                ours: Any = ours, theirs: Any = theirs,
            ) -> dict[str, Work]:  # fmt: skip
                torch.manual_seed(0)
                x = torch.randn(1, t, d)
                work = {OURS: run(ours(d).to(dtype), x.to(dtype), backward)}
                for name, layer in theirs(d).items() if with_peers else ():
                    if not (backward and (label, name) in too_slow):
                        work[name if dtype == torch.float32 else f"{name}, float32"] = run(layer, x, backward)
                return work

            op = f"{label} block fwd+bwd" if backward else f"{label} block fwd"
            yield Case(op, f"b1 t{t} d{d}", str(dtype).removeprefix("torch."), make, t)


def long_context() -> Iterator[Case]:
    """Reading 1,024 more tokens after 1k and after 64k, in turns: neither time nor memory may grow."""
    chunk, memory = 1024, {}

    def make(_: bool) -> dict[str, Work]:
        torch.manual_seed(0)
        model = LanguageModel(ModelConfig(d_model=256, n_layer=4, vocab_size=256)).eval()
        ids = torch.randint(256, (1, chunk))
        work: dict[str, Work] = {}
        with torch.no_grad():
            state = model.init_state(1)
            for done in range(chunk, 65536 + 1, chunk):
                _, state = model.extend(ids, state, last_only=True)
                if done in (chunk, 65536):
                    memory[f"resident_mb_at_{done}"] = measure.resident_mb()
                    here = state  # extend never changes the state it is given
                    work[f"after {done}"] = without_grad(lambda here=here: model.extend(ids, here, last_only=True))
        return work

    yield Case("language model extend", f"b1 t{chunk} d256 layers4", "float32", make, chunk, lambda: dict(memory))


def limits() -> Iterator[Case]:
    """What the machine itself can do; other figures mean little without."""
    numbers = 2**27

    def read(_: bool) -> dict[str, Work]:
        x = torch.ones(numbers)
        return {"torch": x.sum}

    yield Case("limit: reading memory", "512 MiB", "float32", read, extra=lambda: {"bytes": 4 * numbers})
    for dtype in (torch.float32, torch.bfloat16):

        def product(_: bool, dtype: torch.dtype = dtype) -> dict[str, Work]:
            a = torch.randn(2048, 2048).to(dtype)
            return {"torch": lambda: a @ a}

        name = str(dtype).removeprefix("torch.")
        yield Case("limit: matrix product", "2048³", name, product, extra=lambda: {"operations": 2 * 2048**3})


def imports() -> Iterator[Case]:
    """Fresh processes, in turns."""

    def process(code: str) -> Work:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    def make(_: bool) -> dict[str, Work]:
        used = "import stateline; stateline.LanguageModel, stateline.load, stateline.generate"
        return {
            "import torch": process("import torch"),
            "import stateline": process("import stateline"),
            "import stateline, names used": process(used),
        }

    yield Case("process", "start to exit", "", make)
