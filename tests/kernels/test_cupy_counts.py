"""The counts of Eq. 4 on the GPU, beside NumPy's."""

import numpy as np
import pytest

import kernels
from tests.cases import DTYPES
from tests.kernels.gpu_fixtures import cases_of, check_returns_at_once, same_bits

SIZES = ((1, 2, 1), (37, 5, 3), (2500, 33, 4))
LARGE = ((70_001, 10, 3), (5000, 1025, 5))


def case(n, k, n_kept, dtype):
    """Return weights, labels of which the first has most and the last none, and links."""
    rng = np.random.default_rng(n)
    weights = rng.random((n, k)).astype(dtype)
    labels = np.where(rng.random(n) < 0.5, 0, rng.integers(k - 1, size=n))
    support = np.array([rng.permutation(k)[:n_kept] for _ in range(k)])
    return weights, labels, support


def check(cupy, size, dtype):
    weights, labels, support = case(*size, dtype)
    there = cupy.asarray(weights), cupy.asarray(labels)
    for on_gpu, on_cpu in (
        ((), ()),
        ((kernels.link_index(cupy.asarray(support)),), (kernels.link_index(support),)),
    ):
        found, again = (kernels.counts_by_label(*there, *on_gpu) for _ in range(2))
        assert isinstance(found, cupy.ndarray)
        found, again = cupy.asnumpy(found), cupy.asnumpy(again)
        expected = kernels.counts_by_label(weights.astype(np.float64), labels, *on_cpu)
        assert (found.shape, found.dtype) == (expected.shape, np.float64)
        rounding = np.finfo(np.float64).eps * expected.max() * len(labels) ** 0.5
        assert np.abs(found - expected).max() <= rounding
        assert same_bits([found], [again])


@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_are_those_of_the_cpu(cupy, dtype):
    for size in SIZES:
        check(cupy, size, dtype)


@pytest.mark.parametrize("dtype", cases_of("device", DTYPES))
def test_counts_of_many_samples_and_classes(device, dtype):
    for size in LARGE:
        check(device, size, dtype)


def test_a_label_out_of_range_is_refused_or_counts_nowhere(cupy):
    weights, labels = cupy.asarray(np.ones((3, 2))), cupy.asarray(np.array([0, 2, -1]))
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.1; found -1\.\.2"):
        kernels.counts_by_label(weights, labels)
    counts_ij = kernels.counts_by_label(weights, labels, check_values=False)
    assert counts_ij.tolist() == [[1, 0], [1, 0]]


def test_arrays_have_to_be_in_one_place(cupy):
    weights, labels = np.ones((3, 2)), np.array([0, 1, 1])
    links = kernels.link_index(np.array([[0], [1]]))
    with pytest.raises(TypeError, match="labels is a NumPy array and weights a CuPy array"):
        kernels.counts_by_label(cupy.asarray(weights), labels)
    with pytest.raises(
        TypeError, match=r"links\.support is a NumPy array and weights a CuPy array"
    ):
        kernels.counts_by_label(cupy.asarray(weights), cupy.asarray(labels), links)


@pytest.mark.parametrize("dtype", cases_of("device", DTYPES))
def test_counting_does_not_wait_for_the_device(device, dtype):
    weights, labels, _ = case(300, 13, 3, dtype)
    there = device.asarray(weights), device.asarray(labels)
    check_returns_at_once(device, kernels.counts_by_label, *there, check_values=False)
