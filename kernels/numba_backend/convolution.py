"""Convolution: one block of vectors in registers for all three directions, no patches laid out.

A row of a filter covers ``size * C`` numbers that lie side by side in an image row (channels last),
so a convolution is a sum of short matrix products: pixels x (size * C) times (size * C) x filters.
A block of six pixels by two vectors of filters stays in twelve registers while that sum runs; six
numbers of the image are each multiplied with the two vectors of weights.

The gradient of the images is a convolution too: of the output's gradient, framed in zeros, with
the filters turned round. The gradient of the weights is the same block with other roles: six
numbers of a filter row by two vectors of filters, summed over the pixels.

Images are shared out to threads in chunks; each has its own sum of weight gradients, and these are
added in their order.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from kernels.numba_backend.rows import frozen, jit, jit_parallel, jit_row
from kernels.numba_backend.vector import first, lanes, load, muladd, splat, store

# Images that one piece of work takes.
_IMAGES = 8
# Rows of a block; with two vectors each, twelve sums, which the processor keeps in registers.
_BLOCK = 6


@jit
def _convolve(image, weight_ak, n_channels, n_filters, out):
    """Write one image's output; rows (Hp, Wp * C), weights (size, size * C * F), (Ho, Wo * F)."""
    size, run = weight_ak.shape[0], np.uint64(weight_ak.shape[1] // n_filters)
    width, columns = lanes(weight_ak[0]), out.shape[1] // n_filters
    zero = splat(weight_ak[0], 0.0)
    for y in range(out.shape[0]):
        for f in range(0, n_filters, 2 * width):
            some_0 = first(weight_ak[0], n_filters - f)
            some_1 = first(weight_ak[0], n_filters - f - width)
            for start in range(0, columns, _BLOCK):
                # The last block overlaps the one before; where there are too few pixels, the last
                # one is worked out more than once.
                x = max(0, min(start, columns - _BLOCK))
                x1, x2 = min(x + 1, columns - 1), min(x + 2, columns - 1)
                x3, x4 = min(x + 3, columns - 1), min(x + 4, columns - 1)
                x5 = min(x + 5, columns - 1)
                p0, p1 = np.uint64(x * n_channels), np.uint64(x1 * n_channels)
                p2, p3 = np.uint64(x2 * n_channels), np.uint64(x3 * n_channels)
                p4, p5 = np.uint64(x4 * n_channels), np.uint64(x5 * n_channels)
                a0, a1, a2, a3, a4, a5 = zero, zero, zero, zero, zero, zero
                b0, b1, b2, b3, b4, b5 = zero, zero, zero, zero, zero, zero
                for a in range(size):
                    row, weights = image[y + a], weight_ak[a]
                    for k in range(run):
                        place = k * np.uint64(n_filters) + np.uint64(f)
                        v = load(weights, place, some_0, zero)
                        w = load(weights, place + np.uint64(width), some_1, zero)
                        u0, u1 = splat(row, row[p0 + k]), splat(row, row[p1 + k])
                        a0, b0 = muladd(u0, v, a0), muladd(u0, w, b0)
                        a1, b1 = muladd(u1, v, a1), muladd(u1, w, b1)
                        u2, u3 = splat(row, row[p2 + k]), splat(row, row[p3 + k])
                        a2, b2 = muladd(u2, v, a2), muladd(u2, w, b2)
                        a3, b3 = muladd(u3, v, a3), muladd(u3, w, b3)
                        u4, u5 = splat(row, row[p4 + k]), splat(row, row[p5 + k])
                        a4, b4 = muladd(u4, v, a4), muladd(u4, w, b4)
                        a5, b5 = muladd(u5, v, a5), muladd(u5, w, b5)
                o = out[y]
                store(o, x * n_filters + f, some_0, a0)
                store(o, x1 * n_filters + f, some_0, a1)
                store(o, x2 * n_filters + f, some_0, a2)
                store(o, x3 * n_filters + f, some_0, a3)
                store(o, x4 * n_filters + f, some_0, a4)
                store(o, x5 * n_filters + f, some_0, a5)
                store(o, x * n_filters + f + width, some_1, b0)
                store(o, x1 * n_filters + f + width, some_1, b1)
                store(o, x2 * n_filters + f + width, some_1, b2)
                store(o, x3 * n_filters + f + width, some_1, b3)
                store(o, x4 * n_filters + f + width, some_1, b4)
                store(o, x5 * n_filters + f + width, some_1, b5)


@jit
def _framed(image, padding, n_channels, framed):
    """Copy an image (H, W * C) into the middle of one whose border is zero."""
    start = padding * n_channels
    for y in range(image.shape[0]):
        source, target = image[y], framed[y + padding]
        for k in range(source.shape[0]):
            target[start + k] = source[k]


@jit
def _convolve_chunk(images, weight_ak, n_channels, n_filters, padding, start, out):
    n, rows, length = images.shape
    framed = np.zeros((rows + 2 * padding, length + 2 * padding * n_channels), images.dtype)
    for t in range(start, min(start + _IMAGES, n)):
        if padding == 0:
            _convolve(images[t], weight_ak, n_channels, n_filters, out[t])
        else:
            _framed(images[t], padding, n_channels, framed)
            _convolve(framed, weight_ak, n_channels, n_filters, out[t])


@jit_parallel
def _convolve_all(images, weight_ak, n_channels, n_filters, padding, out):
    for piece in prange((images.shape[0] + _IMAGES - 1) // _IMAGES):
        start = np.int64(piece) * _IMAGES
        _convolve_chunk(images, weight_ak, n_channels, n_filters, padding, start, out)


@jit
def _add_weight_gradient(image, d_out, n_channels, n_filters, d_weight_ak):
    """Add one image's part of the gradient of the weights."""
    run = d_weight_ak.shape[1] // n_filters
    width, columns = lanes(d_weight_ak[0]), d_out.shape[1] // n_filters
    zero = splat(d_weight_ak[0], 0.0)
    for a in range(d_weight_ak.shape[0]):
        d_weights = d_weight_ak[a]
        for f in range(0, n_filters, 2 * width):
            some_0 = first(d_weights, n_filters - f)
            some_1 = first(d_weights, n_filters - f - width)
            for k in range(0, run, _BLOCK):
                # Beyond the row's end the last number is taken again, and not stored.
                k0, k1 = np.uint64(k), np.uint64(min(k + 1, run - 1))
                k2, k3 = np.uint64(min(k + 2, run - 1)), np.uint64(min(k + 3, run - 1))
                k4, k5 = np.uint64(min(k + 4, run - 1)), np.uint64(min(k + 5, run - 1))
                a0, a1, a2, a3, a4, a5 = zero, zero, zero, zero, zero, zero
                b0, b1, b2, b3, b4, b5 = zero, zero, zero, zero, zero, zero
                for y in range(d_out.shape[0]):
                    row, d = image[y + a], d_out[y]
                    for x in range(np.uint64(columns)):
                        place = x * np.uint64(n_filters) + np.uint64(f)
                        v = load(d, place, some_0, zero)
                        w = load(d, place + np.uint64(width), some_1, zero)
                        p = x * np.uint64(n_channels)
                        u0, u1 = splat(row, row[p + k0]), splat(row, row[p + k1])
                        a0, b0 = muladd(u0, v, a0), muladd(u0, w, b0)
                        a1, b1 = muladd(u1, v, a1), muladd(u1, w, b1)
                        u2, u3 = splat(row, row[p + k2]), splat(row, row[p + k3])
                        a2, b2 = muladd(u2, v, a2), muladd(u2, w, b2)
                        a3, b3 = muladd(u3, v, a3), muladd(u3, w, b3)
                        u4, u5 = splat(row, row[p + k4]), splat(row, row[p + k5])
                        a4, b4 = muladd(u4, v, a4), muladd(u4, w, b4)
                        a5, b5 = muladd(u5, v, a5), muladd(u5, w, b5)
                left = run - k
                _add_row(d_weights, (k + 0) * n_filters + f, left > 0, some_0, a0, some_1, b0)
                _add_row(d_weights, (k + 1) * n_filters + f, left > 1, some_0, a1, some_1, b1)
                _add_row(d_weights, (k + 2) * n_filters + f, left > 2, some_0, a2, some_1, b2)
                _add_row(d_weights, (k + 3) * n_filters + f, left > 3, some_0, a3, some_1, b3)
                _add_row(d_weights, (k + 4) * n_filters + f, left > 4, some_0, a4, some_1, b4)
                _add_row(d_weights, (k + 5) * n_filters + f, left > 5, some_0, a5, some_1, b5)


@jit_row
def _add_row(row, place, there, some_0, a, some_1, b):
    """Add two vectors to a row, if it is there."""
    if there:
        store(row, place, some_0, load(row, place, some_0, a) + a)
        place += lanes(row)
        store(row, place, some_1, load(row, place, some_1, b) + b)


@jit
def _weight_gradient_of_chunk(images, d_out, n_channels, n_filters, padding, start, d_weight_ak):
    n, rows, length = images.shape
    framed = np.zeros((rows + 2 * padding, length + 2 * padding * n_channels), images.dtype)
    d_weight_ak[:] = 0
    for t in range(start, min(start + _IMAGES, n)):
        if padding == 0:
            _add_weight_gradient(images[t], d_out[t], n_channels, n_filters, d_weight_ak)
        else:
            _framed(images[t], padding, n_channels, framed)
            _add_weight_gradient(framed, d_out[t], n_channels, n_filters, d_weight_ak)


@jit_parallel
def _weight_gradients(images, d_out, n_channels, n_filters, padding, d_weight_pak):
    for piece in prange(d_weight_pak.shape[0]):
        _weight_gradient_of_chunk(
            images,
            d_out,
            n_channels,
            n_filters,
            padding,
            np.int64(piece) * _IMAGES,
            d_weight_pak[piece],
        )


def _rows(images: np.ndarray) -> np.ndarray:
    """Return images as (n, rows, columns * channels), read-only."""
    n, rows = images.shape[:2]
    return frozen(np.ascontiguousarray(images).reshape(n, rows, -1))[0]


def _filters(weight: np.ndarray) -> np.ndarray:
    """Return filters as (size, size * C * F), read-only."""
    return frozen(np.ascontiguousarray(weight).reshape(len(weight), -1))[0]


def conv2d(images: np.ndarray, weight: np.ndarray, padding: int) -> np.ndarray:
    """See :func:`kernels.conv2d`."""
    n, rows, columns, n_channels = images.shape
    size, _, _, n_filters = weight.shape
    lost = size - 1 - 2 * padding
    out = np.empty((n, rows - lost, columns - lost, n_filters), images.dtype)
    flat = out.reshape(n, rows - lost, -1)
    _convolve_all(_rows(images), _filters(weight), n_channels, n_filters, padding, flat)
    return out


def conv2d_backward(
    images: np.ndarray, weight: np.ndarray, d_out: np.ndarray, padding: int, with_images: bool
) -> tuple[np.ndarray | None, np.ndarray]:
    """See :func:`kernels.conv2d_backward`."""
    size, _, n_channels, n_filters = weight.shape
    n_pieces = (len(images) + _IMAGES - 1) // _IMAGES
    d_weight_pak = np.empty((n_pieces, size, size * n_channels * n_filters), images.dtype)
    _weight_gradients(_rows(images), _rows(d_out), n_channels, n_filters, padding, d_weight_pak)
    d_weight = d_weight_pak.sum(axis=0, dtype=np.float64).astype(images.dtype)
    if not with_images:
        return None, d_weight.reshape(weight.shape)
    turned = weight[::-1, ::-1].transpose(0, 1, 3, 2)
    return conv2d(d_out, turned, size - 1 - padding), d_weight.reshape(weight.shape)
