"""trapezoid_ssd: the grid of sizes, layouts and arguments, and what goes beyond it."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from oracles import layout, pairwise
from test_ops import BACKENDS, BOUND, DTYPES, FLAG, LAYOUTS, Case, check, close, leaf, name_of, same
from torch import Tensor

from stateline import backends, ops

OPS = torch.ops.stateline
FORMS = [*BACKENDS, "chunked"]
TOKENS = ("x", "dt", "A", "blend", "B", "C", "rates")
STATE = ("angle", "ssm", "k", "v")
PARAMETERS = ("B_bias", "C_bias", "mix", "D")
GRID = {
    "backend": FORMS, "dtype": DTYPES, "layout": LAYOUTS, "t": [0, 1, 2, 7, 31, 32, 33, 63, 64, 65, 130], "h": [1, 2, 5],
    "p": [1, 3, 16, 40], "n": [2, 3, 16, 36], "g": [1, 2, 3], "r": [None, 1, 2, 4, 5], "s": [0, 1, "half", "all"],
    "interleaved": FLAG, "reverse": FLAG, "bias": FLAG, "mix": FLAG, "D": FLAG, "initial": FLAG, "strided": FLAG,
}  # fmt: skip
#: A call as a Mamba-3 layer makes it; tests change what they are about.
PLAIN: dict[str, Any] = {
    "backend": None, "dtype": torch.float32, "layout": "whole", "t": 12, "h": 4, "p": 6, "n": 8, "g": 2, "r": None,
    "s": "half", "interleaved": True, "reverse": False, "bias": True, "mix": False, "D": True, "initial": True,
}  # fmt: skip


def case(s: dict[str, Any]) -> Case:
    place, h, p, n, r, dtype = layout(s["layout"], s["t"]), s["h"], s["p"], s["n"], s["r"] or 1, s["dtype"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    b, t, g, count = place.b, place.t, min(s["g"], h), len(place.sequences)
    pairs = {"half": n // 4, "all": n // 2}.get(s["s"], s["s"])
    x = {"x": leaf((b, t, h, p), dtype), "dt": leaf((b, t, h), wide).abs(), "A": -2 * leaf((b, t, h), wide).abs()}
    x["blend"] = leaf((b, t, h), wide).sigmoid()
    x |= {name: leaf((b, t, *([] if s["r"] is None else [r]), g, n), dtype) for name in "BC"}
    if pairs:
        x["rates"] = leaf((b, t, pairs), wide)
    if s["bias"]:
        x |= {name: leaf((h, r, n), wide) for name in ("B_bias", "C_bias")}
    if s["mix"]:
        x["mix"] = leaf((h, r, p), wide)
    if s["D"]:
        x["D"] = leaf((h,), wide)
    shapes = ((count, h, pairs), (count, h, p, n), (count, h, r, n), (count, h, p))
    if s["initial"]:
        x |= {name: leaf(shape, wide) for name, shape in zip(STATE, shapes, strict=True)}
        x["angle"] = x["angle"] / 8

    def flat(state: tuple[Tensor, ...]) -> Tensor:
        """A state as one tensor, angles as points of the circle."""
        circle = torch.stack([(2 * torch.pi * state[0]).cos(), (2 * torch.pi * state[0]).sin()])
        return torch.cat([v.flatten(1) for v in (*circle, *state[1:])], 1)

    def op(**x: Tensor) -> tuple[Tensor, Tensor]:
        given = tuple(x.pop(name) for name in STATE) if s["initial"] else None
        how: dict[str, Any] = {"reverse": s["reverse"], "backend": s["backend"], **place.kwargs}
        y, state = ops.trapezoid_ssd(**x, interleaved=s["interleaved"], initial_state=given, **how)
        assert (state[0].abs() <= 0.5).all()
        return y, flat(state)

    def oracle(**x: Tensor) -> tuple[Tensor, Tensor]:
        group = torch.arange(h) * g // h
        ranked = {name: x[name] if s["r"] else x[name][:, :, None] for name in "BC"}
        B, C = (v[:, :, :, group].transpose(2, 3) + x.get(f"{name}_bias", 0) for name, v in ranked.items())
        turns = x["dt"][..., None] * x["rates"][:, :, None] if pairs else x["dt"].new_zeros(b, t, h, 0)
        mix, D = x.get("mix", torch.ones(h, r, p, dtype=torch.float64)), x.get("D", torch.zeros(h, dtype=torch.float64))
        ys, ends = 0 * x["x"][:, :, :, None].expand(b, t, h, r, p), []
        for i, (row, start, stop) in enumerate(place.sequences):
            tokens = [v[row, start:stop] for v in (x["x"], x["dt"], x["A"], x["blend"], B, C, turns)]
            tokens = [v.flip(0) for v in tokens] if s["reverse"] else tokens
            state = [x[k][i] if s["initial"] else B.new_zeros(v[1:]) for k, v in zip(STATE, shapes, strict=True)]
            y, end = oracles.trapezoid_ssd(*tokens, mix, D, s["interleaved"], tuple(state))
            y = y.flip(0) if s["reverse"] else y
            ys = ys.index_put((torch.tensor(row), torch.arange(start, stop)), y)
            ends.append(tuple(v[None] for v in end))
        return (ys if s["r"] else ys.squeeze(3)), torch.cat([flat(end) for end in ends])

    return Case(x, place, op, oracle, TOKENS)


def plain(**options: Any) -> dict[str, Any]:
    """Arguments of a call, the state put together."""
    x: dict[str, Any] = dict(case(PLAIN | options).leaves)
    return x | {"initial_state": tuple(x.pop(name) for name in STATE)}


def cut(x: dict[str, Any], span: slice | int) -> dict[str, Any]:
    return {k: v[:, span] if k in TOKENS else v for k, v in x.items()}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("s", pairwise(GRID), ids=name_of)
def test_grid(s: dict[str, Any]) -> None:
    check(case(s), s["dtype"], s["strided"])


@pytest.mark.full
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seed", range(1, 12))
def test_grid_with_other_seeds(seed: int) -> None:
    for s in pairwise(GRID, seed):
        check(case(s), s["dtype"], s["strided"])
