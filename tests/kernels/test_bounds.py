"""The compiled kernels keep within their arrays, as far as Numba can see."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases import JIT


@pytest.mark.skipif(not JIT, reason="what is not compiled has NumPy's own checks")
def test_every_kernel_keeps_within_its_arrays(tmp_path):
    # Less optimisation takes a fifth less time; the checks are the same.
    settings = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_OPT": "1"}
    found = subprocess.run(
        [sys.executable, "-m", "tests.kernels.bounds"],
        cwd=Path(__file__).parents[2],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    assert "not used: []" in found.stdout
