"""Memory that is used again and again: by the steps of training, by the slices of a data set."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np


class Buffers:
    """Arrays by name, allocated when first asked for and handed out again afterwards.

    An array is valid until somebody asks for the same name: what a step returns belongs to the
    caller until the next step with the same buffers. A batch smaller than the largest so far gets
    the first rows of the same memory.
    """

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}
        self._parts: dict[Any, Buffers] = {}

    def part(self, key: Any) -> Buffers:
        """Return the buffers of one part, such as a layer."""
        return self._parts.setdefault(key, Buffers())

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return an array of that shape and dtype with any content."""
        array, size = self._arrays.get(name), prod(shape)
        if array is None or array.dtype != dtype or array.size < size:
            array = self._arrays[name] = np.empty(size, dtype)
        return array[:size].reshape(shape)


class FreshMemory(Buffers):
    """The same interface with a new array every time: nothing is shared between two calls."""

    def part(self, key: Any) -> Buffers:
        """Return itself."""
        return self

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return a new array."""
        return np.empty(shape, dtype)


FRESH = FreshMemory()

SLICE = 1024
"""samples evaluated at once: enough for full speed, few enough to stay in the caches"""


def slices(n: int, size: int = SLICE) -> Iterator[slice]:
    """Yield slices of at most ``size`` samples that make up 0..n-1, in order."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
