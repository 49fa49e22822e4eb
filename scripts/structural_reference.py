"""Compute tests/data/structural_reference.json with statsmodels, the outside check of structural models.

    pip install statsmodels==0.15.0
    python scripts/structural_reference.py

Series are drawn here; parameters are given, not searched for, except `best`, the log-likelihood that statsmodels' own
search reaches. Start: variance 1e6, as many terms left out as there are diffuse states; no freezing of a converged
filter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

OUT = Path(__file__).resolve().parent.parent / "tests" / "data" / "structural_reference.json"
PRIOR, STEPS = 1e6, 4


def cases() -> dict[str, tuple[dict[str, Any], dict[str, Any], list[float]]]:
    """name: our structure, statsmodels' arguments, variances and coefficients in statsmodels' order."""
    level = {"level": True, "stochastic_level": True, "irregular": True}
    return {
        "local level": ({}, level, [1.5, 0.4]),
        "level and fixed slope": ({"trend": "fixed"}, {**level, "trend": True}, [1.5, 0.4]),
        "level and slope": ({"trend": "walk"}, {**level, "trend": True, "stochastic_trend": True}, [1.5, 0.4, 0.02]),
        "fixed level, AR(1)": (
            {"level": "fixed", "trend": "fixed", "ar": 1},
            {"level": True, "trend": True, "irregular": True, "autoregressive": 1},
            [0.3, 1.2, 0.7],
        ),
        "level, AR(2)": ({"ar": 2}, {**level, "autoregressive": 2}, [0.3, 0.1, 1.2, 0.9, -0.4]),
        "level, season of 12": (
            {"seasonal": [12.0], "trend": "fixed"},
            {
                **level,
                "trend": True,
                "freq_seasonal": [{"period": 12}],
                "stochastic_freq_seasonal": [True],
                "loglikelihood_burn": 13,  # one of its 14 states is never seen
            },
            [1.0, 0.5, 0.03],
        ),
        "level, two waves of 7.5": (
            {"seasonal": [7.5], "harmonics": 2},
            {**level, "freq_seasonal": [{"period": 7.5, "harmonics": 2}], "stochastic_freq_seasonal": [True]},
            [1.0, 0.5, 0.03],
        ),
        "level, two regressors": ({"columns": 2}, {**level, "mle_regression": False}, [1.0, 0.5]),
    }


def main() -> None:
    """Draw, filter, write."""
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    rng = np.random.default_rng(7)
    found = []
    for name, (ours, theirs, params) in cases().items():
        T = 48
        wave = 3 * np.sin(2 * np.pi * np.arange(T) / 12) if ours.get("seasonal") else 0.0
        X = rng.normal(size=(T + STEPS, ours.get("columns", 0))).round(3)
        if X.shape[1]:
            X[:3] = [[1, 0], [0, 1], [-1, -1]]  # the values left out tell both weights
        y = (
            np.cumsum(rng.normal(0.2, 0.6, T))
            + wave
            + rng.normal(0, 1, T)
            + X[:T] @ np.array([1.5, -0.7])[: X.shape[1]]
        )
        y = y.round(3)
        y[[20, 21, 33]] = np.nan
        exog = {"exog": X[:T]} if X.shape[1] else {}
        model = UnobservedComponents(y, **exog, **theirs)
        model.initialize_default(approximate_diffuse_variance=PRIOR)
        model.ssm.tolerance = 0
        result = model.smooth(np.array(params))
        ahead = result.get_forecast(STEPS, **({"exog": X[T:]} if X.shape[1] else {}))
        found.append({
            "name": name, "structure": ours, "names": model.param_names, "params": params,
            "y": [None if np.isnan(v) else v for v in y], "X": X.tolist(), "burn": int(model.loglikelihood_burn),
            "loglik": float(result.llf), "terms": result.llf_obs.tolist(),
            "forecast": ahead.predicted_mean.tolist(), "deviation": ahead.se_mean.tolist(),
            "level": result.level.smoothed.tolist(), "best": float(model.fit(disp=0, maxiter=500).llf),
        })  # fmt: skip
    OUT.write_text(
        json.dumps({"statsmodels": "0.15.0", "prior": PRIOR, "cases": found}, indent=None) + "\n", encoding="utf-8"
    )
    print(f"wrote {OUT.name}: {len(found)} cases")


if __name__ == "__main__":
    main()
