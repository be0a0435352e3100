"""The one comparison: how far a kernel's result may be from the exact value, and how far it is.

The allowance is not set by hand. It follows from the arithmetic: a first-order analysis of what
one rounding of each intermediate number does to the result. Errors are counted in that unit, and
a result is right if its worst error is at most :data:`ALLOWED_UNITS`.

The analysis. A log-probability log p_i of a row of K is a subtraction of a shifted maximum and the
log of a sum: its error is about ``eps * (1 + log K + |log p_i|)``. Errors of logs add; ``exp``
turns an absolute error of its argument into a relative one of its value. A log-sum-exp passes on
the average of its terms' errors, weighted by their softmax. Everything below is those four rules.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import log_softmax as scipy_log_softmax

from kernels import exact
from kernels.results import Posterior, SModelNLL, SoftmaxNLL

ALLOWED_UNITS = 2.0


def _weighted(weights: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Return weights * errors, where a weight of zero silences an infinite error."""
    with np.errstate(invalid="ignore"):
        return np.where(weights > 0, weights * errors, 0.0)


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    """Return log-probabilities in float64 from a library: the units must not lean on our own."""
    return scipy_log_softmax(scores.astype(np.float64), axis=1)


def _log_softmax_error(log_p: np.ndarray) -> np.ndarray:
    """Return the error of each log-probability, in roundings."""
    return 1 + np.log(log_p.shape[-1]) + np.abs(log_p)


def softmax_nll_units(logits: np.ndarray, labels: np.ndarray) -> SoftmaxNLL:
    """Return one unit of error for each number that ``softmax_nll`` returns."""
    return soft_target_nll_units(logits, np.eye(logits.shape[1], dtype=logits.dtype)[labels])


def soft_target_nll_units(logits: np.ndarray, targets: np.ndarray) -> SoftmaxNLL:
    """Return one unit of error for each number that ``soft_target_nll`` returns."""
    eps, tiny = np.finfo(logits.dtype).eps, np.finfo(logits.dtype).tiny
    n = logits.shape[0]
    log_q = _log_softmax(logits)
    q, d_log_q = np.exp(log_q), _log_softmax_error(log_q)
    nll = _weighted(targets, d_log_q + np.abs(log_q)).sum() / n
    return SoftmaxNLL(eps * nll, (eps * (_weighted(q, d_log_q) + q + targets) + tiny) / n)


def _s_model_errors(logits: np.ndarray, channel_logits: np.ndarray, noisy_labels: np.ndarray):
    """Return q, theta, c (float64) and the relative errors of the three, and that of log m."""
    log_q = _log_softmax(logits)
    log_theta = _log_softmax(channel_logits)
    log_c = log_q + log_theta.T[noisy_labels]
    d_log_q, d_log_theta = _log_softmax_error(log_q), _log_softmax_error(log_theta)
    d_log_joint = d_log_q + d_log_theta.T[noisy_labels] + np.abs(log_c)
    e_step = exact.s_model_posterior(logits, channel_logits, noisy_labels)
    c, log_m = e_step.posterior.astype(np.float64), e_step.log_likelihood_t.astype(np.float64)
    d_log_m = _weighted(c, d_log_joint).sum(axis=1) + 1 + np.log(logits.shape[1]) + np.abs(log_m)
    with np.errstate(divide="ignore"):
        d_log_c = d_log_joint + d_log_m[:, None] + np.abs(np.log(c))
    return np.exp(log_q), np.exp(log_theta), c, d_log_q, d_log_theta, d_log_c, d_log_m


def s_model_nll_units(
    logits: np.ndarray, channel_logits: np.ndarray, noisy_labels: np.ndarray
) -> SModelNLL:
    """Return one unit of error for each number that ``s_model_nll`` returns."""
    eps, tiny = np.finfo(logits.dtype).eps, np.finfo(logits.dtype).tiny
    n, k = logits.shape
    q, theta, c, d_log_q, d_log_theta, d_log_c, d_log_m = _s_model_errors(
        logits, channel_logits, noisy_labels
    )
    d_c = _weighted(c, 1 + d_log_c)
    d_counts = np.zeros((k, k))
    np.add.at(d_counts.T, noisy_labels, d_c)
    d_n_i = d_counts.sum(axis=1, keepdims=True)
    n_i = c.sum(axis=0)[:, None]
    d_channel = d_counts + theta * d_n_i + _weighted(theta * n_i, 1 + d_log_theta)
    return SModelNLL(
        eps * d_log_m.mean(),
        (eps * (_weighted(q, 1 + d_log_q) + d_c) + tiny) / n,
        (eps * d_channel + tiny * n) / n,
    )


def s_model_posterior_units(
    logits: np.ndarray, channel_logits: np.ndarray, noisy_labels: np.ndarray
) -> Posterior:
    """Return one unit of error for each number that ``s_model_posterior`` returns."""
    eps, tiny = np.finfo(logits.dtype).eps, np.finfo(logits.dtype).tiny
    *_, c, _, _, d_log_c, d_log_m = _s_model_errors(logits, channel_logits, noisy_labels)
    return Posterior(eps * d_log_m, eps * _weighted(c, 1 + d_log_c) + tiny)


def _worst(found: np.ndarray, truth: np.ndarray, unit: np.ndarray) -> float:
    """Return the largest error in units; NaN where one side alone is NaN or infinite."""
    truth64 = truth.astype(np.float64)
    same = (np.isnan(found) & np.isnan(truth64)) | (np.isinf(truth64) & (found == truth64))
    if not (same | (np.isfinite(found) & np.isfinite(truth64))).all():
        return np.nan
    # The difference is taken in decimals; in float64 it would be rounded away.
    errors = [
        abs(float(exact.Decimal(float(f)) - t)) / u
        for f, t, u, s in zip(found.flat, truth.flat, unit.flat, same.flat, strict=True)
        if not s
    ]
    return max(errors, default=0.0)


def worst_error(kernel: str, result: Any, *arrays: np.ndarray) -> float:
    """Return the largest error of a kernel's result, in units of rounding (see the module).

    Parameters
    ----------
    kernel : str
        Name of the kernel, as in :mod:`kernels.api`.
    result
        What an implementation returned for ``arrays``.
    *arrays
        The arguments, as the implementation got them.

    Returns
    -------
    float
        The result is right if this is ``<= ALLOWED_UNITS``. NaN (so: not right) if a number is
        missing, has the wrong shape or dtype, or is NaN or infinite where the exact value is not.
    """
    truth = getattr(exact, kernel)(*arrays)
    units = globals()[f"{kernel}_units"](*arrays)
    worst = 0.0
    for found, exactly, unit in zip(result, truth, units, strict=True):
        found, exactly = np.asarray(found), np.asarray(exactly, dtype=object)
        if found.shape != exactly.shape or found.dtype != arrays[0].dtype:
            return np.nan
        worst = max(
            worst, _worst(found, exactly, np.broadcast_to(unit, found.shape)), key=_nan_last
        )
    return worst


def _nan_last(value: float) -> float:
    return np.inf if np.isnan(value) else value
