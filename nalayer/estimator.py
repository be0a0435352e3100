"""The noise adaptation layer as a scikit-learn classifier."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import assert_all_finite, check_random_state, column_or_1d
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,
    check_consistent_length,
    check_is_fitted,
    validate_data,
)
from tqdm import tqdm

import kernels
from kernels import LinkIndex, checks, log_softmax
from nalayer.buffers import slices
from nalayer.image_layers import cnn
from nalayer.learned_noise import learned_noise_matrix
from nalayer.model_files import SavedModel, describe, describe_labels, restore, restore_labels
from nalayer.models import CModel, NoiseModel, PlainModel, SModel, c_start, sparse_start
from nalayer.network import Network, mlp
from nalayer.noise_layer import clustered_start, confusion_start, noise_matrix, uniform_start
from nalayer.optimisers import Adam
from nalayer.streams import stream
from nalayer.support import top_support
from nalayer.tensor_file import ModelFileError, read, write
from nalayer.training import require_at_least, run_epoch, train
from nalayer.weighting import WeightedModel, parts_of, weighted_labels

NOISE_MODELS = ("none", "simple", "complex")
"""in the order in which one is started from the other"""
CHOICES = {
    "noise_model": NOISE_MODELS,
    "method": ("joint", "em"),
    "network": ("mlp", "cnn"),
    "initialisation": ("hard", "soft", "clustered", "uniform"),
    "dtype": (None, "float32", "float64"),
    "backend": (None, *kernels.CPU_BACKENDS),
}
BASELINE = "baseline"


@dataclass(frozen=True)
class _Samples:
    """Distinct samples with labels 0..K-1, and what each of them counts for (None: all alike)."""

    x: np.ndarray
    z: np.ndarray
    weights: np.ndarray | None

    @property
    def targets(self) -> np.ndarray:
        """Labels, with weights of mean one where there are any."""
        if self.weights is None:
            return self.z
        return weighted_labels(self.z, self.weights / self.weights.mean())

    def __getitem__(self, chosen: np.ndarray) -> _Samples:
        """Return some of them."""
        weights = None if self.weights is None else self.weights[chosen]
        return _Samples(self.x[chosen], self.z[chosen], weights)


def _distinct(x: np.ndarray, z: np.ndarray, weights: np.ndarray) -> _Samples:
    """Return the samples in an order of their own, equal ones as one with the sum of their weights.

    So a weight of two is the same as two copies, to the bit, and no order of the data matters.
    """
    x = x + x.dtype.type(0)  # -0 becomes 0: equal numbers, equal bytes
    rows = np.concatenate([x, z[:, None].astype(x.dtype)], axis=1)
    # Python sorts 60,000 images as bytes in two seconds; numpy.unique takes seven.
    as_bytes = [row.tobytes() for row in rows]
    order = np.array(sorted(range(z.size), key=as_bytes.__getitem__))
    is_first = np.array([True, *(as_bytes[a] != as_bytes[b] for a, b in pairwise(order))])
    first, total = order[is_first], np.add.reduceat(weights[order], np.flatnonzero(is_first))
    return _Samples(x[first], z[first], None if (total == total[0]).all() else total)


def _held_out(z: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Return which samples to hold out: that share of each class, rounded, and never all of it."""
    chosen = np.zeros(z.size, dtype=bool)
    for label in range(z.max() + 1):
        own = np.flatnonzero(z == label)
        n_held_out = min(int(share * own.size + 0.5), own.size - 1)
        chosen[rng.permutation(own)[: max(n_held_out, 0)]] = True
    return chosen


def _em_parts() -> Any:
    """Return em_baseline's parts for this estimator.

    A plug-in by name: EM is built on top of this package, so this package must not import it.
    """
    return importlib.import_module("em_baseline.estimator_parts")


def _has_noise_layer(estimator: NoiseAdaptationClassifier) -> bool:
    fitted = getattr(estimator, "model_", None)
    name = estimator.noise_model if fitted is None else _noise_model_of(fitted)
    if name == "none":
        raise AttributeError("noise_model='none' believes every label: there is no posterior")
    return True


