"""The public kernels of a network and its optimiser; they work in place.

Unlike the losses of :mod:`kernels.api` these write to their arguments: they are what a training
step repeats, and memory that is there already is faster than new memory. Arrays are C-contiguous
and of one dtype, float32 or float64. Their shapes, dtypes and order are checked, in about a
microsecond each, and not their numbers; TypeError or ValueError names what does not fit.
"""

from __future__ import annotations

import numpy as np

from kernels import checks
from kernels.api import get_backend


def check_rate(rate: float) -> None:
    """Refuse a dropout rate outside [0, 1)."""
    if not 0 <= rate < 1:
        raise ValueError(f"rate must lie in [0, 1); found {rate}")


def dropout_keys(rate: float, seed: int) -> tuple[int, int, int]:
    """Return the two halves of a seed, and the least hash of a number that is kept."""
    check_rate(rate)
    return seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, min(round(rate * 2**32), 2**32 - 1)


def dropout_kept(shape: tuple[int, int], rate: float, seed: int) -> np.ndarray:
    """Return which numbers of an (n, m) array dropout keeps: a function of place and seed alone.

    The number at flat index e is kept if a 32-bit hash of (e mod 2^32, seed) is at least
    ``rate * 2^32``. So nothing has to be drawn in order, and no mask has to be kept.

    Parameters
    ----------
    shape : (n, m)
    rate : float
        Probability of being dropped, in [0, 1).
    seed : int
        64 bits, new for every batch and layer.

    Examples
    --------
    >>> float(dropout_kept((1000, 1000), 0.25, seed=1).mean().round(3))
    0.75
    """
    return get_backend("numpy").dropout_kept(shape, dropout_keys(rate, seed))


def bias_relu_dropout(
    values: np.ndarray,
    bias: np.ndarray,
    rate: float = 0.0,
    seed: int = 0,
    backend: str | None = None,
) -> None:
    """Overwrite ``values`` (n, m) with dropout(max(values + bias, 0)).

    What :func:`dropout_kept` keeps is divided by 1 - rate; the rest is zero. ``bias`` is (m,).
    """
    checks.check_work(backend, "values", values, ("n", "m"))
    checks.check_work(backend, "bias", bias, values.shape[1:], values.dtype)
    dtype = checks.dtype_of_all(values, bias)
    checks.check_work(backend, "values", values, values.shape, dtype, written=True)
    get_backend(backend).bias_relu_dropout(values, bias, rate, dropout_keys(rate, seed))


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
    checks.check_work(backend, "out", out, ("n", "m"))
    checks.check_work(backend, "d_out", d_out, out.shape, out.dtype)
    dtype = checks.dtype_of_all(out, d_out, d_values)
    checks.check_work(backend, "d_values", d_values, out.shape, dtype, written=True)
    checks.check_work(backend, "d_bias", d_bias, out.shape[1:], dtype, written=True)
    get_backend(backend).bias_relu_dropout_backward(out, d_out, rate, d_values, d_bias)


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
    backend: str | None = None,
) -> None:
    """Do one step of Adam (Kingma & Ba 2014, Algorithm 1) in one pass over the flat vectors.

    ``parameters``, ``mean`` and ``square`` (p,) are overwritten; ``n_steps`` counts this step, from
    1. ``step_factors`` is a number or (p,).
    """
    checks.check_work(backend, "parameters", parameters, ("p",))
    shape = parameters.shape
    checks.check_work(backend, "gradient", gradient, shape, parameters.dtype)
    dtype = checks.dtype_of_all(parameters, gradient, mean, square)
    checks.check_work(backend, "parameters", parameters, shape, dtype, written=True)
    checks.check_work(backend, "mean", mean, shape, dtype, written=True)
    checks.check_work(backend, "square", square, shape, dtype, written=True)
    if np.shape(step_factors) not in ((), shape):
        raise ValueError(
            f"step_factors must be a number or have shape {shape}; found {np.shape(step_factors)}"
        )
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1; found {n_steps}")
    settings = (
        1 - beta_1,
        1 - beta_2,
        step_size,
        1 / (1 - beta_1**n_steps),
        1 / (1 - beta_2**n_steps),
        epsilon,
    )
    factors = np.atleast_1d(np.asarray(step_factors, dtype=parameters.dtype))
    get_backend(backend).adam_update(parameters, gradient, mean, square, factors, settings)
