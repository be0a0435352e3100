"""Convolution and pooling of images.

The convolution of the backward pass needs the gradient before pooling and ReLU, which is put into
memory of the size of the forward convolution; windows of 3 or more pixels a side need that memory
forwards, too. Beside that there are only the parts of the gradients' sums over pixels: some 20 MB,
and more only where there are more than 10 million pixels (``cuda_launch.PART_PIXELS``).
"""

from __future__ import annotations

import numpy as np

from kernels import cuda_launch
from kernels.cupy_backend.launch import NOTHING, Array, constants, cp, launch, seed_arguments

Keys = tuple[int, int, int]
_NO_KEYS = (0, 0, 0)


def _convolve(
    images: Array,
    weight: Array,
    bias: Array,
    padding: int,
    pool: int,
    keys: Keys,
    factor: float,
    out: Array,
    place: Array,
) -> None:
    """Write a convolution and what follows it, with pool 1 or 2."""
    if not out.size:
        return
    _, rows, columns, channels = images.shape
    n, out_rows, out_columns, n_filters = out.shape
    n_out, dtype = n * out_rows * out_columns, images.dtype
    size = len(weight)
    sizes = n_out, rows, columns, channels, n_filters, size, padding, out_rows, out_columns, pool
    launch(
        "convolution",
        f"convolve_{cuda_launch.filter_tile(n_filters)}",
        dtype,
        cuda_launch.convolution(n_out, pool, n_filters, dtype.itemsize),
        images,
        weight,
        bias,
        *constants(*sizes, factor, keys[2]),
        *seed_arguments(*keys[:2]),
        out,
        place,
    )


def _conv_shape(images: Array, weight: Array, padding: int) -> tuple[int, ...]:
    n, rows, columns, _ = images.shape
    lost = len(weight) - 1 - 2 * padding
    return n, rows - lost, columns - lost, weight.shape[3]


def conv2d(images: Array, weight: Array, padding: int) -> Array:
    """See :func:`kernels.conv2d`."""
    out = cp.empty(_conv_shape(images, weight, padding), images.dtype)
    _convolve(images, weight, NOTHING, padding, 1, _NO_KEYS, 1.0, out, NOTHING)
    return out


def conv2d_relu(
    images: Array,
    weight: Array,
    bias: Array,
    padding: int,
    pool: int,
    rate: float,
    keys: Keys,
    out: Array,
    place: Array | None,
) -> None:
    """See :func:`kernels.conv2d_relu`."""
    factor, where = 1 / (1 - rate), NOTHING if place is None else place
    if pool <= 2:
        _convolve(images, weight, bias, padding, pool, keys, factor, out, where)
        return
    values = cp.empty(_conv_shape(images, weight, padding), images.dtype)
    _convolve(images, weight, bias, padding, 1, _NO_KEYS, 1.0, values, NOTHING)
    _max_pool(values, pool, keys, factor, out, where)


def _max_pool(
    images: Array, pool: int, keys: Keys, factor: float, out: Array, place: Array
) -> None:
    if not out.size:
        return
    _, rows, columns, channels = images.shape
    how, dtype = cuda_launch.elements(out.size), images.dtype
    sizes = constants(out.size, rows, columns, channels, pool, *out.shape[1:3], factor, keys[2])
    seed = seed_arguments(*keys[:2])
    launch("pooling", "max_pool", dtype, how, images, *sizes, *seed, out, place)


