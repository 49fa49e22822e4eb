"""`stateline classify`: train a classifier (or a regressor) of signals, ask it about files, let it follow a stream."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stateline.cli.parser import Parser, UsageError, check_device, new_parser, positive

if TYPE_CHECKING:
    from stateline.apps.estimators import SequenceClassifier, SequenceRegressor
    from stateline.apps.signal_files import Signals

    Estimator = SequenceClassifier | SequenceRegressor

DESCRIPTION = """\
Classify signals: sensors, sound, prices, anything sampled over time. Signals may differ in length, have many channels
and missing values. A trained model also answers while a signal still arrives, in constant time and memory."""
DATA = """\
data:
  x.ts       as in the UEA and UCR archives
  x.npz      X (n, time, channel) or (n, time), or X (samples, channel) with lengths (n); y (n)
  x.csv      with a header. A row a signal: samples, and a column `label`; or a row a sample: the columns `series`,
             `label`, perhaps `time`, and one a channel. An empty cell is a missing value
  folder     of .wav files, a sub-folder a class
"""
EPILOG = f"""\
examples:
  stateline classify train gestures.csv --out runs/gestures
  stateline classify predict runs/gestures new.csv
  tail -f sensor.log | stateline classify stream runs/gestures
  stateline classify train --help                                 more, with examples

{DATA}"""
TRAIN_EPILOG = f"""\
examples:
  stateline classify train gestures.csv --out runs/gestures              a fifth is kept for the test
  stateline classify train Vowels_TRAIN.ts --test Vowels_TEST.ts --out runs/vowels
  stateline classify train words/ --rate 8000 --out runs/words           .wav files, a sub-folder a class
  stateline classify train faults.npz --out runs/faults --class-weight balanced --seed 1
  stateline classify train engines.csv --regress --out runs/engines      labels are numbers to estimate
  stateline classify train ecg.npz --out runs/ecg --bidirectional        may be more accurate, and cannot stream
  stateline classify train long.npz --out runs/long --device cuda --epochs 30
Ctrl-C, or SIGTERM, ends training early: the best weights so far are tested and saved.

{DATA}"""
PREDICT_EPILOG = f"""\
Prints a CSV: the signal, its label if the data has one, what the model says, and with --probabilities a column a class.
Where there are labels, a table of how well they were met follows on stderr.

examples:
  stateline classify predict runs/gestures new.csv
  stateline classify predict runs/words recordings/ --probabilities > answers.csv

{DATA}"""
STREAM_EPILOG = """\
Reads one sample a line, its channels separated by commas or blanks (nan or ? is missing), from a file or from stdin,
and prints a CSV: samples read, what the model says by now, and the probability of each class. Lines that begin with #
are passed over, and so is a first line of names; an empty line starts a new signal. With --every, the last sample of
a signal is answered too.

examples:
  tail -f sensor.log | stateline classify stream runs/gestures
  stateline classify stream runs/gestures one.csv --every 50
"""


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Define the subcommand and its actions."""
    parser = new_parser(commands, "classify", DESCRIPTION, EPILOG, summary="classify signals: sensors, sound, …")
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(dest="action", metavar="action", parser_class=Parser)
    _add_train(actions)
    predict = new_parser(actions, "predict", "Say what each signal is.", PREDICT_EPILOG, summary="ask a trained model")
    predict.set_defaults(run=run_predict)
    predict.add_argument("model", metavar="DIR", help="what train wrote")
    predict.add_argument("data", metavar="DATA", help=".ts, .npz, .csv, .wav, or a folder of .wav files")
    predict.add_argument("--probabilities", action="store_true", help="a column for each class")
    stream = new_parser(
        actions, "stream", "Say what a signal is while it arrives.", STREAM_EPILOG, summary="follow a signal"
    )
    stream.set_defaults(run=run_stream)
    stream.add_argument("model", metavar="DIR", help="what train wrote")
    stream.add_argument("data", metavar="FILE", nargs="?", default="-", help="default: -, stdin")
    stream.add_argument(
        "--every", type=positive, default=1, metavar="N", help="answer after every N samples (default: 1)"
    )
    for parser in (predict, stream):
        parser.add_argument("--device", help="cpu, cuda, … (default: cuda if there is one)")


