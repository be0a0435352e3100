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
import numpy as np
from tests.cases import MODELS, model_inputs, s_model_inputs, soft_targets
for threads in (1, 2, 4):
    numba.set_num_threads(threads)
    assert kernels.thread_count() == threads
    digest = hashlib.sha256()
    for dtype in ("float32", "float64"):
        for n, k in ((1, 2), (257, 13), (1000, 70)):
            a, _, z = s_model_inputs("usual", n, k, dtype)
            targets = soft_targets(n, k, dtype)
            results = [kernels.softmax_nll(a, z), kernels.soft_target_nll(a, targets)]
            for model in MODELS:
                arrays = model_inputs(model, "usual", n, k, dtype)
                for kind in ("nll", "posterior"):
                    results.append(getattr(kernels, f"{model}_{kind}")(*arrays))
            for result in results:
                for value in result:
                    digest.update(value.tobytes())
        values = np.random.default_rng(0).normal(size=(1300, 900)).astype(dtype)
        bias, out = values[0].copy(), values.copy()
        kernels.bias_relu_dropout(out, bias, 0.5, 1)
        kernels.bias_relu_dropout_backward(out, values, values, bias, 0.5)
        flat, moments = out.ravel(), np.zeros((2, out.size), dtype)
        kernels.adam_update(flat, values.ravel(), *moments, 1, step_size=0.1, beta_1=0.9,
                            beta_2=0.99, epsilon=1e-8)
        images = values.ravel()[: 20 * 9 * 8 * 4].reshape(20, 9, 8, 4)
        weight = values.ravel()[-9 * 4 * 20 :].reshape(3, 3, 4, 20).copy()
        d_out = kernels.conv2d(images, weight, 1)
        pooled = kernels.max_pool2d(d_out, 2)
        gradients = kernels.conv2d_backward(images, weight, d_out, 1)
        spread = kernels.max_pool2d_backward(pooled[1], pooled[0], 2, d_out.shape)
        block, place = (np.empty_like(array) for array in pooled)
        kernels.conv2d_relu(images, weight, weight[0, 0, 0].copy(), block, place, padding=1,
                            pool=2, rate=0.25, seed=1)
        blocks = [np.empty_like(array) for array in (images, weight, weight[0, 0, 0])]
        kernels.conv2d_relu_backward(images, weight, block, place, pooled[0], *blocks,
                                     padding=1, pool=2, rate=0.25)
        for value in (flat, values, bias, *moments, d_out, *pooled, *gradients, spread, block,
                      place, *blocks):
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
