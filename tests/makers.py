"""Small models, and small helpers for tests of checkpoints and archives."""

from __future__ import annotations

import io
import json
import tarfile
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


def debian_package(files: dict[str, bytes]) -> bytes:
    """A .deb that would install files, by path: an `ar` archive, whose member of odd length comes before the files."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:xz") as tar:
        for path, data in files.items():
            member = tarfile.TarInfo(f"./{path}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": inner.getvalue()}
    package = b"!<arch>\n"
    for name, data in members.items():
        package += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    return package
