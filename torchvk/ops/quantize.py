"""``quantize`` and ``dequantize``: floating-point values ↔ integers with scales and zero points.

Scale and zero point have the rank of x, and each of their sizes divides x's: one of them serves a block of
x.shape / scale.shape elements (torchao's block model). Per tensor all their sizes are 1; per channel all but one; per
token and per group of the last dimension likewise. No zero point means 0.

dequantize: (q − zero point) · scale, in float32, rounded to its dtype.

quantize: clamp(round(x · (1 / scale)) + zero point, quant_min, quant_max) with round half to even, in the precision
of one of these formulas (``formula``):

- "pt2e": float32 (``torch.ao.quantization.fx._decomposed``: ``quantize_per_tensor``, ``quantize_per_channel``);
- "torchao": in the scale's dtype the inverse, in the wider of x's and the scale's the rest
  (``torchao.quantization.quant_primitives._quantize_affine_no_dtype_cast``);
- "pt2e_group": float32, rounded after the zero point is added (``quantize_per_channel_group``);
- "pt2e_token": the same in float64 (``quantize_per_token``, whose scales are float64).

NaN gives 0; infinities give quant_min and quant_max. What does not fit the dtype saturates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.ops.codes import DTYPE, units
from torchvk.ops.operator import (
    Array,
    Capabilities,
    Dispatch,
    Kernels,
    Operator,
    Types,
    expect,
    grid,
    read,
    register,
    write,
)
from torchvk.ops.shapes import Shape, collapse, dense_strides, expect_dtype, padded, present, words

FLOATS = (DType.FLOAT32, DType.FLOAT16)
INTEGERS = (DType.INT8, DType.UINT8, DType.INT16, DType.INT32)
ZERO_POINTS = (*INTEGERS, DType.INT64)
MAX_DIMENSIONS = 8

Formula = Literal["pt2e", "torchao", "pt2e_group", "pt2e_token"]
# Positions are the codes of shaders/quantize.slang.
FORMULAS: tuple[Formula, ...] = get_args(Formula)


@dataclass(frozen=True)
class QuantizeAttributes:
    """dtype: int8, uint8, int16 or int32; quant_min and quant_max lie within its range."""

    dtype: DType
    quant_min: int
    quant_max: int
    formula: Formula = "pt2e"


@dataclass(frozen=True)
class DequantizeAttributes:
    """dtype: float32 or float16."""

    dtype: DType


def _blocks(inputs: Types) -> tuple[TensorType, TensorType, TensorType | None]:
    """x, scale and zero point; raises OperatorError unless they belong together."""
    expect(len(inputs) in (2, 3), f"takes 2 or 3 inputs, got {len(inputs)}")
    x, scale = present(inputs[:2])
    zero = inputs[2] if len(inputs) == 3 else None
    expect_dtype(scale, FLOATS, "the scale")
    expect(len(scale.shape) == len(x.shape), f"a scale of shape {list(scale.shape)} for x {list(x.shape)}")
    for size, blocks in zip(x.shape, scale.shape, strict=True):
        expect(
            blocks == size or (blocks > 0 and size % blocks == 0),
            f"scales of shape {list(scale.shape)} do not divide x {list(x.shape)} into blocks",
        )
    if zero is not None:
        expect_dtype(zero, ZERO_POINTS, "the zero point")
        expect(zero.shape == scale.shape, f"zero points {list(zero.shape)} for scales {list(scale.shape)}")
    return x, scale, zero


def _quantize_infer(attributes: QuantizeAttributes, inputs: Types) -> tuple[TensorType, ...]:
    x, _, _ = _blocks(inputs)
    expect_dtype(x, FLOATS)
    expect(attributes.dtype in INTEGERS, f"cannot quantize to {attributes.dtype.value}")
    limits = np.iinfo(attributes.dtype.numpy)
    expect(
        limits.min <= attributes.quant_min <= attributes.quant_max <= limits.max,
        f"quant_min {attributes.quant_min} and quant_max {attributes.quant_max} are not a range of "
        f"{attributes.dtype.value}",
    )
    return (TensorType(attributes.dtype, x.shape),)


def _dequantize_infer(attributes: DequantizeAttributes, inputs: Types) -> tuple[TensorType, ...]:
    q, _, _ = _blocks(inputs)
    expect_dtype(q, INTEGERS)
    expect(attributes.dtype in FLOATS, f"cannot dequantize to {attributes.dtype.value}")
    return (TensorType(attributes.dtype, q.shape),)


def _walk(inputs: Types) -> tuple[Shape, Shape]:
    """The fewest dimensions in which x is walked, and the strides of the scale along them."""
    x, scale, _ = _blocks(inputs)
    sizes: list[int] = []
    strides: list[int] = []
    for size, blocks, stride in zip(x.shape, scale.shape, dense_strides(scale.shape), strict=True):
        sizes += [blocks, size // max(blocks, 1)]
        strides += [stride if blocks > 1 else 0, 0]
    found, (own,) = collapse(tuple(sizes), tuple(strides))
    return found, own


def _support(attributes: object, inputs: Types) -> str | None:
    x, _, _ = _blocks(inputs)
    if x.numel and len(_walk(inputs)[0]) > MAX_DIMENSIONS:
        return f"blocks along more than {MAX_DIMENSIONS // 2} dimensions are not supported"
    return None


def spread(values: Array, shape: Shape) -> Array:
    """One value a block as one an element."""
    for axis, (size, blocks) in enumerate(zip(shape, values.shape, strict=True)):
        if 1 < blocks < size:
            values = np.repeat(values, size // blocks, axis=axis)
    return np.asarray(np.broadcast_to(values, shape))


def _quantize_reference(attributes: QuantizeAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    x, scale, *rest = inputs
    assert x is not None
    assert scale is not None
    zero = rest[0] if rest else None
    limits = np.iinfo(attributes.dtype.numpy)
    with np.errstate(all="ignore"):
        if attributes.formula == "pt2e":
            x, scale = x.astype(np.float32), scale.astype(np.float32)
        elif attributes.formula == "pt2e_group":
            scale = scale.astype(np.float32)
        elif attributes.formula == "pt2e_token":
            scale = scale.astype(np.float64)
        # NumPy promotes as torch does, and rounds float16 after each operation.
        product = x * spread(scale.dtype.type(1) / scale, x.shape)
        offset = 0 if zero is None else spread(zero, x.shape).astype(product.dtype)
        late = attributes.formula in ("pt2e_group", "pt2e_token")
        q = np.rint(product + offset) if late else np.rint(product) + offset
        # torch clamps in q's dtype; float64 here, so that int32's limits are exact and saturate.
        low, high = (float(product.dtype.type(bound)) for bound in (attributes.quant_min, attributes.quant_max))
        q = np.clip(np.where(np.isnan(q), 0, q).astype(np.float64), low, high)
        q = np.where(np.isnan(product), 0, q)
        return (np.clip(q, limits.min, limits.max).astype(attributes.dtype.numpy),)


def _dequantize_reference(attributes: DequantizeAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    q, scale, *rest = inputs
    assert q is not None
    assert scale is not None
    zero = rest[0] if rest else None
    dtype = attributes.dtype.numpy
    with np.errstate(all="ignore"):
        value = q.astype(dtype)
        if zero is not None:
            value = value - spread(zero, q.shape).astype(dtype)
        return ((value.astype(np.float32) * spread(scale.astype(np.float32), q.shape)).astype(dtype),)


def _kernels(
    kernel: str,
    formula: int,
    low: int,
    high: int,
    inputs: Types,
    result: TensorType,
    capabilities: Capabilities,
) -> Kernels:
    x, scale, zero = _blocks(inputs)
    if x.numel == 0:
        return Kernels(())
    sizes, strides = _walk(inputs)
    rank = 0 if strides == (0,) else len(sizes)
    constants = (
        capabilities.local_size,
        *(DTYPE[x.dtype], DTYPE[result.dtype], rank, formula),
        *(DTYPE[scale.dtype], zero is not None, DTYPE[zero.dtype] if zero else 0),
    )
    numbers = (x.numel, *padded(sizes[1:], MAX_DIMENSIONS - 1, 1), *padded(strides, MAX_DIMENSIONS), low, high)
    dispatch = Dispatch(
        kernel,
        (read(0), read(1), read(2 if zero else 1), write()),
        grid(units(result.numel, result.dtype), capabilities),
        constants,
        words(*numbers),
        bytes=x.nbytes + result.nbytes + scale.nbytes + (zero.nbytes if zero else 0),
        flops=2 * x.numel,
    )
    return Kernels((dispatch,))


def _quantize_kernels(
    attributes: QuantizeAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    code = FORMULAS.index(attributes.formula)
    limits = attributes.quant_min, attributes.quant_max
    return _kernels("quantize", code, *limits, inputs, outputs[0], capabilities)


def _dequantize_kernels(
    attributes: DequantizeAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    return _kernels("dequantize", 0, 0, 0, inputs, outputs[0], capabilities)


register(
    Operator(
        "quantize",
        "clamp(round(x / scale) + zero point): per tensor, channel, token, group or any blocks",
        _quantize_infer,
        _quantize_reference,
        _quantize_kernels,
        QuantizeAttributes,
        _support,
        dtypes=FLOATS,
    )
)
register(
    Operator(
        "dequantize",
        "(x - zero point) scale: per tensor, channel, token, group or any blocks",
        _dequantize_infer,
        _dequantize_reference,
        _dequantize_kernels,
        DequantizeAttributes,
        _support,
        dtypes=INTEGERS,
    )
)
