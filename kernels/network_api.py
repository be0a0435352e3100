"""The public kernels of a network and its optimiser; they work in place.

Unlike the losses of :mod:`kernels.api` these write to their arguments: they are what a training
step repeats, and memory that is there already is faster than new memory. Arrays are C-contiguous
and of one dtype, float32 or float64. Their shapes, dtypes and order are checked, in about a
microsecond for a call, and not their numbers; TypeError or ValueError names what does not fit.

As there, NumPy arrays are computed with Numba and CuPy arrays on their GPU. No call waits for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from kernels import checks
from kernels.api import _backend_for, _contiguous, get_backend

_OPERATIONS = ("NN", "NT", "TN", "TT")
_INT64 = np.dtype(np.int64)


def check_rate(rate: float) -> None:
    """Refuse a dropout rate outside [0, 1)."""
    if not 0 <= rate < 1:
        raise ValueError(f"rate must lie in [0, 1); found {rate}")


def dropout_keys(rate: float, seed: Any, like: Any = None) -> tuple[Any, int, int]:
    """Return the two halves of a seed, and the least hash of a number that is kept.

    A seed that lies on a GPU, beside the array it is for, is not looked at: it stays whole.
    """
    check_rate(rate)
    if checks.is_on_gpu(seed):
        checks.check_array("seed", seed, (1,))
        if seed.dtype != _INT64:
            raise TypeError(f"seed must be an integer, or int64 on a GPU; found {seed.dtype}")
        checks.check_same_home("seed", seed, "the array", like)
        return seed, 0, _least(rate)
    return seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, _least(rate)


def _least(rate: float) -> int:
    return min(round(rate * 2**32), 2**32 - 1)


def dropout_kept(
    shape: tuple[int, int], rate: float, seed: Any, *, like: np.ndarray | None = None
) -> np.ndarray:
    """Return which numbers of an (n, m) array dropout keeps: a function of place and seed alone.

    The number at flat index e is kept if a 32-bit hash of (e mod 2^32, seed) is at least
    ``rate * 2^32``. So nothing has to be drawn in order, and no mask has to be kept.

    Parameters
    ----------
    shape : (n, m)
    rate : float
        Probability of being dropped, in [0, 1).
    seed : int
        64 bits, new for every batch and layer. On a GPU it may be an array (1,) int64, whose number
        the kernel reads when it runs.
    like : array, optional
        A CuPy array gives a mask on its GPU, the same one.

    Examples
    --------
    >>> float(dropout_kept((1000, 1000), 0.25, seed=1).mean().round(3))
    0.75
    """
    backend = get_backend("cupy" if checks.is_on_gpu(like) else "numpy")
    return backend.dropout_kept(shape, dropout_keys(rate, seed, like))


def _check_homes(name: str, array: Any, **others: Any) -> None:
    for other_name, other in others.items():
        checks.check_same_home(other_name, other, name, array)


def bias_relu_dropout(
    values: np.ndarray,
    bias: np.ndarray,
    rate: float = 0.0,
    seed: Any = 0,
    backend: str | None = None,
) -> None:
    """Overwrite ``values`` (n, m) with dropout(max(values + bias, 0)).

    What :func:`dropout_kept` keeps is divided by 1 - rate; the rest is zero. ``bias`` is (m,).
    """
    if not (checks.are_alike(values, bias) and (bias.size,) == bias.shape == values.shape[1:]):
        checks.check_work(backend, "values", values, ("n", "m"))
        checks.check_work(backend, "bias", bias, values.shape[1:], values.dtype)
        checks.check_same_home("bias", bias, "values", values)
        dtype = checks.dtype_of_all(values, bias)
        checks.check_work(backend, "values", values, values.shape, dtype, written=True)
    keys = dropout_keys(rate, seed, values)
    _backend_for(backend, values, "values").bias_relu_dropout(values, bias, rate, keys)


def bias_relu_dropout_backward(
    out: np.ndarray,
    d_out: np.ndarray,
    d_values: np.ndarray,
    d_bias: np.ndarray,
    rate: float = 0.0,
    backend: str | None = None,
) -> None:
    """Write to ``d_values`` (n, m) the gradient before bias, ReLU and dropout; may be ``d_out``.

    ``out`` is what :func:`bias_relu_dropout` made: where it is positive a number was active and
    kept, so neither mask is needed. ``d_bias`` (m,) receives the column sums, taken in float64.
    """
    check_rate(rate)
    if not (
        checks.are_alike(out, d_out, d_values, d_bias)
        and out.shape == d_out.shape == d_values.shape
        and (d_bias.size,) == d_bias.shape == out.shape[1:]
    ):
        checks.check_work(backend, "out", out, ("n", "m"))
        checks.check_work(backend, "d_out", d_out, out.shape, out.dtype)
        dtype = checks.dtype_of_all(out, d_out, d_values)
        checks.check_work(backend, "d_values", d_values, out.shape, dtype, written=True)
        checks.check_work(backend, "d_bias", d_bias, out.shape[1:], dtype, written=True)
        _check_homes("out", out, d_out=d_out, d_values=d_values, d_bias=d_bias)
    kernels = _backend_for(backend, out, "out")
    kernels.bias_relu_dropout_backward(out, d_out, rate, d_values, d_bias)


def product(
    a: np.ndarray,
    b: np.ndarray,
    out: np.ndarray,
    transpose: str = "NN",
    backend: str | None = None,
) -> None:
    """Write to ``out`` (n, m) the matrix product of op(a) (n, d) and op(b) (d, m).

    ``transpose`` has a letter for each factor: "N" takes it as it is, "T" transposed. BLAS, or
    cuBLAS, in the arrays' own precision; none may be empty. On the CPU the factors may have any
    memory order.
    """
    if transpose not in _OPERATIONS:
        raise ValueError(f"transpose must be one of {_OPERATIONS}; found {transpose!r}")
    if not (checks.are_alike(a, b, out) and a.ndim == b.ndim == out.ndim == 2):
        anyhow = not checks.is_on_gpu(a)
        checks.check_work(backend, "a", a, ("n", "d"), any_order=anyhow)
        checks.check_work(backend, "b", b, ("d", "m"), a.dtype, any_order=anyhow)
        checks.check_work(backend, "out", out, ("n", "m"), checks.dtype_of_all(a, b), written=True)
        _check_homes("a", a, b=b, out=out)
    n, d = a.shape if transpose[0] == "N" else a.shape[::-1]
    other, m = b.shape if transpose[1] == "N" else b.shape[::-1]
    if other != d or out.shape != (n, m) or not out.size or not d:
        raise ValueError(
            f"a, b and out must fit as {transpose!r} and not be empty; "
            f"found shapes {a.shape}, {b.shape} and {out.shape}"
        )
    _backend_for(backend, a, "a").product(a, b, out, transpose)


def column_sums(values: np.ndarray, out: np.ndarray, backend: str | None = None) -> None:
    """Write to ``out`` (m,) the sums over the rows of ``values`` (n, m), taken in float64."""
    if not (checks.are_alike(values, out) and (out.size,) == out.shape == values.shape[1:]):
        checks.check_work(backend, "values", values, ("n", "m"))
        checks.check_work(backend, "out", out, values.shape[1:], values.dtype, written=True)
        checks.check_same_home("out", out, "values", values)
    _backend_for(backend, values, "values").column_sums(values, out)


def gather_rows(
    values: np.ndarray, rows: np.ndarray, out: np.ndarray, backend: str | None = None
) -> None:
    """Write to ``out`` (b, ...) the rows of ``values`` (n, ...) that ``rows`` (b,) int64 names.

    The arrays may be of any dtype, the same for both. A number out of range stands for the first or
    the last row. On the CPU ``values`` may have any memory order.
    """
    kind, on_gpu = type(values), checks.is_on_gpu(values)
    if not (
        (kind is np.ndarray or on_gpu)
        and kind is type(rows) is type(out)
        and rows.dtype is _INT64
        and out.dtype is values.dtype
        and rows.ndim == 1 <= values.ndim
        and out.shape == (rows.size, *values.shape[1:])
        and rows.flags.c_contiguous
        and out.flags.c_contiguous
        and (values.flags.c_contiguous if on_gpu else out.flags.writeable)
        and (len(values) or not rows.size)
    ):
        _check_gather(values, rows, out)
    _backend_for(backend, values, "values").gather_rows(values, rows, out)


def _check_gather(values: Any, rows: Any, out: Any) -> None:
    checks.check_array("rows", rows, ("b",))
    if rows.dtype != _INT64:
        raise TypeError(f"rows must be int64; found {rows.dtype}")
    row_shape = getattr(values, "shape", (0,))[1:]
    checks.check_array("values", values, ("n", *row_shape))
    checks.check_array("out", out, (rows.size, *row_shape))
    if out.dtype != values.dtype:
        raise TypeError(f"out must be {values.dtype} like values; found {out.dtype}")
    _check_homes("values", values, rows=rows, out=out)
    on_gpu = checks.is_on_gpu(values)
    arrays = {"rows": rows, "out": out} | ({"values": values} if on_gpu else {})
    for name, array in arrays.items():
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} must be contiguous, in C order")
    if not on_gpu and not out.flags.writeable:
        raise ValueError("out is written to and must not be read-only")
    if not len(values) and rows.size:
        raise ValueError("values must hold at least one row to choose from; found none")


def can_record(array: Any) -> bool:
    """Return whether steps on such arrays can be recorded: on a GPU, in Linux."""
    return checks.is_on_gpu(array) and sys.platform == "linux"


def recording_stream() -> AbstractContextManager[Callable[[Callable[[], None]], Any]]:
    """Do what is inside the ``with`` on a stream of the GPU where steps can be recorded.

    The ``with`` yields a function. It is handed a step, a function without arguments, calls it
    once, by which the kernels are recorded and not run, and returns an object whose method
    ``replay`` runs them all, with the arguments that they were recorded with. A step must have been
    done inside the ``with`` before; it may launch any kernel of this package, and must not wait for
    the device, read from it or write to it. Its memory is its own until the object is gone.
    """
    return get_backend("cupy").recording_stream()


def _factors(step_factors: Any, parameters: np.ndarray) -> Any:
    """Return the factors as the backends take them: an array (1,) or (p,); on a GPU a number, too.

    A number goes there as an argument of the kernel.
    """
    on_gpu = checks.is_on_gpu(parameters)
    if on_gpu and type(step_factors) is float:
        return step_factors
    shape = np.shape(step_factors)
    if shape not in ((), parameters.shape):
        raise ValueError(
            f"step_factors must be a number or have shape {parameters.shape}; found {shape}"
        )
    if shape == () and not checks.is_on_gpu(step_factors):
        return float(step_factors) if on_gpu else np.full(1, step_factors, parameters.dtype)
    checks.check_same_home("step_factors", step_factors, "parameters", parameters)
    if on_gpu:
        return _contiguous(step_factors, parameters.dtype)
    return np.asarray(step_factors, dtype=parameters.dtype)


def adam_corrections(beta_1: float, beta_2: float, n_steps: int) -> tuple[float, float]:
    """Return 1 / (1 - beta^s) for both: what Adam's moments are multiplied by in step s, from 1."""
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1; found {n_steps}")
    return 1 / (1 - beta_1**n_steps), 1 / (1 - beta_2**n_steps)


