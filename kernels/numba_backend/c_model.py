"""The c-model (Eqs. 8-9): matrix products by BLAS, everything between them fused and in place.

Scores are held as (class i and label j, sample t), a *tile* of true classes and a *block* of
samples at a time, so that the softmax over j runs down the rows and all loops run along t, whatever
K is.

1. For every tile: scores = U h, one product; exp in place; theta_i,z_t is what the loss needs.
2. The posterior c_ti, from q and theta_i,z_t.
3. For every tile: the exponentials become the gradients of the scores in place,
   G_ij,t = c_ti (theta_ij,t - 1{j=z_t}) / n, and two products more: dU = G h, dh = U G.

Tiles whose exponentials fit into :data:`WORKSPACE_BYTES` keep them from 1 to 3; for the others a
fourth product makes them anew. At no time is more held than that: where even one class's scores
of all samples were too many, a block of samples after the other goes through all three.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kernels.numba_backend.pieces import do_pieces
from kernels.numba_backend.rows import (
    BLOCK,
    exp_row,
    fill,
    frozen,
    jit,
    jit_part,
    jit_row,
    log_posterior_row,
    row_max,
)
from kernels.numba_backend.vector import (
    exp,
    first,
    lane_sum,
    lanes,
    less,
    load,
    splat,
    store,
    where,
)
from kernels.results import CModelNLL, Posterior, SkippingCModelNLL

WORKSPACE_BYTES = 64 * 2**20
# What a product and the passes over its result should find in the cache.
_TILE_BYTES = 8 * 2**20
# Fewer exponentials are done on the calling thread: these passes stand between products of a BLAS
# whose threads still spin, and waking others beside them takes a while.
_ALONE = 1 << 18
# Samples that one class's columns are worked on at a time: its rows then stay in the first cache.
_COLUMNS = 256
# Labels whose exponentials are added in the array's own dtype before they join a sum in float64.
_LABELS = 64
# Gradients below this are taken as zero: a product with subnormal numbers takes ten times as long.
_FLUSH = {np.dtype(np.float32): 1e-30, np.dtype(np.float64): 1e-300}


@jit_row
def _exp_and_add_step(e_t, top_t, part_t, i, mask):
    zero = splat(e_t, 0.0)
    e = exp(load(e_t, i, mask, zero) - load(top_t, i, mask, zero))
    store(e_t, i, mask, e)
    store(part_t, i, mask, load(part_t, i, mask, zero) + e)


@jit_row
def _exp_and_add_row(e_t, top_t, part_t):
    """Turn scores into e_t = exp(s_t - top_t) in place and add them to the sums."""
    n, width = e_t.shape[0], lanes(e_t)
    every, whole = first(e_t, width), n - n % width
    for i in range(0, whole, width):
        _exp_and_add_step(e_t, top_t, part_t, i, every)
    if whole < n:
        _exp_and_add_step(e_t, top_t, part_t, whole, first(e_t, n - whole))


@jit_part
def _exponentials_of_class(i, scores, b_ij, labels, top_it, total_it, log_theta_z_it):
    """Turn class i's scores into exp(s - top) in place; keep top, sum and log theta_z."""
    k, n = b_ij.shape[1], scores.shape[1]
    dtype = scores.dtype
    scores_jt, b_j = scores[i * k : (i + 1) * k], b_ij[i]
    top_t, total_t, log_theta_z_t = top_it[i], total_it[i], log_theta_z_it[i]
    part_t = np.empty(_COLUMNS, dtype)
    for start in range(0, n, _COLUMNS):
        stop = min(start + _COLUMNS, n)
        top, total, part = top_t[start:stop], total_t[start:stop], part_t[: stop - start]
        fill(top, -np.inf)
        for j in range(k):
            s = scores_jt[j, start:stop]
            for t in range(s.shape[0]):
                s[t] += b_j[j]
                top[t] = s[t] if s[t] > top[t] else top[t]
        for t in range(start, stop):
            log_theta_z_t[t] = scores_jt[labels[t], t] - top_t[t]
        fill(total, 0)
        fill(part, 0)
        for j in range(k):
            _exp_and_add_row(scores_jt[j, start:stop], top, part)
            if j % _LABELS == _LABELS - 1 or j == k - 1:
                for t in range(part.shape[0]):
                    total[t] += part[t]
                fill(part, 0)
        for t in range(start, stop):
            log_theta_z_t[t] -= np.log(total_t[t])


@jit_row
def _same_exp_step(s_t, b, top_t, i, mask):
    store(s_t, i, mask, exp((load(s_t, i, mask, b) + b) - load(top_t, i, mask, b)))