class NoiseAdaptationClassifier(ClassifierMixin, BaseEstimator):
    r"""A neural classifier for noisy labels, by a noise adaptation layer (Goldberger & Ben-Reuven).

    ``fit`` takes noisy labels z; the estimator predicts the true ones, y. It models
    :math:`p(z=j|x) = \sum_i p(y=i|x)\, \theta_{ij}` (Eqs. 9, 11) with a network for
    :math:`p(y=i|x)`, and maximises the likelihood of the labels that were given (Eq. 12). A network
    is first trained on them as they are (the baseline); its confusion matrix starts the noise
    layer; then both are trained together, or in turn by EM. Predictions leave the noise layer out.

    Parameters
    ----------
    noise_model : {"simple", "complex", "none"}
        "simple": one noise matrix (s-model). "complex": one for every x (c-model, Eq. 8), started
        from a trained simple one with U = 0. "none": the baseline alone.
    n_kept : int, optional
        The paper's l: labels that a class can be seen as, the most frequent ones of the start's
        noise matrix and itself. None keeps all.
    method : {"joint", "em"}
        How network and noise layer are fitted: by gradients of both, or by EM (Eqs. 3-6), which
        for the network and a complex noise layer takes ``inner_epochs`` of gradients a round.
    hidden_layer_sizes : sequence of int
    network : {"mlp", "cnn"}
        "cnn" is :func:`nalayer.cnn`, which has sizes and dropout rates of its own.
    image_shape : (rows, columns, channels), optional
        What a row of X is, for "cnn".
    dropout : float
        Rate after each hidden layer of an "mlp", in [0, 1).
    initialisation : {"hard", "soft", "clustered", "uniform"}
        Start of the noise matrix: :func:`nalayer.confusion_start` (hard or soft),
        :func:`nalayer.clustered_start` or :func:`nalayer.uniform_start`.
    init_noise : float
        Noise of the uniform start, in (0, 1).
    missing_label : label or NaN, optional
        Marks samples that have no label; None means that all have one. Such a sample is left out of
        ``fit``: that *is* the likelihood of what was observed. Its factor is
        :math:`\sum_j p(z=j|x) = 1`, whatever the parameters, provided that a label is not missing
        because of what it would have been.
    batch_size : int
    n_baseline_epochs, n_epochs : int
        Most epochs of the baseline, and of each noise model after it; for EM, of its rounds.
    inner_epochs : int
        Of EM only: epochs of gradients in each M-step.
    damping : float
        Of EM only: how far a simple noise matrix goes towards Eq. 4 in each round, in (0, 1]; 1 is
        the paper's EM.
    early_stopping : bool
        Hold out a part of the samples, with labels as noisy as the others, and keep the parameters
        that have the lowest loss there. False keeps the last ones.
    validation_fraction : float
        Part of each class to hold out, in (0, 1), rounded; one sample of each class stays to be
        trained on. Where nothing is left to hold out, there is no early stopping.
    patience : int
        Stop once this many epochs, or rounds, and one more have brought nothing.
    learning_rate : float
        Adam's step size.
    warm_start : bool
        Go on from where the last ``fit`` ended, for data with the same classes: a further fit of
        the same noise model, or the next one on top of what there is. Settings of the network and
        ``n_kept`` have to stay.
    backend : {"numpy", "numba"}, optional
        Of all kernels; the faster one when None.
    dtype : {"float32", "float64"}, optional
        Of parameters and features; None: float32 if X is, else float64.
    random_state : int, RandomState or None
    verbose : bool
        Show a progress bar.

    Attributes
    ----------
    classes_ : (K,)
        The labels, sorted; :attr:`missing_label` is none of them.
    n_features_in_ : int
    noise_matrix_ : (K, K)
        theta, p(z=j | y=i): **rows are the true class**, columns the observed label
        (:func:`nalayer.to_cleanlab` transposes). For "complex" the mean over the samples
        (:func:`~nalayer.learned_noise.learned_noise_matrix`), for "none" the identity.
    log_likelihood_ : float
        Of the samples trained on: their weighted mean, in nats.
    certificate_ : float or None
        For this network, no noise matrix (with these links) has a ``log_likelihood_`` that is
        larger by more than this (V11). None where the noise model is not "simple".
    history_ : list of dict
        For each epoch: ``stage`` ("baseline" or the noise model), ``epoch`` (0 is the start of a
        stage; for EM, the round), ``loss`` and ``validation_loss`` (nats per sample, at its end,
        without dropout), ``gradients`` and ``seconds`` since the start of the stage.
    n_iter_ : int
        Epochs, or rounds, of the last stage.
    model_ : PlainModel, SModel or CModel
    parameters_ : (n_parameters,)
        The model's, as one flat vector: the paper's w, U and B.

    Notes
    -----
    **Weights.** ``sample_weight`` makes the likelihood a weighted mean, and with it every sum that
    is taken: gradients, confusion matrix, clusters, EM's counts. Only ratios of weights matter.
    Equal samples with equal labels are one sample, with the sum of their weights; an epoch goes
    once through the distinct samples, in an order made from ``random_state`` and the samples
    themselves. Therefore a weight of two does exactly what two copies do, a weight of zero is the
    same as leaving the sample out, and the order of the data does not matter.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(300, 2))
    >>> y = np.where(X[:, 0] > 0, "right", "left")
    >>> noisy_y = np.where(rng.random(300) < 0.2, "right", y)  # a fifth of all said "right"
    >>> clf = NoiseAdaptationClassifier(random_state=0).fit(X, noisy_y)
    >>> bool(clf.score(X, y) > 0.95)
    True
    >>> bool(clf.noise_matrix_[0, 1] > clf.noise_matrix_[1, 0])  # more of "left" said "right"
    True
    """

    classes_: np.ndarray
    noise_matrix_: np.ndarray
    log_likelihood_: float
    certificate_: float | None
    history_: list[dict[str, Any]]
    n_iter_: int
    model_: Any
    parameters_: np.ndarray
    _running: Any  # of partial_fit: Adam's moments and two streams

    def __init__(
        self,
        noise_model: str = "simple",
        *,
        n_kept: int | None = None,
        method: str = "joint",
        hidden_layer_sizes: Any = (128, 64),
        network: str = "mlp",
        image_shape: tuple[int, int, int] | None = None,
        dropout: float = 0.5,
        initialisation: str = "hard",
        init_noise: float = 0.1,
        missing_label: Any = None,
        batch_size: int = 64,
        n_baseline_epochs: int = 60,
        n_epochs: int = 60,
        inner_epochs: int = 5,
        damping: float = 1.0,
        early_stopping: bool = True,
        validation_fraction: float = 0.1,
        patience: int = 10,
        learning_rate: float = 1e-3,
        warm_start: bool = False,
        backend: str | None = None,
        dtype: str | None = None,
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        self.noise_model = noise_model
        self.n_kept = n_kept
        self.method = method
        self.hidden_layer_sizes = hidden_layer_sizes
        self.network = network
        self.image_shape = image_shape
        self.dropout = dropout
        self.initialisation = initialisation
        self.init_noise = init_noise
        self.missing_label = missing_label
        self.batch_size = batch_size
        self.n_baseline_epochs = n_baseline_epochs
        self.n_epochs = n_epochs
        self.inner_epochs = inner_epochs
        self.damping = damping
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.learning_rate = learning_rate
        self.warm_start = warm_start
        self.backend = backend
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose

    # --- fitting ---------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> NoiseAdaptationClassifier:
        """Fit to noisy labels.

        Parameters
        ----------
        X : (n, n_features)
        y : (n,)
            Noisy labels: numbers, booleans or strings, at least two different ones.
        sample_weight : (n,), optional
            Not negative.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            For settings or data that do not fit.
        FloatingPointError
            If the loss stops being finite, for instance because ``learning_rate`` is too large.
        """
        self._check_settings()
        goes_on = self.warm_start and hasattr(self, "parameters_")
        x, labels, weights = self._labelled(X, y, sample_weight, reset=not goes_on)
        classes, z = np.unique(labels, return_inverse=True)
        if classes.size < 2:
            raise ValueError(f"y must hold at least 2 classes; found {classes.size} class")
        if goes_on and not np.array_equal(classes, self.classes_):
            raise ValueError(
                f"y must hold the classes of the fit that warm_start goes on from, "
                f"{self.classes_}; found {classes}"
            )
        samples = _distinct(x, z.astype(np.int64), weights)
        self._seed = int(check_random_state(self.random_state).randint(2**31))
        held_out = np.zeros(samples.z.size, dtype=bool)
        if self.early_stopping:
            held_out = _held_out(samples.z, self.validation_fraction, stream(self._seed, "split"))
        kept, judge = samples[~held_out], samples[held_out] if held_out.any() else None

        self.classes_ = classes
        history: list[dict[str, Any]] = []
        for stage in self._stages(goes_on):
            model, start = self._start(stage, kept)
            self._train(stage, model, start, kept, judge, history)
        self.history_ = history
        self._describe(kept)
        self._running = None
        return self

    def partial_fit(
        self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None
    ) -> NoiseAdaptationClassifier:
        """Take one epoch of mini-batches over some samples, from wherever the parameters are.

        Network and noise layer move together whatever ``method`` is: EM with one gradient step for
        every E-step is the same update. Without a ``fit`` before, the network starts afresh and the
        noise layer, for want of a confusion matrix, from the uniform start; better is a ``fit`` on
        the first samples. Nothing is held out. Adam's moments live on from call to call, until the
        next ``fit``. Weights are relative to the others of the same call, and so are
        ``log_likelihood_``, ``certificate_`` and a complex model's ``noise_matrix_`` about the
        samples of the last call.

        Parameters
        ----------
        X : (n, n_features)
        y : (n,)
            Noisy labels.
        classes : (K,), optional
            All labels that will ever come; needed in the first call.
        sample_weight : (n,), optional

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            For settings or data that do not fit, or a label that is no class.
        """
        self._check_settings()
        is_first = not hasattr(self, "parameters_")
        x, labels, weights = self._labelled(X, y, sample_weight, reset=is_first)
        if is_first:
            self._start_afresh(classes, x.dtype)
        elif classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            raise ValueError(f"classes must stay {self.classes_}; found {np.unique(classes)}")
        samples = _distinct(x, self._encode(labels), weights)
        model, targets = _weighted(self.model_, samples.targets)
        model.check(self.parameters_, samples.x, targets)
        adam = Adam(self.learning_rate, backend=self.backend)
        if getattr(self, "_running", None) is None:
            self._running = (adam.initial_state(self.parameters_), *self._streams())
        state, shuffling, dropout = self._running
        self.parameters_ = self.parameters_.copy()  # what was handed out stays as it is
        gradients = run_epoch(
            model,
            self.parameters_,
            samples.x,
            targets,
            adam,
            state,
            batch_size=self.batch_size,
            shuffling=shuffling,
            dropout=dropout,
        )
        self._describe(samples)
        self.n_iter_ += 1
        self.history_.append(
            {
                "stage": "partial_fit",
                "epoch": self.n_iter_,
                "loss": -self.log_likelihood_,
                "validation_loss": None,
                "gradients": gradients,
                "seconds": None,
            }
        )
        return self

    def _start_afresh(self, classes: Any, dtype: np.dtype) -> None:
        """Set up the first call of ``partial_fit``."""
        if classes is None:
            raise ValueError("classes must name all labels in the first call of partial_fit")
        if self.n_kept is not None:
            raise ValueError(
                "n_kept must be None in a partial_fit without a fit before: the links are chosen "
                f"by a confusion matrix; found {self.n_kept}"
            )
        self.classes_ = np.unique(classes)
        self._seed = int(check_random_state(self.random_state).randint(2**31))
        self.model_, self.parameters_ = self._fresh_network(dtype)
        if self.noise_model != "none":
            self.model_, self.parameters_ = self._on_top(self._uniform())
        if self.noise_model == "complex":
            self.model_, self.parameters_ = c_start(self.model_, self.parameters_)
        self.history_, self.n_iter_ = [], 0

    def _stages(self, goes_on: bool) -> list[str]:
        """Return which models are to be trained, one started from the other."""
        target = NOISE_MODELS.index(self.noise_model)
        first = 0
        if goes_on:
            there = NOISE_MODELS.index(_noise_model_of(self.model_))
            if there > target:
                raise ValueError(
                    f"noise_model must be one of {NOISE_MODELS[there:]} where warm_start goes on "
                    f"from {NOISE_MODELS[there]!r}; found {self.noise_model!r}"
                )
            first = min(there + 1, target)
            self._check_goes_on()
        return list(NOISE_MODELS[first : target + 1])

    def _check_goes_on(self) -> None:
        """Refuse a warm start with another network or other links."""
        model = self.model_
        if self._network(self.model_.network.n_in) != model.network:
            raise ValueError("the network's settings must stay where warm_start goes on from it")
        n_kept = None if isinstance(model, PlainModel) or model.links is None else model.n_kept
        if not isinstance(model, PlainModel) and n_kept != self.n_kept:
            raise ValueError(
                f"n_kept must stay {n_kept} where warm_start goes on; found {self.n_kept}"
            )

    def _start(self, stage: str, samples: _Samples) -> tuple[Any, np.ndarray]:
        """Return a stage's model and where it starts: from what is fitted so far."""
        fitted = getattr(self, "model_", None)
        if self.warm_start and fitted is not None and _noise_model_of(fitted) == stage:
            return fitted, self.parameters_.astype(samples.x.dtype)
        if stage == "none":
            return self._fresh_network(samples.x.dtype)
        if stage == "complex":
            return c_start(self.model_, self.parameters_)
        return self._on_top(self._channel_start(samples))

    def _fresh_network(self, dtype: np.dtype) -> tuple[PlainModel, np.ndarray]:
        model = PlainModel(self._network(self.n_features_in_), self.backend)
        rng = stream(self._seed, "initialisation")
        return model, model.network.initial_weights(rng, dtype)

    def _network(self, n_features: int) -> Network:
        n_classes = self.classes_.size
        if self.network == "mlp":
            sizes = tuple(np.atleast_1d(np.asarray(self.hidden_layer_sizes, dtype=int)).tolist())
            return mlp(n_features, sizes, n_classes, self.dropout, self.backend)
        if self.image_shape is None or np.prod(self.image_shape) != n_features:
            raise ValueError(
                f"image_shape must be rows, columns, channels of an image of {n_features} numbers "
                f"for network='cnn'; found {self.image_shape}"
            )
        rows, columns, channels = map(int, self.image_shape)
        return cnn((rows, columns, channels), n_classes, self.backend)

    def _uniform(self) -> np.ndarray:
        return uniform_start(self.classes_.size, self.init_noise, self.parameters_.dtype.type)

    def _channel_start(self, samples: _Samples) -> np.ndarray:
        """Return channel logits from the baseline's outputs."""
        if self.initialisation == "uniform":
            return self._uniform()
        logits = self.model_.network.logits(self.parameters_, samples.x)
        q_ti, weights = np.exp(log_softmax(logits)), samples.weights
        if self.initialisation == "clustered":
            rng = stream(self._seed, "clusters")
            return clustered_start(q_ti, samples.z, rng, weights=weights)
        return confusion_start(q_ti, samples.z, self.initialisation, weights=weights)

    def _on_top(self, channel_logits: np.ndarray) -> tuple[SModel, np.ndarray]:
        """Return the s-model on top of the network, sparse if so wished."""
        model = SModel(self.model_.network, backend=self.backend)
        parameters = model.pack(self.parameters_, channel_logits)
        if self.n_kept is None:
            return model, parameters
        theta = noise_matrix(channel_logits)
        links: LinkIndex = kernels.link_index(top_support(theta, self.n_kept))
        return sparse_start(model, parameters, links)

    def _streams(self) -> tuple[np.random.Generator, np.random.Generator]:
        return stream(self._seed, "shuffling"), stream(self._seed, "dropout")

    def _train(
        self,
        stage: str,
        model: Any,
        start: np.ndarray,
        samples: _Samples,
        judge: _Samples | None,
        history: list[dict[str, Any]],
    ) -> None:
        """Train one stage; leave its model and parameters, and its lines in the history."""
        name = BASELINE if stage == "none" else stage
        n_epochs = self.n_baseline_epochs if stage == "none" else self.n_epochs
        shuffling, dropout = self._streams()
        common: dict[str, Any] = {
            "validation": None if judge is None else (judge.x, judge.targets),
            "patience": self.patience,
            "batch_size": self.batch_size,
            "shuffling": shuffling,
            "dropout": dropout,
        }
        by_em = self.method == "em" and stage != "none"
        with self._watched(name, n_epochs, history) as seen:
            if by_em:
                found = _em_parts().fit_by_em(
                    model,
                    start,
                    samples.x,
                    samples.targets,
                    n_rounds=n_epochs,
                    inner_epochs=self.inner_epochs,
                    learning_rate=self.learning_rate,
                    damping=self.damping,
                    on_half_step=seen,
                    **common,
                )
            else:
                trained, targets = _weighted(model, samples.targets)
                found = train(
                    trained,
                    start,
                    samples.x,
                    targets,
                    n_epochs=n_epochs,
                    optimiser=Adam(self.learning_rate, backend=self.backend),
                    on_epoch=seen,
                    **common,
                )
        self.model_, self.parameters_ = model, found.parameters
        self.n_iter_ = history[-1]["epoch"]

    @contextmanager
    def _watched(
        self, stage: str, n_epochs: int, history: list[dict[str, Any]]
    ) -> Iterator[Callable[[Any, np.ndarray], None]]:
        """Give a function that writes epochs into the history and moves a progress bar."""
        with tqdm(total=n_epochs, desc=stage, disable=not self.verbose) as bar:

            def see(step: Any, parameters: np.ndarray) -> None:
                number = step.round if hasattr(step, "round") else step.number
                if getattr(step, "half", None) == "noise matrix":
                    return
                history.append(
                    {
                        "stage": stage,
                        "epoch": number,
                        "loss": step.loss,
                        "validation_loss": step.validation_loss,
                        "gradients": step.gradients,
                        "seconds": step.seconds,
                    }
                )
                bar.update(number - bar.n)

            yield see

    def _describe(self, samples: _Samples) -> None:
        """Set what is known of the fitted parameters, by the samples trained on."""
        model, parameters = self.model_, self.parameters_
        judged, targets = _weighted(model, samples.targets)
        self.log_likelihood_ = -judged.nll(parameters, samples.x, targets)
        self.certificate_ = None
        if isinstance(model, PlainModel):
            self.noise_matrix_ = np.eye(self.classes_.size)
            return
        self.noise_matrix_ = learned_noise_matrix(model, parameters, samples.x)
        if isinstance(model, SModel):
            self.certificate_ = _em_parts().certificate(model, parameters, samples.x, targets)

    # --- what comes in ---------------------------------------------------------------------------

    def _check_settings(self) -> None:
        """Refuse settings that cannot be; what concerns the data is checked with them."""
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}; found {getattr(self, name)!r}")
        for least, names in {
            0: ("n_baseline_epochs", "n_epochs", "patience"),
            1: ("batch_size", "inner_epochs"),
        }.items():
            require_at_least(least, **{name: getattr(self, name) for name in names})
        sizes = np.atleast_1d(np.asarray(self.hidden_layer_sizes))
        if sizes.size and (sizes.dtype.kind not in "iu" or sizes.min() < 1):
            raise ValueError(
                f"hidden_layer_sizes must be integers of at least 1; "
                f"found {self.hidden_layer_sizes!r}"
            )
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction must lie in (0, 1); found {self.validation_fraction}"
            )
        if not 0 < self.learning_rate < np.inf:
            raise ValueError(f"learning_rate must be positive; found {self.learning_rate}")

    def _labelled(
        self, X: Any, y: Any, sample_weight: Any, reset: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return features, labels and weights of the samples that have a label and a weight."""
        x = self._features(X, reset)
        if y is None:
            raise ValueError(
                "This NoiseAdaptationClassifier estimator requires y to be passed, but the target "
                "y is None"
            )
        y = column_or_1d(y, warn=True)
        check_consistent_length(x, y)
        weights = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
        if not weights.any():
            raise ValueError("sample_weight must not be zero for all samples")
        counts = ~self._is_missing(y) & (weights > 0)
        y = y[counts]
        if not y.size:
            raise ValueError("y must hold at least 2 classes; found no label that has a weight")
        assert_all_finite(y, input_name="y")
        check_classification_targets(y)
        return x[counts], y, weights[counts]

    def _features(self, X: Any, reset: bool = False) -> np.ndarray:
        """Return features as a C-contiguous array of the dtype that is computed in."""
        if reset:
            dtype: Any = self.dtype or [np.float64, np.float32]
        else:
            dtype = self.parameters_.dtype
        return validate_data(self, X, dtype=dtype, order="C", reset=reset)

    def _is_missing(self, y: np.ndarray) -> np.ndarray:
        """Return which labels are the missing one."""
        if self.missing_label is None:
            return np.zeros(y.shape, dtype=bool)
        if self.missing_label != self.missing_label:  # NaN
            return np.asarray(y != y)
        return np.asarray(y == self.missing_label) & np.ones(y.shape, dtype=bool)

    def _encode(self, labels: np.ndarray) -> np.ndarray:
        """Return labels as 0..K-1; refuse others than the classes."""
        z = np.searchsorted(self.classes_, labels).clip(max=self.classes_.size - 1)
        strange = self.classes_[z] != labels
        if np.any(strange):
            raise ValueError(f"y must hold labels of {self.classes_}; found {labels[strange][0]!r}")
        return z.astype(np.int64)

    # --- what comes out --------------------------------------------------------------------------

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable *true* label of each sample, the noise layer dropped: (n,)."""
        logits = self._logits(X)
        return self.classes_[logits.argmax(axis=1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return p(y=i | x) of the *true* label, the noise layer dropped: (n, K) (Eq. 7)."""
        return np.exp(log_softmax(self._logits(X)))

    def _logits(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        network = self.model_.network
        return network.logits(self.parameters_[: network.n_weights], self._features(X))

    def predict_noisy_proba(self, X: Any) -> np.ndarray:
        r"""Return p(z=j | x) of the label that would be *observed*: (n, K) (Eqs. 9, 11).

        :math:`\sum_i q_{ti} \theta_{ij}`, with a noise matrix of its own for each sample where the
        noise model is "complex"; the same as :meth:`predict_proba` where it is "none".
        """
        check_is_fitted(self)
        model = self.model_
        if isinstance(model, PlainModel):
            return self.predict_proba(X)
        x = self._features(X)
        return np.concatenate([self._noisy_proba(x[part]) for part in slices(len(x))])

    def _noisy_proba(self, x: np.ndarray) -> np.ndarray:
        model = self.model_
        weights, *channel = model.unpack(self.parameters_)
        (logits, *hidden), _ = model.forward(weights, x)
        q_ti = np.exp(log_softmax(logits))
        if isinstance(model, SModel):
            return q_ti @ self.noise_matrix_.astype(q_ti.dtype)
        p_tj = np.zeros_like(q_ti)
        support = np.arange(q_ti.shape[1])[None].repeat(q_ti.shape[1], axis=0)
        if model.links is not None:
            support = model.links.support
        for i, (u_i, b_i) in enumerate(zip(*channel, strict=True)):
            theta_ts = np.exp(log_softmax(hidden[0] @ u_i.T + b_i))  # Eq. 8
            p_tj[:, support[i]] += q_ti[:, i, None] * theta_ts
        return p_tj

    @available_if(_has_noise_layer)
    def posterior(self, X: Any, noisy_y: Any) -> np.ndarray:
        """Return p(y=i | x, z) of the true label, given the noisy one: (n, K) (Eq. 3, the E-step).

        A sample whose label is missing has what :meth:`predict_proba` says of it.

        Parameters
        ----------
        X : (n, n_features)
        noisy_y : (n,)
            Labels of :attr:`classes_`, or :attr:`missing_label`.

        Raises
        ------
        TypeError, ValueError
            For data that do not fit, a label that is no class, and one that no class is seen as
            according to ``noise_matrix_``.
        """
        return self._posterior(X, noisy_y)[0]

    def _posterior(self, X: Any, noisy_y: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the posterior and the labels, 0..K-1, with -1 for a missing one."""
        check_is_fitted(self)
        x, noisy_y = self._features(X), column_or_1d(noisy_y)
        check_consistent_length(x, noisy_y)
        known = ~self._is_missing(noisy_y)
        z = np.full(len(x), -1)
        z[known] = self._encode(noisy_y[known])
        weights, *channel = self.model_.unpack(self.parameters_)
        c_ti = np.empty((len(x), self.classes_.size), x.dtype)
        for part in slices(len(x)):
            outputs, _ = self.model_.forward(weights, x[part])
            c_ti[part], own = np.exp(log_softmax(outputs[0])), known[part]
            if own.any():
                of_known = [values[own] for values in outputs]
                found = self.model_.posterior(of_known, channel, z[part][own], check_values=True)
                c_ti[part][own] = found.posterior
        return c_ti, z

    @available_if(_has_noise_layer)
    def find_label_errors(self, X: Any, noisy_y: Any, threshold: float = 0.5) -> np.ndarray:
        """Return the samples whose label is probably wrong, the most suspicious first: (m,).

        Ranked by the posterior probability that the given label is the true one, c_t,z_t of Eq. 3.
        Samples that were fitted are believed more readily than new ones: for a data set of your
        own, fit on a part and search another, as cross-validation does.

        Parameters
        ----------
        X : (n, n_features)
        noisy_y : (n,)
            Samples with :attr:`missing_label` are never returned.
        threshold : float
            Those below it are returned; .5 are those that are more likely wrong than right. More
            than 1 ranks all.

        Returns
        -------
        (m,) int64
            Indices of rows of X.
        """
        c_ti, z = self._posterior(X, noisy_y)
        trust_t = np.where(z >= 0, c_ti[np.arange(z.size), z], np.inf)
        order = np.argsort(trust_t, kind="stable")
        return order[trust_t[order] < threshold]

    # --- files -----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the fitted estimator to a file, see :mod:`nalayer.model_files`.

        Everything is kept but Adam's moments of a ``partial_fit`` that is under way.

        Raises
        ------
        NotFittedError
        TypeError, ValueError
            For settings that a file cannot keep: a ``random_state`` that is no integer, classes or
            a ``missing_label`` that are neither number, boolean nor string.
        """
        check_is_fitted(self)
        description, arrays = describe(self.model_, self.parameters_, self.classes_)
        names = getattr(self, "feature_names_in_", None)
        description["estimator"] = {
            "settings": _settings_to_json(self.get_params()),
            "seed": self._seed,
            "feature_names": None if names is None else names.tolist(),
            **{name: getattr(self, f"{name}_") for name in KEPT},
        }
        write(path, description, arrays | {"noise_matrix": self.noise_matrix_})

    @classmethod
    def load(cls, path: str | Path) -> NoiseAdaptationClassifier:
        """Return the estimator that was written to a file.

        Raises
        ------
        ModelFileError
            For a file that :meth:`save` did not write, or that is damaged.
        OSError
            If it cannot be read at all.
        """
        description, arrays = read(path)
        kept = description.get("estimator")
        if not isinstance(kept, dict):
            raise ModelFileError(path, "a model alone", "one that an estimator saved")
        try:
            clf = cls(**_settings_from_json(kept["settings"]))
            clf._check_settings()
            saved = restore(path, description, arrays, clf.backend)
            clf._take(saved, kept, arrays["noise_matrix"])
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            if isinstance(error, ModelFileError):
                raise
            reason = f"{type(error).__name__}: {error}"
            raise ModelFileError(path, f"what no estimator has ({reason})", "a fit") from None
        return clf

    def _take(self, saved: SavedModel, kept: dict[str, Any], theta: np.ndarray) -> None:
        """Set what a fit sets."""
        if saved.classes is None:
            raise ValueError("no classes")
        k = saved.classes.size
        checks.check_floats("noise_matrix", theta, (k, k), np.float64)
        for name, kinds in KEPT.items():
            if type(kept[name]) not in kinds:
                raise TypeError(f"{name} is {kept[name]!r}")
            setattr(self, f"{name}_", kept[name])
        self.model_, self.parameters_, self.classes_ = saved.model, saved.parameters, saved.classes
        self.noise_matrix_, self.n_features_in_ = theta.copy(), saved.model.network.n_in
        self._seed, self._running = kept["seed"], None
        self._streams()  # refuses what is no seed
        names = kept["feature_names"]
        if names is None:
            return
        if len(names) != self.n_features_in_ or not all(type(name) is str for name in names):
            raise ValueError(f"{len(names)} feature names for {self.n_features_in_} features")
        self.feature_names_in_ = np.array(names, dtype=object)


KEPT: dict[str, tuple[type, ...]] = {
    "log_likelihood": (float,),
    "certificate": (float, type(None)),
    "n_iter": (int,),
    "history": (list,),
}
"""attributes that a file keeps as they are, and their types"""


def _settings_to_json(settings: dict[str, Any]) -> dict[str, Any]:
    """Return an estimator's settings in what JSON has."""
    found = {}
    for name, value in settings.items():
        if isinstance(value, np.generic | np.ndarray):
            value = value.tolist()
        if name == "missing_label":
            is_nan = isinstance(value, float) and value != value
            value = "NaN" if is_nan else None if value is None else describe_labels(name, [value])
        elif name == "random_state" and not isinstance(value, int | None):
            raise TypeError(
                f"random_state must be an integer or None to be kept in a file; "
                f"found {type(value).__name__}"
            )
        found[name] = list(value) if isinstance(value, tuple | range) else value
    return found


def _settings_from_json(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that :func:`_settings_to_json` was given, lists as tuples."""
    found = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    marker = settings["missing_label"]
    if marker is not None:
        found["missing_label"] = np.nan if marker == "NaN" else restore_labels(marker).item()
    return found


def _noise_model_of(model: PlainModel | NoiseModel) -> str:
    """Return the noise model's name in :data:`NOISE_MODELS`."""
    if isinstance(model, PlainModel):
        return "none"
    return "complex" if isinstance(model, CModel) else "simple"


def _weighted(model: Any, targets: np.ndarray) -> tuple[Any, np.ndarray]:
    """Return what is trained on the targets: with weights, a weighted mean."""
    return (model if parts_of(targets)[1] is None else WeightedModel(model)), targets
