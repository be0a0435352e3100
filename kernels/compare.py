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

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.special import log_softmax as scipy_log_softmax

from kernels import exact
from kernels.results import CModelNLL, Posterior, SModelNLL, SoftmaxNLL

ALLOWED_UNITS = 2.0
# A c-model may treat gradients of single scores, of the sum over samples, below this as zero.
FLUSH = {np.dtype(np.float32): 1e-30, np.dtype(np.float64): 1e-300}


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


class _Errors(NamedTuple):
    """A model's numbers in float64 and their errors in roundings; T is 1, or n for a c-model."""

    q: np.ndarray
    """(n, K)"""
    theta: np.ndarray
    """(T, K, L): the links of each row; L is K for a dense model"""
    c: np.ndarray
    """(n, K), exact"""
    is_z: np.ndarray
    """(n, K, L): whether a link leads to z_t"""
    d_log_q: np.ndarray
    d_log_theta: np.ndarray
    d_log_c: np.ndarray
    d_log_m: np.ndarray


def _errors(
    logits: np.ndarray,
    channel_logits: np.ndarray,
    noisy_labels: np.ndarray,
    e_step: Posterior,
    support: np.ndarray | None = None,
    hidden: np.ndarray | None = None,
    channel_weights: np.ndarray | None = None,
) -> _Errors:
    k = logits.shape[1]
    if support is None:
        support = np.tile(np.arange(k), (k, 1))
    is_z = support[None] == noisy_labels[:, None, None]
    scores, d_score = channel_logits.astype(np.float64)[None], np.zeros((1, 1, 1))
    if hidden is not None and channel_weights is not None:
        h, u = hidden.astype(np.float64), channel_weights.astype(np.float64)
        product = np.einsum("ijd,td->tij", u, h)
        terms = np.einsum("ijd,td->tij", np.abs(u), np.abs(h))
        # A sum of d products, and the addition of B: -inf is exact.
        d_score = terms * (1 + np.log(h.shape[1])) + np.abs(product)
        d_score = np.where(np.isfinite(scores), d_score + np.abs(scores), 0.0)
        scores = scores + product
    log_q = _log_softmax(logits)
    log_theta = _log_softmax(scores.reshape(-1, scores.shape[-1])).reshape(scores.shape)
    theta = np.exp(log_theta)
    d_log_q = _log_softmax_error(log_q)
    d_log_theta = (
        _log_softmax_error(log_theta)
        + d_score
        + _weighted(theta, np.broadcast_to(d_score, theta.shape)).sum(axis=-1, keepdims=True)
    )

    def at_z(values: np.ndarray, missing: float) -> np.ndarray:
        picked = np.where(is_z, values, 0.0).sum(axis=-1)  # one link of a row at most
        return np.where(is_z.any(axis=-1), picked, missing)

    log_c = log_q + at_z(log_theta, -np.inf)
    d_log_joint = d_log_q + at_z(d_log_theta, np.inf) + np.abs(log_c)
    c, log_m = e_step.posterior.astype(np.float64), e_step.log_likelihood_t.astype(np.float64)
    d_log_m = _weighted(c, d_log_joint).sum(axis=1) + 1 + np.log(k) + np.abs(log_m)
    with np.errstate(divide="ignore"):
        d_log_c = d_log_joint + d_log_m[:, None] + np.abs(np.log(c))
    return _Errors(np.exp(log_q), theta, c, is_z, d_log_q, d_log_theta, d_log_c, d_log_m)


def _nll_units(e: _Errors, dtype: np.dtype, hidden=None, channel_weights=None) -> CModelNLL:
    """Return one unit for each number of a joint loss; without ``hidden`` two of them are zero."""
    eps, tiny = np.finfo(dtype).eps, np.finfo(dtype).tiny
    n = e.q.shape[0]
    d_c = _weighted(e.c, 1 + e.d_log_c)
    c, d_c3 = e.c[:, :, None], d_c[:, :, None]
    # The gradient of a score, c (theta - 1{j=z}), and its error in roundings.
    d_score = (
        np.where(e.is_z, d_c3, 0.0)
        + e.theta * d_c3
        + _weighted(e.theta * c, np.broadcast_to(1 + e.d_log_theta, e.is_z.shape))
    )
    d_hidden = d_channel_weights = np.zeros(())
    if hidden is not None:
        h, u = np.abs(hidden.astype(np.float64)), np.abs(channel_weights.astype(np.float64))
        size = np.abs(c * (e.theta - e.is_z))
        flushed = FLUSH[dtype] * n / eps
        over_t = d_score + size * (2 + np.log(n)) + flushed
        over_ij = d_score + size * (2 + np.log(size.shape[1] * size.shape[2])) + flushed
        d_channel_weights = np.einsum("tij,td->ijd", over_t, h)
        d_hidden = np.einsum("tij,ijd->td", over_ij, u)
    return CModelNLL(
        eps * e.d_log_m.mean(),
        (eps * (_weighted(e.q, 1 + e.d_log_q) + d_c) + tiny) / n,
        (eps * d_hidden + tiny) / n,
        (eps * d_channel_weights + tiny * n) / n,
        (eps * d_score.sum(axis=0) + tiny * n) / n,
    )


