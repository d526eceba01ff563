"""Elementwise arithmetic, comparison and logic; dtype conversion; constants made by a rule."""

from __future__ import annotations

import math

import torch

from torchvk.graph import DType
from torchvk.lowering.draft import Value
from torchvk.lowering.refusal import Refused
from torchvk.lowering.translate.registry import (
    Operand,
    Translation,
    Translator,
    as_number,
    register,
    torch_dtype,
    translates,
)

# Integers become float32, as torch does it.
FLOAT_UNARY = (
    *("exp", "log", "log1p", "expm1", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tanh", "erf"),
    *("sigmoid", "silu", "hardswish", "hardsigmoid"),
)
# Integers stay as they are.
ROUNDING = ("floor", "ceil", "round", "trunc")
SAME_TYPE_UNARY = ("abs", "neg", "sign", "relu", "bitwise_not", "logical_not")
NONFINITE = ("isnan", "isinf")

# torch overload → operator; operands are promoted to one dtype.
BINARY = {
    "mul.Tensor": "mul",
    "mul.Scalar": "mul",
    "floor_divide.default": "floor_divide",
    "floor_divide.Scalar": "floor_divide",
    "remainder.Tensor": "remainder",
    "remainder.Scalar": "remainder",
    "fmod.Tensor": "fmod",
    "fmod.Scalar": "fmod",
    "minimum.default": "minimum",
    "maximum.default": "maximum",
    "eq.Tensor": "eq",
    "eq.Scalar": "eq",
    "ne.Tensor": "ne",
    "ne.Scalar": "ne",
    "lt.Tensor": "lt",
    "lt.Scalar": "lt",
    "le.Tensor": "le",
    "le.Scalar": "le",
    "gt.Tensor": "gt",
    "gt.Scalar": "gt",
    "ge.Tensor": "ge",
    "ge.Scalar": "ge",
    "bitwise_and.Tensor": "bitwise_and",
    "bitwise_and.Scalar": "bitwise_and",
    "bitwise_or.Tensor": "bitwise_or",
    "bitwise_or.Scalar": "bitwise_or",
    "bitwise_xor.Tensor": "bitwise_xor",
    "bitwise_xor.Scalar": "bitwise_xor",
    "logical_and.default": "logical_and",
    "logical_or.default": "logical_or",
    "logical_xor.default": "logical_xor",
}
FLOAT_BINARY = {"div.Tensor": "div", "div.Scalar": "div", "atan2.default": "atan2"}


def unary(op: str, floating: bool = False) -> Translation:
    def translate(t: Translator, self: Value) -> Value:
        (x,) = t.operands(self, floating=floating)
        return t.op(op, x)

    return translate


def rounding(op: str) -> Translation:
    return lambda t, self: t.op(op, self) if self.dtype.is_float else self


def nonfinite(op: str) -> Translation:
    return lambda t, self: t.op(op, self) if self.dtype.is_float else t.full(self.shape, False, DType.BOOL)


def binary(op: str, floating: bool = False) -> Translation:
    def translate(t: Translator, self: Operand, other: Operand) -> Value:
        return t.op(op, *t.operands(self, other, floating=floating))

    return translate


for _op in FLOAT_UNARY:
    register(unary(_op, floating=True), f"aten.{_op}.default")
for _op in SAME_TYPE_UNARY:
    register(unary(_op), f"aten.{_op}.default")
for _op in ROUNDING:
    register(rounding(_op), f"aten.{_op}.default")
for _op in NONFINITE:
    register(nonfinite(_op), f"aten.{_op}.default")
for _name, _op in BINARY.items():
    register(binary(_op), f"aten.{_name}")
for _name, _op in FLOAT_BINARY.items():
    register(binary(_op, floating=True), f"aten.{_name}")


@translates("aten.add.Tensor", "aten.add.Scalar")
def add(t: Translator, self: Value, other: Operand, alpha: float = 1) -> Value:
    x, y = t.operands(self, other)
    return t.op("add", x, _times(t, y, alpha))


@translates("aten.sub.Tensor", "aten.sub.Scalar")
def sub(t: Translator, self: Value, other: Operand, alpha: float = 1) -> Value:
    x, y = t.operands(self, other)
    return t.op("sub", x, _times(t, y, alpha))


@translates("aten.rsub.Tensor", "aten.rsub.Scalar")
def rsub(t: Translator, self: Value, other: Operand, alpha: float = 1) -> Value:
    x, y = t.operands(self, other)
    return t.op("sub", y, _times(t, x, alpha))


def _times(t: Translator, x: Value, alpha: float) -> Value:
    return x if alpha == 1 else t.op("mul", x, t.scalar(alpha, x.dtype))


@translates("aten.div.Tensor_mode", "aten.div.Scalar_mode")
def div_mode(t: Translator, self: Value, other: Operand, rounding_mode: str | None) -> Value:
    x, y = t.operands(self, other, floating=rounding_mode is None)
    if rounding_mode is None:
        return t.op("div", x, y)
    if rounding_mode == "floor":
        return t.op("floor_divide", x, y)
    if x.dtype.is_float:
        return t.op("trunc", t.op("div", x, y))
    # x - fmod(x, y) is a multiple of y, nearer to zero than x: the division leaves nothing to round.
    return t.op("floor_divide", t.op("sub", x, t.op("fmod", x, y)), y)


@translates("aten.pow.Tensor_Scalar")
def pow_scalar(t: Translator, self: Value, exponent: float) -> Value:
    x, _ = t.operands(self, exponent)
    if exponent == 0:
        return t.full(x.shape, 1, x.dtype)
    if exponent == 1:
        return x
    if exponent == 2:
        return t.op("mul", x, x)
    if exponent == 3:
        return t.op("mul", t.op("mul", x, x), x)
    if x.dtype.is_float:
        # The special cases that torch's own kernel has.
        if exponent == 0.5:
            return t.op("sqrt", x)
        if exponent == -0.5:
            return t.op("rsqrt", x)
        if exponent == -1:
            return t.op("reciprocal", x)
        if exponent == -2:
            return t.op("reciprocal", t.op("mul", x, x))
    return t.op("pow", x, t.scalar(exponent, x.dtype))


@translates("aten.pow.Tensor_Tensor", "aten.pow.Scalar")
def pow_tensor(t: Translator, self: Operand, exponent: Value) -> Value:
    return t.op("pow", *t.operands(self, exponent))


@translates("aten.clamp.default", "aten.clamp_min.default", "aten.clamp_max.default")
def clamp(t: Translator, self: Value, min: float | None = None, max: float | None = None) -> Value:
    (x, *_) = t.operands(self, *(bound for bound in (min, max) if bound is not None))
    low, high = (None if bound is None else as_number(bound, x.dtype) for bound in (min, max))
    return t.op("clamp", x, min=low, max=high)


@translates("aten.clamp.Tensor", "aten.clamp_min.Tensor", "aten.clamp_max.Tensor")
def clamp_tensor(t: Translator, self: Value, min: Value | None = None, max: Value | None = None) -> Value:
    bounds = [bound for bound in (min, max) if bound is not None]
    x, *promoted = t.operands(self, *bounds)
    if min is not None:
        x = t.op("maximum", x, promoted[0])
    return x if max is None else t.op("minimum", x, promoted[-1])


@translates("aten.hardtanh.default")
def hardtanh(t: Translator, self: Value, min_val: float = -1, max_val: float = 1) -> Value:
    return clamp(t, self, min_val, max_val)


@translates("aten.relu6.default")
def relu6(t: Translator, self: Value) -> Value:
    return clamp(t, self, 0, 6)


@translates("aten.gelu.default")
def gelu(t: Translator, self: Value, approximate: str = "none") -> Value:
    return t.op("gelu", self, approximate=approximate)


@translates("aten.leaky_relu.default")
def leaky_relu(t: Translator, self: Value, negative_slope: float = 0.01) -> Value:
    return t.op("leaky_relu", self, negative_slope=float(negative_slope))


@translates("aten.elu.default")
def elu(t: Translator, self: Value, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Value:
    if input_scale != 1:
        raise Refused(f"input_scale={input_scale} is not supported, only 1 is")
    y = t.op("elu", self, alpha=float(alpha))
    return y if scale == 1 else t.op("mul", y, t.scalar(scale, y.dtype))


@translates("aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar")
def where(t: Translator, condition: Value, self: Operand, other: Operand) -> Value:
    a, b = t.operands(self, other)
    return t.op("where", t.cast(condition, DType.BOOL), a, b)


@translates("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def masked_fill(t: Translator, self: Value, mask: Value, value: Operand) -> Value:
    return t.op("where", mask, t.operand(value, self.dtype), self)


@translates(
    "aten._to_copy.default",
    "dim_order_ops._to_dim_order_copy.default",
    "dim_order_ops._clone_dim_order.default",
    "aten.clone.default",
    "aten.alias_copy.default",
    "aten.detach_copy.default",
    "aten.lift_fresh_copy.default",
)
def to(
    t: Translator,
    self: Value,
    dtype: torch.dtype | None = None,
) -> Value:
    """Memory formats are the program's affair: see :func:`torchvk.lowering.types.type_of`."""
    return t.cast(self, torch_dtype(dtype, self.dtype))


@translates("aten.full.default", "aten.full_like.default")
def full(t: Translator, fill_value: float) -> Value:
    return t.full(t.out.shape, fill_value, t.out.dtype)


@translates(
    "aten.zeros.default",
    "aten.zeros_like.default",
    "aten.empty.memory_format",
    "dim_order_ops._empty_dim_order.default",
    "aten.empty_like.default",
)
def zeros(t: Translator) -> Value:
    return t.full(t.out.shape, 0, t.out.dtype)


@translates("aten.ones.default", "aten.ones_like.default")
def ones(t: Translator) -> Value:
    return t.full(t.out.shape, 1, t.out.dtype)


@translates("aten.scalar_tensor.default")
def scalar_tensor(t: Translator, s: float) -> Value:
    return t.scalar(s, t.out.dtype)


@translates("aten.fill.Scalar", "aten.fill.Tensor")
def fill(t: Translator, self: Value, value: Operand) -> Value:
    return t.expand(t.operand(value, self.dtype), self.shape)


@translates("aten.copy.default")
def copy(t: Translator, self: Value, src: Value) -> Value:
    return t.expand(t.cast(src, self.dtype), self.shape)


@translates("aten.arange.start_step", "aten.arange.start", "aten.arange.default")
def arange(t: Translator, start: float = 0, step: float = 1) -> Value:
    if t.out.dtype is DType.BOOL or not (math.isfinite(start) and math.isfinite(step)):
        raise Refused(f"arange from {start} by {step} as {t.out.dtype.value}")
    first, by = (float(start), float(step)) if t.out.dtype.is_float else (int(start), int(step))
    return t.op("arange", start=first, step=by, size=t.out.shape[0], dtype=t.out.dtype)
