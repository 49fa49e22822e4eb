"""What counts as a number, and how it is written to files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stateline import checks
from stateline.classical import StructuralModel, local_level, simulate
from stateline.generation.sampling import SamplingConfig
from stateline.models import ModelConfig


def test_numbers_of_numpy_are_numbers() -> None:
    some = local_level(np.float32(1.0), noise=np.int64(2))
    assert simulate(some, np.int64(4))[1].shape == (4, 1)
    assert simulate(some, 4, batch=np.int64(3))[1].shape == (3, 4, 1)
    for batch in (-2, (2, -1)):
        with pytest.raises(ValueError, match=r"^simulate: batch is -\d, expected a whole number at least 0"):
            simulate(some, 4, batch=batch)
    for value in (np.float64(2.0), 2.0, True, np.bool_(True)):
        with pytest.raises(TypeError, match=r"steps is .*expected a whole number"):
            simulate(some, value)  # type: ignore[arg-type]  # what is refused
    with pytest.raises(TypeError, match="expected a number"):
        local_level(np.bool_(True))  # type: ignore[arg-type]  # likewise


def test_numbers_of_numpy_are_written_as_numbers(tmp_path: Path) -> None:
    config = ModelConfig(d_model=np.int64(16), n_layer=np.int32(1), vocab_size=8, ssm_cfg={"d_state": np.int64(4)})  # type: ignore[arg-type]  # NumPy's
    assert json.loads(json.dumps(config.to_dict()))["ssm_cfg"] == {"d_state": 4}
    SamplingConfig(top_k=np.int64(3))  # type: ignore[arg-type]  # likewise
    model = StructuralModel(trend="none", transform="none", ar=np.int64(1), progress=False).fit([[1.0, 3, 2, 4, 3, 5]])
    model.save(tmp_path / "model.safetensors")
    assert StructuralModel.load(tmp_path / "model.safetensors").ar == 1


def test_a_probability_lies_between_0_and_1() -> None:
    for value in (0, 0.0, 1, 1.0, -0.1, np.float64(1.0)):
        with pytest.raises(
            ValueError, match=r"^op: level is .*, expected a probability between 0 and 1, such as 0.95.$"
        ):
            checks.probability("op", "level", value)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"^op: level is .*, expected a number that is finite"):
            checks.probability("op", "level", value)
    for wrong in (True, "0.5", None):
        with pytest.raises(TypeError, match=r"^op: level is .*, expected a number\.$"):
            checks.probability("op", "level", wrong)  # type: ignore[arg-type]  # what is refused
    with pytest.raises(ValueError, match=r"In per cent it would be 90 %: give 0\.9\.$"):
        checks.probability("op", "level", 90)
    with pytest.raises(ValueError, match=r"such as 0\.95\.$"):
        checks.probability("op", "level", 100)  # all is no interval
    checks.probability("op", "level", np.float32(0.5))


def test_numbers_of_numpy_within_anything_become_plain() -> None:
    given = {np.int64(1): (np.float64(0.5), [np.bool_(True), {"a": np.str_("b")}]), "x": None}
    made = checks.plain(given)
    assert made == {1: (0.5, [True, {"a": "b"}]), "x": None}
    assert [type(v) for v in (*made, made[1][0], made[1][1][0], made[1][1][1]["a"])] == [int, str, float, bool, str]
