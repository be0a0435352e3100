"""The judge: the paper's equations as plain loops over 40-digit decimals.

Slow on purpose. Nothing here is fused, shifted or stabilised: probabilities are
formed as the paper prints them, and gradients by the chain rule through the
Jacobian of each softmax (the *long* derivative). The backends use the fused
derivative; that the two agree is what :mod:`kernels.compare` measures.

Every function takes floating-point arrays, converts them exactly, and returns the
named tuple of :mod:`kernels.results` filled with :class:`decimal.Decimal`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Context, Decimal, localcontext
from itertools import product

import numpy as np

from kernels.results import CModelNLL, Posterior, SModelNLL, SoftmaxNLL

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


def _theta(
    channel_logits: np.ndarray,
    support: np.ndarray | None,
    channel_weights: np.ndarray | None = None,
    hidden_t: list[Decimal] | None = None,
) -> list[dict[int, Decimal]]:
    """Return the noise matrix row by row: the observed classes j that row i leads to, and theta_ij.

    Eq. 10, or Eq. 8 for one sample where ``hidden_t`` is given. ``support`` names the classes of a
    sparse row; a dense row leads to all of them.
    """
    theta = []
    for i, scores in enumerate(_decimals(channel_logits)):
        if channel_weights is not None and hidden_t is not None:
            scores = [
                b + sum((u * h for u, h in zip(u_ij, hidden_t, strict=True)), _ZERO)
                for b, u_ij in zip(scores, _decimals(channel_weights[i]), strict=True)
            ]
        links = range(len(scores)) if support is None else map(int, support[i])
        theta.append(dict(zip(links, _softmax(scores), strict=True)))
    return theta


def _nll(logits, channel_logits, noisy_labels, support=None, hidden=None, channel_weights=None):
    """Return nll, d_logits, d_hidden, d_channel_weights and d_channel_logits of any model."""
    with localcontext(_CONTEXT):
        n, k = logits.shape
        nll = _ZERO
        d_logits = np.full((n, k), _ZERO, dtype=object)
        d_channel_logits = np.full(channel_logits.shape, _ZERO, dtype=object)
        theta, u = _theta(channel_logits, support), []
        d_hidden = d_channel_weights = np.zeros(0, dtype=object)
        if hidden is not None:
            u = [_decimals(rows) for rows in channel_weights]
            d_hidden = np.full(hidden.shape, _ZERO, dtype=object)
            d_channel_weights = np.full(channel_weights.shape, _ZERO, dtype=object)
        for t, scores in enumerate(_decimals(logits)):
            q, z = _softmax(scores), int(noisy_labels[t])  # Eq. 7
            if hidden is not None:
                h = _decimals(hidden[t])
                theta = _theta(channel_logits, support, channel_weights, h)  # Eq. 8
            m = sum((theta[i].get(z, _ZERO) * q[i] for i in range(k)), _ZERO)  # Eqs. 9, 11
            nll -= m.ln() / n  # Eq. 12
            d_m = -_ONE / (m * n)
            for i in range(k):
                theta_iz = theta[i].get(z, _ZERO)
                for j in range(k):
                    # dm/da_j through q_i:         dq_i/da_j = q_i (1{i=j} - q_j)
                    d_logits[t, j] += d_m * theta_iz * q[i] * (_delta(i, j) - q[j])
                for link, (j, theta_ij) in enumerate(theta[i].items()):
                    # dm/ds_ij through theta_iz:   dtheta_iz/ds_ij = theta_iz (1{j=z} - theta_ij)
                    d_score = d_m * q[i] * theta_iz * (_delta(j, z) - theta_ij)
                    d_channel_logits[i, link] += d_score  # s_ij = u_ij . h + B_ij
                    if hidden is not None:
                        for f in range(len(h)):
                            d_channel_weights[i, link, f] += d_score * h[f]
                            d_hidden[t, f] += d_score * u[i][link][f]
        return nll, d_logits, d_hidden, d_channel_weights, d_channel_logits


def _posterior(
    logits, channel_logits, noisy_labels, support=None, hidden=None, channel_weights=None
) -> Posterior:
    """Return the E-step of any model."""
    with localcontext(_CONTEXT):
        n, k = logits.shape
        theta = _theta(channel_logits, support) if hidden is None else []
        log_likelihood = np.full(n, _ZERO, dtype=object)
        posterior = np.full((n, k), _ZERO, dtype=object)
        for t, scores in enumerate(_decimals(logits)):
            q, z = _softmax(scores), int(noisy_labels[t])
            if hidden is not None:
                theta = _theta(channel_logits, support, channel_weights, _decimals(hidden[t]))
            joint = [theta[i].get(z, _ZERO) * q[i] for i in range(k)]
            m = sum(joint, _ZERO)  # Eq. 1
            log_likelihood[t] = m.ln()  # the t-th term of Eq. 2
            for i in range(k):
                posterior[t, i] = joint[i] / m  # Eq. 3
        return Posterior(log_likelihood, posterior)


def s_model_nll(
    logits: np.ndarray, channel_logits: np.ndarray, noisy_labels: np.ndarray
) -> SModelNLL:
    """Return :func:`kernels.s_model_nll` in 40-digit decimals."""
    nll, d_logits, _, _, d_channel_logits = _nll(logits, channel_logits, noisy_labels)
    return SModelNLL(nll, d_logits, d_channel_logits)


def sparse_s_model_nll(
    logits: np.ndarray, channel_logits: np.ndarray, support: np.ndarray, noisy_labels: np.ndarray
) -> SModelNLL:
    """Return :func:`kernels.sparse_s_model_nll` in 40-digit decimals."""
    nll, d_logits, _, _, d_channel_logits = _nll(logits, channel_logits, noisy_labels, support)
    return SModelNLL(nll, d_logits, d_channel_logits)


def c_model_nll(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    noisy_labels: np.ndarray,
) -> CModelNLL:
    """Return :func:`kernels.c_model_nll` in 40-digit decimals."""
    return CModelNLL(*_nll(logits, channel_logits, noisy_labels, None, hidden, channel_weights))


def sparse_c_model_nll(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    support: np.ndarray,
    noisy_labels: np.ndarray,
) -> CModelNLL:
    """Return :func:`kernels.sparse_c_model_nll` in 40-digit decimals."""
    return CModelNLL(*_nll(logits, channel_logits, noisy_labels, support, hidden, channel_weights))


def s_model_posterior(
    logits: np.ndarray, channel_logits: np.ndarray, noisy_labels: np.ndarray
) -> Posterior:
    """Return :func:`kernels.s_model_posterior` in 40-digit decimals."""
    return _posterior(logits, channel_logits, noisy_labels)


def sparse_s_model_posterior(
    logits: np.ndarray, channel_logits: np.ndarray, support: np.ndarray, noisy_labels: np.ndarray
) -> Posterior:
    """Return :func:`kernels.sparse_s_model_posterior` in 40-digit decimals."""
    return _posterior(logits, channel_logits, noisy_labels, support)


def c_model_posterior(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    noisy_labels: np.ndarray,
) -> Posterior:
    """Return :func:`kernels.c_model_posterior` in 40-digit decimals."""
    return _posterior(logits, channel_logits, noisy_labels, None, hidden, channel_weights)


def sparse_c_model_posterior(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    support: np.ndarray,
    noisy_labels: np.ndarray,
) -> Posterior:
    """Return :func:`kernels.sparse_c_model_posterior` in 40-digit decimals."""
    return _posterior(logits, channel_logits, noisy_labels, support, hidden, channel_weights)


def conv2d(images: np.ndarray, weight: np.ndarray, padding: int) -> np.ndarray:
    """Return :func:`kernels.conv2d` in 40-digit decimals."""
    n, rows, columns, _ = images.shape
    size, _, _, n_filters = weight.shape
    lost = size - 1 - 2 * padding
    out = np.full((n, rows - lost, columns - lost, n_filters), _ZERO, dtype=object)
    with localcontext(_CONTEXT):
        for at_out, at_image, at_weight in _meetings(images, weight, padding):
            out[at_out] += Decimal(float(images[at_image])) * Decimal(float(weight[at_weight]))
    return out


def conv2d_backward(
    images: np.ndarray, weight: np.ndarray, d_out: np.ndarray, padding: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return :func:`kernels.conv2d_backward` in 40-digit decimals."""
    d_images = np.full(images.shape, _ZERO, dtype=object)
    d_weight = np.full(weight.shape, _ZERO, dtype=object)
    with localcontext(_CONTEXT):
        for at_out, at_image, at_weight in _meetings(images, weight, padding):
            d = Decimal(float(d_out[at_out]))
            d_images[at_image] += d * Decimal(float(weight[at_weight]))
            d_weight[at_weight] += d * Decimal(float(images[at_image]))
    return d_images, d_weight


def _meetings(
    images: np.ndarray, weight: np.ndarray, padding: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Yield where in the output, the images and the weight the factors of every term stand."""
    n, rows, columns, n_channels = images.shape
    size, _, _, n_filters = weight.shape
    lost = size - 1 - 2 * padding
    for t, y, x in product(range(n), range(rows - lost), range(columns - lost)):
        for a, b in product(range(size), repeat=2):
            row, column = y + a - padding, x + b - padding
            if 0 <= row < rows and 0 <= column < columns:  # beyond the border there are zeros
                for c, f in product(range(n_channels), range(n_filters)):
                    yield (t, y, x, f), (t, row, column, c), (a, b, c, f)
