"""Convolution, with what follows it in a network: one tile for all directions, no patches laid out.

A row of a filter covers ``size * C`` numbers that lie side by side in an image row (channels last),
so a convolution is a sum of rank-1 updates of a tile: some pixels side by side by two vectors of
filters. The gradient of the images is a convolution too: of the output's gradient, framed in zeros,
with the filters turned round. The gradient of the weights is the same tile with other roles: some
numbers of a filter row by two vectors of filters, summed over the pixels.

Bias, ReLU, max-pooling and dropout follow while the rows they need are still in the first cache:
the output before them is never stored. The backward pass undoes them, image by image, where it
frames the gradient. Of the memory that a chunk needs for that, most is a frame of one image.

Images are shared out to threads in chunks; each has its own sum of weight gradients, and these are
added in their order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llvmlite.binding import get_host_cpu_features

from kernels.numba_backend.network import drop_row
from kernels.numba_backend.pieces import do_pieces
from kernels.numba_backend.rows import fill, frozen, jit, jit_part, jit_row
from kernels.numba_backend.tile import add_products, add_tile, store_tile, tile_width, zero_tile
from kernels.numba_backend.vector import equal, first, lanes, less, load, splat, store, where

# Images that one piece of work takes.
_IMAGES = 8
# Rows that a tile may have, along a row of the image and along one of a filter: what fills a usual
# row with little waste. Six by two sums are enough to keep the processor's multipliers busy, and
# where there are 32 registers of a whole vector thirteen by two still fit.
_WIDE = get_host_cpu_features().get("avx512f", False)
_HEIGHTS = (13, 10, 7, 6) if _WIDE else (3, 3, 3, 3)
_WEIGHT_HEIGHTS = (9, 6, 3) if _WIDE else (3, 3, 3)
# As Numba is to know them: by a tuple's length.
_ROWS = tuple((0,) * height for height in _HEIGHTS)
_WEIGHT_ROWS = tuple((0,) * height for height in _WEIGHT_HEIGHTS)


class Shape(NamedTuple):
    """Sizes of a convolution."""

    rows: int
    columns: int
    n_channels: int
    size: int
    n_filters: int
    padding: int
    pool: int

    @property
    def lost(self) -> int:
        """Rows and columns that the output has less than the images."""
        return self.size - 1 - 2 * self.padding


def _tile_height(heights: tuple[int, ...], length: int) -> int:
    """Return how high tiles should be that are to cover so many numbers."""
    return min(heights, key=lambda height: -(-length // height) * height)


@jit_part
def _convolve_in_tiles(
    rows, frame, y, border, n_rows, pitch, n_channels, size, weights, columns, out
):
    """Write row y of the output to ``out``: columns x filters, these filled up with zeros.

    The frame's rows are ``pitch`` apart; ``border`` rows of zeros lie before and behind ``n_rows``.
    Weights are (filters / width, size, size * C, width), flat.
    """
    first_row, last_row = max(0, border - y), min(size, border + n_rows - y)
    width = tile_width(weights)
    run = size * n_channels
    n_blocks = weights.shape[0] // (size * run * width)
    for block in range(n_blocks):
        for column in range(0, columns, len(rows)):
            # The last tile overlaps the one before.
            x = max(0, min(column, columns - len(rows)))
            tile = zero_tile(weights, rows)
            place = (block * size + first_row) * run * width
            for a in range(first_row, last_row):
                source = (y + a) * pitch + x * n_channels
                for k in range(run):
                    tile = add_products(tile, frame, source + k, n_channels, weights, place)
                    place += width
            store_tile(tile, out, (x * n_blocks + block) * width, n_blocks * width)


@jit_part
def _convolve_row(height, arguments):
    """Do so in tiles of that height."""
    if height == len(_ROWS[0]):
        _convolve_in_tiles(_ROWS[0], *arguments)
    elif height == len(_ROWS[1]):
        _convolve_in_tiles(_ROWS[1], *arguments)
    elif height == len(_ROWS[2]):
        _convolve_in_tiles(_ROWS[2], *arguments)
    else:
        _convolve_in_tiles(_ROWS[3], *arguments)


@jit_part
def _copy_row(scratch, pitch, columns, n_filters, out):
    for x in range(columns):
        for f in range(n_filters):
            out[x * n_filters + f] = scratch[x * pitch + f]


@jit_row
def _activate_row(scratch, row_pitch, pitch, bias, pool, n_filters, out, place):
    """Write max(scratch + bias, 0), its largest number in each window, and where that was."""
    zero = splat(out, 0.0)
    for f in range(0, n_filters, lanes(out)):
        some = first(out, n_filters - f)
        bias_f = load(bias, f, some, zero)
        for x in range(out.shape[0] // n_filters):
            best, number = zero, zero
            for a in range(pool):
                for b in range(pool):
                    start = a * row_pitch + (x * pool + b) * pitch + f
                    value = load(scratch, start, some, zero) + bias_f
                    larger = less(best, value)
                    best = where(larger, value, best)
                    number = where(larger, splat(out, a * pool + b), number)
            store(out, x * n_filters + f, some, best)
            if pool > 1:
                store(place, x * n_filters + f, some, number)


@jit_part
def _fill_frame(image, frame, pitch, start, length):
    """Copy rows of that length to where they start in the frame."""
    for y in range(image.shape[0] // length):
        for k in range(length):
            frame[start + y * pitch + k] = image[y * length + k]


@jit_part
def _forward_chunk(
    chunk, images, weights, bias, shape, activates, drops, keys, factor, height, out, place
):
    n_rows, columns, n_channels, size, n_filters, padding, pool = shape
    width = tile_width(weights)
    lost = size - 1 - 2 * padding
    frame_pitch = (columns + 2 * padding) * n_channels
    framed = padding > 0 or columns - lost < height
    slack = height * n_channels
    frame = np.zeros(framed * (n_rows + 2 * padding) * frame_pitch + slack, images.dtype)
    pitch = (n_filters + width - 1) // width * width
    row_pitch = max(columns - lost, height) * pitch
    scratch = np.empty(pool * row_pitch, images.dtype)
    for t in range(chunk * _IMAGES, min((chunk + 1) * _IMAGES, images.shape[0])):
        source = images[t]
        if framed:
            start = padding * (frame_pitch + n_channels)
            _fill_frame(images[t], frame, frame_pitch, start, columns * n_channels)
            source = frame
        for y in range(out.shape[1]):
            for a in range(pool):
                arguments = (
                    source,
                    y * pool + a,
                    padding,
                    n_rows,
                    frame_pitch,
                    n_channels,
                    size,
                    weights,
                    columns - lost,
                    scratch[a * row_pitch :],
                )
                _convolve_row(height, arguments)
            if not activates:
                _copy_row(scratch, pitch, columns - lost, n_filters, out[t, y])
                continue
            where_to = place[t, y] if pool > 1 else place[0, 0]
            _activate_row(scratch, row_pitch, pitch, bias, pool, n_filters, out[t, y], where_to)
            if drops:
                counter = (t * out.shape[1] + y) * out.shape[2]
                drop_row(out[t, y], counter, keys[0], keys[1], keys[2], factor)


@jit
def _forward(n_chunks, arguments):
    do_pieces(False, n_chunks, _forward_chunk, arguments)


@jit_row
def _unpool_row(out, place, d_out, factor, pool, n_filters, frame, start, pitch, total_f):
    """Write to the frame the gradient before ReLU and pooling; add its sums to ``total_f``."""
    zero, factors = splat(d_out, 0.0), splat(d_out, factor)
    for f in range(0, n_filters, lanes(d_out)):
        some, total = first(d_out, n_filters - f), zero
        for x in range(d_out.shape[0] // n_filters):
            at = x * n_filters + f
            active = less(zero, load(out, at, some, zero))
            d = where(active, load(d_out, at, some, zero) * factors, zero)
            total = total + d
            if pool == 1:
                store(frame, start + at, some, d)
                continue
            number = load(place, at, some, zero)
            for a in range(pool):
                for b in range(pool):
                    there = equal(number, splat(d_out, a * pool + b))
                    target = start + a * pitch + (x * pool + b) * n_filters + f
                    store(frame, target, some, where(there, d, zero))
        store(total_f, f, some, load(total_f, f, some, zero) + total)


@jit_part
def _add_weight_gradient_in_tiles(
    rows,
    frame,
    pitch,
    n_channels,
    d_frame,
    d_start,
    d_pitch,
    n_filters,
    n_rows,
    columns,
    size,
    sums,
):
    """Add one image's part to the sums: (filters / width, size, pieces of a row, rows, width)."""
    width = tile_width(sums)
    run = size * n_channels
    place = 0
    for f in range(0, n_filters, width):
        for a in range(size):
            for piece in range(0, run, len(rows)):
                k = max(0, min(piece, run - len(rows)))
                tile = zero_tile(sums, rows)
                for y in range(n_rows):
                    source, d = (y + a) * pitch + k, d_start + y * d_pitch + f
                    for _ in range(columns):
                        tile = add_products(tile, frame, source, 1, d_frame, d)
                        source += n_channels
                        d += n_filters
                store_tile(add_tile(tile, sums, place, width), sums, place, width)
                place += len(rows) * width


