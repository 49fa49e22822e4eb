"""The models that series are filtered with, from names or YAML: what moves, how it is seen, which variances are free.

    local-level                 a level that wanders
    local-trend                 a level with a slope, both wander
    seasonal:24                 a pattern that repeats every 24 steps, on a local level; seasonal:168:10 takes 10 waves
    oscillator:50               a wave whose size and phase wander, on a local level
    constant-velocity           all columns are the axes of one moving thing
    constant-acceleration       likewise
    local-trend+seasonal:12     a sum
    model.yaml                  named components with values or "learn", or matrices; see docs/remove_noise.md

Components are differential equations x' = Ac x + w, so that steps may be uneven; intensities of w are variances a step.
Suffixes: U different gaps between rows, n state, m observation, N series filtered apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stateline import checks
from stateline.classical import discretize, parts

OP = "filter"
LEARN = "learn"
NOISE = "noise"
#: Waves of a pattern, if nothing is said.
HARMONICS = 6
#: A row so many steps after another is none of the same series, for matrices of one step.
MOST_STEPS = 10_000
MATRICES = ("A", "C", "Q", "R", "m0", "P0", "continuous")
F64 = torch.float64


Block = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Part:
    """One component: blocks of its state that move apart, and how it is seen (m, n).

    blocks: of each its drift (k, k), and an intensity (k, k) for each variance.
    levels: states that begin at the middle of the data, one an axis; the others begin about 0.
    """

    blocks: list[Block]
    seen: Tensor
    levels: tuple[int, ...] = ()


def _diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=F64))


def _level(columns: int) -> Part:
    return Part([(_diagonal(0.0), {"level": _diagonal(1.0)})], torch.ones(1, 1, dtype=F64), (0,))


def _trend(columns: int, damping: float = 1.0) -> Part:
    drift = parts.trend(torch.tensor(damping, dtype=F64), continuous=True)
    noises = {"level": _diagonal(1.0, 0.0), "slope": _diagonal(0.0, 1.0)}
    return Part([(drift, noises)], torch.tensor([[1.0, 0.0]], dtype=F64), (0,))


def _waves(waves: list[Tensor], name: str) -> Part:
    return Part([(wave, {name: _diagonal(1.0, 1.0)}) for wave in waves], parts.shown(waves))


def _seasonal(columns: int, period: float, harmonics: int | None = None) -> Part:
    count = min(int(period / 2), HARMONICS) if harmonics is None else harmonics
    return _waves(parts.season(period, count, continuous=True), "season")


def _oscillator(columns: int, period: float, damping: float = 1.0) -> Part:
    turn, kept = (torch.tensor(x, dtype=F64) for x in (2 * math.pi / period, damping))
    return _waves([parts.wave(turn, kept, continuous=True)], "wave")


def _moving(order: int, name: str) -> Callable[..., Part]:
    def part(columns: int) -> Part:
        chain = parts.chain(order)
        pushed = _diagonal(*[0.0] * (order - 1), 1.0)
        seen = torch.eye(order * columns, dtype=F64)[::order]
        return Part([(chain, {name: pushed})] * columns, seen, tuple(range(0, order * columns, order)))

    return part


#: What each component is made by, its arguments in order, those that are variances, and whether it takes all columns.
KINDS: dict[str, tuple[Callable[..., Part], tuple[str, ...], tuple[str, ...], bool]] = {
    "local-level": (_level, (), ("level",), False),
    "local-trend": (_trend, ("damping",), ("level", "slope"), False),
    "seasonal": (_seasonal, ("period", "harmonics"), ("season",), False),
    "oscillator": (_oscillator, ("period", "damping"), ("wave",), False),
    "constant-velocity": (_moving(2, "acceleration"), (), ("acceleration",), True),
    "constant-acceleration": (_moving(3, "jerk"), (), ("jerk",), True),
}
LEVELS = ("local-level", "local-trend", "constant-velocity", "constant-acceleration")


# ---- from names and YAML to a plain description ----------------------------------------------------------------------


def described(model: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A model as plain values that JSON can hold: {"components": {name: {"kind": …}}, "noise": …} or matrices.

    Args:
        model: a name, a sum of names, a YAML file's path, or what such a file holds.

    Raises:
        ValueError: naming what is wrong and what is known.
    """
    if isinstance(model, Mapping):
        return _checked({str(name): _plain(f"the model: {name}", value) for name, value in model.items()}, "the model")
    if not isinstance(model, str | Path):
        problem = f"the model is a {type(model).__name__}, expected a name, a .yaml file or a mapping"
        raise checks.fail(OP, f"{problem}.", error=TypeError)
    model = str(model)
    if Path(model).suffix.lower() in (".yaml", ".yml"):
        return _checked(_read_yaml(Path(model)), str(model))
    components: dict[str, Any] = {}
    for text in model.split("+"):
        kind, *values = text.strip().split(":")
        if kind not in KINDS:
            known = ", ".join(KINDS)
            raise checks.fail(OP, f"the model {kind!r} is unknown, expected one of {known}, or a .yaml file.")
        order = KINDS[kind][1]
        if len(values) > len(order):
            usage = ":".join((kind, *order))
            raise checks.fail(OP, f"the model {text.strip()!r} has {len(values)} values, expected {usage}.")
        name = kind if kind not in components else text.strip()
        if name in components:
            raise checks.fail(OP, f"the model has {name!r} twice.")
        components[name] = {"kind": kind} | {key: _value(kind, key, v) for key, v in zip(order, values, strict=False)}
    return _checked({"components": components}, model)


