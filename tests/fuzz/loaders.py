"""Damage without end to everything that is loaded (pip install 'stateline[fuzz]'):

    python tests/fuzz/loaders.py -max_total_time=60

An input says which loader is meant and what is cut out of its sound file and put in. Inputs that fail are written to
the working directory; give their names as arguments to see them again. What must hold is in `damaged.py`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["stateline", "safetensors"]):
    import damaged

    import stateline.interop  # noqa: F401  # when first used would be too late to be instrumented


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loaders = damaged.loaders(folder)
        (folder / "case").mkdir()

        @atheris.instrument_func
        def one(data: bytes) -> None:
            choose = atheris.FuzzedDataProvider(data)
            loader = loaders[choose.ConsumeIntInRange(0, len(loaders) - 1)]
            content = loader.sound
            for _ in range(choose.ConsumeIntInRange(0, 5)):
                at = choose.ConsumeIntInRange(0, len(content))
                end = at + choose.ConsumeIntInRange(0, 8 if choose.ConsumeBool() else len(content))
                content = content[:at] + choose.ConsumeBytes(choose.ConsumeIntInRange(0, 8)) + content[end:]
            loader.check(folder / "case", content)

        given = [word for word in sys.argv[1:] if not word.startswith("-")]
        flags = [word for word in sys.argv[1:] if word.startswith("-")]
        # a gigabyte claimed by a damaged header must not be allocated
        limits = ["-rss_limit_mb=4096", "-malloc_limit_mb=1024", "-timeout=20", "-max_len=256"]
        atheris.Setup([sys.argv[0], *limits, *flags, *given], one)
        atheris.Fuzz()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
