"""The largest magnitude of an array, compiled (numba): half of FP8 encoding, and all of the search for NaN.

Magnitudes of floats order as their bits without the sign do, so integers are compared: BF16 as uint16, float32 as
uint32. Three operations are written in LLVM IR because numba widens every small integer to 64 bits, which costs a
factor of four in vector width. The functions release the GIL and use one thread.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from dsv2quant.formats.compiled import compiled


@intrinsic
def magnitude(context: Any, bits: Any) -> Any:
    """The bits without their sign."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.and_(args[0], ir.Constant(args[0].type, (1 << (bits.bitwidth - 1)) - 1))

    return bits(bits), codegen


@intrinsic
def larger(context: Any, x: Any, y: Any) -> Any:
    """max(x, y) of two unsigned integers of one width."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.select(b.icmp_unsigned(">", args[0], args[1]), args[0], args[1])

    return x(x, x), codegen


@intrinsic
def as_float(context: Any, bits: Any) -> Any:
    """BF16 bits (uint16) or float32 bits (uint32) → float32."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        word = (
            b.shl(b.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16)) if bits.bitwidth == 16 else args[0]
        )
        return b.bitcast(word, ir.FloatType())

    return types.float32(bits), codegen


@compiled
def row_amax(row):  # type: ignore[no-untyped-def]
    """Bits of the largest magnitude of a row."""
    most = magnitude(row[0])
    for j in range(row.size):
        most = larger(most, magnitude(row[j]))
    return most


@compiled
def amax_bits(weight):  # type: ignore[no-untyped-def]
    """Bits of the largest magnitude of a matrix."""
    most = row_amax(weight[0])
    for i in range(weight.shape[0]):
        most = larger(most, row_amax(weight[i]))
    return most


@compiled
def widen(bits, out):  # type: ignore[no-untyped-def]
    """BF16 bits (uint16) → float32, both flat."""
    for i in range(bits.size):
        out[i] = as_float(bits[i])
