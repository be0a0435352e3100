"""The kernels in Numba: fused, in parallel, the same bits for any number of threads."""

from __future__ import annotations

import os

# GNU OpenMP's threads spin while they wait. Beside a BLAS with threads of its own that costs
# a factor of ten on small steps, so they sleep, unless the user has chosen otherwise. It has to
# be said before the library loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from numba import get_num_threads as thread_count

from kernels.numba_backend.c_model import c_model_nll, c_model_nll_skipping, c_model_posterior
from kernels.numba_backend.network import (
    adam_update,
    bias_relu_dropout,
    bias_relu_dropout_backward,
)
from kernels.numba_backend.s_model import s_model_nll, s_model_posterior
from kernels.numba_backend.softmax import soft_target_nll, softmax_nll
from kernels.numba_backend.sparse_c_model import sparse_c_model_nll, sparse_c_model_posterior
from kernels.numba_backend.sparse_s_model import sparse_s_model_nll, sparse_s_model_posterior

__all__ = [
    "adam_update",
    "bias_relu_dropout",
    "bias_relu_dropout_backward",
    "c_model_nll",
    "c_model_nll_skipping",
    "c_model_posterior",
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
