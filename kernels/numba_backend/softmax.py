"""Softmax with hard and with soft targets: the baseline, and the network's M-step (Eqs. 5, 7)."""

from __future__ import annotations

import numpy as np

from kernels.numba_backend.pieces import do_pieces
from kernels.numba_backend.rows import (
    BLOCK,
    SMALL,
    exp_row,
    frozen,
    jit,
    jit_part,
    jit_row,
    row_max,
    scale_row,
    sum_in_order,
)
from kernels.numba_backend.vector import (
    first,
    lane_sum,
    lanes,
    less,
    load,
    splat,
    store,
    where,
)
from kernels.results import SoftmaxNLL

# Rows that one piece of work takes; their K^16 < 1e304 for any K that fits into memory.
_ROWS = 16


@jit_part
def _softmax_rows(piece, logits, labels, d_logits, log_q_p):
    """Write (q_ti - 1{i=z_t}) / n for some rows, and their sum of log q_tz (Eq. 7)."""
    n, start = logits.shape[0], piece * _ROWS
    real = logits.dtype.type
    score, product = 0.0, 1.0
    for t in range(start, min(start + _ROWS, n)):
        scores_i, d_i, z = logits[t], d_logits[t], np.uint64(labels[t])
        top = row_max(scores_i)
        total = exp_row(scores_i, top, d_i)
        scale_row(d_i, real(1 / total / n))
        d_i[z] -= real(1 / n)
        score += scores_i[z] - top
        product *= total  # one log for all of them
    log_q_p[piece] = score - np.log(product)


@jit_row
def _soft_target_step(scores_i, top, targets_i, to_q, per_n, d_i, i, mask):
    zero = splat(d_i, 0.0)
    c = load(targets_i, i, mask, zero)
    store(d_i, i, mask, load(d_i, i, mask, zero) * to_q - c * per_n)
    score = c * (load(scores_i, i, mask, zero) - top)
    return where(less(zero, c), score, zero), c


@jit_row
def _soft_target_row(scores_i, top, targets_i, to_q, per_n, d_i):
    """Turn e_i into (q_i - c_i) / n; return sum_i c_i (s_i - top), 0 (-inf) = 0, and sum_i c_i."""
    n, width = d_i.shape[0], lanes(d_i)
    every, whole, zero = first(d_i, width), n - n % width, splat(d_i, 0.0)
    tops, to_qs, per_ns = splat(d_i, top), splat(d_i, to_q), splat(d_i, per_n)
    score, mass, part, part_mass = 0.0, 0.0, zero, zero
    if whole < n:
        some = first(d_i, n - whole)
        part, part_mass = _soft_target_step(
            scores_i, tops, targets_i, to_qs, per_ns, d_i, whole, some
        )
    for start in range(0, max(whole, 1), BLOCK):
        for i in range(start, min(start + BLOCK, whole), width):
            s, c = _soft_target_step(scores_i, tops, targets_i, to_qs, per_ns, d_i, i, every)
            part, part_mass = part + s, part_mass + c
        score += lane_sum(part)
        mass += lane_sum(part_mass)
        part, part_mass = zero, zero
    return score, mass


@jit_part
def _soft_target_rows(piece, logits, targets, d_logits, log_q_p):
    """Write (q_ti - c_ti) / n for some rows, and their sum of c_ti log q_ti (Eq. 5)."""
    n, start = logits.shape[0], piece * _ROWS
    real = logits.dtype.type
    log_q = 0.0
    for t in range(start, min(start + _ROWS, n)):
        top = row_max(logits[t])
        total = exp_row(logits[t], top, d_logits[t])
        to_q, per_n = real(1 / total / n), real(1 / n)
        score, mass = _soft_target_row(logits[t], top, targets[t], to_q, per_n, d_logits[t])
        log_q += score - mass * np.log(total)
    log_q_p[piece] = log_q


@jit
def _softmax_nll(alone, logits, labels, d_logits):
    n = logits.shape[0]
    log_q_p = np.empty((n + _ROWS - 1) // _ROWS)
    do_pieces(alone, log_q_p.shape[0], _softmax_rows, (logits, labels, d_logits, log_q_p))
    return -sum_in_order(log_q_p) / n


@jit
def _soft_target_nll(alone, logits, targets, d_logits):
    n = logits.shape[0]
    log_q_p = np.empty((n + _ROWS - 1) // _ROWS)
    do_pieces(alone, log_q_p.shape[0], _soft_target_rows, (logits, targets, d_logits, log_q_p))
    return -sum_in_order(log_q_p) / n


def softmax_nll(logits: np.ndarray, labels: np.ndarray) -> SoftmaxNLL:
    """See :func:`kernels.softmax_nll`."""
    d_logits = np.empty_like(logits)
    nll = _softmax_nll(logits.size < SMALL, *frozen(logits, labels), d_logits)
    return SoftmaxNLL(logits.dtype.type(nll), d_logits)


def soft_target_nll(logits: np.ndarray, targets: np.ndarray) -> SoftmaxNLL:
    """See :func:`kernels.soft_target_nll`."""
    d_logits = np.empty_like(logits)
    alone = logits.size < SMALL
    with np.errstate(invalid="ignore"):  # run as Python, NumPy would warn of 0 (-inf)
        nll = _soft_target_nll(alone, *frozen(logits, targets), d_logits)
    return SoftmaxNLL(logits.dtype.type(nll), d_logits)
