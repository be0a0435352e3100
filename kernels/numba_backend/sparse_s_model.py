"""The sparse s-model: only the links that lead to a sample's label, and the rows that have one.

Labels that occur are numbered s, their links p, one label's after the other's, and the rows that
have such a link r. Samples are worked on in their order, chunk by chunk; those of a chunk with one
label are a run, which has memory of its own for the counts of its label's links. So nothing but the
classifier's softmax takes time in proportion to K, and what is worked on lies together, wherever it
comes from. theta and N are float64: there are few of them, and n_i theta - N is a difference.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from kernels.links import LinkIndex
from kernels.numba_backend.rows import (
    CHUNK,
    SMALL,
    SMALL_PRODUCT,
    exp_row,
    exp_up_row,
    frozen,
    jit,
    jit_alone_or_parallel,
    jit_piece,
    jit_row,
    order_by_label,
    row_max,
    scale_row,
    softmax_of_logs,
    sum_in_order,
)
from kernels.numba_backend.vector import UP
from kernels.results import Posterior, SModelNLL

# Rows that one piece of work takes.
_ROWS = 64
# Pieces into which many samples are cut.
_PIECES = 32


@jit
def _size_of_chunk(n):
    """Return how many samples a chunk has: the more, the fewer runs there are."""
    return max(CHUNK, (n + _PIECES - 1) // _PIECES)


@jit
def _runs_of_chunks(noisy_labels, k):
    """Return the labels that occur (s,), each sample's run (n,), and each run's label (runs,)."""
    n = noisy_labels.shape[0]
    label_s, run_label = np.empty(min(n, k), dtype=np.int64), np.empty(n, dtype=np.int64)
    run_t = np.empty(n, dtype=np.int64)
    s, run, last_chunk, size = -1, -1, -1, _size_of_chunk(n)
    for t in order_by_label(noisy_labels, k):
        z, chunk = noisy_labels[t], t // size
        is_new = s < 0 or z != label_s[s]
        if is_new:
            s += 1
            label_s[s] = z
        if is_new or chunk != last_chunk:
            run += 1
            run_label[run] = s
            last_chunk = chunk
        run_t[t] = run
    return label_s[: s + 1], run_t, run_label[: run + 1]


@jit
def links_to(label_s, index):
    """Gather the links that lead to labels that occur.

    Returns where each label's start (s + 1,), each link's true class, its place in that class's row
    of the support, and the number of that row (p,), and the true classes of the rows (r,).
    """
    support, links_by_label, start_j, rows_by_label = index
    k, n_kept = support.shape
    first_s = np.zeros(label_s.shape[0] + 1, dtype=np.int64)
    for s in range(label_s.shape[0]):
        first_s[s + 1] = first_s[s] + start_j[label_s[s] + 1] - start_j[label_s[s]]
    n_links = first_s[-1]
    class_p, slot_p = np.empty(n_links, dtype=np.int64), np.empty(n_links, dtype=np.int64)
    row_p = np.empty(n_links, dtype=np.int64)
    row_of_class, class_r = (
        np.full(k, -1, dtype=np.int32),
        np.empty(min(k, n_links), dtype=np.int64),
    )
    n_rows = 0
    for s in range(label_s.shape[0]):
        start = start_j[label_s[s]] - first_s[s]
        for p in range(first_s[s], first_s[s + 1]):
            link = np.uint64(start + p)
            i = rows_by_label[link]
            row = row_of_class[np.uint64(i)]
            if row < 0:
                row = n_rows
                row_of_class[np.uint64(i)] = row
                class_r[np.uint64(row)] = i
                n_rows += 1
            class_p[p], slot_p[p] = i, links_by_label[link] - i * n_kept
            row_p[p] = row
    return first_s, class_p, slot_p, row_p, class_r[:n_rows]


@jit
def _softmax_of_rows(channel_logits, class_r, start, theta_rs, top_r, total_r):
    """Write theta of some rows (Eq. 10), and the maximum and the sum of each softmax."""
    e_s = np.empty(channel_logits.shape[1], channel_logits.dtype)
    for r in range(start, min(start + _ROWS, class_r.shape[0])):
        scores_s = channel_logits[class_r[r]]
        top_r[r] = row_max(scores_s)
        total_r[r] = exp_row(scores_s, top_r[r], e_s)
        per_total = 1 / total_r[r]
        for s in range(e_s.shape[0]):
            theta_rs[r, s] = e_s[s] * per_total


@jit_piece
def _posterior_in_logs(
    scores_i, top, total, channel_logits, top_r, total_r, class_p, slot_p, row_p, c_p
):
    """Write c of the links that lead to z_t in the log domain and return log m."""
    for p in range(c_p.shape[0]):
        i, r = class_p[p], row_p[p]
        log_theta = np.float64(channel_logits[i, slot_p[p]] - top_r[r]) - np.log(total_r[r])
        c_p[p] = np.float64(scores_i[i] - top) + log_theta
    return softmax_of_logs(c_p) - np.log(total / UP)


@jit_row
def _joint_of_links(e_i, class_p, row_p, slot_p, theta_rs, c_p):
    """Write c_p = e_i theta of the links that lead to z_t and return the sum."""
    joint = 0.0
    for p in range(c_p.shape[0]):
        theta = theta_rs[np.uint64(row_p[p]), np.uint64(slot_p[p])]
        c_p[p] = e_i[np.uint64(class_p[p])] * theta
        joint += c_p[p]
    return joint


@jit_row
def _add_posterior(c_p, factor, per_n, class_p, counts_p, d_i):
    """Add factor c_p to the counts and take it from the gradient of the logits."""
    for p in range(c_p.shape[0]):
        c = c_p[p] * factor
        counts_p[p] += c
        d_i[np.uint64(class_p[p])] -= c * per_n


@jit
def _most_links(first_s):
    """Return how many links lead to the label that has most."""
    most = 0
    for s in range(first_s.shape[0] - 1):
        most = max(most, first_s[s + 1] - first_s[s])
    return most


@jit_piece
def _samples_of_chunk(
    logits, channel_logits, runs, links, softmaxes, chunk, run_first, c, d_logits, counts
):
    """Write d_logits and the counts of every run of one chunk; return sum log m_t.

    As in the dense model: products while they are large enough to lose nothing, logs where not.
    ``counts`` are zero before; ``c`` has room for the links of any label.
    """
    _, run_t, run_label = runs
    first_s, class_ps, slot_ps, row_ps, _ = links
    theta_rs, top_r, total_r = softmaxes
    n = logits.shape[0]
    real = logits.dtype.type
    log_m, product = 0.0, 1.0
    size = _size_of_chunk(n)
    for t in range(chunk * size, min((chunk + 1) * size, n)):
        run = run_t[t]
        first, last = first_s[run_label[run]], first_s[run_label[run] + 1]
        class_p, slot_p, row_p = class_ps[first:last], slot_ps[first:last], row_ps[first:last]
        counts_p, c_p = counts[run_first[run] : run_first[run + 1]], c[: last - first]
        scores_i, d_i = logits[t], d_logits[t]
        top = row_max(scores_i)
        total = exp_up_row(scores_i, top, d_i)
        joint = _joint_of_links(d_i, class_p, row_p, slot_p, theta_rs, c_p)
        if 1 <= joint < np.inf:
            scale_row(d_i, real(1 / (total * n)))
            _add_posterior(c_p, 1 / joint, 1 / n, class_p, counts_p, d_i)
            product *= joint / total
            if product < SMALL_PRODUCT:
                log_m += np.log(product)
                product = 1.0
        else:
            log_m_t = _posterior_in_logs(
                scores_i, top, total, channel_logits, top_r, total_r, class_p, slot_p, row_p, c_p
            )
            log_m += log_m_t
            scale_row(d_i, real(1 / (total * n)) if np.isfinite(log_m_t) else real(np.nan))
            _add_posterior(c_p, 1.0, 1 / n, class_p, counts_p, d_i)
    return log_m + np.log(product)


@jit
def _run_places(run_label, first_s):
    """Return where each run's links start among the links of all runs: (r + 1,)."""
    run_first = np.zeros(run_label.shape[0] + 1, dtype=np.int64)
    for r in range(run_label.shape[0]):
        s = run_label[r]
        run_first[r + 1] = run_first[r] + first_s[s + 1] - first_s[s]
    return run_first


