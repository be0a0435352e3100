"""How much memory there is, asked before something large is made."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np


def available_bytes() -> int | None:
    """Return how much memory the system says can still be had; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(s.split()[1]) * 1024 for s in lines if s.startswith("MemAvailable")), None)


def size_words(n_bytes: float) -> str:
    """Return a size for people.

    Examples
    --------
    >>> size_words(80e9), size_words(3 * 2**20)
    ('74.5 GiB', '3.0 MiB')
    """
    unit, scale = ("GiB", 2**30) if n_bytes >= 2**30 else ("MiB", 2**20)
    return f"{n_bytes / scale:.1f} {unit}"


def require_memory(name: str, shape: tuple[int, ...], dtype: Any, remedy: str) -> None:
    """Raise MemoryError for an array that does not fit into memory, before it is allocated.

    Left to itself the system promises the memory, and kills the process when it is written to.
    """
    needed, available = prod(shape) * np.dtype(dtype).itemsize, available_bytes()
    if available is not None and needed > available:
        raise MemoryError(
            f"{name} of shape {shape} would need {needed} bytes ({size_words(needed)}); "
            f"found {size_words(available)} available; {remedy}"
        )
