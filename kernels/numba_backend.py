"""The kernels in Numba: one pass over the rows, in parallel, the same bits for any thread count.

Rows are independent, so threads share them out freely. The only sum over samples that threads
could disturb is N_ij; it is cut by observed class instead, so that each of its rows belongs to
one thread and is summed in the order of the samples.
"""

from __future__ import annotations

import os

# GNU OpenMP's threads spin while they wait. Beside a BLAS with threads of its own that costs
# a factor of ten on small steps, so they sleep, unless the user has chosen otherwise. It has to
# be said before the library loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
from numba import get_num_threads, njit, prange

from kernels.results import Posterior, SModelNLL, SoftmaxNLL

# error_model="numpy": 0/0 is NaN and not an exception, as in the other backends.
_jit = njit(cache=True, nogil=True, error_model="numpy")
_jit_parallel = njit(cache=True, nogil=True, error_model="numpy", parallel=True)


@_jit
def _log_softmax_row(scores_i, log_p_i):
    """Write the log-softmax of one row; -inf entries are allowed, a row of them is not."""
    k = scores_i.shape[0]
    top = scores_i[0]
    for i in range(1, k):
        top = max(top, scores_i[i])
    total = 0.0
    for i in range(k):
        log_p_i[i] = scores_i[i] - top
        total += np.exp(log_p_i[i])
    log_total = np.log(total)
    for i in range(k):
        log_p_i[i] = log_p_i[i] - log_total


@_jit
def _posterior_row(log_q_i, log_theta_i, c_i):
    """Write c_i (Eq. 3) for one sample and return log m (Eq. 11); ``log_theta_i`` is column z."""
    k = log_q_i.shape[0]
    top = -np.inf
    for i in range(k):
        c_i[i] = log_q_i[i] + log_theta_i[i]
        top = max(top, c_i[i])
    if top == -np.inf:  # the label is unreachable: no posterior
        nothing = 0.0
        for i in range(k):
            nothing += c_i[i]  # -inf, or NaN if the input was
            c_i[i] = np.nan
        return nothing
    total = 0.0
    for i in range(k):
        total += np.exp(c_i[i] - top)
    log_m = top + np.log(total)
    for i in range(k):
        c_i[i] = np.exp(c_i[i] - log_m)
    return log_m


@_jit_parallel
def _log_theta_columns(channel_logits):
    """Return log theta transposed, (j, i): a label's column becomes one contiguous row."""
    k = channel_logits.shape[0]
    log_theta_ij = np.empty_like(channel_logits)
    for i in prange(k):
        _log_softmax_row(channel_logits[i], log_theta_ij[i])
    log_theta_ji = np.empty_like(channel_logits)
    for j in prange(k):
        for i in range(k):
            log_theta_ji[j, i] = log_theta_ij[i, j]
    return log_theta_ji


@_jit_parallel
def _softmax_rows(logits, labels, log_q_t, d_logits):
    n, k = logits.shape
    for t in prange(n):
        _log_softmax_row(logits[t], d_logits[t])
        log_q_t[t] = d_logits[t, labels[t]]
        for i in range(k):
            d_logits[t, i] = np.exp(d_logits[t, i])
        d_logits[t, labels[t]] -= 1
        for i in range(k):
            d_logits[t, i] /= n


@_jit_parallel
def _soft_target_rows(logits, targets, score_t, d_logits):
    n, k = logits.shape
    for t in prange(n):
        _log_softmax_row(logits[t], d_logits[t])
        score = 0.0
        for i in range(k):
            if targets[t, i] > 0:  # 0 log 0 = 0
                score += targets[t, i] * d_logits[t, i]
            d_logits[t, i] = (np.exp(d_logits[t, i]) - targets[t, i]) / n
        score_t[t] = score


@_jit_parallel
def _posterior_rows(logits, log_theta_ji, noisy_labels, log_m_t, log_q_ti, c_ti):
    for t in prange(logits.shape[0]):
        _log_softmax_row(logits[t], log_q_ti[t])
        log_m_t[t] = _posterior_row(log_q_ti[t], log_theta_ji[noisy_labels[t]], c_ti[t])


