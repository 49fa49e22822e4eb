"""Files as this project writes them: flushed before they are renamed into place, readable like any other; and where
those lie that ship with it.
"""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path

#: The models that ship, and their folders below `bundled`.
BUNDLED = {"bundled": "model", "bundled-zh": "chinese"}
#: How messages and help texts name them.
BUNDLED_NAMES = " or ".join(f'"{name}"' for name in BUNDLED)


def bundled(name: str | Path) -> Path | None:
    """The folder of a model that ships; None if no such model has this name."""
    folder = BUNDLED.get(str(name))
    return None if folder is None else Path(str(importlib.resources.files("stateline") / "bundled" / folder))


def share(path: Path) -> None:
    """Give a file the permissions any new file gets; safetensors and temporary files are private to the user."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def flush(path: Path) -> None:
    """Ask the disk to keep a file's contents or a folder's entries."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders, and needs no flush of them
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
