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

import json
import math
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
    _bounded("local-trend", "damping", damping, 0.0, 1.0)
    drift = parts.trend(torch.tensor(damping, dtype=F64), continuous=True)
    noises = {"level": _diagonal(1.0, 0.0), "slope": _diagonal(0.0, 1.0)}
    return Part([(drift, noises)], torch.tensor([[1.0, 0.0]], dtype=F64), (0,))


def _waves(waves: list[Tensor], name: str) -> Part:
    return Part([(wave, {name: _diagonal(1.0, 1.0)}) for wave in waves], parts.shown(waves))


def _seasonal(columns: int, period: float, harmonics: int | None = None) -> Part:
    _bounded("seasonal", "period", period, 2.0, math.inf, closed=True)
    most = int(period / 2)
    count = min(most, HARMONICS) if harmonics is None else harmonics
    checks.number(OP, "harmonics of seasonal", count, low=1, high=most, integer=True)
    return _waves(parts.season(period, count, continuous=True), "season")


def _oscillator(columns: int, period: float, damping: float = 1.0) -> Part:
    _bounded("oscillator", "period", period, 2.0, math.inf)
    _bounded("oscillator", "damping", damping, 0.0, 1.0)
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


def described(model: str | Mapping[str, Any]) -> dict[str, Any]:
    """A model as plain values that JSON can hold: {"components": {name: {"kind": …}}, "noise": …} or matrices.

    Args:
        model: a name, a sum of names, a YAML file's path, or what such a file holds.

    Raises:
        ValueError: naming what is wrong and what is known.
    """
    if isinstance(model, Mapping):
        return _checked(json.loads(json.dumps(dict(model))), "the model")
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
        raise checks.fail(OP, f"{path} holds no mapping.", "It has `components:` or matrices; see stateline filter -h.")
    try:
        return dict(json.loads(json.dumps(found)))
    except TypeError as error:
        raise checks.fail(OP, f"{path} holds values that are neither numbers nor texts: {error}.") from error


def _checked(spec: dict[str, Any], source: str) -> dict[str, Any]:
    """The description with a level, where none of its components is one, and its noise."""
    if "components" not in spec:
        _unknown(spec, ("components", NOISE, *MATRICES), source)
        if NOISE in spec:
            raise checks.fail(OP, f"{source} has noise beside matrices.", "There the noise is R.")
        for name in ("A", "C", "Q", "R"):
            if name not in spec:
                raise checks.fail(OP, f"{source} lacks {name}.", "It needs A, C, Q and R, or `components:`.")
        return spec
    _unknown(spec, ("components", NOISE), source)
    if not isinstance(spec["components"], dict) or not spec["components"]:
        raise checks.fail(OP, f"{source}: components is {spec['components']!r}, expected names with a kind each.")
    for name, given in spec["components"].items():
        if not isinstance(given, dict) or given.get("kind") not in KINDS:
            got = given.get("kind") if isinstance(given, dict) else given
            raise checks.fail(OP, f"{source}: the kind of {name} is {got!r}, expected one of {', '.join(KINDS)}.")
        _, order, variances, _ = KINDS[given["kind"]]
        _unknown(given, ("kind", *order, *variances), f"{source}: {name}")
        if "period" in order and "period" not in given:
            raise checks.fail(OP, f"{source}: {name} has no period.", "As in seasonal:12, twelve steps.")
        for key in variances:
            _free_or_number(source, f"{key} of {name}", given.get(key, LEARN))
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


def _bounded(kind: str, name: str, value: float, low: float, high: float, *, closed: bool = False) -> None:
    checks.number(OP, f"{name} of {kind}", value, low=low, high=high, open_low=not closed)


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


def blueprint(spec: dict[str, Any], columns: int) -> Blueprint:
    """What makes the matrices of a description for so many columns.

    Raises ValueError naming what does not fit.
    """
    if "components" not in spec:
        return _of_matrices(spec, columns)
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
            raise checks.fail(OP, f"{problem}.", "Filter a column at a time, or give matrices.")
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


def _of_matrices(spec: dict[str, Any], columns: int) -> Blueprint:
    A, C = (_matrix(spec, name) for name in ("A", "C"))
    n, m = len(A), len(C)
    if A.shape != (n, n) or C.shape[1] != n:
        raise checks.fail(OP, f"A is {tuple(A.shape)} and C {tuple(C.shape)}, expected (n, n) and (columns, n).")
    if m != columns:
        counted = "column" if columns == 1 else "columns"
        raise checks.fail(OP, f"C has {m} rows and the data {columns} {counted}.", "Choose with --columns.")
    fixed, free = {}, []
    bases: dict[str, dict[str, Tensor]] = {"Q": {}, "R": {}}
    for name, size in (("Q", n), ("R", m)):
        if spec[name] == LEARN:
            for i in range(size):
                bases[name][f"{name}[{i},{i}]"] = torch.diag(torch.eye(size, dtype=F64)[i])
            free += list(bases[name])
            continue
        given = _matrix(spec, name)
        if given.shape != (size, size) or not torch.equal(given, given.mT) or torch.linalg.eigvalsh(given)[0] < -1e-12:
            problem = f"{name} is {given.tolist()}, expected a covariance ({size}, {size})"
            raise checks.fail(OP, f"{problem}: symmetric, no eigenvalue below 0.")
        bases[name][name] = given
        fixed[name] = 1.0
    m0 = _matrix(spec, "m0", 1) if "m0" in spec else None
    P0 = _matrix(spec, "P0") if "P0" in spec else None
    if (m0 is not None and m0.shape != (n,)) or (P0 is not None and P0.shape != (n, n)):
        raise checks.fail(OP, f"m0 and P0 do not fit A: expected ({n}) and ({n}, {n}).")
    continuous = spec.get("continuous", False)
    if not isinstance(continuous, bool):
        raise checks.fail(OP, f"continuous is {continuous!r}, expected true or false.")
    names = (*bases["Q"], *bases["R"])
    return Blueprint(spec, True, [(A, bases["Q"])], C, bases["R"], continuous, fixed, tuple(free), (), m0, P0, names)


def _matrix(spec: dict[str, Any], name: str, dims: int = 2) -> Tensor:
    try:
        made = torch.tensor(spec[name], dtype=F64)
    except (TypeError, ValueError):
        made = torch.empty(0)
    if made.dim() != dims or not made.numel() or not torch.isfinite(made).all():
        form = "rows of numbers, [[1, 1], [0, 1]]" if dims == 2 else "numbers, [0, 0]"
        raise checks.fail(OP, f"{name} is {spec[name]!r}, expected {form}.")
    return made
