"""Tell a worn machine from a good one by its vibration, first from recordings, then while it runs.

Run: python examples/classify_signals.py      (needs: pip install 'stateline[sklearn]')
"""

from __future__ import annotations

import numpy as np

from stateline import SequenceClassifier


def vibration(rng: np.random.Generator, worn: bool, samples: int) -> np.ndarray:
    """(samples, 2): two sensors; a worn bearing adds short knocks, and some values get lost on the way."""
    time = np.arange(samples)
    phase = rng.uniform(0, 6)
    x = np.stack([np.sin(0.3 * time + phase), np.cos(0.3 * time + phase)], axis=1)
    if worn:
        x[int(rng.integers(0, 20)) :: 20] += 2
    x *= rng.lognormal(0, 1)  # sensors are turned up and down
    x += 0.2 * x.std() * rng.normal(size=x.shape)
    x[rng.random(x.shape) < 0.02] = np.nan
    return x


def main() -> None:
    """Learn from 80 recordings of different lengths, test on 40 others, then follow one sample by sample."""
    rng = np.random.default_rng(0)
    worn = rng.random(120) < 0.5
    X = [vibration(rng, bool(w), int(rng.integers(80, 160))) for w in worn]
    y = np.where(worn, "worn", "good")

    model = SequenceClassifier(d_model=16, max_epochs=15, random_state=0, verbose=1)
    model.fit(X[:80], y[:80])
    print(f"{100 * model.score(X[80:], y[80:]):.0f} % of 40 new recordings are recognised")

    stream, column = model.stream(), list(model.classes_).index("worn")
    for sample in vibration(rng, True, 120):
        probability = stream.update(sample)[column]
        if stream.count % 20 == 0:
            print(f"after {stream.count:3d} samples: worn with probability {probability:.2f}")


if __name__ == "__main__":
    main()
