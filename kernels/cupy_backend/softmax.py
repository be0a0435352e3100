"""The classifier alone: softmax and mean negative log-likelihood, labels or soft targets."""

from __future__ import annotations

from kernels import cuda_launch
from kernels.cupy_backend.launch import Array, cp, launch, negative_mean
from kernels.results import SoftmaxNLL


def softmax_nll(logits: Array, labels: Array) -> SoftmaxNLL:
    """See :func:`kernels.softmax_nll`."""
    n, k = logits.shape
    log_q_z_t, d_logits = cp.empty(n, dtype=logits.dtype), cp.empty_like(logits)
    how = cuda_launch.rows(n, k)
    args: tuple = logits, labels, n, k, log_q_z_t, d_logits
    launch("softmax", "softmax_nll_rows", logits.dtype, how, *args)
    return SoftmaxNLL(negative_mean(log_q_z_t), d_logits)


def soft_target_nll(logits: Array, targets: Array) -> SoftmaxNLL:
    """See :func:`kernels.soft_target_nll`."""
    n, k = logits.shape
    score_t, d_logits = cp.empty(n, dtype=logits.dtype), cp.empty_like(logits)
    how = cuda_launch.rows(n, k)
    args: tuple = logits, targets, n, k, score_t, d_logits
    launch("softmax", "soft_target_nll_rows", logits.dtype, how, *args)
    return SoftmaxNLL(negative_mean(score_t), d_logits)
