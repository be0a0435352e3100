"""Pieces of work, shared out to threads: one loop over ``prange`` for all kernels.

Numba compiles what stands in such a loop five times: by itself, as the loop's body, in two wrappers
around that and in the function that has the loop. So there is one such loop here, which knows the
piece and its arguments by their addresses: a piece is compiled by itself and where it is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, get_num_threads, njit, prange, types
from numba.core import cgutils
from numba.core.callconv import RETCODE_OK, excinfo_ptr_t
from numba.extending import intrinsic

# Numba starts its threads when it loads a function that has the loop, and when it loads one that
# calls it, but not if that was compiled where the loop had come from the cache. Asked for their
# number it starts them, too.
get_num_threads()

# error_model="numpy": 0/0 is NaN and not an exception, as in the other backends.
OPTIONS = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}

_ADDRESS = ir.IntType(8).as_pointer()
# A task in LLVM: a function of the address of its memory and of the number of a piece.
_TASK = ir.FunctionType(ir.VoidType(), [_ADDRESS, ir.IntType(64)])


@intrinsic
def _do(typing_context, task, memory, p):
    """Do piece p."""

    def generate(context, builder, signature, values):
        function = builder.inttoptr(values[0], _TASK.as_pointer())
        builder.call(function, [builder.inttoptr(values[1], _ADDRESS), values[2]])
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.int64), generate


@njit(cache=True, parallel=True, _nrt=False, **OPTIONS)
def _do_all(alone, n, task, memory):
    if alone:
        for p in range(n):
            _do(task, memory, p)
    else:
        for p in prange(n):
            _do(task, memory, np.int64(p))


def _borrowed(context, builder, kind: Any, value):
    """Return a value without owners: who takes parts of it then need not count references."""
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = cgutils.get_null_value(array.meminfo.type)
        array.parent = cgutils.get_null_value(array.parent.type)
        return array._getvalue()
    if isinstance(kind, types.BaseTuple):
        parts = cgutils.unpack_tuple(builder, value)
        parts = [_borrowed(context, builder, k, v) for k, v in zip(kind, parts, strict=True)]
        return context.make_tuple(builder, kind, parts)
    return value


def _compiled(typing_context, function: Any, *arguments: Any):
    """Return a function's signature for some types, and the function compiled for them."""
    kind = typing_context.resolve_value_type(function)
    signature = kind.get_call_type(typing_context, arguments, {})
    return signature, kind.dispatcher.get_compile_result(signature)


def do_pieces(alone, n, piece, arguments):
    """Call ``piece(p, *arguments)`` for all p below n: on this thread, if ``alone``, or on several.

    What the piece returns is lost: it writes its results to arrays. If one or more raise an
    exception, the others are done nevertheless, and one exception is raised.
    """
    for p in range(n):
        piece(p, *arguments)


@intrinsic
def _do_pieces(typing_context, alone, n, piece, arguments):
    all_kind, do_all = _compiled(
        typing_context, _do_all, types.boolean, types.int64, types.uintp, types.uintp
    )
    kinds = [types.unliteral(kind) for kind in arguments]
    piece_kind, do_piece = _compiled(typing_context, piece.dispatcher, types.int64, *kinds)

    def task(context, module, memory_kind):
        """Write the function that does piece p and keeps its status if it fails."""
        name = module.get_unique_name(f"task.{do_piece.fndesc.mangled_name}")
        function = ir.Function(module, _TASK, name)
        function.linkage = "internal"
        function.attributes.add("noinline")  # its address is needed, and one copy is enough
        builder = ir.IRBuilder(function.append_basic_block())
        memory = builder.bitcast(function.args[0], memory_kind.as_pointer())
        code, error, place = (cgutils.gep_inbounds(builder, memory, 0, i) for i in range(3))
        parts = cgutils.unpack_tuple(builder, builder.load(place))
        parts = [_borrowed(context, builder, k, v) for k, v in zip(arguments, parts, strict=True)]
        status, _ = context.call_internal_no_propagate(
            builder, do_piece.fndesc, piece_kind, [function.args[1], *parts]
        )
        with cgutils.if_unlikely(builder, status.is_error):
            builder.store(status.code, code)
            builder.store(status.excinfoptr, error)
        builder.ret_void()
        return function

    def generate(context, builder, signature, values):
        for compiled in (do_all, do_piece):
            context.add_linking_libs([compiled.library])
        no_error = ir.Constant(excinfo_ptr_t, None)
        members = [RETCODE_OK, no_error, values[3]]
        memory_kind = ir.LiteralStructType([member.type for member in members])
        memory = cgutils.alloca_once(builder, memory_kind)
        code, error, place = (cgutils.gep_inbounds(builder, memory, 0, i) for i in range(3))
        for where, member in zip((code, error, place), members, strict=True):
            builder.store(member, where)
        address = builder.ptrtoint(task(context, builder.module, memory_kind), ir.IntType(64))
        context.call_internal(
            builder,
            do_all.fndesc,
            all_kind,
            [values[0], values[1], address, builder.ptrtoint(memory, ir.IntType(64))],
        )
        code, error = builder.load(code), builder.load(error)
        with cgutils.if_unlikely(builder, cgutils.is_not_null(builder, code)):
            builder.store(error, context.call_conv._get_excinfo_argument(builder.function))
            builder.ret(code)
        return context.get_dummy_value()

    return types.void(alone, n, piece, arguments), generate


if not config.DISABLE_JIT:
    do_pieces = _do_pieces  # directly: an overload would be a function of its own
