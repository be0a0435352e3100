"""Vectors of 64 bytes: sixteen float32 or eight float64 that one instruction works on.

LLVM makes such vectors of plain loops by itself, but leaves what is over at a row's end to slow
scalar code, and most rows here are short. So the row functions are written with the vectors below,
the last one of a row *masked*. Where a processor has narrower vectors, LLVM cuts these up.

Each operation is a function with its meaning in NumPy, which is what runs without compilation
(``NUMBA_DISABLE_JIT=1``), and with the LLVM instructions that a compiled caller gets
(:func:`instructions`). A row is a contiguous one-dimensional array.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import lower_builtin, register_model, type_callable

BYTES = 64
UP_BITS = 40
UP = 2.0**UP_BITS

# --- the types -------------------------------------------------------------------------------


class Vector(types.Type):
    """Numba's type of a vector of floating-point numbers."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.lanes = BYTES * 8 // real.bitwidth
        super().__init__(name=f"Vector({real})")


class Mask(types.Type):
    """Numba's type of a truth value for every lane."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(name=f"Mask({lanes})")


_REALS = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
_INTS = {types.float32: ir.IntType(32), types.float64: ir.IntType(64)}


def vector_kind(vector: Vector) -> ir.VectorType:
    """Return LLVM's type of a vector."""
    return ir.VectorType(_REALS[vector.real], vector.lanes)


def _ints(vector: Vector) -> ir.VectorType:
    return ir.VectorType(_INTS[vector.real], vector.lanes)


def _bits(lanes: int) -> ir.VectorType:
    return ir.VectorType(ir.IntType(1), lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, vector_kind(vector))


@register_model(Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager, mask):
        super().__init__(manager, mask, _bits(mask.lanes))


def _is_row(row: Any, vector: Any) -> bool:
    """Return whether this is a row of a vector's numbers, or of bytes."""
    is_contiguous = isinstance(row, types.Array) and row.ndim == 1 and row.layout == "C"
    return is_contiguous and isinstance(vector, Vector) and row.dtype in (vector.real, types.uint8)


def constant(kind: ir.VectorType, number: Any) -> ir.Constant:
    """Return a vector with one number, known at compilation, in all lanes."""
    return ir.Constant(kind, [number] * kind.count)


def broadcast(builder, kind: ir.VectorType, number):
    """Return a vector with one number in all lanes."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(
        one,
        ir.Constant(kind, ir.Undefined),
        constant(ir.VectorType(ir.IntType(32), kind.count), 0),
    )


def _call(builder, name: str, result, arguments):
    """Call one of LLVM's own functions."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _suffix(vector: Vector) -> str:
    """Return how LLVM's functions name this type."""
    return f"v{vector.lanes}f{vector.real.bitwidth}"


def address_of(context, builder, row_type, row, index):
    """Return the address of a row's number."""
    data = context.make_array(row_type)(context, builder, row).data
    return builder.gep(data, [index])


def instructions(function: Any, typer: Any) -> Any:
    """Decorate what writes a function's LLVM instructions into its compiled caller.

    ``typer`` returns the result's type for arguments of some types, or None where there is none.
    Numba's ``overload`` would do, but compiles a function for each, and a kernel has dozens.
    """
    type_callable(function)(lambda context: typer)
    return lower_builtin(function, types.VarArg(types.Any))


# --- operations ------------------------------------------------------------------------------


def lanes(row):
    """Return how many numbers of a row's dtype a vector holds."""
    return BYTES // row.itemsize


def _count(row: Any) -> int:
    return BYTES * 8 // row.dtype.bitwidth


@instructions(lanes, lambda row: types.intp)
def _lanes(context, builder, signature, arguments):
    return context.get_constant(types.intp, _count(signature.args[0]))


def first(row, n):
    """Return a mask of the first n lanes; of all if there are no more, of none if n is below 1."""
    return slice(0, max(0, min(n, lanes(row))))


@instructions(first, lambda row, n: Mask(_count(row)))
def _first(context, builder, signature, arguments):
    return _first_lanes(builder, signature.return_type.lanes, arguments[1])


def _first_lanes(builder, count: int, n):
    """Return n ones in the lowest bits of an integer, one bit for each lane."""
    kind = n.type
    n = builder.select(builder.icmp_signed("<", n, kind(0)), kind(0), n)
    ones = builder.sub(builder.shl(kind(1), n), kind(1))
    ones = builder.select(builder.icmp_signed("<", n, kind(count)), ones, kind(-1))
    return builder.bitcast(builder.trunc(ones, ir.IntType(count)), _bits(count))


