"""Losses of the noise adaptation layer: arrays in, gradients out.

Each kernel exists as exact decimals (:mod:`kernels.exact`, the judge), plain NumPy
(:mod:`kernels.numpy_backend`, to read), Numba (:mod:`kernels.numba_backend`, to use) and CUDA
(:mod:`kernels.cupy_backend`, to use on a GPU).
"""

from kernels.api import (
    BACKENDS,
    CPU_BACKENDS,
    c_model_nll,
    c_model_nll_skipping,
    c_model_posterior,
    counts_by_label,
    get_backend,
    limit_threads,
    log_softmax,
    s_model_nll,
    s_model_posterior,
    soft_target_nll,
    softmax_nll,
    sparse_c_model_nll,
    sparse_c_model_posterior,
    sparse_s_model_nll,
    sparse_s_model_posterior,
    thread_count,
)
from kernels.image_api import (
    conv2d,
    conv2d_backward,
    conv2d_relu,
    conv2d_relu_backward,
    max_pool2d,
    max_pool2d_backward,
)
from kernels.links import LinkIndex, link_index
from kernels.network_api import (
    adam_corrections,
    adam_update,
    bias_relu_dropout,
    bias_relu_dropout_backward,
    can_record,
    column_sums,
    dropout_kept,
    gather_rows,
    product,
    recording_stream,
)
from kernels.results import CModelNLL, Posterior, SkippingCModelNLL, SModelNLL, SoftmaxNLL

__all__ = [
    "BACKENDS",
    "CPU_BACKENDS",
    "CModelNLL",
    "LinkIndex",
    "Posterior",
    "SModelNLL",
    "SkippingCModelNLL",
    "SoftmaxNLL",
    "adam_corrections",
    "adam_update",
    "bias_relu_dropout",
    "bias_relu_dropout_backward",
    "c_model_nll",
    "c_model_nll_skipping",
    "c_model_posterior",
    "can_record",
    "column_sums",
    "conv2d",
    "conv2d_backward",
    "conv2d_relu",
    "conv2d_relu_backward",
    "counts_by_label",
    "dropout_kept",
    "gather_rows",
    "get_backend",
    "limit_threads",
    "link_index",
    "log_softmax",
    "max_pool2d",
    "max_pool2d_backward",
    "product",
    "recording_stream",
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
