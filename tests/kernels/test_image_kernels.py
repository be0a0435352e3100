"""Convolution and pooling against loops over exact decimals, and one pass against its parts."""

from decimal import Decimal, localcontext

import numpy as np
import pytest

import kernels
from kernels import compare, exact
from tests.cases import DTYPES

# n, rows, columns, channels, filters, size, padding: below, at and above the blocks' sizes
CASES = (
    (1, 3, 3, 1, 1, 3, 0),
    (2, 5, 4, 2, 3, 3, 0),
    (9, 4, 5, 1, 2, 3, 1),
    (3, 4, 4, 3, 2, 2, 0),
    (1, 2, 3, 2, 1, 1, 0),
    (2, 3, 3, 2, 2, 5, 2),
    (1, 3, 9, 2, 19, 3, 1),
    (2, 3, 8, 3, 37, 2, 0),
    (1, 3, 15, 1, 32, 3, 0),
)


def conv_inputs(case, dtype):
    n, rows, columns, n_channels, n_filters, size, padding = case
    rng = np.random.default_rng(case)
    images = rng.normal(size=(n, rows, columns, n_channels)).astype(dtype)
    weight = rng.normal(size=(size, size, n_channels, n_filters)).astype(dtype)
    lost = size - 1 - 2 * padding
    d_out = rng.normal(size=(n, rows - lost, columns - lost, n_filters)).astype(dtype)
    return images, weight, d_out, padding


def worst_error(found: np.ndarray, exactly: np.ndarray, sizes: np.ndarray, dtype) -> float:
    """Return the largest error in units: one rounding of the terms that a number is summed from."""
    assert found.shape == exactly.shape
    assert found.dtype == dtype
    with localcontext(prec=exact.DIGITS):
        errors = [
            abs(Decimal(float(f)) - e) / (Decimal(float(np.finfo(dtype).eps)) * size)
            for f, e, size in zip(found.flat, exactly.flat, sizes.flat, strict=True)
            if size != 0
        ]
    assert not np.isnan(found).any()
    return float(max(errors))


