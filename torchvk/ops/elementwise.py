"""Elementwise operators: arithmetic, comparison, logic, activation functions, conversion, ``where``, filling.

Binary operators and ``where`` broadcast. float16 is computed in float32 and rounded once. Booleans add as "or" and
multiply as "and". Comparisons, minimum, maximum, clamp and relu treat NaN as torch does. Division of integers by
zero gives 0. The accuracy of the float functions stands in ``shaders/float_math.slang``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.ops import arithmetic
from torchvk.ops.arithmetic import Function, Function2, rounded, rounded2
from torchvk.ops.codes import DTYPE, units
from torchvk.ops.operator import (
    Array,
    Capabilities,
    Dispatch,
    Kernels,
    NoAttributes,
    Operator,
    Types,
    expect,
    grid,
    read,
    register,
    write,
)
from torchvk.ops.shapes import (
    Walk,
    broadcast,
    broadcast_strides,
    expect_dtype,
    expect_same_dtype,
    nbytes,
    operands,
    words,
)

FLOATS = (DType.FLOAT32, DType.FLOAT16)
INTS = (DType.INT64, DType.INT32, DType.INT16, DType.INT8, DType.UINT8)
NUMBERS = (*FLOATS, *INTS)
ALL = (*NUMBERS, DType.BOOL)
INTS_AND_BOOL = (*INTS, DType.BOOL)

# Positions are the operation codes of shaders/elementwise.slang and elementwise_binary.slang.
UNARY = (
    *("exp", "log", "log1p", "expm1", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tanh", "erf", "sigmoid", "silu"),
    *("floor", "ceil", "round", "trunc", "isnan", "isinf", "hardswish", "hardsigmoid", "abs", "neg", "sign", "relu"),
    *("logical_not", "bitwise_not", "gelu", "gelu_tanh", "leaky_relu", "elu", "clamp"),
)
BINARY = (
    *("add", "sub", "mul", "div", "floor_divide", "remainder", "fmod", "pow", "minimum", "maximum", "atan2"),
    *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor"),
    *("bitwise_and", "bitwise_or", "bitwise_xor"),
)


def domain(dtype: DType) -> str:
    """The suffix of the kernels that compute with this dtype."""
    return "float" if dtype.is_float else "long" if dtype is DType.INT64 else "int"


# --- one operand


def unary_kernels(
    code: str, source: TensorType, result: TensorType, capabilities: Capabilities, parameters: bytes = b""
) -> Kernels:
    """``parameters``: flags and two 64-bit operands, as the kernels' push constants want them."""
    return _flat(
        f"unary_{domain(source.dtype)}", (UNARY.index(code), DTYPE[source.dtype]), result, capabilities, parameters, 1
    )


def _flat(
    kernel: str,
    constants: tuple[int, ...],
    result: TensorType,
    capabilities: Capabilities,
    parameters: bytes = b"",
    inputs: int = 0,
    source_bytes: int = 0,
) -> Kernels:
    """One dispatch over the units of ``result`` of a kernel with constants (local size, operation, IN, OUT)."""
    if result.numel == 0:
        return Kernels(())
    dispatch = Dispatch(
        kernel,
        (write(), *(read(i) for i in range(inputs))),
        grid(units(result.numel, result.dtype), capabilities),
        (capabilities.local_size, *constants, DTYPE[result.dtype]),
        words(result.numel) + (parameters or bytes(20)),
        bytes=result.nbytes + source_bytes,
        flops=result.numel,
    )
    return Kernels((dispatch,))


