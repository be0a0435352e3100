"""What a network needs beside matrix products: bias + ReLU + dropout, sums, batches, and Adam."""

from __future__ import annotations

import numpy as np

from kernels import cuda_launch
from kernels.cupy_backend.launch import NOTHING, Array, cp, launch

_ANY_REAL = np.dtype(np.float32)


def dropout_kept(shape: tuple[int, int], keys: tuple[int, int, int]) -> Array:
    """See :func:`kernels.dropout_kept`."""
    kept = cp.empty(shape, dtype=np.bool_)
    how = cuda_launch.elements(kept.size)
    launch("network", "dropout_kept", _ANY_REAL, how, kept, kept.size, *keys)
    return kept


def bias_relu_dropout(values: Array, bias: Array, rate: float, keys: tuple[int, int, int]) -> None:
    """See :func:`kernels.bias_relu_dropout`."""
    size, dtype = values.size, values.dtype
    args = values, bias, size, bias.size, 1 / (1 - rate), *keys
    launch("network", "bias_relu_dropout", dtype, cuda_launch.packs(size, dtype.itemsize), *args)


def bias_relu_dropout_backward(
    out: Array, d_out: Array, rate: float, d_values: Array, d_bias: Array
) -> None:
    """See :func:`kernels.bias_relu_dropout_backward`."""
    _sum_columns(d_out, d_bias, out, 1 / (1 - rate), d_values)


def column_sums(values: Array, out: Array) -> None:
    """See :func:`kernels.column_sums`."""
    _sum_columns(values, out, NOTHING, 1.0, NOTHING)


def _sum_columns(
    values: Array, sums: Array, relu_out: Array, factor: float, d_values: Array
) -> None:
    """Write the column sums of values (n, m), or with relu_out of the gradient before the ReLU."""
    (n, m), dtype = values.shape, values.dtype
    how, part, n_parts = cuda_launch.column_sums(n, m)
    # Parts of the rows have their sums added in order by a second kernel.
    sums_pj = cp.empty((n_parts, m), dtype=np.float64) if n_parts > 1 else NOTHING
    args = values, relu_out, n, m, part, factor, d_values, sums, sums_pj
    launch("network", "column_sums", dtype, how, *args)
    if n_parts > 1:
        how = cuda_launch.columns(m, 32)
        launch("network", "sum_of_parts", dtype, how, sums_pj, n_parts, m, sums)


def gather_rows(values: Array, rows: Array, out: Array) -> None:
    """See :func:`kernels.gather_rows`."""
    n_rows = rows.size
    if not out.size:
        return
    row_bytes = out.nbytes // n_rows
    how = cuda_launch.row_packs(n_rows, row_bytes)
    args = values, rows, values.shape[0], n_rows, row_bytes, out
    launch("network", "gather_rows", _ANY_REAL, how, *args)


def adam_update(
    parameters: Array,
    gradient: Array,
    mean: Array,
    square: Array,
    factors: Array,
    settings: tuple[float, ...],
) -> None:
    """See :func:`kernels.adam_update`."""
    size, dtype = parameters.size, parameters.dtype
    is_number = type(factors) is float
    given = (NOTHING, 0, factors) if is_number else (factors, factors.size, 1.0)
    args = parameters, gradient, mean, square, size, *given, *settings
    launch("network", "adam_update", dtype, cuda_launch.packs(size, dtype.itemsize), *args)