@_jit_parallel
def _difference_rows(log_q_ti, c_ti):
    """Overwrite log q with d_logits = (q - c) / n."""
    n, k = log_q_ti.shape
    for t in prange(n):
        for i in range(k):
            log_q_ti[t, i] = (np.exp(log_q_ti[t, i]) - c_ti[t, i]) / n


@_jit
def _samples_by_label(noisy_labels, k):
    """Return the samples grouped by label (counting sort) and where each group starts."""
    start_j = np.zeros(k + 1, dtype=np.int64)
    for t in range(noisy_labels.shape[0]):
        start_j[noisy_labels[t] + 1] += 1
    for j in range(k):
        start_j[j + 1] += start_j[j]
    next_j = start_j.copy()
    order = np.empty(noisy_labels.shape[0], dtype=np.int64)
    for t in range(noisy_labels.shape[0]):
        order[next_j[noisy_labels[t]]] = t
        next_j[noisy_labels[t]] += 1
    return order, start_j


@_jit_parallel
def _counts(c_ti, order, start_j):
    """Return N transposed, (j, i), in float64: thread by observed class, samples in order."""
    k = c_ti.shape[1]
    counts_ji = np.zeros((k, k))
    for j in prange(k):
        for s in range(start_j[j], start_j[j + 1]):
            t = order[s]
            for i in range(k):
                counts_ji[j, i] += c_ti[t, i]
    return counts_ji


@_jit_parallel
def _channel_gradient(counts_ji, log_theta_ji, n, d_channel_logits):
    """Write (n_i theta_ij - N_ij) / n."""
    k = counts_ji.shape[0]
    for i in prange(k):
        n_i = 0.0
        for j in range(k):
            n_i += counts_ji[j, i]
        for j in range(k):
            d_channel_logits[i, j] = (n_i * np.exp(log_theta_ji[j, i]) - counts_ji[j, i]) / n


def softmax_nll(logits: np.ndarray, labels: np.ndarray) -> SoftmaxNLL:
    """See :func:`kernels.softmax_nll`."""
    log_q_t = np.empty(logits.shape[0])
    d_logits = np.empty_like(logits)
    _softmax_rows(logits, labels, log_q_t, d_logits)
    return SoftmaxNLL(logits.dtype.type(-log_q_t.mean()), d_logits)


def soft_target_nll(logits: np.ndarray, targets: np.ndarray) -> SoftmaxNLL:
    """See :func:`kernels.soft_target_nll`."""
    score_t = np.empty(logits.shape[0])
    d_logits = np.empty_like(logits)
    _soft_target_rows(logits, targets, score_t, d_logits)
    return SoftmaxNLL(logits.dtype.type(-score_t.mean()), d_logits)


def s_model_nll(
    logits: np.ndarray, channel_logits: np.ndarray, noisy_labels: np.ndarray
) -> SModelNLL:
    """See :func:`kernels.s_model_nll`."""
    n, k = logits.shape
    log_theta_ji = _log_theta_columns(channel_logits)
    log_m_t = np.empty(n)
    d_logits = np.empty_like(logits)  # holds log q until the differences are taken
    c_ti = np.empty_like(logits)
    _posterior_rows(logits, log_theta_ji, noisy_labels, log_m_t, d_logits, c_ti)
    _difference_rows(d_logits, c_ti)

    counts_ji = _counts(c_ti, *_samples_by_label(noisy_labels, k))
    d_channel_logits = np.empty_like(channel_logits)
    _channel_gradient(counts_ji, log_theta_ji, n, d_channel_logits)
    return SModelNLL(logits.dtype.type(-log_m_t.mean()), d_logits, d_channel_logits)


def s_model_posterior(
    logits: np.ndarray, channel_logits: np.ndarray, noisy_labels: np.ndarray
) -> Posterior:
    """See :func:`kernels.s_model_posterior`."""
    log_m_t = np.empty(logits.shape[0], dtype=logits.dtype)
    c_ti = np.empty_like(logits)
    _posterior_rows(
        logits,
        _log_theta_columns(channel_logits),
        noisy_labels,
        log_m_t,
        np.empty_like(logits),
        c_ti,
    )
    return Posterior(log_m_t, c_ti)


def thread_count() -> int:
    """Return Numba's number of threads."""
    return get_num_threads()
