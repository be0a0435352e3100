"""The kernels on the GPU: CuPy arrays, CUDA sources under ``kernels/cuda``.

Nothing here waits for the device: results, the scalar ``nll`` as well, are CuPy arrays that the
device is still writing. Sums over samples are cut so that each belongs to one block and is added in
a fixed order, without atomics on floating-point numbers: the same bits in every run, on one kind of
device. For the c-model that holds as far as cuBLAS keeps it, which it promises for one stream.

A label out of range, which ``check_values=False`` does not look for on the device, touches no
memory outside the arrays: its sample's results are NaN, and so is the loss.
"""

from __future__ import annotations

from kernels.cupy_backend.c_model import c_model_nll, c_model_posterior
from kernels.cupy_backend.counts import counts_by_label
from kernels.cupy_backend.graphs import recording_stream
from kernels.cupy_backend.images import (
    conv2d,
    conv2d_backward,
    conv2d_relu,
    conv2d_relu_backward,
    max_pool2d,
    max_pool2d_backward,
)
from kernels.cupy_backend.network import (
    adam_update,
    bias_relu_dropout,
    bias_relu_dropout_backward,
    column_sums,
    dropout_kept,
    gather_rows,
)
from kernels.cupy_backend.product import product
from kernels.cupy_backend.s_model import s_model_nll, s_model_posterior
from kernels.cupy_backend.softmax import soft_target_nll, softmax_nll
from kernels.cupy_backend.sparse import (
    sparse_c_model_nll,
    sparse_c_model_posterior,
    sparse_s_model_nll,
    sparse_s_model_posterior,
)

__all__ = [
    "adam_update",
    "bias_relu_dropout",
    "bias_relu_dropout_backward",
    "c_model_nll",
    "c_model_posterior",
    "column_sums",
    "conv2d",
    "conv2d_backward",
    "conv2d_relu",
    "conv2d_relu_backward",
    "counts_by_label",
    "dropout_kept",
    "gather_rows",
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
]
