"""One pool of threads at a time.

A BLAS and compiled kernels each keep threads of their own. Those of the one that has just finished
go on spinning for a while, waiting for more, and take the cores from the other. Where both work in
turn, a second BLAS thread costs more than it brings.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

from threadpoolctl import ThreadpoolController


@cache
def _blas() -> ThreadpoolController:
    """Return a handle on the BLAS libraries that are loaded; finding them takes milliseconds."""
    return ThreadpoolController().select(user_api="blas")


def one_blas_thread(wanted: bool = True) -> AbstractContextManager[object]:
    """Hold BLAS at one thread inside a ``with``, for the whole process, and then set it back."""
    return _blas().limit(limits=1) if wanted else nullcontext()
