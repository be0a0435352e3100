"""The sparse s-model: only the links that lead to a sample's label, and the rows that have one.

Samples are worked on in their order, chunk by chunk; those of a chunk with one label are a run,
which has memory of its own for the counts of its label's links p. Of theta, only the rows r are
worked out from which a link leads to a label that occurs. So nothing takes time in proportion to K
but the classifier's softmax and, far less, one number a class. Arrays that end in l hold a number
for every link, row by row. N is float64: n_i theta - N is a difference.
"""

from __future__ import annotations

import numpy as np

from kernels.links import LinkIndex
from kernels.numba_backend.pieces import do_pieces
from kernels.numba_backend.rows import (
    CHUNK,
    SMALL,
    SMALL_PRODUCT,
    exp_row,
    exp_up_row,
    fill,
    frozen,
    jit,
    jit_part,
    jit_rare,
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


@jit_part
def _size_of_chunk(n):
    """Return how many samples a chunk has: the more, the fewer runs there are."""
    return max(CHUNK, (n + _PIECES - 1) // _PIECES)


@jit_part
def _runs_of_chunks(noisy_labels, start_j):
    """Return each sample's run (n,), each run's label, and where its links start (runs + 1,).

    The links of all runs are numbered, one run's after the other's.
    """
    n, k = noisy_labels.shape[0], start_j.shape[0] - 1
    run_t, run_label = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
    run_first = np.zeros(n + 1, dtype=np.int64)
    run, last_chunk, size = -1, -1, _size_of_chunk(n)
    for t in order_by_label(noisy_labels, k):
        z, chunk = noisy_labels[t], t // size
        if run < 0 or z != run_label[run] or chunk != last_chunk:
            run += 1
            run_label[run] = z
            run_first[run + 1] = run_first[run] + start_j[z + 1] - start_j[z]
            last_chunk = chunk
        run_t[t] = run
    return run_t, run_label[: run + 1], run_first[: run + 2]


@jit
def rows_with_links(labels, start_j, rows_by_label):
    """Return the true classes from which a link leads to a label (r,), and the number r of each.

    The numbers are (K,), those of the other classes undefined.
    """
    k, n_links = start_j.shape[0] - 1, 0
    for z in labels:
        n_links += start_j[z + 1] - start_j[z]
    class_r, row_i = np.empty(min(n_links, k), dtype=np.int64), np.empty(k, dtype=np.int32)
    n_rows, is_found = 0, np.zeros(k, dtype=np.bool_)
    for z in labels:
        for p in range(start_j[z], start_j[z + 1]):
            i = np.uint64(rows_by_label[p])
            if not is_found[i]:
                is_found[i], row_i[i] = True, n_rows
                class_r[n_rows] = i
                n_rows += 1
    return class_r[:n_rows], row_i


@jit_part
def _softmax_of_rows(piece, channel_logits, class_r, theta_is):
    """Write theta of some rows (Eq. 10)."""
    first, real = piece * _ROWS, theta_is.dtype.type
    for r in range(first, min(first + _ROWS, class_r.shape[0])):
        i = np.uint64(class_r[r])
        scores_s, theta_s = channel_logits[i], theta_is[i]
        scale_row(theta_s, real(1 / exp_row(scores_s, row_max(scores_s), theta_s)))


@jit_rare
def _log_theta(scores_s, s):
    """Return log theta of one link of a row."""
    top, total = row_max(scores_s), 0.0
    for score in scores_s:
        total += np.exp(np.float64(score - top))
    return np.float64(scores_s[s] - top) - np.log(total)


@jit_rare
def _posterior_in_logs(scores_i, top, total, channel_logits, class_p, link_p, c_p):
    """Write c of the links that lead to z_t in the log domain and return log m."""
    n_kept = channel_logits.shape[1]
    for p in range(c_p.shape[0]):
        i = class_p[p]
        log_theta = _log_theta(channel_logits[i], link_p[p] - i * n_kept)
        c_p[p] = np.float64(scores_i[i] - top) + log_theta
    return softmax_of_logs(c_p) - np.log(total / UP)


@jit_row
def _joint_of_links(e_i, class_p, link_p, theta_l, c_p):
    """Write c_p = e_i theta of the links that lead to z_t and return the sum."""
    joint = 0.0
    for p in range(c_p.shape[0]):
        c_p[p] = e_i[np.uint64(class_p[p])] * theta_l[np.uint64(link_p[p])]
        joint += c_p[p]
    return joint


@jit_row
def _add_posterior(c_p, factor, per_n, class_p, counts_p, d_i):
    """Add factor c_p to the counts and take it from the gradient of the logits."""
    for p in range(c_p.shape[0]):
        c = c_p[p] * factor
        counts_p[p] += c
        d_i[np.uint64(class_p[p])] -= c * per_n


@jit_part
def _samples_of_chunk(
    chunk,
    logits,
    channel_logits,
    noisy_labels,
    links,
    runs,
    theta_l,
    c_cp,
    d_logits,
    counts,
    log_m_c,
):
    """Write d_logits and the counts of every run of one chunk, and sum log m_t.

    As in the dense model: products while they are large enough to lose nothing, logs where not.
    ``counts`` are zero before; ``c_cp`` has room for the links of any run.
    """
    links_by_label, start_j, rows_by_label = links
    run_t, _, run_first = runs
    n = logits.shape[0]
    real = logits.dtype.type
    log_m, product = 0.0, 1.0
    size = _size_of_chunk(n)
    for t in range(chunk * size, min((chunk + 1) * size, n)):
        run, z = run_t[t], noisy_labels[t]
        first, last = start_j[z], start_j[z + 1]
        class_p, link_p = rows_by_label[first:last], links_by_label[first:last]
        counts_p, c_p = counts[run_first[run] : run_first[run + 1]], c_cp[chunk, : last - first]
        scores_i, d_i = logits[t], d_logits[t]
        top = row_max(scores_i)
        total = exp_up_row(scores_i, top, d_i)
        joint = _joint_of_links(d_i, class_p, link_p, theta_l, c_p)
        if 1 <= joint < np.inf:
            scale_row(d_i, real(1 / (total * n)))
            _add_posterior(c_p, 1 / joint, 1 / n, class_p, counts_p, d_i)
            product *= joint / total
            if product < SMALL_PRODUCT:
                log_m += np.log(product)
                product = 1.0
        else:
            log_m_t = _posterior_in_logs(scores_i, top, total, channel_logits, class_p, link_p, c_p)
            log_m += log_m_t
            scale_row(d_i, real(1 / (total * n)) if np.isfinite(log_m_t) else real(np.nan))
            _add_posterior(c_p, 1.0, 1 / n, class_p, counts_p, d_i)
    log_m_c[chunk] = log_m + np.log(product)


@jit_part
def _counts_of_rows(runs, links, rows, counts, n_kept):
    """Add up N of every link of the rows (r, l); the runs in their order."""
    links_by_label, start_j, rows_by_label = links
    _, run_label, run_first = runs
    class_r, row_i = rows
    counts_rs = np.zeros((class_r.shape[0], n_kept))
    counts_l = counts_rs.ravel()
    for run in range(run_label.shape[0]):
        first = start_j[run_label[run]]
        for place in range(run_first[run], run_first[run + 1]):
            p = first + place - run_first[run]
            i = rows_by_label[p]
            link = links_by_label[p] + (row_i[np.uint64(i)] - i) * n_kept
            counts_l[np.uint64(link)] += counts[place]
    return counts_rs


@jit_part
def _channel_gradient(piece, class_r, counts_rs, per_n, d_channel):
    """Write (n_i theta_is - N_is) / n of some rows, which hold theta."""
    first = piece * _ROWS
    for r in range(first, min(first + _ROWS, class_r.shape[0])):
        counts_s, d_s = counts_rs[np.uint64(r)], d_channel[np.uint64(class_r[r])]
        n_i = 0.0
        for s in range(counts_s.shape[0]):
            n_i += counts_s[s]
        for s in range(counts_s.shape[0]):
            d_s[s] = (n_i * d_s[s] - counts_s[s]) * per_n


@jit_part
def _prepare(links, noisy_labels):
    """Return the runs, the rows that have a link to a label, and memory.

    That is: zeros for the counts of all runs, and room for c of each chunk.
    """
    _, start_j, rows_by_label = links
    n, k = noisy_labels.shape[0], start_j.shape[0] - 1
    runs = _runs_of_chunks(noisy_labels, start_j)
    _, run_label, run_first = runs
    if 2 * run_first[-1] > k:  # most rows have one: to find which would take longer
        rows = np.arange(k), np.arange(k, dtype=np.int32)
    else:
        rows = rows_with_links(run_label, start_j, rows_by_label)
    most = 0
    for run in range(run_label.shape[0]):
        most = max(most, run_first[run + 1] - run_first[run])
    n_chunks = -(-n // _size_of_chunk(n))
    return runs, rows, np.zeros(run_first[-1]), np.empty((n_chunks, most))


@jit
def _nll(alone, logits, channel_logits, noisy_labels, links, d_logits, d_channel):
    """Write the gradients, those of rows that have no link to a label excepted; return the loss.

    ``d_channel`` holds theta meanwhile.
    """
    n = logits.shape[0]
    runs, rows, counts, c_cp = _prepare(links, noisy_labels)
    class_r, theta_l = rows[0], d_channel.ravel()
    n_pieces, log_m_c = -(-class_r.shape[0] // _ROWS), np.empty(c_cp.shape[0])
    do_pieces(alone, n_pieces, _softmax_of_rows, (channel_logits, class_r, d_channel))
    samples = (logits, channel_logits, noisy_labels, links, runs, theta_l, c_cp)
    do_pieces(alone, c_cp.shape[0], _samples_of_chunk, (*samples, d_logits, counts, log_m_c))
    counts_rs = _counts_of_rows(runs, links, rows, counts, channel_logits.shape[1])
    do_pieces(alone, n_pieces, _channel_gradient, (class_r, counts_rs, 1 / n, d_channel))
    return -sum_in_order(log_m_c) / n


def sparse_s_model_nll(
    logits: np.ndarray, channel_logits: np.ndarray, index: LinkIndex, noisy_labels: np.ndarray
) -> SModelNLL:
    """See :func:`kernels.sparse_s_model_nll`."""
    dtype = logits.dtype
    # Zero pages cost nothing until they are written; where K is large, most are not.
    d_logits, d_channel = np.empty(logits.shape, dtype), np.zeros(channel_logits.shape, dtype)
    nll = _nll(
        logits.size < SMALL,
        *frozen(logits, channel_logits, noisy_labels),
        index[1:],
        d_logits,
        d_channel,
    )
    return SModelNLL(dtype.type(nll), d_logits, d_channel)


@jit_part
def _posterior_of_chunk(
    chunk, logits, channel_logits, noisy_labels, links, theta_l, c_cp, log_m_t, c_ti
):
    """Write log m_t and c_ti for the samples of one chunk."""
    links_by_label, start_j, rows_by_label = links
    n = logits.shape[0]
    size = _size_of_chunk(n)
    for t in range(chunk * size, min((chunk + 1) * size, n)):
        z = noisy_labels[t]
        first, last = start_j[z], start_j[z + 1]
        class_p, link_p = rows_by_label[first:last], links_by_label[first:last]
        scores_i, c_i, c_p = logits[t], c_ti[t], c_cp[chunk, : last - first]
        top = row_max(scores_i)
        total = exp_up_row(scores_i, top, c_i)
        joint = _joint_of_links(c_i, class_p, link_p, theta_l, c_p)
        if 1 <= joint < np.inf:
            for p in range(last - first):
                c_p[p] *= 1 / joint
            log_m = np.log(joint / total)
        else:
            log_m = _posterior_in_logs(scores_i, top, total, channel_logits, class_p, link_p, c_p)
        fill(c_i, 0 if np.isfinite(log_m) else np.nan)
        for p in range(last - first):
            c_i[np.uint64(class_p[p])] = c_p[p]
        log_m_t[t] = log_m


@jit
def _posterior(alone, logits, channel_logits, noisy_labels, links, log_m_t, c_ti):
    _, (class_r, _), _, c_cp = _prepare(links, noisy_labels)
    theta_is = np.empty_like(channel_logits)
    n_pieces = -(-class_r.shape[0] // _ROWS)
    do_pieces(alone, n_pieces, _softmax_of_rows, (channel_logits, class_r, theta_is))
    samples = (logits, channel_logits, noisy_labels, links, theta_is.ravel(), c_cp, log_m_t, c_ti)
    do_pieces(alone, c_cp.shape[0], _posterior_of_chunk, samples)


def sparse_s_model_posterior(
    logits: np.ndarray, channel_logits: np.ndarray, index: LinkIndex, noisy_labels: np.ndarray
) -> Posterior:
    """See :func:`kernels.sparse_s_model_posterior`."""
    log_m_t, c_ti = np.empty(logits.shape[0], logits.dtype), np.empty(logits.shape, logits.dtype)
    arrays = frozen(logits, channel_logits, noisy_labels)
    _posterior(logits.size < SMALL, *arrays, index[1:], log_m_t, c_ti)
    return Posterior(log_m_t, c_ti)
