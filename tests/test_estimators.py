"""SequenceClassifier and SequenceRegressor: scikit-learn's own checks, and what signals ask for beyond them."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils.estimator_checks import estimator_checks_generator

from stateline import SequenceClassifier, SequenceRegressor
from stateline.apps.estimator_data import held_out, standard
from stateline.interop import CheckpointError
from stateline.training import series
from stateline.training.progress import EpochReporter

SMALL: dict[str, Any] = {
    "d_model": 8,
    "n_layer": 1,
    "mixer_args": {"d_state": 4},
    "learning_rate": 0.02,
    "random_state": 0,
}

COLUMNS = (
    "the columns of a 2-D X are time steps: n_features_in_ counts channels, and signals of other lengths are welcome"
)
#: Checks of scikit-learn that do not hold, and why.
FAILED = {
    "check_n_features_in": COLUMNS,
    "check_n_features_in_after_fitting": COLUMNS,
    "check_classifiers_train": COLUMNS,
    "check_regressors_train": "it asks for a good fit of columns without order, of which one matters: no signal",
}
#: One epoch is too little for these; the full tests train longer.
UNTRAINED = {"check_class_weight_classifiers": "it asks what a model learnt"}


def wave(n: int, slow: bool, channels: int = 2) -> np.ndarray[Any, Any]:
    phase = np.arange(n)[:, None] * (0.2 if slow else 0.7) + np.arange(channels)
    return np.sin(phase + np.random.default_rng(n).normal(0, 0.1, (n, channels)))


@pytest.fixture(scope="module")
def signals() -> tuple[list[Any], np.ndarray[Any, Any]]:
    """Forty signals of 20 to 59 samples, two channels; slow ones and fast ones."""
    return [wave(20 + i, i % 2 == 0) for i in range(40)], np.array(["slow", "fast"] * 20)


@pytest.fixture(scope="module")
def fitted(signals: Any) -> SequenceClassifier:
    return SequenceClassifier(**SMALL, max_epochs=15).fit(*signals)


# ---- scikit-learn's checks -------------------------------------------------------------------------------------------


def name_of(check: Any) -> str:
    return check.func.__name__ if isinstance(check, partial) else check.__name__


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@pytest.mark.parametrize("kind", [SequenceClassifier, SequenceRegressor])
@pytest.mark.parametrize("epochs", [1, pytest.param(6, marks=pytest.mark.full)])
def test_check_estimator(kind: type, epochs: int) -> None:
    """Every check passes but the listed; and the listed do fail, or they would be struck from the list."""
    excused = FAILED | (UNTRAINED if epochs == 1 else {})
    failed: dict[str, str] = {}
    for estimator, check in estimator_checks_generator(kind(**SMALL, max_epochs=epochs)):
        try:
            check(estimator)
        except pytest.skip.Exception:
            continue
        except Exception as error:
            if type(error).__name__ == "SkipTest":  # of what is not installed, such as pandas
                continue
            failed[name_of(check)] = str(error)
    assert not {name: why for name, why in failed.items() if name not in excused}
    ours = [name_of(check) for _, check in estimator_checks_generator(kind(**SMALL))]
    assert set(failed) == set(excused) & set(ours)


def test_it_works_in_scikit_learns_tools(signals: Any) -> None:
    X, y = np.stack([x[:20] for x in signals[0]]), signals[1]
    model = SequenceClassifier(**SMALL, max_epochs=6)
    assert cross_val_score(model, X, y, cv=2).mean() > 0.8
    search = GridSearchCV(model, {"pool": ["mean", "max"]}, cv=2).fit(X, y)
    assert search.best_score_ > 0.8
    twin = clone(search.best_estimator_)
    assert not hasattr(twin, "model_")
    assert twin.get_params() == search.best_estimator_.get_params()


def test_numbers_of_numpy_are_numbers(signals: Any, tmp_path: Path) -> None:
    """As searches over arrays and distributions set them."""
    X, y = np.stack([x[:20] for x in signals[0]]), signals[1]
    few = {
        "d_model": np.array([8]), "max_epochs": np.array([2]), "bidirectional": np.array([True]),
        "learning_rate": np.float32([0.01]), "early_stopping": np.array([False]), "verbose": np.array([0]),
    }  # fmt: skip
    best = GridSearchCV(SequenceClassifier(n_layer=1), few, cv=2, error_score="raise").fit(X, y).best_estimator_
    best.save(tmp_path)
    assert SequenceClassifier.load(tmp_path).predict(X).tolist() == best.predict(X).tolist()


def test_a_stream_refuses_what_would_stay_in_its_state(fitted: SequenceClassifier, signals: Any) -> None:
    stream, same = fitted.stream(), fitted.stream()
    for read in (stream, same):
        read.extend(signals[0][0][:5])
    with pytest.raises(ValueError, match=r"update: x has infinite values\. Make them NaN"):
        stream.update([np.inf, 0])
    assert stream.update([0, 0]).tolist() == same.update([0, 0]).tolist()


# ---- what signals ask for --------------------------------------------------------------------------------------------


def test_signals_of_any_length_are_told_apart(fitted: SequenceClassifier, signals: Any) -> None:
    new = [wave(n, n % 2 == 1) for n in range(20, 60)]  # each length with the other answer
    assert (fitted.predict(new) == np.where(np.arange(20, 60) % 2 == 1, "slow", "fast")).all()
    assert fitted.classes_.tolist() == ["fast", "slow"]
    assert fitted.n_features_in_ == 2
    assert fitted.score(*signals) == 1
    assert fitted.predict_proba(new).sum(1) == pytest.approx(1)
    assert [h["epoch"] for h in fitted.history_] == list(range(1, 16))


def test_what_lies_beside_a_signal_in_a_batch_does_not_matter(fitted: SequenceClassifier, signals: Any) -> None:
    together = fitted.predict_proba(signals[0])
    alone = np.concatenate([fitted.predict_proba([x]) for x in signals[0]])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_the_running_posterior_is_that_of_the_prefix(fitted: SequenceClassifier, signals: Any) -> None:
    x = signals[0][3]
    stream, pieces = fitted.stream(), fitted.stream()
    for i, sample in enumerate(x):
        got = stream.update(sample)
        np.testing.assert_allclose(got, fitted.predict_proba([x[: i + 1]])[0], atol=1e-5)
    assert stream.count == len(x)
    pieces.extend(x[:11])
    twin = pieces.copy()
    np.testing.assert_allclose(pieces.extend(x[11:]), got, atol=1e-5)
    np.testing.assert_allclose(twin.extend(x[11:]), got, atol=1e-5)  # a copy goes on by itself
    with pytest.raises(ValueError, match=r"X has 1 channel, but .* is expecting 2\. A single signal .* a list of one"):
        fitted.predict(signals[0][0])
    with pytest.raises(ValueError, match="X has 3 channels, but SequenceClassifier is expecting 2"):
        stream.update([1, 2, 3])


def test_a_bidirectional_model_refuses_to_stream(signals: Any) -> None:
    model = SequenceClassifier(**SMALL, max_epochs=10, bidirectional=True).fit(*signals)
    assert model.score(*signals) > 0.9
    with pytest.raises(TypeError, match=r"stream: the model is bidirectional.*bidirectional=False"):
        model.stream()


def test_shapes_that_mean_the_same_give_the_same(signals: Any) -> None:
    X, y = np.stack([x[:20, 0] for x in signals[0]]), signals[1]
    model = SequenceClassifier(**SMALL, max_epochs=2)
    answers = [model.fit(Z, y).predict_proba(Z) for Z in (X, X[:, :, None], list(X), X.tolist(), list(X[:, :, None]))]
    assert all((a == answers[0]).all() for a in answers)
    assert model.n_features_in_ == 1


def test_missing_values_are_marked_and_not_guessed(signals: Any) -> None:
    X, y = [x.copy() for x in signals[0]], signals[1]
    for x in X:
        x[np.random.default_rng(len(x)).random(x.shape) < 0.3] = np.nan
    model = SequenceClassifier(**SMALL, max_epochs=15).fit(X, y)
    assert model.model_.config.missing
    assert model.score(X, y) > 0.9
    assert model.stream().update([np.nan, 1.0]).sum() == pytest.approx(1)
    with pytest.raises(ValueError, match=r"the signals of the first fit had none\. Fill them, or fit"):
        SequenceClassifier(**SMALL, max_epochs=1).fit(*signals).predict(X)


def test_channels_are_standardised_by_the_training_data_alone() -> None:
    X = [np.array([[1e6, np.nan, 3.0], [1e6 + 2, np.nan, 3.0]]), np.array([[1e6 + 4, np.nan, 3.0]])]
    mean, scale = standard(X)
    assert mean.tolist() == [1e6 + 2, 0, 3]
    assert scale == pytest.approx([np.sqrt(8 / 3), 1, 1])
    model = SequenceClassifier(**SMALL, max_epochs=1, early_stopping=True, validation_fraction=0.5)
    groups = np.arange(8) % 2
    held = held_out(groups, 0.5, np.random.RandomState(0))
    big = [np.full((3, 1), 100.0 if out else i) for i, out in enumerate(held)]
    model.fit(big, groups)
    assert float(model.model_.input.mean) == np.flatnonzero(~held).mean()


def test_the_held_out_part_is_balanced_and_leaves_every_class() -> None:
    groups = np.repeat([0, 1, 2], [100, 40, 2])
    held = held_out(groups, 0.1, np.random.RandomState(3))
    assert [int(held[groups == g].sum()) for g in range(3)] in ([10, 4, 0], [10, 4, 1], [10, 3, 1])
    assert not held_out(np.arange(5), 0.5, np.random.RandomState(0)).any()  # never all of a class


def test_early_stopping_keeps_the_best_epoch(signals: Any) -> None:
    model = SequenceClassifier(**SMALL, max_epochs=30, early_stopping=True, validation_fraction=0.25, patience=3)
    model.fit(*signals)
    scores = [(h["held_out_score"], -h["held_out_loss"]) for h in model.history_]
    assert model.best_epoch_ == 1 + max(range(len(scores)), key=scores.__getitem__)
    assert "held_out_score" not in SequenceClassifier(**SMALL, max_epochs=1).fit(*signals).history_[0]
    with pytest.raises(ValueError, match=r"which is none\. Hold out a larger"):
        SequenceClassifier(early_stopping=True, validation_fraction=0.01).fit(*signals)


def test_rare_classes_count_when_weighted() -> None:
    rng = np.random.default_rng(0)
    y = np.array([0] * 57 + [1] * 3)
    X = rng.normal(size=(60, 8)) + 0.2 * y[:, None]
    found = [
        SequenceClassifier(**SMALL, max_epochs=8, class_weight=weight).fit(X, y).predict_proba(X)[:, 1].mean()
        for weight in (None, {0: 1, 1: 5}, "balanced")
    ]
    assert found[0] < found[1] < found[2]


def test_smoothed_labels_are_learnt_with_less_confidence(signals: Any) -> None:
    X, y = signals
    model = SequenceClassifier(**SMALL, max_epochs=15)
    sure, smooth, weighted = (
        model.set_params(label_smoothing=share, class_weight=weight).fit(X, y).predict_proba(X).max(1).mean()
        for share, weight in ((0, None), (np.float64(0.4), None), (0.4, "balanced"))
    )
    assert sure > 0.9 > 0.87 > smooth > 0.65  # 1 − 0.4 / 2 is asked for
    assert weighted == pytest.approx(smooth, abs=1e-3)  # there are as many of each class
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.5"):
        model.set_params(label_smoothing=1.5).fit(X, y)


def test_pieces_of_signals_teach_too(signals: Any) -> None:
    X, y = signals
    model = SequenceClassifier(**SMALL, max_epochs=30, crop=0.6, pool="mean_max")
    one = model.fit(X, y)
    assert one.score(X, y) > 0.9
    assert (clone(model).fit(X, y).predict_proba(X) == one.predict_proba(X)).all()
    stream = one.stream()
    for sample in X[0]:
        answer = stream.update(sample)
    np.testing.assert_allclose(answer, one.predict_proba(X[:1])[0], atol=1e-5)


def test_a_seed_gives_the_same_bits_and_leaves_the_callers_alone(signals: Any) -> None:
    torch.manual_seed(5)
    model = SequenceClassifier(**SMALL, max_epochs=3)
    one = model.fit(*signals).predict_proba(signals[0])
    drawn = torch.rand(1)
    torch.manual_seed(6)
    assert (clone(model).fit(*signals).predict_proba(signals[0]) == one).all()
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    assert (clone(model).set_params(random_state=1).fit(*signals).predict_proba(signals[0]) != one).any()


def test_warm_start_goes_on(signals: Any) -> None:
    X, y = signals
    model = SequenceClassifier(**SMALL, max_epochs=12, warm_start=True).fit(X, y)
    first, weights = model.history_[-1]["loss"], model.model_.head.weight.clone()
    model.fit(X[:20], y[:20])
    assert model.history_[0]["loss"] < 2 * first < 0.3
    assert not torch.equal(model.model_.head.weight, weights)
    with pytest.raises(ValueError, match="y has classes that the first fit did not"):
        model.fit(X, np.array(["slow", "other"] * 20))
    with pytest.raises(ValueError, match="X has 1 channel, but SequenceClassifier is expecting 2"):
        model.fit([x[:, :1] for x in X], y)


def test_a_fit_that_fails_leaves_nothing_that_answers(signals: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = signals
    model = SequenceClassifier(**SMALL, max_epochs=1).fit(X, y)
    with pytest.raises(ValueError, match="mixer is 'LSTM'"):
        model.set_params(mixer="LSTM").fit(X, np.array(["a", "b", "c", "d"] * 10))
    with pytest.raises(NotFittedError):
        model.predict(X)  # of the first fit's two classes
    model.set_params(mixer="S4D").fit(X, y).set_params(warm_start=True)
    monkeypatch.setattr("stateline.training.series._Fit.epoch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, y)
    assert len(model.predict(X)) == 40  # which went on from a fitted one
    with pytest.raises(KeyboardInterrupt):
        model.set_params(warm_start=False).fit(X, y)
    with pytest.raises(NotFittedError):
        model.stream()


def test_scores_that_are_no_numbers_are_one_clear_error() -> None:
    made = series._Keeper(torch.nn.Linear(1, 1), True, None)
    made.take({"epoch": 1, "held_out_score": float("nan"), "held_out_loss": 1.0})
    with pytest.raises(ValueError, match=r"fit: none of 1 epochs has a score .* early_stopping=False"):
        made.restore()


@pytest.mark.parametrize("mixer", ["Mamba2", "Mamba3", "S5"])
def test_other_mixers_fit_their_width(signals: Any, mixer: str) -> None:
    X, y = signals
    model = SequenceClassifier(**SMALL | {"mixer": mixer, "d_model": 16, "mixer_args": None}, max_epochs=1).fit(
        X[:8], y[:8]
    )
    assert len(model.predict(X[:2])) == 2


def test_ctrl_c_keeps_the_best_weights_and_says_so(signals: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Any, figures: dict[str, float], epochs: int) -> None:
        if figures["epoch"] == 4:
            raise KeyboardInterrupt

    whole = SequenceClassifier(**SMALL, max_epochs=10)
    monkeypatch.setattr(EpochReporter, "__call__", interrupt)
    with pytest.warns(RuntimeWarning, match="interrupted after 4 epochs; the weights of epoch 4 are kept"):
        whole.fit(*signals)
    assert whole.interrupted_
    assert len(whole.predict(signals[0])) == 40
    monkeypatch.setattr("stateline.training.series._Fit.epoch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):  # nothing was learnt yet
        clone(whole).fit(*signals)


@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        ([np.ones((3, 2)), np.ones((3, 1))], [0, 1], "signals of 1 and 2 channels"),
        ([np.ones(3), np.ones(0)], [0, 1], r"X\[1\] is empty"),
        ([np.ones(3), [1, np.inf]], [0, 1], r"Input X\[1\] contains infinity"),
        (np.ones((2, 3, 1, 1)), [0, 1], "expected \\(n, time\\) or \\(n, time, channel\\)"),
        (np.ones((3, 4)), [0, 1], "inconsistent numbers of samples"),
        (np.ones((2, 4)), [1, 1], "y has one class"),
        (np.ones((2, 4)), [0.5, 0.7], "Unknown label type"),
    ],
)
def test_data_that_cannot_work_is_refused(X: Any, y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceClassifier(**SMALL).fit(X, y)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_numbers_are_estimated_in_their_own_units(signals: Any) -> None:
    X = signals[0]
    y = np.c_[1000 + 50.0 * (signals[1] == "slow"), [len(x) for x in X]]
    model = SequenceRegressor(**SMALL, max_epochs=60).fit(X, y)
    assert model.predict(X).shape == (40, 2)
    assert abs(model.predict(X)[:, 0].mean() - 1025) < 5
    assert model.score(X, y) > 0.4
    assert SequenceRegressor(**SMALL, max_epochs=1).fit(X, y[:, 0]).predict(X).shape == (40,)
    np.testing.assert_allclose(model.stream().extend(X[0]), model.predict(X[:1])[0], rtol=1e-4)
    with pytest.raises(ValueError, match="the first fit's was another"):
        model.set_params(warm_start=True).fit(X, y[:, 0])


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [np.array(["a", "b"]), np.array([3, 7]), np.array([True, False])])
def test_saved_estimators_come_back_the_same(signals: Any, tmp_path: Path, labels: Any) -> None:
    y = labels[(signals[1] == "slow").astype(int)]
    weight = {label: 1.0 + i for i, label in enumerate(labels)}
    model = SequenceClassifier(**SMALL, max_epochs=2, class_weight=weight).fit(signals[0], y)
    model.metadata_["rate"] = 50
    model.save(tmp_path / "m")
    again = SequenceClassifier.load(tmp_path / "m")
    assert (again.predict_proba(signals[0]) == model.predict_proba(signals[0])).all()
    assert again.classes_.dtype == model.classes_.dtype
    assert again.get_params() == model.get_params()
    assert again.metadata_ == {"rate": 50}
    assert again.history_ == model.history_
    (tmp_path / "m" / "config.json").unlink()
    SequenceClassifier.load(tmp_path / "m")  # model.safetensors alone is complete
    again.set_params(warm_start=True).fit(signals[0], y)


def test_files_of_others_are_refused(fitted: SequenceClassifier, tmp_path: Path) -> None:
    from stateline import load, save
    from stateline.models import LanguageModel, ModelConfig

    fitted.save(tmp_path / "c")
    with pytest.raises(CheckpointError, match="holds a SequenceClassifier, expected a SequenceRegressor"):
        SequenceRegressor.load(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"load it with stateline\.SequenceClassifier\.load"):
        load(tmp_path / "c")
    save(LanguageModel(ModelConfig(d_model=8, n_layer=1, vocab_size=16)), tmp_path / "l")
    with pytest.raises(CheckpointError, match=r"stateline\.load reads others"):
        SequenceClassifier.load(tmp_path / "l")
    with pytest.raises(ValueError, match="holds a model of another kind"):
        fitted.save(tmp_path / "l")
    data = (tmp_path / "c" / "model.safetensors").read_bytes()
    (tmp_path / "c" / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="is damaged or cut short"):
        SequenceClassifier.load(tmp_path / "c")
    with pytest.raises(CheckpointError, match="is missing"):
        SequenceClassifier.load(tmp_path / "nothing")
    with pytest.raises(NotFittedError):
        SequenceClassifier().save(tmp_path / "n")
    with pytest.raises(ValueError, match="a parameter cannot be written as JSON"):
        clone(fitted).set_params(random_state=np.random.RandomState(0), max_epochs=1).fit(np.eye(4), [0, 1, 0, 1]).save(
            tmp_path / "n"
        )


def test_files_hold_json_and_no_pickle(fitted: SequenceClassifier, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["fitted"]["classes"]["values"] == ["fast", "slow"]


def test_pickles_come_back_the_same(fitted: SequenceClassifier, signals: Any) -> None:
    again = pickle.loads(pickle.dumps(fitted))
    assert (again.predict_proba(signals[0]) == fitted.predict_proba(signals[0])).all()


def test_without_scikit_learn_one_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from stateline import *\nimport stateline\n"
        "try:\n    stateline.SequenceClassifier\n"
        "except ImportError as error:\n    print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'stateline[sklearn]'" in out
