"""Structural models as they are used: clocks of series that are updated, what errors advise, names, short reprs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

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


class Frame:
    """A table as pandas keeps it, with names of its columns."""

    def __init__(self, table: Any, columns: list[Any]) -> None:
        self.table, self.columns = table, columns

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.table


def test_weights_are_called_after_the_columns(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(33, 2))
    y = [(X[:30] @ [2.0, -1.0] + 0.1 * rng.normal(size=30)).tolist()]
    model = StructuralModel(trend="none", transform="none", progress=False).fit(y, Frame(X[:30], ["price", "rain"]))
    model.save(tmp_path / "model.safetensors")
    model = StructuralModel.load(tmp_path / "model.safetensors")
    found = model.coefficients()
    assert found.names == ["price", "rain"]
    np.testing.assert_allclose(found.mean, [[2.0, -1.0]], atol=0.2)
    np.testing.assert_array_equal(
        model.forecast(3, Frame(X[30:], ["price", "rain"])).mean, model.forecast(3, X[30:]).mean
    )
    for wrong in (
        lambda: model.clone().fit(y * 2, [Frame(X[:30], ["price", "rain"]), Frame(X[:30], ["rain", "price"])]),
        lambda: model.forecast(3, Frame(X[30:, ::-1], ["rain", "price"])),
        lambda: model.update([[1.0]], [Frame(X[30:31], ["rain", "price"])]),
    ):
        with pytest.raises(ValueError, match=r"X has the columns \['rain', 'price'\], expected \['price', 'rain'\]"):
            wrong()
    numbered = StructuralModel(trend="none", transform="none", progress=False).fit(y, Frame(X[:30], [0, 1]))
    assert numbered.coefficients().names == ["weight_0", "weight_1"]
    numbered.forecast(3, Frame(X[30:], ["price", "rain"]))


def test_reprs_are_short() -> None:
    model = StructuralModel(trend="none", transform="none", progress=False).fit([list(range(9)), list(range(7))])
    assert repr(model.forecast(4)) == "StructuralForecast(2 series, 4 steps)"
    assert repr(model.diagnose(lags=3)) == "Diagnosis(2 series, 9 steps, 3 lags)"


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
