"""How well signals are told apart: ours, LSTM and GRU of the same size, and aeon's MiniRocket, on real data.

    python -m benchmarks.signal_sets                                      # once: the data, into build/signals
    python -m benchmarks.quality_signals                                  # all sets but fashion_mnist, five seeds
    python -m benchmarks.quality_signals --sets fashion_mnist --models ours lstm --device cuda
    python -m benchmarks.quality_signals --validate --label ", wide" --options '{"d_model": 128}' --models ours
    python -m benchmarks.quality_signals --plan benchmarks/signal_plan.json --device cuda --workers 16
    python -m benchmarks.quality_signals --table                          # the Markdown table of what there is

A row of JSON a fit, appended to build/quality_signals.jsonl; rows that are there are not made again, so a run that was
stopped goes on, and a model that lives in another environment (minirocket needs aeon) joins by a run of its own.

A plan is a list of {"sets": […], "models": […], "options": {…}}: settings a set and a model; "label", "splits" and
"seeds" where they are not all.

ours, lstm and gru are fitted by one loop; the hidden size of the recurrent
networks (two layers, the mean of what they say as ours) is the one that comes nearest to our number of parameters.
minirocket pads signals with their last value where they differ in length. pitch_7nn, for tones, is the nearest
neighbours of twelve points of the pitch. Settings are chosen with --validate, which never looks at a test set.
Splits: the archives' own; exercises by person, one held out a seed of the five on whom no settings were chosen; tones
across voices, both ways, and at random.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from stateline.models.sequence import POOLS, SequenceConfig, SequenceModel
from stateline.nn.mixer import padding

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("japanese_vowels", "basic_motions", "acsf1", "plaid", "pig_cvp", "exercises", "tones")
SETS = (*SMALL, "fashion_mnist")
MODELS = ("ours", "lstm", "gru", "minirocket", "pitch_7nn")
RATE = 8000
#: People of the exercises on whom settings are chosen; the others are asked about, one a seed.
TUNED_ON = ("3", "4", "5", "6", "7")
#: A lower rate for the recurrent networks, as is usual for them.
RECURRENT: dict[str, Any] = {"learning_rate": 4e-3}
#: What `folds` yields of the sets that are split otherwise than their archives are.
SPLITS = {"exercises": ("by person",), "tones": ("voice 3 to 5", "voice 5 to 3", "random")}
Fold = tuple[str, np.ndarray[Any, Any], np.ndarray[Any, Any]]


def load(folder: Path, name: str) -> tuple[list[Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(signals, labels, parts) of a prepared set."""
    with np.load(folder / f"{name}.npz") as file:
        X, lengths, y, part = (file[key] for key in ("X", "lengths", "y", "part"))
    if X.dtype != np.float32:  # sound and pixels
        X = X.astype(np.float32) / np.iinfo(X.dtype).max
    return np.split(X, np.cumsum(lengths)[:-1]), y, part


def folds(name: str, y: np.ndarray[Any, Any], part: np.ndarray[Any, Any], seed: int) -> Iterator[Fold]:
    """(split's name, train, test) of a seed: which signals are learnt from, and which are asked about."""
    if name == "exercises":
        asked = [person for person in sorted(set(part), key=int) if person not in TUNED_ON]
        test = part == asked[seed % len(asked)]
        yield "by person", np.flatnonzero(~test), np.flatnonzero(test)
    elif name == "tones":
        for one, other in (("3", "5"), ("5", "3")):
            yield f"voice {one} to {other}", np.flatnonzero(part == one), np.flatnonzero(part == other)
        order = np.random.default_rng(seed).permutation(len(y))
        order = order[np.argsort(y[order], kind="stable")]
        yield "random", np.setdiff1d(order, order[::5]), np.sort(order[::5])
    else:
        yield "archive", np.flatnonzero(part == "train"), np.flatnonzero(part == "test")


