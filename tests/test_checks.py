"""What counts as a number, and how it is written to files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stateline.classical import StructuralModel, local_level, simulate
from stateline.generation.sampling import SamplingConfig
from stateline.models import ModelConfig


def test_numbers_of_numpy_are_numbers() -> None:
    some = local_level(np.float32(1.0), noise=np.int64(2))
    assert simulate(some, np.int64(4))[1].shape == (4, 1)
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
