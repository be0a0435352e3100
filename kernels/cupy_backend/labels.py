"""Samples grouped by label: a counting sort on the device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kernels import cuda_launch
from kernels.cupy_backend.launch import Array, constants, cp, launch


class Groups(NamedTuple):
    """Samples sorted by label; see ``group_begin`` in ``rows.cuh``."""

    order: Array
    ends_jb: Array
    n_chunks: int


class Chunks(NamedTuple):
    """What ``place_samples_of_chunk`` in ``chunks.cuh`` takes, and what it writes."""

    n_chunks: int
    counts_bj: Array
    ends_j: Array
    order: Array

    def sorted(self) -> Groups:
        """Return the samples in order, once they are placed."""
        return Groups(self.order, self.ends_j, 1)


def chunks(labels: Array, k: int) -> Chunks | None:
    """Count the labels of each chunk; None where the samples are not sorted by chunks."""
    n = labels.size
    n_chunks = cuda_launch.chunks(n, k)
    if n_chunks == 0:
        return None
    counts_bj = cp.empty((n_chunks, cuda_launch.CHUNK_SIZE // 2), dtype=np.uint32)
    how = (n_chunks,), (cuda_launch.CHUNK_SIZE,)
    args = labels, *constants(n, k), counts_bj
    launch("labels", "count_chunk", np.dtype(np.float32), how, *args)
    ends_j, order = cp.empty(k + 1, dtype=np.int64), cp.empty(n, dtype=np.int64)
    return Chunks(n_chunks, counts_bj, ends_j, order)


def group_by_label(labels: Array, k: int) -> Groups:
    """Return the samples (n,) in the order of their labels, those of one label in order.

    Samples whose label is out of range come last.
    """
    n, any_real = labels.size, np.dtype(np.float32)
    if n <= cuda_launch.FEW_SAMPLES:
        order, ends_j = cp.empty(n, dtype=np.int64), cp.empty(k + 1, dtype=np.int64)
        how = cuda_launch.few_samples(n, k)
        launch("labels", "sort_few", any_real, how, labels, *constants(n, k), ends_j, order)
        return Groups(order, ends_j, 1)
    in_chunks = chunks(labels, k)
    if in_chunks:
        n_chunks, *arrays = in_chunks
        how = (n_chunks,), (cuda_launch.CHUNK_SIZE,)
        launch("labels", "place_chunk", any_real, how, labels, *constants(n, k, n_chunks), *arrays)
        return in_chunks.sorted()
    chunk, n_chunks = cuda_launch.label_chunks(n, k)
    counts_jb = cp.zeros((k + 1) * n_chunks, dtype=np.int64)
    order = cp.empty(n, dtype=np.int64)
    how = cuda_launch.elements(n)
    args = labels, *constants(n, k, chunk, n_chunks)
    launch("labels", "count_labels", any_real, how, *args, counts_jb)
    ends_jb = cp.cumsum(counts_jb)
    launch("labels", "place_samples", any_real, how, *args, ends_jb, order)
    return Groups(order, ends_jb, n_chunks)
