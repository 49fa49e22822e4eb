"""Where settings come from: the command line, generated from the dataclasses of `config`, and files.

This module imports no torch: `stateline train --help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import re
import tomllib
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stateline.training.config import SETTINGS_FILE, TrainConfig, flat_names, layout, places
from stateline.training.settings import Info

#: Settings that exclude each other: given on the command line, one beats the other of a file.
_RIVALS = {"steps": "epochs", "epochs": "steps", "resume": "overwrite", "overwrite": "resume"}
#: What version 1.1 of YAML reads otherwise than 1.2.
_AMBIGUOUS = ("bool", "float", "int", "timestamp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser every setting, grouped, with help; what the user leaves out is left out of the namespace."""
    parser.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS,
        help="read settings from a .json, .toml or .yaml file, such as a run's run.json; flags win over it",
    )  # fmt: skip
    for group, settings in layout().items():
        section = parser.add_argument_group(_title(group))
        for name, info in settings.items():
            rules = info.field.metadata
            options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(info)}
            if info.type is bool:
                section.add_argument(_flag(name), action="store_true", **options)
                continue
            metavar = {int: "N", float: "X"}.get(info.type, name.upper())
            options |= {"type": info.type, "choices": rules.get("choices")}
            options["metavar"] = None if rules.get("choices") else rules.get("metavar", metavar)
            if rules.get("positional"):
                section.add_argument(name, nargs="?", **options)
            else:
                section.add_argument(_flag(name), **options)


def from_arguments(namespace: argparse.Namespace) -> TrainConfig:
    """The configuration a parsed command line asks for.

    Order of precedence: flags, --config, then under --resume the run's own settings, then defaults. Raises ValueError.
    """
    flags = {name: value for name, value in vars(namespace).items() if name in places()}
    if file := getattr(namespace, "config", None):
        flags = _over(flat_names(read_file(file)), flags)
    if not flags.get("resume"):
        return TrainConfig.of(**flags)
    if not flags.get("out") and not flags.get("path"):
        raise ValueError("train: --resume needs --out DIR, the folder of the run to continue.")
    home = TrainConfig.of(**{k: v for k, v in flags.items() if k in ("out", "path")}).directory
    settings = home / SETTINGS_FILE
    if not settings.is_file():
        raise ValueError(f"train: there is no run in {home} to resume (no {SETTINGS_FILE}). Start it without --resume.")
    return TrainConfig.of(**_over(flat_names(read_file(settings)), {"out": str(home)} | flags))


def read_file(path: str | Path) -> dict[str, Any]:
    """Settings from a JSON, TOML or YAML file, each key once. Raises ValueError naming the file and what is wrong."""
    path = Path(path)
    readers: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".yaml": _read_yaml, ".yml": _read_yaml}
    try:
        values = readers.get(path.suffix.lower(), _read_json)(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"train: {path} cannot be read as settings: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"train: {path} holds {type(values).__name__}, expected a table of settings.")
    return values


def _read_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A table of pairs. Raises ValueError if two have the same key."""
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)} is there twice")
    return table


def _read_yaml(text: str) -> Any:
    """YAML, safely, with the truth values of version 1.2, in which off is a word, and its numbers, such as 3e-4.

    What version 1.1 takes for another number than it looks like, 010 (8) or 1:30 (90), is text.
    """
    try:
        import yaml
    except ImportError as error:
        raise ValueError("it needs pyyaml, which is not installed: pip install 'stateline[train]'") from error

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {
            first: [(tag, rule) for tag, rule in rules if tag.rpartition(":")[2] not in _AMBIGUOUS]
            for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            _once([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            return typing.cast(dict[Any, Any], super().construct_mapping(node, deep))

    number = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$|[-+]?\.(inf|nan)$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    whole = re.compile("[-+]?(0|[1-9][0-9_]*)$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", whole, list("-+0123456789"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|false|True|False)$"), list("tfTF"))
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of two sources, of which `upper` wins, also over what goes by another name and excludes it."""
    beaten = {_RIVALS.get(name) for name, value in upper.items() if value}
    return {name: value for name, value in lower.items() if name not in beaten} | dict(upper)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _title(group: str) -> str:
    cls = type(getattr(TrainConfig(), group)) if group else TrainConfig
    return (cls.__doc__ or "").splitlines()[0]


def _help(info: Info) -> str:
    rules, default = info.field.metadata, info.field.default
    shown = "" if default is None or info.type is bool or rules.get("positional") else f" (default: {default})"
    return (rules["help"] + shown).replace("%", "%%")
