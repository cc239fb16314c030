"""Scalar parts of the numba kernels: bit casts, half-precision loads, exp, random bits."""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

#: Integers that hold a storage type's bits.  Each says which type it is.
RAW = {torch.bfloat16: np.uint16, torch.float16: np.int16, torch.float32: np.uint32}

_LOG2E = np.float32(1.4426950408889634)
_WORD = ir.IntType(32)


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
def widen(typingctx, word):
    """One stored element as fp32: its raw bits, of the type that `RAW` gives them.

    In LLVM's own types: numba would widen shifts to 64 bits, which costs the vectoriser a factor of
    five.
    """
    codegen = {
        types.uint16: _from_bfloat16, types.int16: _from_float16, types.uint32: _from_float32,
    }.get(word)  # fmt: skip
    return (types.float32(word), codegen) if codegen else None


def _from_bfloat16(context, builder, signature, args):
    return builder.bitcast(_shifted(builder, args[0], 0xFFFF, 16), ir.FloatType())


def _from_float16(context, builder, signature, args):
    """The exponent's bias is other, so fp32 multiplies by a power of two, subnormals too."""
    magnitude = builder.bitcast(_shifted(builder, args[0], 0x7FFF, 13), ir.FloatType())
    scaled = builder.fmul(magnitude, ir.Constant(ir.FloatType(), 2.0**112))
    sign = _shifted(builder, args[0], 0x8000, 16)
    return builder.bitcast(builder.or_(builder.bitcast(scaled, _WORD), sign), ir.FloatType())


def _from_float32(context, builder, signature, args):
    return builder.bitcast(args[0], ir.FloatType())


def _shifted(builder, half, mask, by):
    """Bits of a 16-bit word, shifted to the left in 32."""
    bits = builder.and_(builder.zext(half, _WORD), ir.Constant(_WORD, mask))
    return builder.shl(bits, ir.Constant(_WORD, by))


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
def fast_tanh(x):
    """tanh(x) in fp32, absolute error below 4e-7."""
    small = fast_exp(np.float32(-2.0) * abs(x))
    size = (np.float32(1.0) - small) / (np.float32(1.0) + small)
    return size if x >= np.float32(0.0) else -size


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
