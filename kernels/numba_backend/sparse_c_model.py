"""The sparse c-model: for every sample the few rows that link to its label, l scores each.

Samples are taken by label: those of one label meet the same rows of U, which stay in the cache. A
*pair* is a sample and one of the links that lead to its label, so also a sample and a true class.
No product is large enough for BLAS.
"""

from __future__ import annotations

import numpy as np

from kernels.links import LinkIndex
from kernels.numba_backend.pieces import do_pieces
from kernels.numba_backend.rows import (
    SMALL,
    exp_row,
    fill,
    frozen,
    jit,
    jit_part,
    jit_row,
    row_max,
    scale_row,
    softmax_of_logs,
)
from kernels.numba_backend.sparse_s_model import rows_with_links
from kernels.numba_backend.vector import first, lane_sum, lanes, load, muladd, splat, store
from kernels.results import CModelNLL, Posterior


@jit_row
def _dot(a_d, b_d):
    """Return a . b, added lane by lane in the arrays' own dtype."""
    n, width = a_d.shape[0], lanes(a_d)
    every, whole, zero = first(a_d, width), n - n % width, splat(a_d, 0.0)
    total = zero
    if whole < n:
        some = first(a_d, n - whole)
        total = load(a_d, whole, some, zero) * load(b_d, whole, some, zero)
    for f in range(0, whole, width):
        total = muladd(load(a_d, f, every, zero), load(b_d, f, every, zero), total)
    return lane_sum(total)


@jit_row
def _add_multiple_step(factor, x_d, y_d, f, mask):
    store(y_d, f, mask, muladd(factor, load(x_d, f, mask, factor), load(y_d, f, mask, factor)))


@jit_row
def _add_multiple(factor, x_d, y_d):
    """Add factor * x to y."""
    n, width = y_d.shape[0], lanes(y_d)
    every, whole, factors = first(y_d, width), n - n % width, splat(y_d, factor)
    for f in range(0, whole, width):
        _add_multiple_step(factors, x_d, y_d, f, every)
    if whole < n:
        _add_multiple_step(factors, x_d, y_d, whole, first(y_d, n - whole))


@jit
def _pairs_of_samples(noisy_labels, start_j):
    """Return where each sample's pairs start: (n + 1,)."""
    first_t = np.zeros(noisy_labels.shape[0] + 1, dtype=np.int64)
    for t in range(noisy_labels.shape[0]):
        first_t[t + 1] = first_t[t] + start_j[noisy_labels[t] + 1] - start_j[noisy_labels[t]]
    return first_t


@jit
def _pairs_of_rows(noisy_labels, index, first_t, class_r):
    """Return the pairs of each row with links, and the sample of each: (r + 1,), (p,), (p,)."""
    support, _, start_j, rows_by_label = index
    place_i = np.empty(support.shape[0], dtype=np.int32)
    for r in range(class_r.shape[0]):
        place_i[class_r[r]] = r
    n_pairs = first_t[-1]
    row_p = np.empty(n_pairs, dtype=np.int64)
    sample_p = np.empty(n_pairs, dtype=np.int64)
    next_r = np.zeros(class_r.shape[0] + 1, dtype=np.int64)
    for t in range(noisy_labels.shape[0]):
        for p in range(first_t[t], first_t[t + 1]):
            row_p[p] = place_i[rows_by_label[start_j[noisy_labels[t]] + p - first_t[t]]]
            sample_p[p] = t
            next_r[row_p[p] + 1] += 1
    for r in range(class_r.shape[0]):
        next_r[r + 1] += next_r[r]
    first_r = next_r.copy()
    pairs = np.empty(n_pairs, dtype=np.int64)
    for p in range(n_pairs):
        pairs[next_r[row_p[p]]] = p
        next_r[row_p[p]] += 1
    return first_r, pairs, sample_p


@jit_part
def _theta_of_sample(h_d, channel_weights, channel_logits, links, theta_ps, log_theta_z_p):
    """Write theta_t,i of every row that links to z_t (Eq. 8), and log theta_i,z_t."""
    n_kept = channel_logits.shape[1]
    scores_s = np.empty(n_kept, channel_logits.dtype)
    for p in range(links.shape[0]):
        i, z_link = links[p] // n_kept, links[p] % n_kept
        for s in range(n_kept):
            scores_s[s] = _dot(channel_weights[i, s], h_d) + channel_logits[i, s]
        top = row_max(scores_s)
        total = exp_row(scores_s, top, theta_ps[p])
        scale_row(theta_ps[p], scores_s.dtype.type(1 / total))
        log_theta_z_p[p] = np.float64(scores_s[z_link] - top) - np.log(total)


