"""Convolution and pooling on the GPU, or with the CUDA sources on the CPU (``gpu_fixtures.py``)."""

import numpy as np
import pytest

import kernels
from kernels import compare, exact, numpy_backend
from tests.cases import DTYPES
from tests.kernels.gpu_fixtures import cases_of, check_returns_at_once, same_bits, upload
from tests.kernels.test_image_kernels import CASES, FOLLOWING, conv_inputs, worst_error

# n, rows, columns, channels, filters, size, padding. Tiles have 128 pixels (64 in float64), 32 or
# 64 filters, 64 places of a patch (32), slabs 16 of them (8); vectors are 4 numbers (2).
ODD = (
    (1, 1, 1, 1, 1, 1, 0),
    (3, 7, 6, 5, 7, 3, 1),
    (2, 13, 11, 4, 33, 3, 0),
    (1, 9, 8, 8, 64, 3, 1),
    (2, 6, 7, 3, 65, 2, 1),
    (1, 12, 12, 16, 100, 1, 0),
    (1, 6, 5, 12, 4, 5, 2),
    (2, 3, 4, 1, 8, 2, 3),
)
# The convolutions of the authors' network for CIFAR-100 and MNIST, but for the number of images.
NETWORKS = (
    (64, 32, 32, 3, 32, 3, 0),
    (64, 30, 30, 32, 32, 3, 0),
    (64, 14, 14, 32, 64, 3, 1),
    (64, 14, 14, 64, 64, 3, 0),
    (256, 28, 28, 1, 32, 3, 0),
    (64, 26, 26, 32, 32, 3, 0),
)


def call(cupy, name, arrays, *args, **options):
    result = getattr(kernels, name)(*upload(cupy, arrays), *args, **options)
    if type(result) is not tuple:
        return cupy.asnumpy(result)
    return tuple(None if one is None else cupy.asnumpy(one) for one in result)


