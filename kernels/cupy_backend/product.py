"""Matrix products by cuBLAS: float32 in float32, never in TF32."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from kernels.cupy_backend.launch import Array, cp


class _Gemm(NamedTuple):
    """cuBLAS' function for a dtype, and where its factors 0 and 1 lie."""

    call: Any
    operations: dict[str, int]
    factors: np.ndarray
    zero: int
    one: int


@cache
def _gemm(dtype: np.dtype) -> _Gemm:
    cublas = cp.cuda.cublas  # loaded at this look; the other kernels can do without
    factors = np.array([0, 1], dtype=dtype)
    at = factors.ctypes.data
    call = cublas.sgemm if dtype == np.float32 else cublas.dgemm
    operations = {"N": cublas.CUBLAS_OP_N, "T": cublas.CUBLAS_OP_T}
    return _Gemm(call, operations, factors, at, at + dtype.itemsize)


def product(a: Array, b: Array, out: Array, transpose: str = "NN", add: bool = False) -> None:
    """See :func:`kernels.product`; with ``add`` it is added to what ``out`` holds.

    cuBLAS counts along columns first, so that it sees each array transposed. It is told to work out
    out' = op(b)' op(a)', with the same two operations. CuPy's own ``dot`` does the same and takes
    several times as long to start.
    """
    gemm, of_a, of_b = _gemm(out.dtype), transpose[0], transpose[1]
    n, m = out.shape
    inner = a.shape[of_a == "N"]
    gemm.call(
        cp.cuda.get_cublas_handle(),
        gemm.operations[of_b],
        gemm.operations[of_a],
        m,
        n,
        inner,
        gemm.one,
        b.data.ptr,
        b.shape[1],
        a.data.ptr,
        a.shape[1],
        gemm.one if add else gemm.zero,
        out.data.ptr,
        m,
    )
