"""A stand-in for CuPy that runs the CUDA sources on the CPU, for machines without a GPU.

The sources are compiled as C++ (``host_cuda.h`` supplies what is CUDA's), the arrays are NumPy's
under a type that calls itself CuPy's. It shows wrong equations, indices and barriers; it says
nothing about races within a warp, memory limits or speed.
"""

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
import types
from pathlib import Path

import numpy as np

COMPILER = shutil.which("c++") or shutil.which("g++")
KERNEL = re.compile(r'extern "C" __global__ void (?:WIDE )?(\w+)\(([^)]*)\)')
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


@functools.cache
def _library(code: str, options: tuple[str, ...]) -> ctypes.CDLL:
    launchers = []
    for name, parameters in KERNEL.findall(code):
        kinds = [re.sub(r"\w+$", "", p.strip()).strip() for p in parameters.split(",")]
        given = ", ".join(f"*({kind}*)args[{a}]" for a, kind in enumerate(kinds))
        launchers.append(
            f'extern "C" void launch_{name}'
            "(const unsigned* grid, const unsigned* block, void** args)"
            f" {{ host::launch(grid, block, [=] {{ {name}({given}); }}); }}"
        )
    folder = Path(tempfile.mkdtemp(prefix="host_cuda"))
    text = "\n".join(['#include "host_cuda.h"', code, *launchers])
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.cpp"
    path.write_text(text)
    library = path.with_suffix(".so")
    here = str(Path(__file__).parent)
    command = [COMPILER, "-O1", "-w", "-shared", "-fPIC", "-ffp-contract=fast", f"-I{here}"]
    subprocess.run([*command, *options, str(path), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    shutil.rmtree(folder)
    return loaded


class RawModule:
    def __init__(self, code, options):
        self.library = _library(code, options)

    def get_function(self, name):
        launch = getattr(self.library, f"launch_{name}")

        def kernel(grid, block, args):
            assert np.prod(block) <= 1024
            values = [self._value(arg) for arg in args]
            pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
            sizes = [(ctypes.c_uint * 2)(*(*size, 1)[:2]) for size in (grid, block)]
            launch(*sizes, pointers)

        return kernel

    @staticmethod
    def _value(arg):
        if isinstance(arg, ndarray):
            assert arg.flags.c_contiguous
            return ctypes.c_void_p(arg.ctypes.data)
        return ctypes.c_int(int(arg)) if isinstance(arg, np.int32) else ctypes.c_longlong(arg)


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
