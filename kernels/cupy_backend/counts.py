"""The counts of Eq. 4, dense or over the links of a sparse model."""

from __future__ import annotations

import numpy as np

from kernels import cuda_launch
from kernels.cupy_backend.labels import group_by_label
from kernels.cupy_backend.launch import NOTHING, Array, cp, launch
from kernels.links import LinkIndex


def counts_by_label(weights_ti: Array, labels: Array, index: LinkIndex | None = None) -> Array:
    """See :func:`kernels.counts_by_label`."""
    n, k = weights_ti.shape
    support = NOTHING if index is None else index.support
    n_kept = k if index is None else index.support.shape[1]
    counts_is = cp.empty((k, n_kept), dtype=np.float64)
    args: tuple = weights_ti, support, *group_by_label(labels, k), k, n_kept, counts_is
    how = cuda_launch.rows(k * n_kept, cuda_launch.divided(n, k))
    launch("counts", "counts_of_links", weights_ti.dtype, how, *args)
    return counts_is