def validation(fold: Fold, y: np.ndarray[Any, Any], part: np.ndarray[Any, Any], seed: int) -> Fold:
    """A fold whose test is a part of what was to be learnt from, for choosing settings: a third of each class, half of
    one with two signals; or one of the people who are in no test, the others of them being learnt from."""
    split, train, _ = fold
    if split == "by person":
        train = train[np.isin(part[train], TUNED_ON)]
        held = part[train] == TUNED_ON[seed % len(TUNED_ON)]
    else:
        order = np.random.default_rng(seed).permutation(len(train))
        order = order[np.argsort(y[train][order], kind="stable")]
        held = np.zeros(len(train), dtype=bool)
        for group in np.split(order, np.flatnonzero(np.diff(np.unique(y[train], return_inverse=True)[1][order])) + 1):
            held[group[: max(1, len(group) // 3)]] = True
    return f"{split}, validation", train[~held], train[held]


class Recurrent(SequenceModel):
    """Two layers of LSTM or GRU in place of ours: same input, pool, head and training."""

    def __init__(self, config: SequenceConfig, kind: str) -> None:
        ours = sum(p.numel() for p in SequenceModel(config).parameters())
        super().__init__(config)
        inputs = self.input.width
        cell = {"lstm": nn.LSTM, "gru": nn.GRU}[kind]

        def make(hidden: int) -> tuple[nn.Module, nn.Linear]:
            layers = cell(inputs, hidden, num_layers=2, batch_first=True, dropout=config.dropout)
            return layers, nn.Linear(hidden * len(POOLS[config.pool]), config.outputs)

        def size(hidden: int) -> int:
            return sum(p.numel() for module in make(hidden) for p in module.parameters())

        hidden = min(range(8, 257), key=lambda hidden: abs(size(hidden) - ours))
        self.mixers, self.norms = nn.ModuleList(), nn.ModuleList()
        self.project = self.norm_f = nn.Identity()
        self.cells, self.head = make(hidden)

    def forward(self, x: Tensor, *, lengths: Any = None) -> Tensor:
        y, _ = self.cells(x)
        if lengths is None:
            lengths, padded = torch.full((x.shape[0],), x.shape[1], device=x.device), None
        else:
            padded = padding(y, lengths)
            y = y.masked_fill(padded[..., None], 0)
        return self._answer(self._pool(y, lengths, padded), lengths)


def fit_ours(kind: str, options: dict[str, Any]) -> Any:
    """A SequenceClassifier; of a recurrent network if `kind` names one."""
    from stateline.apps.estimators import SequenceClassifier

    class Peer(SequenceClassifier):
        def _make_model(self, config: SequenceConfig) -> nn.Module:
            return SequenceModel(config) if kind == "ours" else Recurrent(config, kind)

    return Peer(**options)


class MiniRocket:
    """aeon's MiniRocketClassifier on signals of one length."""

    def __init__(self, seed: int) -> None:
        from aeon.classification.convolution_based import MiniRocketClassifier

        self.model = MiniRocketClassifier(random_state=seed)
        self.versions = {"aeon": version("aeon")}

    def fit(self, X: list[Any], y: Any) -> MiniRocket:
        """Learn; the longest signal sets the length."""
        self.length = max(9, *(len(x) for x in X))
        self.model.fit(self._equal(X), y)
        return self

    def predict(self, X: list[Any]) -> Any:
        """A class each."""
        return self.model.predict(self._equal(X))

    def _equal(self, X: list[Any]) -> Any:
        cut = [x[: self.length] for x in X]
        return np.stack([np.pad(x, ((0, self.length - len(x)), (0, 0)), mode="edge").T for x in cut])


class PitchNeighbours:
    """Seven nearest neighbours of twelve points of a syllable's pitch, about its mean: what hand-made features give."""

    versions: ClassVar[dict[str, str]] = {}

    def fit(self, X: list[Any], y: Any) -> PitchNeighbours:
        """Keep the contours."""
        from sklearn.neighbors import KNeighborsClassifier

        self.model = KNeighborsClassifier(7).fit([_contour(x[:, 0]) for x in X], y)
        return self

    def predict(self, X: list[Any]) -> Any:
        """A class each."""
        return self.model.predict([_contour(x[:, 0]) for x in X])


def _contour(x: Any) -> Any:
    """Twelve log pitches, in octaves about their median, by autocorrelation of 40 ms windows over the loud part."""
    loud = np.abs(x) > 0.1 * np.abs(x).max()
    first, last = np.flatnonzero(loud)[[0, -1]]
    width, lags = 320, np.arange(RATE // 400, RATE // 80)
    pitches = []
    for centre in np.linspace(first, max(first + 1, last), 14)[1:-1].astype(int):
        start = max(0, min(len(x) - width, centre - width // 2))
        frame = x[start : start + width] - x[start : start + width].mean()
        power = np.correlate(frame, frame, "full")[len(frame) - 1 :]
        pitches.append(np.log2(RATE / lags[power[lags[lags < len(power)]].argmax()]))
    return np.asarray(pitches) - np.median(pitches)


def measure(name: str, split: str, model: str, seed: int, options: dict[str, Any], data: Any) -> dict[str, Any]:
    """Fit one model and ask it: a row."""
    X, y, train, test = data
    if model == "minirocket":
        made: Any = MiniRocket(seed)
    elif model == "pitch_7nn":
        made = PitchNeighbours()
    else:
        options = options if model == "ours" else RECURRENT | options
        made = fit_ours(model, options | {"random_state": seed})
    begun = time.perf_counter()
    made.fit([X[i] for i in train], y[train])
    fitted = time.perf_counter()
    row: dict[str, Any] = {"set": name, "split": split, "model": model, "seed": seed}
    asked = [X[i] for i in test]
    if hasattr(made, "model_"):
        probabilities = made.predict_proba(asked)
        said = made.classes_[probabilities.argmax(1)]
        right = probabilities[np.arange(len(test)), np.searchsorted(made.classes_, y[test])]
        row["test_loss"] = round(float(-np.log(right.clip(1e-9)).mean()), 4)
        best = made.history_[made.best_epoch_ - 1]
        row |= {key: round(best[key], 4) for key in ("loss", "held_out_score") if key in best}  # of training signals
        row |= {"parameters": sum(p.numel() for p in made.model_.parameters()), "options": options}
    else:
        said = made.predict(asked)
        row |= made.versions
    row["accuracy"] = round(float(np.mean(said == y[test])), 5)
    row |= {"fit_seconds": round(fitted - begun, 1), "predict_seconds": round(time.perf_counter() - fitted, 2)}
    return row


def provenance(device: str) -> dict[str, Any]:
    """Where rows are made."""
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {"on": name, "torch": torch.__version__, "commit": run.stdout.strip()}


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What a file holds; a line that was cut short is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Mean accuracy in percent ± standard deviation over seeds, a row a split, in Markdown."""
    found = dict.fromkeys(row["model"] for row in rows)
    models = [*(m for m in MODELS if m in found), *(m for m in found if m not in MODELS)]
    lines = ["| set | split | " + " | ".join(models) + " |", "|---|---|" + "---:|" * len(models)]
    for name, split in dict.fromkeys((row["set"], row["split"]) for row in rows):
        cells = []
        for model in models:
            scores = [100 * r["accuracy"] for r in rows if (r["set"], r["split"], r["model"]) == (name, split, model)]
            spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
            cells.append(f"{mean(scores):.1f}{spread} ({len(scores)})" if scores else "")
        lines.append(f"| {name} | {split} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, default=ROOT / "build" / "signals", help="default: build/signals")
    made.add_argument("--out", type=Path, default=ROOT / "build" / "quality_signals.jsonl")
    made.add_argument("--sets", nargs="+", choices=SETS, default=SMALL, metavar="SET", help=", ".join(SETS))
    made.add_argument(
        "--models", nargs="+", choices=MODELS, default=MODELS[:3], metavar="MODEL", help=", ".join(MODELS)
    )
    made.add_argument("--plan", type=Path, help="a file of several --sets, --models, --label and --options")
    made.add_argument("--seeds", type=int, default=5, help="how many (default: 5)")
    made.add_argument("--workers", type=int, default=1, help="fits side by side, each on one CPU thread (default: 1)")
    made.add_argument("--device", default="cpu", help="cpu or cuda, for ours, lstm and gru (default: cpu)")
    made.add_argument("--minutes", type=float, default=float("inf"), help="start no fit after so many")
    made.add_argument(
        "--options", type=json.loads, default={}, help='of SequenceClassifier, as JSON: {"max_epochs": 5}'
    )
    made.add_argument("--validate", action="store_true", help="ask about a part of the training signals, not the test")
    made.add_argument("--label", default="", help="a name for --options: rows of other labels count as other models")
    made.add_argument("--table", action="store_true", help="only print the table of what there is")
    return made


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if not options.table:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        run(options)
    print(table(rows_of(options.out)))
    return 0


@dataclass(frozen=True)
class Job:
    """One fit: a seed, a set, one of its folds, a model under a label, with options."""

    seed: int
    name: str
    fold: int
    split: str
    model: str
    label: str
    options: dict[str, Any]


def jobs_of(options: argparse.Namespace) -> Iterator[Job]:
    """Every fit that is asked for, seed by seed."""
    plan = [{"sets": options.sets, "models": options.models, "label": options.label, "options": options.options}]
    if options.plan:
        plan = json.loads(options.plan.read_text())
    for seed in range(options.seeds):
        for part in plan:
            for name, model in product(part["sets"], part["models"]):
                if seed >= part.get("seeds", options.seeds) or (model == "pitch_7nn" and name != "tones"):
                    continue
                for fold, split in enumerate(SPLITS.get(name, ("archive",))):
                    if split not in part.get("splits", [split]):
                        continue
                    split += ", validation" * options.validate
                    yield Job(seed, name, fold, split, model, part.get("label", ""), part.get("options", {}))


@lru_cache
def loaded(folder: Path, name: str) -> tuple[list[Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """What `load` gives, once a process."""
    return load(folder, name)


def work(job: Job, options: argparse.Namespace, deadline: float, origin: dict[str, Any]) -> bool:
    """Make a job's row and append it at once; False if it is too late to begin."""
    if time.time() > deadline:
        return False
    X, y, part = loaded(options.data, job.name)
    fold = list(folds(job.name, y, part, job.seed))[job.fold]
    _, train, test = validation(fold, y, part, job.seed) if options.validate else fold
    given = job.options | {"device": options.device}
    row = measure(job.name, job.split, job.model, job.seed, given, (X, y, train, test)) | origin
    row["model"] = job.model + job.label
    line = json.dumps(row) + "\n"
    print(line, end="", file=sys.stderr)
    with options.out.open("a") as file:
        file.write(line)
    return True


def run(options: argparse.Namespace) -> None:
    """Make every row that is asked for and not there, seed by seed."""
    deadline = time.time() + 60 * options.minutes
    if options.out.exists() and not options.out.read_text().endswith("\n"):  # a kill cut the last line short
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows_of(options.out)))
    done = {(row["set"], row["split"], row["model"], row["seed"]) for row in rows_of(options.out)}
    left = [j for j in jobs_of(options) if (j.name, j.split, j.model + j.label, j.seed) not in done]
    if options.workers == 1:
        origin = provenance(options.device)
        made = [work(job, options, deadline, origin) for job in left]
    else:
        torch.set_num_threads(1)  # as `provenance` says
        origin = provenance(options.device)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.workers, context, torch.set_num_threads, (1,)) as pool:
            made = [f.result() for f in [pool.submit(work, job, options, deadline, origin) for job in left]]
    if not all(made):
        print("out of time; the same command goes on", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
