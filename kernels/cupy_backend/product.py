"""Matrix products by cuBLAS: float32 in float32, never in TF32."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from kernels.cupy_backend.launch import Array, cp

MIB = 2**20
_own = threading.local()


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
    place = getattr(_own, "place", None)
    (gemm.call if place is None else place.call(out.dtype))(
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


class _Place:
    """A stream and memory for the products on it, by functions that CUDA can record.

    CuPy refuses cuBLAS where a stream is being recorded. cuBLAS itself allows it, given memory of
    its own, https://docs.nvidia.com/cuda/cublas/#cuda-graphs-support.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.memory = cp.empty(_workspace_bytes(cp.cuda.Device().compute_capability), np.uint8)

    def call(self, dtype: np.dtype) -> Any:
        """Return cuBLAS' function, which works here if it is called at once."""
        set_stream, set_workspace, *gemms = _recordable()
        handle = cp.cuda.get_cublas_handle()
        # In this order: a new stream takes the workspace away. CuPy's own calls set theirs again.
        set_stream(handle, self.stream.ptr)
        set_workspace(handle, self.memory.data.ptr, self.memory.nbytes)
        return gemms[dtype == np.float64]


def _workspace_bytes(capability: str) -> int:
    """Return how much memory cuBLAS recommends, which is what it takes by itself, too.

    With another size it might choose another algorithm, and so other roundings.
    """
    major = int(capability) // 10
    return 4 * MIB if major < 9 else 12 * MIB if major == 12 else 32 * MIB


@cache
def _recordable() -> tuple[Any, ...]:
    """Return functions of the cuBLAS that CuPy has loaded: set stream, set workspace, the gemms."""
    version = cp.cuda.cublas.getVersion(cp.cuda.get_cublas_handle())
    # Found by its name among what is loaded; no second one is loaded beside it.
    library = ctypes.CDLL(f"libcublas.so.{version // 10000}", mode=os.RTLD_NOLOAD)
    a, i, array = ctypes.c_void_p, ctypes.c_int, (ctypes.c_void_p, ctypes.c_int)
    gemm = (a, i, i, i, i, i, a, *array, *array, a, *array)
    found = []
    for name, kinds in {
        "cublasSetStream_v2": (a, a),
        "cublasSetWorkspace_v2": (a, a, ctypes.c_size_t),
        "cublasSgemm_v2": gemm,
        "cublasDgemm_v2": gemm,
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype, function.errcheck = kinds, i, _checked
        found.append(function)
    return tuple(found)


def _checked(status: int, function: Any, args: Any) -> int:
    if status:
        raise RuntimeError(f"{function.__name__} of cuBLAS fails: status {status}")
    return status


@contextmanager
def recordable_products(stream: Any) -> Iterator[None]:
    """Let this thread's products inside the ``with`` be such as can be recorded on the stream."""
    _own.place = _Place(stream)
    try:
        yield
    finally:
        _own.place = None
        set_stream, *_ = _recordable()
        set_stream(cp.cuda.get_cublas_handle(), 0)  # no longer in memory that is going
