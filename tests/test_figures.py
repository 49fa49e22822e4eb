"""The scripts that draw pictures of pages: on a made-up recording, and beside what their pages say."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib
import io
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from makers import debian_package

ROOT = Path(__file__).parents[1]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The script, small, with a wheel of its own in tmp_path and a page to write to."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("figures")
    counts = (1024 + 200 * np.sin(np.arange(1200) / 9)).astype(np.uint16)
    data = io.BytesIO()
    np.savez(data, ecg=counts)
    wheel = tmp_path / module.RECORDING.file
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("scipy/misc/ecg.dat", data.getvalue())
    pinned = dataclasses.replace(module.RECORDING, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())
    page = tmp_path / "page.md"
    page.write_text("before <!-- errors --> old <!-- /errors --> after", encoding="utf-8")
    for name, value in {"RECORDING": pinned, "SIZES": (4, 8, 16), "SEGMENTS": 3, "RATE": 90, "PAGE": page}.items():
        monkeypatch.setattr(module, name, value)
    yield module
    for name in ("figures", "archives"):
        sys.modules.pop(name, None)


def test_table_is_of_the_recording(figures: ModuleType, tmp_path: Path) -> None:
    signal = figures.electrocardiogram(figures.RECORDING.fetch(tmp_path, tmp_path))
    torch.testing.assert_close(signal, torch.sin(torch.arange(1200) / 9).double(), atol=0.01, rtol=0)
    cut = figures.segments(signal)
    assert cut.shape == (3, 360)
    assert cut.mean(-1).abs().max() < 1e-12
    found = figures.remembered(cut)
    assert len(found) == 3 * len(figures.PANELS)
    assert (figures.errors(cut, cut.flip(-1)) == 0).all()
    assert (figures.errors(cut, 0 * cut) == 1).all()
    rows = figures.table(cut, found).splitlines()
    assert len(rows) == 2 + len(found)
    coarse, fine = (float(rows[k].split("|")[4]) for k in (2, 4))
    assert fine < coarse < 1.5


def test_another_wheel_is_refused(
    figures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra [plot]")
    monkeypatch.setattr(figures, "RECORDING", dataclasses.replace(figures.RECORDING, sha256="0" * 64))
    assert figures.main(["--archives", str(tmp_path)]) == 2
    assert "(PyPI scipy 1.11.4); it is not used" in capsys.readouterr().err


def test_pictures_and_table_are_written(figures: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra [plot]")
    assert figures.main(["--archives", str(tmp_path)]) == 0
    assert (tmp_path / "page.png").stat().st_size > 1000
    assert (tmp_path / "page_by_age.png").stat().st_size > 1000
    text = figures.PAGE.read_text(encoding="utf-8")
    assert text.startswith("before <!-- errors -->\n\n| | n |")
    assert text.endswith("<!-- /errors --> after")
    assert "old" not in text


@pytest.fixture
def steering(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield importlib.import_module("steering")
    for name in ("steering", "filtering", "archives"):
        sys.modules.pop(name, None)


def test_a_record_of_steering_is_read_from_its_package(steering: ModuleType) -> None:
    """Inputs come first, then outputs, after three lines of other things; the numbers stay as they are written."""
    u, y = [f"{3.41 + 3 * (t % 2):.2f}" for t in range(1000)], [f"{4 + t / 1000:.6f}" for t in range(1000)]

    def package(numbers: list[str]) -> bytes:
        text = "TITLE\n 15 0 1 1 1000\n C C N\n" + "".join(f"   {v}\n" for v in numbers)
        return debian_package({steering.EXAMPLE: gzip.compress(text.encode())})

    lines = steering.hair_dryer(package(u + y)).splitlines()
    assert lines[0] == "seconds,heater,air"
    assert lines[1:] == [f"{0.08 * t:.2f},{a},{b}" for t, (a, b) in enumerate(zip(u, y, strict=True))]
    with pytest.raises(sys.modules["archives"].DataError, match=r"holds 1999 numbers, expected 1000 inputs"):
        steering.hair_dryer(package(u + y[1:]))


def test_the_record_of_steering_is_what_its_page_says(steering: ModuleType) -> None:
    page = steering.PAGE.read_text(encoding="utf-8")
    assert f"({steering.RECORD.name})" in page
    assert f"every {steering.STEP} seconds" in page
    rows = torch.tensor([[float(v) for v in line.split(",")] for line in steering.RECORD.read_text().split()[1:]])
    assert rows.shape == (steering.STEPS, 3)
    torch.testing.assert_close(rows[:, 0], steering.STEP * torch.arange(float(steering.STEPS)))
    assert set(rows[:, 1].tolist()) == {torch.tensor(v).item() for v in (3.41, 6.41)}
    assert 3 < rows[:, 2].min() < rows[:, 2].max() < 6.5
    assert "(hair_dryer_licence.txt)" in page
    assert "The SLICOT Team" in (ROOT / "docs" / "hair_dryer_licence.txt").read_text(encoding="utf-8")


def test_the_picture_of_steering_is_of_its_page(steering: ModuleType, tmp_path: Path) -> None:
    """It draws what a run leaves behind, under the page's own names; test_docs runs the page."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="pictures are drawn by matplotlib")
    page = steering.PAGE.read_text(encoding="utf-8")
    assert f"({steering.PICTURE.name})" in page
    names = ["start", "ahead", "high", "air", "goal", "least", *(name for name, _, _ in steering.WAYS)]
    for name in names:
        assert re.search(rf"^(\w+, )*{name}(, \w+)* = ", page, re.MULTILINE), f"the page makes no {name}"
    made = {name: torch.rand(9, 2) for name, _, _ in steering.WAYS}
    made |= {name: torch.rand(9, 1) for name in ("low", "high", "goal")} | {"air": torch.rand(20, 1)}
    made |= {"start": SimpleNamespace(y_mean=torch.ones(1), u_mean=torch.ones(1)), "least": 0.0, "most": 1.0}
    made["ahead"] = SimpleNamespace(mean=torch.rand(9, 1))
    steering.draw(pyplot, made, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_learning_is_of_its_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The script stops where the page has both smoothed levels, and draws them."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="pictures are drawn by matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    learning = importlib.import_module("learning")
    page = learning.PAGE.read_text(encoding="utf-8")
    assert f"at Aswan, {learning.FIRST} to" in page
    assert learning.PICTURE.name in page
    assert learning.run("```python\nafter = 1\n```\ntext\n```python\nafter = 2\n```\n")["after"] == 1
    made = learning.run(page)
    assert len(made["flow"]) == 100
    learning.draw(pyplot, made["flow"], made["before"], made["after"], tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
    torch.set_default_dtype(torch.float32)
    sys.modules.pop("learning")
