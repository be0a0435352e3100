"""The kernels on the GPU: CuPy arrays, CUDA sources under ``kernels/cuda``.

Nothing here waits for the device: results, the scalar ``nll`` as well, are CuPy arrays that the
device is still writing. Sums over samples are cut so that each belongs to one block and is added in
a fixed order, without atomics on floating-point numbers: the same bits in every run, on one kind of
device. For the c-model that holds as far as cuBLAS keeps it, which it promises for one stream.

A label out of range, which ``check_values=False`` does not look for on the device, touches no
memory outside the arrays: its sample's results are NaN, and so is the loss.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

try:
    import cupy as cp
except ImportError as missing:
    raise ImportError(
        "backend 'cupy' needs CuPy: pip install nalayer[cuda13], or nalayer[cuda12] for a driver "
        "of CUDA 12"
    ) from missing

from kernels import cuda_launch
from kernels.links import LinkIndex
from kernels.results import CModelNLL, Posterior, SModelNLL, SoftmaxNLL

# CuPy has no types to check against.
Array = Any
NOTHING = 0  # a null pointer: a result that is not wanted


@cache
def _module(source: str, dtype: str) -> Any:
    return cp.RawModule(code=cuda_launch.source(source), options=cuda_launch.options(dtype))


@cache
def _kernel(source: str, name: str, dtype: np.dtype) -> Any:
    """Return a kernel, compiled for this dtype when it is first launched on a device."""
    return _module(source, dtype.name).get_function(name)


def _launch(source: str, name: str, dtype: np.dtype, how: cuda_launch.Launch, *args: Any) -> None:
    grid, block = how
    _kernel(source, name, dtype)(grid, block, args)


def _negative_mean(log_p_t: Array) -> Array:
    nll = cp.empty((), dtype=log_p_t.dtype)
    _launch("labels", "negative_mean", log_p_t.dtype, ((1,), (1024,)), log_p_t, log_p_t.size, nll)
    return nll


class _Groups(NamedTuple):
    """Samples sorted by label; see ``group_begin`` in ``rows.cuh``."""

    order: Array
    ends_jb: Array
    n_chunks: int


def _group_by_label(labels: Array, k: int) -> _Groups:
    n, any_real = labels.size, np.dtype(np.float32)
    chunk, n_chunks = cuda_launch.label_chunks(n, k)
    counts_jb = cp.zeros(k * n_chunks, dtype=np.int64)
    order = cp.empty(n, dtype=np.int64)
    how = cuda_launch.elements(n)
    _launch("labels", "count_labels", any_real, how, labels, n, k, chunk, n_chunks, counts_jb)
    ends_jb = cp.cumsum(counts_jb)
    _launch("labels", "place_samples", any_real, how, labels, n, k, chunk, n_chunks, ends_jb, order)
    return _Groups(order, ends_jb, n_chunks)


def softmax_nll(logits: Array, labels: Array) -> SoftmaxNLL:
    """See :func:`kernels.softmax_nll`."""
    n, k = logits.shape
    log_q_z_t, d_logits = cp.empty(n, dtype=logits.dtype), cp.empty_like(logits)
    how = cuda_launch.rows(n, k)
    args: tuple = logits, labels, n, k, log_q_z_t, d_logits
    _launch("softmax", "softmax_nll_rows", logits.dtype, how, *args)
    return SoftmaxNLL(_negative_mean(log_q_z_t), d_logits)


def soft_target_nll(logits: Array, targets: Array) -> SoftmaxNLL:
    """See :func:`kernels.soft_target_nll`."""
    n, k = logits.shape
    score_t, d_logits = cp.empty(n, dtype=logits.dtype), cp.empty_like(logits)
    how = cuda_launch.rows(n, k)
    args: tuple = logits, targets, n, k, score_t, d_logits
    _launch("softmax", "soft_target_nll_rows", logits.dtype, how, *args)
    return SoftmaxNLL(_negative_mean(score_t), d_logits)


def _log_theta_columns(channel_logits: Array) -> tuple[Array, Array, Array]:
    """Return log theta transposed, (j, i), and the two parts of each row's log-sum-exp."""
    k, dtype = channel_logits.shape[0], channel_logits.dtype
    top_i, log_sum_i = cp.empty(k, dtype=dtype), cp.empty(k, dtype=dtype)
    log_theta_ji = cp.empty_like(channel_logits)
    args: tuple = channel_logits, k, k, top_i, log_sum_i
    _launch("s_model", "channel_log_sums", dtype, cuda_launch.rows(k, k), *args)
    args = channel_logits, top_i, log_sum_i, k, log_theta_ji
    _launch("s_model", "log_theta_columns", dtype, cuda_launch.tiles(k, k), *args)
    return log_theta_ji, top_i, log_sum_i


