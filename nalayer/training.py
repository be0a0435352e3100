"""Mini-batch training with early stopping on a noisy validation split."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

import kernels
from kernels import checks
from nalayer.buffers import Buffers, slices
from nalayer.checkpoints import Checkpoint
from nalayer.image_layers import Conv2d, ConvBlock, MaxPool2d
from nalayer.label_noise import labels_hash
from nalayer.layers import Dense, Dropout, Hidden, ReLU, new_seed
from nalayer.models import CModel, Model, NoiseModel, PlainModel, SModel, SoftTargetModel
from nalayer.optimisers import Adam, Optimiser, can_be_recorded
from nalayer.recorded_steps import repeat

LEAST_RECORDED = 8
"""Steps that it takes to repay the recording of one."""
# Whose steps keep to what may be recorded, see kernels.recording_stream. Models and layers of
# others' making may not.
_RECORDED_MODELS = (PlainModel, SoftTargetModel, SModel, CModel)
_RECORDED_LAYERS = (Conv2d, ConvBlock, Dense, Dropout, Hidden, MaxPool2d, ReLU)


@dataclass(frozen=True)
class Epoch:
    """Where training stood after an epoch; number 0 is the start.

    ``loss`` and ``validation_loss`` (nats per sample) belong to the parameters at the epoch's end,
    evaluated without dropout; ``loss`` is None where it was not asked for. ``validation_loss`` is
    what the model's method of that name says of the held-out data: without pseudo-counts; the
    linear channel's with its pull. ``gradients`` counts mini-batch gradients and ``seconds`` the
    time spent, both since the start.
    """

    number: int
    loss: float | None
    validation_loss: float | None
    gradients: int
    seconds: float

    def stands_at(self, place: int) -> bool:
        """Return whether a history holds it at this place."""
        return self.number == place

    @property
    def ends_round(self) -> bool:
        """Whether a run may be saved here, and the best be this: after every epoch."""
        return True


@dataclass(frozen=True)
class Training:
    """What :func:`train` returns."""

    parameters: np.ndarray
    history: list[Epoch]
    best: Epoch
    """the epoch whose parameters these are"""
    labels_hash: str
    """fingerprint of all labels used, the held-out ones last, taken from what the trainer got"""


@dataclass
class BestSoFar:
    """Keeps the parameters with the lowest validation loss (without validation: the last)."""

    patience: int | None
    epoch: Any
    parameters: np.ndarray
    n_worse: int = field(default=0)

    def see(self, epoch: Any, parameters: np.ndarray) -> bool:
        """Take in anything with a ``validation_loss``; return whether to go on."""
        if epoch.validation_loss is None or epoch.validation_loss < self.epoch.validation_loss:
            self.epoch, self.parameters, self.n_worse = epoch, parameters.copy(), 0
        else:
            self.n_worse += 1
        return self.patience is None or self.n_worse <= self.patience


@dataclass
class Progress:
    """Where a run is between two epochs, or two rounds: all that has to survive a kill."""

    state: Any
    """parameters and what the optimiser remembers, as arrays, numbers, tuples and dataclasses"""
    history: list[Any]
    best: BestSoFar
    finished: bool = False

    def save(self, checkpoint: Checkpoint | None) -> None:
        """Write the checkpoint, where there is one."""
        if checkpoint is None:
            return
        facts = {
            "history": [asdict(epoch) for epoch in self.history],
            "best": self.history.index(self.best.epoch),
            "n_worse": self.best.n_worse,
            "finished": self.finished,
        }
        checkpoint.save((self.state, self.best.parameters), facts)


def checkpoint_at(
    path: str | Path | None,
    shuffling: np.random.Generator,
    dropout: np.random.Generator | None,
    **run: Any,
) -> Checkpoint | None:
    """Return the checkpoint of a run with these streams, data and settings, if one is wanted."""
    if path is None:
        return None
    return Checkpoint(path, {"shuffling": shuffling, "dropout": dropout}, **run)


def resumed(
    checkpoint: Checkpoint | None,
    state: Any,
    parameters: np.ndarray,
    kind: type,
    patience: int | None,
    is_validated: bool,
) -> Progress | None:
    """Return where a run was when it was killed, or None if it has not begun.

    ``state`` and ``parameters`` are built like those that were saved; ``kind`` is the history's.
    """

    def restore(saved: tuple[Any, np.ndarray], facts: dict[str, Any]) -> Progress:
        fields = get_type_hints(kind)
        for row in facts["history"]:
            for name, type_ in fields.items():
                if isinstance(row[name], bool) or not isinstance(row[name], type_):
                    raise TypeError(f"{name} is {row[name]!r}")
        history = [kind(**row) for row in facts["history"]]
        if not all(epoch.stands_at(place) for place, epoch in enumerate(history)):
            raise ValueError("the history is out of order")
        if not history[-1].ends_round:
            raise ValueError(f"the history ends within a round, at {history[-1]}")
        counts = facts["best"], facts["n_worse"]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"best and n_worse are {counts}")
        if type(facts["finished"]) is not bool:
            raise TypeError(f"finished is {facts['finished']!r}")
        state, best_parameters = saved
        best = BestSoFar(patience, history[facts["best"]], best_parameters, facts["n_worse"])
        if not best.epoch.ends_round or (best.epoch.validation_loss is not None) != is_validated:
            raise ValueError(f"the best is {best.epoch}")
        require_numbers(best_parameters, "the best epoch")
        return Progress(state, history, best, facts["finished"])

    return None if checkpoint is None else checkpoint.load((state, parameters), restore)


def require_at_least(least: int, **settings: int) -> None:
    """Refuse settings below their least value."""
    for name, value in settings.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}; found {value}")


def hash_of_all(targets: np.ndarray, validation: tuple[np.ndarray, np.ndarray] | None) -> str:
    """Return the fingerprint of training and held-out labels together."""
    return labels_hash(targets if validation is None else np.concatenate([targets, validation[1]]))


def require_numbers(parameters: np.ndarray, when: str) -> None:
    """Raise FloatingPointError for NaN, which a ReLU turns into zero: a loss need not show it."""
    if np.isnan(parameters).any():
        raise FloatingPointError(f"a parameter is nan after {when}")


def minibatches(
    n: int, batch_size: int, rng: np.random.Generator, like: Any = None
) -> list[np.ndarray]:
    """Return the samples 0..n-1 in random order, cut into batches; the last may be smaller.

    The order is drawn on the CPU, the same wherever it is used, and moved to where ``like`` is.
    """
    order = np.asarray(rng.permutation(n), like=like)
    return [order[part] for part in slices(n, batch_size)]


def _gathered(name: str, values: Any, batch: np.ndarray, buffers: Buffers) -> Any:
    """Return some samples' features or targets; what is no array can be indexed like one."""
    if not hasattr(values, "dtype"):
        return values[batch]
    out = buffers.take(name, (batch.size, *values.shape[1:]), values.dtype, like=values)
    kernels.gather_rows(values, batch, out)
    return out


