"""Compiling and launching the CUDA sources, and what all of the GPU's kernels share."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

try:
    import cupy as cp
except ImportError as missing:
    raise ImportError(
        "backend 'cupy' needs CuPy: pip install nalayer[cuda13], or nalayer[cuda12] for a driver "
        "of CUDA 12"
    ) from missing

from kernels import cuda_launch

# CuPy has no types to check against.
Array = Any
NOTHING = 0  # a null pointer: a result that is not wanted


@cache
def _module(source: str, dtype: str) -> Any:
    return cp.RawModule(code=cuda_launch.source(source), options=cuda_launch.options(dtype))


@cache
def _kernel(source: str, name: str, dtype: np.dtype) -> Any:
    """Return a kernel, compiled for this dtype when it is first launched on a device."""
    return _module(source, dtype.name).get_function(name)


def launch(source: str, name: str, dtype: np.dtype, how: cuda_launch.Launch, *args: Any) -> None:
    """Launch a kernel; nothing waits for it."""
    grid, block = how
    _kernel(source, name, dtype)(grid, block, args)


def negative_mean(log_p_t: Array) -> Array:
    """Return minus the mean, summed in float64 and always in the same order."""
    nll = cp.empty((), dtype=log_p_t.dtype)
    launch("labels", "negative_mean", log_p_t.dtype, ((1,), (1024,)), log_p_t, log_p_t.size, nll)
    return nll
