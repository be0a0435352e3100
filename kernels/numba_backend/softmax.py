"""Softmax with hard and with soft targets: the baseline, and the network's M-step (Eqs. 5, 7)."""

from __future__ import annotations

import numpy as np
from numba import prange

from kernels.numba_backend.fast_exp import row_max
from kernels.numba_backend.rows import (
    BLOCK,
    SMALL,
    difference,
    exp_row,
    frozen,
    jit_parallel,
    jit_row,
    jit_sum,
)
from kernels.results import SoftmaxNLL


@jit_row
def _softmax_row(scores_i, label, n, d_i):
    """Write d_i = (q_i - 1{i=label}) / n and return log q_label (Eq. 7)."""
    top = row_max(scores_i)
    total = exp_row(scores_i, top, d_i)
    d_i *= d_i.dtype.type(1 / (total * n))
    d_i[label] -= d_i.dtype.type(1 / n)
    return np.float64(scores_i[label] - top) - np.log(total)


@jit_sum
def _target_sums(scores_i, top, targets_i):
    """Return sum_i c_i (s_i - top), where 0 (-inf) = 0, and sum_i c_i."""
    score = mass = 0.0
    for start in range(0, scores_i.shape[0], BLOCK):
        s, c = scores_i[start : start + BLOCK], targets_i[start : start + BLOCK]
        zero = s.dtype.type(0)
        part = part_mass = zero
        for i in range(s.shape[0]):
            part += c[i] * difference(s[i], top) if c[i] > zero else zero
            part_mass += c[i]
        score += part
        mass += part_mass
    return score, mass


@jit_row
def _soft_target_row(scores_i, targets_i, n, d_i):
    """Write d_i = (q_i - c_i) / n and return sum_i c_i log q_i, where 0 log 0 = 0 (Eq. 5)."""
    top = row_max(scores_i)
    total = exp_row(scores_i, top, d_i)
    to_q, per_n = d_i.dtype.type(1 / (total * n)), d_i.dtype.type(1 / n)
    for i in range(d_i.shape[0]):
        d_i[i] = d_i[i] * to_q - targets_i[i] * per_n
    score, mass = _target_sums(scores_i, top, targets_i)
    return score - mass * np.log(total)


@jit_parallel
def _softmax_rows(logits, labels, small, log_q_t, d_logits):
    n = logits.shape[0]
    if small:
        for t in range(n):
            log_q_t[t] = _softmax_row(logits[t], labels[t], n, d_logits[t])
    else:
        for t in prange(n):
            log_q_t[t] = _softmax_row(logits[t], labels[t], n, d_logits[t])


@jit_parallel
def _soft_target_rows(logits, targets, small, score_t, d_logits):
    n = logits.shape[0]
    if small:
        for t in range(n):
            score_t[t] = _soft_target_row(logits[t], targets[t], n, d_logits[t])
    else:
        for t in prange(n):
            score_t[t] = _soft_target_row(logits[t], targets[t], n, d_logits[t])


def softmax_nll(logits: np.ndarray, labels: np.ndarray) -> SoftmaxNLL:
    """See :func:`kernels.softmax_nll`."""
    log_q_t = np.empty(logits.shape[0])
    d_logits = np.empty_like(logits)
    _softmax_rows(*frozen(logits, labels), logits.size < SMALL, log_q_t, d_logits)
    return SoftmaxNLL(logits.dtype.type(-log_q_t.mean()), d_logits)


def soft_target_nll(logits: np.ndarray, targets: np.ndarray) -> SoftmaxNLL:
    """See :func:`kernels.soft_target_nll`."""
    score_t = np.empty(logits.shape[0])
    d_logits = np.empty_like(logits)
    _soft_target_rows(*frozen(logits, targets), logits.size < SMALL, score_t, d_logits)
    return SoftmaxNLL(logits.dtype.type(-score_t.mean()), d_logits)
