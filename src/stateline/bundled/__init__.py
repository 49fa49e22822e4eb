"""What ships inside the package: a small language model and a little text, both found offline.

`stateline.load("bundled")` loads the model; `path("excerpt")` is a folder of train.txt, validation.txt and test.txt.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["path"]


def path(name: str) -> Path:
    """The folder of one bundled thing, "model" or "excerpt".

    Asks importlib.resources, because in an editable install the data may not lie beside this file.
    """
    folder = Path(str(files(__name__).joinpath(name)))
    if not folder.is_dir():
        raise ValueError(f'bundled.path: name must be "model" or "excerpt", got {name!r}, and {folder} is no folder')
    return folder