def _value(kind: str, key: str, text: str) -> float | int:
    try:
        return int(text) if key == "harmonics" or text.isdigit() else float(text)
    except ValueError:
        raise checks.fail(OP, f"{key} of {kind} is {text!r}, expected a number, as in seasonal:12.") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        remedy = "Install it: pip install 'stateline[classical]'."
        raise checks.fail(OP, f"{path} needs PyYAML, which is not installed.", remedy, error=ImportError) from error
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise checks.fail(OP, f"{path} is no YAML: {error}.") from error
    if not isinstance(found, dict):
        got = "is empty" if found is None else f"holds a {type(found).__name__}"
        remedy = "A model is `components:` or matrices; see stateline filter -h."
        raise checks.fail(OP, f"{path} {got}, expected names with values.", remedy)
    return {str(name): _plain(f"{path}: {name}", value) for name, value in found.items()}


def _plain(place: str, value: Any) -> Any:
    """A value as JSON holds it, arrays as lists; YAML takes 1e-3, without a point, for a text."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, dict):
        return {str(name): _plain(f"{place}.{name}", item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(place, item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value, re.IGNORECASE):
        return float(value)
    if value is not None and not isinstance(value, str | int | float):
        raise checks.fail(OP, f"{place} is {value}, of kind {type(value).__name__}, expected numbers, names or lists.")
    return value


def _checked(spec: dict[str, Any], source: str) -> dict[str, Any]:
    """The description with a level, where none of its components is one, and its noise."""
    if "components" not in spec:
        _check_matrices(source, spec)
        return spec
    _unknown(spec, ("components", NOISE), source)
    if not isinstance(spec["components"], dict) or not spec["components"]:
        remedy = "As in components: {trend: {kind: local-trend}}."
        got = f"components is {spec['components']!r}"
        raise checks.fail(OP, f"{source}: {got}, expected names with a kind each.", remedy)
    for name, given in spec["components"].items():
        _check_component(source, name, given)
    _free_or_number(source, NOISE, spec.get(NOISE, LEARN))
    if not any(given["kind"] in LEVELS for given in spec["components"].values()):
        spec = spec | {"components": {"local-level": {"kind": "local-level"}, **spec["components"]}}
    return spec


def _unknown(given: Mapping[str, Any], known: tuple[str, ...], source: str) -> None:
    for key in given:
        if key not in known:
            raise checks.fail(OP, f"{source} has {key!r}, expected {', '.join(known)}.")


def _free_or_number(source: str, name: str, value: Any) -> None:
    if value == LEARN:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise checks.fail(OP, f"{source}: {name} is {value!r}, expected a variance, at least 0, or {LEARN!r}.")


def _check_component(source: str, name: str, given: Any) -> None:
    """Whether a component's kind is known, and each of its numbers within bounds."""
    kind = given.get("kind") if isinstance(given, dict) else given
    if not isinstance(given, dict) or not isinstance(kind, str) or kind not in KINDS:
        raise checks.fail(OP, f"{source}: the kind of {name} is {kind!r}, expected one of {', '.join(KINDS)}.")
    _, order, variances, _ = KINDS[kind]
    _unknown(given, ("kind", *order, *variances), f"{source}: {name}")
    if "period" in order and "period" not in given:
        raise checks.fail(OP, f"{source}: {name} has no period.", "As in seasonal:12, twelve steps.")
    for key in variances:
        _free_or_number(source, f"{key} of {name}", given.get(key, LEARN))
    if "period" in given:
        checks.number(OP, f"{source}: period of {name}", given["period"], low=2.0, open_low=kind == "oscillator")
    if "damping" in given:
        checks.number(OP, f"{source}: damping of {name}", given["damping"], low=0.0, high=1.0, open_low=True)
    if "harmonics" in given:
        most = int(given["period"] / 2)
        checks.number(OP, f"{source}: harmonics of {name}", given["harmonics"], low=1, high=most, integer=True)


