"""Signals and their labels from files: .ts (the UEA and UCR archives), .npz, .csv, or a folder of .wav files.

.ts     @dimensions channels, separated by ":", then the class or the number; ? or NaN is a missing value
.npz    X (n, time, channel), (n, time), or with `lengths` (n) all samples one after another (samples, channel);
        y (n) or (n, targets), if there are labels
.csv    with a header. Long, if it has a column `series`: a row a sample, in order (of `time`, if there is one);
        wide otherwise: a row a signal of one channel, shorter ones ending in empty cells. `label` holds the label,
        an empty cell is a missing value
folder  a sub-folder a class, whose name is the label; or .wav files themselves, without labels
"""

from __future__ import annotations

import csv
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stateline import checks
from stateline.apps.estimator_data import Floats

OP = "signals"
SAVE_NPZ = "Save plain arrays of numbers with numpy.savez(path, X=…, y=…)."
LABEL, SERIES, TIME = "label", "series", "time"


@dataclass(frozen=True)
class Signals:
    """Signals in order: X, each (time, channel); y, a label each, or None; names, what each is called.

    rate: samples a second, of sound; None where a file does not say.   columns: what a CSV's header names.
    """

    X: list[Floats]
    y: NDArray[Any] | None
    names: list[str]
    rate: int | None = None
    columns: tuple[str, ...] = ()


def read_signals(path: str | Path, *, rate: int | None = None) -> Signals:
    """The signals of a file or folder. rate: resample sound to so many samples a second.

    Raises ValueError naming file, place and remedy for what cannot be read; OSError for what is not there.
    """
    source = Path(path).expanduser()
    if not source.exists():
        raise FileNotFoundError(2, "No such file or directory", str(source))
    if source.is_dir():
        return _read_folder(source, rate)
    readers = {".ts": _read_ts, ".npz": _read_npz, ".csv": _read_csv}
    if source.suffix.lower() == ".wav":
        sound, found = _read_wav(source, rate)
        return Signals([sound], None, [source.name], found)
    if source.suffix.lower() not in readers:
        raise checks.fail(OP, f"{source} is no .ts, .npz, .csv or .wav file, and no folder.", "Convert it to one.")
    if rate is not None:
        raise checks.fail(OP, f"a rate of {rate} was asked for, and {source} is no sound.", "Resample it yourself.")
    signals = readers[source.suffix.lower()](source)
    if not signals.X:
        raise checks.fail(OP, f"{source} holds no signals.")
    return signals


def is_sound(path: str | Path) -> bool:
    """Whether `read_signals` takes it for sound, of so many samples a second."""
    source = Path(path).expanduser()
    return source.is_dir() or source.suffix.lower() == ".wav"


# ---- .ts -------------------------------------------------------------------------------------------------------------


def _read_ts(path: Path) -> Signals:
    X, labels = [], []
    header: dict[str, list[str]] = {}
    data = False
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            text = line.strip()
            if not text or text.startswith(("#", "%")):
                continue
            if data:
                x, label = _ts_signal(f"{path}:{number}", text, header)
                X.append(x)
                labels.append(label)
            elif text.lower() == "@data":
                data = True
            elif text.startswith("@"):
                name, *values = text[1:].split()
                header[name.lower()] = values
            else:
                raise checks.fail(OP, f"{path}:{number} has data before @data.", "Is it a .ts file?")
    if not data:
        raise checks.fail(OP, f"{path} has no @data.", "Is it a .ts file, and whole?")
    widths = {x.shape[1] for x in X}
    if len(widths) > 1:
        raise checks.fail(OP, f"{path} has signals of {' and '.join(map(str, sorted(widths)))} dimensions.")
    y: NDArray[Any] | None = None
    if _ts_labels(header) == "targetlabel":
        try:
            y = np.asarray(labels, dtype=np.float64)
        except ValueError as error:
            raise checks.fail(OP, f"{path} has a target that is no number: {error}.") from error
    elif _ts_labels(header):
        y = np.asarray(labels)
    return Signals(X, y, [str(i) for i in range(len(X))])


