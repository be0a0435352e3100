"""What the machine can do, measured before the kernels: memory copies and matrix products."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from benchmarks import devices
from benchmarks.records import Row
from benchmarks.step_peers import torch_products
from benchmarks.timing import Arm, ArmError, Pool
from benchmarks.worker import Work

COPY_BYTES = 2**28  # of each of source and target: beyond any cache
GEMM_SIZE = 1024
GPU_COPY_BYTES, GPU_GEMM_SIZE = 2**30, 8192
MODULE = "benchmarks.machine"


def n_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def build_copy(n_bytes: int) -> Work:
    """Return a copy in memory that every core takes its share of."""
    source, target = np.ones(n_bytes, np.uint8), np.zeros(n_bytes, np.uint8)
    parts = list(zip(np.array_split(target, n_cores()), np.array_split(source, n_cores())))  # noqa: B905
    pool = ThreadPoolExecutor(len(parts))

    def call() -> None:
        list(pool.map(lambda part: np.copyto(*part), parts))

    return Work(call, lambda: (target,))


def build_gemm(library: str, size: int, dtype: str) -> Work:
    """Return a square matrix product with its result in place."""
    a: Any = np.random.default_rng(0).random((size, size)).astype(dtype)
    multiply: Callable[..., Any] = np.matmul
    if library == "torch":
        multiply, [(a, _)] = torch_products([(a, a)])
    c = multiply(a, a)
    return Work(lambda: multiply(a, a, out=c), lambda: (np.asarray(c),))


def build_blas_name() -> Work:
    """Return a call that tells NumPy's BLAS and the kernels it chose for this processor."""

    def name() -> str:
        found = [info for info in threadpool_info() if info["user_api"] == "blas"]
        return ", ".join(
            f"{info['internal_api']} {info.get('version')} {info.get('architecture', '')}".strip()
            for info in found
        )

    return Work(name, lambda: (np.array(name()),))


def _fastest(arm: Arm, pool: Pool) -> float | None:
    """Return the least seconds of a call over a few rounds; None for an arm that fails."""
    settings = pool.settings
    try:
        worker = pool.worker(arm)
    except ArmError:
        return None
    try:
        n_calls = int(np.clip(settings.block_seconds / worker.ask("time", 1), 1, 100))
        return min(worker.ask("time", n_calls) for _ in range(settings.rounds))
    except ArmError:
        return None
    finally:
        worker.close()


def measure_machine(dtypes: list[str], libraries: list[str], pool: Pool, quick: bool) -> list[Row]:
    """Return rows of the copy bandwidth (read and written bytes) and of the GEMM rates.

    On a GPU they are the device's, by CuPy.
    """
    rows = []

    def keep(name: str, arm: Arm, rate: Callable[[float], Row], **sizes: Any) -> None:
        seconds = _fastest(arm, pool)
        if seconds is not None:
            row = {"machine_rate": name, "arm": arm.name, **sizes, "median_ms": 1e3 * seconds}
            rows.append(row | rate(seconds))

    def keep_copy(arm: Arm, n_bytes: int) -> None:
        keep(
            "copy",
            arm,
            lambda seconds: {"gigabytes_per_second": 2e-9 * n_bytes / seconds},
            size=n_bytes,
        )

    def keep_gemm(arm: Arm, size: int, dtype: str) -> None:
        keep(
            "gemm",
            arm,
            lambda seconds: {"gigaflops": 2e-9 * size**3 / seconds},
            size=size,
            dtype=dtype,
        )

    if pool.settings.device == devices.CUDA:
        build, n_bytes, size = f"{devices.MODULE}:build", GPU_COPY_BYTES, GPU_GEMM_SIZE
        keep_copy(Arm("cupy", f"{build}_copy", {"n_bytes": n_bytes}, backend="cupy"), n_bytes)
        for dtype in dtypes:
            given = {"size": size, "dtype": dtype}
            keep_gemm(Arm("cupy", f"{build}_gemm", given, backend="cupy"), size, dtype)
        return rows
    n_bytes, size = (2**22, 128) if quick else (COPY_BYTES, GEMM_SIZE)
    copy = {"n_bytes": n_bytes}
    name = f"numpy, {n_cores()} threads"
    keep_copy(Arm(name, f"{MODULE}:build_copy", copy, backend="numpy"), n_bytes)
    for dtype in dtypes:
        for library in libraries:
            given = {"library": library, "size": size, "dtype": dtype}
            arm = Arm(library, f"{MODULE}:build_gemm", given, backend=library)
            keep_gemm(arm, size, dtype)
    return rows


def blas_name(pool: Pool) -> str:
    """Return NumPy's BLAS as the workers have it."""
    worker = pool.worker(Arm("blas", f"{MODULE}:build_blas_name", backend="numpy"))
    try:
        return str(worker.ask("results")[0])
    finally:
        worker.close()


def copy_bandwidth(rows: list[Row]) -> float:
    """Return gigabytes per second out of :func:`measure_machine`'s rows; NaN if not there."""
    found = [r["gigabytes_per_second"] for r in rows if r.get("machine_rate") == "copy"]
    return max(found, default=float("nan"))


def gemm_rate(rows: list[Row], dtype: str) -> float:
    """Return the best library's gigaflops; NaN if there is none."""
    found = [
        r["gigaflops"] for r in rows if r.get("machine_rate") == "gemm" and r["dtype"] == dtype
    ]
    return max(found, default=float("nan"))