def _check_matrices(source: str, spec: dict[str, Any]) -> None:
    """Whether the matrices are there, are matrices, and fit each other."""
    _unknown(spec, ("components", NOISE, *MATRICES), source)
    if NOISE in spec:
        raise checks.fail(OP, f"{source} has noise beside matrices.", "There the noise is R.")
    for name in ("A", "C", "Q", "R"):
        if name not in spec:
            raise checks.fail(OP, f"{source} lacks {name}.", "It needs A, C, Q and R, or `components:`.")
    n, m = len(_matrix(source, spec, "A")), len(_matrix(source, spec, "C"))
    for name, shape, rule in (
        ("A", (n, n), "as many rows as columns"), ("C", (m, n), f"a row a column of the data, {n} wide as A is"),
        ("Q", (n, n), "as A"), ("R", (m, m), "a row and a column for each row of C"),
        ("m0", (n,), "a number for each row of A"), ("P0", (n, n), "as A"),
    ):  # fmt: skip
        if name not in spec or (name in ("Q", "R") and spec[name] == LEARN):
            continue
        given = _matrix(source, spec, name, len(shape))
        if tuple(given.shape) != shape:
            got, wanted = (" by ".join(map(str, size)) + " long" * (len(size) == 1) for size in (given.shape, shape))
            raise checks.fail(OP, f"{source}: {name} is {got}, expected {wanted}: {rule}.")
        if name in ("Q", "R", "P0") and not _covariance(given):
            problem = f"{source}: {name} is {spec[name]!r}, expected a covariance: symmetric, no eigenvalue below 0"
            raise checks.fail(OP, f"{problem}.", "Variances stand on its diagonal.")
    continuous = spec.get("continuous", False)
    if not isinstance(continuous, bool):
        raise checks.fail(OP, f"{source}: continuous is {continuous!r}, expected true or false.")


def _covariance(given: Tensor) -> bool:
    values = torch.linalg.eigvalsh(given)
    return torch.equal(given, given.mT) and bool(values[0] >= -1e-12 * values[-1].clamp(min=1))


def _matrix(source: str, spec: dict[str, Any], name: str, dims: int = 2) -> Tensor:
    try:
        made = torch.tensor(spec[name], dtype=F64)
    except (TypeError, ValueError):
        made = torch.empty(0)
    if made.dim() != dims or not made.numel() or not torch.isfinite(made).all():
        form = "rows of numbers, equally many in each, as in [[1, 1], [0, 1]]" if dims == 2 else "numbers, as in [0, 0]"
        form += f", or {LEARN!r}" if name in ("Q", "R") else ""
        raise checks.fail(OP, f"{source}: {name} is {spec[name]!r}, expected {form}.")
    return made