def splat(row, number):
    """Return a vector, of a row's dtype, with one number in all lanes."""
    return np.full(lanes(row), number, row.dtype)


@instructions(splat, lambda row, number: Vector(row.dtype))
def _splat(context, builder, signature, arguments):
    vector = signature.return_type
    real = context.cast(builder, arguments[1], signature.args[1], vector.real)
    return broadcast(builder, vector_kind(vector), real)


_BYTE = ir.IntType(8)


def _masked(operation: str, kind: ir.VectorType) -> tuple[str, ir.Constant]:
    """Return LLVM's name for a masked load or store of a vector, and one number's bytes."""
    letter, bits = {_REALS[r]: ("f", r.bitwidth) for r in _REALS}.get(kind.element, ("i", 8))
    return f"llvm.masked.{operation}.v{kind.count}{letter}{bits}.p0", ir.IntType(32)(bits // 8)


def load(row, index, mask, fill):
    """Return row[index], row[index + 1], ... in the masked lanes and a vector's in the others.

    The row may hold bytes: they become the vector's numbers.
    """
    vector = fill.copy()
    vector[mask] = row[index : index + mask.stop]
    return vector


def _masked_load(builder, address, mask, others):
    """Load the masked lanes of a vector, and take the others as they are."""
    name, size = _masked("load", others.type)
    return _call(builder, name, others.type, [address, size, mask, others])


@instructions(load, lambda row, index, mask, fill: fill if _is_row(row, fill) else None)
def _load(context, builder, signature, arguments):
    row, index, mask, others = arguments
    address = address_of(context, builder, signature.args[0], row, index)
    if signature.args[0].dtype != types.uint8:
        return _masked_load(builder, address, mask, others)
    none = constant(ir.VectorType(_BYTE, others.type.count), 0)
    numbers = _masked_load(builder, address, mask, none)
    return builder.select(mask, builder.uitofp(numbers, others.type), others)


def store(row, index, mask, vector):
    """Write the masked lanes to row[index], row[index + 1], ..., as bytes where it holds such."""
    row[index : index + mask.stop] = vector[mask]


@instructions(store, lambda row, index, mask, v: types.void if _is_row(row, v) else None)
def _store(context, builder, signature, arguments):
    row, index, mask, numbers = arguments
    if signature.args[0].dtype == types.uint8:
        numbers = builder.fptoui(numbers, ir.VectorType(_BYTE, numbers.type.count))
    address = address_of(context, builder, signature.args[0], row, index)
    name, size = _masked("store", numbers.type)
    _call(builder, name, ir.VoidType(), [numbers, address, size, mask])
    return context.get_dummy_value()


def square_memory(row):
    """Return a row of lanes x lanes numbers: on the stack, and gone when its caller returns."""
    return np.empty(lanes(row) ** 2, row.dtype)


@instructions(square_memory, lambda row: types.Array(row.dtype, 1, "C"))
def _square_memory(context, builder, signature, arguments):
    kind = signature.return_type
    vector, size = Vector(kind.dtype), _count(kind) ** 2
    memory = cgutils.alloca_once(builder, ir.ArrayType(_REALS[kind.dtype], size))
    memory.align = BYTES
    array = context.make_array(kind)(context, builder)
    itemsize = BYTES // vector.lanes
    context.populate_array(
        array,
        data=builder.bitcast(memory, array.data.type),
        shape=[context.get_constant(types.intp, size)],
        strides=[context.get_constant(types.intp, itemsize)],
        itemsize=context.get_constant(types.intp, itemsize),
        meminfo=None,
    )
    return array._getvalue()


def turn(rows, row, column, n_rows, n_columns, square):
    """Write numbers from rows[row, column] on into a square (:func:`square_memory`), turned over.

    Column ``column + c`` of the rows becomes line c of the square. There are as many rows and
    columns as a vector has lanes, or fewer: then the rest of the square becomes zero.
    """
    width = lanes(square)
    lines = square.reshape(width, width)
    lines[:] = 0
    last_row, last_column = row + min(n_rows, width), column + min(n_columns, width)
    lines[: last_column - column, : last_row - row] = rows[row:last_row, column:last_column].T


def _can_turn(rows, row, column, n_rows, n_columns, square):
    is_matrix = isinstance(rows, types.Array) and rows.ndim == 2 and rows.layout == "C"
    fits = is_matrix and rows.dtype == square.dtype and _is_row(square, Vector(rows.dtype))
    return types.void if fits else None


@instructions(turn, _can_turn)
def _turn(context, builder, signature, arguments):
    rows, row, column, n_rows, n_columns, square = arguments
    kind, count = vector_kind(Vector(signature.args[0].dtype)), _count(signature.args[0])
    source = context.make_array(signature.args[0])(context, builder, rows)
    length = builder.extract_value(source.shape, 1)
    index, half = length.type, count // 2
    begin = builder.gep(source.data, [builder.add(builder.mul(row, length), column)])
    columns, lines = _first_lanes(builder, count, n_columns), []
    for r in range(count):
        is_there = builder.icmp_signed("<", index(r), n_rows)
        mask = builder.select(is_there, columns, constant(columns.type, 0))
        address = builder.gep(begin, [builder.mul(index(r), length)])
        lines.append(_masked_load(builder, address, mask, constant(kind, 0)))
    # Two lines, of the first half and of the second, number by number in turn: they become two that
    # follow one another. Once for each bit of a line's number, and the square is turned over.
    int32 = ir.IntType(32)
    in_turn = [
        ir.Constant(
            ir.VectorType(int32, count), [start + c // 2 + c % 2 * count for c in range(count)]
        )
        for start in (0, half)
    ]
    for _ in range(count.bit_length() - 1):
        pairs = zip(lines[:half], lines[half:], strict=True)
        lines = [builder.shuffle_vector(*pair, order) for pair in pairs for order in in_turn]
    for c, line in enumerate(lines):
        address = address_of(context, builder, signature.args[5], square, index(c * count))
        place = builder.bitcast(address, kind.as_pointer())
        builder.store(line, place, align=BYTES // count)
    return context.get_dummy_value()


def _two_vectors(a: Any, b: Any) -> Any:
    return a if isinstance(a, Vector) and a == b else None


def _arithmetic(function, instruction: str) -> None:
    """Let an operator work on two vectors."""
    type_callable(function)(lambda context: lambda a, b: _two_vectors(a, b))

    @lower_builtin(function, Vector, Vector)
    def generate(context, builder, signature, arguments):
        return getattr(builder, instruction)(*arguments)


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")


def muladd(a, b, c):
    """Return a * b + c: with one rounding where the processor has that instruction, else two."""
    return a * b + c


@instructions(muladd, lambda a, b, c: a)
def _muladd(context, builder, signature, arguments):
    return fmuladd(builder, signature.return_type, *arguments)


def fmuladd(builder, vector: Vector, a, b, c):
    """Return a * b + c."""
    return _call(builder, f"llvm.fmuladd.{_suffix(vector)}", a.type, [a, b, c])


def _comparison(function, sign: str) -> None:
    """Let a function of ours compare two vectors."""

    @instructions(function, lambda a, b: Mask(a.lanes))
    def generate(context, builder, signature, arguments):
        return builder.fcmp_ordered(sign, *arguments)


def less(a, b):
    """Return in which lanes a < b; false where one of them is NaN."""
    return a < b


def equal(a, b):
    """Return in which lanes a == b; false where one of them is NaN."""
    return a == b


_comparison(less, "<")
_comparison(equal, "==")


def where(mask, a, b):
    """Return a in the lanes where the mask is true, b in the others."""
    return np.where(mask, a, b)


@instructions(where, lambda mask, a, b: a)
def _where(context, builder, signature, arguments):
    return builder.select(*arguments)


def _tree(builder, vector, combine):
    """Combine all lanes: halves, quarters, ...; the order does not depend on the processor."""
    count = vector.type.count
    while count > 1:
        count //= 2
        parts = [
            builder.shuffle_vector(
                vector,
                ir.Constant(vector.type, ir.Undefined),
                ir.Constant(
                    ir.VectorType(ir.IntType(32), count), list(range(start, start + count))
                ),
            )
            for start in (0, count)
        ]
        vector = combine(*parts)
    return builder.extract_element(vector, ir.IntType(32)(0))


def _halves(vector, combine):
    while len(vector) > 1:
        half = len(vector) // 2
        vector = combine(vector[:half], vector[half:])
    return vector[0]


def lane_sum(vector):
    """Return the sum of all lanes, taken in their own type, as a float64."""
    return np.float64(_halves(vector, operator.add))


@instructions(lane_sum, lambda vector: types.float64)
def _lane_sum(context, builder, signature, arguments):
    total = _tree(builder, arguments[0], builder.fadd)
    return context.cast(builder, total, signature.args[0].real, types.float64)


def lane_max(vector):
    """Return the largest of all lanes; none of them may be NaN."""
    return _halves(vector, np.maximum)


@instructions(lane_max, lambda vector: vector.real)
def _lane_max(context, builder, signature, arguments):
    def larger(a, b):
        return builder.select(builder.fcmp_ordered("<", a, b), b, a)

    return _tree(builder, arguments[0], larger)


# --- the exponential function ----------------------------------------------------------------

# 2^f = 1 + f (c_1 + f (c_2 + ...)) for |f| <= 1/2, with the coefficients of least relative error
# (Remez's exchange, in 50 digits): 2.6e-9 with six of them, 1.8e-17 with eleven.
_COEFFICIENTS = {
    types.float32: (
        "0x1.62e432p-1 0x1.ebfbe2p-3 0x1.c6ae72p-5 0x1.3b270ep-7 0x1.5f7276p-10 0x1.470b4ap-13"
    ),
    types.float64: (
        "0x1.62e42fefa39f3p-1 0x1.ebfbdff82c598p-3 0x1.c6b08d7048f31p-5 0x1.3b2ab6fba1e1cp-7 "
        "0x1.5d87fe7bbbe07p-10 0x1.4309130961163p-13 0x1.ffcbee3b0af8cp-17 0x1.62bfd49ed0adfp-20 "
        "0x1.b54167a0b9061p-24 0x1.e605f979c7a5dp-28 0x1.c0638527edf34p-32"
    ),
}
_MANTISSA_BITS = {types.float32: 23, types.float64: 52}
_LOWEST = {types.float32: -87.33, types.float64: -708.39}  # e^x is a normal number above these


def exp(x):
    """Return e^x of every lane; 0 where e^x is below the normal numbers.

    With y = x / ln 2, k the integer nearest to it and f = y - k, e^x = 2^k 2^f; 2^f is a polynomial
    and 2^k an addition to its exponent's bits. y is rounded as x is, so the relative error is about
    |x| + 1 roundings, as much as a rounding of x itself makes: x is a difference here. Meant for
    x <= 0: it overflows like any exp, but not always to infinity.
    """
    return np.exp(x)


def exp_up(x):
    """Return 2^40 e^x of every lane; 0 where that is below the normal numbers.

    So numbers down to e^x = 2^-166 keep their bits in float32.
    """
    half = np.exp(x.astype(np.float64) / 2)  # e^x alone might lose its bits before it is scaled
    return (half * UP * half).astype(x.dtype)


def _exponential(function: Any, up: int) -> None:
    """Let a function be 2^up e^x."""

    @instructions(function, lambda x: x)
    def generate(context, builder, signature, arguments):
        x = signature.return_type
        kind, ints, real = vector_kind(x), _ints(x), x.real
        numpy_real = np.dtype(real.name).type

        def number(value):
            return constant(kind, float(numpy_real(value)))

        mantissa_bits = _MANTISSA_BITS[real]
        # Adding 1.5 * 2^mantissa_bits rounds to an integer. It is in the lowest bits then, with
        # ``up`` added; moved to the exponent's place, it multiplies by 2^(k + up).
        rounding, log2_e = number(1.5 * 2.0**mantissa_bits + up), number(1 / math.log(2))
        shifted = fmuladd(builder, x, arguments[0], log2_e, rounding)
        f = fmuladd(builder, x, arguments[0], log2_e, builder.fsub(rounding, shifted))
        *rest, p = [number(float.fromhex(c)) for c in _COEFFICIENTS[real].split()]
        for coefficient in [*reversed(rest), number(1)]:
            p = fmuladd(builder, x, p, f, coefficient)
        power = builder.shl(builder.bitcast(shifted, ints), constant(ints, mantissa_bits))
        e = builder.bitcast(builder.add(builder.bitcast(p, ints), power), kind)
        lowest = number(_LOWEST[real] - up * math.log(2))
        too_low = builder.fcmp_ordered("<", arguments[0], lowest)
        return builder.select(too_low, number(0), e)


_exponential(exp, 0)
_exponential(exp_up, UP_BITS)
