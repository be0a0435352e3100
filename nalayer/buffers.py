"""Memory that is used again and again: by the steps of training, by the slices of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, TypeVar

import numpy as np

from kernels.checks import is_on_gpu

Views = TypeVar("Views")


class Buffers:
    """Arrays by name, allocated when first asked for and handed out again afterwards.

    An array is valid until somebody asks for the same name: what a step returns belongs to the
    caller until the next step with the same buffers. A batch smaller than the largest so far gets
    the first rows of the same memory.
    """

    def __init__(self) -> None:
        self._memory: dict[str, np.ndarray] = {}
        self._taken: dict[str, np.ndarray] = {}
        self._views: dict[str, tuple[np.ndarray, Any]] = {}
        self._parts: dict[Any, Buffers] = {}

    def part(self, key: Any) -> Buffers:
        """Return the buffers of one part, such as a layer."""
        found = self._parts.get(key)
        if found is None:
            found = self._parts[key] = Buffers()
        return found

    def take(self, name: str, shape: tuple[int, ...], dtype: Any, like: Any = None) -> np.ndarray:
        """Return an array of that shape and dtype with any content, where ``like`` is."""
        taken = self._taken.get(name)
        if taken is not None and taken.shape == shape and taken.dtype == dtype:
            return taken
        memory, size = self._memory.get(name), prod(shape)
        if memory is None or memory.dtype != dtype or memory.size < size:
            memory = self._memory[name] = np.empty(size, dtype, like=like)
        taken = self._taken[name] = memory[:size].reshape(shape)
        return taken

    def views(self, name: str, array: np.ndarray, make: Callable[[np.ndarray], Views]) -> Views:
        """Return ``make(array)``, views into the array, made once as long as it is the same one.

        A step of training that takes a fifth of a millisecond on a GPU would else spend a third of
        it on making views.
        """
        found = self._views.get(name)
        if found is None or found[0] is not array:
            found = self._views[name] = array, make(array)
        return found[1]


class FreshMemory(Buffers):
    """The same interface with a new array every time: nothing is shared between two calls."""

    def part(self, key: Any) -> Buffers:
        """Return itself."""
        return self

    def take(self, name: str, shape: tuple[int, ...], dtype: Any, like: Any = None) -> np.ndarray:
        """Return a new array."""
        return np.empty(shape, dtype, like=like)

    def views(self, name: str, array: np.ndarray, make: Callable[[np.ndarray], Views]) -> Views:
        """Return new views."""
        return make(array)


FRESH = FreshMemory()

SLICE = 1024
"""samples evaluated at once: enough for full speed, few enough to stay in the caches"""
GPU_SLICE = 4096
"""the same on a GPU, which takes more of them to keep busy"""


def slice_size(x: Any) -> int:
    """Return how many of these samples to evaluate at once."""
    return GPU_SLICE if is_on_gpu(x) else SLICE


def slices(n: int, size: int = SLICE) -> Iterator[slice]:
    """Yield slices of at most ``size`` samples that make up 0..n-1, in order."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
