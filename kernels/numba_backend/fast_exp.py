"""exp and max over rows, written so that LLVM turns their loops into vector instructions.

Numba's own ``np.exp`` calls a scalar library function, and a float maximum does not vectorise
because of NaN. Compiled, these two take a tenth of the time. Without compilation
(``NUMBA_DISABLE_JIT=1``) they are NumPy's.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.extending import overload

_f32, _f64, _i32, _i64 = np.float32, np.float64, np.int32, np.int64


# exp_up returns 2^40 e^x, so that numbers down to e^x = 2^-166 keep their bits in float32.
UP_BITS = 40
UP = 2.0**UP_BITS


def exp(x):
    """Return e^x of a scalar within one rounding; 0 where e^x is below the normal numbers.

    Cody & Waite (1980): with k the integer nearest to x / ln 2 and r = x - k ln 2, which is at
    most ln 2 / 2 in size, e^x = 2^k e^r, and e^r is its Taylor sum. Meant for x <= 0: it overflows
    like any exp, but not always to infinity.
    """
    return np.exp(x)


def exp_up(x):
    """Return 2^40 e^x; 0 where that is below the normal numbers."""
    return x.dtype.type(np.exp(np.float64(x)) * UP)


# Adding 1.5 * 2^(mantissa bits) rounds to an integer and leaves it in the lowest bits.
_ROUND32, _ROUND64 = _f32(1.5 * 2**23), _f64(1.5 * 2**52)
# ln 2 in two parts; the first has so few bits that k times it is exact.
_LN2_HIGH32 = _f32(0.693359375)
_LN2_LOW32 = _f32(math.log(2) - 0.693359375)
_LN2_HIGH64 = _f64(float.fromhex("0x1.62e42fee00000p-1"))
_LN2_LOW64 = _f64(float.fromhex("0x1.a39ef35793c76p-33"))
_LOG2_E32, _LOG2_E64 = _f32(1 / math.log(2)), _f64(1 / math.log(2))
# Truncation at the ends: 5e-9 and 4e-18 of the value, a twentieth of a rounding.
_TAYLOR32 = tuple(_f32(1 / math.factorial(k)) for k in range(8))
_TAYLOR64 = tuple(_f64(1 / math.factorial(k)) for k in range(14))

# contract: multiply-adds may be fused. Nothing may be re-associated: it would fold the rounding
# trick away. forceinline: in the caller's loop it vectorises, called it would not.
_OPTIONS = {"fastmath": {"contract"}, "forceinline": True, "error_model": "numpy"}


def _exp32(up):
    """Return float32's 2^up e^x."""
    exponent = _i32(127 + up)
    lowest = _f32(-87.33 - up * math.log(2))  # below, the result would not be a normal number

    def exp32(x):
        shifted = _f32(x * _LOG2_E32 + _ROUND32)
        k = shifted - _ROUND32
        r = (x - k * _LN2_HIGH32) - k * _LN2_LOW32
        p = _TAYLOR32[7]
        p = p * r + _TAYLOR32[6]
        p = p * r + _TAYLOR32[5]
        p = p * r + _TAYLOR32[4]
        p = p * r + _TAYLOR32[3]
        p = p * r + _TAYLOR32[2]
        p = p * r + _TAYLOR32[1]
        p = p * r + _TAYLOR32[0]
        # k + 127 in the exponent's place; what else was in the bits is shifted out.
        power = _i32((shifted.view(_i32) + exponent) << _i32(23))
        return _f32(0) if x < lowest else p * power.view(_f32)

    return exp32


def _exp64(up):
    """Return float64's 2^up e^x."""
    exponent = _i64(1023 + up)
    lowest = _f64(-708.39 - up * math.log(2))

    def exp64(x):
        shifted = _f64(x * _LOG2_E64 + _ROUND64)
        k = shifted - _ROUND64
        r = (x - k * _LN2_HIGH64) - k * _LN2_LOW64
        p = _TAYLOR64[13]
        p = p * r + _TAYLOR64[12]
        p = p * r + _TAYLOR64[11]
        p = p * r + _TAYLOR64[10]
        p = p * r + _TAYLOR64[9]
        p = p * r + _TAYLOR64[8]
        p = p * r + _TAYLOR64[7]
        p = p * r + _TAYLOR64[6]
        p = p * r + _TAYLOR64[5]
        p = p * r + _TAYLOR64[4]
        p = p * r + _TAYLOR64[3]
        p = p * r + _TAYLOR64[2]
        p = p * r + _TAYLOR64[1]
        p = p * r + _TAYLOR64[0]
        power = _i64((shifted.view(_i64) + exponent) << _i64(52))
        return _f64(0) if x < lowest else p * power.view(_f64)

    return exp64


@overload(exp, jit_options=_OPTIONS)
def _exp(x):
    return {types.float32: _exp32, types.float64: _exp64}[x](0)


@overload(exp_up, jit_options=_OPTIONS)
def _exp_up(x):
    return {types.float32: _exp32, types.float64: _exp64}[x](UP_BITS)


def row_max(row):
    """Return the largest number of a contiguous row; NaN if there is a positive NaN in it.

    Compares the bits as integers: flipping those of negative numbers, the sign aside, puts
    floating-point numbers in the order of integers, NaN above infinity.
    """
    return row.max()


@overload(row_max, jit_options={"forceinline": True, "error_model": "numpy"})
def _row_max(row):
    if row.dtype == types.float32:

        def max32(row):
            top = _i32(-(2**31))
            for j in range(row.shape[0]):
                b = _f32(row[j]).view(_i32)
                top = max(top, _i32(b ^ ((b >> _i32(31)) & _i32(2**31 - 1))))
            return _i32(top ^ ((top >> _i32(31)) & _i32(2**31 - 1))).view(_f32)

        return max32

    def max64(row):
        top = _i64(-(2**63))
        for j in range(row.shape[0]):
            b = _f64(row[j]).view(_i64)
            top = max(top, _i64(b ^ ((b >> _i64(63)) & _i64(2**63 - 1))))
        return _i64(top ^ ((top >> _i64(63)) & _i64(2**63 - 1))).view(_f64)

    return max64