# ---- from a description to matrices ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blueprint:
    """A description beside a number of columns: what is needed to make matrices of any variances and gaps.

    joint: the columns are one series of m observations; otherwise each is a series of one, N = columns.
    blocks: of the state, each (drift or matrix of one step, {variance: intensity}).
    fixed: variances that are given.   free: names of those to learn.
    """

    spec: dict[str, Any]
    joint: bool
    blocks: list[Block]
    seen: Tensor
    sensors: dict[str, Tensor]
    continuous: bool
    fixed: dict[str, float]
    free: tuple[str, ...]
    levels: tuple[int, ...]
    m0: Tensor | None = None
    P0: Tensor | None = None
    names: tuple[str, ...] = field(default=())

    @property
    def n(self) -> int:
        """States."""
        return int(self.seen.shape[1])

    def transitions(self, gaps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A (U, n, n) over each gap (U) in steps, and what a unit of each variance adds to Q (U, n, n)."""
        A = gaps.new_zeros(len(gaps), self.n, self.n)
        Q = {name: torch.zeros_like(A) for name in self.names if name not in self.sensors}
        at = 0
        for drift, noises in self.blocks:
            here = slice(at, at := at + len(drift))
            for name, intensity in noises.items():
                moved, added = self._step(drift, intensity, gaps)
                A[:, here, here] = moved
                Q[name][:, here, here] += added
        return A, Q

    def _step(self, drift: Tensor, intensity: Tensor, gaps: Tensor) -> tuple[Tensor, Tensor]:
        n = len(drift)
        if self.continuous:
            moves = gaps > 0  # two rows of one time: nothing happens between
            A, Q = torch.eye(n, dtype=F64).repeat(len(gaps), 1, 1), torch.zeros(len(gaps), n, n, dtype=F64)
            if moves.any():
                A[moves], _, made = discretize(drift, None, gaps[moves], intensity)
                assert made is not None
                Q[moves] = made
            return A, Q
        found = []
        for gap in gaps.tolist():
            if gap != int(gap) or gap > MOST_STEPS:
                problem = f"two rows are {gap:g} steps apart, and the matrices A and Q are those of one step"
                remedy = "Say `continuous: true` if A and Q are of x' = A x + w, or give --step."
                raise checks.fail(OP, f"{problem}.", remedy)
            A, Q = torch.eye(n, dtype=F64), torch.zeros(n, n, dtype=F64)
            for _ in range(int(gap)):
                A, Q = drift @ A, drift @ Q @ drift.mT + intensity
            found.append((A, Q))
        return torch.stack([A for A, _ in found]), torch.stack([Q for _, Q in found])


def blueprint(spec: dict[str, Any], columns: int, source: str = "the model") -> Blueprint:
    """What makes the matrices of a description, which `described` found good, for so many columns.

    Raises ValueError, which calls the description `source`, if it does not fit the columns.
    """
    if "components" not in spec:
        return _of_matrices(spec, columns, source)
    components = spec["components"]
    joint = any(KINDS[given["kind"]][3] for given in components.values())
    blocks: list[Block] = []
    seen, fixed, names = [], {}, []
    levels: list[int] = []
    at = 0
    for name, given in components.items():
        make, _, variances, takes_all = KINDS[given["kind"]]
        if joint and not takes_all and columns > 1:
            problem = f"{given['kind']} is of one column, and another component takes {columns} as axes of one thing"
            raise checks.fail(OP, f"{source}: {problem}.", "Filter a column at a time, or give matrices.")
        options = {key: v for key, v in given.items() if key != "kind" and key not in variances}
        part = make(columns, **options)
        called = {key: key if key not in names else f"{name} {key}" for key in variances}
        blocks += [(drift, {called[key]: unit for key, unit in noises.items()}) for drift, noises in part.blocks]
        seen.append(part.seen)
        if not levels:
            levels = [at + i for i in part.levels]
        for key in variances:
            names.append(called[key])
            if (value := given.get(key, LEARN)) != LEARN:
                fixed[called[key]] = float(value)
        at += part.seen.shape[1]
    if (value := spec.get(NOISE, LEARN)) != LEARN:
        fixed[NOISE] = float(value)
    names.append(NOISE)
    m = columns if joint else 1
    free = tuple(name for name in names if name not in fixed)
    sensors = {NOISE: torch.eye(m, dtype=F64)}
    return Blueprint(
        spec, joint, blocks, torch.cat(seen, 1), sensors, True, fixed, free, tuple(levels), names=tuple(names)
    )


def _of_matrices(spec: dict[str, Any], columns: int, source: str) -> Blueprint:
    A, C = (torch.tensor(spec[name], dtype=F64) for name in ("A", "C"))
    m, n = C.shape
    if m != columns:
        rows, counted = "row" if m == 1 else "rows", "column" if columns == 1 else "columns"
        remedy = "C has a row a column: choose with --columns, or give it more."
        raise checks.fail(OP, f"{source}: C has {m} {rows}, and the data {columns} {counted}.", remedy)
    fixed, free = {}, []
    bases: dict[str, dict[str, Tensor]] = {"Q": {}, "R": {}}
    for name, size in (("Q", n), ("R", m)):
        if spec[name] == LEARN:
            for i in range(size):
                bases[name][f"{name}[{i},{i}]"] = torch.diag(torch.eye(size, dtype=F64)[i])
            free += list(bases[name])
            continue
        bases[name][name] = torch.tensor(spec[name], dtype=F64)
        fixed[name] = 1.0
    m0, P0 = (torch.tensor(spec[name], dtype=F64) if name in spec else None for name in ("m0", "P0"))
    continuous, names = spec.get("continuous", False), (*bases["Q"], *bases["R"])
    return Blueprint(spec, True, [(A, bases["Q"])], C, bases["R"], continuous, fixed, tuple(free), (), m0, P0, names)