@jit_row
def _same_exp_row(s_t, b, top_t):
    """Turn scores without their bias into e_t = exp(s_t + b - top_t) in place."""
    n, width = s_t.shape[0], lanes(s_t)
    every, whole, b = first(s_t, width), n - n % width, splat(s_t, b)
    for i in range(0, whole, width):
        _same_exp_step(s_t, b, top_t, i, every)
    if whole < n:
        _same_exp_step(s_t, b, top_t, whole, first(s_t, n - whole))


@jit_part
def _same_exponentials_of_class(scores_jt, b_j, top_t):
    """Turn scores computed once more into the same exponentials, the maximum being known."""
    for j in range(scores_jt.shape[0]):
        _same_exp_row(scores_jt[j], b_j[j], top_t)


@jit_row
def _scaled_step(e_t, factor_t, least, i, mask):
    zero = splat(e_t, 0.0)
    g = load(e_t, i, mask, zero) * load(factor_t, i, mask, zero)
    store(e_t, i, mask, where(less(g, least), zero, g))
    return g


@jit_row
def _scaled_sum(e_t, factor_t, least):
    """Turn e_t into e_t factor_t in place, what is too small into zero; return the sum."""
    n, width = e_t.shape[0], lanes(e_t)
    every, whole, smallest = first(e_t, width), n - n % width, splat(e_t, least)
    total, part = 0.0, splat(e_t, 0.0)
    if whole < n:
        part = _scaled_step(e_t, factor_t, smallest, whole, first(e_t, n - whole))
    for start in range(0, max(whole, 1), BLOCK):
        for i in range(start, min(start + BLOCK, whole), width):
            part = part + _scaled_step(e_t, factor_t, smallest, i, every)
        total += lane_sum(part)
        part = splat(e_t, 0.0)
    return total


@jit_part
def _gradients_of_class(i, scores, again, b_ij, labels, top_it, total_it, c_it, n, flush, d_b_ij):
    """Turn class i's exponentials into its G in place; add sum_t G to the gradient of B_i."""
    k, real = b_ij.shape[1], scores.dtype.type
    e_jt, total_t, c_t, d_b_j = scores[i * k : (i + 1) * k], total_it[i], c_it[i], d_b_ij[i]
    if again:
        _same_exponentials_of_class(e_jt, b_ij[i], top_it[i])
    least = real(flush / n)
    factor_t = np.empty_like(c_t)
    for t in range(c_t.shape[0]):
        factor_t[t] = c_t[t] / (total_t[t] * n)
    for j in range(e_jt.shape[0]):
        d_b_j[j] += _scaled_sum(e_jt[j], factor_t, least)
    for t in range(c_t.shape[0]):
        j, share = labels[t], c_t[t] / n
        g = real(e_jt[j, t] - share)
        e_jt[j, t] = real(0) if -least < g < least else g
        d_b_j[j] -= share


@jit
def _exponentials(alone, scores, b_ij, labels, top_it, total_it, log_theta_z_it):
    arguments = (scores, b_ij, labels, top_it, total_it, log_theta_z_it)
    do_pieces(alone, b_ij.shape[0], _exponentials_of_class, arguments)


@jit
def _score_gradients(alone, scores, again, b_ij, labels, top_it, total_it, c_it, n, flush, d_b_ij):
    arguments = (scores, again, b_ij, labels, top_it, total_it, c_it, n, flush, d_b_ij)
    do_pieces(alone, b_ij.shape[0], _gradients_of_class, arguments)


@jit_row
def _joint_gradient_row(scores_i, c_i, n, d_i):
    """Write d_i = (q_i - c_i) / n."""
    real = d_i.dtype.type
    top = row_max(scores_i)
    total = exp_row(scores_i, top, d_i)
    to_q, per_n = real(1 / (total * n)), real(1 / n)
    for i in range(d_i.shape[0]):
        d_i[i] = d_i[i] * to_q - c_i[i] * per_n


@jit_part
def _posterior_of_sample(t, logits, log_theta_z_it, n, log_m_t, c_ti, c_it, d_logits):
    k = logits.shape[1]
    for i in range(k):
        d_logits[t, i] = log_theta_z_it[i, t]
    log_m_t[t] = log_posterior_row(logits[t], d_logits[t], c_ti[t])
    for i in range(k):
        c_it[i, t] = c_ti[t, i]
    _joint_gradient_row(logits[t], c_ti[t], n, d_logits[t])


