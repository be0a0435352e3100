"""The s-model (Eqs. 10-12): loss, gradient and E-step.

The loss is made of three passes (:func:`s_model_nll`):

1. *columns*: rows of theta, sixteen at a time. Of each only the entries at labels that occur are
   kept, turned over, so that a label's column of theta is one contiguous row.
2. *samples*, sorted by label: one pass over the logits gives q and m, a second one the posterior
   and the gradient. A run of samples with one label adds up its row of N_ij in place.
3. *gradient* of the channel logits, sixteen rows of theta at a time, computed again: an exponential
   in the cache costs less than a number from memory.

exp(a_i - top) and theta are held times 2^40 each. While the sum of q_i theta_iz over i is at least
2^-40, what is too small for a normal number then is too small for one in the posterior, too. The
few samples with less are done in the log domain.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from kernels.numba_backend.fast_exp import UP, row_max
from kernels.numba_backend.rows import (
    SMALL,
    exp_up_and_joint_row,
    exp_up_row,
    frozen,
    jit,
    jit_parallel,
    jit_row,
    log_posterior_row,
    runs_by_label,
    scaled_exp_row,
)
from kernels.results import Posterior, SModelNLL

# Rows of theta handled together: one cache line of a transposed float32 array.
_ROWS = 16


@jit
def _columns(channel_logits, label_s, first, theta_si, top_i, total_i):
    """Pass 1 for sixteen rows of theta: keep theta_i,label_s, turned over and scaled."""
    k = channel_logits.shape[0]
    e_j = np.empty(k, dtype=channel_logits.dtype)
    for i in range(first, min(first + _ROWS, k)):
        scores_j = channel_logits[i]
        top = row_max(scores_j)
        total = exp_up_row(scores_j, top, e_j)
        top_i[i], total_i[i] = top, total / UP
        scale = e_j.dtype.type(UP / total)
        theta_s = theta_si[:, i]
        for s in range(label_s.shape[0]):
            theta_s[s] = e_j[np.uint64(label_s[s])] * scale


@jit_parallel
def _all_columns(channel_logits, label_s, small, theta_si, top_i, total_i):
    n_pieces = (channel_logits.shape[0] + _ROWS - 1) // _ROWS
    if small:
        for p in range(n_pieces):
            _columns(channel_logits, label_s, p * _ROWS, theta_si, top_i, total_i)
    else:
        for p in prange(n_pieces):
            _columns(channel_logits, label_s, p * _ROWS, theta_si, top_i, total_i)


@jit_row
def _gradient_row(theta_i, to_q, to_c, per_n, d_i, counts_i):
    """Turn e_i into d_i = (q_i - c_i) / n in place and add c_i to the counts."""
    for i in range(d_i.shape[0]):
        c = d_i[i] * theta_i[i] * to_c
        counts_i[i] += c
        d_i[i] = d_i[i] * to_q - c * per_n


@jit
def _posterior_in_logs(scores_i, channel_logits, z, top_i, total_i, c_i):
    """Write c_i of one sample in the log domain and return log m."""
    log_theta_i = np.empty_like(top_i)
    for i in range(top_i.shape[0]):
        log_theta_i[i] = np.float64(channel_logits[i, z] - top_i[i]) - np.log(total_i[i])
    return log_posterior_row(scores_i, log_theta_i, c_i)


@jit
def _sample_in_logs(logits, channel_logits, t, z, top_i, total_i, d_logits, counts_i):
    """Do one sample of pass 2 in the log domain; ``d_logits`` holds its e_i. Return log m_t."""
    n, k = logits.shape
    c_i = np.empty_like(top_i)
    log_m = _posterior_in_logs(logits[t], channel_logits, z, top_i, total_i, c_i)
    total = 0.0
    for i in range(k):
        total += d_logits[t, i]
    for i in range(k):
        counts_i[i] += c_i[i]
        d_logits[t, i] = (d_logits[t, i] / total - c_i[i]) / n
    return log_m


@jit
def _samples_of_chunk(
    logits, channel_logits, runs, chunk, theta_si, top_i, total_i, log_m_t, d_logits, counts_ri
):
    """Pass 2 for the runs of one chunk: log m_t, d_logits and N of each run."""
    order, label_s, run_start, run_label, chunk_run = runs
    n = logits.shape[0]
    real = logits.dtype.type
    for r in range(chunk_run[chunk], chunk_run[chunk + 1]):
        theta_i, counts_i = theta_si[run_label[r]], counts_ri[r]
        counts_i[:] = 0
        for place in range(run_start[r], run_start[r + 1]):
            t = order[place]
            top = row_max(logits[t])
            total, joint = exp_up_and_joint_row(logits[t], top, theta_i, d_logits[t])
            if UP <= joint < np.inf:
                log_m_t[t] = np.log(joint / UP / total)
                _gradient_row(
                    theta_i,
                    real(1 / (total * n)),
                    real(1 / joint),
                    real(1 / n),
                    d_logits[t],
                    counts_i,
                )
            else:
                log_m_t[t] = _sample_in_logs(
                    logits,
                    channel_logits,
                    t,
                    label_s[run_label[r]],
                    top_i,
                    total_i,
                    d_logits,
                    counts_i,
                )


@jit_parallel
def _all_samples(
    logits,
    channel_logits,
    runs,
    small,
    theta_si,
    top_i,
    total_i,
    log_m_t,
    d_logits,
    counts_ri,
):
    n_chunks = runs[4].shape[0] - 1
    if small:
        for chunk in range(n_chunks):
            _samples_of_chunk(
                logits,
                channel_logits,
                runs,
                chunk,
                theta_si,
                top_i,
                total_i,
                log_m_t,
                d_logits,
                counts_ri,
            )
    else:
        for chunk in prange(n_chunks):
            _samples_of_chunk(
                logits,
                channel_logits,
                runs,
                chunk,
                theta_si,
                top_i,
                total_i,
                log_m_t,
                d_logits,
                counts_ri,
            )


@jit
def _channel_gradient(channel_logits, runs, first, n, top_i, total_i, counts_ri, d_channel):
    """Pass 3 for sixteen rows: (n_i theta_ij - N_ij) / n."""
    _, label_s, _, run_label, _ = runs
    label_r = label_s[run_label]
    last = min(first + _ROWS, channel_logits.shape[0])
    real = channel_logits.dtype.type
    n_i = np.zeros(_ROWS)
    for r in range(run_label.shape[0]):
        for i in range(first, last):
            n_i[i - first] += counts_ri[r, i]
    per_n = real(1 / n)
    for i in range(first, last):
        d_j = d_channel[i]
        factor = real(n_i[i - first] / (n * total_i[i]))
        scaled_exp_row(channel_logits[i], top_i[i], factor, d_j)
        counts_r = counts_ri[:, i]
        for r in range(run_label.shape[0]):
            d_j[np.uint64(label_r[r])] -= counts_r[r] * per_n


@jit_parallel
def _all_channel_gradients(channel_logits, runs, small, n, top_i, total_i, counts_ri, d_channel):
    n_pieces = (channel_logits.shape[0] + _ROWS - 1) // _ROWS
    if small:
        for p in range(n_pieces):
            _channel_gradient(
                channel_logits, runs, p * _ROWS, n, top_i, total_i, counts_ri, d_channel
            )
    else:
        for p in prange(n_pieces):
            _channel_gradient(
                channel_logits, runs, p * _ROWS, n, top_i, total_i, counts_ri, d_channel
            )


@jit
def _prepare(channel_logits, noisy_labels):
    """Sort the labels and do pass 1."""
    k = channel_logits.shape[0]
    runs = runs_by_label(noisy_labels, k)
    label_s = runs[1]
    theta_si = np.empty((label_s.shape[0], k), channel_logits.dtype)
    top_i, total_i = np.empty(k, channel_logits.dtype), np.empty(k)
    small = channel_logits.size < SMALL
    _all_columns(channel_logits, label_s, small, theta_si, top_i, total_i)
    return runs, theta_si, top_i, total_i


@jit
def _nll(logits, channel_logits, noisy_labels, log_m_t, d_logits, d_channel_logits):
    """Do the three passes."""
    n, k = logits.shape
    runs, theta_si, top_i, total_i = _prepare(channel_logits, noisy_labels)
    counts_ri = np.empty((runs[3].shape[0], k), logits.dtype)
    _all_samples(
        logits,
        channel_logits,
        runs,
        logits.size < SMALL,
        theta_si,
        top_i,
        total_i,
        log_m_t,
        d_logits,
        counts_ri,
    )
    _all_channel_gradients(
        channel_logits,
        runs,
        channel_logits.size < SMALL,
        n,
        top_i,
        total_i,
        counts_ri,
        d_channel_logits,
    )


def s_model_nll(
    logits: np.ndarray, channel_logits: np.ndarray, noisy_labels: np.ndarray
) -> SModelNLL:
    """See :func:`kernels.s_model_nll`."""
    n, k = logits.shape
    dtype = logits.dtype
    log_m_t, d_logits = np.empty(n), np.empty((n, k), dtype)
    d_channel_logits = np.empty((k, k), dtype)
    _nll(*frozen(logits, channel_logits, noisy_labels), log_m_t, d_logits, d_channel_logits)
    return SModelNLL(dtype.type(-log_m_t.mean()), d_logits, d_channel_logits)


@jit
def _posterior_of_chunk(
    logits, channel_logits, runs, chunk, theta_si, top_i, total_i, log_m_t, c_ti
):
    """Pass 2 of the E-step for the runs of one chunk: log m_t and c_ti."""
    order, label_s, run_start, run_label, chunk_run = runs
    for r in range(chunk_run[chunk], chunk_run[chunk + 1]):
        theta_i = theta_si[run_label[r]]
        for place in range(run_start[r], run_start[r + 1]):
            t = order[place]
            top = row_max(logits[t])
            total, joint = exp_up_and_joint_row(logits[t], top, theta_i, c_ti[t])
            if UP <= joint < np.inf:
                log_m_t[t] = np.log(joint / UP / total)
                _product_row(theta_i, c_ti.dtype.type(1 / joint), c_ti[t])
            else:
                z = label_s[run_label[r]]
                log_m_t[t] = _posterior_in_logs(
                    logits[t], channel_logits, z, top_i, total_i, c_ti[t]
                )


@jit_row
def _product_row(theta_i, factor, c_i):
    """Turn e_i into c_i = e_i theta_i factor in place."""
    for i in range(c_i.shape[0]):
        c_i[i] = c_i[i] * theta_i[i] * factor


@jit_parallel
def _all_posteriors(logits, channel_logits, runs, small, theta_si, top_i, total_i, log_m_t, c_ti):
    n_chunks = runs[4].shape[0] - 1
    if small:
        for chunk in range(n_chunks):
            _posterior_of_chunk(
                logits, channel_logits, runs, chunk, theta_si, top_i, total_i, log_m_t, c_ti
            )
    else:
        for chunk in prange(n_chunks):
            _posterior_of_chunk(
                logits, channel_logits, runs, chunk, theta_si, top_i, total_i, log_m_t, c_ti
            )


@jit
def _posterior(logits, channel_logits, noisy_labels, log_m_t, c_ti):
    """Do passes 1 and 2."""
    runs, theta_si, top_i, total_i = _prepare(channel_logits, noisy_labels)
    small = logits.size < SMALL
    _all_posteriors(logits, channel_logits, runs, small, theta_si, top_i, total_i, log_m_t, c_ti)


def s_model_posterior(
    logits: np.ndarray, channel_logits: np.ndarray, noisy_labels: np.ndarray
) -> Posterior:
    """See :func:`kernels.s_model_posterior`."""
    n, k = logits.shape
    log_m_t, c_ti = np.empty(n, logits.dtype), np.empty((n, k), logits.dtype)
    _posterior(*frozen(logits, channel_logits, noisy_labels), log_m_t, c_ti)
    return Posterior(log_m_t, c_ti)
