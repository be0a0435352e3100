"""Which classes a sparse noise layer links, row by row, and the same links sorted by label."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kernels import checks


class LinkIndex(NamedTuple):
    """A support together with its transpose, built once by :func:`link_index`; read-only.

    Link e = i * l + s is the s-th link of true class i and leads to observed class
    ``support[i, s]``. A loss needs the links that lead to z_t: they are
    ``links_by_label[start_j[z_t] : start_j[z_t + 1]]``, true classes ascending.
    """

    support: np.ndarray
    """(K, l) int64: the observed classes that true class i can be seen as"""
    links_by_label: np.ndarray
    """(K * l,) int64: all links, sorted by the class they lead to"""
    start_j: np.ndarray
    """(K + 1,) int64: where each label's links start"""
    rows_by_label: np.ndarray
    """(K * l,) int64: the true class that each of ``links_by_label`` belongs to"""

    @property
    def n_links_j(self) -> np.ndarray:
        """How many links lead to each label: (K,)."""
        return np.diff(self.start_j)


def link_index(support: np.ndarray) -> LinkIndex:
    """Check a support, sort its links by label (a compressed sparse column index) and freeze both.

    Parameters
    ----------
    support : (K, l) integer
        Row i: l different classes, 1 <= l <= K. A CuPy array gives an index on its GPU, worked
        out on the CPU.

    Returns
    -------
    LinkIndex
        Accepted wherever a support is. The arrays are copies and cannot be written, so the
        transposed index cannot fall behind the support.

    Raises
    ------
    TypeError, ValueError
        Not an integer array of two dimensions, no links, a class out of range or twice in a row.

    Examples
    --------
    >>> import numpy as np
    >>> index = link_index(np.array([[0, 1], [1, 2], [0, 2]]))
    >>> index.links_by_label[index.start_j[1] : index.start_j[2]].tolist()  # rows 0 and 1
    [1, 2]
    """
    if checks.is_on_gpu(support):
        from cupy import asarray, asnumpy

        return LinkIndex(*map(asarray, link_index(asnumpy(support))))
    checks.check_support("support", support)
    k, n_kept = support.shape
    targets = support.astype(np.int64, order="C")
    order = np.argsort(targets.ravel(), kind="stable")
    start_j = np.zeros(k + 1, dtype=np.int64)
    np.cumsum(np.bincount(targets.ravel(), minlength=k), out=start_j[1:])
    rows = order // n_kept
    for array in (targets, order, start_j, rows):
        array.setflags(write=False)
    return LinkIndex(targets, order, start_j, rows)


def links_of_samples(index: LinkIndex, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return every pair (sample t, link that leads to z_t), samples ascending: (p,), (p,)."""
    n_links_t = index.n_links_j[labels]
    sample_p = np.repeat(np.arange(labels.size, like=labels), n_links_t)
    first_p = np.repeat(np.cumsum(n_links_t) - n_links_t, n_links_t)
    place_p = np.arange(sample_p.size, like=labels) - first_p  # 0, 1, ... within each sample
    return sample_p, index.links_by_label[index.start_j[labels][sample_p] + place_p]
