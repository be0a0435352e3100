"""Agreement tests of every compiled kernel, compiled anew with Numba's checks of array bounds.

``NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=empty python -m tests.kernels.bounds`` runs them and looks
whether each compiled function of the backend has been used. What it does not see:

- The vectors' loads and stores (``vector.py``, ``tile.py``): LLVM instructions on addresses, which
  Numba knows nothing of. ``test_vector.py`` and ``test_tile.py`` look at what they touch.
- Negative indices from -1 to -n, which count from the end, as in NumPy.
"""

import importlib
import pkgutil
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher

import kernels
from kernels import CPU_BACKENDS, numba_backend
from kernels.numba_backend.rows import jit
from tests.cases import model_inputs

FOLDER = Path(__file__).parent
IMAGES = "(2, 5, 4, 2, 3, 3, 0)"
TESTS = (
    (f"{FOLDER}/test_kernels.py", "-k", "float32 and usual and agrees"),
    *(
        (f"{FOLDER}/test_image_kernels.py::{test}-float32-numba]",)
        for test in (
            f"test_convolution_agrees_with_exact_loops[{IMAGES}",
            f"test_one_pass_equals_its_parts_bit_for_bit[{IMAGES}-(1, 0.0)",
            f"test_one_pass_equals_its_parts_bit_for_bit[{IMAGES}-(2, 0.25)",
        )
    ),
    (f"{FOLDER}/test_network_kernels.py", "-k", "float32"),
)


@jit
def beyond(numbers):
    return numbers[numbers.shape[0]]


def compare_the_rest() -> None:
    """Compare with NumPy what the tests above leave out."""
    arrays = model_inputs("c_model", "usual", 9, 4, np.float32)
    found, expected = (kernels.c_model_nll_skipping(*arrays, 0.1, backend=b) for b in CPU_BACKENDS)
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() <= 64 * np.finfo(np.float32).eps * max(1, np.abs(b).max())
    rng = np.random.default_rng(0)
    values, bias = rng.normal(size=(5, 70)).astype("f4"), rng.normal(size=70).astype("f4")
    for rate in (0.0, 0.4):
        results = []
        for backend in CPU_BACKENDS:
            out, d_values, d_bias = values.copy(), np.empty_like(values), np.empty_like(bias)
            kernels.bias_relu_dropout(out, bias, rate, 3, backend)
            kernels.bias_relu_dropout_backward(out, values, d_values, d_bias, rate, backend)
            results.append(np.vstack([out, d_values, d_bias]))
        assert np.abs(results[0] - results[1]).max() <= 64 * np.finfo(np.float32).eps


def unused() -> list[str]:
    """Return the compiled functions that nothing has called."""
    names = []
    for info in pkgutil.iter_modules(numba_backend.__path__, "kernels.numba_backend."):
        for name, value in vars(importlib.import_module(info.name)).items():
            own = isinstance(value, Dispatcher) and value.__module__ == info.name
            if own and not value.overloads:
                names.append(f"{info.name}.{name}")
    return names


def main() -> int:
    assert numba.config.BOUNDSCHECK, "start it with NUMBA_BOUNDSCHECK=1"
    with pytest.raises(IndexError):
        beyond(np.zeros(3))
    for test in TESTS:
        if status := pytest.main(["-q", "-p", "no:cacheprovider", "--durations=4", *test]):
            return int(status)
    compare_the_rest()
    print("not used:", unused())
    return bool(unused())


if __name__ == "__main__":
    sys.exit(main())
