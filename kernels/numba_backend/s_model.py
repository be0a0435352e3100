"""The s-model (Eqs. 10-12): loss, gradient and E-step.

The loss is made of three passes (:func:`s_model_nll`):

1. *columns*: rows of theta, sixteen at a time. Of each only the entries at labels that occur are
   kept, turned over, so that a label's column of theta is one contiguous row.
2. *samples*, sorted by label: one pass over the logits gives q and m, a second one the posterior
   and the gradient. A run of samples with one label adds up its row of N_ij in place.
3. *gradient* of the channel logits, row by row, from the exponentials that pass 1 left there: no
   more memory, and less time than to compute them again.

exp(a_i - top) and theta are held times 2^40 each. While the sum of q_i theta_iz over i is at least
2^-40, what is too small for a normal number then is too small for one in the posterior, too. The
few samples with less are done in the log domain.
"""

from __future__ import annotations

import numpy as np

from kernels.numba_backend.pieces import do_pieces
from kernels.numba_backend.rows import (
    CHUNK,
    SMALL,
    SMALL_PRODUCT,
    exp_up_and_joint_row,
    exp_up_row,
    fill,
    frozen,
    jit,
    jit_part,
    jit_rare,
    jit_row,
    log_posterior_row,
    row_max,
    runs_by_label,
    scale_row_twice,
    sum_in_order,
)
from kernels.numba_backend.vector import (
    UP,
    first,
    lanes,
    load,
    splat,
    square_memory,
    store,
    turn,
)
from kernels.results import Posterior, SModelNLL

# Rows of theta handled together: one cache line of a transposed float32 array.
_ROWS = 16
# Below so many exponentials the calling thread does all three passes. Two threads are woken thrice,
# and read what the other wrote: they take nine tenths of one's time, or twice that at a bad moment.
_ALONE = 6 * SMALL
# Numbers of the rows of samples that take their steps together: they are to stay in the L1 cache.
_TOGETHER = 4096