@jit
def _counts_of_rows(run_label, run_first, links, n_kept, counts):
    """Add up N of every link of the rows; the runs in their order."""
    first_s, _, slot_p, row_p, class_r = links
    counts_rs = np.zeros((class_r.shape[0], n_kept))
    for run in range(run_label.shape[0]):
        first = first_s[run_label[run]]
        for place in range(run_first[run], run_first[run + 1]):
            p = first + place - run_first[run]
            counts_rs[np.uint64(row_p[p]), np.uint64(slot_p[p])] += counts[place]
    return counts_rs


@jit
def _channel_gradient(class_r, start, theta_rs, counts_rs, per_n, d_channel):
    """Write (n_i theta_is - N_is) / n of some rows."""
    for r in range(start, min(start + _ROWS, class_r.shape[0])):
        n_i = 0.0
        for s in range(counts_rs.shape[1]):
            n_i += counts_rs[r, s]
        for s in range(counts_rs.shape[1]):
            d_channel[class_r[r], s] = (n_i * theta_rs[r, s] - counts_rs[r, s]) * per_n


@jit
def _prepare(channel_logits, index, noisy_labels):
    """Find the runs, gather the links, and return them with memory for the rows' softmaxes."""
    k, n_kept = channel_logits.shape
    runs = _runs_of_chunks(noisy_labels, k)
    links = links_to(runs[0], index)
    n_rows = links[4].shape[0]
    softmaxes = np.empty((n_rows, n_kept)), np.empty(n_rows, channel_logits.dtype), np.empty(n_rows)
    return runs, links, softmaxes, (n_rows + _ROWS - 1) // _ROWS


