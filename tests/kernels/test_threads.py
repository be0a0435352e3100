"""The same bits for any number of threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases import JIT

ROOT = Path(__file__).resolve().parents[2]

HASH_FOR_EACH_THREAD_COUNT = """
import hashlib, numba, kernels
from tests.cases import s_model_inputs, soft_targets
for threads in (1, 2, 4):
    numba.set_num_threads(threads)
    assert kernels.thread_count() == threads
    digest = hashlib.sha256()
    for dtype in ("float32", "float64"):
        for n, k in ((1, 2), (257, 13), (1000, 70)):
            a, b, z = s_model_inputs("usual", n, k, dtype)
            for result in (
                kernels.softmax_nll(a, z),
                kernels.soft_target_nll(a, soft_targets(n, k, dtype)),
                kernels.s_model_nll(a, b, z),
                kernels.s_model_posterior(a, b, z),
            ):
                for value in result:
                    digest.update(value.tobytes())
    print(digest.hexdigest())
"""


@pytest.mark.skipif(not JIT, reason="without compilation there are no threads")
def test_numba_kernels_give_the_same_bits_for_1_2_and_4_threads():
    run = subprocess.run(
        [sys.executable, "-c", HASH_FOR_EACH_THREAD_COUNT],
        cwd=ROOT,
        env=os.environ | {"NUMBA_NUM_THREADS": "4"},
        capture_output=True,
        text=True,
        check=True,
    )
    hashes = run.stdout.split()
    assert len(hashes) == 3
    assert len(set(hashes)) == 1