@jit_part
def _pitch(k):
    """Return k rounded up to an odd number of pieces of sixteen.

    Numbers a power of two apart take turns in the same few places of a cache.
    """
    return ((k + _ROWS - 1) // _ROWS | 1) * _ROWS


@jit_row
def _scaled_vector(numbers, n, scale_r, r, row, i):
    """Write a vector of numbers from n on, times their scales from r on, to a row from i on."""
    every, zero = first(row, lanes(row)), splat(row, 0.0)
    store(row, i, every, load(numbers, n, every, zero) * load(scale_r, r, every, zero))


@jit_part
def _columns(piece, channel_logits, label_s, e_ij, theta_si, top_i, total_i):
    """Pass 1 for sixteen rows of theta: keep theta_i,label_s, turned over and scaled.

    Writes e_ij = 2^40 exp(a_ij - top_i), too, if that has rows.
    """
    first, k = piece * _ROWS, channel_logits.shape[0]
    n_rows = min(_ROWS, k - first)
    if e_ij.shape[0] > 0:
        e_rj = e_ij[first : first + n_rows]
    else:
        e_rj = np.empty((n_rows, k), channel_logits.dtype)
    scale_r = square_memory(top_i)
    for r in range(n_rows):
        scores_j = channel_logits[first + r]
        top = row_max(scores_j)
        total = exp_up_row(scores_j, top, e_rj[r])
        top_i[first + r], total_i[first + r] = top, total / UP
        scale_r[r] = UP / total
    if 2 * label_s.shape[0] < k:  # turning all of them over would take longer
        for s in range(label_s.shape[0]):
            j, theta_r = np.uint64(label_s[s]), theta_si[s, first : first + _ROWS]
            for r in range(n_rows):
                theta_r[r] = e_rj[r, j] * scale_r[r]
        return
    width, square = lanes(top_i), square_memory(top_i)
    for r in range(0, n_rows, width):
        s = 0
        for start in range(0, k, width):
            turn(e_rj, r, start, n_rows - r, k - start, square)
            while s < label_s.shape[0] and label_s[s] < start + width:
                line = (label_s[s] - start) * width
                _scaled_vector(square, line, scale_r, r, theta_si[s], first + r)
                s += 1


@jit_row
def _gradient_step(theta_i, to_q, to_c, per_n, d_i, counts_i, i, mask, counted):
    zero = splat(d_i, 0.0)
    e = load(d_i, i, mask, zero)
    c = e * load(theta_i, i, mask, zero) * to_c
    # A whole vector, past the row's end too: a masked one would be waited for by the next sample.
    store(counts_i, i, first(d_i, lanes(d_i)), load(counts_i, i, counted, zero) + c)
    store(d_i, i, mask, e * to_q - c * per_n)


@jit_row
def _gradient_row(theta_i, to_q, to_c, per_n, d_i, counts_i, is_first):
    """Turn e_i into d_i = (q_i - c_i) / n in place; add c_i to the counts, or begin them.

    The counts have room for whole vectors.
    """
    n, width = d_i.shape[0], lanes(d_i)
    every, whole = first(d_i, width), n - n % width
    counted = first(d_i, 0 if is_first else width)
    q, c, p = splat(d_i, to_q), splat(d_i, to_c), splat(d_i, per_n)
    for i in range(0, whole, width):
        _gradient_step(theta_i, q, c, p, d_i, counts_i, i, every, counted)
    if whole < n:
        _gradient_step(theta_i, q, c, p, d_i, counts_i, whole, first(d_i, n - whole), counted)


@jit_row
def _sum_of_rows(rows_ri, first_row, last_row, sums):
    """Write the sums of some rows."""
    width, zero = lanes(sums), splat(sums, 0.0)
    for i in range(0, sums.shape[0], width):
        mask, total = first(sums, sums.shape[0] - i), zero
        for r in range(first_row, last_row):
            total = total + load(rows_ri[r], i, mask, zero)
        store(sums, i, mask, total)


@jit_rare
def _posterior_in_logs(scores_i, channel_logits, z, top_i, total_i, c_i):
    """Write c_i of one sample in the log domain and return log m."""
    log_theta_i = np.empty_like(top_i)
    for i in range(top_i.shape[0]):
        log_theta_i[i] = np.float64(channel_logits[i, z] - top_i[i]) - np.log(total_i[i])
    return log_posterior_row(scores_i, log_theta_i, c_i)


@jit_part
def _samples_of_chunk(
    chunk,
    logits,
    channel_logits,
    runs,
    theta_si,
    top_i,
    total_i,
    d_logits,
    counts_ri,
    mass_ci,
    log_m_c,
):
    """Pass 2 for the runs of one chunk: d_logits, N of each run, their sum, and sum_t log m_t.

    A few samples take each step together: a processor then works on one's row while it still waits
    for the sum of another's. A product of probabilities needs one log for many samples.
    """
    order, label_s, run_start, run_label, chunk_run = runs
    n, k = logits.shape
    real = logits.dtype.type
    n_together = max(1, min(CHUNK, _TOGETHER // k))
    run_p, top_p = np.empty(n_together, np.int64), np.empty(n_together, logits.dtype)
    total_p, joint_p = np.empty(n_together), np.empty(n_together)
    log_m, product = 0.0, 1.0
    first_run, last_run = chunk_run[chunk], chunk_run[chunk + 1]
    r = first_run
    for start in range(run_start[first_run], run_start[last_run], n_together):
        order_p = order[start : min(start + n_together, run_start[last_run])]
        for p in range(order_p.shape[0]):
            while start + p >= run_start[r + 1]:
                r += 1
            run_p[p], top_p[p] = r, row_max(logits[order_p[p]])
        for p in range(order_p.shape[0]):
            t, theta_i = order_p[p], theta_si[run_label[run_p[p]]]
            total_p[p], joint_p[p] = exp_up_and_joint_row(logits[t], top_p[p], theta_i, d_logits[t])
        for p in range(order_p.shape[0]):
            t, s, counts_i = order_p[p], run_label[run_p[p]], counts_ri[run_p[p]]
            is_first = start + p == run_start[run_p[p]]
            if UP <= joint_p[p] < np.inf:
                per_total = 1 / total_p[p]
                product *= joint_p[p] / UP * per_total
                if product < SMALL_PRODUCT:
                    log_m += np.log(product)
                    product = 1.0
                to_q, to_c = real(per_total / n), real(1 / joint_p[p])
                _gradient_row(theta_si[s], to_q, to_c, real(1 / n), d_logits[t], counts_i, is_first)
            else:
                if is_first:
                    fill(counts_i, 0)
                c_i = np.empty_like(top_i)
                log_m += _posterior_in_logs(
                    logits[t], channel_logits, label_s[s], top_i, total_i, c_i
                )
                for i in range(k):
                    counts_i[i] += c_i[i]
                    d_logits[t, i] = (d_logits[t, i] / total_p[p] - c_i[i]) / n
    _sum_of_rows(counts_ri, first_run, last_run, mass_ci[chunk])
    log_m_c[chunk] = log_m + np.log(product)


@jit_row
def _add_vector(numbers, n, row, i):
    """Add a vector of numbers from n on to a row from i on."""
    every, zero = first(row, lanes(row)), splat(row, 0.0)
    store(row, i, every, load(row, i, every, zero) + load(numbers, n, every, zero))


@jit_row
def _subtract_vector(numbers, n, factor, row, i):
    """Subtract a vector of numbers from n on, times a factor, from a row, from i on to its end."""
    some, zero = first(row, row.shape[0] - i), splat(row, 0.0)
    product = load(numbers, n, some, zero) * splat(row, factor)
    store(row, i, some, load(row, i, some, zero) - product)


@jit_part
def _channel_gradient(piece, label_r, n, total_i, counts_ri, mass_ci, d_channel):
    """Pass 3 for sixteen rows, which hold e_ij: (n_i theta_ij - N_ij) / n."""
    first = piece * _ROWS
    real = d_channel.dtype.type
    per_n = real(1 / n)
    k = d_channel.shape[0]
    d_qj = d_channel[first : min(first + _ROWS, k)]
    for q in range(d_qj.shape[0]):
        n_i = 0.0
        for c in range(mass_ci.shape[0]):
            n_i += np.float64(mass_ci[c, first + q])
        # Not their product: it would be too small for a float32 too early.
        scale_row_twice(d_qj[q], real(1 / (UP * total_i[first + q])), real(n_i / n))
    if 2 * label_r.shape[0] < k:
        for q in range(d_qj.shape[0]):
            d_j, counts_r = d_qj[q], counts_ri[:, first + q]
            for r in range(label_r.shape[0]):
                d_j[np.uint64(label_r[r])] -= counts_r[r] * per_n
        return
    width, counts_jq, square = lanes(d_qj[0]), square_memory(d_qj[0]), square_memory(d_qj[0])
    for q in range(0, d_qj.shape[0], width):
        r = 0
        for start in range(0, k, width):
            fill(counts_jq, 0)
            while r < label_r.shape[0] and label_r[r] < start + width:
                _add_vector(counts_ri[r], first + q, counts_jq, (label_r[r] - start) * width)
                r += 1
            turn(counts_jq.reshape(width, width), 0, 0, width, width, square)
            for p in range(min(width, d_qj.shape[0] - q)):
                _subtract_vector(square, p * width, per_n, d_qj[q + p], start)


@jit_part
def _prepare(channel_logits, noisy_labels):
    """Sort the labels; return the runs, and how many pieces pass 1 has and memory for it."""
    k = channel_logits.shape[0]
    runs = runs_by_label(noisy_labels, k)
    n_pieces = (k + _ROWS - 1) // _ROWS
    theta_si = np.empty((runs[1].shape[0], _pitch(k)), channel_logits.dtype)
    top_i, total_i = np.empty(k, channel_logits.dtype), np.empty(k)
    return runs, n_pieces, theta_si, top_i, total_i


@jit
def _nll(alone, logits, channel_logits, noisy_labels, d_logits, d_channel):
    """Do the three passes; return the loss."""
    n, k = logits.shape
    runs, n_pieces, theta_si, top_i, total_i = _prepare(channel_logits, noisy_labels)
    label_s, n_chunks = runs[1], runs[4].shape[0] - 1
    counts_ri = np.empty((runs[3].shape[0], theta_si.shape[1]), logits.dtype)
    mass_ci, log_m_c = np.empty((n_chunks, k), logits.dtype), np.empty(n_chunks)
    rows = (channel_logits, label_s, d_channel, theta_si, top_i, total_i)
    do_pieces(alone, n_pieces, _columns, rows)
    samples = (logits, channel_logits, runs, theta_si, top_i, total_i, d_logits)
    do_pieces(alone, n_chunks, _samples_of_chunk, (*samples, counts_ri, mass_ci, log_m_c))
    columns = (label_s[runs[3]], n, total_i, counts_ri, mass_ci, d_channel)
    do_pieces(alone, n_pieces, _channel_gradient, columns)
    return -sum_in_order(log_m_c) / n


def s_model_nll(
    logits: np.ndarray, channel_logits: np.ndarray, noisy_labels: np.ndarray
) -> SModelNLL:
    """See :func:`kernels.s_model_nll`."""
    n, k = logits.shape
    dtype = logits.dtype
    d_logits, d_channel_logits = np.empty((n, k), dtype), np.empty((k, k), dtype)
    alone = logits.size + channel_logits.size < _ALONE
    inputs = frozen(logits, channel_logits, noisy_labels)
    nll = _nll(alone, *inputs, d_logits, d_channel_logits)
    return SModelNLL(dtype.type(nll), d_logits, d_channel_logits)


@jit_part
def _posterior_of_chunk(
    chunk, logits, channel_logits, runs, theta_si, top_i, total_i, log_m_t, c_ti
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
def _product_step(theta_i, factor, c_i, i, mask):
    e, theta = load(c_i, i, mask, factor), load(theta_i, i, mask, factor)
    store(c_i, i, mask, e * theta * factor)


@jit_row
def _product_row(theta_i, factor, c_i):
    """Turn e_i into c_i = e_i theta_i factor in place."""
    n, width = c_i.shape[0], lanes(c_i)
    every, whole, factors = first(c_i, width), n - n % width, splat(c_i, factor)
    for i in range(0, whole, width):
        _product_step(theta_i, factors, c_i, i, every)
    if whole < n:
        _product_step(theta_i, factors, c_i, whole, first(c_i, n - whole))


@jit
def _posterior(alone, logits, channel_logits, noisy_labels, log_m_t, c_ti):
    """Do passes 1 and 2."""
    runs, n_pieces, theta_si, top_i, total_i = _prepare(channel_logits, noisy_labels)
    label_s, n_chunks = runs[1], runs[4].shape[0] - 1
    none = np.empty((0, channel_logits.shape[0]), channel_logits.dtype)
    do_pieces(alone, n_pieces, _columns, (channel_logits, label_s, none, theta_si, top_i, total_i))
    samples = (logits, channel_logits, runs, theta_si, top_i, total_i, log_m_t, c_ti)
    do_pieces(alone, n_chunks, _posterior_of_chunk, samples)


def s_model_posterior(
    logits: np.ndarray, channel_logits: np.ndarray, noisy_labels: np.ndarray
) -> Posterior:
    """See :func:`kernels.s_model_posterior`."""
    n, k = logits.shape
    log_m_t, c_ti = np.empty(n, logits.dtype), np.empty((n, k), logits.dtype)
    alone = logits.size + channel_logits.size < _ALONE
    _posterior(alone, *frozen(logits, channel_logits, noisy_labels), log_m_t, c_ti)
    return Posterior(log_m_t, c_ti)
