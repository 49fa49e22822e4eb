"""Every mixer refuses the state of another one, by name, before it computes or writes anything."""

from __future__ import annotations

import pytest
import torch

from stateline import nn

LAYERS = {
    kind.__name__: (lambda kind=kind: kind(64))
    for kind in (nn.Mamba, nn.Mamba2, nn.Mamba3, nn.S4, nn.S4D, nn.S5, nn.GatedSSM)
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_state_of_another_layer_is_refused(name: str) -> None:
    layer = LAYERS[name]()
    other = LAYERS["S5" if name == "Mamba" else "Mamba"]().init_state(2)
    own = type(layer.init_state(1)).__name__
    message = rf"^{name}: initial_state is a {type(other).__name__}, expected {own}\. layer\.init_state\(b\) makes one"
    x = torch.zeros(2, 3, 64)
    with pytest.raises(TypeError, match=message):
        layer.extend(x, other)
    with pytest.raises(TypeError, match=message):
        layer.step_(x[:, 0], other)
    with pytest.raises(TypeError, match="initial_state is a Tensor, expected"):
        layer.extend(x, torch.zeros(2, 64))
