"""Structural models as they are used: clocks of series that are updated, what errors advise, names, short reprs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from stateline.classical import StructuralModel


def test_nan_moves_a_series_and_nothing_leaves_it(tmp_path: Path) -> None:
    y = [list(range(1, 9)), [math.nan, *range(1, 8)]]
    model = StructuralModel(trend="fixed", transform="none", progress=False).fit(y)
    assert model.steps_.tolist() == [8, 7]  # from the first value on
    before = model.forecast(3).mean
    model.update([[], [math.nan]])
    assert model.steps_.tolist() == [8, 8]
    np.testing.assert_allclose(model.forecast(2).mean, [before[0, :2], before[1, 1:]], rtol=1e-9)
    model.save(tmp_path / "model.safetensors")
    again = StructuralModel.load(tmp_path / "model.safetensors").update([[9.0, 10.0], []])
    assert again.steps_.tolist() == [10, 8]
    assert model.steps_.tolist() == [8, 8]
