"""Separate random streams for one seed, so that a draw for one purpose cannot disturb another."""

from __future__ import annotations

import numpy as np

PURPOSES = (
    "split",
    "label noise",
    "initialisation",
    "shuffling",
    "dropout",
    "directions",
    "subset",
    "missing labels",
    "clusters",
    "random start",
    "synthetic data",
)


def stream(seed: int, purpose: str) -> np.random.Generator:
    """Return a new generator for that seed and purpose; equal arguments give equal draws.

    Parameters
    ----------
    seed : int
    purpose : str
        One of :data:`PURPOSES`. Two methods that each ask for "shuffling" see their samples in
        the same order.

    Raises
    ------
    ValueError
        For an unknown purpose or a negative seed.

    Examples
    --------
    >>> a, b = stream(3, "label noise"), stream(3, "label noise")
    >>> bool(a.random() == b.random()), bool(a.random() == stream(3, "split").random())
    (True, False)
    """
    if purpose not in PURPOSES:
        raise ValueError(f"purpose must be one of {PURPOSES}; found {purpose!r}")
    if seed < 0:
        raise ValueError(f"seed must not be negative; found {seed}")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(PURPOSES.index(purpose),)))
