"""Coverage-guided damage to everything that is loaded (pip install 'stateline[fuzz]'):

    python tests/fuzz/loaders.py -max_total_time=60

The first byte of an input chooses the loader, the rest is the damaged file. Inputs that fail are written to the working
directory; give their names as arguments to see them again. What must hold is in `damaged.py`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["stateline", "safetensors"]):
    import damaged


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loaders = damaged.loaders(folder)
        corpus = folder / "corpus"
        corpus.mkdir()
        for i, loader in enumerate(loaders):
            (corpus / str(i)).write_bytes(bytes([i]) + loader.sound)
        (folder / "case").mkdir()

        def one(data: bytes) -> None:
            if not data:
                return
            loader = loaders[data[0] % len(loaders)]
            loader.check(folder / "case", data[1:])

        given = [word for word in sys.argv[1:] if not word.startswith("-")]
        flags = [word for word in sys.argv[1:] if word.startswith("-")]
        # a gigabyte claimed by a damaged header must not be allocated
        limits = ["-rss_limit_mb=4096", "-malloc_limit_mb=1024", "-timeout=20", "-max_len=65536"]
        atheris.Setup([sys.argv[0], *limits, *flags, *(given or [str(corpus)])], one)
        atheris.Fuzz()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