def run_epoch(
    model: Model,
    parameters: np.ndarray,
    x: np.ndarray,
    targets: np.ndarray,
    optimiser: Optimiser,
    state: Any,
    *,
    batch_size: int,
    shuffling: np.random.Generator,
    dropout: np.random.Generator | None = None,
    step_factors: np.ndarray | float = 1.0,
) -> int:
    """Go through the samples once, moving ``parameters`` and ``state`` in place.

    Returns the number of mini-batch gradients taken. Arguments as for :func:`train`.

    On a GPU the second step is recorded, and repeated for all full batches but the first: the same
    kernels on the same numbers.
    """
    buffers = Buffers()

    def step(batch: np.ndarray, rng: Any, *numbers: Any) -> None:
        x_batch = _gathered("x", x, batch, buffers)
        targets_batch = _gathered("targets", targets, batch, buffers)
        _, gradient = model.loss_and_gradient(parameters, x_batch, targets_batch, rng, buffers)
        optimiser.update(parameters, gradient, state, step_factors, *numbers)

    n = x.shape[0]
    n_full = n // batch_size
    if n_full <= LEAST_RECORDED or not _can_record(model, x, targets, optimiser):
        batches = minibatches(n, batch_size, shuffling, like=x)
        for batch in batches:
            step(batch, dropout)
        return len(batches)

    batches = minibatches(n, batch_size, shuffling)
    draw = None if dropout is None else partial(new_seed, dropout)
    with kernels.recording_stream() as record:
        step(np.asarray(batches[0], like=x), dropout)
        repeat(step, batches[1:n_full], draw, record, like=x)
        for batch in batches[n_full:]:
            step(np.asarray(batch, like=x), dropout)
    return len(batches)


