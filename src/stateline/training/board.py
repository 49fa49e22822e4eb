"""The figures of metrics.jsonl where TensorBoard looks for them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stateline.checks import fail

#: How the figures of a record are called there; text is shown as text.
TAGS = {
    "bpb": "loss/train_bits_per_byte",
    "val_bpb": "loss/validation_bits_per_byte",
    "lr": "step/learning_rate",
    "grad_norm": "step/gradient_norm",
    "tokens_per_s": "step/tokens_per_second",
    "sample": "sample",
}
_PLACE = ("step", "tokens", "elapsed_s")  # where a record stands, no figures of it


def require() -> Any:
    """TensorBoard's writer; ValueError naming the extra if it is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        remedy = "Install it (pip install 'stateline[train]') or leave --tensorboard out."
        raise fail("train", "tensorboard is asked for, but not installed.", remedy) from error
    return SummaryWriter


def remove_events(folder: Path) -> None:
    """Delete TensorBoard's event files, and their folder if nothing else is in it."""
    for path in folder.glob("events.out.tfevents.*"):
        path.unlink()
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


class Board:
    """One event file a session, made anew from metrics.jsonl: what that holds once is here once.

    purge_step tells a TensorBoard that is watching to forget what it has read before.
    """

    def __init__(self, folder: Path, metrics: Path) -> None:
        writer = require()
        remove_events(folder)
        self._writer = writer(str(folder), purge_step=0)
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        records = [json.loads(line) for line in lines]
        now = time.time() - max((record.get("elapsed_s", 0.0) for record in records), default=0.0)
        for record in records:
            self.write(record, now + record.get("elapsed_s", 0.0))

    def write(self, record: Mapping[str, Any], moment: float | None = None) -> None:
        """One record of metrics.jsonl; `moment` in seconds since 1970, now if None."""
        for name, value in record.items():
            if name in _PLACE:
                continue
            add = self._writer.add_text if isinstance(value, str) else self._writer.add_scalar
            add(TAGS.get(name, name), value, record["step"], walltime=moment)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left, and end the writer's thread."""
        self._writer.close()