@jit_part
def _posterior_of_sample(scores_i, e_i, links, n_kept, log_theta_z_p, c_p):
    """Write e_i = exp(a_i - top), c of the rows that link to z_t; return sum_i e_i and log m_t."""
    top = row_max(scores_i)
    total = exp_row(scores_i, top, e_i)
    log_total = np.log(total)
    for p in range(links.shape[0]):
        log_q = np.float64(scores_i[links[p] // n_kept] - top) - log_total
        c_p[p] = log_q + log_theta_z_p[p]
    return total, softmax_of_logs(c_p)


@jit_part
def _sample(
    place,
    order,
    first_t,
    logits,
    hidden,
    channel_weights,
    channel_logits,
    index,
    noisy_labels,
    g_ps,
    log_m_t,
    d_logits,
    d_hidden,
):
    """Write all that belongs to a sample t; ``g_ps`` are the gradients of all pairs' scores."""
    t = order[place]
    g_ps = g_ps[first_t[t] : first_t[t + 1]]
    support, links_by_label, start_j, _ = index
    n, n_kept = logits.shape[0], support.shape[1]
    real = logits.dtype.type
    j = noisy_labels[t]
    links = links_by_label[start_j[j] : start_j[j + 1]]
    log_theta_z_p, c_p = np.empty(links.shape[0]), np.empty(links.shape[0])
    _theta_of_sample(hidden[t], channel_weights, channel_logits, links, g_ps, log_theta_z_p)
    total, log_m_t[t] = _posterior_of_sample(
        logits[t], d_logits[t], links, n_kept, log_theta_z_p, c_p
    )
    if np.isfinite(log_m_t[t]):
        scale_row(d_logits[t], real(1 / (total * n)))
    else:
        fill(d_logits[t], np.nan)
    fill(d_hidden[t], 0)
    for p in range(links.shape[0]):
        i, z_link = links[p] // n_kept, links[p] % n_kept
        d_logits[t, i] -= c_p[p] / n
        scale_row(g_ps[p], real(c_p[p] / n))
        g_ps[p, z_link] -= c_p[p] / n
        for s in range(n_kept):
            _add_multiple(g_ps[p, s], channel_weights[i, s], d_hidden[t])


@jit
def _all_samples(alone, order, arguments):
    do_pieces(alone, order.shape[0], _sample, (order, *arguments))


@jit_part
def _channel_gradient(
    r, rows, first_r, pairs, sample_p, g_ps, hidden, d_channel_weights, d_channel_logits
):
    """Write dU and dB of a row that was touched; the others stay zero."""
    i, n_kept = rows[r], g_ps.shape[1]
    total_s = np.zeros(n_kept)
    for place in range(first_r[r], first_r[r + 1]):
        p = pairs[place]
        for s in range(n_kept):
            total_s[s] += g_ps[p, s]
            _add_multiple(g_ps[p, s], hidden[sample_p[p]], d_channel_weights[i, s])
    for s in range(n_kept):
        d_channel_logits[i, s] = total_s[s]


@jit
def _channel_gradients(rows, arguments):
    do_pieces(False, rows.shape[0], _channel_gradient, (rows, *arguments))


def sparse_c_model_nll(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    index: LinkIndex,
    noisy_labels: np.ndarray,
) -> CModelNLL:
    """See :func:`kernels.sparse_c_model_nll`."""
    n, k = logits.shape
    dtype, links = logits.dtype, tuple(index)
    logits, hidden, channel_weights, channel_logits, noisy_labels = frozen(
        logits, hidden, channel_weights, channel_logits, noisy_labels
    )
    first_t = _pairs_of_samples(noisy_labels, index.start_j)
    rows, _ = rows_with_links(np.unique(noisy_labels), *links[2:])
    first_r, pairs, sample_p = _pairs_of_rows(noisy_labels, links, first_t, rows)

    g_ps = np.empty((first_t[-1], channel_logits.shape[1]), dtype)
    log_m_t, d_logits, d_hidden = np.empty(n), np.empty((n, k), dtype), np.empty_like(hidden)
    work = logits.size + g_ps.size * hidden.shape[1] // 8
    _all_samples(
        work < SMALL,
        np.argsort(noisy_labels, kind="stable"),
        (
            first_t,
            logits,
            hidden,
            channel_weights,
            channel_logits,
            links,
            noisy_labels,
            g_ps,
            log_m_t,
            d_logits,
            d_hidden,
        ),
    )
    # Zero pages cost nothing until they are written; most rows are not.
    d_channel_weights = np.zeros(channel_weights.shape, dtype)
    d_channel_logits = np.zeros(channel_logits.shape, dtype)
    _channel_gradients(
        rows, (first_r, pairs, sample_p, g_ps, hidden, d_channel_weights, d_channel_logits)
    )
    return CModelNLL(
        dtype.type(-log_m_t.mean()), d_logits, d_hidden, d_channel_weights, d_channel_logits
    )


@jit_part
def _posterior_row(
    t, logits, hidden, channel_weights, channel_logits, index, noisy_labels, log_m_t, c_ti
):
    support, links_by_label, start_j, _ = index
    n_kept = support.shape[1]
    links = links_by_label[start_j[noisy_labels[t]] : start_j[noisy_labels[t] + 1]]
    theta_ps = np.empty((links.shape[0], n_kept), channel_logits.dtype)
    log_theta_z_p, c_p = np.empty(links.shape[0]), np.empty(links.shape[0])
    _theta_of_sample(hidden[t], channel_weights, channel_logits, links, theta_ps, log_theta_z_p)
    _, log_m = _posterior_of_sample(logits[t], c_ti[t], links, n_kept, log_theta_z_p, c_p)
    fill(c_ti[t], 0 if np.isfinite(log_m) else np.nan)
    for p in range(links.shape[0]):
        c_ti[t, links[p] // n_kept] = c_p[p]
    log_m_t[t] = log_m


@jit
def _posterior_rows(n, arguments):
    do_pieces(False, n, _posterior_row, arguments)


def sparse_c_model_posterior(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    index: LinkIndex,
    noisy_labels: np.ndarray,
) -> Posterior:
    """See :func:`kernels.sparse_c_model_posterior`."""
    dtype = logits.dtype
    log_m_t, c_ti = np.empty(logits.shape[0], dtype), np.empty(logits.shape, dtype)
    arguments = (
        *frozen(logits, hidden, channel_weights, channel_logits),
        tuple(index),
        *frozen(noisy_labels),
        log_m_t,
        c_ti,
    )
    _posterior_rows(logits.shape[0], arguments)
    return Posterior(log_m_t, c_ti)