def _can_record(model: Model, x: np.ndarray, targets: Any, optimiser: Optimiser) -> bool:
    """Return whether all that a step does may be recorded on a GPU; elsewhere nothing is."""
    return (
        kernels.can_record(x)
        and kernels.can_record(targets)
        and isinstance(model, PlainModel | NoiseModel)
        and type(model) in _RECORDED_MODELS
        and all(type(layer) in _RECORDED_LAYERS for layer in model.network.layers)
        and can_be_recorded(optimiser)
    )


def _check_data(model: Model, parameters: np.ndarray, x: np.ndarray, targets: Any) -> None:
    """Refuse data that do not fit the model, or lie on the CPU with parameters on a GPU."""
    checks.check_same_home("x", x, "parameters", parameters)
    checks.check_same_home("targets", targets, "parameters", parameters)
    model.check(parameters, x, targets)


def train(
    model: Model,
    parameters: np.ndarray,
    x: np.ndarray,
    targets: np.ndarray,
    *,
    shuffling: np.random.Generator,
    dropout: np.random.Generator | None = None,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    n_epochs: int = 40,
    patience: int | None = 4,
    batch_size: int = 256,
    optimiser: Optimiser | None = None,
    step_factors: np.ndarray | float = 1.0,
    with_loss: bool = True,
    on_epoch: Callable[[Epoch, np.ndarray], None] | None = None,
    checkpoint: str | Path | None = None,
) -> Training:
    """Minimise a model's loss by mini-batches and return the best parameters seen.

    With CuPy arrays for parameters and data all of it happens on their GPU, with the CPU's random
    numbers: the order of the samples and the dropout masks are the same for the same seeds. Nothing
    waits for the GPU but the look at the losses at the end of an epoch. The steps of an epoch are
    one step's kernels, recorded as a CUDA graph and repeated, with Adam, this package's layers and
    the plain, soft-target, s- and c-models; others take them one by one.
    :func:`nalayer.devices.to_device` moves arrays, and models with links, there.

    Parameters
    ----------
    model : Model
    parameters : (n_parameters,)
        Where to start; not written.
    x : (n, n_in)
    targets : (n,) or (n, K)
        What the model is trained on: noisy labels, or posteriors.
    shuffling, dropout : Generator
        Streams for the order of the samples and for the dropout masks; ``dropout=None`` trains
        without dropout.
    validation : (x, targets), optional
        Held-out samples with labels as noisy as the others. The parameters returned are those of
        the epoch, the start included, with the lowest ``model.validation_loss`` here: without
        pseudo-counts; the linear channel's with its pull. Without it they are the last.
    n_epochs, patience, batch_size : int
        Training stops after ``n_epochs``, or once ``patience + 1`` epochs in a row did not improve
        the validation loss. The defaults are those of the paper's code.
    optimiser : Optimiser, optional
        :class:`~nalayer.optimisers.Adam` with its defaults when None.
    step_factors : array or float
        Multiplies each parameter's step, see :meth:`nalayer.models.SModel.step_factors`.
    with_loss : bool
        False spares the evaluation of all training samples after every epoch. Needs
        ``validation``.
    on_epoch : callable, optional
        Called with every :class:`Epoch` and the parameters at its end.
    checkpoint : str or Path, optional
        A file that is replaced after every epoch, in one step. A run that was killed, at any
        moment, goes on from it when it is started again with the same arguments, the generators
        as they were at the start: parameters, history (but for ``seconds``, which leave the pause
        out) and random streams end bit for bit where they would have, with the same versions of
        the libraries on the same kind of machine. ``on_epoch`` sees the epochs after the last
        checkpoint only. A finished run is returned from its file.

    Returns
    -------
    Training

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, before the first step.
    CheckpointError
        A ValueError: ``checkpoint`` is damaged, cannot be written, or belongs to a run with another
        model, data or settings; the message names them.
    FloatingPointError
        If the loss (without it: the validation loss) stops being finite or a parameter becomes NaN,
        naming the epoch.
    """
    _check_data(model, parameters, x, targets)
    checks.check_generator("shuffling", shuffling)
    if dropout is not None:
        checks.check_generator("dropout", dropout)
    if np.shape(step_factors) not in ((), parameters.shape):
        raise ValueError(
            f"step_factors must be a number or have shape {parameters.shape}; "
            f"found {np.shape(step_factors)}"
        )
    if validation is not None:
        _check_data(model, parameters, *validation)
    if validation is None and not with_loss:
        raise ValueError("with_loss must be True where there is no validation: nothing is judged")
    require_at_least(1, batch_size=batch_size)
    require_at_least(0, n_epochs=n_epochs, patience=patience or 0)
    if optimiser is None:
        optimiser = Adam()
    kept = checkpoint_at(
        checkpoint,
        shuffling,
        dropout,
        model=model,
        parameters=parameters,
        x=x,
        targets=targets,
        validation=validation,
        n_epochs=n_epochs,
        patience=patience,
        batch_size=batch_size,
        optimiser=optimiser,
        step_factors=step_factors,
        with_loss=with_loss,
    )
    if checks.is_on_gpu(parameters) and np.ndim(step_factors) > 0:
        step_factors = np.asarray(step_factors, parameters.dtype, like=parameters)
    parameters = parameters.copy()
    state = optimiser.initial_state(parameters)
    started, n_gradients = time.perf_counter(), 0

    def evaluate(number: int) -> Epoch:
        epoch = Epoch(
            number,
            model.loss(parameters, x, targets) if with_loss else None,
            None if validation is None else model.validation_loss(parameters, *validation),
            n_gradients,
            time.perf_counter() - started,
        )
        judged = epoch.loss if with_loss else epoch.validation_loss
        if judged is None or not np.isfinite(judged):
            kind = "training" if with_loss else "validation"
            raise FloatingPointError(f"the {kind} loss is {judged} after epoch {number}")
        require_numbers(parameters, f"epoch {number}")
        if on_epoch is not None:
            on_epoch(epoch, parameters)
        return epoch

    run = resumed(kept, (parameters, state), parameters, Epoch, patience, validation is not None)
    if run is None:
        start = evaluate(0)
        best = BestSoFar(patience, start, parameters.copy())
        run = Progress((parameters, state), [start], best, n_epochs == 0)
        run.save(kept)
    else:
        parameters, state = run.state
        n_gradients = run.history[-1].gradients
        started -= run.history[-1].seconds
    while not run.finished:
        n_gradients += run_epoch(
            model,
            parameters,
            x,
            targets,
            optimiser,
            state,
            batch_size=batch_size,
            shuffling=shuffling,
            dropout=dropout,
            step_factors=step_factors,
        )
        run.history.append(evaluate(len(run.history)))
        goes_on = run.best.see(run.history[-1], parameters)
        run.finished = not goes_on or len(run.history) > n_epochs
        run.save(kept)
    best = run.best
    return Training(best.parameters, run.history, best.epoch, hash_of_all(targets, validation))
