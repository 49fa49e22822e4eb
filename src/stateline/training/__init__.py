"""Training language models: data, the loop, and checkpoints that survive anything.

>>> from stateline.training import TrainConfig, train
>>> config = TrainConfig.of(path="book.txt", out="runs/book", size="tiny", steps=200)
>>> result = train(config)  # doctest: +SKIP
>>> result.best_bpb, result.directory  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stateline.training.arguments import add_arguments as add_arguments
    from stateline.training.arguments import from_arguments as from_arguments
    from stateline.training.config import TrainConfig as TrainConfig
    from stateline.training.data import ByteText as ByteText
    from stateline.training.data import load_data as load_data
    from stateline.training.evaluate import bits_per_byte as bits_per_byte
    from stateline.training.loop import TrainingError as TrainingError
    from stateline.training.loop import TrainResult as TrainResult
    from stateline.training.loop import train as train
    from stateline.training.signals import Interrupted as Interrupted

_NAMES = {
    "ByteText": "data",
    "Interrupted": "signals",
    "TrainConfig": "config",
    "TrainResult": "loop",
    "TrainingError": "loop",
    "add_arguments": "arguments",
    "bits_per_byte": "evaluate",
    "from_arguments": "arguments",
    "load_data": "data",
    "train": "loop",
}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    """Import modules when first named: the command line builds its help from `config` alone, without torch."""
    if name in _NAMES:
        return getattr(importlib.import_module(f"stateline.training.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'stateline.training' has no attribute {name!r}; it has {', '.join(__all__)}")
