"""How well signals are told apart: ours, LSTM and GRU of the same size, and aeon's MiniRocket, on real data.

    python -m benchmarks.signal_sets                                      # once: the data, into build/signals
    python -m benchmarks.quality_signals                                  # all sets but fashion_mnist, five seeds
    python -m benchmarks.quality_signals --sets fashion_mnist --models ours lstm --device cuda
    python -m benchmarks.quality_signals --validate --label ", wide" --options '{"d_model": 128}' --models ours
    python -m benchmarks.quality_signals --table                          # the Markdown table of what there is

A row of JSON a fit, appended to build/quality_signals.jsonl; rows that are there are not made again, so a run that was
stopped goes on, and a model that lives in another environment (minirocket needs aeon) joins by a run of its own.

ours, lstm and gru are fitted by one loop with the same settings but the learning rate; the hidden size of the recurrent
networks (two layers, the mean of what they say as ours) is the one that comes nearest to our number of parameters.
minirocket pads signals with their last value where they differ in length. pitch_7nn, for tones, is the nearest
neighbours of twelve points of the pitch. Settings are chosen with --validate, which never looks at a test set.
Splits: the archives' own; exercises by person, two held out a seed, each once in five; tones across voices, both ways,
and at random.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stateline.models.sequence import SequenceConfig, SequenceModel
from stateline.nn.mixer import padding

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("japanese_vowels", "basic_motions", "acsf1", "plaid", "pig_cvp", "exercises", "tones")
SETS = (*SMALL, "fashion_mnist")
MODELS = ("ours", "lstm", "gru", "minirocket", "pitch_7nn")
RATE = 8000
#: A lower rate for the recurrent networks, as is usual for them.
RECURRENT: dict[str, Any] = {"learning_rate": 4e-3}
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
        people = sorted(set(part), key=int)
        test = np.isin(part, [people[2 * seed % 10], people[(2 * seed + 1) % 10]])
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
    one with two signals; or, where people or voices are apart, one in three of those that were to be learnt from."""
    split, train, _ = fold
    apart = sorted(set(part[train]) - {"train"})
    if len(apart) > 1 and split != "random":
        held = np.isin(part[train], np.random.default_rng(seed).permutation(apart)[: max(1, len(apart) // 3)])
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
            return layers, nn.Linear(hidden, config.outputs)

        def size(hidden: int) -> int:
            return sum(p.numel() for module in make(hidden) for p in module.parameters())

        hidden = min(range(8, 257), key=lambda hidden: abs(size(hidden) - ours))
        self.mixers, self.norms = nn.ModuleList(), nn.ModuleList()
        self.project = self.norm_f = nn.Identity()
        self.cells, self.head = make(hidden)

    def forward(self, x: Tensor, *, lengths: Any = None) -> Tensor:
        y, _ = self.cells(x)
        if lengths is None:
            return self.head(y.mean(1))
        y = y.masked_fill(padding(y, lengths)[..., None], 0)
        return self.head(y.sum(1) / lengths[:, None])


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
    accuracy = float(np.mean(made.predict([X[i] for i in test]) == y[test]))
    row = {"set": name, "split": split, "model": model, "seed": seed, "accuracy": round(accuracy, 5)}
    if hasattr(made, "model_"):
        row |= {"parameters": sum(p.numel() for p in made.model_.parameters()), "options": options}
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
    made.add_argument("--seeds", type=int, default=5, help="how many (default: 5)")
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


def run(options: argparse.Namespace) -> None:
    """Make every row that is asked for and not there, seed by seed."""
    begun, origin = time.monotonic(), provenance(options.device)
    if options.out.exists() and not options.out.read_text().endswith("\n"):  # a kill cut the last line short
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows_of(options.out)))
    done = {(row["set"], row["split"], row["model"], row["seed"]) for row in rows_of(options.out)}
    for seed in range(options.seeds):
        for name in options.sets:
            X, y, part = load(options.data, name)
            for fold in folds(name, y, part, seed):
                split, train, test = validation(fold, y, part, seed) if options.validate else fold
                for model in options.models:
                    if (name, split, model + options.label, seed) in done or (model == "pitch_7nn" and name != "tones"):
                        continue
                    if time.monotonic() - begun > 60 * options.minutes:
                        print("out of time; the same command goes on", file=sys.stderr)
                        return
                    given = options.options | {"device": options.device}
                    row = measure(name, split, model, seed, given, (X, y, train, test)) | origin
                    row["model"] = model + options.label
                    print(json.dumps(row), file=sys.stderr)
                    with options.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
