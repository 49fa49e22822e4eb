"""Whole models: stacks of layers round a residual stream, and what goes in and out of them."""

from stateline.models.backbone import MIXERS, Backbone, ModelConfig, ModelState
from stateline.models.language import LanguageModel

__all__ = ["MIXERS", "Backbone", "LanguageModel", "ModelConfig", "ModelState"]
