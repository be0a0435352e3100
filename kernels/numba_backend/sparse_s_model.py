"""The sparse s-model: only the links that lead to a sample's label, and the rows that have one."""

from __future__ import annotations

import numpy as np
from numba import prange

from kernels.links import LinkIndex
from kernels.numba_backend.fast_exp import UP, row_max
from kernels.numba_backend.rows import (
    SMALL,
    exp_row,
    exp_up_row,
    frozen,
    jit,
    jit_parallel,
    jit_row,
    runs_by_label,
    scale_row,
    softmax_of_logs,
)
from kernels.results import Posterior, SModelNLL


@jit
def touched_rows(label_s, support, links_by_label, start_j, rows_by_label):
    """Return the rows that link to a label that occurs, and each row's place among them (or -1)."""
    k = support.shape[0]
    place_i = np.full(k, -1, dtype=np.int32)
    rows = np.empty(min(k, _n_links(label_s, start_j)), dtype=np.int64)
    n_rows = 0
    for s in range(label_s.shape[0]):
        for p in range(start_j[label_s[s]], start_j[label_s[s] + 1]):
            i = rows_by_label[p]
            if place_i[i] < 0:
                place_i[i] = n_rows
                rows[n_rows] = i
                n_rows += 1
    return rows[:n_rows], place_i


@jit
def _n_links(labels, start_j):
    total = 0
    for s in range(labels.shape[0]):
        total += start_j[labels[s] + 1] - start_j[labels[s]]
    return total


@jit
def _softmax_of_rows(rows, channel_logits, theta_rs, shifted_rs, total_r):
    """Write theta of the rows given; log theta is ``shifted`` minus the log of ``total``."""
    for r in range(rows.shape[0]):
        scores_s = channel_logits[rows[r]]
        top = row_max(scores_s)
        total = exp_row(scores_s, top, theta_rs[r])
        total_r[r] = total
        for s in range(scores_s.shape[0]):
            theta_rs[r, s] /= total
            shifted_rs[r, s] = scores_s[s] - top


@jit
def _links_to(j, index, prepared, row_p, theta_p, shifted_p, total_p):
    """Copy what :func:`_posterior_of_links` needs of the links to label j; return their number."""
    support, links_by_label, start_j, rows_by_label = index
    _, _, place_i, theta_rs, shifted_rs, total_r = prepared
    n_kept = support.shape[1]
    first = start_j[j]
    n_links = start_j[j + 1] - first
    for p in range(n_links):
        i = rows_by_label[first + p]
        r, s = place_i[i], links_by_label[first + p] - i * n_kept
        row_p[p] = i
        theta_p[p], shifted_p[p], total_p[p] = theta_rs[r, s], shifted_rs[r, s], total_r[r]
    return n_links


@jit_row
def _posterior_of_links(
    n_links, scores_i, top, e_i, total, row_p, theta_p, shifted_p, total_p, c_p
):
    """Write c of the links that lead to z_t (Eq. 3, float64) and return log m_t (Eq. 11).

    ``e_i`` is 2^40 exp(s_i - top) and ``total`` its sum. As in the dense model: products while they
    are large enough to lose nothing, logs where they are not.
    """
    joint = 0.0
    for p in range(n_links):
        c_p[p] = e_i[row_p[p]] * theta_p[p]
        joint += c_p[p]
    if 1 <= joint < np.inf:
        for p in range(n_links):
            c_p[p] /= joint
        return np.log(joint / total)
    for p in range(n_links):
        log_theta = shifted_p[p] - np.log(total_p[p])
        c_p[p] = np.float64(scores_i[row_p[p]] - top) + log_theta
    return softmax_of_logs(c_p[:n_links]) - np.log(total / UP)


@jit
def _sparse_samples_of_chunk(logits, chunk, index, runs, prepared, log_m_t, d_logits, counts):
    """Write log m_t, d_logits and the counts of every link for the runs of one chunk."""
    order, label_s, run_start, run_label, chunk_run = runs
    run_first = prepared[0]
    n = logits.shape[0]
    real = logits.dtype.type
    row_p = np.empty(_most_links(run_first), dtype=np.int64)
    four = np.empty((4, row_p.shape[0]))
    theta_p, shifted_p, total_p, c_p = four[0], four[1], four[2], four[3]
    for r in range(chunk_run[chunk], chunk_run[chunk + 1]):
        n_links = _links_to(
            label_s[run_label[r]], index, prepared, row_p, theta_p, shifted_p, total_p
        )
        counts_p = counts[run_first[r] : run_first[r + 1]]
        counts_p[:] = 0
        for place in range(run_start[r], run_start[r + 1]):
            t = order[place]
            scores_i, d_i = logits[t], d_logits[t]
            top = row_max(scores_i)
            total = exp_up_row(scores_i, top, d_i)
            log_m = _posterior_of_links(
                n_links, scores_i, top, d_i, total, row_p, theta_p, shifted_p, total_p, c_p
            )
            log_m_t[t] = log_m
            scale_row(d_i, real(1 / (total * n)) if np.isfinite(log_m) else real(np.nan))
            for p in range(n_links):
                counts_p[p] += c_p[p]
                d_i[row_p[p]] -= c_p[p] / n


@jit
def _most_links(run_first):
    """Return the most links that any run has."""
    most = 0
    for r in range(run_first.shape[0] - 1):
        most = max(most, run_first[r + 1] - run_first[r])
    return most


