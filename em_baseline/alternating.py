"""Alternating EM for the s-model: E-step, noise matrix in closed form, network, and again."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from em_baseline.steps import NetworkStep, e_step, expected_counts, noise_matrix_m_step
from kernels import checks
from nalayer.models import SModel, SoftTargetModel
from nalayer.network import Network
from nalayer.noise_layer import log_with_zeros, noise_matrix
from nalayer.training import BestSoFar, hash_of_all, require_at_least


class LikelihoodDropWarning(RuntimeWarning):
    """A half-step of EM lowered the likelihood by more than rounding."""


@dataclass(frozen=True)
class HalfStep:
    """Where EM stood after a half-step.

    ``half`` is "start" (round 0), "noise matrix" or "network". ``log_likelihood`` is L of Eq. 2
    (nats, **sum** over the training samples, plus the pseudo-counts' term if there are any), for
    the parameters after this half-step and without dropout. ``gradients`` and ``seconds`` count
    from the start.
    """

    round: int
    half: str
    log_likelihood: float
    loss: float
    """the same per sample, sign turned: comparable with nalayer.training.Epoch.loss"""
    validation_loss: float | None
    gradients: int
    seconds: float


@dataclass(frozen=True)
class EMFit:
    """What :func:`fit` returns."""

    weights: np.ndarray
    channel_logits: np.ndarray
    history: list[HalfStep]
    best: HalfStep
    """the half-step whose parameters these are"""
    labels_hash: str
    """fingerprint of all labels used, the held-out ones last, taken from what EM was given"""


def rounding_of(log_likelihood: float, n: int, dtype: Any = np.float64) -> float:
    """Return by how much a sum of n log-likelihoods may err: c eps |L| sqrt(n), with c = 4."""
    return float(4 * np.finfo(dtype).eps * abs(log_likelihood) * np.sqrt(n))


def fit(
    network: Network,
    weights: np.ndarray,
    channel_logits: np.ndarray,
    x: np.ndarray,
    noisy_labels: np.ndarray,
    *,
    network_step: NetworkStep,
    n_rounds: int,
    shuffling: np.random.Generator,
    dropout: np.random.Generator | None = None,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    patience: int | None = None,
    damping: float = 1.0,
    pseudo_count: float = 0.0,
    fresh_posterior: bool = False,
    tolerance: float = 0.0,
    backend: str | None = None,
    on_half_step: Callable[[HalfStep, np.ndarray, np.ndarray], None] | None = None,
) -> EMFit:
    """Maximise the likelihood of Eq. 2 by alternating EM, from a warm start.

    A round is: the E-step (Eq. 3) at the current parameters; the noise matrix in closed form
    (Eq. 4); the network's weights by raising S(w) (Eqs. 5-6).

    Parameters
    ----------
    network : Network
    weights : (n_weights,)
    channel_logits : (K, K)
        Where to start; neither is written.
    x : (n, n_in)
    noisy_labels : (n,) integer
    network_step : NetworkStep
        How to raise S(w): :class:`~em_baseline.MiniBatches`,
        :class:`~em_baseline.OneGradientStep` or :class:`~em_baseline.LBFGS`.
    n_rounds : int
    shuffling, dropout : Generator
        As in :func:`nalayer.train`.
    validation : (x, noisy labels), optional
    patience : int, optional
        As in :func:`nalayer.train`, in rounds. Half-steps "start" and "network" are compared.
    damping : float
        eta in (0, 1]: theta <- (1 - eta) theta + eta theta+. 1 is plain EM. Q is concave in
        theta, so any eta still climbs.
    pseudo_count : float
        Dirichlet pseudo-count alpha on theta; the likelihood gains ``alpha sum_ij log theta_ij``.
    fresh_posterior : bool
        True repeats the E-step between the halves (ECM with two cycles, Meng & Rubin 1993). Then
        every half-step climbs; in plain EM only the round as a whole has to.
    tolerance : float
        Stop once a round moves no entry of theta by more than this and L by no more than this
        many nats per sample. 0 stops only when nothing moves any more.
    backend : {"numpy", "numba"}, optional
    on_half_step : callable, optional
        Called with every :class:`HalfStep`, the weights and the channel logits after it.

    Returns
    -------
    EMFit

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, before the first round.
    FloatingPointError
        If the likelihood stops being finite.

    Warns
    -----
    LikelihoodDropWarning
        If a half-step lowers the likelihood by more than rounding, saying by how much. An inexact
        M-step can do that.
    """
    n = max(len(x), 1)  # without samples the check below refuses x
    joint = SModel(network, pseudo_count, n, backend)
    joint.check(joint.pack(weights, channel_logits), x, noisy_labels)
    checks.check_generator("shuffling", shuffling)
    if validation is not None:
        joint.check(joint.pack(weights, channel_logits), *validation)
        unseen = np.setdiff1d(validation[1], noisy_labels)
        if unseen.size and not pseudo_count:
            raise ValueError(
                f"validation holds label {unseen[0]}, which no training sample has: Eq. 4 gives it "
                "probability zero; hold out other samples or use a pseudo_count"
            )
    require_at_least(0, n_rounds=n_rounds, patience=patience or 0)
    if not 0 < damping <= 1:
        raise ValueError(f"damping must lie in (0, 1]; found {damping}")
    m_step_model = SoftTargetModel(network, backend)
    state = network_step.initial_state(weights)
    started, n_gradients = time.perf_counter(), 0
    history: list[HalfStep] = []
    theta = noise_matrix(channel_logits.astype(np.float64))

    def record(number: int, half: str, log_likelihood_t: np.ndarray) -> HalfStep:
        likelihood = float(log_likelihood_t.sum(dtype=np.float64))
        likelihood -= n * joint.penalty(channel_logits)[0]
        held_out = None
        if validation is not None and half != "noise matrix":
            held_out = joint.nll(joint.pack(weights, channel_logits), *validation)
        if not np.isfinite(likelihood):
            raise FloatingPointError(
                f"the log-likelihood is {likelihood} after half-step '{half}' of round {number}"
            )
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
            on_half_step(step, weights, channel_logits)
        return step

    logits = network.logits(weights, x)
    log_likelihood_t, posterior = e_step(
        logits, channel_logits, noisy_labels, backend, check_values=False
    )
    start = record(0, "start", log_likelihood_t)
    best = BestSoFar(patience, start, joint.pack(weights, channel_logits))

    for number in range(1, n_rounds + 1):
        round_start, theta_start = history[-1], theta
        theta_plus = noise_matrix_m_step(
            expected_counts(posterior, noisy_labels), theta, pseudo_count
        )
        theta = (1 - damping) * theta + damping * theta_plus
        channel_logits = log_with_zeros(theta).astype(weights.dtype)
        log_likelihood_t, refreshed = e_step(
            logits, channel_logits, noisy_labels, backend, check_values=False
        )
        record(number, "noise matrix", log_likelihood_t)

        weights, taken = network_step.run(
            m_step_model,
            weights,
            x,
            refreshed if fresh_posterior else posterior,
            state,
            shuffling,
            dropout,
        )
        n_gradients += taken
        logits = network.logits(weights, x)
        log_likelihood_t, posterior = e_step(
            logits, channel_logits, noisy_labels, backend, check_values=False
        )
        step = record(number, "network", log_likelihood_t)
        if not best.see(step, joint.pack(weights, channel_logits)):
            break
        moved = max(np.abs(theta - theta_start).max(), abs(step.loss - round_start.loss))
        if moved <= tolerance:
            break
    best_weights, best_channel_logits = joint.unpack(best.parameters)
    return EMFit(
        best_weights,
        best_channel_logits,
        history,
        best.epoch,
        hash_of_all(noisy_labels, validation),
    )


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
