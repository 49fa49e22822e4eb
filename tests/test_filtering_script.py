"""The script behind docs/remove_noise.md and docs/track_objects.md, on made-up wheels."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield importlib.import_module("filtering")
    for name in ("filtering", "archives"):
        sys.modules.pop(name, None)


def wheel(name: str, data: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr(name, data)
    return made.getvalue()


def test_weeks_are_dated_and_gaps_stay(script: ModuleType) -> None:
    text = b"date,co2\n19791229,330.0\n19800105,337.6\n19800112,\n19890107,352.7\n"
    made = script.co2(wheel("statsmodels/datasets/co2/co2.csv", text))
    assert made == {
        "co2.csv": "week,ppm\n1980-01-05,337.6\n1980-01-12,\n",
        "co2_1989.csv": "week,ppm\n1989-01-07,352.7\n",
    }


def test_a_flight_is_in_kilometres_from_where_it_lands(script: ModuleType) -> None:
    states = [
        {"callsign": script.CALLSIGN, "timestamp": 1000 * t, "latitude": 48 + (1329 - t) / 1e4, "longitude": 2.0}
        for t in range(1330)
    ] + [{"callsign": "OTHER", "timestamp": 0, "latitude": 0.0, "longitude": 0.0}]
    data = gzip.compress(json.dumps(states).encode())
    text = script.flight(wheel("traffic/data/samples/collections/quickstart.json.gz", data))
    rows = [line.split(",") for line in text.splitlines()[1:]]
    assert 150 < len(rows) < 300
    first, last = script.SILENCE
    for seconds, east, north in rows:
        if first <= int(seconds) < last:
            assert east == north == ""
        else:
            assert float(east) == 0
            assert north == "" or float(north) == pytest.approx((1329 - int(seconds)) / 1e4 * 111.19, abs=0.01)
    assert 0.1 < sum(north == "" and east != "" for _, east, north in rows) / len(rows) < 0.3


def test_pages_have_their_pictures_and_data() -> None:
    for page in ("remove_noise", "track_objects"):
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        assert f"({page}.png)" in text
        assert (ROOT / "docs" / f"{page}.png").stat().st_size > 10_000
