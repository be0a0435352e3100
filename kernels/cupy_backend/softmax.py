"""The classifier alone: softmax and mean negative log-likelihood, labels or soft targets."""

from __future__ import annotations

from kernels import cuda_launch
from kernels.cupy_backend.launch import Array, constants, cp, launch, launch_held, negative_mean
from kernels.results import SoftmaxNLL


def _rows_nll(name: str, logits: Array, labels_or_targets: Array) -> SoftmaxNLL:
    n, k = logits.shape
    dtype = logits.dtype
    log_p_t, d_logits = cp.empty(n, dtype=dtype), cp.empty_like(logits)
    args: tuple = logits, labels_or_targets, *constants(n, k), log_p_t, d_logits
    held = cuda_launch.held(k, dtype.itemsize)
    if held is None:
        launch("softmax", f"{name}_rows", dtype, cuda_launch.rows(n, k), *args)
    else:
        launch_held(f"{name}_held", dtype, n, held, *args)
    return SoftmaxNLL(negative_mean(log_p_t), d_logits)


def softmax_nll(logits: Array, labels: Array) -> SoftmaxNLL:
    """See :func:`kernels.softmax_nll`."""
    return _rows_nll("softmax_nll", logits, labels)


def soft_target_nll(logits: Array, targets: Array) -> SoftmaxNLL:
    """See :func:`kernels.soft_target_nll`."""
    return _rows_nll("soft_target_nll", logits, targets)