def _register_unary(
    name: str, function: Function, dtypes: Sequence[DType], summary: str, to_bool: bool = False
) -> None:
    def infer(attributes: NoAttributes, inputs: Types) -> tuple[TensorType, ...]:
        (x,) = operands(inputs, 1)
        expect_dtype(x, dtypes)
        return (TensorType(DType.BOOL, x.shape) if to_bool else x,)

    def reference(attributes: NoAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
        (x,) = inputs
        assert x is not None
        with np.errstate(all="ignore"):
            return (np.asarray(function(x)),)

    def kernels(
        attributes: NoAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
    ) -> Kernels:
        (x,) = operands(inputs, 1)
        return unary_kernels(name, x, outputs[0], capabilities)

    register(Operator(name, summary, infer, reference, kernels, dtypes=tuple(dtypes)))


_register_unary("exp", rounded(np.exp), FLOATS, "e^x")
_register_unary("log", rounded(np.log), FLOATS, "natural logarithm")
_register_unary("log1p", rounded(np.log1p), FLOATS, "log(1 + x)")
_register_unary("expm1", rounded(np.expm1), FLOATS, "e^x - 1")
_register_unary("sqrt", rounded(np.sqrt), FLOATS, "square root")
_register_unary("rsqrt", rounded(lambda x: 1 / np.sqrt(x)), FLOATS, "1 / square root")
_register_unary("reciprocal", rounded(lambda x: 1 / x), FLOATS, "1 / x")
_register_unary("sin", rounded(np.sin), FLOATS, "sine, of any finite angle")
_register_unary("cos", rounded(np.cos), FLOATS, "cosine, of any finite angle")
_register_unary("tanh", rounded(np.tanh), FLOATS, "hyperbolic tangent")
_register_unary("erf", rounded(arithmetic.erf), FLOATS, "error function")
_register_unary("sigmoid", rounded(arithmetic.sigmoid), FLOATS, "1 / (1 + e^-x)")
_register_unary("silu", rounded(arithmetic.silu), FLOATS, "x sigmoid(x)")
_register_unary("floor", np.floor, FLOATS, "rounded down")
_register_unary("ceil", np.ceil, FLOATS, "rounded up")
_register_unary("round", np.rint, FLOATS, "rounded to nearest, ties to even")
_register_unary("trunc", np.trunc, FLOATS, "rounded towards zero")
_register_unary("isnan", np.isnan, FLOATS, "is it NaN", to_bool=True)
_register_unary("isinf", np.isinf, FLOATS, "is it infinite", to_bool=True)
_register_unary("hardswish", rounded(arithmetic.hardswish), FLOATS, "x hardsigmoid(x)")
_register_unary("hardsigmoid", rounded(arithmetic.hardsigmoid), FLOATS, "min(max(x + 3, 0), 6) / 6")
_register_unary("abs", np.abs, NUMBERS, "absolute value")
_register_unary("neg", np.negative, NUMBERS, "-x")
_register_unary("sign", arithmetic.sign, NUMBERS, "-1, 0 or 1")
_register_unary("relu", lambda x: np.maximum(x, x.dtype.type(0)), NUMBERS, "max(x, 0)")
_register_unary("logical_not", np.logical_not, ALL, "x == 0", to_bool=True)
_register_unary("bitwise_not", np.invert, INTS_AND_BOOL, "all bits inverted; of bool: not")


# --- one operand and attributes


@dataclass(frozen=True)
class GeluAttributes:
    """approximate: "none" for x Phi(x) with erf, "tanh" for Hendrycks and Gimpel's approximation
    (https://arxiv.org/abs/1606.08415)."""

    approximate: Literal["none", "tanh"] = "none"


@dataclass(frozen=True)
class LeakyReluAttributes:
    negative_slope: float = 0.01


@dataclass(frozen=True)
class EluAttributes:
    alpha: float = 1.0


@dataclass(frozen=True)
class ClampAttributes:
    """Bounds, None for none. For integer tensors they are integers within the dtype's range. If both exclude each
    other the result is ``max``."""

    min: float | int | None = None
    max: float | int | None = None


@dataclass(frozen=True)
class CastAttributes:
    dtype: DType


def _bits(value: float) -> int:
    """A number as float32, by its bits; too large ones become infinite."""
    with np.errstate(all="ignore"):
        return int(np.float32(value).view(np.uint32))


def _parameters(p: int = 0, q: int = 0, flags: int = 0) -> bytes:
    """Flags and two operands: integers as 64-bit words, floats as bits in the low word."""
    mask = (1 << 64) - 1
    return struct.pack("<IQQ", flags, p & mask, q & mask)


def _register_activation(
    name: str,
    summary: str,
    attributes_type: type,
    function: Callable[[Any], Function],
    code: Callable[[Any], str],
    parameter: Callable[[Any], float],
) -> None:
    """A float function with attributes and at most one number among them."""

    def infer(attributes: Any, inputs: Types) -> tuple[TensorType, ...]:
        (x,) = operands(inputs, 1)
        expect_dtype(x, FLOATS)
        return (x,)

    def reference(attributes: Any, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
        (x,) = inputs
        assert x is not None
        with np.errstate(all="ignore"):
            return (rounded(function(attributes))(x),)

    def kernels(attributes: Any, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities) -> Kernels:
        (x,) = operands(inputs, 1)
        parameters = _parameters(_bits(parameter(attributes)))
        return unary_kernels(code(attributes), x, outputs[0], capabilities, parameters)

    register(Operator(name, summary, infer, reference, kernels, attributes_type, dtypes=FLOATS))


_register_activation(
    "gelu",
    "x Phi(x), with erf or tanh",
    GeluAttributes,
    lambda a: arithmetic.gelu_tanh if a.approximate == "tanh" else arithmetic.gelu,
    lambda a: "gelu_tanh" if a.approximate == "tanh" else "gelu",
    lambda a: 0.0,
)
_register_activation(
    "leaky_relu",
    "x, times negative_slope below 0",
    LeakyReluAttributes,
    lambda a: lambda x: np.where(x > 0, x, x * np.float64(np.float32(a.negative_slope))),
    lambda a: "leaky_relu",
    lambda a: float(a.negative_slope),
)
_register_activation(
    "elu",
    "x, alpha (e^x - 1) below 0",
    EluAttributes,
    lambda a: lambda x: np.where(x > 0, x, np.float64(np.float32(a.alpha)) * np.expm1(x)),
    lambda a: "elu",
    lambda a: float(a.alpha),
)


def _clamp_infer(attributes: ClampAttributes, inputs: Types) -> tuple[TensorType, ...]:
    (x,) = operands(inputs, 1)
    expect_dtype(x, NUMBERS)
    if not x.dtype.is_float:
        limits = np.iinfo(x.dtype.numpy)
        for bound in (attributes.min, attributes.max):
            expect(
                bound is None or (isinstance(bound, int) and limits.min <= bound <= limits.max),
                f"bound {bound} is not a number of dtype {x.dtype.value}",
            )
    return (x,)


def _clamp_reference(attributes: ClampAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    (x,) = inputs
    assert x is not None
    # Bounds are float32 for float16 tensors too, as in torch.
    wide = x.astype(np.float32) if x.dtype.kind == "f" else x
    with np.errstate(all="ignore"):
        if attributes.min is not None:
            wide = np.maximum(wide, wide.dtype.type(attributes.min))
        if attributes.max is not None:
            wide = np.minimum(wide, wide.dtype.type(attributes.max))
        return (np.asarray(wide).astype(x.dtype),)


def _clamp_kernels(
    attributes: ClampAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    (x,) = operands(inputs, 1)
    low, high = (
        0 if bound is None else _bits(bound) if x.dtype.is_float else int(bound)
        for bound in (attributes.min, attributes.max)
    )
    flags = (attributes.min is not None) + 2 * (attributes.max is not None)
    return unary_kernels("clamp", x, outputs[0], capabilities, _parameters(low, high, flags))


register(
    Operator(
        "clamp",
        "limited to [min, max]",
        _clamp_infer,
        _clamp_reference,
        _clamp_kernels,
        ClampAttributes,
        dtypes=NUMBERS,
    )
)


def _cast_infer(attributes: CastAttributes, inputs: Types) -> tuple[TensorType, ...]:
    (x,) = operands(inputs, 1)
    expect(not attributes.dtype.packed, f"cannot convert to {attributes.dtype.value}")
    return (TensorType(attributes.dtype, x.shape),)


def _cast_reference(attributes: CastAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    (x,) = inputs
    assert x is not None
    with np.errstate(all="ignore"):
        return (arithmetic.convert(x, attributes.dtype),)


def _cast_kernels(
    attributes: CastAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    (x,) = operands(inputs, 1)
    return _flat("cast", (0, DTYPE[x.dtype]), outputs[0], capabilities, inputs=1, source_bytes=x.nbytes)


register(
    Operator(
        "cast",
        "converted to another dtype; float to integer truncates",
        _cast_infer,
        _cast_reference,
        _cast_kernels,
        CastAttributes,
        dtypes=ALL,
    )
)


# --- two operands


def _walk_dispatch(
    kernel: str,
    constants: tuple[int, int],
    types: Sequence[TensorType],
    result: TensorType,
    capabilities: Capabilities,
) -> Kernels:
    """One dispatch that broadcasts ``types`` to ``result``; constants: operation and IN."""
    if result.numel == 0:
        return Kernels(())
    walk = Walk.over(result.shape, *(broadcast_strides(type.shape, result.shape) for type in types))
    dispatch = Dispatch(
        kernel,
        (write(), *(read(i) for i in range(len(types)))),
        grid(units(result.numel, result.dtype), capabilities),
        (capabilities.local_size, *constants, DTYPE[result.dtype], walk.rank),
        walk.push(operands=3),
        bytes=nbytes(types) + result.nbytes,
        flops=result.numel,
    )
    return Kernels((dispatch,))


def _register_binary(
    name: str, function: Function2, dtypes: Sequence[DType], summary: str, to_bool: bool = False
) -> None:
    def infer(attributes: NoAttributes, inputs: Types) -> tuple[TensorType, ...]:
        a, b = operands(inputs, 2)
        expect_same_dtype((a, b))
        expect_dtype(a, dtypes)
        return (TensorType(DType.BOOL if to_bool else a.dtype, broadcast((a.shape, b.shape))),)

    def reference(attributes: NoAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
        a, b = inputs
        assert a is not None
        assert b is not None
        with np.errstate(all="ignore"):
            return (np.asarray(function(a, b)),)

    def kernels(
        attributes: NoAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
    ) -> Kernels:
        types = operands(inputs, 2)
        dtype = types[0].dtype
        constants = (BINARY.index(name), DTYPE[dtype])
        return _walk_dispatch(f"binary_{domain(dtype)}", constants, types, outputs[0], capabilities)

    register(Operator(name, summary, infer, reference, kernels, dtypes=tuple(dtypes)))


_register_binary("add", np.add, ALL, "a + b; of bools: or")
_register_binary("sub", np.subtract, NUMBERS, "a - b")
_register_binary("mul", np.multiply, ALL, "a b; of bools: and")
_register_binary("div", np.divide, FLOATS, "a / b")
_register_binary("floor_divide", arithmetic.floor_divide, NUMBERS, "a / b rounded down")
_register_binary("remainder", arithmetic.remainder, NUMBERS, "remainder with the sign of b")
_register_binary("fmod", arithmetic.fmod, NUMBERS, "remainder with the sign of a")
_register_binary("pow", arithmetic.power, NUMBERS, "a to the power b")
_register_binary("minimum", np.minimum, ALL, "the smaller; NaN if either is")
_register_binary("maximum", np.maximum, ALL, "the larger; NaN if either is")
_register_binary("atan2", rounded2(np.arctan2), FLOATS, "angle of the point (b, a)")
_register_binary("eq", np.equal, ALL, "a == b", to_bool=True)
_register_binary("ne", np.not_equal, ALL, "a != b", to_bool=True)
_register_binary("lt", np.less, ALL, "a < b", to_bool=True)
_register_binary("le", np.less_equal, ALL, "a <= b", to_bool=True)
_register_binary("gt", np.greater, ALL, "a > b", to_bool=True)
_register_binary("ge", np.greater_equal, ALL, "a >= b", to_bool=True)
_register_binary("logical_and", np.logical_and, ALL, "both are not 0", to_bool=True)
_register_binary("logical_or", np.logical_or, ALL, "one is not 0", to_bool=True)
_register_binary("logical_xor", np.logical_xor, ALL, "exactly one is not 0", to_bool=True)
_register_binary("bitwise_and", np.bitwise_and, INTS_AND_BOOL, "bits of both")
_register_binary("bitwise_or", np.bitwise_or, INTS_AND_BOOL, "bits of either")
_register_binary("bitwise_xor", np.bitwise_xor, INTS_AND_BOOL, "bits of one and not the other")


# --- where


def _where_infer(attributes: NoAttributes, inputs: Types) -> tuple[TensorType, ...]:
    condition, a, b = operands(inputs, 3)
    expect_dtype(condition, (DType.BOOL,), "the condition")
    expect_same_dtype((a, b))
    return (TensorType(a.dtype, broadcast((condition.shape, a.shape, b.shape))),)


def _where_reference(attributes: NoAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    condition, a, b = inputs
    assert condition is not None
    assert a is not None
    assert b is not None
    return (np.where(condition, a, b),)


def _where_kernels(
    attributes: NoAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    return _walk_dispatch("where", (0, DTYPE[DType.BOOL]), operands(inputs, 3), outputs[0], capabilities)


register(
    Operator(
        "where",
        "a where the condition (first input, bool) holds, else b",
        _where_infer,
        _where_reference,
        _where_kernels,
        dtypes=(DType.BOOL,),
    )
)
