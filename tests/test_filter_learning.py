"""What `stateline filter` learns: published values, and columns side by side that are what they are alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_filter_cli import walk

from stateline.apps import filtering
from stateline.apps.filtering import SeriesFilter, series_of


def test_the_nile_has_its_published_variances() -> None:
    """Durbin & Koopman 2012, section 2.10: 15,099 and 1,469.1."""
    flow = [
        1120, 1160, 963, 1210, 1160, 1160, 813, 1230, 1370, 1140, 995, 935, 1110, 994, 1020, 960, 1180, 799, 958, 1140,
        1100, 1210, 1150, 1250, 1260, 1220, 1030, 1100, 774, 840, 874, 694, 940, 833, 701, 916, 692, 1020, 1050, 969,
        831, 726, 456, 824, 702, 1120, 1100, 832, 764, 821, 768, 845, 864, 862, 698, 845, 744, 796, 1040, 759, 781, 865,
        845, 944, 984, 897, 822, 1010, 771, 676, 649, 846, 812, 742, 801, 1040, 860, 874, 848, 890, 744, 749, 838, 1050,
        918, 986, 797, 923, 975, 815, 1020, 906, 901, 1170, 912, 746, 919, 718, 714, 740,
    ]  # fmt: skip
    found = SeriesFilter("local-level").fit(series_of(flow)).variances
    assert found["noise"][0] == pytest.approx(15099, rel=1e-3)
    assert found["level"][0] == pytest.approx(1469.1, rel=1e-3)


def test_columns_differ_and_axes_share(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.cat([walk(300), 100 * walk(300, seed=3)], 1)
    apart = SeriesFilter("local-level").fit(series_of(values)).variances
    assert apart["noise"][1] > 1000 * apart["noise"][0]
    together = SeriesFilter("constant-velocity").fit(series_of(values)).variances
    assert [len(v) for v in together.values()] == [1, 1]
    for times in (None, torch.rand(300, generator=torch.Generator().manual_seed(1)).double().cumsum(0).tolist()):
        series = series_of(values, times)
        side_by_side = SeriesFilter("local-trend").fit(series).variances
        with monkeypatch.context() as patch:
            patch.setattr(filtering, "ROOM", 1)  # one after another
            apart = SeriesFilter("local-trend").fit(series).variances
            assert apart == {name: pytest.approx(values, rel=1e-9) for name, values in side_by_side.items()}
        for c in (0, 1):
            alone = SeriesFilter("local-trend").fit(series_of(values[:, c : c + 1], times)).variances
            assert alone == {name: [pytest.approx(v[c], rel=1e-9)] for name, v in side_by_side.items()}


def test_many_columns_are_learnt_by_as_many_filterings_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, good = [0], filtering.kalman_filter

    def counted(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        return good(*arguments, **options)

    monkeypatch.setattr(filtering, "kalman_filter", counted)
    counts = []
    for columns in (1, 40):
        calls[0] = 0
        SeriesFilter("local-level").fit(series_of(walk(80, columns)))
        counts.append(calls[0])
    assert counts[1] < 3 * counts[0]


def test_uneven_times_are_learnt_from_as_rows_that_are_missing() -> None:
    """Of even rows of which most were dropped: with times, what the whole file with gaps tells."""
    values = walk(400).clone()
    drop = torch.rand(400, generator=torch.Generator().manual_seed(5)) < 0.4
    drop[[0, 1, -1]] = False
    values[drop] = torch.nan
    times = torch.arange(400.0)
    whole = SeriesFilter("local-level", step=1.0).fit(series_of(values, times.tolist())).variances
    kept = series_of(values[~drop], times[~drop].tolist())
    some = SeriesFilter("local-level", step=1.0).fit(kept).variances
    assert some == {name: pytest.approx(found, rel=1e-4) for name, found in whole.items()}


def test_a_step_without_times_is_refused() -> None:
    with pytest.raises(ValueError, match="step is 2, and the series has no times"):
        SeriesFilter("local-level", step=2.0).fit(walk())


@pytest.mark.parametrize("model", ["local-trend", "local-trend+oscillator:30"])
def test_what_is_learnt_is_as_likely_as_what_was_known(model: str) -> None:
    """Of a swing that a slope alone explains: from one start, a search ended 100 nats below, where the level moved."""
    time = torch.arange(150.0, dtype=torch.float64)
    noise, turns = torch.randn(150, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64).mT
    series = series_of(5 * torch.sin(torch.pi * time / 6) + 0.1 * noise + 0.02 * turns.cumsum(0).cumsum(0))
    spec = filtering.described(model)
    known = {name: dict(part) for name, part in spec["components"].items()}
    known["local-trend"] |= {"level": 0.0, "slope": 1.2}
    for part in list(known)[1:]:
        known[part]["wave"] = 0.0
    sensors = SeriesFilter({"components": known, "noise": 0.01}), SeriesFilter(model)
    wanted, found = (sensor.fit(series).extend(series).loglik.sum().item() for sensor in sensors)
    assert found > wanted


@pytest.mark.parametrize(("seed", "period"), [(0, 3), (1, 3), (2, 4)])
def test_what_is_learnt_is_as_likely_as_where_one_thing_stands_still(seed: int, period: int) -> None:
    """More freedom never makes a series less likely; from starts where all moves alike it did, by ten nats."""
    noise, steps = torch.randn(2, 150, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    swing = 2.5 * torch.sin(2 * torch.pi * torch.arange(150.0, dtype=torch.float64) / (2 * period))
    series = series_of(swing + 0.5 * noise + 0.3 * steps.cumsum(0))
    models = [{"kind": "local-trend"}, {"kind": "local-trend", "level": 0.0}, {"kind": "local-trend", "slope": 0.0}]
    sensors = [SeriesFilter({"components": {"trend": part}}).fit(series) for part in models]
    free, *held = (sensor.extend(series).loglik.sum().item() for sensor in sensors)
    assert free > max(held) - 0.01
