"""GatedSSM on a CPU beside the same recurrence as a plain PyTorch loop and torch.nn.GRU, all of one width.

b batch, t time step, n width of input, state and output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from benchmarks.cases import OURS, Case
from torch import Tensor, nn

from stateline.nn import GatedSSM
from stateline.ops.gated_scan.reference import activate, apply

B, T = 8, 2048
KINDS = (("diagonal", "identity"), ("diagonal", "tanh"), ("dense", "tanh"))


def gated() -> Iterator[Case]:
    """Layers, forward alone and with all gradients."""
    for n in (64, 256):
        for transition, activation in KINDS:
            for what in ("forward", "forward + backward"):
                make = functools.partial(_candidates, n, transition, activation, what != "forward")
                name = f"GatedSSM, {transition} A, {activation}, {what}"
                yield Case(name, f"b{B} t{T} n{n}", "float32", make, tokens=B * T)


def _loop(layer: GatedSSM, x: Tensor) -> Tensor:
    """The layer's equation, a step at a time, by PyTorch's own operations."""
    assert layer.gate_proj is not None
    v, g, A = layer.in_proj(x), torch.sigmoid(layer.gate_proj(x)), layer.transition()
    h, seen = x.new_zeros(x.shape[0], layer.d_state), []
    for i in range(x.shape[1]):
        seen.append(h)
        h = activate(apply(A, h) + v[:, i], layer.activation) * g[:, i]
    return layer.out_proj(torch.stack(seen, 1)) + layer.skip_proj(x)


def _candidates(
    n: int, transition: str, activation: str, backward: bool, peers: bool
) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    layer = GatedSSM(n, activation=activation, transition=transition)
    x = torch.randn(B, T, n, requires_grad=backward)
    work = {OURS: _pass(layer, layer, x, backward)}
    if peers:
        gru = nn.GRU(n, n, batch_first=True)
        work["PyTorch loop"] = _pass(layer, functools.partial(_loop, layer), x, backward)
        work["torch.nn.GRU"] = _pass(gru, lambda x: gru(x)[0], x, backward)
    return work


def _pass(module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, backward: bool) -> Callable[[], object]:
    leaves = [x, *module.parameters()]
    dy = torch.randn(x.shape)

    def forward() -> object:
        with torch.no_grad():
            return run(x)

    return (lambda: torch.autograd.grad(run(x), leaves, dy)) if backward else forward