@jit_parallel
def _all_sparse_samples(logits, small, index, runs, prepared, log_m_t, d_logits, counts):
    n_chunks = runs[4].shape[0] - 1
    if small:
        for chunk in range(n_chunks):
            _sparse_samples_of_chunk(
                logits, chunk, index, runs, prepared, log_m_t, d_logits, counts
            )
    else:
        for chunk in prange(n_chunks):
            _sparse_samples_of_chunk(
                logits, chunk, index, runs, prepared, log_m_t, d_logits, counts
            )


@jit
def _run_places(runs, start_j):
    """Return where each run's links start among the links of all runs: (r + 1,)."""
    _, label_s, _, run_label, _ = runs
    first = np.zeros(run_label.shape[0] + 1, dtype=np.int64)
    for r in range(run_label.shape[0]):
        j = label_s[run_label[r]]
        first[r + 1] = first[r] + start_j[j + 1] - start_j[j]
    return first


@jit
def _prepare(channel_logits, index, noisy_labels):
    """Return the runs; where their links start, the touched rows, their places, their softmax."""
    support, _, start_j, _ = index
    k, n_kept = support.shape
    runs = runs_by_label(noisy_labels, k)
    rows, place_i = touched_rows(runs[1], *index)
    # float64: it is small, and n_i theta - N is a difference
    theta_rs = np.empty((rows.shape[0], n_kept))
    shifted_rs = np.empty((rows.shape[0], n_kept))
    total_r = np.empty(rows.shape[0])
    _softmax_of_rows(rows, channel_logits, theta_rs, shifted_rs, total_r)
    first = _run_places(runs, start_j)
    return runs, (first, rows, place_i, theta_rs, shifted_rs, total_r)


@jit
def _sparse_channel_gradient(index, runs, prepared, counts, n, d_channel_logits):
    """Write (n_i theta_is - N_is) / n of the touched rows; the others stay zero."""
    run_first, rows, place_i, theta_rs, _, _ = prepared
    _, label_s, _, run_label, _ = runs
    support, links_by_label, start_j, rows_by_label = index
    n_kept = support.shape[1]
    counts_rs = np.zeros(theta_rs.shape)
    for r in range(run_label.shape[0]):
        first = start_j[label_s[run_label[r]]]
        for p in range(run_first[r + 1] - run_first[r]):
            i = rows_by_label[first + p]
            s = links_by_label[first + p] - i * n_kept
            counts_rs[place_i[i], s] += counts[run_first[r] + p]
    for r in range(rows.shape[0]):
        n_i = 0.0
        for s in range(n_kept):
            n_i += counts_rs[r, s]
        for s in range(n_kept):
            d_channel_logits[rows[r], s] = (n_i * theta_rs[r, s] - counts_rs[r, s]) / n


def sparse_s_model_nll(
    logits: np.ndarray, channel_logits: np.ndarray, index: LinkIndex, noisy_labels: np.ndarray
) -> SModelNLL:
    """See :func:`kernels.sparse_s_model_nll`."""
    n, k = logits.shape
    dtype, links = logits.dtype, tuple(index)
    logits, channel_logits, noisy_labels = frozen(logits, channel_logits, noisy_labels)
    runs, prepared = _prepare(channel_logits, links, noisy_labels)
    log_m_t, d_logits, counts = np.empty(n), np.empty((n, k), dtype), np.empty(prepared[0][-1])
    small = logits.size < SMALL
    _all_sparse_samples(logits, small, links, runs, prepared, log_m_t, d_logits, counts)
    d_channel_logits = np.zeros(channel_logits.shape, dtype)
    _sparse_channel_gradient(links, runs, prepared, counts, n, d_channel_logits)
    return SModelNLL(dtype.type(-log_m_t.mean()), d_logits, d_channel_logits)


@jit_parallel
def _sparse_posterior_rows(logits, noisy_labels, index, prepared, log_m_t, c_ti):
    most = _most_links(prepared[0])
    for t in prange(logits.shape[0]):
        row_p = np.empty(most, dtype=np.int64)
        four = np.empty((4, most))
        theta_p, shifted_p, total_p, c_p = four[0], four[1], four[2], four[3]
        n_links = _links_to(noisy_labels[t], index, prepared, row_p, theta_p, shifted_p, total_p)
        top = row_max(logits[t])
        total = exp_up_row(logits[t], top, c_ti[t])
        log_m = _posterior_of_links(
            n_links, logits[t], top, c_ti[t], total, row_p, theta_p, shifted_p, total_p, c_p
        )
        c_ti[t] = 0 if np.isfinite(log_m) else np.nan
        for p in range(n_links):
            c_ti[t, row_p[p]] = c_p[p]
        log_m_t[t] = log_m


def sparse_s_model_posterior(
    logits: np.ndarray, channel_logits: np.ndarray, index: LinkIndex, noisy_labels: np.ndarray
) -> Posterior:
    """See :func:`kernels.sparse_s_model_posterior`."""
    links = tuple(index)
    logits, channel_logits, noisy_labels = frozen(logits, channel_logits, noisy_labels)
    _, prepared = _prepare(channel_logits, links, noisy_labels)
    log_m_t, c_ti = np.empty(logits.shape[0], logits.dtype), np.empty(logits.shape, logits.dtype)
    _sparse_posterior_rows(logits, noisy_labels, links, prepared, log_m_t, c_ti)
    return Posterior(log_m_t, c_ti)
