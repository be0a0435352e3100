"""Where the tests of the CUDA kernels run: on the GPU where there is one, else on the CPU.

On the CPU the sources are compiled as C++ (``host_cuda.py``). Without a GPU each test that needs
one is a single skip; ``NALAYER_REQUIRE=cupy`` turns that into a failure, and then nothing runs on
the CPU instead. The fixtures ``cupy``, ``device`` and ``host`` reach the tests by ``conftest.py``.
"""

import functools
import importlib
import itertools
import os
import sys
import warnings

import numpy as np
import pytest

from kernels import api, cuda_launch
from tests.cases import DTYPES
from tests.kernels import host_cuda

BACKEND = "kernels.cupy_backend"


@functools.cache
def missing_gpu() -> str:
    """Return why there is no GPU to test on; empty if there is one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CuPy says that it finds no CUDA
            import cupy

        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # no CuPy, no driver, no device: each its own class
        return f"no GPU: {type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


REQUIRED = "cupy" in os.environ.get("NALAYER_REQUIRE", "").split(",")
PLACE = "device" if REQUIRED or not missing_gpu() else "host"


def cases_of(place, *values):
    """Parametrize with every combination of the values; a single skip for the other place."""
    if place != PLACE or (place == "device" and missing_gpu()):
        return [pytest.param(*(None for _ in values), id=f"no {place}")]
    return [
        pytest.param(*case, id="-".join(getattr(v, "__name__", str(v)) for v in case))
        for case in itertools.product(*values)
    ]


def backend_modules():
    return [name for name in sys.modules if f"{name}.".startswith(f"{BACKEND}.")]


def without_backend(patch):
    for name in backend_modules():
        patch.delitem(sys.modules, name)
    patch.setattr(api, "_FOUND", {})


@functools.cache
def host_modules():
    """Return the stand-in for CuPy and the backend's modules that run on it."""
    cupy = host_cuda.module()
    given = [(name, dtype, None) for name in cuda_launch.SOURCES for dtype in DTYPES]
    # Most tests have short rows.
    given += [(cuda_launch.HELD, d, cuda_launch.held(1, np.dtype(d).itemsize)) for d in DTYPES]
    host_cuda.build_all(
        [(cuda_launch.source(n), cuda_launch.options(d.__name__, held)) for n, d, held in given]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", cupy)
        # Of a CuPy that is installed, on a machine without a GPU
        patch.setitem(sys.modules, "cupy._core._scalar", None)
        without_backend(patch)
        importlib.import_module(BACKEND)
        # There is no library with functions to call.
        product, cublas = sys.modules[f"{BACKEND}.product"], cupy.cuda.cublas
        same = lambda *_: None, lambda *_: None, cublas.sgemm, cublas.dgemm
        product._recordable = lambda: same
        return cupy, {name: sys.modules[name] for name in backend_modules()}


@pytest.fixture
def device():
    if missing_gpu():
        (pytest.fail if REQUIRED else pytest.skip)(missing_gpu())
    import cupy

    yield cupy
    cupy.get_default_memory_pool().free_all_blocks()


@pytest.fixture
def host(monkeypatch):
    if PLACE != "host":
        pytest.skip("the sources are tested on a GPU")
    if host_cuda.why_not():
        pytest.skip(host_cuda.why_not())
    cupy, backend = host_modules()
    without_backend(monkeypatch)
    for name, module in {"cupy": cupy, **backend}.items():
        monkeypatch.setitem(sys.modules, name, module)
    host_cuda.broken_guards()
    yield cupy
    assert host_cuda.broken_guards() == 0


@pytest.fixture(params=[PLACE])
def cupy(request):
    return request.getfixturevalue(request.param)


def upload(cupy, arrays):
    return [cupy.asarray(array) for array in arrays]


def download(cupy, result):
    return type(result)(*(cupy.asnumpy(value) for value in result))


def same_bits(a, b) -> bool:
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def check_returns_at_once(device, function, *args, **options):
    """Call while a kernel of about half a second, launched before, still runs: it must not wait."""
    spin = device.RawKernel(
        'extern "C" __global__ void spin(long long cycles) {'
        " const long long start = clock64(); while (clock64() - start < cycles) {} }",
        "spin",
    )
    for _ in range(2):  # compiled, and its memory in the pool
        function(*args, **options)
    spin((1,), (1,), (1,))
    device.cuda.Device().synchronize()
    spin((1,), (1,), (10**9,))
    before = device.cuda.Event(disable_timing=True)
    before.record()
    function(*args, **options)
    assert not before.done
    device.cuda.Device().synchronize()
