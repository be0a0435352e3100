import hashlib
import os
import tempfile
from pathlib import Path

# Before anything imports Numba. Compiled functions are kept from run to run, but not from one
# version of the sources to the next: Numba looks at a function's own file only.
_SOURCES = sorted((Path(__file__).parents[1] / "kernels" / "numba_backend").glob("*.py"))
_VERSION = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:16]
os.environ.setdefault(
    "NUMBA_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"nalayer-tests-{os.getuid()}-{_VERSION}")
)
# Threads that wait for work spin, and beside another process's tests that takes most of the time.
# OpenMP reads this when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest  # noqa: E402
from threadpoolctl import threadpool_limits  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def one_blas_thread():
    """BLAS threads spin while they wait; on the tests' small matrices they only disturb."""
    with threadpool_limits(1, user_api="blas"):
        yield
