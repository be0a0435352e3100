"""Alternating EM for the four models: E-step, noise layer, network, and again."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from em_baseline.steps import MStep, NetworkHalf, NoiseRegressions, e_step, noise_matrix_m_step
from kernels import checks
from nalayer.completed import Completed, expected_counts
from nalayer.models import CModel, Model, SModel
from nalayer.noise_layer import log_with_zeros, noise_matrix
from nalayer.training import (
    BestSoFar,
    Progress,
    checkpoint_at,
    hash_of_all,
    require_at_least,
    require_numbers,
    resumed,
)
from nalayer.weighting import WeightedModel, parts_of


class LikelihoodDropWarning(RuntimeWarning):
    """A half-step of EM lowered the likelihood by more than rounding."""


@dataclass(frozen=True)
class HalfStep:
    """Where EM stood after a half-step.

    ``half`` is "start" (round 0), "noise matrix" (a c-model's many of them included) or "network".
    ``log_likelihood`` is L of Eq. 2 (nats, **sum** over the training samples, plus the
    pseudo-counts' term if there are any), for the parameters after this half-step and without
    dropout. ``gradients``, of both halves, and ``seconds`` count from the start.
    """

    round: int
    half: str
    log_likelihood: float
    loss: float
    """the same per sample, sign turned: comparable with nalayer.training.Epoch.loss"""
    validation_loss: float | None
    gradients: int
    seconds: float

    def stands_at(self, place: int) -> bool:
        """Return whether a history holds it at this place: the start, then two a round."""
        half = "start" if place == 0 else ("network", "noise matrix")[place % 2]
        return self.round == (place + 1) // 2 and self.half == half

    @property
    def ends_round(self) -> bool:
        """Whether a run may be saved here, and the best be this: not between two halves."""
        return self.half != "noise matrix"


@dataclass(frozen=True)
class EMFit:
    """What :func:`fit` returns."""

    parameters: np.ndarray
    """network weights and channel, as the model packs them"""
    history: list[HalfStep]
    best: HalfStep
    """the half-step whose parameters these are"""
    labels_hash: str
    """fingerprint of all labels used, the held-out ones last, taken from what EM was given"""


def rounding_of(log_likelihood: float, n: int, dtype: Any = np.float64) -> float:
    """Return by how much a sum of n log-likelihoods may err: c eps |L| sqrt(n), with c = 4."""
    return float(4 * np.finfo(dtype).eps * abs(log_likelihood) * np.sqrt(n))


class _ClosedForm:
    """The noise half of an s-model's M-step: Eq. 4, damped if so wished."""

    def __init__(self, model: SModel, channel: Sequence[np.ndarray], damping: float) -> None:
        self.model, self.damping, self.moved = model, damping, np.inf
        self.dtype = channel[0].dtype
        # theta (of a sparse model: its links), which float32 logits would round
        self.carried = noise_matrix(channel[0].astype(np.float64))

    def run(
        self, channel: Sequence[np.ndarray], outputs: Sequence[np.ndarray], data: Completed
    ) -> tuple[tuple[np.ndarray, ...], int]:
        """Return the new channel, for which no gradient was taken."""
        counts_ij = expected_counts(data.posterior, data.noisy_labels, self.model.links)
        theta_plus = noise_matrix_m_step(counts_ij, self.carried, self.model.pseudo_counts)
        theta = (1 - self.damping) * self.carried + self.damping * theta_plus
        self.moved = float(np.abs(theta - self.carried).max())
        self.carried = theta
        return (log_with_zeros(theta).astype(self.dtype),), 0


class _Regressions:
    """The noise half of a c-model's M-step: k weighted softmax regressions, by gradients."""

    def __init__(
        self,
        model: CModel,
        channel: Sequence[np.ndarray],
        step: MStep,
        shuffling: np.random.Generator,
    ) -> None:
        self.objective, self.step, self.shuffling = NoiseRegressions(model), step, shuffling
        self.carried, self.moved = step.initial_state(_flat(channel)), np.inf

    def run(
        self, channel: Sequence[np.ndarray], outputs: Sequence[np.ndarray], data: Completed
    ) -> tuple[tuple[np.ndarray, ...], int]:
        """Return the new channel and the number of gradients taken."""
        _, hidden = outputs
        before = _flat(channel)
        after, taken = self.step.run(
            self.objective, before, hidden, data, self.carried, self.shuffling, None
        )
        with np.errstate(invalid="ignore"):  # a zero of theta, log 0, stays and has not moved
            moved = np.where(after != before, after - before, 0)
        self.moved = float(np.abs(moved).max())
        return self.objective.model.unpack_channel(after), taken


def _flat(channel: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([values.ravel() for values in channel])


def fit(
    model: SModel | CModel,
    parameters: np.ndarray,
    x: np.ndarray,
    noisy_labels: np.ndarray,
    *,
    network_step: MStep,
    noise_step: MStep | None = None,
    n_rounds: int,
    shuffling: np.random.Generator,
    dropout: np.random.Generator | None = None,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    patience: int | None = None,
    damping: float = 1.0,
    fresh_posterior: bool = False,
    tolerance: float = 0.0,
    on_half_step: Callable[[HalfStep, np.ndarray], None] | None = None,
    checkpoint: str | Path | None = None,
) -> EMFit:
    """Maximise the likelihood of Eq. 2 by alternating EM, from a warm start.

    A round is: the E-step (Eq. 3) at the current parameters; the noise layer, for an s-model in
    closed form (Eq. 4), for a c-model by k weighted softmax regressions of the labels on h(x); the
    network's weights by raising Q (Eqs. 5-6, and for a c-model what comes through h(x)). Halves
    that raise Q without maximising it make this generalised EM; V5 accounts for what they gain.

    With CuPy arrays (:func:`nalayer.devices.to_device`) all of it is computed on the GPU. It is
    waited for after every half-step, whose likelihood is wanted, by the regressions of a sparse
    c-model and by L-BFGS, which steps on the CPU.

    Parameters
    ----------
    model : SModel or CModel, dense or sparse
        Its pseudo-counts count here too: alpha on every entry of theta that there is, in Eq. 4 and
        in the likelihood, ``alpha sum_ij log theta_ij``.
    parameters : (model.n_parameters,)
        Where to start; not written.
    x : (n, n_in)
    noisy_labels : (n,) integer, or what :func:`nalayer.weighting.weighted_labels` makes of them
        With weights, every sample counts in the likelihood, in N_ij and in S(w) as its weight says.
    network_step : MStep
        How to raise Q in the network's weights: :class:`~em_baseline.MiniBatches`,
        :class:`~em_baseline.OneGradientStep` or :class:`~em_baseline.LBFGS`.
    noise_step : MStep, optional
        How to raise Q in a c-model's U and B, by one of the same; h(x) is taken without dropout.
        Needed for a c-model, and refused for an s-model.
    n_rounds : int
    shuffling, dropout : Generator
        As in :func:`nalayer.train`.
    validation : (x, noisy labels), optional
        With weights if ``noisy_labels`` has them. Judged by ``model.nll``, without pseudo-counts.
        An s-model's may have labels that no training sample has only where pseudo-counts reach
        them: Eq. 4 makes their columns zero otherwise.
    patience : int, optional
        As in :func:`nalayer.train`, in rounds. Half-steps "start" and "network" are compared.
    damping : float
        eta in (0, 1]: theta <- (1 - eta) theta + eta theta+. 1 is plain EM. Q is concave in
        theta, so any eta still climbs. For s-models.
    fresh_posterior : bool
        True repeats the E-step between the halves (ECM with two cycles, Meng & Rubin 1993). Then
        every half-step climbs; in plain EM only the round as a whole has to.
    tolerance : float
        Stop once a round moves no entry of theta by more than this (c-model: no parameter at all,
        for h(x) shapes theta too) and L by no more than this many nats per sample. 0 stops only
        when nothing moves any more.
    on_half_step : callable, optional
        Called with every :class:`HalfStep` and the parameters after it.
    checkpoint : str or Path, optional
        As in :func:`nalayer.train`, replaced after every round.

    Returns
    -------
    EMFit

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, before the first round.
    CheckpointError
        As in :func:`nalayer.train`.
    FloatingPointError
        If the likelihood stops being finite or a parameter becomes NaN.

    Warns
    -----
    LikelihoodDropWarning
        If a half-step lowers the likelihood by more than rounding, saying by how much. An inexact
        M-step can do that.
    """
    _check_data(model, parameters, x, noisy_labels, validation)
    checks.check_generator("shuffling", shuffling)
    require_at_least(0, n_rounds=n_rounds, patience=patience or 0)
    kept = checkpoint_at(
        checkpoint,
        shuffling,
        dropout,
        model=model,
        parameters=parameters,
        x=x,
        targets=noisy_labels,
        network_step=network_step,
        noise_step=noise_step,
        n_rounds=n_rounds,
        validation=validation,
        patience=patience,
        damping=damping,
        fresh_posterior=fresh_posterior,
        tolerance=tolerance,
    )
    n, judge = x.shape[0], _with_weights(model, noisy_labels)
    z, sample_weights = parts_of(noisy_labels)
    weights, *start_channel = model.unpack(parameters)
    channel = tuple(start_channel)
    noise_half = _noise_half(model, channel, noise_step, damping, shuffling)
    state = network_step.initial_state(weights)
    started, n_gradients = time.perf_counter(), 0
    history: list[HalfStep] = []

    def here() -> np.ndarray:
        return model.pack(weights, *channel)

    def carried() -> tuple[Any, ...]:
        return weights, channel, state, noise_half.carried

    def record(number: int, half: str, log_likelihood_t: np.ndarray) -> HalfStep:
        likelihood = float(log_likelihood_t.sum(dtype=np.float64))
        likelihood -= n * model.penalty(channel[-1])[0]
        held_out = None
        if validation is not None and half != "noise matrix":
            held_out = judge.nll(here(), *validation)
        if not np.isfinite(likelihood):
            raise FloatingPointError(
                f"the log-likelihood is {likelihood} after half-step '{half}' of round {number}"
            )
        require_numbers(here(), f"half-step '{half}' of round {number}")
        step = HalfStep(
            number,
            half,
            likelihood,
            -likelihood / n,
            held_out,
            n_gradients,
            time.perf_counter() - started,
        )
        if history:
            _warn_of_drop(history, step, rounding_of(likelihood, n, x.dtype))
        history.append(step)
        if on_half_step is not None:
            on_half_step(step, here())
        return step

    def repeat_e_step() -> tuple[np.ndarray, Completed]:
        found = e_step(model, outputs, channel, z, check_values=False)
        data = Completed.of(z, found.posterior, sample_weights)
        if sample_weights is None:
            return found.log_likelihood_t, data
        return sample_weights * found.log_likelihood_t, data

    run = resumed(kept, carried(), parameters, HalfStep, patience, validation is not None)
    if run is not None:
        weights, channel, state, noise_half.carried = run.state
        history = run.history
        n_gradients = history[-1].gradients
        started -= history[-1].seconds
    outputs, _ = model.forward(weights, x)
    log_likelihood_t, data = repeat_e_step()
    if run is None:
        best = BestSoFar(patience, record(0, "start", log_likelihood_t), here())
        run = Progress(carried(), history, best, n_rounds == 0)
        run.save(kept)

    while not run.finished:
        number, round_start, weights_start = history[-1].round + 1, history[-1], weights
        channel, taken = noise_half.run(channel, outputs, data)
        n_gradients += taken
        log_likelihood_t, refreshed = repeat_e_step()
        record(number, "noise matrix", log_likelihood_t)

        weights, taken = network_step.run(
            NetworkHalf(model, channel),
            weights,
            x,
            refreshed if fresh_posterior else data,
            state,
            shuffling,
            dropout,
        )
        n_gradients += taken
        outputs, _ = model.forward(weights, x)
        log_likelihood_t, data = repeat_e_step()
        step = record(number, "network", log_likelihood_t)
        goes_on = run.best.see(step, here())
        moved = max(noise_half.moved, abs(step.loss - round_start.loss))
        if isinstance(model, CModel):
            moved = max(moved, float(np.abs(weights - weights_start).max()))
        run.finished = not goes_on or moved <= tolerance or number >= n_rounds
        run.state = carried()
        run.save(kept)
    best = run.best
    return EMFit(best.parameters, history, best.epoch, hash_of_all(noisy_labels, validation))


def _check_data(
    model: SModel | CModel,
    parameters: np.ndarray,
    x: np.ndarray,
    noisy_labels: np.ndarray,
    validation: tuple[np.ndarray, np.ndarray] | None,
) -> None:
    """Refuse a start or data that do not fit the model, or each other."""
    for name, value in (("x", x), ("noisy_labels", noisy_labels)):
        checks.check_same_home(name, value, "parameters", parameters)
    judge = _with_weights(model, noisy_labels)
    judge.check(parameters, x, noisy_labels)
    pseudo_count = model.pseudo_count if isinstance(model, SModel) else 0.0
    if isinstance(model, SModel) and pseudo_count and model.n_samples != len(x):
        raise ValueError(
            f"model.n_samples must be {len(x)}, the number of samples, where pseudo_count is "
            f"positive; found {model.n_samples}"
        )
    if validation is None:
        return
    for value in validation:
        checks.check_same_home("validation", value, "parameters", parameters)
    judge.check(parameters, *validation)
    unseen = np.setdiff1d(parts_of(validation[1])[0], parts_of(noisy_labels)[0])
    if unseen.size and isinstance(model, SModel):
        lost = unseen[_pseudo_counts_of_labels(model, parameters)[unseen] == 0]
        if lost.size:
            raise ValueError(
                f"validation holds label {lost[0]}, which no training sample has: Eq. 4 gives it "
                "probability zero; hold out other samples or use a pseudo_count that reaches it"
            )


def _pseudo_counts_of_labels(model: SModel, like: np.ndarray) -> np.ndarray:
    """Return how many pseudo-counts there are on each column of the noise matrix: (K,)."""
    k = model.network.n_classes
    alpha_ij = np.zeros((k, model.n_kept), like=like) + model.pseudo_counts
    if model.links is None:
        return alpha_ij.sum(axis=0)
    return np.bincount(model.links.support.ravel(), alpha_ij.ravel(), k)


def _with_weights(model: SModel | CModel, noisy_labels: np.ndarray) -> Model:
    """Return what judges labels with weights, where they have some."""
    return model if parts_of(noisy_labels)[1] is None else WeightedModel(model)


def _noise_half(
    model: SModel | CModel,
    channel: Sequence[np.ndarray],
    noise_step: MStep | None,
    damping: float,
    shuffling: np.random.Generator,
) -> _ClosedForm | _Regressions:
    """Return the noise layer's half of the M-step; refuse settings that it has no use for."""
    if isinstance(model, SModel):
        if noise_step is not None:
            raise ValueError(
                "noise_step must be None for an s-model, whose noise matrix has a closed form "
                f"(Eq. 4); found {noise_step}"
            )
        if not 0 < damping <= 1:
            raise ValueError(f"damping must lie in (0, 1]; found {damping}")
        return _ClosedForm(model, channel, damping)
    if noise_step is None:
        raise ValueError(
            "noise_step must say how to fit a c-model's noise layer, which has no closed form, for "
            "instance em_baseline.LBFGS(); found None"
        )
    if damping != 1:
        raise ValueError(
            f"damping must be 1 for a c-model (a small noise_step does its work); found {damping}"
        )
    return _Regressions(model, channel, noise_step, shuffling)


def _warn_of_drop(history: list[HalfStep], step: HalfStep, rounding: float) -> None:
    """Warn if the likelihood fell by more than rounding."""
    drop = history[-1].log_likelihood - step.log_likelihood
    if drop <= rounding:
        return
    round_start = [s for s in history if s.round < step.round][-1].log_likelihood
    warnings.warn(
        f"half-step '{step.half}' of round {step.round} lowered the log-likelihood by {drop:.6g} "
        f"nats to {step.log_likelihood:.6g} (the round so far: "
        f"{step.log_likelihood - round_start:+.6g})",
        LikelihoodDropWarning,
        stacklevel=3,
    )
