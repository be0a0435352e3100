"""Data sets. So far one: the handwritten digits that scikit-learn ships, no download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.datasets import load_digits as _load_digits
from sklearn.model_selection import train_test_split

from kernels import checks

N_TEST_DIGITS = 500


@dataclass(frozen=True)
class Dataset:
    """Features in [0, 1], one sample a row, and clean labels. Test labels choose nothing."""

    name: str
    x_train: np.ndarray
    labels_train: np.ndarray
    x_test: np.ndarray
    labels_test: np.ndarray
    n_classes: int


def load_digits(dtype: Any = np.float64) -> Dataset:
    """Return the 1797 8x8 digits of Alpaydin & Kaynak (UCI, 1998): 1297 to train, 500 to test.

    The split is stratified by class and always the same.
    """
    digits = _load_digits()
    x_train, x_test, labels_train, labels_test = train_test_split(
        (digits.data / 16).astype(dtype),
        digits.target.astype(np.int64),
        test_size=N_TEST_DIGITS,
        stratify=digits.target,
        random_state=0,
    )
    return Dataset("digits", x_train, labels_train, x_test, labels_test, 10)


LOADERS = {"digits": load_digits}


def load_dataset(name: str, dtype: Any = np.float64) -> Dataset:
    """Return a data set by name; raises ValueError for an unknown one."""
    if name not in LOADERS:
        raise ValueError(f"dataset must be one of {sorted(LOADERS)}; found {name!r}")
    return LOADERS[name](dtype)


def validation_split(
    n: int, labels: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices to train on and those held out, stratified by the (noisy) labels.

    Parameters
    ----------
    n : int
        Number of samples.
    labels : (n,) integer
        The labels that training sees; clean ones have no business here.
    share : float
        Part to hold out, in (0, 1).
    rng : Generator
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie in (0, 1); found {share}")
    checks.check_generator("rng", rng)
    kept, held_out = train_test_split(
        np.arange(n), test_size=share, stratify=labels, random_state=int(rng.integers(2**32))
    )
    return np.sort(kept), np.sort(held_out)
