"""Tiles: compiled and as NumPy they mean the same."""

import numpy as np
import pytest
from numba import njit

from kernels.numba_backend.tile import add_products, add_tile, store_tile, tile_width, zero_tile
from tests.cases import DTYPES, JIT


def products(numbers, weights, step, rows, out):
    tile = zero_tile(numbers, rows)
    for k in range(3):
        tile = add_products(tile, numbers, k, step, weights, k * tile_width(weights))
    store_tile(tile, out, 1, tile_width(out) + 2)
    store_tile(add_tile(tile, out, 1, tile_width(out) + 2), out, 1, tile_width(out) + 2)


@pytest.mark.skipif(not JIT, reason="compares compiled code with Python")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows", [1, 3, 13])
def test_a_tile_sums_products_and_touches_its_own_rows_alone(n_rows, dtype):
    rng = np.random.default_rng(n_rows)
    step, width = 4, tile_width(np.empty(0, dtype))
    # Whole numbers: sums are exact, with one rounding or two.
    numbers = rng.integers(-9, 10, size=3 + n_rows * step).astype(dtype)
    weights = rng.integers(-9, 10, size=3 * width).astype(dtype)
    out = np.full(n_rows * (width + 2) + 1, -1, dtype)
    expected, plain = out.copy(), out.copy()
    for r in range(n_rows):
        start = 1 + r * (width + 2)
        row = sum(numbers[r * step + k] * weights[k * width :][:width] for k in range(3))
        expected[start : start + width] = 2 * row
    rows = (0,) * n_rows
    products(numbers, weights, step, rows, plain)
    njit(products)(numbers, weights, step, rows, out)
    assert np.array_equal(plain, expected)
    assert np.array_equal(out, expected)
