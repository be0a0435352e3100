"""What the compiled kernels share: samples sorted by label, maxima and sums."""

from itertools import pairwise

import numpy as np
import pytest

from kernels.numba_backend.rows import CHUNK, order_by_label, row_max, runs_by_label, sum_in_order


@pytest.mark.parametrize("k", [2, 256, 257, 65536, 70_000])
@pytest.mark.parametrize("n", [1, 300])
def test_samples_are_sorted_by_label_and_stay_in_order_within_one(n, k):
    # Labels from both ends, so that every byte of them counts; some occur often.
    labels = np.random.default_rng([n, k]).choice([0, 1, k // 2, k - 2, k - 1], size=n)
    assert np.array_equal(order_by_label(labels, k), np.argsort(labels, kind="stable"))


@pytest.mark.parametrize(("n", "k"), [(1, 2), (CHUNK, 3), (5 * CHUNK + 7, 4), (300, 1000)])
def test_runs_cover_all_samples_have_one_label_and_stay_in_their_chunk(n, k):
    labels = np.random.default_rng([n, k]).integers(k, size=n)
    order, label_s, run_start, run_label, chunk_run = runs_by_label(labels, k)
    assert np.array_equal(label_s, np.unique(labels))
    assert run_start[0] == 0
    assert run_start[-1] == n
    for run, (start, stop) in enumerate(pairwise(run_start)):
        assert start < stop
        assert (labels[order[start:stop]] == label_s[run_label[run]]).all()
        assert start // CHUNK == (stop - 1) // CHUNK
        assert chunk_run[start // CHUNK] <= run < chunk_run[start // CHUNK + 1]


def test_maximum_and_sum_of_a_row():
    row = np.array([3.0, -np.inf, 7.0, np.nan, -2.0] + [1.0] * 20)
    assert row_max(row) == 7
    assert row_max(np.full(19, -np.inf)) == -np.inf
    assert sum_in_order(np.array([2.0**60, 1.0, -(2.0**60)])) == 0  # from the left, not in pairs
