"""The sparse models: what leads to a label, through the transposed index."""

from __future__ import annotations

from kernels import cuda_launch
from kernels.cupy_backend.labels import group_by_label
from kernels.cupy_backend.launch import NOTHING, Array, cp, launch, negative_mean
from kernels.links import LinkIndex
from kernels.results import CModelNLL, Posterior, SModelNLL


def _sparse_posterior_rows(
    logits: Array,
    index: LinkIndex,
    noisy_labels: Array,
    pair_ti: Array,
    posterior: Array = NOTHING,
    d_logits: Array = NOTHING,
) -> Array:
    """Turn log theta_i,z_t of the pairs into c_ti, write what is given and return log m_t."""
    n, k = logits.shape
    log_m_t = cp.empty(n, dtype=logits.dtype)
    links = index.links_by_label, index.start_j
    args: tuple = logits, *links, noisy_labels, n, k, index.support.shape[1], pair_ti
    how = cuda_launch.rows(n, k)
    results = log_m_t, posterior, d_logits
    launch("sparse", "sparse_posterior_rows", logits.dtype, how, *args, *results)
    return log_m_t


def _sparse_s_log_theta(
    logits: Array, channel_logits: Array, index: LinkIndex, noisy_labels: Array
) -> Array:
    """Return log theta_i,z_t of the pairs: (n, K), of which only those cells hold anything."""
    n, k = logits.shape
    pair_ti = cp.empty_like(logits)
    args: tuple = channel_logits, index.links_by_label, index.start_j, noisy_labels
    sizes = n, k, index.support.shape[1]
    how = cuda_launch.rows(n, index.support.shape[1])
    launch("sparse", "sparse_s_log_theta", logits.dtype, how, *args, *sizes, pair_ti)
    return pair_ti


def sparse_s_model_nll(
    logits: Array, channel_logits: Array, index: LinkIndex, noisy_labels: Array
) -> SModelNLL:
    """See :func:`kernels.sparse_s_model_nll`."""
    (n, k), n_kept, dtype = logits.shape, channel_logits.shape[1], logits.dtype
    pair_ti = _sparse_s_log_theta(logits, channel_logits, index, noisy_labels)
    d_logits = cp.empty_like(logits)
    log_m_t = _sparse_posterior_rows(logits, index, noisy_labels, pair_ti, d_logits=d_logits)

    counts_is = cp.empty_like(channel_logits)
    groups = group_by_label(noisy_labels, k)
    args: tuple = pair_ti, index.links_by_label, index.start_j, *groups, k, n_kept, counts_is
    launch("sparse", "sparse_counts", dtype, cuda_launch.rows(k, cuda_launch.divided(n, k)), *args)
    args = channel_logits, n, k, n_kept, counts_is
    launch("sparse", "sparse_channel_gradient", dtype, cuda_launch.rows(k, n_kept), *args)
    return SModelNLL(negative_mean(log_m_t), d_logits, counts_is)


def sparse_s_model_posterior(
    logits: Array, channel_logits: Array, index: LinkIndex, noisy_labels: Array
) -> Posterior:
    """See :func:`kernels.sparse_s_model_posterior`."""
    pair_ti = _sparse_s_log_theta(logits, channel_logits, index, noisy_labels)
    c_ti = cp.empty_like(logits)
    return Posterior(_sparse_posterior_rows(logits, index, noisy_labels, pair_ti, c_ti), c_ti)


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
    log_m_t = _sparse_posterior_rows(logits, index, noisy_labels, pair_ti, d_logits=d_logits)

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
    gradients = cp.empty_like(channel_weights), cp.empty_like(channel_logits)
    groups = group_by_label(noisy_labels, k)
    args = *wide, index.support, *groups, pair_ti, log_sum_ti, *sizes, *gradients
    how = cuda_launch.features(k * n_kept, d)
    launch("sparse", "sparse_c_weight_gradient", dtype, how, *args)
    return CModelNLL(negative_mean(log_m_t), d_logits, d_hidden, *gradients)


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
    return Posterior(_sparse_posterior_rows(logits, index, noisy_labels, pair_ti, c_ti), c_ti)
