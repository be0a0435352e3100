"""The c-model (Eqs. 8, 9): its scores tile by tile, products by cuBLAS."""

from __future__ import annotations

import numpy as np

from kernels import cuda_launch
from kernels.cupy_backend.launch import NOTHING, Array, cp, launch, negative_mean
from kernels.cupy_backend.product import product
from kernels.cupy_backend.s_model import posterior_rows
from kernels.cupy_backend.softmax import soft_target_nll
from kernels.results import CModelNLL, Posterior


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
            product(self.hidden[slice(*t)], u_jd, tile, "NT")
            self.held = (t[0], i[0])
        return tile


def _c_log_theta_z(
    tiles: _ScoreTiles,
    t: tuple[int, int],
    channel_logits: Array,
    labels: Array,
    out_ti: Array,
    log_sum_ti: Array = NOTHING,
) -> None:
    """Write log theta_t,i,z_t (Eq. 8) for a span of samples and every true class.

    The log-sum-exp of each row of scores goes to ``log_sum_ti``, where that is given.
    """
    k, results = tiles.k, (out_ti, log_sum_ti)
    for i in tiles.classes():
        n_samples, n_classes = t[1] - t[0], i[1] - i[0]
        n_rows = n_samples * n_classes
        args: tuple = tiles.scores(t, i), channel_logits, labels
        args = *args, n_rows, n_samples, t[0], i[0], n_classes, k
        how = cuda_launch.warp_rows(n_rows)
        launch("c_model", "channel_log_theta_z", out_ti.dtype, how, *args, *results)


def _score_gradients(
    tiles: _ScoreTiles,
    t: tuple[int, int],
    i: tuple[int, int],
    channel_logits: Array,
    labels: Array,
    log_sum_ti: Array,
    c_ti: Array,
    sums_ij: Array,
) -> Array:
    """Return G_tij of a tile, written over its scores, and add their sums to ``sums_ij``."""
    tile, (n, k) = tiles.scores(t, i), c_ti.shape
    n_samples, n_columns = tile.shape
    args: tuple = tile, channel_logits, labels, log_sum_ti, c_ti
    sizes = n_samples, t[0], i[0], n_columns, n, k
    how = cuda_launch.columns(n_columns, 8)
    launch("c_model", "channel_score_gradients", c_ti.dtype, how, *args, *sizes, sums_ij)
    tiles.held = None  # scores no more
    return tile


def c_model_nll(
    logits: Array, hidden: Array, channel_weights: Array, channel_logits: Array, noisy_labels: Array
) -> CModelNLL:
    """See :func:`kernels.c_model_nll`."""
    (n, k), d, dtype = logits.shape, hidden.shape[1], logits.dtype
    tiles = _ScoreTiles(logits, hidden, channel_weights)
    c_ti, log_sum_ti = cp.empty_like(logits), cp.empty_like(logits)
    d_hidden, d_channel_weights = cp.empty_like(hidden), cp.empty_like(channel_weights)
    log_m_t, sums_ij = cp.empty(n, dtype=dtype), cp.zeros((k, k), dtype=np.float64)
    for t in tiles.samples():
        span = slice(*t)
        _c_log_theta_z(tiles, t, channel_logits, noisy_labels, c_ti, log_sum_ti)
        e_step = logits[span], c_ti[span], False, noisy_labels[span]
        log_m_t[span] = posterior_rows(*e_step, c_ti=c_ti[span])

        # Backwards: the last scores are still in memory, and they may be all there are.
        for i in reversed(tiles.classes()):
            arrays = channel_logits, noisy_labels, log_sum_ti, c_ti, sums_ij
            tile = _score_gradients(tiles, t, i, *arrays)
            u_jd = channel_weights[slice(*i)].reshape(-1, d)
            d_u_jd = d_channel_weights[slice(*i)].reshape(-1, d)
            product(tile, hidden[span], d_u_jd, "TN", add=t[0] > 0)
            product(tile, u_jd, d_hidden[span], "NN", add=i[1] < k)
    # (q_ti - c_ti) / n is the gradient against c_ti as targets, too (Eq. 5).
    d_logits = soft_target_nll(logits, c_ti).d_logits
    return CModelNLL(
        negative_mean(log_m_t), d_logits, d_hidden, d_channel_weights, sums_ij.astype(dtype)
    )


def c_model_posterior(
    logits: Array, hidden: Array, channel_weights: Array, channel_logits: Array, noisy_labels: Array
) -> Posterior:
    """See :func:`kernels.c_model_posterior`."""
    tiles = _ScoreTiles(logits, hidden, channel_weights)
    c_ti = cp.empty_like(logits)
    for t in tiles.samples():
        _c_log_theta_z(tiles, t, channel_logits, noisy_labels, c_ti)
    return Posterior(posterior_rows(logits, c_ti, False, noisy_labels, c_ti=c_ti), c_ti)
