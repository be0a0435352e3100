"""Losses of the noise adaptation layer: arrays in, gradients out.

Each kernel exists as exact decimals (:mod:`kernels.exact`, the judge), plain NumPy
(:mod:`kernels.numpy_backend`, to read) and Numba (:mod:`kernels.numba_backend`, to use).
"""

from kernels.api import (
    BACKENDS,
    get_backend,
    s_model_nll,
    s_model_posterior,
    soft_target_nll,
    softmax_nll,
    thread_count,
)
from kernels.numpy_backend import counts_by_label, log_softmax
from kernels.results import Posterior, SModelNLL, SoftmaxNLL

__all__ = [
    "BACKENDS",
    "Posterior",
    "SModelNLL",
    "SoftmaxNLL",
    "counts_by_label",
    "get_backend",
    "log_softmax",
    "s_model_nll",
    "s_model_posterior",
    "soft_target_nll",
    "softmax_nll",
    "thread_count",
]
