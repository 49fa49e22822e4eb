"""Small models and small helpers for tests of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from stateline import LanguageModel, ModelConfig

FORMATS = ["stateline", "mamba_ssm", "huggingface"]


def small(**options: Any) -> LanguageModel:
    config = {"d_model": 20, "n_layer": 2, "vocab_size": 61, "ssm_cfg": {"d_state": 5}, **options}
    model = LanguageModel(ModelConfig(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no weight keeps a value that a loader could make up
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def ids() -> torch.Tensor:
    return torch.randint(61, (2, 9))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