def _ts_labels(header: dict[str, list[str]]) -> str | None:
    """Which header line says that the last part of a signal is its label."""
    for name in ("classlabel", "targetlabel"):
        if header.get(name, ["false"])[0].lower() == "true":
            return name
    return None


def _ts_signal(place: str, text: str, header: dict[str, list[str]]) -> tuple[Floats, str]:
    if header.get("timestamps", ["false"])[0].lower() == "true" or "(" in text:
        raise checks.fail(OP, f"{place} has time stamps, which are not read.", "Resample the signals evenly.")
    parts = text.split(":")
    label = parts.pop().strip() if _ts_labels(header) else ""
    known = header.get("classlabel", [])[1:]
    if known and label not in known:
        raise checks.fail(OP, f"{place} ends in {label!r}, expected a class of @classLabel: {' '.join(known[:20])}.")
    dimensions = header.get("dimensions", header.get("dimension"))
    if dimensions and dimensions[0].isdigit() and len(parts) != int(dimensions[0]):
        raise checks.fail(OP, f"{place} has {len(parts)} dimensions, @dimensions says {dimensions[0]}.")
    remedy = "A missing value is ?."
    if _ts_labels(header) is None:
        remedy += " Do lines end in a class? A line @classLabel true, with their names, says so."
    channels = [[_number(place, value, remedy) for value in part.split(",")] for part in parts]
    if len(lengths := {len(channel) for channel in channels}) > 1:
        raise checks.fail(OP, f"{place} has dimensions of {' and '.join(map(str, sorted(lengths)))} samples.")
    return np.asarray(channels, dtype=np.float64).T.copy(), label


def _number(place: str, text: str, remedy: str) -> float:
    text = text.strip()
    if text in ("?", ""):
        return math.nan
    try:
        value = float(text)
    except ValueError as error:
        raise checks.fail(OP, f"{place}: {text[:40]!r} is no number.", remedy) from error
    if math.isinf(value):
        raise checks.fail(OP, f"{place}: {text[:40]!r} is infinite, expected a finite number.", remedy)
    return value


def _finite(place: str, x: Floats) -> Floats:
    """x (time, …), of which no sample is infinite."""
    if np.isinf(x).any():
        at = int(np.isinf(x).reshape(len(x), -1).any(1).argmax())
        raise checks.fail(OP, f"{place} is infinite at sample {at}, expected finite numbers.", "A missing one is NaN.")
    return x


# ---- .npz ------------------------------------------------------------------------------------------------------------


def _read_npz(path: Path) -> Signals:
    if not zipfile.is_zipfile(path):
        raise checks.fail(OP, f"{path} cannot be read: it is no .npz archive.", SAVE_NPZ)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name in ("X", "y", "lengths")}
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        reason = "it holds Python objects, or is damaged"  # NumPy's own words recommend what runs a stranger's code
        raise checks.fail(OP, f"{path} cannot be read: {reason}.", SAVE_NPZ) from error
    if "X" not in arrays:
        raise checks.fail(OP, f"{path} has no array X.", SAVE_NPZ)
    X, lengths, y = arrays["X"], arrays.get("lengths"), arrays.get("y")
    if X.dtype.kind not in "biuf":
        raise checks.fail(OP, f"{path}: X holds {X.dtype}, expected numbers.", SAVE_NPZ)
    if lengths is not None:
        if lengths.dtype.kind not in "iu" or (lengths < 1).any():
            raise checks.fail(OP, f"{path}: lengths, {lengths.dtype}, are expected whole numbers of at least 1.")
        if X.ndim not in (1, 2) or lengths.ndim != 1 or lengths.sum() != len(X):
            problem = (
                f"{path}: X has shape {X.shape} and lengths add up to {lengths.sum()}, expected (samples, channel)."
            )
            raise checks.fail(OP, problem)
        X = X[:, None] if X.ndim == 1 else X
        found = np.split(X.astype(np.float64), np.cumsum(lengths)[:-1])
    elif X.ndim in (2, 3):
        found = list((X[:, :, None] if X.ndim == 2 else X).astype(np.float64))
    else:
        raise checks.fail(OP, f"{path}: X has shape {X.shape}, expected (n, time) or (n, time, channel).")
    if y is not None and len(y) != len(found):
        raise checks.fail(OP, f"{path}: y has {len(y)} labels for {len(found)} signals.")
    found = [_finite(f"{path}: signal {i}", x) for i, x in enumerate(found)]
    return Signals(found, y, [str(i) for i in range(len(found))])


