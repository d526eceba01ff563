"""torch's arithmetic in NumPy: the references of the elementwise operators.

Elementary functions are computed in float64 and rounded to float32, then (float16) once more, as torch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from torchvk.graph import DType
from torchvk.ops.operator import Array

Function = Callable[[Array], Array]
Function2 = Callable[[Array, Array], Array]

_erf = np.frompyfunc(math.erf, 1, 1)


def rounded(function: Function) -> Function:
    """``function``, computed in float64, with the operand's dtype."""

    def apply(x: Array) -> Array:
        return np.asarray(function(x.astype(np.float64))).astype(np.float32).astype(x.dtype)

    return apply


def rounded2(function: Function2) -> Function2:
    """The same for two operands."""

    def apply(a: Array, b: Array) -> Array:
        return np.asarray(function(a.astype(np.float64), b.astype(np.float64))).astype(np.float32).astype(a.dtype)

    return apply


def erf(x: Array) -> Array:
    """float64 to float64."""
    return np.asarray(_erf(x)).astype(np.float64)


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def silu(x: Array) -> Array:
    return np.asarray(x / (1 + np.exp(-x)))


def hardsigmoid(x: Array) -> Array:
    return np.asarray(np.minimum(np.maximum(x + 3, 0), 6) / 6)


def hardswish(x: Array) -> Array:
    return np.asarray(x * np.minimum(np.maximum(x + 3, 0), 6) / 6)


def gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + erf(x * math.sqrt(0.5))))


def gelu_tanh(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def sign(x: Array) -> Array:
    """-1, 0 or 1; 0 for NaN, as torch."""
    return np.asarray((x > 0).astype(x.dtype) - (x < 0).astype(x.dtype))


def remainder(a: Array, b: Array) -> Array:
    """With the sign of ``b``. Integers: 0 where ``b`` is 0."""
    if a.dtype.kind != "f":
        return np.asarray(np.remainder(a, b))
    rest = fmod(a, b)
    return np.where((rest != 0) & ((b < 0) != (rest < 0)), rest + b, rest)


def fmod(a: Array, b: Array) -> Array:
    """With the sign of ``a``. Integers: 0 where ``b`` is 0."""
    return np.asarray(np.fmod(a, b))


def floor_divide(a: Array, b: Array) -> Array:
    """Rounded down. Floats as c10::div_floor_floating: from the exact remainder. Integers: 0 where ``b`` is 0."""
    if a.dtype.kind != "f":
        return np.asarray(np.floor_divide(a, b))
    wide_a, wide_b = a.astype(np.float32), b.astype(np.float32)
    rest = np.fmod(wide_a, wide_b)
    quotient = (wide_a - rest) / wide_b
    quotient = np.where((rest != 0) & ((wide_b < 0) != (rest < 0)), quotient - np.float32(1), quotient)
    down = np.floor(quotient)
    down = np.where(quotient - down > 0.5, down + np.float32(1), down)
    whole = np.where(quotient != 0, down, np.copysign(np.float32(0), wide_a / wide_b))
    return np.asarray(np.where(wide_b == 0, wide_a / wide_b, whole).astype(a.dtype))


def power(a: Array, b: Array) -> Array:
    """C99's pow for floats. Integers wrap; a negative exponent gives 0 unless the base is 1 or -1."""
    if a.dtype.kind == "f":
        return rounded2(np.power)(a, b)
    base, exponent = (np.array(x) for x in np.broadcast_arrays(a, b))
    odd = (exponent & 1) != 0
    inverse = np.where(base == 1, 1, np.where(base == -1, np.where(odd, -1, 1), 0)).astype(a.dtype)
    negative = exponent < 0
    exponent[negative] = 0
    value = np.ones_like(base)
    while exponent.any():
        value = np.where((exponent & 1) != 0, value * base, value)
        base = base * base
        exponent >>= 1
    return np.where(negative, inverse, value)


def convert(x: Array, dtype: DType) -> Array:
    """torch's conversions. Where C leaves float to integer open: int64 and int32 saturate, NaN is 0, and smaller
    integers are the low bits of the int32."""
    target = dtype.numpy
    if x.dtype.kind != "f" or target.kind == "f":
        # int64 → float16 goes through float32, as in torch.
        return (x.astype(np.float32) if dtype is DType.FLOAT16 else x).astype(target)
    if dtype is DType.BOOL:
        return np.asarray(x != 0)
    wide = np.int64 if dtype is DType.INT64 else np.int32
    limits = np.iinfo(wide)
    whole = np.trunc(np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf))
    # -float(min) is the first value above the range, exactly.
    high, low = whole >= -float(limits.min), whole < float(limits.min)
    inside = np.where(high | low, 0.0, whole).astype(wide)
    return np.where(high, limits.max, np.where(low, limits.min, inside)).astype(wide).astype(target)
