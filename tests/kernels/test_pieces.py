"""Pieces of work: each done once, on one thread or on several; what fails in one is raised."""

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import njit
from numba.core.dispatcher import Dispatcher

from kernels import numba_backend
from kernels.numba_backend.pieces import do_pieces
from tests.cases import JIT

ROOT = Path(__file__).parents[2]


@njit
def note(p, out, pair, factors, adds):
    rows, (start, factor) = pair
    if rows[p, 0] < 0:
        raise ValueError("negative")
    room = np.empty(2)  # arrays of its own, and parts of the arguments
    room[0], room[1] = rows[p].sum(), start
    out[p] += room[1] + factor * room[0] + (factors[p % factors.shape[0]] if adds else 0)


@njit
def note_all(alone, n, out, rows, factors, adds):
    do_pieces(alone, n, note, (out, (rows, (3, 0.5)), factors, adds))


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 1000])
def test_each_piece_is_done_once_with_all_its_arguments(n, alone, adds):
    rows, factors = np.arange(4000.0).reshape(1000, 4)[:, ::2], np.arange(3, dtype=np.float32)
    out = np.zeros(1000)
    note_all(alone, n, out, rows, factors, adds)
    expected = 3 + rows.sum(axis=1) / 2 + adds * np.resize(factors, 1000)
    assert np.array_equal(out, np.where(np.arange(1000) < n, expected, 0))


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("failing", [0, 99])
def test_an_exception_in_a_piece_reaches_the_caller(alone, failing):
    rows = np.ones((100, 2))
    rows[failing] = -1
    with pytest.raises(ValueError, match="negative"):
        note_all(alone, 100, np.zeros(100), rows, np.ones(3), True)
    rows[failing] = 1
    note_all(alone, 100, np.zeros(100), rows, np.ones(3), True)  # and the next call is well


@pytest.mark.skipif(not JIT, reason="nothing is compiled")
def test_arguments_are_kept_while_the_pieces_run_and_no_longer():
    out, rows, factors = np.zeros(100), np.ones((100, 2)), np.ones(3)
    before = [sys.getrefcount(array) for array in (out, rows, factors)]
    for alone in (False, True):
        note_all(alone, 100, out, rows, factors, True)
    assert [sys.getrefcount(array) for array in (out, rows, factors)] == before


@pytest.mark.skipif(not JIT, reason="nothing is compiled")
def test_one_function_alone_is_compiled_for_threads():
    """Numba compiles the body of a loop over prange five times: pieces are not to stand in one."""
    found = set()
    for info in pkgutil.iter_modules(numba_backend.__path__, "kernels.numba_backend."):
        for value in vars(importlib.import_module(info.name)).values():
            if isinstance(value, Dispatcher) and value.targetoptions.get("parallel"):
                found.add(value.__qualname__)
    assert found == {"_do_all"}


STEP = """
import numpy as np, kernels
logits, labels = np.zeros((4, 2)), np.zeros(4, dtype=np.int64)
print(kernels.{kernel}(logits, {second}, backend="numba").nll)
"""


@pytest.mark.skipif(not JIT, reason="nothing is compiled")
def test_kernels_that_different_processes_compiled_work_from_one_cache(tmp_path):
    """Numba starts its threads for what has a loop, not for what was linked with a cached one."""
    hard = STEP.format(kernel="softmax_nll", second="labels")
    soft = STEP.format(kernel="soft_target_nll", second="np.eye(2)[labels]")
    for code in (hard, soft, soft):  # compiles the loop; links the cached one; loads both
        found = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == 0, found.stderr[-2000:]
        assert abs(float(found.stdout) - np.log(2)) < 1e-15
