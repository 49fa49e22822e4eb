"""A fitted StructuralModel as one safetensors file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from stateline.checks import fail
from stateline.classical.likeliest import Fit
from stateline.classical.panel import Panel
from stateline.classical.structures import Structure
from stateline.ops.kalman import KalmanState
from stateline.state import read, write

FORMAT = "stateline-structural-1"
PARTS = (
    "rows", "theta", "centre", "scale", "unit", "loglik", "evidence", "aicc", "converged", "evaluations",
)  # fmt: skip
TABLE = ("y", "length", "first")


def save(model: Any, path: str | Path) -> None:
    """Write a fitted model; see `StructuralModel.save`."""
    tensors: dict[str, Tensor] = {"weights": model.weights_}
    tensors |= {f"panel.{name}": getattr(model.panel_, name) for name in TABLE}
    if model.panel_.X is not None:
        tensors["panel.X"] = model.panel_.X
    for j, one in enumerate(model.fits_):
        tensors |= {f"{j}.{name}": getattr(one, name) for name in PARTS}
        tensors |= {f"{j}.mean": one.state.mean, f"{j}.cov": one.state.cov}
    about = {
        "format": FORMAT,
        "params": json.dumps(model.get_params()),
        "structures": json.dumps([asdict(one.structure) for one in model.fits_]),
    }
    write("StructuralModel.save", path, tensors, about)


def load(kind: type[Any], path: str | Path) -> Any:
    """The model in a file; see `StructuralModel.load`."""
    op = "StructuralModel.load"
    tensors, about = read(op, path)
    if about.get("format") != FORMAT:
        raise fail(op, f"{path} holds no structural model.", "StructuralModel.save writes one.")
    try:
        model = kind(**{name: _tuple(value) for name, value in json.loads(about["params"]).items()})
        structures = [Structure(**{**s, "seasonal": tuple(s["seasonal"])}) for s in json.loads(about["structures"])]
        model.weights_ = tensors["weights"]
        model.panel_ = Panel(**{name: tensors[f"panel.{name}"] for name in TABLE}, X=tensors.get("panel.X"))
        model.fits_ = []
        for j, structure in enumerate(structures):
            state = KalmanState(tensors[f"{j}.mean"], tensors[f"{j}.cov"])
            parts: dict[str, Any] = {name: tensors[f"{j}.{name}"] for name in PARTS}
            model.fits_.append(Fit(structure=structure, state=state, **parts))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise fail(op, f"{path} is damaged: {error!r}.", "Fit and save again.") from error
    return model


def _tuple(value: Any) -> Any:
    return tuple(_tuple(v) for v in value) if isinstance(value, list) else value
