"""The judge: the paper's equations as plain loops over 40-digit decimals.

Slow on purpose. Nothing here is fused, shifted or stabilised: probabilities are
formed as the paper prints them, and gradients by the chain rule through the
Jacobian of each softmax (the *long* derivative). The backends use the fused
derivative; that the two agree is what :mod:`kernels.compare` measures.

Every function takes floating-point arrays, converts them exactly, and returns the
named tuple of :mod:`kernels.results` filled with :class:`decimal.Decimal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Context, Decimal, localcontext

import numpy as np

from kernels.results import Posterior, SModelNLL, SoftmaxNLL

DIGITS = 40
# No traps: log 0 is -Infinity and 0/0 is NaN, as in the backends.
_CONTEXT = Context(prec=DIGITS, traps=[])

_ZERO, _ONE = Decimal(0), Decimal(1)


def _decimals(array: np.ndarray) -> list:
    """Convert a float array to nested lists of Decimals, without rounding."""
    if array.ndim == 1:
        return [Decimal(float(value)) for value in array]
    return [_decimals(row) for row in array]


def _softmax(scores: Sequence[Decimal]) -> list[Decimal]:
    """Return exp(s_i) / sum_j exp(s_j): Eq. 7 for a row of logits, Eq. 10 for a row of B."""
    weights = [score.exp() for score in scores]
    total = sum(weights, _ZERO)
    return [weight / total for weight in weights]


def _delta(i: int, j: int) -> Decimal:
    return _ONE if i == j else _ZERO


def softmax_nll(logits: np.ndarray, labels: np.ndarray) -> SoftmaxNLL:
    """Return :func:`kernels.softmax_nll` in 40-digit decimals."""
    with localcontext(_CONTEXT):
        n, k = logits.shape
        nll = _ZERO
        d_logits = np.full((n, k), _ZERO, dtype=object)
        for t, scores in enumerate(_decimals(logits)):
            q, z = _softmax(scores), int(labels[t])
            nll -= q[z].ln() / n
            for i in range(k):
                # dq_z/da_i = q_z (1{i=z} - q_i); the q_z cancels against d(-log q_z) = -dq_z/q_z
                d_logits[t, i] = -(_delta(i, z) - q[i]) / n
        return SoftmaxNLL(nll, d_logits)


def soft_target_nll(logits: np.ndarray, targets: np.ndarray) -> SoftmaxNLL:
    """Return :func:`kernels.soft_target_nll` in 40-digit decimals."""
    with localcontext(_CONTEXT):
        n, k = logits.shape
        nll = _ZERO
        d_logits = np.full((n, k), _ZERO, dtype=object)
        for t, (scores, c) in enumerate(zip(_decimals(logits), _decimals(targets), strict=True)):
            q = _softmax(scores)
            for i in range(k):
                if c[i] != 0:  # 0 log 0 = 0
                    nll -= c[i] * q[i].ln() / n
                for j in range(k):
                    # d(-c_i log q_i)/da_j = -(c_i/q_i) q_i (1{i=j} - q_j)
                    d_logits[t, j] -= c[i] * (_delta(i, j) - q[j]) / n
        return SoftmaxNLL(nll, d_logits)


def s_model_nll(
    logits: np.ndarray, channel_logits: np.ndarray, noisy_labels: np.ndarray
) -> SModelNLL:
    """Return :func:`kernels.s_model_nll` in 40-digit decimals."""
    with localcontext(_CONTEXT):
        n, k = logits.shape
        theta = [_softmax(row) for row in _decimals(channel_logits)]  # Eq. 10
        nll = _ZERO
        d_logits = np.full((n, k), _ZERO, dtype=object)
        d_channel_logits = np.full((k, k), _ZERO, dtype=object)
        for t, scores in enumerate(_decimals(logits)):
            q, z = _softmax(scores), int(noisy_labels[t])  # Eq. 7
            m = sum((theta[i][z] * q[i] for i in range(k)), _ZERO)  # Eq. 11
            nll -= m.ln() / n  # Eq. 12
            d_m = -_ONE / (m * n)
            for i in range(k):
                for j in range(k):
                    # dm/da_j through q_i:          dq_i/da_j = q_i (1{i=j} - q_j)
                    d_logits[t, j] += d_m * theta[i][z] * q[i] * (_delta(i, j) - q[j])
                    # dm/dB_ij through theta_iz:    dtheta_iz/dB_ij = theta_iz (1{j=z} - theta_ij)
                    d_channel_logits[i, j] += (
                        d_m * q[i] * theta[i][z] * (_delta(j, z) - theta[i][j])
                    )
        return SModelNLL(nll, d_logits, d_channel_logits)


def s_model_posterior(
    logits: np.ndarray, channel_logits: np.ndarray, noisy_labels: np.ndarray
) -> Posterior:
    """Return :func:`kernels.s_model_posterior` in 40-digit decimals."""
    with localcontext(_CONTEXT):
        n, k = logits.shape
        theta = [_softmax(row) for row in _decimals(channel_logits)]
        log_likelihood = np.full(n, _ZERO, dtype=object)
        posterior = np.full((n, k), _ZERO, dtype=object)
        for t, scores in enumerate(_decimals(logits)):
            q, z = _softmax(scores), int(noisy_labels[t])
            m = sum((theta[i][z] * q[i] for i in range(k)), _ZERO)  # Eq. 1
            log_likelihood[t] = m.ln()  # the t-th term of Eq. 2
            for i in range(k):
                posterior[t, i] = theta[i][z] * q[i] / m  # Eq. 3
        return Posterior(log_likelihood, posterior)