@pytest.mark.parametrize("backend", kernels.CPU_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolution_agrees_with_exact_loops(case, dtype, backend):
    images, weight, d_out, padding = conv_inputs(case, dtype)
    sizes = (np.abs(images), np.abs(weight), np.abs(d_out))
    found = (
        kernels.conv2d(images, weight, padding, backend),
        *kernels.conv2d_backward(images, weight, d_out, padding, backend),
    )
    exactly = (
        exact.conv2d(images, weight, padding),
        *exact.conv2d_backward(images, weight, d_out, padding),
    )
    terms = (
        exact.conv2d(*sizes[:2], padding),
        *exact.conv2d_backward(*sizes, padding),
    )
    for one, truth, size in zip(found, exactly, terms, strict=True):
        assert worst_error(one, truth, size, dtype) <= compare.ALLOWED_UNITS
    first_layer = kernels.conv2d_backward(
        images, weight, d_out, padding, backend, with_images=False
    )
    assert first_layer[0] is None
    assert np.array_equal(first_layer[1], found[2])


@pytest.mark.parametrize("backend", kernels.CPU_BACKENDS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_pooling_takes_the_first_maximum_and_sends_the_gradient_there(size, backend):
    rng = np.random.default_rng(size)
    images = rng.integers(-3, 4, size=(3, 7, 6, 2)).astype(float)  # with ties
    out, place = kernels.max_pool2d(images, size, backend)
    height, width = 7 // size, 6 // size
    assert out.shape == place.shape == (3, height, width, 2)
    d_out = rng.normal(size=out.shape)
    d_images = np.zeros_like(images)
    for t, y, x, c in np.ndindex(out.shape):
        best = -np.inf
        for a in range(size):
            for b in range(size):
                if images[t, y * size + a, x * size + b, c] > best:
                    best = images[t, y * size + a, x * size + b, c]
                    where = (t, y * size + a, x * size + b, c)
        assert out[t, y, x, c] == best
        d_images[where] += d_out[t, y, x, c]
    found = kernels.max_pool2d_backward(place, d_out, size, images.shape, backend)
    assert np.array_equal(found, d_images)


# pool, rate
FOLLOWING = ((1, 0.0), (1, 0.5), (2, 0.0), (2, 0.25), (3, 0.5))


def parts(images, weight, bias, padding, pool, rate, seed, backend):
    """Return the output of the one pass, and where the maxima were, from the separate kernels."""
    values = kernels.conv2d(images, weight, padding, backend) + bias
    values[~(values > 0)] = 0
    out, place = kernels.max_pool2d(values, pool, backend)
    flat = out.reshape(len(out), -1)
    kept = kernels.dropout_kept(flat.shape, rate, seed)
    return np.where(kept, flat * out.dtype.type(1 / (1 - rate)), 0).reshape(out.shape), place


@pytest.mark.parametrize("backend", kernels.CPU_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("following", FOLLOWING, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_pass_equals_its_parts_bit_for_bit(case, following, dtype, backend):
    images, weight, d_conv, padding = conv_inputs(case, dtype)
    pool, rate = following
    if min(d_conv.shape[1:3]) < pool:
        pytest.skip("no window fits")
    rng = np.random.default_rng(1)
    bias = rng.normal(size=weight.shape[3]).astype(dtype)
    expected, where_max = parts(images, weight, bias, padding, pool, rate, 7, backend)
    out = np.full(expected.shape, np.nan, dtype)
    place = np.full(expected.shape, 255, np.uint8) if pool > 1 else None
    settings = {"padding": padding, "pool": pool, "rate": rate, "backend": backend}
    kernels.conv2d_relu(images, weight, bias, out, place, seed=7, **settings)
    assert np.array_equal(out, expected)
    if place is not None:
        assert np.array_equal(place, where_max)

    d_out = rng.normal(size=out.shape).astype(dtype)
    active = d_out * ((out > 0) * dtype(1 / (1 - rate)))
    d_values = kernels.max_pool2d_backward(where_max, active, pool, d_conv.shape, backend)
    exactly = kernels.conv2d_backward(images, weight, d_values, padding, backend)
    for d_images in (np.full(images.shape, np.nan, dtype), None):
        d_weight, d_bias = np.full(weight.shape, np.nan, dtype), np.full(bias.shape, np.nan, dtype)
        kernels.conv2d_relu_backward(
            images, weight, out, place, d_out, d_images, d_weight, d_bias, **settings
        )
        assert d_images is None or np.array_equal(d_images, exactly[0])
        assert np.array_equal(d_weight, exactly[1])
        sums = d_values.sum(axis=(0, 1, 2), dtype=np.longdouble)
        sizes = np.abs(d_values).sum(axis=(0, 1, 2), dtype=np.longdouble)
        bound = compare.ALLOWED_UNITS * np.finfo(dtype).eps * sizes
        assert (np.abs(d_bias - sums) <= bound).all()


@pytest.mark.parametrize("backend", kernels.CPU_BACKENDS)
def test_nan_and_infinity_in_an_image_reach_the_pixels_that_see_them_alone(backend):
    rng = np.random.default_rng(0)
    images, weight = rng.normal(size=(2, 5, 16, 2)), rng.normal(size=(3, 3, 2, 3))
    images[0, 2, 3, 1], images[1, 0, 9, 0] = np.nan, np.inf
    with np.errstate(invalid="ignore"):  # run as Python, filters that are not there meet infinity
        out = kernels.conv2d(images, weight, 1, backend)
    touched = np.zeros(out.shape, bool)
    touched[0, 1:4, 2:5] = touched[1, 0:2, 8:11] = True
    assert np.array_equal(~np.isfinite(out), touched)
    # ReLU makes 0 of NaN, so it is never the largest number of a window.
    pooled, place = np.empty((2, 2, 8, 3)), np.empty((2, 2, 8, 3), np.uint8)
    with np.errstate(invalid="ignore"):
        kernels.conv2d_relu(
            images, weight, np.zeros(3), pooled, place, padding=1, pool=2, backend=backend
        )
    values = np.where(out > 0, out, 0)[:, :4].reshape(2, 2, 2, 8, 2, 3)
    assert np.array_equal(pooled, values.max(axis=(2, 4)))
