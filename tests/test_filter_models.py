"""Models of `stateline filter` from YAML files: what is wrong with one is told by file and entry."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stateline.apps.filtering import SeriesFilter

MATRICES = {"A": [[1, 1], [0, 1]], "C": [[1, 0]], "Q": "learn", "R": "learn"}
MISSHAPEN: list[tuple[dict[str, Any], str]] = [
    ({}, "is empty, expected names with values. A model is"),
    (MATRICES | {"A": 1}, "A is 1, expected rows of numbers, equally many in each"),
    (MATRICES | {"A": [[1, 1], [0]]}, "A is [[1, 1], [0]], expected rows of numbers, equally many in each"),
    (MATRICES | {"C": [[1, 0, 0]]}, "C is 1 by 3, expected 1 by 2"),
    (MATRICES | {"Q": [[1]]}, "Q is 1 by 1, expected 2 by 2: as A"),
    (MATRICES | {"Q": [[1, 2], [0, 1]]}, "Q is [[1, 2], [0, 1]], expected a covariance: symmetric"),
    (MATRICES | {"P0": [[1, 0], [0, -1]]}, "P0 is [[1, 0], [0, -1]], expected a covariance"),
    (MATRICES | {"R": 0.5}, "R is 0.5, expected rows of numbers, equally many in each, as in [[1, 1], [0, 1]], or"),
    (MATRICES | {"m0": [1]}, "m0 is 1 long, expected 2 long: a number for each row of A"),
    (MATRICES | {"continuous": 1}, "continuous is 1, expected true or false"),
    ({"A": [[1]]}, "lacks C. It needs A, C, Q and R"),
    (MATRICES | {"noise": 1}, "has noise beside matrices. There the noise is R."),
    ({"components": [1]}, "components is [1], expected names with a kind each. As in components: {trend"),
    ({"components": {"a": {"kind": [1]}}}, "the kind of a is [1], expected one of local-level"),
    ({"components": {"a": {"kind": "local-level", "levle": 1}}}, "a has 'levle', expected kind, level"),
    ({"components": {"a": {"kind": "local-level", "level": -1}}}, "level of a is -1, expected a variance, at least 0"),
    ({"components": {"a": {"kind": "seasonal", "period": "week"}}}, "period of a is 'week', expected a number"),
    ({"components": {"a": {"kind": "seasonal", "period": 12, "harmonics": 7}}}, "harmonics of a is 7, expected"),
    ({"components": {"a": {"kind": "oscillator", "period": 2}}}, "period of a is 2, expected a number above 2"),
    ({"components": {"a": {"kind": "local-trend", "damping": "learn"}}}, "damping of a is 'learn', expected a number"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "message"), MISSHAPEN, ids=[message[:30] for _, message in MISSHAPEN])
def test_a_misshapen_model_is_told_by_file_and_entry(model: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Before any data is seen."""
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump(model) if model else "")
    with pytest.raises((ValueError, TypeError), match=re.escape(message)) as caught:
        SeriesFilter(str(path))
    assert str(caught.value).startswith(f"filter: {path}")


def test_numbers_of_yaml_may_lack_a_point(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("components: {l: {kind: local-level, level: 1e-3}}\nnoise: 2E+1\n")
    spec = SeriesFilter(str(tmp_path / "m.yaml")).spec
    assert (spec["components"]["l"]["level"], spec["noise"]) == (0.001, 20.0)


def test_arrays_are_matrices_and_what_is_no_model_is_told() -> None:
    one = torch.ones(1, 1)
    assert SeriesFilter({"A": one, "C": one.numpy(), "Q": [[1]], "R": "learn"}).spec["A"] == [[1.0]]
    with pytest.raises(TypeError, match="the model is a NoneType, expected a name"):
        SeriesFilter(None)  # type: ignore[arg-type]  # refused