def _add_train(actions: argparse._SubParsersAction[Parser]) -> None:
    train = new_parser(
        actions, "train", "Train a model on labelled signals and test it.", TRAIN_EPILOG, summary="train a model"
    )
    train.set_defaults(run=run_train)
    train.add_argument("data", metavar="DATA", help="labelled signals, see below")
    train.add_argument("--out", required=True, metavar="DIR", help="where the model goes")
    train.add_argument("--overwrite", action="store_true", help="replace the model that DIR holds; other files stay")
    train.add_argument("--test", metavar="DATA", help="signals to test on")
    share = "of the signals, kept for the test if there is no --test; 0: none (default: 0.2)"
    train.add_argument("--test-share", type=float, default=0.2, metavar="SHARE", help=share)
    train.add_argument("--regress", action="store_true", help="labels are numbers to estimate, not classes")
    train.add_argument("--rate", type=positive, metavar="HZ", help="resample sound to so many samples a second")
    model = train.add_argument_group("model")
    model.add_argument("--mixer", default="S4D", help="what reads the signal: S4D, Mamba2, … (default: S4D)")
    model.add_argument("--width", type=positive, default=64, metavar="N", help="of the model (default: 64)")
    model.add_argument("--layers", type=positive, default=2, metavar="N", help="default: 2")
    model.add_argument(
        "--pool", choices=("mean", "max", "mean_max", "last"), default="mean", help="of what is read (default: mean)"
    )
    model.add_argument("--bidirectional", action="store_true", help="read from both ends; no stream then")
    fit = train.add_argument_group("training")
    fit.add_argument("--epochs", type=positive, metavar="N", help="default: by the number of signals, 20 to 200")
    fit.add_argument("--batch-size", type=positive, metavar="N", help="signals a step (default: by their number)")
    fit.add_argument("--learning-rate", type=float, default=1e-2, metavar="X", help="default: 0.01")
    fit.add_argument("--dropout", type=float, default=0.1, metavar="SHARE", help="default: 0.1")
    fit.add_argument("--crop", type=float, default=1.0, metavar="SHARE", help="learn from pieces of the signals, this"
                     " share of each, another at every step (default: 1, all of it)")  # fmt: skip
    fit.add_argument("--label-smoothing", type=float, metavar="SHARE", help="of each label that goes to all classes"
                     " alike (default: 0)")  # fmt: skip
    fit.add_argument("--class-weight", choices=("balanced",), help="let rare classes count as much as common ones")
    fit.add_argument("--early-stopping", choices=("auto", "on", "off"), default="auto", help="hold a tenth out and keep"
                     " the epoch that is best there (default: auto, if that is enough signals)")  # fmt: skip
    fit.add_argument("--seed", type=int, default=0, help="the same gives the same bits (default: 0)")
    fit.add_argument("--device", help="cpu, cuda, … (default: cuda if there is one)")
    fit.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    fit.add_argument("--quiet", action="store_true", help="no progress")


def run(options: argparse.Namespace) -> int:
    """Complain that an action is missing."""
    raise UsageError("no action given: train, predict or stream (stateline classify --help shows how)")


# ---- train -----------------------------------------------------------------------------------------------------------


def run_train(options: argparse.Namespace) -> int:
    """Read, train, test, save."""
    import torch

    from stateline.apps.estimator_files import check_new
    from stateline.apps.signal_files import read_signals

    check_new(options.out, options.overwrite)  # not after an hour of training
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device is not None:
        check_device(options.device)
    if not 0 <= options.test_share < 1:
        raise UsageError(f"--test-share is {options.test_share}, expected at least 0 and below 1")
    signals = read_signals(options.data, rate=options.rate)
    X, y = signals.X, _labels(signals, options.data, options.regress)
    estimator = _estimator(options)
    if options.test is not None:
        tested = _read_like(signals, options.data, options.test)
        test_X, test_y = tested.X, _labels(tested, options.test, options.regress)
    else:
        X, y, test_X, test_y = _split(X, y, options)
    if _gaps(test_X) and not _gaps(X):
        problem = (
            f"{options.test or options.data} has missing values for the test, and the signals to train on have none"
        )
        raise UsageError(problem + "; fill them, or train on some (another --seed splits otherwise)")
    lengths = [len(x) for x in X]
    span = f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else f"{lengths[0]}"
    channels = _several(X[0].shape[1], "channel")
    print(f"{_several(len(X), 'signal')} of {span} samples, {channels}; {len(test_X)} more for the test", flush=True)
    estimator.fit(X, y)
    estimator.metadata_ = {"rate": signals.rate}
    estimator.save(options.out)
    numbers = sum(p.numel() for p in estimator.model_.parameters())
    print(f"{numbers:,} parameters, saved in {options.out}")
    if len(test_X):
        _report(options, test_y, estimator.predict(test_X))
    print(f"\nstateline classify predict {options.out} DATA   asks it about other signals")
    return 0