def convolved(cupy, case, dtype):
    images, weight, d_out, padding = conv_inputs(case, dtype)
    return (
        call(cupy, "conv2d", (images, weight), padding),
        *call(cupy, "conv2d_backward", (images, weight, d_out), padding),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_convolution_agrees_with_exact_loops(cupy, dtype):
    for case in CASES:
        images, weight, d_out, padding = conv_inputs(case, dtype)
        exactly = (
            exact.conv2d(images, weight, padding),
            *exact.conv2d_backward(images, weight, d_out, padding),
        )
        sizes = np.abs(images), np.abs(weight), np.abs(d_out)
        terms = (exact.conv2d(*sizes[:2], padding), *exact.conv2d_backward(*sizes, padding))
        found = convolved(cupy, case, dtype)
        for one, truth, size in zip(found, exactly, terms, strict=True):
            assert worst_error(one, truth, size, dtype) <= compare.ALLOWED_UNITS


def check_against_twin(cupy, case, dtype):
    """Compare with the NumPy twin in float64.

    Units are those of ``worst_error``; twice as many are allowed as for the short sums there.
    """
    images, weight, d_out, padding = (
        array.astype(np.float64) if isinstance(array, np.ndarray) else array
        for array in conv_inputs(case, dtype)
    )
    sizes = np.abs(images), np.abs(weight), np.abs(d_out)
    expected = (
        numpy_backend.conv2d(images, weight, padding),
        *numpy_backend.conv2d_backward(images, weight, d_out, padding, True),
    )
    terms = (
        numpy_backend.conv2d(*sizes[:2], padding),
        *numpy_backend.conv2d_backward(*sizes, padding, True),
    )
    found = convolved(cupy, case, dtype)
    for one, other, size in zip(found, expected, terms, strict=True):
        assert one.dtype == dtype
        bound = 2 * compare.ALLOWED_UNITS * np.finfo(dtype).eps * size
        assert (np.abs(one - other) <= bound).all()
    assert all(map(same_bits, found, convolved(cupy, case, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ODD, ids=str)
def test_odd_shapes_agree_with_the_twin(cupy, case, dtype):
    check_against_twin(cupy, case, dtype)


@pytest.mark.parametrize(("case", "dtype"), cases_of("device", NETWORKS, DTYPES))
def test_the_shapes_of_a_network_agree_with_the_twin(device, case, dtype):
    check_against_twin(device, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("following", FOLLOWING, ids=str)
def test_one_pass_equals_its_parts_bit_for_bit(cupy, following, dtype):
    pool, rate = following
    settings = {"pool": pool, "rate": rate}
    for case in (CASES[1], CASES[3], *ODD[1:4]):
        images, weight, d_conv, padding = conv_inputs(case, dtype)
        settings["padding"] = padding
        rng = np.random.default_rng(1)
        bias = rng.normal(size=weight.shape[3]).astype(dtype)
        conv = call(cupy, "conv2d", (images, weight), padding)
        expected, where_max = following_parts(conv, bias, pool, rate, 7)
        d_out = rng.normal(size=expected.shape).astype(dtype)
        out, place = cupy.empty(expected.shape, dtype), cupy.empty(expected.shape, np.uint8)
        given = upload(cupy, (images, weight, bias))
        kernels.conv2d_relu(*given, out, place if pool > 1 else None, seed=7, **settings)
        assert np.array_equal(cupy.asnumpy(out), expected)
        if pool > 1:
            assert np.array_equal(cupy.asnumpy(place), where_max)

        active = d_out * ((expected > 0) * dtype(1 / (1 - rate)))
        d_values = kernels.max_pool2d_backward(where_max, active, pool, d_conv.shape, "numpy")
        d_images, d_weight = call(cupy, "conv2d_backward", (images, weight, d_values), padding)
        for into_images in (True, False):
            shapes = (images.shape, weight.shape, bias.shape)
            results = [cupy.empty(shape, dtype) for shape in shapes]
            uploaded = cupy.asarray(d_out)
            before = given[0], given[1], out, place if pool > 1 else None, uploaded
            results_given = results if into_images else (None, *results[1:])
            kernels.conv2d_relu_backward(*before, *results_given, **settings)
            found = [cupy.asnumpy(result) for result in results]
            assert not into_images or np.array_equal(found[0], d_images)
            assert np.array_equal(found[1], d_weight)
            sums = d_values.sum(axis=(0, 1, 2), dtype=np.longdouble)
            sizes = np.abs(d_values).sum(axis=(0, 1, 2), dtype=np.longdouble)
            assert (np.abs(found[2] - sums) <= np.finfo(dtype).eps * sizes).all()
            assert same_bits([cupy.asnumpy(given[0]), cupy.asnumpy(uploaded)], [images, d_out])


def following_parts(conv, bias, pool, rate, seed):
    """Return what follows a convolution, and where the maxima were, from the CPU's kernels."""
    values = conv + bias
    values[~(values > 0)] = 0
    out, place = kernels.max_pool2d(values, pool, "numpy")
    kept = kernels.dropout_kept((len(out), out[0].size), rate, seed).reshape(out.shape)
    return np.where(kept, out * out.dtype.type(1 / (1 - rate)), 0), place


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_pooling_agrees_with_the_twin_bit_for_bit(cupy, size, dtype):
    rng = np.random.default_rng(size)
    for shape in ((3, 7, 6, 5), (1, 17, 35, 2), (2, 3, 4, 33), (0, 4, 4, 2)):
        images = rng.integers(-2, 3, size=shape).astype(dtype)  # with ties
        expected = numpy_backend.max_pool2d(images, size)
        found = call(cupy, "max_pool2d", (images,), size)
        assert all(map(np.array_equal, found, expected))
        assert found[0].dtype == dtype
        d_out = rng.normal(size=expected[0].shape).astype(dtype)
        d_images = call(cupy, "max_pool2d_backward", (expected[1], d_out), size, shape)
        twin = numpy_backend.max_pool2d_backward(expected[1], d_out, size, shape)
        assert np.array_equal(d_images, twin)
        assert d_images.dtype == dtype


def test_arrays_may_start_anywhere(cupy):
    """Vectors of 16 bytes need an address that is a multiple; other numbers go one by one."""

    def shifted(array):
        longer = cupy.empty(array.size + 1, array.dtype)[1:].reshape(array.shape)
        longer[...] = cupy.asarray(array)
        return longer

    for dtype in DTYPES:
        images, weight, d_out, padding = conv_inputs((2, 6, 7, 4, 8, 3, 1), dtype)
        arrays = images, weight, d_out
        expected = call(cupy, "conv2d_backward", arrays, padding)
        for odd in range(3):
            given = [shifted(a) if i == odd else cupy.asarray(a) for i, a in enumerate(arrays)]
            found = kernels.conv2d_backward(*given, padding)
            assert same_bits([cupy.asnumpy(one) for one in found], expected)
        bias, out = cupy.asarray(np.zeros(8, dtype)), shifted(d_out)
        kernels.conv2d_relu(*upload(cupy, arrays[:2]), bias, out, padding=padding)
        conv = call(cupy, "conv2d", arrays[:2], padding)
        assert np.array_equal(cupy.asnumpy(out), np.where(conv > 0, conv, 0))


def test_nan_and_infinity_reach_the_pixels_that_see_them_alone(cupy):
    rng = np.random.default_rng(0)
    images, weight = rng.normal(size=(2, 5, 16, 2)), rng.normal(size=(3, 3, 2, 3))
    images[0, 2, 3, 1], images[1, 0, 9, 0] = np.nan, np.inf
    out = call(cupy, "conv2d", (images, weight), 1)
    touched = np.zeros(out.shape, bool)
    touched[0, 1:4, 2:5] = touched[1, 0:2, 8:11] = True
    assert np.array_equal(~np.isfinite(out), touched)
    shape = (2, 2, 8, 3)
    pooled, place = cupy.empty(shape, np.float64), cupy.empty(shape, np.uint8)
    given = upload(cupy, (images, weight, np.zeros(3)))
    kernels.conv2d_relu(*given, pooled, place, padding=1, pool=2)
    values = np.where(out > 0, out, 0)[:, :4].reshape(2, 2, 2, 8, 2, 3)
    assert np.array_equal(cupy.asnumpy(pooled), values.max(axis=(2, 4)))


def test_a_place_in_no_window_gets_no_gradient_and_no_memory_is_touched(cupy):
    place = np.array([0, 3, 4, 255], np.uint8).reshape(1, 2, 2, 1)
    d_out = np.arange(1.0, 5).reshape(1, 2, 2, 1)
    found = call(cupy, "max_pool2d_backward", (place, d_out), 2, (1, 5, 4, 1))
    expected = np.zeros((1, 5, 4, 1))
    expected[0, 0, 0], expected[0, 1, 3] = 1, 2
    assert np.array_equal(found, expected)


def test_no_window_fits(cupy):
    images, weight, bias = np.ones((1, 3, 3, 1)), np.ones((2, 2, 1, 1)), np.ones(1)
    given = upload(cupy, (images, weight, bias))
    out, place = cupy.empty((1, 0, 0, 1), np.float64), cupy.empty((1, 0, 0, 1), np.uint8)
    kernels.conv2d_relu(*given, out, place, pool=3)
    results = [cupy.empty(array.shape, np.float64) for array in (images, weight, bias)]
    kernels.conv2d_relu_backward(*given[:2], out, place, out, *results, pool=3)
    assert all((cupy.asnumpy(result) == 0).all() for result in results)


def test_arrays_and_backends_have_to_match(cupy):
    arrays = conv_inputs(CASES[1], np.float64)[:2]
    with pytest.raises(TypeError, match=r"images is a NumPy array.*cupy\.asarray"):
        kernels.conv2d(*arrays, backend="cupy")
    on_gpu = upload(cupy, arrays)
    for backend in kernels.CPU_BACKENDS:
        with pytest.raises(TypeError, match=r"images is a CuPy array.*cupy\.asnumpy"):
            kernels.conv2d(*on_gpu, backend=backend)
        with pytest.raises(TypeError, match=r"images is a CuPy array.*cupy\.asnumpy"):
            kernels.max_pool2d(on_gpu[0], 2, backend=backend)
    with pytest.raises(TypeError, match="weight is a NumPy array and images a CuPy array"):
        kernels.conv2d(on_gpu[0], arrays[1])
    place, d_out = np.zeros((1, 2, 2, 1), np.uint8), np.zeros((1, 2, 2, 1))
    with pytest.raises(TypeError, match="d_out is a NumPy array and place a CuPy array"):
        kernels.max_pool2d_backward(cupy.asarray(place), d_out, 2, (1, 4, 4, 1))
    with pytest.raises(ValueError, match=r"weight must hold square filters"):
        kernels.conv2d(on_gpu[0], on_gpu[1][:1])


@pytest.mark.parametrize("pool", cases_of("device", [1, 2, 3]))
def test_no_call_waits_for_the_device(device, pool):
    images, weight, _, padding = conv_inputs((4, 12, 12, 8, 16, 3, 1), np.float32)
    given = upload(device, (images, weight, weight[0, 0, 0]))
    shape = (4, 12 // pool, 12 // pool, 16)
    out, place = device.empty(shape, np.float32), device.empty(shape, np.uint8)
    settings = {"padding": padding, "pool": pool, "rate": 0.5}
    results = [device.empty_like(array) for array in given]

    def step():
        kernels.conv2d_relu(*given, out, place, seed=3, **settings)
        kernels.conv2d_relu_backward(*given[:2], out, place, out, *results, **settings)
        kernels.max_pool2d_backward(place, out, pool, (4, 12, 12, 16))

    check_returns_at_once(device, step)
