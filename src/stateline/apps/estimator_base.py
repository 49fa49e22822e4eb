"""What SequenceClassifier and SequenceRegressor share: their parameters, fitting, streams, and files."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from stateline import checks
from stateline.apps import estimator_files
from stateline.apps.estimator_data import Floats, as_series, held_out, standard
from stateline.apps.sklearn_names import BaseEstimator, check_is_fitted, check_random_state
from stateline.models.sequence import SequenceConfig, SequenceModel
from stateline.training.progress import EpochReporter
from stateline.training.series import FitConfig, Outcome, Series, answers, fit_series

DEFAULT_MIXER = "S4D"
#: Sizes that serve signals, unlike those of a layer in a language model.
MIXER_ARGS: dict[str, dict[str, Any]] = {
    "S4D": {"d_state": 16}, "Mamba2": {"headdim": 16, "d_state": 16}, "Mamba3": {"headdim": 16, "d_state": 16},
}  # fmt: skip
#: early_stopping="auto" holds a part out where it has at least so many series, and so many a class.
HELD_OUT, HELD_OUT_A_CLASS = 50, 5


class SignalStream:
    """Answers about one signal while it arrives, in constant time and memory a sample; made by `estimator.stream()`."""

    def __init__(self, estimator: Sequences) -> None:
        self._estimator = estimator
        self._model: SequenceModel = estimator.model_
        self._read = self._model.input.init_state(1)
        self._state = self._model.init_state(1)

    @property
    def count(self) -> int:
        """Samples read so far."""
        return int(self._state.count)

    def update(self, x: ArrayLike) -> Floats:
        """Read one sample, (channels) or a number for one channel, and return the answer to all read so far: a
        probability a class, (n_classes), or the targets, (n_targets)."""
        given = np.reshape(np.asarray(x, dtype=np.float64), (1, -1))
        if np.isinf(given).any():  # it would stay in the state for ever
            raise checks.fail("update", "x has infinite values.", "Make them NaN, which is a missing value.")
        sample = self._next("update", given)
        return self._answer(self._model.step_(sample[:, 0], self._state))

    def extend(self, X: ArrayLike) -> Floats:
        """Read one sample or more at once, (time, channel) or (time), and return the answer after the last."""
        piece = self._next("extend", as_series("extend", [X])[0])
        with torch.no_grad():
            answer, self._state = self._model.extend(piece, self._state)
        return self._answer(answer)

    def copy(self) -> SignalStream:
        """A stream that goes on from here by itself."""
        twin = copy.copy(self)
        twin._read, twin._state = copy.deepcopy((self._read, self._state))
        return twin

    def _next(self, op: str, x: Floats) -> Tensor:
        self._estimator._check_inputs(op, [x])
        read, self._read = self._model.input.extend(
            torch.tensor(x, device=self._model.head.weight.device)[None], self._read
        )
        return read

    def _answer(self, answer: Tensor) -> Floats:
        return self._estimator._outputs(answer.cpu())[0]


class Sequences(BaseEstimator):
    """What the two estimators share: their parameters, signals in, fitting, streams, files."""

    model_: Any  # a SequenceModel, once fitted
    n_features_in_: int
    metadata_: dict[str, Any]

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
        warm_start: bool = False,
        device: str | None = None,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.mixer = mixer
        self.mixer_args = mixer_args
        self.d_model = d_model
        self.n_layer = n_layer
        self.pool = pool
        self.norm = norm
        self.own_scale = own_scale
        self.bidirectional = bidirectional
        self.dropout = dropout
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.crop = crop
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.warm_start = warm_start
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def stream(self) -> SignalStream:
        """A SignalStream at the start of a signal. Raises TypeError for a bidirectional model, which looks ahead."""
        check_is_fitted(self, "model_")
        if self.model_.config.bidirectional:
            problem = "the model is bidirectional, so it reads a signal from its end too."
            raise checks.fail("stream", problem, "Fit one with bidirectional=False.", error=TypeError)
        return SignalStream(self)

    def save(self, directory: str | Path) -> None:
        """Write the fitted estimator to a directory, model.safetensors and config.json, whole or not at all."""
        check_is_fitted(self, "model_")
        estimator_files.save(self, directory)

    @classmethod
    def load(cls, directory: str | Path, *, device: str | None = None) -> Self:
        """The estimator that `save` wrote; no pickle is read. device: where it computes; None: CUDA if there is one.

        Raises CheckpointError naming the file that is missing, damaged or of another kind.
        """
        return estimator_files.load(cls, directory, device)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.input_tags.allow_nan = True
        return tags

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        if "model_" in state:  # a pickle opens on machines without this one's devices
            state["model_"] = copy.deepcopy(state["model_"]).to("cpu")
        return state

    def _chosen(self) -> dict[str, Any]:
        """The parameters, as Python's own numbers: searches over a grid set NumPy's."""
        return {name: checks.plain(value) for name, value in self.get_params(deep=False).items()}

    def _device(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def _make_model(self, config: SequenceConfig) -> torch.nn.Module:
        """The untrained model."""
        return SequenceModel(config)

    def _fit(self, series: list[Floats], targets: Tensor, groups: NDArray[np.int64]) -> None:
        """Fit `model_` to signals and their targets; groups are those a held-out part is balanced over."""
        goes_on = self.warm_start and hasattr(self, "model_")
        try:
            outcome = self._train(series, targets, groups)
        except BaseException:
            if not goes_on:  # a model that is not fitted to the end, or to other classes, must not answer
                self.__dict__.pop("model_", None)
            raise
        self.history_, self.best_epoch_, self.interrupted_ = outcome.history, outcome.best, outcome.interrupted
        if outcome.interrupted:
            warnings.warn(
                f"fit: interrupted after {len(outcome.history)} epochs; the weights of epoch {outcome.best} are kept."
                " To go on, set warm_start=True and fit again.",
                RuntimeWarning,
                stacklevel=3,
            )

    def _train(self, series: list[Floats], targets: Tensor, groups: NDArray[np.int64]) -> Outcome:
        random = check_random_state(self.random_state)
        chosen = self._chosen()
        fit = FitConfig(
            chosen["max_epochs"], chosen["batch_size"], chosen["batch_tokens"], chosen["learning_rate"],
            chosen["weight_decay"], chosen["patience"], crop=chosen["crop"],
        )  # fmt: skip
        held = self._split(groups, random)
        seed = int(random.randint(2**31 - 1))
        device = self._device()
        cuda = [device.index or 0] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed)
            self._prepare_model(series, held, targets)
            self.model_.to(device)
            inputs = self._inputs("fit", series)

            def part(mask: NDArray[np.bool_]) -> Series:
                at = np.flatnonzero(mask)
                return Series([inputs[i] for i in at], targets[torch.from_numpy(at)])

            with EpochReporter(self.verbose) as report:
                return fit_series(
                    self.model_,
                    part(~held),
                    part(held) if held.any() else None,
                    self._loss,
                    fit,
                    score=self._score,
                    generator=torch.Generator().manual_seed(seed),
                    report=report,
                )

    def _split(self, groups: NDArray[np.int64], random: np.random.RandomState) -> NDArray[np.bool_]:
        """Which series early stopping holds out."""
        chosen = self._chosen()
        stopping, fraction = chosen["early_stopping"], chosen["validation_fraction"]
        checks.choice("fit", "early_stopping", stopping, (True, False, "auto"))
        checks.number("fit", "validation_fraction", fraction, low=0, high=0.5, open_low=True)
        n = len(groups)
        needed = max(HELD_OUT, HELD_OUT_A_CLASS * len(np.unique(groups)))
        enough = n * fraction >= needed
        if stopping is False or (stopping == "auto" and not enough):
            return np.zeros(n, dtype=bool)
        held = held_out(groups, fraction, random)
        if not held.any():
            problem = f"early_stopping=True holds {fraction} of {n} series out, which is none."
            raise checks.fail("fit", problem, "Hold out a larger validation_fraction.")
        return held

    def _prepare_model(self, series: list[Floats], held: NDArray[np.bool_], targets: Tensor) -> None:
        """Make `model_`, or keep the one there is under warm_start."""
        channels = series[0].shape[1]
        if self.warm_start and hasattr(self, "model_"):
            return
        chosen = self._chosen()
        shared = ("d_model", "n_layer", "mixer", "pool", "norm", "own_scale", "bidirectional", "dropout")
        made = SequenceConfig(
            channels,
            self._outputs_of(targets),
            mixer_args=MIXER_ARGS.get(self.mixer, {}) if self.mixer_args is None else self.mixer_args,
            missing=any(bool(np.isnan(x).any()) for x in series),
            **{name: chosen[name] for name in shared},
        )
        self.model_ = self._make_model(made)
        self.n_features_in_, self.metadata_ = channels, {}
        mean, scale = standard([x for x, out in zip(series, held, strict=True) if not out])
        self.model_.input.mean.copy_(torch.from_numpy(mean))
        self.model_.input.scale.copy_(torch.from_numpy(scale))

    def _inputs(self, op: str, series: list[Floats]) -> list[Tensor]:
        """What the model reads of signals, on the CPU."""
        self._check_inputs(op, series)
        reads = copy.deepcopy(self.model_.input).cpu()
        # a copy of what is read-only, such as a memory map: torch would warn that it could be written
        arrays = (x if x.flags.writeable else x.copy() for x in series)
        return [reads.extend(torch.from_numpy(x)[None])[0][0] for x in arrays]

    def _check_inputs(self, op: str, series: list[Floats]) -> None:
        channels = series[0].shape[1]
        if channels != self.n_features_in_:
            name = type(self).__name__
            noun = "channel" if channels == 1 else "channels"
            remedy = "A single signal (time, channel) is a list of one: [x]." if channels == 1 else ""
            raise checks.fail(op, f"X has {channels} {noun}, but {name} is expecting {self.n_features_in_}.", remedy)
        if not self.model_.config.missing and any(bool(np.isnan(x).any()) for x in series):
            remedy = "Fill them, or fit on signals with some missing values."
            raise checks.fail(op, "X has missing values (NaN), and the signals of the first fit had none.", remedy)

    def _predicted(self, X: Any) -> Floats:
        check_is_fitted(self, "model_")
        inputs = self._inputs("predict", as_series("predict", X))
        self.model_.to(self._device())
        return self._outputs(answers(self.model_, inputs, FitConfig(batch_tokens=self.batch_tokens)))

    def _record(self) -> dict[str, Any]:
        """What was fitted beside the model, ready for JSON."""
        kept = {"n_features_in": self.n_features_in_, "history": self.history_, "best_epoch": self.best_epoch_}
        return kept | {"interrupted": self.interrupted_, "metadata": self.metadata_}

    def _restore(self, record: dict[str, Any]) -> None:
        """Take in what `_record` gave."""
        self.n_features_in_ = int(record["n_features_in"])
        self.history_, self.best_epoch_ = list(record["history"]), int(record["best_epoch"])
        self.interrupted_, self.metadata_ = bool(record["interrupted"]), dict(record["metadata"])

    # what the two differ in

    def _loss(self, answer: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    def _score(self, answer: Tensor, target: Tensor) -> float:
        raise NotImplementedError

    def _outputs_of(self, targets: Tensor) -> int:
        raise NotImplementedError

    def _outputs(self, answer: Tensor) -> Floats:
        raise NotImplementedError
