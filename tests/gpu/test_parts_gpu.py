"""Gradients of a projection's parts that kernels write in place are those that they write elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from where import DEVICE

from stateline import nn
from stateline.ops import cuda, parts

#: Layers, and how many of their parts' gradients are copied.
LAYERS: dict[str, tuple[Callable[[], torch.nn.Module], int]] = {
    "Mamba2": (lambda: nn.Mamba2(16, d_state=16, headdim=16, expand=3), 4),  # z or u, dt; B, C
    "Mamba3": (lambda: nn.Mamba3(16, d_state=8, headdim=16, expand=3), 3),  # B, C and what is narrow
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("lengths", [None, [7, 4]], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_layer(name: str, lengths: list[int] | None, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    make, copies = LAYERS[name]
    layer, copied = make().to(DEVICE), []
    x, dy = torch.randn(2, 2, 7, 16, device=DEVICE).unbind()
    paste = cuda.paste
    # not between guard bytes: rows of a projection begin where its memory does
    monkeypatch.setattr(cuda, "empty", lambda shape, dtype, like: like.new_empty(shape, dtype=dtype))
    monkeypatch.setattr(cuda, "paste", lambda place, v: (copied.append(v.shape), paste(place, v)))

    def gradients() -> list[Tensor]:
        copied.clear()
        given = [x.clone().requires_grad_(), *layer.parameters()]
        how = {"lengths": None if lengths is None else torch.tensor(lengths, device=DEVICE)}
        return list(torch.autograd.grad(layer(given[0], reverse=reverse, **how), given, dy))

    together = gradients()
    assert len(copied) == copies, copied
    monkeypatch.setattr(parts, "gradients", lambda of, segments: [cuda.tokens(part, segments) for part in of])
    apart = gradients()
    assert len(copied) > copies
    assert all(map(torch.equal, together, apart))