# ---- .csv ------------------------------------------------------------------------------------------------------------


def _read_csv(path: Path) -> Signals:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            header = [name.strip() for name in next(rows, [])]
            _check_header(path, header)
            return (_long if SERIES in header else _wide)(path, header, _complete(path, header, rows))
    except (UnicodeDecodeError, csv.Error) as error:
        raise checks.fail(OP, f"{path} is no CSV in UTF-8.", _converted(path)) from error


def _converted(path: Path) -> str:
    """What to do about a file that is not UTF-8."""
    with path.open("rb") as file:
        start = file.read(4096)
    utf16 = start[:2] in (b"\xff\xfe", b"\xfe\xff")
    if b"\0" in start and not utf16:
        return "It holds no text at all: is it another kind of file?"
    return f"Convert it: iconv -f {'UTF-16' if utf16 else 'LATIN1'} -t UTF-8 {path.name} > new.csv."


def _check_header(path: Path, header: list[str]) -> None:
    names = "Its first line names the columns."
    if any("\0" in name for name in header):
        raise checks.fail(OP, f"{path} is no CSV in UTF-8.", _converted(path))
    if len(header) < 2:
        for separator, called in ((";", "semicolons"), ("\t", "tabs")):
            if header and separator in header[0]:
                raise checks.fail(OP, f"{path} has cells separated by {called}, expected commas.", "Export it so.")
        raise checks.fail(OP, f"{path} has no header of two columns or more.", names)
    if _all_numbers(header):
        raise checks.fail(OP, f"{path} has numbers in its first line.", f"{names} Is it data?")
    twice = [name for i, name in enumerate(header) if name in header[:i]]
    if twice:
        raise checks.fail(OP, f"{path} names a column twice, {twice[0]!r}.", f"{names} Is it data?")
    if TIME in header and SERIES not in header:
        remedy = f"With a row a sample, `{SERIES}` says which signal it is of; with a row a signal, call no column so."
        raise checks.fail(OP, f"{path} has a column `{TIME}` and no column `{SERIES}`.", remedy)


def _all_numbers(cells: list[str]) -> bool:
    try:
        return all(math.isfinite(float(cell)) or True for cell in cells)
    except ValueError:
        return False


