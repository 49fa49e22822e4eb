"""Layers that read from several sides: what each direction sees, padded, packed, over maps of odd sizes."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stateline import nn as sl
from stateline.nn.precision import full_precision_names

D = 6


def mamba(seed: int = 0) -> sl.Mamba:
    torch.manual_seed(seed)
    layer = sl.Mamba(D, d_state=3, bias=True).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return layer


def signal(*sizes: int) -> Tensor:
    return torch.randn(*sizes, D, dtype=torch.float64)


def differ(*layers: nn.Module) -> None:
    """Give copies weights of their own."""
    with torch.no_grad():
        for i, layer in enumerate(layers):
            for parameter in layer.parameters():
                parameter *= 1 + 0.1 * i


def backwards(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer makes of the sequence turned round by hand."""
    return layer(x.flip(1)).flip(1)


@pytest.mark.parametrize(
    "layer",
    [
        mamba(),
        sl.Mamba2(D, 3, headdim=2, ngroups=2, d_ssm=8, D_has_hdim=True, dt_limit=(0.01, 0.05)).double(),
        sl.Mamba3(D, 4, headdim=2, is_mimo=True, mimo_rank=2).double(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_mamba_runs_backwards(layer: nn.Module) -> None:
    x = signal(2, 9)
    torch.testing.assert_close(layer(x, reverse=True), backwards(layer, x))
    assert not torch.allclose(layer(x, reverse=True), layer(x))
    torch.testing.assert_close(layer(x, reverse=False), layer(x))
    padded, packed = (
        layer(x, lengths=[4, 9], reverse=True),
        layer(x[:1], cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32), reverse=True),
    )
    for y in (padded, packed):
        torch.testing.assert_close(y[:1, :4], backwards(layer, x[:1, :4]))
    torch.testing.assert_close(packed[:, 4:], backwards(layer, x[:1, 4:]))
    want = torch.autograd.grad(backwards(layer, x).square().sum(), list(layer.parameters()))
    got = torch.autograd.grad(layer(x, reverse=True).square().sum(), list(layer.parameters()))
    torch.testing.assert_close(got, want)
    assert sl.Bidirectional(layer)(x).shape == x.shape
    assert sl.Scan2d(layer)(x[:, None]).shape == (2, 1, 9, D)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("merge", ["sum", "concat"])
def test_both_directions_are_merged(shared: bool, merge: str) -> None:
    layer, x = sl.Bidirectional(mamba(), shared=shared, merge=merge), signal(2, 7)
    back = layer.ahead
    if not shared:
        assert layer.back is not None
        differ(layer.ahead, layer.back)
        back = layer.back
    one, other = layer.ahead(x), backwards(back, x)
    want = one + other if merge == "sum" else torch.cat([one, other], -1) @ layer.project.weight.T  # type: ignore[union-attr]  # "cat"
    torch.testing.assert_close(layer(x), want)
    alone = sum(p.numel() for p in mamba().parameters())
    added = 2 * D * D if merge == "concat" else 0
    assert sum(p.numel() for p in layer.parameters()) == alone * (1 if shared else 2) + added


@pytest.mark.parametrize("merge", ["sum", "concat"])
def test_padded_and_packed_sequences_are_turned_within_themselves(merge: str) -> None:
    layer, x, lengths = sl.Bidirectional(mamba(), merge=merge), signal(4, 7), [4, 0, 7, 1]
    differ(layer.ahead, layer.back)  # type: ignore[arg-type]  # modules
    for i, n in enumerate(lengths):
        x[i, n:] = torch.nan
    y = layer(x, lengths=lengths)
    for i, n in enumerate(lengths):
        torch.testing.assert_close(y[i : i + 1, :n], layer(x[i : i + 1, :n]))
        assert (y[i, n:] == 0).all()
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    bounds, packed = [0, 3, 3, 4, 9], signal(1, 9)
    y = layer(packed, cu_seqlens=torch.tensor(bounds))
    for a, b in pairwise(bounds):
        torch.testing.assert_close(y[:, a:b], layer(packed[:, a:b]))


def test_every_token_sees_all_others() -> None:
    layer, x = sl.Bidirectional(mamba()), signal(1, 5).requires_grad_()
    for i in range(5):
        (seen,) = torch.autograd.grad(layer(x)[0, i].sum(), x)
        assert (seen[0] != 0).any(-1).all()


def test_what_looks_ahead_is_not_continued() -> None:
    layer = sl.Bidirectional(mamba())
    for call in (
        lambda: layer.init_state(2),
        lambda: layer.extend(signal(1, 3), None),
        lambda: layer.step_(signal(1), None),
        lambda: sl.Block(layer, sl.RMSNorm(D)).init_state(1),
    ):
        with pytest.raises(TypeError, match=r"^Bidirectional: it looks at tokens to come.*whole sequences: layer\(x\)"):
            call()


@pytest.mark.parametrize("make", [sl.Bidirectional, sl.Scan2d])
def test_layers_that_cannot_run_backwards_are_named(make: Any) -> None:
    for layer in (sl.Attention(D, 2), nn.Linear(D, D), sl.Bidirectional(mamba())):
        with pytest.raises(TypeError, match=rf"layer is a {type(layer).__name__}, expected one that can run backwards"):
            make(layer)
    with pytest.raises(TypeError, match="shared is 1"):
        make(mamba(), shared=1)
    with pytest.raises(ValueError, match="merge is 'mean', expected one of 'sum', 'concat'"):
        sl.Bidirectional(mamba(), merge="mean")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [(3, 5), (1, 4), (4, 1), (1, 1), (2, 2)], ids=str)
def test_a_map_is_read_in_four_directions(shared: bool, size: tuple[int, int]) -> None:
    layer, x = sl.Scan2d(mamba(), shared=shared), signal(2, *size)
    columns = layer.rows if layer.columns is None else layer.columns
    if not shared:
        differ(layer.rows.ahead, layer.rows.back, columns.ahead, columns.back)  # type: ignore[arg-type]  # modules
    height, width = size
    want = torch.zeros_like(x)
    along_rows = [(i, j) for i in range(height) for j in range(width)]
    along_columns = [(i, j) for j in range(width) for i in range(height)]
    for pair, path in ((layer.rows, along_rows), (columns, along_columns)):
        for reader, places in ((pair.ahead, path), (pair.back or pair.ahead, path[::-1])):
            read = reader(torch.stack([x[:, i, j] for i, j in places], 1))
            for at, (i, j) in enumerate(places):
                want[:, i, j] += read[:, at]
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(layer(x.transpose(1, 2).contiguous().transpose(1, 2)), want)  # any strides
    ratio = sum(p.numel() for p in layer.parameters()) / sum(p.numel() for p in mamba().parameters())
    assert ratio == (1 if shared else 4)


@pytest.mark.parametrize("size", [(0, 3), (3, 0)], ids=str)
def test_empty_maps_stay_empty(size: tuple[int, int]) -> None:
    assert sl.Scan2d(mamba())(signal(2, *size)).shape == (2, *size, D)


def test_maps_of_another_shape_are_named() -> None:
    with pytest.raises(ValueError, match=r"^Scan2d: x has shape \(2, 3, 6\), expected \(b, height, width, d_model\)"):
        sl.Scan2d(mamba())(signal(2, 3))


@pytest.mark.parametrize("make", [sl.Bidirectional, sl.Scan2d])
@pytest.mark.parametrize("shared", [False, True])
def test_weights_travel_and_time_constants_stay_exact(make: Any, shared: bool) -> None:
    layer, x = make(mamba().float(), shared=shared), torch.randn(1, 3, D)
    differ(*layer.children())
    x = x if make is sl.Bidirectional else x[:, None]
    kept = io.BytesIO()
    torch.save(layer.state_dict(), kept)
    kept.seek(0)
    again = make(mamba(1).float(), shared=shared)
    again.load_state_dict(torch.load(kept))
    assert torch.equal(again(x), layer(x))
    rounded = layer.to(torch.bfloat16)
    assert {rounded.get_parameter(n).dtype for n in full_precision_names(rounded)} == {torch.float32}
    assert rounded(x.bfloat16()).dtype == torch.bfloat16