def _posterior_rows(
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
    _launch("s_model", "posterior_rows", logits.dtype, how, *args, *results)
    return log_m_t


def s_model_nll(logits: Array, channel_logits: Array, noisy_labels: Array) -> SModelNLL:
    """See :func:`kernels.s_model_nll`."""
    n, k = logits.shape
    dtype = logits.dtype
    log_theta_ji, *log_sums = _log_theta_columns(channel_logits)
    log_q_parts, d_logits = cp.empty((n, 2), dtype=dtype), cp.empty_like(logits)
    log_m_t = _posterior_rows(
        logits, log_theta_ji, True, noisy_labels, log_q_parts, d_logits=d_logits
    )

    order, ends_jb, n_chunks = _group_by_label(noisy_labels, k)
    args: tuple = logits, log_q_parts, log_m_t, order, ends_jb, n_chunks, k, log_theta_ji
    _launch("s_model", "posterior_counts", dtype, cuda_launch.counts(k), *args)
    counts_ji = log_theta_ji  # where a label occurs
    n_i = cp.empty(k, dtype=np.float64)
    how = cuda_launch.columns(k, 32)
    _launch("s_model", "class_totals", dtype, how, counts_ji, ends_jb, n_chunks, k, n_i)
    d_channel_logits = cp.empty_like(channel_logits)
    args = channel_logits, *log_sums, counts_ji, n_i, ends_jb, n_chunks, n, k, d_channel_logits
    _launch("s_model", "channel_gradient", dtype, cuda_launch.tiles(k, k), *args)
    return SModelNLL(_negative_mean(log_m_t), d_logits, d_channel_logits)


def s_model_posterior(logits: Array, channel_logits: Array, noisy_labels: Array) -> Posterior:
    """See :func:`kernels.s_model_posterior`."""
    log_theta_ji, *_ = _log_theta_columns(channel_logits)
    c_ti = cp.empty_like(logits)
    return Posterior(_posterior_rows(logits, log_theta_ji, True, noisy_labels, c_ti=c_ti), c_ti)


def _product(a: Array, b: Array, out: Array, transpose: str = "NN", add: bool = False) -> None:
    """Write op(a) op(b) over ``out``, or add it: float32 in float32, never in TF32."""
    # Only here: it loads cuBLAS, which the other kernels can do without.
    from cupy import cublas

    cublas.gemm(*transpose, a, b, out=out, beta=1.0 if add else 0.0)


class _ScoreTiles:
    """The c-model's scores h_t u_ij, (samples, true classes, observed classes), tile by tile."""

    def __init__(self, logits: Array, hidden: Array, channel_weights: Array) -> None:
        self.n, self.k = logits.shape
        self.hidden, self.channel_weights = hidden, channel_weights
        itemsize, budget = hidden.dtype.itemsize, cuda_launch.SCORE_TILE_BYTES
        self.n_samples, self.n_classes = cuda_launch.score_tile(self.n, self.k, itemsize, budget)
        self.memory = cp.empty(self.n_samples * self.n_classes * self.k, dtype=hidden.dtype)
        self.held: tuple[int, int] | None = None

    def classes(self) -> list[tuple[int, int]]:
        return list(cuda_launch.spans(self.k, self.n_classes))

    def samples(self) -> list[tuple[int, int]]:
        return list(cuda_launch.spans(self.n, self.n_samples))

    def scores(self, t: tuple[int, int], i: tuple[int, int]) -> Array:
        """Return the scores of a span of samples and classes: (samples, classes * K).

        Nothing is computed if the memory still holds them.
        """
        n_columns = (i[1] - i[0]) * self.k
        tile = self.memory[: (t[1] - t[0]) * n_columns].reshape(t[1] - t[0], n_columns)
        if self.held != (t[0], i[0]):
            u_jd = self.channel_weights[slice(*i)].reshape(n_columns, -1)
            _product(self.hidden[slice(*t)], u_jd, tile, "NT")
            self.held = (t[0], i[0])
        return tile


def _c_log_theta_z(
    tiles: _ScoreTiles, t: tuple[int, int], channel_logits: Array, labels: Array, out_ti: Array
) -> None:
    """Write log theta_t,i,z_t (Eq. 8) for a span of samples and every true class."""
    k = tiles.k
    for i in tiles.classes():
        n_rows, n_classes = (t[1] - t[0]) * (i[1] - i[0]), i[1] - i[0]
        args: tuple = (
            tiles.scores(t, i),
            channel_logits,
            labels,
            n_rows,
            t[0],
            i[0],
            n_classes,
            k,
            out_ti,
        )
        how = cuda_launch.rows(n_rows, k)
        _launch("c_model", "channel_log_theta_z", out_ti.dtype, how, *args)


def c_model_nll(
    logits: Array, hidden: Array, channel_weights: Array, channel_logits: Array, noisy_labels: Array
) -> CModelNLL:
    """See :func:`kernels.c_model_nll`."""
    (n, k), d, dtype = logits.shape, hidden.shape[1], logits.dtype
    tiles = _ScoreTiles(logits, hidden, channel_weights)
    c_ti, d_logits = cp.empty_like(logits), cp.empty_like(logits)
    d_hidden, d_channel_weights = cp.empty_like(hidden), cp.empty_like(channel_weights)
    sums_ij = cp.zeros((k, k), dtype=np.float64)
    for t in tiles.samples():
        _c_log_theta_z(tiles, t, channel_logits, noisy_labels, c_ti)
    log_m_t = _posterior_rows(logits, c_ti, False, noisy_labels, c_ti=c_ti, d_logits=d_logits)

    # Backwards: the last scores are still in memory, and they may be all there are.
    for t in reversed(tiles.samples()):
        for i in reversed(tiles.classes()):
            span, n_rows, n_classes = slice(*t), t[1] - t[0], i[1] - i[0]
            tile, n_columns = tiles.scores(t, i), n_classes * k
            args: tuple = tile, channel_logits, noisy_labels, c_ti, n_rows * n_classes, t[0], i[0]
            how = cuda_launch.rows(n_rows * n_classes, k)
            _launch("c_model", "channel_score_gradients", dtype, how, *args, n_classes, n, k)
            tiles.held = None  # scores no more: G_tij

            u_jd = channel_weights[slice(*i)].reshape(n_columns, d)
            d_u_jd = d_channel_weights[slice(*i)].reshape(n_columns, d)
            _product(tile, hidden[span], d_u_jd, "TN", add=t[1] < n)
            _product(tile, u_jd, d_hidden[span], "NN", add=i[1] < k)
            how = cuda_launch.columns(n_columns, 8)
            _launch(
                "c_model", "add_column_sums", dtype, how, tile, n_rows, n_columns, sums_ij[i[0] :]
            )
    return CModelNLL(
        _negative_mean(log_m_t), d_logits, d_hidden, d_channel_weights, sums_ij.astype(dtype)
    )


def c_model_posterior(
    logits: Array, hidden: Array, channel_weights: Array, channel_logits: Array, noisy_labels: Array
) -> Posterior:
    """See :func:`kernels.c_model_posterior`."""
    tiles = _ScoreTiles(logits, hidden, channel_weights)
    c_ti = cp.empty_like(logits)
    for t in tiles.samples():
        _c_log_theta_z(tiles, t, channel_logits, noisy_labels, c_ti)
    return Posterior(_posterior_rows(logits, c_ti, False, noisy_labels, c_ti=c_ti), c_ti)


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
    _launch("sparse", "sparse_posterior_rows", logits.dtype, how, *args, *results)
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
    _launch("sparse", "sparse_s_log_theta", logits.dtype, how, *args, *sizes, pair_ti)
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
    groups = _group_by_label(noisy_labels, k)
    args: tuple = pair_ti, index.links_by_label, index.start_j, *groups, k, n_kept, counts_is
    _launch("sparse", "sparse_counts", dtype, cuda_launch.rows(k, cuda_launch.divided(n, k)), *args)
    args = channel_logits, n, k, n_kept, counts_is
    _launch("sparse", "sparse_channel_gradient", dtype, cuda_launch.rows(k, n_kept), *args)
    return SModelNLL(_negative_mean(log_m_t), d_logits, counts_is)


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
    _launch("sparse", "sparse_c_log_theta", hidden.dtype, cuda_launch.warps(n), *args, *rest)
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
    _launch("sparse", "sparse_c_hidden_gradient", dtype, how, *args, d_hidden)
    gradients = cp.empty_like(channel_weights), cp.empty_like(channel_logits)
    groups = _group_by_label(noisy_labels, k)
    args = *wide, index.support, *groups, pair_ti, log_sum_ti, *sizes, *gradients
    how = cuda_launch.features(k * n_kept, d)
    _launch("sparse", "sparse_c_weight_gradient", dtype, how, *args)
    return CModelNLL(_negative_mean(log_m_t), d_logits, d_hidden, *gradients)


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