def _complete(path: Path, header: list[str], rows: Any) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, cells by column) of every row that is not empty."""
    for number, row in enumerate(rows, 2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) > len(header):
            raise checks.fail(OP, f"{path}:{number} has {len(row)} cells, the header names {len(header)}.")
        yield f"{path}:{number}", dict(zip(header, row + [""] * (len(header) - len(row)), strict=True))


def _cell(place: str, column: str, row: dict[str, str]) -> float:
    remedy = "A missing value is an empty cell."
    if LABEL not in row and row[column].strip().upper() not in ("NA", "N/A", "NULL", "NONE", "-"):
        remedy = f"No column is called `{LABEL}`, so all are samples. Is this one the label, or the first line data?"
    return _number(f"{place}, column {column}", row[column], remedy)


def _wide(path: Path, header: list[str], rows: Iterator[tuple[str, dict[str, str]]]) -> Signals:
    columns = [name for name in header if name != LABEL]
    X, labels = [], []
    for place, row in rows:
        values = [_cell(place, name, row) for name in columns]
        while values and math.isnan(values[-1]):
            values.pop()
        if not values:
            raise checks.fail(OP, f"{place} has no sample.")
        X.append(np.asarray(values)[:, None])
        labels.append(row.get(LABEL, "").strip())
    names = [str(i) for i in range(len(X))]
    return Signals(X, np.asarray(labels) if LABEL in header else None, names, columns=tuple(header))


def _long(path: Path, header: list[str], rows: Iterator[tuple[str, dict[str, str]]]) -> Signals:
    channels = [name for name in header if name not in (SERIES, LABEL, TIME)]
    if not channels:
        raise checks.fail(OP, f"{path} has no column beside {', '.join(header)}.", "Each channel is a column.")
    samples: dict[str, list[tuple[float, list[float]]]] = {}
    labels: dict[str, str] = {}
    for place, row in rows:
        name = row[SERIES].strip()
        label = row.get(LABEL, "").strip()
        if labels.setdefault(name, label) != label:
            raise checks.fail(OP, f"{place}: series {name} is labelled {label!r} here and {labels[name]!r} before.")
        series = samples.setdefault(name, [])
        at = _cell(place, TIME, row) if TIME in header else float(len(series))
        series.append((at, [_cell(place, channel, row) for channel in channels]))
    X = [np.asarray([values for _, values in sorted(series, key=lambda s: s[0])]) for series in samples.values()]
    y = np.asarray(list(labels.values())) if LABEL in header else None
    return Signals(X, y, list(samples), columns=tuple(header))


# ---- sound -----------------------------------------------------------------------------------------------------------


def _read_folder(folder: Path, rate: int | None) -> Signals:
    files = _sounds(folder, "*/*") or _sounds(folder, "*")
    if not files:
        raise checks.fail(OP, f"{folder} holds no .wav files, itself or in sub-folders.", "A sub-folder is a class.")
    sounds, rates = zip(*(_read_wav(path, rate) for path in files), strict=True)
    if len(set(rates)) > 1:
        got = ", ".join(map(str, sorted(set(rates))))
        raise checks.fail(OP, f"{folder} has sound at {got} samples a second.", "Name one with --rate (rate=).")
    for path, sound in zip(files, sounds, strict=True):
        if (own := sound.shape[1]) != (first := sounds[0].shape[1]):
            problem = f"{path} has {own} channel{'s' * (own > 1)}, {files[0]} has {first}."
            raise checks.fail(OP, problem, "Convert them to one kind, mono or stereo.")
    y = np.asarray([path.parent.name for path in files]) if files[0].parent != folder else None
    return Signals(list(sounds), y, [str(path.relative_to(folder)) for path in files], rates[0])


def _sounds(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if path.suffix.lower() == ".wav")


def _read_wav(path: Path, rate: int | None) -> tuple[Floats, int]:
    """((time, channel) in [−1, 1), samples a second). SciPy reads it: it comes with scikit-learn, and knows floats."""
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    try:
        own, data = wavfile.read(path)
    except ValueError as error:
        raise checks.fail(OP, f"{path} cannot be read: {error}.", "Save it as PCM or float .wav.") from error
    if data.size == 0:
        raise checks.fail(OP, f"{path} holds no samples.")
    sound = data.astype(np.float64)
    if data.dtype.kind in "iu":
        middle = 128 if data.dtype == np.uint8 else 0
        sound = (sound - middle) / (128 if data.dtype == np.uint8 else -float(np.iinfo(data.dtype).min))
    sound = sound[:, None] if sound.ndim == 1 else sound
    if rate is not None and rate != own:
        shared = math.gcd(rate, own)
        sound = resample_poly(sound, rate // shared, own // shared, axis=0)
    return _finite(str(path), sound), rate or own
