"""The s-model (Eqs. 10, 11)."""

from __future__ import annotations

import numpy as np

from kernels import cuda_launch
from kernels.cupy_backend.labels import group_by_label
from kernels.cupy_backend.launch import NOTHING, Array, cp, launch, negative_mean
from kernels.results import Posterior, SModelNLL


def _log_theta_columns(channel_logits: Array) -> tuple[Array, Array, Array]:
    """Return log theta transposed, (j, i), and the two parts of each row's log-sum-exp."""
    k, dtype = channel_logits.shape[0], channel_logits.dtype
    top_i, log_sum_i = cp.empty(k, dtype=dtype), cp.empty(k, dtype=dtype)
    log_theta_ji = cp.empty_like(channel_logits)
    args: tuple = channel_logits, k, k, top_i, log_sum_i
    launch("s_model", "channel_log_sums", dtype, cuda_launch.rows(k, k), *args)
    args = channel_logits, top_i, log_sum_i, k, log_theta_ji
    launch("s_model", "log_theta_columns", dtype, cuda_launch.tiles(k, k), *args)
    return log_theta_ji, top_i, log_sum_i


def posterior_rows(
    logits: Array,
    log_theta: Array,
    by_label: bool,
    noisy_labels: Array,
    log_q_parts: Array = NOTHING,
    c_ti: Array = NOTHING,
    d_logits: Array = NOTHING,
) -> Array:
    """Write the results that are given and return log m_t."""
    n, k = logits.shape
    log_m_t = cp.empty(n, dtype=logits.dtype)
    args: tuple = logits, log_theta, np.int32(by_label), noisy_labels, n, k
    results = log_m_t, log_q_parts, c_ti, d_logits
    how = cuda_launch.rows(n, k)
    launch("s_model", "posterior_rows", logits.dtype, how, *args, *results)
    return log_m_t


def s_model_nll(logits: Array, channel_logits: Array, noisy_labels: Array) -> SModelNLL:
    """See :func:`kernels.s_model_nll`."""
    n, k = logits.shape
    dtype = logits.dtype
    log_theta_ji, *log_sums = _log_theta_columns(channel_logits)
    log_q_parts, d_logits = cp.empty((n, 2), dtype=dtype), cp.empty_like(logits)
    log_m_t = posterior_rows(
        logits, log_theta_ji, True, noisy_labels, log_q_parts, d_logits=d_logits
    )

    order, ends_jb, n_chunks = group_by_label(noisy_labels, k)
    args: tuple = logits, log_q_parts, log_m_t, order, ends_jb, n_chunks, k, log_theta_ji
    launch("s_model", "posterior_counts", dtype, cuda_launch.counts(k), *args)
    counts_ji = log_theta_ji  # where a label occurs
    n_i = cp.empty(k, dtype=np.float64)
    how = cuda_launch.columns(k, 32)
    launch("s_model", "class_totals", dtype, how, counts_ji, ends_jb, n_chunks, k, n_i)
    d_channel_logits = cp.empty_like(channel_logits)
    args = channel_logits, *log_sums, counts_ji, n_i, ends_jb, n_chunks, n, k, d_channel_logits
    launch("s_model", "channel_gradient", dtype, cuda_launch.tiles(k, k), *args)
    return SModelNLL(negative_mean(log_m_t), d_logits, d_channel_logits)


def s_model_posterior(logits: Array, channel_logits: Array, noisy_labels: Array) -> Posterior:
    """See :func:`kernels.s_model_posterior`."""
    log_theta_ji, *_ = _log_theta_columns(channel_logits)
    c_ti = cp.empty_like(logits)
    return Posterior(posterior_rows(logits, log_theta_ji, True, noisy_labels, c_ti=c_ti), c_ti)
