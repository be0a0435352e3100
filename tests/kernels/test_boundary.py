"""Bad input at the public boundary: one clear exception that names argument and finding."""

import numpy as np
import pytest

import kernels
from kernels.api import _prepare_s_model

LOGITS = np.zeros((3, 2))
CHANNEL = np.zeros((2, 2))
LABELS = np.array([0, 1, 0])
NAN, INF = np.full((3, 2), np.nan), np.full((3, 2), np.inf)
ONE_BAD_ROW = np.array([[0.0, 0.0], [-np.inf, -np.inf]])

CASES = {
    "logits not an array": (([[0.0, 1.0]], CHANNEL, LABELS), TypeError, "logits.*found list"),
    "logits of one dimension": ((np.zeros(3), CHANNEL, LABELS), ValueError, r"logits.*\(n, K\)"),
    "logits of integers": ((LOGITS.astype(int), CHANNEL, LABELS), TypeError, "logits.*int64"),
    "half precision": ((LOGITS.astype(np.float16), CHANNEL, LABELS), TypeError, "logits.*float16"),
    "no samples": ((np.zeros((0, 2)), CHANNEL, LABELS[:0]), ValueError, "at least one sample"),
    "one class": (
        (np.zeros((3, 1)), np.zeros((1, 1)), LABELS * 0),
        ValueError,
        "at least two classes",
    ),
    "NaN": ((NAN, CHANNEL, LABELS), ValueError, "logits: row 0 holds NaN"),
    "+inf": ((INF, CHANNEL, LABELS), ValueError, r"logits: row 0 holds \+inf"),
    "a sample without a class": ((-INF, CHANNEL, LABELS), ValueError, "row 0 holds only -inf"),
    "theta not square": (
        (LOGITS, np.zeros((3, 2)), LABELS),
        ValueError,
        r"channel_logits.*\(2, 2\)",
    ),
    "theta of another size": ((LOGITS, np.zeros((3, 3)), LABELS), ValueError, "channel_logits"),
    "theta of another dtype": (
        (LOGITS, CHANNEL.astype(np.float32), LABELS),
        TypeError,
        "channel_logits must be float64.*float32",
    ),
    "theta with a zero row": (
        (LOGITS, ONE_BAD_ROW, LABELS),
        ValueError,
        "channel_logits: row 1 holds only -inf",
    ),
    "theta with NaN": ((LOGITS, CHANNEL * np.nan, LABELS), ValueError, "channel_logits: row 0"),
    "label covered by no row": (
        (LOGITS, ONE_BAD_ROW.T, LABELS),
        ValueError,
        "noisy_labels contains label 1, but column 1",
    ),
    "labels of another length": (
        (LOGITS, CHANNEL, LABELS[:2]),
        ValueError,
        r"noisy_labels.*\(3,\)",
    ),
    "labels of floats": ((LOGITS, CHANNEL, LABELS * 1.0), TypeError, "noisy_labels.*float64"),
    "labels of booleans": ((LOGITS, CHANNEL, LABELS > 0), TypeError, "noisy_labels.*bool"),
    "label too large": ((LOGITS, CHANNEL, LABELS * 2), ValueError, r"0\.\.1; found 0\.\.2"),
    "negative label": ((LOGITS, CHANNEL, -LABELS), ValueError, r"0\.\.1; found -1\.\.0"),
}

OF_VALUES = {
    "NaN",
    "+inf",
    "a sample without a class",
    "theta with a zero row",
    "theta with NaN",
    "label covered by no row",
}


