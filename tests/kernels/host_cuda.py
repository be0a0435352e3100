"""A stand-in for CuPy that runs the CUDA sources on the CPU, for machines without a GPU.

The sources are compiled as C++ (``host_cuda.h`` supplies what is CUDA's), the arrays are NumPy's
under a type that calls itself CuPy's. It shows wrong equations, indices and barriers; it says
nothing about races within a warp, memory limits or speed.
"""

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

COMPILER = shutil.which("c++") or shutil.which("g++")
KERNEL = re.compile(r'extern "C" __global__ void (?:WIDE )?(\w+)\(([^)]*)\)')
# What else a kernel may be given: CuPy takes Python's integers for 64 bits, its floats for double.
SCALARS = {
    np.int32: ctypes.c_int,
    np.uint32: ctypes.c_uint,
    np.float32: ctypes.c_float,
    np.float64: ctypes.c_double,
    float: ctypes.c_double,
}
GUARD = 64  # bytes on both sides of every array that no kernel may write


class ndarray(np.ndarray):  # noqa: N801
    """A NumPy array that the package takes for one on a GPU."""

    def get(self):
        return np.array(self)


ndarray.__module__ = "cupy"
_GUARDED: list[np.ndarray] = []


def _raw(shape, dtype):
    dtype = np.dtype(dtype)
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    memory = np.full(n_bytes + 2 * GUARD, 0xFF, dtype=np.uint8)  # 0xFF..: NaN, or -1
    _GUARDED.append(memory)
    return memory[GUARD : GUARD + n_bytes].view(dtype).reshape(shape).view(ndarray)


def broken_guards() -> int:
    """Return how many arrays were overrun since the last call, and forget all arrays."""
    broken = sum((m[:GUARD] != 0xFF).any() or (m[-GUARD:] != 0xFF).any() for m in _GUARDED)
    _GUARDED.clear()
    return int(broken)


def _build(text: str, options: tuple[str, ...], folder: Path) -> Path:
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text(f'#include "host_cuda.h"\n{text}')
    command = [str(COMPILER), "-O1", "-w", "-shared", "-fPIC", "-ffp-contract=fast"]
    command += ["-Wl,-z,now", f"-I{Path(__file__).parent}"]  # now: names are resolved on one stack
    command += [*options, str(source), "-o", str(library)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{COMPILER} fails:\n{run.stderr[-3000:]}")
    return library


@functools.cache
def why_not() -> str:
    """Return why this machine cannot run the sources on its CPU; empty if it can."""
    if COMPILER is None:
        return "no C++ compiler to run the CUDA sources on the CPU with"
    with tempfile.TemporaryDirectory(prefix="host_cuda") as folder:
        library = _build("", (), Path(folder))
        # In a process of its own, which may die of it.
        code = f"import ctypes, sys; sys.exit(ctypes.CDLL({str(library)!r}).try_coroutines())"
        command = [sys.executable, "-S", "-c", code]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return ""
    return f"coroutines do not work here: exit status {run.returncode} {run.stderr.strip()[-200:]}"


@functools.cache
def _library(code: str, options: tuple[str, ...]) -> ctypes.CDLL:
    launchers = []
    for name, parameters in KERNEL.findall(code):
        kinds = [re.sub(r"\w+$", "", p.strip()).strip() for p in parameters.split(",")]
        given = ", ".join(f"*({kind}*)args[{a}]" for a, kind in enumerate(kinds))
        launchers.append(
            f'extern "C" const char* launch_{name}'
            "(const unsigned* grid, const unsigned* block, void** args)"
            f" {{ return host::launch(grid, block, [=] {{ {name}({given}); }}); }}"
        )
    with tempfile.TemporaryDirectory(prefix="host_cuda") as folder:
        return ctypes.CDLL(str(_build("\n".join([code, *launchers]), options, Path(folder))))


def build_all(sources: list[tuple[str, tuple[str, ...]]]) -> None:
    """Compile texts with their options, several at a time."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda given: _library(*given), sources))


class RawModule:
    def __init__(self, code, options):
        self.library = _library(code, options)

    def get_function(self, name):
        launch = getattr(self.library, f"launch_{name}")
        launch.restype = ctypes.c_char_p

        def kernel(grid, block, args):
            assert np.prod(block) <= 1024
            values = [self._value(arg) for arg in args]
            pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
            sizes = [(ctypes.c_uint * 2)(*(*size, 1)[:2]) for size in (grid, block)]
            wrong = launch(*sizes, pointers)
            assert wrong is None, f"{name}: {wrong.decode()}"

        return kernel

    @staticmethod
    def _value(arg):
        if isinstance(arg, ndarray):
            assert arg.flags.c_contiguous
            return ctypes.c_void_p(arg.ctypes.data)
        return SCALARS.get(type(arg), ctypes.c_longlong)(arg)


def _gemm(transa, transb, a, b, out, alpha=1.0, beta=0.0):
    assert out.flags.c_contiguous
    product = (a.T if transa == "T" else a) @ (b.T if transb == "T" else b)
    out[...] = product if beta == 0 else product + out


def _copied(array, shape=None, dtype=None):
    new = _raw(array.shape, dtype or array.dtype)
    new[...] = array
    return new


def module() -> types.ModuleType:
    """Return the stand-in for the module ``cupy``."""
    cupy = types.ModuleType("cupy")
    cupy.ndarray, cupy.RawModule = ndarray, RawModule
    cupy.empty = lambda shape, dtype: _raw(shape, dtype)
    cupy.empty_like = lambda array: _raw(array.shape, array.dtype)
    cupy.zeros = lambda shape, dtype: _copied(np.zeros(shape, dtype))
    cupy.asarray = lambda array: array if isinstance(array, ndarray) else _copied(np.asarray(array))
    cupy.asnumpy = lambda array: np.array(array)
    cupy.cumsum = lambda array: _copied(np.cumsum(np.asarray(array)))
    cupy.cublas = types.SimpleNamespace(gemm=_gemm)
    return cupy
