"""A tile: sums of a few rows by two vectors, kept in registers while products are added to them.

A matrix product or a convolution is a sum of rank-1 updates: a few numbers, each multiplied with
the same two vectors. A tile is what they are added to. To Numba it is a tuple of vectors, those of
a row side by side, so that its number of rows is known when a loop is compiled; ``rows``, a tuple
of that many numbers, says how many are wanted.

As in :mod:`kernels.numba_backend.vector` each operation comes with its meaning in NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils

from kernels.numba_backend.vector import (
    BYTES,
    Vector,
    address_of,
    broadcast,
    constant,
    fmuladd,
    instructions,
    lanes,
    vector_kind,
)

VECTORS = 2


def tile_width(row):
    """Return how many numbers of a row's dtype one row of a tile holds."""
    return VECTORS * lanes(row)


@instructions(tile_width, lambda row: types.intp)
def _tile_width(context, builder, signature, arguments):
    n = VECTORS * BYTES * 8 // signature.args[0].dtype.bitwidth
    return context.get_constant(types.intp, n)


def zero_tile(numbers, rows):
    """Return a tile of zeros with that many rows, of the dtype of ``numbers``."""
    return (np.zeros(lanes(numbers), numbers.dtype),) * (VECTORS * len(rows))


def _type_of_tile(numbers: Any, rows: Any) -> Any:
    return types.UniTuple(Vector(numbers.dtype), VECTORS * rows.count)


@instructions(zero_tile, lambda numbers, rows: _type_of_tile(numbers, rows))
def _zero_tile(context, builder, signature, arguments):
    tile = signature.return_type
    zero = constant(vector_kind(tile.dtype), 0.0)
    return context.make_tuple(builder, tile, [zero] * tile.count)


def _places(context, builder, row_type, row, index, step, tile):
    """Yield the address of row[index + r * step + i * lanes] for every vector i of every row r."""
    kind = vector_kind(tile.dtype)
    for r in range(tile.count // VECTORS):
        first = builder.add(index, builder.mul(step, step.type(r)))
        for i in range(VECTORS):
            place = builder.add(first, first.type(i * kind.count))
            address = address_of(context, builder, row_type, row, place)
            yield builder.bitcast(address, kind.as_pointer())


def _align(tile: Any) -> int:
    return tile.dtype.real.bitwidth // 8


def add_products(tile, numbers, index, step, weights, place):
    """Return tile + numbers[index], numbers[index + step], ... times the vectors at a place."""
    width = len(tile[0])
    return tuple(
        tile[VECTORS * r + i]
        + numbers[index + r * step] * weights[place + i * width : place + (i + 1) * width]
        for r in range(len(tile) // VECTORS)
        for i in range(VECTORS)
    )


def _one_row(tile):
    return types.UniTuple(tile.dtype, VECTORS)


@instructions(add_products, lambda tile, numbers, index, step, weights, place: tile)
def _add_products(context, builder, signature, arguments):
    sums, numbers, index, step, weights, place = arguments
    tile, at = signature.return_type, signature.args
    kind = vector_kind(tile.dtype)
    vectors = [
        builder.load(address, align=_align(tile))
        for address in _places(
            context, builder, at[4], weights, place, place.type(0), _one_row(tile)
        )
    ]
    old, new = cgutils.unpack_tuple(builder, sums, tile.count), []
    for r in range(tile.count // VECTORS):
        number = builder.add(index, builder.mul(step, step.type(r)))
        number = builder.load(address_of(context, builder, at[1], numbers, number))
        number = broadcast(builder, kind, number)
        for i in range(VECTORS):
            new.append(fmuladd(builder, tile.dtype, number, vectors[i], old[VECTORS * r + i]))
    return context.make_tuple(builder, tile, new)


def store_tile(tile, row, index, step):
    """Write a tile's rows to row[index], row[index + step], ... and the numbers after each."""
    width = len(tile[0])
    for r in range(len(tile) // VECTORS):
        for i in range(VECTORS):
            start = index + r * step + i * width
            row[start : start + width] = tile[VECTORS * r + i]


@instructions(store_tile, lambda tile, row, index, step: types.void)
def _store_tile(context, builder, signature, arguments):
    sums, row, index, step = arguments
    tile = signature.args[0]
    addresses = _places(context, builder, signature.args[1], row, index, step, tile)
    for vector, address in zip(
        cgutils.unpack_tuple(builder, sums, tile.count), addresses, strict=True
    ):
        builder.store(vector, address, align=_align(tile))
    return context.get_dummy_value()


def add_tile(tile, row, index, step):
    """Return the sum of a tile and the one that :func:`store_tile` wrote there."""
    width = len(tile[0])
    return tuple(
        vector + row[index + n // VECTORS * step + n % VECTORS * width :][:width]
        for n, vector in enumerate(tile)
    )


@instructions(add_tile, lambda tile, row, index, step: tile)
def _add_tile(context, builder, signature, arguments):
    sums, row, index, step = arguments
    tile = signature.return_type
    addresses = _places(context, builder, signature.args[1], row, index, step, tile)
    new = [
        builder.fadd(vector, builder.load(address, align=_align(tile)))
        for vector, address in zip(
            cgutils.unpack_tuple(builder, sums, tile.count), addresses, strict=True
        )
    ]
    return context.make_tuple(builder, tile, new)
