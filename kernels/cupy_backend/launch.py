"""Compiling and launching the CUDA sources, and what all of the GPU's kernels share."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np

try:
    import cupy as cp
except ImportError as missing:
    raise ImportError(
        "backend 'cupy' needs CuPy: pip install nalayer[cuda13], or nalayer[cuda12] for a driver "
        "of CUDA 12"
    ) from missing

try:
    from cupy._core._scalar import CScalar

    # Before CuPy 14 it takes no value, and does not say so.
    _argument = CScalar if CScalar(7).value == 7 else None
except (ImportError, AttributeError, TypeError):
    _argument = None

from kernels import cuda_launch

# CuPy has no types to check against.
Array = Any
NOTHING = 0  # a null pointer: a result that is not wanted


@cache
def _module(source: str, dtype: str, held: cuda_launch.Held | None) -> Any:
    options = cuda_launch.options(dtype, held)
    return cp.RawModule(code=cuda_launch.source(source), options=options)


@cache
def _kernel(source: str, name: str, dtype: np.dtype, held: cuda_launch.Held | None = None) -> Any:
    """Return a kernel, compiled for this dtype when it is first launched on a device."""
    return _module(source, dtype.name, held).get_function(name)


@lru_cache(maxsize=4096, typed=True)
def constants(*numbers: float) -> tuple[Any, ...]:
    """Return numbers, integers or not, as a kernel's arguments (64 bits each).

    For those that recur from step to step: CuPy takes half a microsecond to convert each of them,
    at every launch.
    """
    return tuple(map(_argument, numbers)) if _argument else numbers


(NOWHERE,) = constants(NOTHING)


def seed_arguments(key_1: Any, key_2: int) -> tuple[Any, Any]:
    """Return a seed as the kernels take it: a number, and where it lies if it is on the device."""
    if type(key_1) is cp.ndarray:
        return NOWHERE, key_1
    return key_2 << 32 | key_1, NOWHERE


def launch(source: str, name: str, dtype: np.dtype, how: cuda_launch.Launch, *args: Any) -> None:
    """Launch a kernel; nothing waits for it."""
    grid, block = how
    _kernel(source, name, dtype)(grid, block, args)


def launch_held(
    name: str, dtype: np.dtype, n_rows: int, held: cuda_launch.Held, *args: Any
) -> None:
    """Launch a kernel that holds its rows in registers, compiled for as many as they need."""
    grid, block = cuda_launch.held_rows(n_rows, held)
    _kernel(cuda_launch.HELD, name, dtype, held)(grid, block, args)


def negative_mean(log_p_t: Array) -> Array:
    """Return minus the mean, summed in float64 and always in the same order."""
    nll = cp.empty((), dtype=log_p_t.dtype)
    launch("labels", "negative_mean", log_p_t.dtype, ((1,), (1024,)), log_p_t, log_p_t.size, nll)
    return nll
