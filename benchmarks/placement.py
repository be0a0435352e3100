"""Where a benchmark computes: on the CPU, or with ``--backend cupy`` on a GPU."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from benchmarks.records import Row
from nalayer.devices import to_device

CUPY = "cupy"


def there(backend: str | None, *values: Any) -> tuple[Any, ...]:
    """Return arrays, or what holds some, where the backend works on them."""
    return to_device(values) if backend == CUPY else values


def require_place(backend: str | None) -> None:
    """Raise ValueError, saying what is missing, if nothing can be computed there."""
    try:
        there(backend, np.zeros(1))
    except Exception as error:  # no CuPy, no driver, no device: each its own class
        raise ValueError(f"--backend cupy needs CuPy and a GPU: {error}") from None


def with_device(base: Row) -> Row:
    """Return a row's provenance with the GPU's name and CuPy's version, where it was used."""
    if base["backend"] != CUPY:
        return base
    cupy: Any = import_module("cupy")
    name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    return base | {"device": name, "versions": f"{base['versions']}, cupy {cupy.__version__}"}
