"""Arrays to and from a GPU, asked for: nothing else in the package moves one.

What is trained, and on what, is moved once: networks, models and :func:`nalayer.train` then work
where the arrays are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np

from kernels.checks import is_on_gpu


def to_device(value: Any) -> Any:
    """Return the same with CuPy arrays, on the current GPU, in place of NumPy's.

    Parameters
    ----------
    value
        An array, or tuples, lists, dictionaries and dataclasses of them, such as a sparse model
        with its links. Whatever else is in there, numbers and None too, stays as it is.

    Raises
    ------
    ImportError
        Without CuPy; says what to install.
    """
    from kernels.cupy_backend.launch import cp  # only now: CuPy need not be installed

    return _moved(value, lambda array: array if is_on_gpu(array) else cp.asarray(array))


def to_host(value: Any) -> Any:
    """Return the same with NumPy arrays in place of CuPy's, and numbers for arrays of one number.

    Waits for the GPU. The other way round than :func:`to_device`.
    """
    return _moved(value, lambda array: array.get()[()] if is_on_gpu(array) else array)


def _moved(value: Any, move: Callable[[Any], Any]) -> Any:
    """Return a value with its arrays moved; itself where there are none to move."""
    if isinstance(value, np.ndarray) or is_on_gpu(value):
        return move(value)
    if isinstance(value, dict):
        return {key: _moved(part, move) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [_moved(part, move) for part in value]
        if all(part is old for part, old in zip(parts, value, strict=True)):
            return value
        return getattr(value, "_make", type(value))(parts)
    if is_dataclass(value) and not isinstance(value, type):
        old = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        new = {name: _moved(part, move) for name, part in old.items()}
        return replace(value, **new) if any(new[name] is not old[name] for name in old) else value
    return value
