"""The s-model (Eqs. 10, 11).

Three ways, by the number of classes. Few: all in one launch, or two. Up to 16384: one pass over the
samples in the order of their labels, rows in registers. More: rows read again and again. The sums
over samples are in a fixed order each way: the same bits in every run, and on every device where
the compiler makes the same of the sources. They are in float64, but for the counts of rows in
registers: of samples that one warp or block adds, some at a time, in the dtype.
"""

from __future__ import annotations

import numpy as np

from kernels import cuda_launch
from kernels.cupy_backend.labels import Chunks, chunks, group_by_label
from kernels.cupy_backend.launch import (
    NOTHING,
    Array,
    constants,
    cp,
    launch,
    launch_held,
    negative_mean,
)
from kernels.results import Posterior, SModelNLL


def _log_theta_columns(
    channel_logits: Array, noisy_labels: Array, in_chunks: Chunks | None = None
) -> tuple[Array, Array, Array]:
    """Return log theta transposed, (j, i), and the two parts of each row's log-sum-exp.

    Rows j of labels that do not occur may be left out. Samples in chunks are sorted meanwhile.
    """
    k, n, dtype = channel_logits.shape[0], noisy_labels.size, channel_logits.dtype
    log_theta_ji, log_sums = cp.empty_like(channel_logits), cp.empty((2, k), dtype=dtype)
    top_i, log_sum_i = log_sums[0], log_sums[1]
    args: tuple = top_i, log_sum_i, log_theta_ji
    if n < k:  # s_model_nll has no chunks then
        how, name = cuda_launch.theta_of_labels(k), "log_theta_of_labels"
        args = channel_logits, noisy_labels, *constants(n, k), *args
    else:
        n_chunks, *places = in_chunks or (0, NOTHING, NOTHING, NOTHING)
        how, name = cuda_launch.theta_rows(k, n_chunks), "log_theta_columns"
        args = channel_logits, *constants(k), *args
        args = *args, noisy_labels, *constants(n, n_chunks), *places
    launch("s_model", name, dtype, how, *args)
    return log_theta_ji, top_i, log_sum_i


def posterior_rows(
    logits: Array,
    log_theta: Array,
    by_label: bool,
    noisy_labels: Array,
    c_ti: Array = NOTHING,
    d_logits: Array = NOTHING,
    log_q_parts: Array = NOTHING,
) -> Array:
    """Write the results that are given and return log m_t.

    The parts of log q_ti are there for rows too long for registers only.
    """
    n, k = logits.shape
    dtype = logits.dtype
    log_m_t = cp.empty(n, dtype=dtype)
    args: tuple = logits, log_theta, np.int32(by_label), noisy_labels, n, k, log_m_t
    held = cuda_launch.held(k, dtype.itemsize)
    if held is None:
        how = cuda_launch.rows(n, k)
        launch("s_model", "posterior_rows", dtype, how, *args, log_q_parts, c_ti, d_logits)
    else:
        launch_held("posterior_rows_held", dtype, n, held, *args, c_ti, d_logits)
    return log_m_t


def _few_classes_nll(logits: Array, channel_logits: Array, noisy_labels: Array) -> SModelNLL:
    n, k = logits.shape
    dtype = logits.dtype
    per_block, n_blocks = cuda_launch.few_classes_blocks(n)
    sums = NOTHING if n_blocks == 1 else cp.empty((n_blocks, k * k + 1), dtype=np.float64)
    nll, d_logits = cp.empty((), dtype=dtype), cp.empty_like(logits)
    d_channel_logits = cp.empty_like(channel_logits)
    block = (cuda_launch.FEW_BLOCK,)
    sizes = constants(n, k, per_block, NOTHING, NOTHING)
    args: tuple = logits, channel_logits, noisy_labels, *sizes, d_logits
    results = nll, d_channel_logits
    launch("s_model", "few_classes", dtype, ((n_blocks,), block), *args, sums, *results)
    if n_blocks > 1:
        args = channel_logits, sums, *constants(n_blocks, n, k)
        launch("s_model", "few_classes_end", dtype, ((1,), block), *args, *results)
    return SModelNLL(nll, d_logits, d_channel_logits)


def s_model_nll(logits: Array, channel_logits: Array, noisy_labels: Array) -> SModelNLL:
    """See :func:`kernels.s_model_nll`."""
    n, k = logits.shape
    dtype = logits.dtype
    if k <= cuda_launch.FEW_CLASSES:
        return _few_classes_nll(logits, channel_logits, noisy_labels)
    in_chunks = chunks(noisy_labels, k) if k <= n else None
    groups = in_chunks.sorted() if in_chunks else group_by_label(noisy_labels, k)
    order, ends_jb, n_chunks = groups
    held = cuda_launch.held(k, dtype.itemsize)
    per_unit, n_units = cuda_launch.sample_units(n, held) if held else (0, 0)
    by_place, n_rows = cuda_launch.count_rows(n, n_units, k) if held else (False, k)
    d_logits, d_channel_logits = cp.empty_like(logits), cp.empty_like(channel_logits)
    log_theta_ji, *log_sums = _log_theta_columns(channel_logits, noisy_labels, in_chunks)
    args: tuple
    if held is None:
        log_m_u, log_q_parts = NOTHING, cp.empty((n, 2), dtype=dtype)
        rows = logits, log_theta_ji, True, noisy_labels
        log_m_t = posterior_rows(*rows, d_logits=d_logits, log_q_parts=log_q_parts)
        nll = negative_mean(log_m_t)
        counts = log_theta_ji  # where a label occurs
        args = logits, log_q_parts, log_m_t, order, ends_jb, n_chunks, k, counts
        launch("s_model", "posterior_counts", dtype, cuda_launch.counts(k), *args)
    else:
        nll, log_m_u = cp.empty((), dtype=dtype), cp.empty(n_units, dtype=np.float64)
        counts = cp.empty((n_rows, k), dtype=dtype)
        sizes = constants(n, k, per_unit, int(by_place))
        args = logits, log_theta_ji, noisy_labels, order, *sizes, d_logits, counts, log_m_u
        launch_held("s_model_rows", dtype, n_units, held, *args)

    sizes = constants(n_chunks, per_unit, int(by_place), n, k)
    args = channel_logits, *log_sums, counts, ends_jb, *sizes, log_m_u, *constants(n_units)
    results = nll if held else NOTHING, d_channel_logits
    how = cuda_launch.channel_gradient(k, dtype.itemsize)
    launch("s_model", "channel_gradient", dtype, how, *args, *results)
    return SModelNLL(nll, d_logits, d_channel_logits)


def s_model_posterior(logits: Array, channel_logits: Array, noisy_labels: Array) -> Posterior:
    """See :func:`kernels.s_model_posterior`."""
    n, k = logits.shape
    dtype = logits.dtype
    c_ti = cp.empty_like(logits)
    if k <= cuda_launch.FEW_CLASSES:
        log_m_t, size = cp.empty(n, dtype=dtype), cuda_launch.FEW_BLOCK
        args: tuple = logits, channel_logits, noisy_labels, n, k, size, log_m_t, c_ti
        how = cuda_launch.elements(n, size)
        launch("s_model", "few_classes", dtype, how, *args, *4 * (NOTHING,))
        return Posterior(log_m_t, c_ti)
    log_theta_ji, *_ = _log_theta_columns(channel_logits, noisy_labels)
    return Posterior(posterior_rows(logits, log_theta_ji, True, noisy_labels, c_ti=c_ti), c_ti)
