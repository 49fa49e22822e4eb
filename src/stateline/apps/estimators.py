"""SequenceClassifier and SequenceRegressor: scikit-learn's estimators of whole signals, which also answer as they go.

    X       a list of (time, channel) arrays of any lengths, or one array (n, time, channel); (n, time) has one channel
    y       a class a signal, or one or more numbers
    NaN     a missing value: the model reads 0, the channel's mean, and a further channel that says so

Needs scikit-learn (extra `sklearn`); nothing else of stateline does.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from stateline import checks
from stateline.apps.estimator_base import DEFAULT_MIXER, Sequences
from stateline.apps.estimator_data import Floats, as_series, standard
from stateline.apps.estimator_files import labels_from_json, labels_to_json
from stateline.apps.sklearn_names import (
    ClassifierMixin,
    RegressorMixin,
    check_array,
    check_classification_targets,
    check_consistent_length,
    column_or_1d,
    compute_class_weight,
)

__all__ = ["SequenceClassifier", "SequenceRegressor"]


class SequenceClassifier(ClassifierMixin, Sequences):
    """Which class a signal belongs to, by a state space model; scikit-learn's interface.

    Args:
        mixer: what reads the signal, a name of `stateline.models.MIXERS`; mixer_args: its arguments.
        d_model, n_layer: width and depth.   pool: "mean", "max", "mean_max" or "last" of what is read.
        norm: of the layers, "batch" or "layer"; "batch" leaves amplitudes as they are.
        own_scale: read each signal also standardised by what it was so far, and its level.
        bidirectional: read from both ends; more accurate on some signals, and then there is no `stream`.
        dropout: in training, whole channels of what a layer writes.
        max_epochs, batch_size: None chooses them from the number of series.   batch_tokens: samples a batch at most.
        learning_rate, weight_decay: AdamW's, after a warm-up and along a cosine.
        crop: a step of training reads of each signal only a piece from anywhere, this share of it, another each time;
            against learning few long signals by heart, where a piece tells what the whole is.
        early_stopping: hold `validation_fraction` out, balanced over the classes, and keep the weights of the epoch
            that is best there; "auto" does where that part has 50 series and 5 a class. patience: epochs without a
            better one after which training ends; None: never.
        class_weight: None, "balanced", or {class: weight}.
        label_smoothing: share of each target that goes to all classes alike.
        warm_start: `fit` goes on from the weights there are, with the same classes and channels.
        device: None is CUDA if there is one, else the CPU.   random_state: the same gives the same bits.
        verbose: 1 shows a bar, or lines where there is no terminal.

    Fitted: classes_, n_features_in_ (channels), history_ (a dict an epoch), best_epoch_, interrupted_, model_, and
    metadata_ (JSON values of yours that `save` writes too). Ctrl-C ends `fit` after the first epoch without an error:
    the best weights so far are kept, and a warning says so.

    >>> X = [np.sin(np.arange(30 + i) * (0.3 if i % 2 else 0.6)) for i in range(12)]
    >>> model = SequenceClassifier(d_model=16, max_epochs=20, random_state=0).fit(X, [0, 1] * 6)
    >>> model.predict(X[:2])
    array([0, 1])
    """

    classes_: NDArray[Any]

    def __init__(
        self,
        mixer: str = DEFAULT_MIXER,
        *,
        mixer_args: dict[str, Any] | None = None,
        d_model: int = 64,
        n_layer: int = 2,
        pool: str = "mean",
        norm: str = "batch",
        own_scale: bool = True,
        bidirectional: bool = False,
        dropout: float = 0.1,
        max_epochs: int | None = None,
        batch_size: int | None = None,
        batch_tokens: int = 65536,
        learning_rate: float = 1e-2,
        weight_decay: float = 0.01,
        crop: float = 1.0,
        early_stopping: bool | str = "auto",
        validation_fraction: float = 0.1,
        patience: int | None = None,
        class_weight: dict[Any, float] | str | None = None,
        label_smoothing: float = 0.0,
        warm_start: bool = False,
        device: str | None = None,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(
            mixer,
            mixer_args=mixer_args,
            d_model=d_model,
            n_layer=n_layer,
            pool=pool,
            norm=norm,
            own_scale=own_scale,
            bidirectional=bidirectional,
            dropout=dropout,
            max_epochs=max_epochs,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            crop=crop,
            early_stopping=early_stopping,
            validation_fraction=validation_fraction,
            patience=patience,
            warm_start=warm_start,
            device=device,
            random_state=random_state,
            verbose=verbose,
        )
        self.class_weight = class_weight
        self.label_smoothing = label_smoothing

    def fit(self, X: Any, y: Any) -> Self:
        """Learn from signals X and their classes y (n)."""
        series = as_series("fit", X)
        if y is None:
            raise checks.fail("fit", "requires y to be passed, but the target y is None.", "Give a class a signal.")
        y = column_or_1d(y, warn=True)
        check_consistent_length(series, y)
        check_classification_targets(y)
        classes = np.unique(y)
        if self.warm_start and hasattr(self, "model_"):
            if not np.isin(classes, self.classes_).all():
                raise checks.fail("fit", "y has classes that the first fit did not.", "Set warm_start=False.")
            classes = self.classes_
        if len(classes) < 2:
            raise checks.fail("fit", f"y has one class, {checks.plain(classes[0])!r}, expected at least two.")
        checks.number("fit", "label_smoothing", self.label_smoothing, low=0, high=0.95)
        self.classes_ = classes
        encoded = np.searchsorted(classes, y)
        self._weight = None
        if self.class_weight:
            weight = compute_class_weight(self.class_weight, classes=classes, y=y)
            # of mean 1 over the series: dividing by a batch's own sum would take back what the weights are for
            self._weight = torch.tensor(weight / weight[encoded].mean(), dtype=torch.float32)
        self._fit(series, torch.from_numpy(encoded), encoded)
        return self

    def predict_proba(self, X: Any) -> Floats:
        """The probability of each class of `classes_`, (n, n_classes)."""
        return self._predicted(X)

    def predict(self, X: Any) -> NDArray[Any]:
        """The most probable class of each signal, (n)."""
        probabilities = self._predicted(X)
        return np.asarray(self.classes_[probabilities.argmax(1)])

    def _loss(self, answer: Tensor, target: Tensor) -> Tensor:
        smooth = float(self.label_smoothing)
        if self._weight is None:
            return F.cross_entropy(answer, target, label_smoothing=smooth)
        weight = self._weight.to(answer.device)
        return F.cross_entropy(answer, target, weight=weight, reduction="sum", label_smoothing=smooth) / len(target)

    def _score(self, answer: Tensor, target: Tensor) -> float:
        return float((answer.argmax(1) == target).double().mean())

    def _outputs_of(self, targets: Tensor) -> int:
        return len(self.classes_)

    def _outputs(self, answer: Tensor) -> Floats:
        return answer.double().softmax(1).numpy()

    def _record(self) -> dict[str, Any]:
        return super()._record() | {"classes": labels_to_json(self.classes_)}

    def _restore(self, record: dict[str, Any]) -> None:
        super()._restore(record)
        self.classes_ = labels_from_json(record["classes"])


class SequenceRegressor(RegressorMixin, Sequences):
    """One or more numbers about a signal, by a state space model; scikit-learn's interface.

    Arguments and attributes are SequenceClassifier's, without those about classes. Targets are standardised for
    training, by their squared error, and come back as they were; y (n) or (n, n_targets).

    >>> X = [np.sin(np.arange(40) * f) for f in np.linspace(0.2, 0.8, 12)]
    >>> model = SequenceRegressor(d_model=16, max_epochs=40, random_state=0).fit(X, np.linspace(0.2, 0.8, 12))
    >>> model.score(X, np.linspace(0.2, 0.8, 12)) > 0.5
    True
    """

    target_mean_: Floats
    target_scale_: Floats
    _flat: bool

    def fit(self, X: Any, y: Any) -> Self:
        """Learn from signals X and their targets y, (n) or (n, n_targets)."""
        series = as_series("fit", X)
        if y is None:
            raise checks.fail("fit", "requires y to be passed, but the target y is None.", "Give a number a signal.")
        y = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
        check_consistent_length(series, y)
        wide = y.reshape(len(y), -1)
        again = self.warm_start and hasattr(self, "model_")
        if again and (wide.shape[1] != len(self.target_mean_) or (y.ndim == 1) != self._flat):
            raise checks.fail("fit", f"y has shape {y.shape}, the first fit's was another.", "Set warm_start=False.")
        if not again:
            self._flat = y.ndim == 1
            self.target_mean_, self.target_scale_ = standard([wide])
        self._fit(
            series,
            torch.from_numpy((wide - self.target_mean_) / self.target_scale_).float(),
            np.zeros(len(y), dtype=np.int64),
        )
        return self

    def predict(self, X: Any) -> Floats:
        """The targets of each signal, (n) or (n, n_targets) as y was."""
        found = self._predicted(X)
        return found[:, 0] if self._flat else found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _loss(self, answer: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(answer, target)

    def _score(self, answer: Tensor, target: Tensor) -> float:
        return -float(F.mse_loss(answer, target))

    def _outputs_of(self, targets: Tensor) -> int:
        return targets.shape[1]

    def _outputs(self, answer: Tensor) -> Floats:
        return answer.double().numpy() * self.target_scale_ + self.target_mean_

    def _record(self) -> dict[str, Any]:
        scales = {"mean": self.target_mean_.tolist(), "scale": self.target_scale_.tolist(), "flat": self._flat}
        return super()._record() | {"targets": scales}

    def _restore(self, record: dict[str, Any]) -> None:
        super()._restore(record)
        scales = record["targets"]
        self.target_mean_, self.target_scale_ = np.asarray(scales["mean"]), np.asarray(scales["scale"])
        self._flat = bool(scales["flat"])
