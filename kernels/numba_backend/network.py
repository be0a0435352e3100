"""What a network needs beside matrix products: bias + ReLU + dropout in one pass, and Adam."""

from __future__ import annotations

import numpy as np

from kernels.numba_backend.pieces import do_pieces
from kernels.numba_backend.rows import jit, jit_part, jit_row, scale_row

# Columns that one piece of the backward pass owns: a few cache lines of each row.
_COLUMNS = 64
# Parameters that one piece of Adam owns.
_PIECE = 8192
# Fewer numbers are done on the calling thread. These passes stand between products of a BLAS whose
# threads still spin: to wake others beside them costs more than it brings.
_ALONE = 1 << 20
_ONE, _U15, _U16 = np.uint32(1), np.uint32(15), np.uint32(16)
_MIX_1, _MIX_2 = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)


@jit_row
def _mixed(x):
    """Return the bits of a uint32 well mixed (Wellons' hash lowbias32, a bijection)."""
    x = np.uint32(x ^ (x >> _U16))
    x = np.uint32(x * _MIX_1)
    x = np.uint32(x ^ (x >> _U15))
    x = np.uint32(x * _MIX_2)
    return np.uint32(x ^ (x >> _U16))


@jit_row
def _hash(first, j, key_1, key_2):
    """Return the bits that decide whether dropout keeps the number at index first + j."""
    counter = np.uint32(np.uint32(first) + np.uint32(j))
    return _mixed(np.uint32(_mixed(np.uint32(counter ^ key_1)) ^ key_2))


@jit_row
def _activate_row(row, bias, first, key_1, key_2, least):
    """Overwrite a row with max(row + bias, 0) where it is kept, else 0."""
    zero = row.dtype.type(0)
    for j in range(row.shape[0]):
        value = row[j] + bias[j]
        row[j] = value if (value > zero) & (_hash(first, j, key_1, key_2) >= least) else zero


@jit_row
def drop_row(row, first, key_1, key_2, least, factor):
    """Overwrite a row, whose first number has that index, with row * factor where kept, else 0."""
    zero = row.dtype.type(0)
    for j in range(row.shape[0]):
        row[j] = row[j] * factor if _hash(first, j, key_1, key_2) >= least else zero


@jit_row
def _relu_row(row, bias):
    zero = row.dtype.type(0)
    for j in range(row.shape[0]):
        value = row[j] + bias[j]
        row[j] = value if value > zero else zero


@jit_part
def _activate(t, values, bias, drops, key_1, key_2, least, factor):
    if drops:
        _activate_row(values[t], bias, t * values.shape[1], key_1, key_2, least)
        scale_row(values[t], factor)
    else:
        _relu_row(values[t], bias)


@jit
def _activate_rows(alone, values, bias, drops, key_1, key_2, least, factor):
    arguments = (values, bias, drops, key_1, key_2, least, factor)
    do_pieces(alone, values.shape[0], _activate, arguments)


def bias_relu_dropout(
    values: np.ndarray, bias: np.ndarray, rate: float, keys: tuple[int, int, int]
) -> None:
    """See :func:`kernels.bias_relu_dropout`."""
    key_1, key_2, least = (np.uint32(key) for key in keys)
    factor = values.dtype.type(1 / (1 - rate))
    alone = values.size < _ALONE
    with np.errstate(over="ignore"):  # the hash wraps around; run as Python, NumPy would warn
        _activate_rows(alone, values, bias, rate > 0, key_1, key_2, least, factor)


@jit_part
def _backward_columns(piece, out, factor, d_out, d_values, d_bias):
    """Write the gradient before the ReLU for some columns; sum it up for the bias."""
    first = piece * _COLUMNS
    last = min(first + _COLUMNS, out.shape[1])
    zero = out.dtype.type(0)
    total_j = np.zeros(_COLUMNS)
    for t in range(out.shape[0]):
        o, d_o, d = out[t, first:last], d_out[t, first:last], d_values[t, first:last]
        for j in range(d.shape[0]):
            d[j] = d_o[j] * factor if o[j] > zero else zero
            total_j[j] += d[j]
    for j in range(last - first):
        d_bias[first + j] = total_j[j]


@jit
def _backward_all_columns(alone, out, factor, d_out, d_values, d_bias):
    n_pieces = (out.shape[1] + _COLUMNS - 1) // _COLUMNS
    do_pieces(alone, n_pieces, _backward_columns, (out, factor, d_out, d_values, d_bias))


def bias_relu_dropout_backward(
    out: np.ndarray, d_out: np.ndarray, rate: float, d_values: np.ndarray, d_bias: np.ndarray
) -> None:
    """See :func:`kernels.bias_relu_dropout_backward`."""
    factor = out.dtype.type(1 / (1 - rate))
    _backward_all_columns(out.size < _ALONE, out, factor, d_out, d_values, d_bias)


@jit_row
def _adam_numbers(p, g, m, v, keep_1, keep_2, step, correct_1, correct_2, epsilon):
    for i in range(p.shape[0]):
        m[i] += keep_1 * (g[i] - m[i])
        v[i] += keep_2 * (g[i] * g[i] - v[i])
        p[i] -= step * (m[i] * correct_1) / (np.sqrt(v[i] * correct_2) + epsilon)


@jit_row
def _adam_numbers_by_factor(
    p, g, m, v, factors, keep_1, keep_2, step, correct_1, correct_2, epsilon
):
    for i in range(p.shape[0]):
        m[i] += keep_1 * (g[i] - m[i])
        v[i] += keep_2 * (g[i] * g[i] - v[i])
        p[i] -= step * factors[i] * (m[i] * correct_1) / (np.sqrt(v[i] * correct_2) + epsilon)


@jit_part
def _adam_piece(piece, p, g, m, v, factors, settings):
    first = piece * _PIECE
    last = min(first + _PIECE, p.shape[0])
    real = p.dtype.type
    keep_1, keep_2, step = real(settings[0]), real(settings[1]), real(settings[2])
    correct_1, correct_2, epsilon = real(settings[3]), real(settings[4]), real(settings[5])
    if factors.shape[0] == 1:
        _adam_numbers(
            p[first:last],
            g[first:last],
            m[first:last],
            v[first:last],
            keep_1,
            keep_2,
            step * real(factors[0]),
            correct_1,
            correct_2,
            epsilon,
        )
    else:
        _adam_numbers_by_factor(
            p[first:last],
            g[first:last],
            m[first:last],
            v[first:last],
            factors[first:last],
            keep_1,
            keep_2,
            step,
            correct_1,
            correct_2,
            epsilon,
        )


@jit
def _adam_pieces(p, g, m, v, factors, settings):
    n_pieces = (p.shape[0] + _PIECE - 1) // _PIECE
    do_pieces(p.shape[0] < _ALONE, n_pieces, _adam_piece, (p, g, m, v, factors, settings))


def adam_update(
    parameters: np.ndarray,
    gradient: np.ndarray,
    mean: np.ndarray,
    square: np.ndarray,
    factors: np.ndarray,
    settings: tuple[float, ...],
) -> None:
    """See :func:`kernels.adam_update`."""
    _adam_pieces(parameters, gradient, mean, square, factors, settings)