def max_pool2d(images: Array, size: int) -> tuple[Array, Array]:
    """See :func:`kernels.max_pool2d`."""
    n, rows, columns, channels = images.shape
    shape = (n, rows // size, columns // size, channels)
    out, place = cp.empty(shape, images.dtype), cp.empty(shape, np.uint8)
    _max_pool(images, size, _NO_KEYS, 1.0, out, place)
    return out, place


def _unpool(
    out: Array, place: Array, d_out: Array, pool: int, factor: float, d_values: Array, sums: bool
) -> Array:
    """Write the gradient before pooling and ReLU, and return parts of its sums over the pixels."""
    if not d_values.size:
        return NOTHING
    n, rows, columns, channels = d_values.shape
    n_pixels = n * rows * columns
    part_pixels, how = cuda_launch.pixel_sums(n_pixels, channels)
    parts = cp.empty((how[0][0], channels), np.float64) if sums else NOTHING
    sizes = n_pixels, rows, columns, channels, pool, *d_out.shape[1:3], factor, part_pixels
    args = (out, place, d_out, *constants(*sizes), d_values, parts)
    launch("pooling", "unpool", d_values.dtype, how, *args)
    return parts


def max_pool2d_backward(place: Array, d_out: Array, size: int, shape: tuple[int, ...]) -> Array:
    """See :func:`kernels.max_pool2d_backward`; a place that is in no window gets nothing."""
    d_images = cp.empty(shape, d_out.dtype)
    _unpool(NOTHING, place, d_out, size, 1.0, d_images, sums=False)
    return d_images


def _image_gradient(weight: Array, d_values: Array, padding: int, d_images: Array) -> None:
    """Write the gradient of the images: a convolution with the filters turned round."""
    size, _, channels, n_filters = weight.shape
    turned = cp.empty((size, size, n_filters, channels), weight.dtype)
    how = cuda_launch.elements(weight.size)
    args = (weight, *constants(size * size, channels, n_filters), turned)
    launch("convolution", "turn_filters", weight.dtype, how, *args)
    border = size - 1 - padding
    _convolve(d_values, turned, NOTHING, border, 1, _NO_KEYS, 1.0, d_images, NOTHING)


def _weight_gradient(
    images: Array,
    d_values: Array,
    padding: int,
    d_weight: Array,
    bias_parts: Array = NOTHING,
    d_bias: Array = NOTHING,
) -> None:
    """Write the gradients of weight and, where there are parts of it, bias."""
    size, _, channels, n_filters = d_weight.shape
    _, rows, columns, _ = images.shape
    n, out_rows, out_columns, _ = d_values.shape
    n_pixels, n_patch, dtype = n * out_rows * out_columns, size * size * channels, images.dtype
    part_pixels, how = cuda_launch.weight_gradient(n_pixels, n_patch, n_filters, dtype.itemsize)
    n_parts = how[0][1]
    parts = cp.empty((n_parts, n_patch * n_filters), dtype)
    sizes = n_pixels, rows, columns, channels, n_filters, size, padding, out_rows, out_columns
    name = f"weight_gradient_{cuda_launch.filter_tile(n_filters)}"
    args = (images, d_values, *constants(*sizes, part_pixels), parts)
    launch("convolution", name, dtype, how, *args)
    n_bias_parts, n_bias = (0, 0) if bias_parts is NOTHING else bias_parts.shape
    args = (parts, *constants(n_parts, d_weight.size), d_weight)
    args += (bias_parts, *constants(n_bias_parts, n_bias), d_bias)
    how = cuda_launch.added_parts(d_weight.size, n_bias)
    launch("pooling", "add_gradients", dtype, how, *args)


def conv2d_backward(
    images: Array, weight: Array, d_out: Array, padding: int, with_images: bool
) -> tuple[Array | None, Array]:
    """See :func:`kernels.conv2d_backward`."""
    d_weight = cp.empty(weight.shape, images.dtype)
    _weight_gradient(images, d_out, padding, d_weight)
    if not with_images:
        return None, d_weight
    d_images = cp.empty(images.shape, images.dtype)
    _image_gradient(weight, d_out, padding, d_images)
    return d_images, d_weight


def conv2d_relu_backward(
    images: Array,
    weight: Array,
    out: Array,
    place: Array | None,
    d_out: Array,
    padding: int,
    pool: int,
    rate: float,
    d_images: Array | None,
    d_weight: Array,
    d_bias: Array,
) -> None:
    """See :func:`kernels.conv2d_relu_backward`."""
    d_values = cp.empty(_conv_shape(images, weight, padding), images.dtype)
    where = place if pool > 1 else NOTHING
    parts = _unpool(out, where, d_out, pool, 1 / (1 - rate), d_values, sums=True)
    _weight_gradient(images, d_values, padding, d_weight, parts, d_bias)
    if d_images is not None:
        _image_gradient(weight, d_values, padding, d_images)
