"""The script behind docs/what_s4_remembers.md, on a made-up recording."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import io
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

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


def test_the_picture_of_steering_is_of_its_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The script's constants are the page's, and it draws what a run leaves behind."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    steering = importlib.import_module("steering")
    page = steering.PAGE.read_text(encoding="utf-8")
    assert f"dt = {steering.STEP} " in page
    assert f"inputs=(-{steering.FORCE}, {steering.FORCE})" in page
    assert f"[{steering.END}, far" in page
    assert steering.PICTURE.name in page
    assert steering.run("```python\na = 1\n```\ntext\n```python\nb = a + 1\n```\n")["b"] == 2
    made = [torch.rand(9, 4), torch.rand(9, 2), torch.rand(9)]
    steering.draw(pyplot, made, made, torch.ones(9), tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
    sys.modules.pop("steering")


def test_the_picture_of_learning_is_of_its_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The script stops where the page has both smoothed levels, and draws them."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
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