@jit_alone_or_parallel
def _nll(logits, channel_logits, index, noisy_labels, d_logits, d_channel):
    """Write the gradients, those of rows that have no link to a label excepted; return the loss."""
    n = logits.shape[0]
    runs, links, softmaxes, n_pieces = _prepare(channel_logits, index, noisy_labels)
    class_r, run_label, n_chunks = links[4], runs[2], -(-n // _size_of_chunk(n))
    theta_rs, top_r, total_r = softmaxes
    for p in prange(n_pieces):
        start = np.int64(p) * _ROWS
        _softmax_of_rows(channel_logits, class_r, start, theta_rs, top_r, total_r)
    run_first = _run_places(run_label, links[0])
    counts, log_m_c = np.zeros(run_first[-1]), np.empty(n_chunks)
    c_cp = np.empty((n_chunks, _most_links(links[0])))
    for c in prange(n_chunks):
        log_m_c[c] = _samples_of_chunk(
            logits,
            channel_logits,
            runs,
            links,
            softmaxes,
            np.int64(c),
            run_first,
            c_cp[c],
            d_logits,
            counts,
        )
    counts_rs = _counts_of_rows(run_label, run_first, links, channel_logits.shape[1], counts)
    for p in prange(n_pieces):
        _channel_gradient(class_r, np.int64(p) * _ROWS, theta_rs, counts_rs, 1 / n, d_channel)
    return -sum_in_order(log_m_c) / n


def sparse_s_model_nll(
    logits: np.ndarray, channel_logits: np.ndarray, index: LinkIndex, noisy_labels: np.ndarray
) -> SModelNLL:
    """See :func:`kernels.sparse_s_model_nll`."""
    dtype = logits.dtype
    d_logits, d_channel_logits = (
        np.empty(logits.shape, dtype),
        np.zeros(channel_logits.shape, dtype),
    )
    logits, channel_logits, noisy_labels = frozen(logits, channel_logits, noisy_labels)
    alone = logits.size < SMALL
    nll = _nll(
        alone, logits, channel_logits, tuple(index), noisy_labels, d_logits, d_channel_logits
    )
    return SModelNLL(dtype.type(nll), d_logits, d_channel_logits)


@jit_piece
def _posterior_of_chunk(logits, channel_logits, runs, links, softmaxes, chunk, c, log_m_t, c_ti):
    """Write log m_t and c_ti for the samples of one chunk."""
    _, run_t, run_label = runs
    first_s, class_ps, slot_ps, row_ps, _ = links
    theta_rs, top_r, total_r = softmaxes
    n = logits.shape[0]
    size = _size_of_chunk(n)
    for t in range(chunk * size, min((chunk + 1) * size, n)):
        s = run_label[run_t[t]]
        first, last = first_s[s], first_s[s + 1]
        class_p, slot_p, row_p = class_ps[first:last], slot_ps[first:last], row_ps[first:last]
        scores_i, c_i, c_p = logits[t], c_ti[t], c[: last - first]
        top = row_max(scores_i)
        total = exp_up_row(scores_i, top, c_i)
        joint = _joint_of_links(c_i, class_p, row_p, slot_p, theta_rs, c_p)
        if 1 <= joint < np.inf:
            for p in range(last - first):
                c_p[p] *= 1 / joint
            log_m = np.log(joint / total)
        else:
            log_m = _posterior_in_logs(
                scores_i, top, total, channel_logits, top_r, total_r, class_p, slot_p, row_p, c_p
            )
        c_i[:] = 0 if np.isfinite(log_m) else np.nan
        for p in range(last - first):
            c_i[np.uint64(class_p[p])] = c_p[p]
        log_m_t[t] = log_m


@jit_alone_or_parallel
def _posterior(logits, channel_logits, index, noisy_labels, log_m_t, c_ti):
    runs, links, softmaxes, n_pieces = _prepare(channel_logits, index, noisy_labels)
    theta_rs, top_r, total_r = softmaxes
    n = logits.shape[0]
    class_r, n_chunks = links[4], -(-n // _size_of_chunk(n))
    for p in prange(n_pieces):
        start = np.int64(p) * _ROWS
        _softmax_of_rows(channel_logits, class_r, start, theta_rs, top_r, total_r)
    c_cp = np.empty((n_chunks, _most_links(links[0])))
    for c in prange(n_chunks):
        _posterior_of_chunk(
            logits, channel_logits, runs, links, softmaxes, np.int64(c), c_cp[c], log_m_t, c_ti
        )


def sparse_s_model_posterior(
    logits: np.ndarray, channel_logits: np.ndarray, index: LinkIndex, noisy_labels: np.ndarray
) -> Posterior:
    """See :func:`kernels.sparse_s_model_posterior`."""
    log_m_t, c_ti = np.empty(logits.shape[0], logits.dtype), np.empty(logits.shape, logits.dtype)
    logits, channel_logits, noisy_labels = frozen(logits, channel_logits, noisy_labels)
    alone = logits.size < SMALL
    _posterior(alone, logits, channel_logits, tuple(index), noisy_labels, log_m_t, c_ti)
    return Posterior(log_m_t, c_ti)
