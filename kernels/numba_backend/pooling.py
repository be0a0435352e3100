"""Max-pooling: the largest number of each window, and where it was."""

from __future__ import annotations

import numpy as np

from kernels.numba_backend.pieces import do_pieces
from kernels.numba_backend.rows import fill, frozen, jit, jit_part


@jit_part
def _pool(t, images, size, outs, places):
    """Pool image t (H, W, C); place counts through the window in row order."""
    image, out, place = images[t], outs[t], places[t]
    height, width, n_channels = out.shape
    for y in range(height):
        for x in range(width):
            best, where = out[y, x], place[y, x]
            top_left = image[y * size, x * size]
            for c in range(n_channels):
                best[c] = top_left[c]
                where[c] = 0
            for number in range(1, size * size):
                numbers = image[y * size + number // size, x * size + number % size]
                for c in range(n_channels):
                    if numbers[c] > best[c]:
                        best[c] = numbers[c]
                        where[c] = number


@jit_part
def _unpool(t, places, d_outs, size, d_images):
    place, d_out, d_image = places[t], d_outs[t], d_images[t]
    for row in d_image:
        for pixel in row:
            fill(pixel, 0)
    height, width, n_channels = d_out.shape
    for y in range(height):
        for x in range(width):
            for c in range(n_channels):
                number = np.int64(place[y, x, c])
                d_image[y * size + number // size, x * size + number % size, c] = d_out[y, x, c]


@jit
def _pool_all(images, size, out, place):
    do_pieces(False, images.shape[0], _pool, (images, size, out, place))


@jit
def _unpool_all(place, d_out, size, d_images):
    do_pieces(False, d_out.shape[0], _unpool, (place, d_out, size, d_images))


def max_pool2d(images: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """See :func:`kernels.max_pool2d`."""
    n, rows, columns, n_channels = images.shape
    shape = (n, rows // size, columns // size, n_channels)
    out, place = np.empty(shape, images.dtype), np.empty(shape, np.uint8)
    _pool_all(*frozen(np.ascontiguousarray(images)), size, out, place)
    return out, place


def max_pool2d_backward(
    place: np.ndarray, d_out: np.ndarray, size: int, shape: tuple[int, ...]
) -> np.ndarray:
    """See :func:`kernels.max_pool2d_backward`."""
    d_images = np.empty(shape, d_out.dtype)
    _unpool_all(*frozen(place, np.ascontiguousarray(d_out)), size, d_images)
    return d_images