def adam_update(
    parameters: np.ndarray,
    gradient: np.ndarray,
    mean: np.ndarray,
    square: np.ndarray,
    n_steps: int,
    *,
    step_size: float,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    step_factors: np.ndarray | float = 1.0,
    corrections: np.ndarray | None = None,
    backend: str | None = None,
) -> None:
    """Do one step of Adam (Kingma & Ba 2014, Algorithm 1) in one pass over the flat vectors.

    ``parameters``, ``mean`` and ``square`` (p,) are overwritten; ``n_steps`` counts this step, from
    1. ``step_factors`` is a number or (p,). On a GPU ``corrections`` (2,) float64 stand for those
    of ``n_steps``, see :func:`adam_corrections`; the kernel reads them when it runs.
    """
    if not (
        checks.are_alike(parameters, gradient, mean, square)
        and (parameters.size,) == parameters.shape == gradient.shape == mean.shape == square.shape
    ):
        checks.check_work(backend, "parameters", parameters, ("p",))
        shape = parameters.shape
        checks.check_work(backend, "gradient", gradient, shape, parameters.dtype)
        dtype = checks.dtype_of_all(parameters, gradient, mean, square)
        checks.check_work(backend, "parameters", parameters, shape, dtype, written=True)
        checks.check_work(backend, "mean", mean, shape, dtype, written=True)
        checks.check_work(backend, "square", square, shape, dtype, written=True)
        _check_homes("parameters", parameters, gradient=gradient, mean=mean, square=square)
    correct_1, correct_2 = adam_corrections(beta_1, beta_2, n_steps)
    settings = 1 - beta_1, 1 - beta_2, step_size, correct_1, correct_2, epsilon
    kernels = _backend_for(backend, parameters, "parameters")
    factors = _factors(step_factors, parameters)
    if not checks.is_on_gpu(parameters):
        if corrections is not None:
            raise TypeError("corrections must be None for NumPy arrays")
        kernels.adam_update(parameters, gradient, mean, square, factors, settings)
        return
    if corrections is not None:
        checks.check_floats("corrections", corrections, (2,), np.float64)
        checks.check_same_home("corrections", corrections, "parameters", parameters)
    kernels.adam_update(parameters, gradient, mean, square, factors, settings, corrections)
