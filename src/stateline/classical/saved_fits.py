"""A fitted StructuralModel as one safetensors file, and a fit that is under way."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stateline.checks import fail, plain
from stateline.classical.assembly import Structure
from stateline.classical.batch_fit import StructureFit
from stateline.classical.panel import Panel
from stateline.ops.kalman import KalmanState
from stateline.state import foreign, read, write

FORMAT = "stateline-structural-1"
PARTS = (
    "rows", "theta", "centre", "scale", "unit", "loglik", "evidence", "aicc", "converged", "evaluations",
)  # fmt: skip
TABLE = ("y", "length", "first")


def save(model: Any, path: str | Path) -> None:
    """Write a fitted model; see `StructuralModel.save`."""
    tensors: dict[str, Tensor] = {"weights": model.weights_, "steps": torch.from_numpy(model.steps_)}
    tensors |= {f"panel.{name}": getattr(model.panel_, name) for name in TABLE}
    if model.panel_.X is not None:
        tensors["panel.X"] = model.panel_.X
    tensors |= _tensors(model.fits_)
    about = {
        "format": FORMAT,
        "names": json.dumps(model.names_),
        "params": json.dumps(plain(model.get_params())),
        "structures": json.dumps(plain([asdict(one.structure) for one in model.fits_])),
    }
    write("StructuralModel.save", path, tensors, about)


def load(kind: type[Any], path: str | Path) -> Any:
    """The model in a file; see `StructuralModel.load`."""
    op = "StructuralModel.load"
    tensors, about = ({}, {}) if foreign(path) else read(op, path)
    if about.get("format") != FORMAT:
        raise fail(op, f"{path} holds no structural model.", "StructuralModel.save writes one.")
    try:
        model = kind(**{name: _tuple(value) for name, value in json.loads(about["params"]).items()})
        structures = [Structure(**{**s, "seasonal": tuple(s["seasonal"])}) for s in json.loads(about["structures"])]
        model.weights_ = tensors["weights"]
        model.panel_ = Panel(**{name: tensors[f"panel.{name}"] for name in TABLE}, X=tensors.get("panel.X"))
        model.steps_ = tensors["steps"].numpy()
        model.names_ = json.loads(about["names"])
        model.fits_ = _fits(tensors, structures)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise fail(op, f"{path} is damaged: {error!r}.", "Fit and save again.") from error
    return model


class Checkpoint:
    """The structures of a fit that are finished, in a file; nothing without a `path`.

    Raises:
        ValueError: if the file belongs to other series, structures or settings, or is none.
    """

    def __init__(self, path: str | Path | None, panel: Panel, structures: list[Structure], settings: Any) -> None:
        self.path = path
        self.fits: list[StructureFit] = []
        if path is None:
            return
        digest = hashlib.sha256(repr((structures, settings)).encode())
        for x in (panel.y, panel.length, panel.first, panel.X):
            digest.update(b"" if x is None else x.contiguous().numpy().tobytes())
        self.key = digest.hexdigest()
        if not Path(path).exists():
            return
        tensors, about = read("fit", path)
        if about.get("fit") != self.key:
            problem = f"the checkpoint {path} is of other series, structures or settings"
            raise fail("fit", f"{problem}.", "Name another file, or delete it.")
        self.fits = _fits(tensors, structures[: int(about["finished"])])

    def add(self, fit: StructureFit) -> None:
        """One more structure is finished."""
        self.fits.append(fit)
        if self.path is not None:
            write("fit", self.path, _tensors(self.fits), {"fit": self.key, "finished": str(len(self.fits))})


def _tensors(fits: list[StructureFit]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for j, one in enumerate(fits):
        found |= {f"{j}.{name}": getattr(one, name) for name in PARTS}
        found |= {f"{j}.mean": one.state.mean, f"{j}.cov": one.state.cov}
    return found


def _fits(tensors: dict[str, Tensor], structures: list[Structure]) -> list[StructureFit]:
    found = []
    for j, structure in enumerate(structures):
        state = KalmanState(tensors[f"{j}.mean"], tensors[f"{j}.cov"])
        parts: dict[str, Any] = {name: tensors[f"{j}.{name}"] for name in PARTS}
        found.append(StructureFit(structure=structure, state=state, **parts))
    return found


def _tuple(value: Any) -> Any:
    return tuple(_tuple(v) for v in value) if isinstance(value, list) else value
