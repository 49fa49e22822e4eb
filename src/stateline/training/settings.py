"""What a setting is: a dataclass field with its help text, its bounds, and the check that holds a value to them.

This module imports no torch: `stateline train --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: How the rules of a number are said.
_BOUNDS = {"low": "at least", "above": "above", "high": "at most", "below": "below"}


def setting(default: Any, help: str, **rules: Any) -> Any:
    """A dataclass field with its help text and rules.

    Rules: low, high, above, below (bounds of numbers), choices, metavar, positional, resume: "fixed" (a resumed
    run must have the same value), "free" (it may change) or "mode" (says how to start; never stored).
    """
    return field(default=default, metadata={"help": help, "resume": "fixed", **rules})


@dataclass(frozen=True)
class Info:
    """A setting's field with its type, None stripped."""

    field: dataclasses.Field[Any]
    type: type
    optional: bool


def settings_of(cls: type) -> dict[str, Info]:
    """A dataclass's settings by name; fields made otherwise are left out."""
    hints = typing.get_type_hints(cls)
    found = {}
    for info in dataclasses.fields(cls):
        if "help" in info.metadata:
            hint = hints[info.name]
            optional = isinstance(hint, types.UnionType)
            kinds = [t for t in typing.get_args(hint) if t is not type(None)] if optional else [hint]
            found[info.name] = Info(info, kinds[0], optional)
    return found


def checked(name: str, value: Any, info: Info) -> Any:
    """The value, as its field's type; raises TypeError or ValueError naming the setting, the rule and the value."""
    rules: Mapping[str, Any] = info.field.metadata
    kind: Any = info.type
    if value is None and info.optional:
        return None
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        expected = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}[kind]
        raise TypeError(f"train: {name} is {value!r}, expected {expected}.")
    if "choices" in rules and value not in rules["choices"]:
        raise ValueError(f"train: {name} is {value!r}, expected one of {', '.join(map(repr, rules['choices']))}.")
    if kind in (int, float):
        words = [f"{word} {rules[key]:g}" for key, word in _BOUNDS.items() if key in rules]
        inside = rules.get("low", -math.inf) <= value <= rules.get("high", math.inf)
        strictly = rules.get("above", -math.inf) < value < rules.get("below", math.inf)
        if not (math.isfinite(value) and inside and strictly):
            rule = " and ".join(words) or "that is finite"
            raise ValueError(f"train: {name} is {value!r}, expected a number {rule}.")
    return value