def _read_like(signals: Signals, data: str, test: str) -> Signals:
    """The signals of `test`, as those of `data`: sound of one rate, or no sound, and as many channels."""
    from stateline.apps.signal_files import is_sound, read_signals

    if Path(test).expanduser().exists() and is_sound(test) != (signals.rate is not None):
        kinds = f"{test} is {'sound' if signals.rate is None else 'no sound'}, and {data} is "
        raise UsageError(kinds + ("not" if signals.rate is None else "sound") + "; test on signals of one kind")
    tested = read_signals(test, rate=signals.rate)
    one, other = tested.X[0].shape[1], signals.X[0].shape[1]
    if one != other:
        raise UsageError(f"{test} has {_several(one, 'channel')}, {data} has {other}")
    return tested


def _gaps(X: list[Any]) -> bool:
    import numpy as np

    return any(bool(np.isnan(x).any()) for x in X)


def _several(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _estimator(options: argparse.Namespace) -> Estimator:
    from stateline.apps.estimators import SequenceClassifier, SequenceRegressor

    given: dict[str, Any] = dict(
        mixer=options.mixer,
        d_model=options.width,
        n_layer=options.layers,
        pool=options.pool,
        bidirectional=options.bidirectional,
        dropout=options.dropout,
        crop=options.crop,
        max_epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        early_stopping={"auto": "auto", "on": True, "off": False}[options.early_stopping],
        device=options.device,
        random_state=options.seed,
        verbose=0 if options.quiet else 1,
    )
    if not options.regress:
        return SequenceClassifier(
            **given, class_weight=options.class_weight, label_smoothing=options.label_smoothing or 0.0
        )
    for flag, value in (("--class-weight", options.class_weight), ("--label-smoothing", options.label_smoothing)):
        if value is not None:
            raise UsageError(f"{flag} is about classes, and --regress is given")
    return SequenceRegressor(**given)


def _labels(signals: Signals, path: str, regress: bool) -> Any:
    if signals.y is None and signals.columns:
        names = ", ".join(signals.columns[:20]) + (", …" if len(signals.columns) > 20 else "")
        raise UsageError(f"{path} has no column `label`; its first line names {names}")
    if signals.y is None:
        raise UsageError(f"{path} has no labels; stateline classify train --help says where they go")
    if not regress:
        if signals.y.ndim != 1:
            raise UsageError(f"{path} has labels y {signals.y.shape}, expected one a signal; --regress takes several")
        if "" in signals.y.astype(str):
            name = signals.names[signals.y.astype(str).tolist().index("")]
            raise UsageError(f"{path} has no label for signal {name}; name its class, or leave it out")
        if _numbers(signals.y) and len(set(signals.y.tolist())) > max(2, len(signals.y) // 2):
            remedy = "--regress estimates numbers; if they are classes, give them names, as c1 for 1"
            raise UsageError(f"{path} has numbers for labels, hardly two alike; {remedy}")
        return signals.y.astype(str)
    wrong = [str(label) for label in signals.y.ravel() if not _is_number(label)]
    if wrong:
        raise UsageError(f"{path} has a label that is no number, {wrong[0]!r}, and --regress is given")
    return signals.y.astype(float)


def _numbers(y: Any) -> bool:
    try:
        y.astype(float)
    except ValueError:
        return False
    return True


def _split(X: list[Any], y: Any, options: argparse.Namespace) -> tuple[list[Any], Any, list[Any], Any]:
    """Training and test part, the latter balanced over the classes."""
    import numpy as np

    from stateline.apps.estimator_data import held_out

    if options.test_share == 0:
        return X, y, [], y[:0]
    groups = np.zeros(len(y), dtype=np.int64) if options.regress else np.unique(y, return_inverse=True)[1]
    test = held_out(groups, options.test_share, np.random.RandomState(options.seed))
    if not test.any():
        problem = f"--test-share {options.test_share} of {_several(len(y), 'signal')} is none"
        raise UsageError(problem + "; --test-share 0.5 keeps more, 0 trains without a test")
    one, other = np.flatnonzero(~test), np.flatnonzero(test)
    return [X[i] for i in one], y[one], [X[i] for i in other], y[other]


def _report(options: argparse.Namespace, y: Any, predicted: Any) -> None:
    from stateline.apps.signal_report import class_table, error_table, plot_confusion

    print()
    if options.regress:
        print(error_table(y, predicted))
        return
    print(class_table(y, predicted))
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed (pip install 'stateline[plot]')")
        return
    picture = Path(options.out) / "confusion.png"
    plot_confusion(y, predicted, picture)
    print(f"what was taken for what: {picture}")


# ---- predict and stream ----------------------------------------------------------------------------------------------


def _load(options: argparse.Namespace) -> Estimator:
    from stateline.apps import estimators
    from stateline.apps.estimator_files import estimator_name
    from stateline.models.checkpoint import WEIGHTS

    if options.device is not None:
        check_device(options.device)
    if not (home := Path(options.model).expanduser()).is_dir():
        raise UsageError(f"{options.model} is no directory; DIR is what stateline classify train --out wrote")
    if not (home / WEIGHTS).exists():
        raise UsageError(f"{options.model} holds no model of signals: what stateline classify train --out wrote")
    regress = estimator_name(options.model) == "SequenceRegressor"
    kind: Any = estimators.SequenceRegressor if regress else estimators.SequenceClassifier
    return kind.load(options.model, device=options.device)


def run_predict(options: argparse.Namespace) -> int:
    """Print a line a signal."""
    from stateline.apps.signal_files import is_sound, read_signals
    from stateline.apps.signal_report import class_table, error_table

    estimator = _load(options)
    rate = estimator.metadata_.get("rate")
    signals = read_signals(options.data, rate=rate if is_sound(options.data) else None)
    if rate is not None and signals.rate is None:
        print(f"{options.data} is taken for sound of {rate} samples a second, as the model learnt it", file=sys.stderr)
    classes = getattr(estimator, "classes_", None)
    if options.probabilities and classes is None:
        raise UsageError("--probabilities asks for classes, and this model estimates numbers")
    answer = estimator.predict_proba(signals.X) if classes is not None else estimator.predict(signals.X)
    predicted = answer if classes is None else classes[answer.argmax(1)]
    labelled = signals.y is not None
    out = csv.writer(sys.stdout, lineterminator="\n")
    columns = ["signal", *(["label"] if labelled else []), *_columns(estimator)]
    out.writerow([*columns, *(classes if options.probabilities and classes is not None else [])])
    for i, name in enumerate(signals.names):
        row = [name, *([signals.y[i]] if signals.y is not None else [])]
        row += _cells(predicted[i]) if classes is None else [predicted[i]]
        out.writerow([*row, *(_cells(answer[i]) if options.probabilities else [])])
    if signals.y is not None:
        if classes is None:
            print(error_table(_labels(signals, options.data, True), answer), file=sys.stderr)
        else:
            print(class_table(signals.y.astype(str), predicted.astype(str)), file=sys.stderr)
    return 0


def _columns(estimator: Estimator) -> list[str]:
    targets = getattr(estimator, "target_mean_", [0])
    return ["predicted"] if len(targets) == 1 else [f"predicted {i}" for i in range(len(targets))]


def _cells(values: Any) -> list[str]:
    import numpy as np

    return [f"{value:.6g}" for value in np.atleast_1d(values)]


def run_stream(options: argparse.Namespace) -> int:
    """Print a line a sample, or every so many, and for the last one of a signal."""
    estimator = _load(options)
    classes = getattr(estimator, "classes_", None)
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["samples", *_columns(estimator), *([] if classes is None else classes)])
    stream = estimator.stream()
    answer: Any = None  # not yet said
    with nullcontext(sys.stdin) if options.data == "-" else open(options.data, encoding="utf-8") as lines:
        for number, sample in chain(_samples(lines), [(0, None)]):
            if sample is not None:
                try:
                    answer = stream.update(sample)
                except ValueError as error:
                    raise UsageError(f"line {number}: {error}") from error
            if answer is not None and (sample is None or stream.count % options.every == 0):
                said = _cells(answer) if classes is None else [classes[answer.argmax()], *_cells(answer)]
                out.writerow([stream.count, *said])
                sys.stdout.flush()
                answer = None
            if sample is None:
                stream = estimator.stream()
    return 0


def _samples(lines: Iterable[str]) -> Iterator[tuple[int, list[float] | None]]:
    """Each line's number and the numbers it holds; None for an empty one."""
    first = True
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith("#"):
            continue
        cells = [cell.strip() for cell in line.split(",")] if "," in line else line.split()
        try:
            sample = [float("nan") if cell in ("?", "") else float(cell) for cell in cells]
        except ValueError as error:
            if not (first and _is_header(cells)):
                raise UsageError(f"line {number} is no sample: {error}") from error
            first = False
            continue
        first = first and not cells
        yield number, sample or None


def _is_header(cells: list[str]) -> bool:
    """Whether cells, not all of them numbers, name channels. Raises UsageError if they name more than channels."""
    other = [name for name in cells if name in ("series", "label", "time")]
    if other:
        problem = f"the first line names a column {other[0]}, expected channels alone, a sample a line"
        raise UsageError(f"{problem}; cut -d, -f3- FILE, say, keeps the columns from the third on")
    return not any(_is_number(cell) for cell in cells)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