@jit_part
def _add_weight_gradient(height, arguments):
    """Do so in tiles of that height."""
    if height == len(_WEIGHT_ROWS[0]):
        _add_weight_gradient_in_tiles(_WEIGHT_ROWS[0], *arguments)
    elif height == len(_WEIGHT_ROWS[1]):
        _add_weight_gradient_in_tiles(_WEIGHT_ROWS[1], *arguments)
    else:
        _add_weight_gradient_in_tiles(_WEIGHT_ROWS[2], *arguments)


@jit_part
def _backward_chunk(
    chunk,
    images,
    turned,
    out,
    place,
    d_out,
    shape,
    activated,
    factor,
    height,
    weight_height,
    d_images,
    sums_p,
    total_pf,
):
    sums, total_f = sums_p[chunk], total_pf[chunk]
    n_rows, columns, n_channels, size, n_filters, padding, pool = shape
    width = tile_width(turned)
    lost, border = size - 1 - 2 * padding, size - 1 - padding
    pitch = (columns + 2 * padding) * n_channels
    framed = padding > 0 or size * n_channels < weight_height
    slack = weight_height
    frame = np.zeros(framed * (n_rows + 2 * padding) * pitch + slack, images.dtype)
    d_pitch = (columns - lost + 2 * border) * n_filters
    d_start = border * (d_pitch + n_filters)
    slack = height * n_filters + width
    d_frame = np.zeros((n_rows - lost + 2 * border) * d_pitch + slack, images.dtype)
    scratch_pitch = (n_channels + width - 1) // width * width
    direct = columns >= height and n_channels == scratch_pitch
    scratch = np.empty(max(columns, height) * scratch_pitch, images.dtype)
    total = np.zeros(n_filters, images.dtype)
    fill(sums, 0)
    fill(total_f, 0)
    for t in range(chunk * _IMAGES, min((chunk + 1) * _IMAGES, images.shape[0])):
        source = images[t]
        if framed:
            start = padding * (pitch + n_channels)
            _fill_frame(images[t], frame, pitch, start, columns * n_channels)
            source = frame
        if activated:
            for y in range(d_out.shape[1]):
                start = d_start + y * pool * d_pitch
                whence = place[t, y] if pool > 1 else place[0, 0]
                fill(total, 0)
                _unpool_row(
                    out[t, y],
                    whence,
                    d_out[t, y],
                    factor,
                    pool,
                    n_filters,
                    d_frame,
                    start,
                    d_pitch,
                    total,
                )
                for f in range(n_filters):
                    total_f[f] += total[f]
        else:
            for y in range(d_out.shape[1]):
                for k in range(d_out.shape[2]):
                    d_frame[d_start + y * d_pitch + k] = d_out[t, y, k]
        for y in range(d_images.shape[1]):
            target = d_images[t, y] if direct else scratch
            arguments = (
                d_frame,
                y,
                border,
                n_rows - lost,
                d_pitch,
                n_filters,
                size,
                turned,
                columns,
                target,
            )
            _convolve_row(height, arguments)
            if not direct:
                _copy_row(scratch, scratch_pitch, columns, n_channels, d_images[t, y])
        weight_arguments = (
            source,
            pitch,
            n_channels,
            d_frame,
            d_start,
            d_pitch,
            n_filters,
            n_rows - lost,
            columns - lost,
            size,
            sums,
        )
        _add_weight_gradient(weight_height, weight_arguments)


