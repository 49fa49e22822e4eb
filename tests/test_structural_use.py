"""Structural models as they are used: clocks of series that are updated, what errors advise, names, short reprs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

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


def test_errors_say_what_to_give() -> None:
    rising = [float(i) for i in range(1, 11)]
    model = StructuralModel(trend="none", transform="log", progress=False)
    with pytest.raises(ValueError, match=r"series 1 has the value -2, and logarithms take values above 0.*\"none\""):
        model.fit([rising, [*rising, -2.0]])
    with pytest.raises(ValueError, match=r"series 1 has 2 values, and no .*\. The smallest takes 3 values\.$"):
        model.fit([rising, [0.0, 1.0]])
    with pytest.raises(ValueError, match=r"X has shape \(10,\), expected .*\. One regressor is X\[:, None\]\."):
        model.fit([rising], np.arange(10.0))
    with pytest.raises(ValueError, match=r"harmonics is 7, expected a whole number at least 1 and at most 6"):
        StructuralModel(seasonal=(0, 12), harmonics=7).structures()
    assert len(StructuralModel(seasonal=[[7, 365.25]], harmonics=5).structures()) == 6  # as many as each period has
