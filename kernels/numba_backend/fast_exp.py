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


def exp(x):
    """Return e^x of a scalar within one rounding; 0 where e^x is below the normal numbers.

    Cody & Waite (1980): with k the integer nearest to x / ln 2 and r = x - k ln 2, which is at
    most ln 2 / 2 in size, e^x = 2^k e^r, and e^r is its Taylor sum. Meant for x <= 0: it overflows
    like any exp, but not always to infinity.
    """
    return np.exp(x)


# Adding 1.5 * 2^(mantissa bits) rounds to an integer and leaves it in the lowest bits.
_ROUND32, _ROUND64 = _f32(1.5 * 2**23), _f64(1.5 * 2**52)
# ln 2 in two parts; the first has so few bits that k times it is exact.
_LN2_HIGH32 = _f32(0.693359375)
_LN2_LOW32 = _f32(math.log(2) - 0.693359375)
_LN2_HIGH64 = _f64(float.fromhex("0x1.62e42fee00000p-1"))
_LN2_LOW64 = _f64(float.fromhex("0x1.a39ef35793c76p-33"))
_LOG2_E32, _LOG2_E64 = _f32(1 / math.log(2)), _f64(1 / math.log(2))
# Below these the result would not be a normal number.
_LOWEST32, _LOWEST64 = _f32(-87.33), _f64(-708.39)
# Truncation at the ends: 5e-9 and 4e-18 of the value, a twentieth of a rounding.
_TAYLOR32 = tuple(_f32(1 / math.factorial(k)) for k in range(8))
_TAYLOR64 = tuple(_f64(1 / math.factorial(k)) for k in range(14))

# contract: multiply-adds may be fused. Nothing may be re-associated: it would fold the rounding
# trick away. forceinline: in the caller's loop it vectorises, called it would not.
_OPTIONS = {"fastmath": {"contract"}, "forceinline": True, "error_model": "numpy"}


@overload(exp, jit_options=_OPTIONS)
def _exp(x):
    if x == types.float32:

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
            power = _i32((shifted.view(_i32) + _i32(127)) << _i32(23))
            return _f32(0) if x < _LOWEST32 else p * power.view(_f32)

        return exp32

    if x == types.float64:

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
            power = _i64((shifted.view(_i64) + _i64(1023)) << _i64(52))
            return _f64(0) if x < _LOWEST64 else p * power.view(_f64)

        return exp64
    return None


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