def _posterior_units(e: _Errors, dtype: np.dtype) -> Posterior:
    eps, tiny = np.finfo(dtype).eps, np.finfo(dtype).tiny
    return Posterior(eps * e.d_log_m, eps * _weighted(e.c, 1 + e.d_log_c) + tiny)


def _s_errors(logits, channel_logits, noisy_labels) -> _Errors:
    e_step = exact.s_model_posterior(logits, channel_logits, noisy_labels)
    return _errors(logits, channel_logits, noisy_labels, e_step)


def _sparse_s_errors(logits, channel_logits, support, noisy_labels) -> _Errors:
    e_step = exact.sparse_s_model_posterior(logits, channel_logits, support, noisy_labels)
    return _errors(logits, channel_logits, noisy_labels, e_step, support)


def _c_errors(logits, hidden, channel_weights, channel_logits, noisy_labels) -> _Errors:
    e_step = exact.c_model_posterior(logits, hidden, channel_weights, channel_logits, noisy_labels)
    return _errors(logits, channel_logits, noisy_labels, e_step, None, hidden, channel_weights)


def _sparse_c_errors(
    logits, hidden, channel_weights, channel_logits, support, noisy_labels
) -> _Errors:
    e_step = exact.sparse_c_model_posterior(
        logits, hidden, channel_weights, channel_logits, support, noisy_labels
    )
    return _errors(logits, channel_logits, noisy_labels, e_step, support, hidden, channel_weights)


_ERRORS: dict[str, Callable[..., _Errors]] = {
    "s_model": _s_errors,
    "sparse_s_model": _sparse_s_errors,
    "c_model": _c_errors,
    "sparse_c_model": _sparse_c_errors,
}


def units(kernel: str, *arrays: np.ndarray) -> tuple:
    """Return one unit of error for each number that a kernel returns, in its order."""
    if kernel == "softmax_nll":
        return softmax_nll_units(*arrays)
    if kernel == "soft_target_nll":
        return soft_target_nll_units(*arrays)
    model, result = kernel.rsplit("_", 1)
    errors, dtype = _ERRORS[model](*arrays), arrays[0].dtype
    if result == "posterior":
        return _posterior_units(errors, dtype)
    if model.endswith("c_model"):
        return _nll_units(errors, dtype, *arrays[1:3])
    nll, d_logits, _, _, d_channel_logits = _nll_units(errors, dtype)
    return SModelNLL(nll, d_logits, d_channel_logits)


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


class Truth:
    """The exact result of a kernel for given arrays, worked out once, to judge results against.

    Parameters
    ----------
    kernel : str
        Name of the kernel, as in :mod:`kernels.api`.
    *arrays
        The arguments, as the implementations get them.
    """

    def __init__(self, kernel: str, *arrays: np.ndarray) -> None:
        self.dtype = arrays[0].dtype
        self.exact = getattr(exact, kernel)(*arrays)
        self.units = units(kernel, *arrays)

    def worst_error(self, result: Any) -> float:
        """Return the largest error of a result, in units of rounding (see the module).

        The result is right if this is ``<= ALLOWED_UNITS``. It is NaN (so: not right) if a number
        is missing, has the wrong shape or dtype, or is NaN or infinite where the exact value is
        not.
        """
        worst = 0.0
        for found, exactly, unit in zip(result, self.exact, self.units, strict=True):
            found, exactly = np.asarray(found), np.asarray(exactly, dtype=object)
            if found.shape != exactly.shape or found.dtype != self.dtype:
                return np.nan
            unit = np.broadcast_to(unit, found.shape)
            worst = max(worst, _worst(found, exactly, unit), key=_nan_last)
        return worst


def worst_error(kernel: str, result: Any, *arrays: np.ndarray) -> float:
    """Return :meth:`Truth.worst_error` of one result."""
    return Truth(kernel, *arrays).worst_error(result)


def _nan_last(value: float) -> float:
    return np.inf if np.isnan(value) else value
