"""A small corpus of documents, and runs on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import zstandard

from stateline.training import TrainConfig
from stateline.training.config import DataConfig
from stateline.training.prepare import Request
from stateline.training.vocabulary import Vocabulary

DOCUMENTS = [
    f"Day {i}.\n\n  It rained {i * i} times — naïve, isn't it?  \n\nThen {i % 7} suns rose." for i in range(60)
]
TINY: dict[str, Any] = {
    "d_model": 16, "n_layer": 1, "d_state": 4, "context": 24, "batch_size": 2, "steps": 12, "lr": 1e-2,
    "progress": "off", "device": "cpu", "eval_every": 5, "sample_every": 6, "sample_bytes": 8, "save_every": 4,
}  # fmt: skip


def tiny(path: Path, run: str = "run", **settings: Any) -> TrainConfig:
    return TrainConfig.of(**{**TINY, "path": path, "out": path.parent / run} | settings)


def json_lines(documents: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(documents)).encode()


def request(path: Path, own: Vocabulary | None = None, **settings: Any) -> Request:
    return Request(path, DataConfig(path=str(path), **settings), own)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def write_lines(folder: Path) -> Path:
    """DOCUMENTS as compressed JSON lines."""
    path = folder / "text.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(json_lines(DOCUMENTS)))
    return path
