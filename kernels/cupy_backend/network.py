"""What a network needs beside matrix products: bias + ReLU + dropout, sums, batches, and Adam."""

from __future__ import annotations

import numpy as np

from kernels import cuda_launch
from kernels.cupy_backend.launch import NOWHERE, Array, constants, cp, launch, seed_arguments

_ANY_REAL = np.dtype(np.float32)


def dropout_kept(shape: tuple[int, int], keys: tuple[int, int, int]) -> Array:
    """See :func:`kernels.dropout_kept`."""
    kept = cp.empty(shape, dtype=np.bool_)
    key_1, key_2, least = keys
    args = kept, *constants(kept.size, least), *seed_arguments(key_1, key_2)
    launch("network", "dropout_kept", _ANY_REAL, cuda_launch.elements(kept.size), *args)
    return kept


def bias_relu_dropout(values: Array, bias: Array, rate: float, keys: tuple[int, int, int]) -> None:
    """See :func:`kernels.bias_relu_dropout`."""
    size, dtype = values.size, values.dtype
    key_1, key_2, least = keys
    numbers = constants(size, bias.size, 1 / (1 - rate), least)
    args = values, bias, *numbers, *seed_arguments(key_1, key_2)
    launch("network", "bias_relu_dropout", dtype, cuda_launch.packs(size, dtype.itemsize), *args)


def bias_relu_dropout_backward(
    out: Array, d_out: Array, rate: float, d_values: Array, d_bias: Array
) -> None:
    """See :func:`kernels.bias_relu_dropout_backward`."""
    _sum_columns(d_out, d_bias, out, 1 / (1 - rate), d_values)


def column_sums(values: Array, out: Array) -> None:
    """See :func:`kernels.column_sums`."""
    _sum_columns(values, out, NOWHERE, 1.0, NOWHERE)


def _sum_columns(
    values: Array, sums: Array, relu_out: Array, factor: float, d_values: Array
) -> None:
    """Write the column sums of values (n, m), or with relu_out of the gradient before the ReLU."""
    (n, m), dtype = values.shape, values.dtype
    how, part, n_parts = cuda_launch.column_sums(n, m)
    # Parts of the rows have their sums added in order by a second kernel.
    sums_pj = cp.empty((n_parts, m), dtype=np.float64) if n_parts > 1 else NOWHERE
    args = values, relu_out, d_values, sums, sums_pj, *constants(n, m, part, factor)
    launch("network", "column_sums", dtype, how, *args)
    if n_parts > 1:
        how = cuda_launch.columns(m, 32)
        launch("network", "sum_of_parts", dtype, how, sums_pj, *constants(n_parts, m), sums)


def gather_rows(values: Array, rows: Array, out: Array) -> None:
    """See :func:`kernels.gather_rows`."""
    if not out.size:
        return
    n_rows = rows.size
    row_bytes = out.nbytes // n_rows
    args = values, rows, out, *constants(len(values), n_rows, row_bytes)
    launch("network", "gather_rows", _ANY_REAL, cuda_launch.row_packs(n_rows, row_bytes), *args)


def adam_update(
    parameters: Array,
    gradient: Array,
    mean: Array,
    square: Array,
    factors: Array,
    settings: tuple[float, ...],
    corrections: Array | None,
) -> None:
    """See :func:`kernels.adam_update`; a factor for all may be a plain number.

    The corrections are those of the settings, or an array.
    """
    size, dtype = parameters.size, parameters.dtype
    keep_1, keep_2, step, correct_1, correct_2, epsilon = settings
    if type(factors) is float:
        own, n_own, step = NOWHERE, 0, step * factors
    else:
        own, n_own = factors, factors.size
    numbers = constants(size, n_own, keep_1, keep_2, step, epsilon)
    args = parameters, gradient, mean, square, own, *numbers, correct_1, correct_2
    args += (NOWHERE if corrections is None else corrections,)
    launch("network", "adam_update", dtype, cuda_launch.packs(size, dtype.itemsize), *args)
