"""The sparse models: what leads to a label, through the transposed index."""

from __future__ import annotations

import numpy as np

from kernels import cuda_launch
from kernels.cupy_backend.labels import group_by_label
from kernels.cupy_backend.launch import NOTHING, Array, cp, launch, negative_mean
from kernels.links import LinkIndex
from kernels.results import CModelNLL, Posterior, SModelNLL


def _sparse_posterior(
    logits: Array,
    channel_logits: Array,
    index: LinkIndex,
    noisy_labels: Array,
    pair_ti: Array = NOTHING,
    posterior: Array = NOTHING,
    d_logits: Array = NOTHING,
) -> tuple[Array, Array]:
    """Write the results that are given; return log m_t and the two parts of log q_ti (n, 2).

    ``pair_ti`` is the c-model's log theta_t,i,z_t of the pairs and becomes c_ti.
    """
    (n, k), n_kept, dtype = logits.shape, channel_logits.shape[1], logits.dtype
    log_m_t, log_q_parts = cp.empty(n, dtype=dtype), cp.empty((n, 2), dtype=dtype)
    args: tuple = logits, channel_logits, index.links_by_label, index.start_j, noisy_labels
    args = *args, n, k, n_kept
    if k <= cuda_launch.ROW_PART:
        results = log_q_parts, log_m_t, posterior, d_logits
        how = cuda_launch.rows(n, k)
        launch("sparse", "sparse_posterior_rows", dtype, how, *args, pair_ti, *results)
        return log_m_t, log_q_parts

    parts, length = cuda_launch.row_parts(n, k), cuda_launch.ROW_PART
    log_sum_parts = cp.empty((n, parts[0][1], 2), dtype=dtype)
    launch("sparse", "row_part_log_sums", dtype, parts, logits, k, length, log_sum_parts)
    sums = log_sum_parts, pair_ti, log_q_parts, log_m_t
    how = cuda_launch.rows(n, k)
    launch("sparse", "sparse_joint_log_sums", dtype, how, *args, length, *sums)
    done: tuple = pair_ti, log_q_parts, log_m_t, posterior, d_logits
    launch("sparse", "sparse_posterior_parts", dtype, parts, *args, length, *done)
    return log_m_t, log_q_parts


def sparse_s_model_nll(
    logits: Array, channel_logits: Array, index: LinkIndex, noisy_labels: Array
) -> SModelNLL:
    """See :func:`kernels.sparse_s_model_nll`."""
    (n, k), n_kept, dtype = logits.shape, channel_logits.shape[1], logits.dtype
    d_logits, counts_is = cp.empty_like(logits), cp.zeros(channel_logits.shape, dtype=dtype)
    given = logits, channel_logits, index, noisy_labels
    log_m_t, log_q_parts = _sparse_posterior(*given, d_logits=d_logits)

    args: tuple = logits, channel_logits, log_q_parts, log_m_t, index.links_by_label, index.start_j
    args = *args, noisy_labels, *group_by_label(noisy_labels, k)
    by_sample, n_rows = n < k, min(n, k)
    how = cuda_launch.rows(n_rows, cuda_launch.divided(n, k))
    sizes = np.int32(by_sample), n_rows, k, n_kept
    launch("sparse", "sparse_counts", dtype, how, *args, *sizes, counts_is)
    args = channel_logits, n, k, n_kept, counts_is
    how = cuda_launch.link_rows(k, n_kept)
    launch("sparse", "sparse_channel_gradient", dtype, how, *args)
    return SModelNLL(negative_mean(log_m_t), d_logits, counts_is)


def sparse_s_model_posterior(
    logits: Array, channel_logits: Array, index: LinkIndex, noisy_labels: Array
) -> Posterior:
    """See :func:`kernels.sparse_s_model_posterior`."""
    c_ti = cp.empty_like(logits)
    given = logits, channel_logits, index, noisy_labels
    return Posterior(_sparse_posterior(*given, posterior=c_ti)[0], c_ti)


def _sparse_c_log_theta(
    hidden: Array,
    channel_weights: Array,
    channel_logits: Array,
    index: LinkIndex,
    noisy_labels: Array,
    log_sum_ti: Array = NOTHING,
) -> Array:
    """Return log theta_t,i,z_t (Eq. 8) of the pairs: (n, K), as the sparse s-model's."""
    (n, d), (k, n_kept) = hidden.shape, channel_logits.shape
    pair_ti = cp.empty((n, k), dtype=hidden.dtype)
    args: tuple = hidden, channel_weights, channel_logits, index.links_by_label, index.start_j
    rest = noisy_labels, k, n_kept, d, pair_ti, log_sum_ti
    launch("sparse", "sparse_c_log_theta", hidden.dtype, cuda_launch.warps(n), *args, *rest)
    return pair_ti


def sparse_c_model_nll(
    logits: Array,
    hidden: Array,
    channel_weights: Array,
    channel_logits: Array,
    index: LinkIndex,
    noisy_labels: Array,
) -> CModelNLL:
    """See :func:`kernels.sparse_c_model_nll`."""
    (n, k), n_kept, d, dtype = logits.shape, channel_logits.shape[1], hidden.shape[1], logits.dtype
    wide = hidden, channel_weights, channel_logits
    log_sum_ti, d_logits = cp.empty_like(logits), cp.empty_like(logits)
    pair_ti = _sparse_c_log_theta(*wide, index, noisy_labels, log_sum_ti)
    given = logits, channel_logits, index, noisy_labels
    log_m_t, _ = _sparse_posterior(*given, pair_ti, d_logits=d_logits)

    d_hidden = cp.empty_like(hidden)
    sizes = n, k, n_kept, d
    args: tuple = (
        *wide,
        index.links_by_label,
        index.start_j,
        noisy_labels,
        pair_ti,
        log_sum_ti,
        *sizes,
    )
    how = cuda_launch.features(n, d)
    launch("sparse", "sparse_c_hidden_gradient", dtype, how, *args, d_hidden)
    d_channel_weights = cp.zeros(channel_weights.shape, dtype=dtype)
    d_channel_logits = cp.zeros(channel_logits.shape, dtype=dtype)
    groups = group_by_label(noisy_labels, k)
    n_samples_i = cp.empty(k, dtype=np.int64)
    how, sizes_i = cuda_launch.elements(k), (k, n_kept, n_samples_i)
    on_labels: tuple = index.support, groups.ends_jb, groups.n_chunks
    launch("sparse", "samples_of_classes", dtype, how, *on_labels, *sizes_i)
    args = *wide, index.support, n_samples_i, *groups, pair_ti, log_sum_ti, *sizes
    how = cuda_launch.features(k * n_kept, d)
    launch(
        "sparse", "sparse_c_weight_gradient", dtype, how, *args, d_channel_weights, d_channel_logits
    )
    return CModelNLL(
        negative_mean(log_m_t), d_logits, d_hidden, d_channel_weights, d_channel_logits
    )


def sparse_c_model_posterior(
    logits: Array,
    hidden: Array,
    channel_weights: Array,
    channel_logits: Array,
    index: LinkIndex,
    noisy_labels: Array,
) -> Posterior:
    """See :func:`kernels.sparse_c_model_posterior`."""
    pair_ti = _sparse_c_log_theta(hidden, channel_weights, channel_logits, index, noisy_labels)
    c_ti = cp.empty_like(logits)
    given = logits, channel_logits, index, noisy_labels
    return Posterior(_sparse_posterior(*given, pair_ti, c_ti)[0], c_ti)
