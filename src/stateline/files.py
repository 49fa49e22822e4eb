"""Files as this project writes them: flushed before they are renamed into place, and readable like any other."""

from __future__ import annotations

import os
from pathlib import Path


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
