"""The vectors that row functions are written with: compiled and as NumPy they mean the same."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
from numba import njit
from numba.core.errors import TypingError

from kernels.numba_backend import vector
from kernels.numba_backend.vector import (
    equal,
    exp,
    exp_up,
    first,
    lane_max,
    lane_sum,
    lanes,
    less,
    load,
    muladd,
    splat,
    square_memory,
    store,
    turn,
    where,
)
from tests.cases import DTYPES, JIT

needs_compilation = pytest.mark.skipif(not JIT, reason="compares compiled code with Python")


def masked_copy(row, start, n, fill, out):
    store(out, start, first(row, n), load(row, start, first(row, n), splat(row, fill)))


def padded_copy(row, start, n, fill, out):
    store(out, 0, first(row, lanes(row)), load(row, start, first(row, n), splat(row, fill)))


def arithmetic(a, b, c, out):
    every, zero = first(a, lanes(a)), splat(a, 0.0)
    x, y, z = load(a, 0, every, zero), load(b, 0, every, zero), load(c, 0, every, zero)
    low = where(less(x, y), x, y)
    store(out, 0, every, (x + y) * z - muladd(low, z, splat(a, 0.25)))
    return lane_sum(x), lane_max(y)


def exponentials(row, plain, up):
    every = first(row, lanes(row))
    for start in range(0, row.shape[0], lanes(row)):
        x = load(row, start, every, splat(row, 0.0))
        store(plain, start, every, exp(x))
        store(up, start, every, exp_up(x))


@needs_compilation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copy", [masked_copy, padded_copy])
def test_masked_load_and_store_touch_the_masked_lanes_alone(copy, dtype):
    compiled = njit(copy)
    row = np.arange(1, 50, dtype=dtype)
    for start in (0, 3, 16):
        for n in range(-2, lanes(row) + 3):
            expected, found = np.zeros((2, 49), dtype)
            copy(row, start, n, -7, expected)
            compiled(row, start, n, -7, found)
            assert np.array_equal(found, expected)
            assert (found != 0).any() or n <= 0


def numbered(bytes_in, start, n, floats, bytes_out):
    some = first(floats, n)
    numbers = load(bytes_in, start, some, splat(floats, 7))
    store(floats, 0, first(floats, lanes(floats)), numbers)
    nine = where(equal(numbers, splat(floats, 9)), splat(floats, 90), numbers)
    store(bytes_out, start, some, nine)


@needs_compilation
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_become_numbers_and_numbers_bytes(dtype):
    compiled, row = njit(numbered), np.arange(40, dtype=np.uint8)
    for start in (0, 3, 16):
        for n in range(-2, lanes(np.empty(0, dtype)) + 3):
            floats, stored = (
                np.zeros((2, lanes(np.empty(0, dtype))), dtype),
                np.zeros((2, 40), "u1"),
            )
            numbered(row, start, n, floats[0], stored[0])
            compiled(row, start, n, floats[1], stored[1])
            assert np.array_equal(*floats)
            assert np.array_equal(*stored)
            count = min(max(n, 0), floats.shape[1])
            expected = np.where(row == 9, 90, row)[start : start + count]
            assert np.array_equal(stored[1, start : start + count], expected)


@needs_compilation
@pytest.mark.parametrize("dtypes", [DTYPES, DTYPES[::-1]])
def test_rows_of_another_dtype_are_refused(dtypes):
    # Read as the vector's numbers, a float32 row would give other numbers, and end too soon.
    row, other = (np.zeros(16, dtype) for dtype in dtypes)

    def read(row, other):
        return lane_sum(load(other, 0, first(row, 4), splat(row, 0.0)))

    def write(row, other):
        store(other, 0, first(row, 4), splat(row, 0.0))

    for function in (read, write):
        with pytest.raises(TypingError):
            njit(function)(row, other)


def turned(rows, row, column, n_rows, n_columns, out):
    square = square_memory(out)
    turn(rows, row, column, n_rows, n_columns, square)
    out[:] = square


@needs_compilation
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_square_is_turned_over_and_nothing_beyond_it_is_read(dtype):
    compiled, width = njit(turned), vector.BYTES // np.dtype(dtype).itemsize
    memory = np.full((width + 8, 2 * width + 1), np.nan, dtype)
    for n_rows, n_columns in (
        (width, width),
        (width + 3, width + 5),
        (1, width),
        (width - 1, 3),
        (0, 0),
    ):
        memory[2:, 4:] = np.nan
        numbers = np.arange(width**2, dtype=dtype).reshape(width, width)[:n_rows, :n_columns]
        memory[2 : 2 + len(numbers), 4 : 4 + numbers.shape[1]] = numbers
        expected = np.zeros((width, width), dtype)
        expected[: numbers.shape[1], : numbers.shape[0]] = numbers.T
        for function in (compiled, turned):
            out = np.empty(width**2, dtype)
            function(memory, 2, 4, n_rows, n_columns, out)
            assert out.tobytes() == expected.tobytes()


@needs_compilation
def test_squares_and_rows_that_do_not_fit_are_refused():
    row, rows = np.zeros(256, np.float32), np.zeros((16, 16), np.float32)
    for wrong in (rows.astype(np.float64), rows.T, rows[0]):
        with pytest.raises(TypingError):
            njit(turned)(wrong, 0, 0, 16, 16, row)


@needs_compilation
@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic_and_sums_over_lanes(dtype):
    # Small integers and quarters: every result is exact, so both ways agree to the last bit.
    a, b, c = np.random.default_rng(0).integers(-8, 9, (3, vector.BYTES // dtype().itemsize))
    a, b, c = a.astype(dtype), b.astype(dtype), c.astype(dtype)
    expected, found = np.zeros((2, a.size), dtype)
    assert njit(arithmetic)(a, b, c, found) == arithmetic(a, b, c, expected)
    assert np.array_equal(found, expected)
    assert arithmetic(a, b, c, expected) == (a.sum(), b.max())
    assert np.array_equal(found, (a + b) * c - (np.minimum(a, b) * c + dtype(0.25)))


@needs_compilation
@pytest.mark.parametrize("dtype", DTYPES)
def test_comparison_with_nan_is_false(dtype):
    row = np.full(vector.BYTES // dtype().itemsize, np.nan, dtype)

    def which(row, out):
        every = first(row, lanes(row))
        x, one = load(row, 0, every, splat(row, 0.0)), splat(row, 1.0)
        store(out, 0, every, where(less(x, one), one, where(less(one, x), one, one + one)))

    out = np.zeros_like(row)
    njit(which)(row, out)
    assert (out == 2).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_exponential_errs_by_no_more_than_a_rounding_of_its_argument(dtype):
    """Against 40-digit decimals: error over value at most (|x| + 1) roundings, zero far below."""
    width = vector.BYTES // dtype().itemsize
    lowest = -120 if dtype == np.float32 else -760
    x = np.concatenate([np.linspace(lowest, 0, 40 * width - 4), [0.0, -0.5, -1e-30, -np.inf]])
    x = x.astype(dtype)
    plain, up = np.empty((2, x.size), dtype)
    with np.errstate(under="ignore"):
        (njit(exponentials) if JIT else exponentials)(x, plain, up)
    assert (plain[x == 0] == 1).all()
    tiny, eps = float(np.finfo(dtype).tiny), float(np.finfo(dtype).eps)
    with localcontext(prec=40):
        for found, power in ((plain, 0), (up, vector.UP_BITS)):
            assert found[-1] == 0
            for one, value in zip(x[:-1], found[:-1], strict=True):
                exact = Decimal(float(one)).exp() * 2**power
                error = abs(Decimal(float(value)) - exact)
                # Below the normal numbers the compiled one gives zero.
                allowed = exact * Decimal(eps * (abs(float(one)) + 1)) + (
                    0 if exact > Decimal(1.02 * tiny) else Decimal(1.02 * tiny)
                )
                assert error <= allowed, one
