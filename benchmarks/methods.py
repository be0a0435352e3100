"""The methods that the accuracy grid compares, each a line in :data:`METHODS`.

All methods of a cell's seed, noise level and fraction get the same :class:`Task`: the same samples,
the same noisy labels, the same held-out part. Clean labels serve to choose a subset of each class,
to make the noisy labels and to score the finished classifier; "oracle" and "natarajan" are given
the true noise matrix. No method sees more of them.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from sklearn.model_selection import train_test_split

import em_baseline
import kernels
import nalayer
from benchmarks import placement
from benchmarks.cells import Cell, Finished
from benchmarks.placement import CUPY
from benchmarks.records import Row
from em_baseline import LikelihoodDropWarning, MiniBatches, statements
from nalayer import CModel, PlainModel, SModel, SoftTargetModel, stream
from nalayer.datasets import Dataset, load_dataset, validation_split
from nalayer.devices import to_host
from nalayer.label_noise import labels_hash
from nalayer.learned_noise import learned_noise_matrix
from nalayer.losses import (
    MISSING,
    DirichletPriorModel,
    EntropyModel,
    FixedChannelModel,
    LinearChannelModel,
    MixedModel,
    OneParameterModel,
    ReedModel,
    UnbiasedModel,
)
from nalayer.models import NoiseModel
from nalayer.noise_layer import AUTHORS_FLOOR
from nalayer.optimisers import SGD, Adam, Optimiser, Projected, Split
from nalayer.training import hash_of_all

VALIDATION_SHARE = 0.1
STARTS = ("hard", "soft", "clustered", "true", "uniform", "random")
UNIFORM_NOISE = 0.1  # of the uniform start, the paper's epsilon
# Of the linear channel's own gradient steps: an entry of theta moves by .01 at most. Chosen, with
# the weight of the pull, on clean test labels of digits (seeds 0 to 2), as no other setting is.
THETA_STEP, GRADIENT_CLIP = 0.01, 1.0
HIDDEN_SIZES = {"digits": (128, 64), "mnist": (500, 300), "cifar100": (500, 300)}
# Rows of more classes than that would be the longest part of the results.
MAX_CLASSES_SHOWN = 20
Arrays = Mapping[str, np.ndarray]


@lru_cache(maxsize=2)
def _dataset(name: str, dtype: str) -> Dataset:
    return load_dataset(name, np.dtype(dtype))


class UndefinedError(Exception):
    """A method does not exist for a task, for instance because a matrix has no inverse."""


@dataclass
class Task:
    """What all methods of one seed share, made from a cell's settings alone."""

    cell: Cell
    data: Dataset = field(init=False, repr=False)
    theta: np.ndarray = field(init=False, repr=False)
    """the true noise matrix"""
    x: np.ndarray = field(init=False, repr=False)
    z: np.ndarray = field(init=False, repr=False)
    """noisy labels"""
    validation: tuple[np.ndarray, np.ndarray] = field(init=False, repr=False)
    """held-out samples with labels as noisy as the others"""

    def __post_init__(self) -> None:
        """Choose the samples, corrupt their labels, hold out a part."""
        cell = self.cell
        self.data = _dataset(cell.dataset, cell.dtype)
        chosen = _subset(self.data.labels_train, cell.fraction, stream(cell.seed, "subset"))
        noise_stream = stream(cell.seed, "label noise")
        self.theta = nalayer.make_noise_matrix(
            cell.noise_kind, self.data.n_classes, cell.noise, noise_stream
        )
        z = nalayer.corrupt_labels(self.data.labels_train[chosen], self.theta, noise_stream)
        kept, held_out = validation_split(z.size, z, VALIDATION_SHARE, stream(cell.seed, "split"))
        self.x, self.z = self.data.x_train[chosen[kept]], z[kept]
        self.validation = self.data.x_train[chosen[held_out]], z[held_out]

    @cached_property
    def network(self) -> nalayer.Network:
        """The paper's network for this data set."""
        cell, data = self.cell, self.data
        # None goes where the arrays are: the formulas of certificates are computed on the CPU.
        backend = None if cell.backend == CUPY else cell.backend
        if cell.network == "cnn":
            return nalayer.cnn(data.image_shape, data.n_classes, backend)
        sizes, dropout = hidden_layers(cell.network, cell.dataset)
        return nalayer.mlp(data.x_train.shape[1], sizes, data.n_classes, dropout, backend)

    @property
    def backend(self) -> str | None:
        """Of all kernels."""
        return self.cell.backend

    def initial_weights(self) -> np.ndarray:
        """Return the weights that a fresh network starts from."""
        return self.network.initial_weights(
            stream(self.cell.seed, "initialisation"), np.dtype(self.cell.dtype)
        )

    def there(self, *values: Any) -> tuple[Any, ...]:
        """Return arrays, or what holds some, where the cell computes."""
        return placement.there(self.backend, *values)

    @cached_property
    def placed(self) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """``x``, ``z`` and ``validation`` where the cell computes, moved there once."""
        x, z, validation = self.there(self.x, self.z, self.validation)
        return x, z, validation

    def probabilities(self, weights: np.ndarray) -> np.ndarray:
        """Return a network's outputs q_ti for the training samples."""
        x, (weights,) = self.placed[0], self.there(weights)
        return to_host(np.exp(kernels.log_softmax(self.network.logits(weights, x))))

    def predict(self, weights: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return the classes that a network gives samples."""
        return to_host(self.network.predict(*self.there(weights, x)))

    def channel_start(self, weights: np.ndarray, start: str | None = None) -> np.ndarray:
        """Return channel logits to start from, given a trained network; None is "hard"."""
        k, dtype = self.data.n_classes, np.dtype(self.cell.dtype).type
        if start == "uniform":
            return nalayer.uniform_start(k, UNIFORM_NOISE, dtype)
        if start == "random":
            return stream(self.cell.seed, "random start").normal(size=(k, k)).astype(dtype)
        if start == "true":
            return nalayer.log_softmax(np.log(self.theta + AUTHORS_FLOOR)).astype(dtype)
        q_ti = self.probabilities(weights)
        if start == "clustered":
            return nalayer.clustered_start(q_ti, self.z, stream(self.cell.seed, "clusters"))
        return nalayer.confusion_start(q_ti, self.z, start or "hard")


def hidden_layers(network: str, dataset: str) -> tuple[tuple[int, ...], float]:
    """Return an MLP's hidden sizes and dropout rate: the paper's, or those that its name gives."""
    found = re.fullmatch(r"mlp((?:-\d+)*)(-no-dropout)?", network)
    if not found:
        raise ValueError(f"network must look like mlp, mlp-512-256 or mlp-16-no-dropout: {network}")
    sizes = tuple(int(size) for size in found[1].split("-")[1:]) or HIDDEN_SIZES[dataset]
    return sizes, 0.0 if found[2] else 0.5


def _subset(labels: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Return the indices of a share of the samples, stratified by class."""
    everything = np.arange(labels.size)
    if fraction == 1:
        return everything
    chosen, _ = train_test_split(
        everything,
        train_size=fraction,
        stratify=labels,
        random_state=int(rng.integers(2**32)),
    )
    return np.sort(chosen)


@dataclass
class Fit:
    """A method's result: the classifier, and what it says of the noise."""

    weights: np.ndarray
    theta: np.ndarray | None
    """the noise matrix that was learned, (K, K)"""
    figures: Row
    arrays: dict[str, np.ndarray]
    """what later methods start from"""


def _train(
    task: Task,
    model: nalayer.models.Model,
    start: np.ndarray,
    x: np.ndarray | None = None,
    targets: np.ndarray | None = None,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    optimiser: Optimiser | None = None,
    step_factors: np.ndarray | float = 1.0,
) -> Fit:
    """Train by mini-batches as the authors do; on the task's noisy labels unless told otherwise."""
    cell = task.cell
    on_noisy_labels = targets is None
    own_x, own_z, own_validation = task.placed
    model_there, start, x, targets, validation = task.there(
        model,
        start,
        own_x if x is None else x,
        own_z if targets is None else targets,
        validation or own_validation,
    )
    result = nalayer.train(
        model_there,
        start,
        x,
        targets,
        shuffling=stream(cell.seed, "shuffling"),
        dropout=stream(cell.seed, "dropout"),
        validation=validation,
        n_epochs=cell.epochs,
        patience=cell.patience,
        batch_size=cell.batch_size,
        optimiser=optimiser or Adam(backend=cell.backend),
        step_factors=step_factors,
        with_loss=False,
    )
    if on_noisy_labels:
        _require_noisy_labels(task, result.labels_hash)
    last, best = result.history[-1], result.best
    return _fit(task, model, result, epochs=last.number, best_epoch=best.number)


def _require_noisy_labels(task: Task, trained_on: str) -> None:
    """Refuse a result whose trainer was given other labels than the task's noisy ones."""
    expected = hash_of_all(task.z, task.validation)
    if trained_on != expected:
        raise RuntimeError(
            f"{task.cell.name}: trained on labels {trained_on}; the noisy labels are {expected}"
        )


def _fit(
    task: Task,
    model: nalayer.models.Model,
    result: nalayer.Training | em_baseline.EMFit,
    **figures: Any,
) -> Fit:
    figures["gradients"] = result.history[-1].gradients
    figures["validation_loss"] = result.best.validation_loss
    parameters = to_host(result.parameters)
    weights = parameters[: task.network.n_weights]
    if not isinstance(model, NoiseModel):
        return Fit(weights, None, figures, {"parameters": parameters})
    arrays = {"parameters": parameters}
    if model.links is not None:
        arrays["support"] = model.links.support
    there, parameters_there = task.there(model, parameters)
    theta = learned_noise_matrix(there, parameters_there, task.placed[0])
    return Fit(weights, to_host(theta), figures, arrays)


# --- what starts from what -----------------------------------------------------------------------


def _baseline_start(
    task: Task, start: Arrays, of_theta: str | None = None
) -> tuple[SModel, np.ndarray]:
    """Return the s-model on top of the baseline, theta as the cell says if not told."""
    model, weights = SModel(task.network, backend=task.backend), start["parameters"]
    return model, model.pack(weights, task.channel_start(weights, of_theta or task.cell.start))


def s_model_of(task: Task, start: Arrays) -> SModel:
    """Return the s-model whose parameters were kept."""
    links = kernels.link_index(start["support"]) if "support" in start else None
    return SModel(task.network, backend=task.backend, links=links)


def _sparse_baseline_start(task: Task, start: Arrays) -> tuple[SModel, np.ndarray]:
    """Return the sparse s-model with the largest entries of the baseline's confusion matrix."""
    model, parameters = _baseline_start(task, start)
    theta = nalayer.noise_matrix(model.unpack(parameters)[1])
    assert task.cell.n_kept is not None
    links = kernels.link_index(nalayer.top_support(theta, task.cell.n_kept))
    return nalayer.sparse_start(model, parameters, links)


def _c_start(task: Task, start: Arrays) -> tuple[CModel, np.ndarray]:
    """Return the c-model that begins as a trained s-model."""
    return nalayer.c_start(s_model_of(task, start), start["parameters"])


def _with_prior(task: Task, model: SModel, parameters: np.ndarray) -> DirichletPriorModel:
    """Return the s-model with a Dirichlet prior whose mode is where theta starts."""
    n, start = task.z.size, nalayer.noise_matrix(model.unpack(parameters)[1])
    assert task.cell.pull is not None
    alpha = task.cell.pull * n / len(start)
    return DirichletPriorModel(model.network, alpha, n, model.backend, prior_mode=start)


# --- the fits ------------------------------------------------------------------------------------


def _em(task: Task, model: SModel | CModel, start: np.ndarray) -> Fit:
    """Alternate E-step and M-steps, the network's by some epochs of mini-batches."""
    cell = task.cell
    model_there, start = task.there(model, start)
    x, z, validation = task.placed
    assert cell.inner_epochs is not None
    inner = MiniBatches(cell.inner_epochs, cell.batch_size, Adam(backend=cell.backend))
    with warnings.catch_warnings():
        # Dropout and mini-batches make M-steps inexact; that the likelihood may fall is known.
        warnings.simplefilter("ignore", LikelihoodDropWarning)
        result = em_baseline.fit(
            model_there,
            start,
            x,
            z,
            network_step=inner,
            noise_step=inner if isinstance(model, CModel) else None,
            n_rounds=cell.epochs,
            patience=cell.patience,
            shuffling=stream(cell.seed, "shuffling"),
            dropout=stream(cell.seed, "dropout"),
            validation=validation,
            damping=1.0 if cell.damping is None else cell.damping,
        )
    _require_noisy_labels(task, result.labels_hash)
    last, best = result.history[-1], result.best
    return _fit(task, model, result, epochs=last.round, best_epoch=best.round)


def _s(task: Task, start: Arrays) -> Fit:
    """Train the s-model jointly, theta at its own speed, if the cell says so."""
    cell, (model, parameters) = task.cell, _baseline_start(task, start)
    if cell.plain_weight and cell.pull:
        raise ValueError(
            "no model has both a share of the plain loss and a prior; found "
            f"plain_weight {cell.plain_weight} and pull {cell.pull}"
        )
    if cell.plain_weight:
        model = MixedModel(model.network, backend=model.backend, plain_weight=cell.plain_weight)
    elif cell.pull:
        model = _with_prior(task, model, parameters)
    factors = 1.0 if cell.channel_step is None else model.step_factors(cell.channel_step)
    return _train(task, model, parameters, step_factors=factors)


def _em_s(task: Task, start: Arrays) -> Fit:
    """Alternate for the s-model, with a prior if the cell says so."""
    model, parameters = _baseline_start(task, start)
    return _em(task, _with_prior(task, model, parameters) if task.cell.pull else model, parameters)


def _natarajan(task: Task) -> Fit:
    try:
        model = UnbiasedModel(task.network, task.backend, theta=task.theta)
    except ValueError as error:
        raise UndefinedError(str(error)) from None
    return _train(task, model, task.initial_weights())


def _fixed(task: Task, start: Arrays, theta: np.ndarray) -> Fit:
    model = FixedChannelModel(task.network, task.backend, theta=theta)
    return _train(task, model, start["parameters"])


def _larsen(task: Task, start: Arrays) -> Fit:
    model, weights = OneParameterModel(task.network, task.backend), start["parameters"]
    contradicted = (task.predict(weights, task.placed[0]) != task.z).mean()
    return _train(task, model, model.start(weights, float(np.clip(contradicted, 0.01, 0.99))))


def _sukhbaatar(task: Task, start: Arrays) -> Fit:
    model = LinearChannelModel(task.network, backend=task.backend)
    # Adam would move every entry of theta alike, for all their gradients have one sign, and the
    # projection would take that back.
    rules = Adam(backend=task.backend), SGD(THETA_STEP, GRADIENT_CLIP)
    optimiser = Projected(Split(*rules, task.network.n_weights), model.project)
    return _train(task, model, model.start(start["parameters"]), optimiser=optimiser)


def _without_some_labels(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Return the noisy labels, to train on and held out, a share of both missing."""
    rng, missing = stream(task.cell.seed, "missing labels"), task.cell.missing or 0.0
    z, held_out = (
        np.where(rng.random(labels.size) < missing, MISSING, labels)
        for labels in (task.z, task.validation[1])
    )
    return z, held_out


def _labelled_only(task: Task) -> Fit:
    (x, z), (x_held_out, z_held_out) = (
        (x[z != MISSING], z[z != MISSING])
        for x, z in zip((task.x, task.validation[0]), _without_some_labels(task), strict=True)
    )
    model = PlainModel(task.network, task.backend)
    return _train(task, model, task.initial_weights(), x, z, (x_held_out, z_held_out))


def _distillation(task: Task, start: Arrays) -> Fit:
    """Train a fresh network on the baseline's outputs; the noisy labels judge it."""
    model = SoftTargetModel(task.network, task.backend)
    x_held_out, z_held_out = task.validation
    indicators = np.eye(task.data.n_classes, dtype=task.cell.dtype)[z_held_out]
    targets = task.probabilities(start["parameters"])
    return _train(
        task,
        model,
        task.initial_weights(),
        targets=targets,
        validation=(x_held_out, indicators),
    )


def _plain(task: Task) -> Fit:
    return _train(task, PlainModel(task.network, task.backend), task.initial_weights())


def _reed(task: Task, start: Arrays, kind: str) -> Fit:
    return _train(task, ReedModel(task.network, task.backend, kind), start["parameters"])


def _entropy(task: Task) -> Fit:
    z, z_held_out = _without_some_labels(task)
    return _train(
        task,
        EntropyModel(task.network, task.backend),
        task.initial_weights(),
        targets=z,
        validation=(task.validation[0], z_held_out),
    )


@dataclass(frozen=True)
class Method:
    """A row of the comparison."""

    name: str
    source: str
    starts_from: str | None
    """the method whose parameters it starts from; None for a fresh network"""
    fit: Callable[[Task, Arrays], Fit]
    reads: tuple[str, ...] = ()
    """which of a cell's optional settings"""


_METHODS = (
    Method("baseline", "cross-entropy", None, lambda t, _: _plain(t)),
    Method("reed-soft", "Reed 2014", "baseline", lambda t, s: _reed(t, s, "soft")),
    Method("reed-hard", "Reed 2014", "baseline", lambda t, s: _reed(t, s, "hard")),
    Method("larsen", "Larsen 1998", "baseline", _larsen),
    Method("mnih-hinton", "Mnih & Hinton 2012, theta from the baseline", "baseline",
           lambda t, s: _fixed(t, s, nalayer.noise_matrix(t.channel_start(s["parameters"])))),
    Method("sukhbaatar", "Sukhbaatar & Fergus 2014", "baseline", _sukhbaatar),
    Method("natarajan", "Natarajan 2013, true theta", None, lambda t, _: _natarajan(t)),
    Method("distillation", "Hinton 2014", "baseline", _distillation),
    Method("labelled-only", "cross-entropy, missing labels left out", None,
           lambda t, _: _labelled_only(t), ("missing",)),
    Method("entropy", "Grandvalet & Bengio 2005, missing labels", None,
           lambda t, _: _entropy(t), ("missing",)),
    Method("s", "Eqs. 10-12", "baseline", _s,
           ("start", "channel_step", "plain_weight", "pull")),
    Method("s-clustered", "Eqs. 10-12 from clusters of the baseline's outputs", "baseline",
           lambda t, s: _train(t, *_baseline_start(t, s, "clustered"))),
    Method("c", "Eqs. 8-9", "s", lambda t, s: _train(t, *_c_start(t, s))),
    Method("sparse-s", "Section 3", "baseline",
           lambda t, s: _train(t, *_sparse_baseline_start(t, s)), ("n_kept",)),
    Method("sparse-c", "Section 3", "sparse-s",
           lambda t, s: _train(t, *_c_start(t, s)), ("n_kept",)),
    Method("em-s", "Eqs. 3-6, Bekker & Goldberger 2016", "baseline",
           _em_s,
           ("inner_epochs", "start", "damping", "pull")),
    Method("em-c", "Eqs. 3-6 for the c-model", "em-s",
           lambda t, s: _em(t, *_c_start(t, s)), ("inner_epochs",)),
    Method("oracle", "the s-model with the true theta, fixed", "baseline",
           lambda t, s: _fixed(t, s, t.theta)),
)  # fmt: skip
METHODS: dict[str, Method] = {method.name: method for method in _METHODS}
ORIGINS = {method.starts_from for method in _METHODS} - {None}
"""methods that others start from: their parameters are kept"""
OPTIONAL_SETTINGS = (
    "inner_epochs",
    "n_kept",
    "missing",
    "start",
    "channel_step",
    "plain_weight",
    "damping",
    "pull",
)


def cell_of(cell: Cell, method: str) -> Cell:
    """Return the same cell for another method; settings that it does not read are dropped."""
    reads = METHODS[method].reads
    dropped = {name: None for name in OPTIONAL_SETTINGS if name not in reads}
    return replace(cell, method=method, **dropped)  # type: ignore[arg-type]


def run_cell(cell: Cell, start: Arrays, keep_parameters: bool) -> Finished:
    """Train one cell's method and score it on the clean test labels.

    ``start`` is what the method that it starts from kept, empty for a fresh network.
    """
    kernels.limit_threads(cell.threads)
    task, method = Task(cell), METHODS[cell.method]
    started = time.perf_counter()
    row: Row = {
        "dataset": cell.dataset,
        "network": cell.network,
        "method": cell.method,
        "noise": cell.noise,
        "noise_kind": cell.noise_kind,
        "fraction": cell.fraction,
        "seed": cell.seed,
        "n_samples": int(task.z.size),
        "n_held_out": int(task.validation[1].size),
        "labels_hash": hash_of_all(task.z, task.validation),
        "max_epochs": cell.epochs,
        "patience": cell.patience,
        "batch_size": cell.batch_size,
        "dtype": cell.dtype,
    }
    row |= {name: cell.settings[name] for name in method.reads if name in cell.settings}
    try:
        fit = method.fit(task, start)
    except UndefinedError as reason:
        return Finished(row | {"test_accuracy": None, "reason": str(reason)})
    row |= fit.figures
    row["seconds"] = round(time.perf_counter() - started, 2)
    predicted = task.predict(fit.weights, task.data.x_test)
    row["test_accuracy"] = float((predicted == task.data.labels_test).mean())
    row["parameters_hash"] = labels_hash(fit.arrays["parameters"])
    if fit.theta is not None:
        row["noise_matrix_error"] = nalayer.noise_matrix_error(fit.theta, task.theta)
        if len(fit.theta) <= MAX_CLASSES_SHOWN and cell.seed == 0:
            row["theta"] = [round(float(p), 5) for p in fit.theta.ravel()]
        if cell.start is not None:
            row |= _at_the_end(task, fit, predicted)
    return Finished(row, fit.arrays if keep_parameters else {})


def _at_the_end(task: Task, fit: Fit, predicted: np.ndarray) -> Row:
    """Return what the studies ask of an s-model's end: likelihood, certificate, relabelling."""
    model = SModel(task.network, backend=task.backend)
    weights, channel_logits = model.unpack(fit.arrays["parameters"])
    point = statements.Point(
        task.network,
        weights.astype(np.float64),
        channel_logits.astype(np.float64),
        task.x.astype(np.float64),
        task.z,
        task.backend,
    )
    assert fit.theta is not None
    stands_for_i = nalayer.best_relabelling(fit.theta, task.theta)
    class_of = np.argsort(stands_for_i)  # the true class that each of the model's stands for
    return {
        "train_loss": float(point.joint().nll),
        "certificate": statements.certificate(point),
        "relabelled_error": nalayer.noise_matrix_error(fit.theta[stands_for_i], task.theta),
        "relabelled_accuracy": float((class_of[predicted] == task.data.labels_test).mean()),
    }
