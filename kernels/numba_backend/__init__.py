"""The kernels in Numba: fused, in parallel, the same bits for any number of threads."""

from __future__ import annotations

import os

# While they wait, GNU OpenMP's threads spin for milliseconds; beside a BLAS with threads of its own
# that costs a factor of ten on small steps. Asleep at once ("passive") they take 40 microseconds to
# wake, for every pass of a kernel. So they spin for some ten microseconds, from one pass to the
# next, and then sleep; unless the user has chosen otherwise. It has to be said before the library
# loads.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import numba
from numba import get_num_threads as thread_count

from kernels.numba_backend.c_model import c_model_nll, c_model_nll_skipping, c_model_posterior
from kernels.numba_backend.convolution import (
    conv2d,
    conv2d_backward,
    conv2d_relu,
    conv2d_relu_backward,
)
from kernels.numba_backend.network import (
    adam_update,
    bias_relu_dropout,
    bias_relu_dropout_backward,
)
from kernels.numba_backend.pooling import max_pool2d, max_pool2d_backward
from kernels.numba_backend.s_model import s_model_nll, s_model_posterior
from kernels.numba_backend.softmax import soft_target_nll, softmax_nll
from kernels.numba_backend.sparse_c_model import sparse_c_model_nll, sparse_c_model_posterior
from kernels.numba_backend.sparse_s_model import sparse_s_model_nll, sparse_s_model_posterior
from kernels.numpy_backend import column_sums, gather_rows, product  # NumPy's own are as fast

__all__ = [
    "adam_update",
    "bias_relu_dropout",
    "bias_relu_dropout_backward",
    "c_model_nll",
    "c_model_nll_skipping",
    "c_model_posterior",
    "column_sums",
    "conv2d",
    "conv2d_backward",
    "conv2d_relu",
    "conv2d_relu_backward",
    "gather_rows",
    "limit_threads",
    "max_pool2d",
    "max_pool2d_backward",
    "product",
    "s_model_nll",
    "s_model_posterior",
    "soft_target_nll",
    "softmax_nll",
    "sparse_c_model_nll",
    "sparse_c_model_posterior",
    "sparse_s_model_nll",
    "sparse_s_model_posterior",
    "thread_count",
]


def limit_threads(n_threads: int) -> int:
    """Use at most so many threads from now on; return how many."""
    numba.set_num_threads(min(n_threads, numba.config.NUMBA_NUM_THREADS))
    return thread_count()