@jit
def _backward(n_chunks, arguments):
    do_pieces(False, n_chunks, _backward_chunk, arguments)


@jit_part
def _sum_weight_gradient(ak, sums_p, height, d_weight_af):
    """Write the chunks' sum, in float64 and in their order, at one place a, k of the filters."""
    size, run, n_filters = d_weight_af.shape
    width = tile_width(sums_p[0])
    n_tiles = (run + height - 1) // height
    a, k = ak // run, ak % run
    number = min(k // height, n_tiles - 1)
    row = k - max(0, min(number * height, run - height))
    for f in range(n_filters):
        tile = (f // width * size + a) * n_tiles + number
        place = (tile * height + row) * width + f % width
        total = 0.0
        for piece in range(sums_p.shape[0]):
            total += sums_p[piece, place]
        d_weight_af[a, k, f] = total


@jit
def _sum_weight_gradients(sums_p, height, d_weight_af):
    n_places = d_weight_af.shape[0] * d_weight_af.shape[1]
    do_pieces(False, n_places, _sum_weight_gradient, (sums_p, height, d_weight_af))


def _shape(images, weight, padding, pool):
    _, rows, columns, n_channels = images.shape
    return Shape(rows, columns, n_channels, len(weight), weight.shape[3], padding, pool)


def _packed(weight: np.ndarray) -> np.ndarray:
    """Return filters (size, size, C, F) as (F / width, size, size * C, width), flat."""
    size, _, n_channels, n_filters = weight.shape
    width = tile_width(weight)
    n_blocks = -(-n_filters // width)
    packed = np.zeros((n_blocks, size, size, n_channels, width), weight.dtype)
    for block in range(n_blocks):
        some = weight[..., block * width : (block + 1) * width]
        packed[block, ..., : some.shape[3]] = some
    return packed.ravel()


def _numbers(images: np.ndarray) -> np.ndarray:
    """Return images as (n, rows * columns * channels), of the same Numba type as a frame."""
    return np.require(images, requirements=["C", "W"]).reshape(len(images), -1)


def _rows(images: np.ndarray) -> np.ndarray:
    """Return images as (n, rows, columns * channels), read-only."""
    n, rows = images.shape[:2]
    return frozen(np.ascontiguousarray(images).reshape(n, rows, -1))[0]


_NO_PLACE = np.empty((1, 1, 0), np.uint8)
_NO_KEYS = (np.uint32(0), np.uint32(0), np.uint32(0))


def _run_forward(images, weight, bias, padding, pool, activates, drops, keys, factor, out, place):
    shape = _shape(images, weight, padding, pool)
    arguments = (
        _numbers(images),
        *frozen(_packed(weight), bias),
        tuple(shape),
        activates,
        drops,
        keys,
        factor,
        _tile_height(_HEIGHTS, shape.columns - shape.lost),
        out.reshape(*out.shape[:2], -1),
        _NO_PLACE if place is None else place.reshape(*place.shape[:2], -1),
    )
    _forward(-(-len(images) // _IMAGES), arguments)


def conv2d(images: np.ndarray, weight: np.ndarray, padding: int) -> np.ndarray:
    """See :func:`kernels.conv2d`."""
    shape = _shape(images, weight, padding, 1)
    n_rows, columns = shape.rows - shape.lost, shape.columns - shape.lost
    out = np.empty((len(images), n_rows, columns, shape.n_filters), images.dtype)
    factor = images.dtype.type(1)
    _run_forward(
        images, weight, weight[0, 0, 0], padding, 1, False, False, _NO_KEYS, factor, out, None
    )
    return out


def conv2d_relu(
    images: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    padding: int,
    pool: int,
    rate: float,
    keys: tuple[int, int, int],
    out: np.ndarray,
    place: np.ndarray | None,
) -> None:
    """See :func:`kernels.conv2d_relu`."""
    factor = images.dtype.type(1 / (1 - rate))
    key_1, key_2, least = (np.uint32(key) for key in keys)
    with np.errstate(over="ignore"):  # the hash wraps around; run as Python, NumPy would warn
        _run_forward(
            images,
            weight,
            bias,
            padding,
            pool,
            True,
            rate > 0,
            (key_1, key_2, least),
            factor,
            out,
            place,
        )


def _run_backward(
    images, weight, out, place, d_out, padding, pool, activated, factor, d_images, d_weight
):
    """Write d_images, where it is not None, and d_weight; return the sums for the bias."""
    shape = _shape(images, weight, padding, pool)
    run, width = shape.size * shape.n_channels, tile_width(weight)
    height, weight_height = (
        _tile_height(_HEIGHTS, shape.columns),
        _tile_height(_WEIGHT_HEIGHTS, run),
    )
    n_pieces = -(-len(images) // _IMAGES)
    n_sums = -(-shape.n_filters // width) * shape.size * -(-run // weight_height)
    sums_p = np.empty((n_pieces, n_sums * weight_height * width), images.dtype)
    total_pf = np.empty((n_pieces, shape.n_filters))
    no_images = np.empty((len(images), 0, 0), images.dtype)
    arguments = (
        _numbers(images),
        *frozen(
            _packed(weight[::-1, ::-1].transpose(0, 1, 3, 2)),
            _rows(out),
            _NO_PLACE if place is None else place.reshape(*place.shape[:2], -1),
            _rows(d_out),
        ),
        tuple(shape),
        activated,
        factor,
        height,
        weight_height,
        no_images if d_images is None else d_images.reshape(*d_images.shape[:2], -1),
        sums_p,
        total_pf,
    )
    _backward(n_pieces, arguments)
    _sum_weight_gradients(sums_p, weight_height, d_weight.reshape(shape.size, run, -1))
    return total_pf


def conv2d_backward(
    images: np.ndarray, weight: np.ndarray, d_out: np.ndarray, padding: int, with_images: bool
) -> tuple[np.ndarray | None, np.ndarray]:
    """See :func:`kernels.conv2d_backward`."""
    d_images = np.empty(images.shape, images.dtype) if with_images else None
    d_weight = np.empty(weight.shape, images.dtype)
    one = images.dtype.type(1)
    _run_backward(images, weight, d_out, None, d_out, padding, 1, False, one, d_images, d_weight)
    return d_images, d_weight


def conv2d_relu_backward(
    images: np.ndarray,
    weight: np.ndarray,
    out: np.ndarray,
    place: np.ndarray | None,
    d_out: np.ndarray,
    padding: int,
    pool: int,
    rate: float,
    d_images: np.ndarray | None,
    d_weight: np.ndarray,
    d_bias: np.ndarray,
) -> None:
    """See :func:`kernels.conv2d_relu_backward`."""
    factor = images.dtype.type(1 / (1 - rate))
    total_pf = _run_backward(
        images, weight, out, place, d_out, padding, pool, True, factor, d_images, d_weight
    )
    d_bias[...] = total_pf.sum(axis=0)
