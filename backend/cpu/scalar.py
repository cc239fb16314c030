"""Scalar parts of the numba kernels: bit casts, half-precision loads, exp, random bits."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2

_LOG2E = np.float32(1.4426950408889634)
_SCALE_F16 = np.float32(2.0**112)


@intrinsic
def as_float(typingctx, word):
    """Reinterpret 32 bits as an fp32 number."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    if isinstance(word, types.Integer) and word.bitwidth == 32:
        return types.float32(word), codegen
    return None


@intrinsic
def as_pointer(typingctx, address):
    """An int64 address as a void pointer, for `carray`."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    if isinstance(address, types.Integer) and address.bitwidth == 64:
        return types.voidptr(address), codegen
    return None


@intrinsic
def _from_bfloat16(typingctx, word):
    """16 bits as fp32.  In LLVM's own types: numba would widen the shift to 64 bits, which costs
    the vectoriser a factor of five."""

    def codegen(context, builder, signature, args):
        wide = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(types.uint16), codegen


@njit(inline="always")
def widen(word, kind):
    """One stored element (its raw bits) as fp32."""
    if kind == BFLOAT16:
        return _from_bfloat16(np.uint16(word))
    if kind == FLOAT16:
        magnitude = np.uint32((np.uint32(word) & np.uint32(0x7FFF)) << np.uint32(13))
        sign = np.uint32((np.uint32(word) & np.uint32(0x8000)) << np.uint32(16))
        value = as_float(magnitude) * _SCALE_F16
        return -value if sign else value
    return as_float(np.uint32(word))


@njit(inline="always")
def fast_exp(x):
    """exp(x) for x <= 0 in fp32, relative error below 2e-7 (1 + |x|); exactly 0 below -87."""
    t = x * _LOG2E
    n = np.int32(t - np.float32(0.5))
    r = (t - np.float32(n)) * np.float32(0.6931471805599453)
    p = np.float32(1.0 / 5040.0)
    p = p * r + np.float32(1.0 / 720.0)
    p = p * r + np.float32(1.0 / 120.0)
    p = p * r + np.float32(1.0 / 24.0)
    p = p * r + np.float32(1.0 / 6.0)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    n = max(n, np.int32(-126))
    power = as_float(np.int32((n + np.int32(127)) << np.int32(23)))
    return p * power if x > np.float32(-87.0) else np.float32(0.0)


@njit(inline="always")
def mix(state, word):
    """`express_vllm.rng.mix` in 64-bit arithmetic."""
    mask = np.uint64(0xFFFFFFFF)
    h = (np.uint64(state) ^ np.uint64(word)) & mask
    h ^= h >> np.uint64(16)
    h = (h * np.uint64(0x85EBCA6B)) & mask
    h ^= h >> np.uint64(13)
    h = (h * np.uint64(0xC2B2AE35)) & mask
    h ^= h >> np.uint64(16)
    return (h + np.uint64(0x9E3779B9)) & mask


@njit(inline="always")
def random_bits(event_key, op, stream, index):
    """`express_vllm.rng.bits`."""
    return mix(mix(mix(event_key, op), stream), index)