@jit
def _posteriors(alone, logits, log_theta_z_it, n, log_m_t, c_ti, c_it, d_logits):
    """Write log m_t, c (both ways round) and (q - c) / n."""
    arguments = (logits, log_theta_z_it, n, log_m_t, c_ti, c_it, d_logits)
    do_pieces(alone, logits.shape[0], _posterior_of_sample, arguments)


class _Tile(NamedTuple):
    """Some true classes, and the memory that their scores are worked out in."""

    classes: slice
    memory: np.ndarray
    kept: bool

    def scores(self, hidden: np.ndarray, channel_weights: np.ndarray) -> np.ndarray:
        """Return the memory for the scores of a block of samples: (tile * K, block)."""
        n_rows = (self.classes.stop - self.classes.start) * channel_weights.shape[1]
        return self.memory[: n_rows * len(hidden)].reshape(n_rows, len(hidden))


def _blocks_and_tiles(
    n: int, k: int, dtype: np.dtype, keep: bool = True
) -> tuple[list[slice], list[_Tile]]:
    """Cut the samples into blocks and the classes into tiles.

    As many tiles as fit into the workspace have their own memory; the others, all if not ``keep``,
    take turns in one piece of memory.
    """
    # One class's scores of a block fit into a tile. What else is as large as a block counts for the
    # workspace: log theta_z, c, the maxima and sums of the softmaxes; and the gradient of the
    # channel logits while it is summed, K x K. Where that leaves nothing, no tile is kept.
    n_block = max(1, min(n, _TILE_BYTES // (k * dtype.itemsize)))
    workspace = WORKSPACE_BYTES - n_block * k * (5 * dtype.itemsize + 8) - 8 * k * k
    per_tile = max(1, min(k, _TILE_BYTES // (k * n_block * dtype.itemsize)))
    tile_bytes = per_tile * k * n_block * dtype.itemsize
    places = [slice(i, min(i + per_tile, k)) for i in range(0, k, per_tile)]
    n_own = max(0, min(workspace // tile_bytes - 1 if keep else 0, len(places)))
    own = [np.empty(tile_bytes // dtype.itemsize, dtype) for _ in range(n_own)]
    shared = np.empty(tile_bytes // dtype.itemsize if n_own < len(places) else 0, dtype)
    tiles = [
        _Tile(classes, own[place] if place < n_own else shared, place < n_own)
        for place, classes in enumerate(places)
    ]
    return [slice(t, min(t + n_block, n)) for t in range(0, n, n_block)], tiles


def _score(tile: _Tile, hidden: np.ndarray, channel_weights: np.ndarray) -> np.ndarray:
    """Write and return the scores u_ij . h_t of a tile (Eq. 8 without B): (tile * K, block)."""
    u_rows = channel_weights[tile.classes].reshape(-1, hidden.shape[1])
    return np.matmul(u_rows, hidden.T, out=tile.scores(hidden, channel_weights))


def _log_theta_z(
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    noisy_labels: np.ndarray,
    tiles: list[_Tile],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Do step 1 for a block of samples.

    Returns log theta_i,z_t, and the maximum and the sum of each softmax: (K, block).
    """
    k, n = channel_logits.shape[0], hidden.shape[0]
    top_it, log_theta_z_it = np.empty((2, k, n), hidden.dtype)
    total_it = np.empty((k, n))
    for tile in tiles:
        scores = _score(tile, hidden, channel_weights)
        _exponentials(
            scores.size < _ALONE,
            scores,
            channel_logits[tile.classes],
            noisy_labels,
            top_it[tile.classes],
            total_it[tile.classes],
            log_theta_z_it[tile.classes],
        )
    return log_theta_z_it, top_it, total_it


def c_model_nll(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    noisy_labels: np.ndarray,
) -> CModelNLL:
    """See :func:`kernels.c_model_nll`."""
    n, k = logits.shape
    dtype = logits.dtype
    logits, channel_logits, noisy_labels = frozen(logits, channel_logits, noisy_labels)
    log_m_t, d_logits, d_hidden = np.empty(n), np.empty((n, k), dtype), np.empty_like(hidden)
    d_channel_weights, d_channel_logits = np.empty_like(channel_weights), np.zeros((k, k))
    blocks, tiles = _blocks_and_tiles(n, k, dtype)
    for block in blocks:
        h, labels = hidden[block], noisy_labels[block]
        log_theta_z_it, top_it, total_it = _log_theta_z(
            h, channel_weights, channel_logits, labels, tiles
        )
        c_ti = np.empty((len(h), k), dtype)
        c_it = log_theta_z_it  # one is read where the other is written
        alone = c_ti.size < _ALONE
        _posteriors(
            alone, logits[block], log_theta_z_it, n, log_m_t[block], c_ti, c_it, d_logits[block]
        )
        for tile in tiles:
            classes = tile.classes
            scores = tile.scores(h, channel_weights)
            if not tile.kept:
                _score(tile, h, channel_weights)
            _score_gradients(
                scores.size < _ALONE,
                scores,
                not tile.kept,
                channel_logits[classes],
                labels,
                top_it[classes],
                total_it[classes],
                c_it[classes],
                n,
                _FLUSH[dtype],
                d_channel_logits[classes],
            )
            u_rows = channel_weights[classes].reshape(scores.shape[0], -1)
            d_u_rows = d_channel_weights[classes].reshape(u_rows.shape)
            if block.start == 0:
                np.matmul(scores, h, out=d_u_rows)
            else:
                d_u_rows += scores @ h
            if classes.start == 0:
                np.matmul(scores.T, u_rows, out=d_hidden[block])
            else:
                d_hidden[block] += scores.T @ u_rows
    return CModelNLL(
        dtype.type(-log_m_t.mean()),
        d_logits,
        d_hidden,
        d_channel_weights,
        d_channel_logits.astype(dtype),
    )


def c_model_nll_skipping(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    noisy_labels: np.ndarray,
    skip_below: float,
) -> SkippingCModelNLL:
    """See :func:`kernels.c_model_nll_skipping`.

    Steps 1 and 2 as ever; step 3 one class at a time, for the samples that may belong to it.
    """
    n, k = logits.shape
    dtype = logits.dtype
    logits, channel_logits, noisy_labels = frozen(logits, channel_logits, noisy_labels)
    log_m_t, d_logits, d_hidden = np.empty(n), np.empty((n, k), dtype), np.zeros_like(hidden)
    d_channel_weights = np.zeros_like(channel_weights)
    d_channel_logits, missing_i = np.zeros((k, k)), np.zeros(k)
    blocks, tiles = _blocks_and_tiles(n, k, dtype, keep=False)
    for block in blocks:
        h, labels, d_h = hidden[block], noisy_labels[block], d_hidden[block]
        log_theta_z_it, top_it, total_it = _log_theta_z(
            h, channel_weights, channel_logits, labels, tiles
        )
        c_ti = np.empty((len(h), k), dtype)
        alone, c_it = c_ti.size < _ALONE, log_theta_z_it
        _posteriors(
            alone, logits[block], log_theta_z_it, n, log_m_t[block], c_ti, c_it, d_logits[block]
        )
        for i in range(k):
            skipped = c_it[i] < skip_below
            # |theta_j - 1{j=z}| sums to at most 2 over j
            missing_i[i] += 2 * c_it[i, skipped].sum(dtype=np.float64) / n
            t = np.flatnonzero(~skipped)
            scores = channel_weights[i] @ h[t].T
            _score_gradients(
                True,
                scores,
                True,
                channel_logits[i : i + 1],
                *frozen(labels[t]),
                top_it[i : i + 1, t],
                total_it[i : i + 1, t],
                c_it[i : i + 1, t],
                n,
                _FLUSH[dtype],
                d_channel_logits[i : i + 1],
            )
            d_channel_weights[i] += scores @ h[t]
            d_h[t] += scores.T @ channel_weights[i]
    return SkippingCModelNLL(
        dtype.type(-log_m_t.mean()),
        d_logits,
        d_hidden,
        d_channel_weights,
        d_channel_logits.astype(dtype),
        missing_i,
    )


def c_model_posterior(
    logits: np.ndarray,
    hidden: np.ndarray,
    channel_weights: np.ndarray,
    channel_logits: np.ndarray,
    noisy_labels: np.ndarray,
) -> Posterior:
    """See :func:`kernels.c_model_posterior`."""
    n, k = logits.shape
    dtype = logits.dtype
    logits, channel_logits, noisy_labels = frozen(logits, channel_logits, noisy_labels)
    log_m_t, c_ti = np.empty(n), np.empty((n, k), dtype)
    blocks, tiles = _blocks_and_tiles(n, k, dtype, keep=False)
    for block in blocks:
        log_theta_z_it, _, _ = _log_theta_z(
            hidden[block], channel_weights, channel_logits, noisy_labels[block], tiles
        )
        alone, unused = c_ti[block].size < _ALONE, np.empty(c_ti[block].shape, dtype)
        _posteriors(
            alone,
            logits[block],
            log_theta_z_it,
            n,
            log_m_t[block],
            c_ti[block],
            log_theta_z_it,
            unused,
        )
    return Posterior(log_m_t.astype(dtype), c_ti)
