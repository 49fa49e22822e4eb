"""State space sequence models on PyTorch: one contract, any machine, constant memory.

>>> import stateline
>>> model = stateline.load("bundled")
>>> text = "".join(stateline.generate(model, "My fellow citizens", max_tokens=20))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stateline import backends as backends
    from stateline import generation as generation
    from stateline import models as models
    from stateline import nn as nn
    from stateline import ops as ops
    from stateline import state as state
    from stateline import theory as theory
    from stateline import training as training
    from stateline.apps.estimators import SequenceClassifier as SequenceClassifier
    from stateline.apps.estimators import SequenceRegressor as SequenceRegressor
    from stateline.generation import Engine as Engine
    from stateline.generation import generate as generate
    from stateline.generation.decode import prepare_for_decode as prepare_for_decode
    from stateline.interop import load as load
    from stateline.interop import save as save
    from stateline.models import LanguageModel as LanguageModel
    from stateline.models import ModelConfig as ModelConfig

__version__ = "0.1.0"

_NAMES = {
    "Engine": "generation",
    "LanguageModel": "models",
    "ModelConfig": "models",
    "generate": "generation",
    "load": "interop",
    "prepare_for_decode": "generation.decode",
    "save": "interop",
}
_MODULES = ("backends", "generation", "models", "nn", "ops", "state", "theory", "training")

#: These need an extra, so `from stateline import *` leaves them out.
_OF_EXTRAS = {"SequenceClassifier": "apps.estimators", "SequenceRegressor": "apps.estimators"}

__all__ = sorted([*_NAMES, *_MODULES])


def __getattr__(name: str) -> Any:
    """Import parts when first named, so that `import stateline` costs nothing by itself."""
    if home := _NAMES.get(name) or _OF_EXTRAS.get(name):
        return getattr(importlib.import_module(f"stateline.{home}"), name)
    if name in _MODULES:
        return importlib.import_module(f"stateline.{name}")
    raise AttributeError(f"module 'stateline' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, *_OF_EXTRAS, "__version__"]
