"""docs/performance.md is made of two halves, each from a run of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import report  # noqa: E402  # a folder of the repository, not of the package

ABOUT = {
    "machine": "a processor",
    "threads": 2,
    "isa": "avx2",
    "python": "3.11",
    "torch": "2.13",
    "commit": "abc",
    "dirty": False,
}
CPU = {"op": "scan", "shape": "b1 t2", "dtype": "float32", "by": "stateline", "ms_p50": 2.0, "ms_min": 1.5, "peers": {}}
GPU = CPU | {"gpu": "a GPU", "ms_device": 0.25, "floor_ms": 0.125, "tera_bytes_per_s": 1.5, "peak_gib": 3.0}


def write(folder: Path, name: str, *rows: dict[str, Any]) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row | ABOUT) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("order", [("cpu", "gpu"), ("gpu", "cpu")])
def test_a_run_renews_its_half_and_leaves_the_other(tmp_path: Path, order: tuple[str, str]) -> None:
    rows = {"cpu": write(tmp_path, "cpu", CPU, CPU | {"by": "peer", "ratio": 3.0}), "gpu": write(tmp_path, "gpu", GPU)}
    page = tmp_path / "page.md"
    for kind in (*order, *order):
        assert report.main([str(rows[kind]), "--out", str(page)]) == 0
    text = page.read_text()
    assert text.count("# Performance\n") == text.count("## On a GPU") == text.count(report.MARK) == 1
    assert text.index("| scan, b1 t2 float32 | stateline | 2.00 |") < text.index(report.MARK)
    assert "| scan, b1 t2 | stateline | 0.250 | 2.000 | 0.125 | 1.50 TB/s |  | 3.00 |" in text.partition(report.MARK)[2]
    assert "- a GPU; Python 3.11, torch 2.13; commit abc; peers: none" in text


def test_rows_of_both_kinds_in_one_file_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        report.main([str(write(tmp_path, "both", CPU, GPU | {"by": "other"})), "--out", str(tmp_path / "page.md")]) == 2
    )
    assert "those of a GPU among others" in capsys.readouterr().err