@pytest.mark.parametrize("backend", kernels.CPU_BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_s_model_refuses(case, backend):
    arrays, error, message = CASES[case]
    for kernel in (kernels.s_model_nll, kernels.s_model_posterior):
        with pytest.raises(error, match=message):
            kernel(*arrays, backend=backend)


@pytest.mark.parametrize("case", ["NaN", "one class", "no samples", "label too large"])
def test_softmax_refuses(case):
    (logits, _, labels), error, _ = CASES[case]
    with pytest.raises(error, match=r"logits|labels"):
        kernels.softmax_nll(logits, labels)


@pytest.mark.parametrize(
    "targets", [np.full((3, 2), 0.6), np.array([[1.5, -0.5]] * 3), np.full((3, 2), np.nan)]
)
def test_soft_targets_have_to_be_distributions(targets):
    with pytest.raises(ValueError, match="targets must have non-negative rows that sum to one"):
        kernels.soft_target_nll(LOGITS, targets)


def test_unknown_backend_is_an_error_and_no_fallback():
    with pytest.raises(
        ValueError, match=r"backend must be one of \['cupy', 'numba', 'numpy'\].*'torch'"
    ):
        kernels.softmax_nll(LOGITS, LABELS, backend="torch")


@pytest.mark.parametrize("case", [case for case in CASES if case not in OF_VALUES])
def test_shapes_dtypes_and_labels_are_checked_even_when_values_are_not(case):
    arrays, error, message = CASES[case]
    with pytest.raises(error, match=message):
        kernels.s_model_nll(*arrays, backend="numpy", check_values=False)
    logits, channel_logits, labels = arrays
    support = np.array([[0, 1], [1, 0]])
    if channel_logits.shape == (2, 2):
        with pytest.raises(error, match=message):
            kernels.sparse_s_model_nll(
                logits,
                channel_logits,
                kernels.link_index(support),
                labels,
                backend="numpy",
                check_values=False,
            )
    if channel_logits is CHANNEL:
        with pytest.raises(error, match=message.replace("noisy_", "")):
            kernels.softmax_nll(logits, labels, backend="numpy", check_values=False)


@pytest.mark.parametrize("turned", range(3))
def test_arrays_of_another_order_are_copied_when_values_are_not_checked(turned):
    arrays = [np.arange(6.0).reshape(3, 2), np.arange(4.0).reshape(2, 2), LABELS]
    arrays[turned] = np.repeat(arrays[turned], 2, axis=0)[::2]
    found = _prepare_s_model(*arrays, False)
    assert all(array.flags.c_contiguous for array in found)
    assert all(np.array_equal(a, b) for a, b in zip(found, arrays, strict=True))


@pytest.mark.parametrize("shape", [(2,), (2, 1), (3, 2), (2, 2, 1)])
def test_sparse_scores_have_the_shape_of_the_support(shape):
    index = kernels.link_index(np.array([[0, 1], [1, 0]]))
    with pytest.raises(ValueError, match=r"channel_logits must have shape \(2, 2\)"):
        kernels.sparse_s_model_nll(LOGITS, np.zeros(shape), index, LABELS, check_values=False)
    of_three = kernels.link_index(np.array([[0, 1], [1, 2], [2, 0]]))
    with pytest.raises(ValueError, match="support must have shape"):
        kernels.sparse_s_model_nll(LOGITS, np.zeros((3, 2)), of_three, LABELS, check_values=False)


@pytest.mark.parametrize("check_values", [True, False])
@pytest.mark.parametrize("kind", [np.matrix, np.ma.MaskedArray])
@pytest.mark.parametrize("place", range(3))
def test_arrays_that_mean_something_else_are_refused(place, kind, check_values):
    name = ("logits", "channel_logits", "noisy_labels")[place]
    arrays = [LOGITS, CHANNEL, LABELS]
    kernels.s_model_nll(*_with(arrays, place, np.memmap), check_values=check_values)
    with pytest.raises(TypeError, match=rf"{name} must be a NumPy array.*found {kind.__name__}"):
        kernels.s_model_nll(*_with(arrays, place, kind), check_values=check_values)


def _with(arrays, place, kind):
    return [a.view(kind) if i == place else a for i, a in enumerate(arrays)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_that_would_overflow_are_refused_before(dtype):
    largest = np.finfo(dtype).max
    hidden, weights = np.full((3, 2), largest / 10, dtype), np.ones((2, 2, 2), dtype)
    arrays = LOGITS.astype(dtype), hidden, weights, CHANNEL.astype(dtype), LABELS
    assert np.isfinite(kernels.c_model_nll(*arrays).nll)
    hidden[1, 1] = -largest / 2
    with pytest.raises(ValueError, match="hidden and channel_weights must have products within"):
        kernels.c_model_nll(*arrays)
