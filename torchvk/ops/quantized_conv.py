"""Convolutions with integer weights: ``quantized_conv``.

    y[p, o] = f(sx · sw[o] · Σ_k (qx[p, k] − zx) · qw[o, k] + b[o])

with quantized activations, whose padding is the real 0; the sums are integers and exact. Without (weight only) the sum
is Σ_k x[p, k] · qw[o, k], in float32. f: torchvk.ops.epilogue. The result may be quantized at once:
clamp(round(y · (1 / output_scale)) + output_zero_point, output_min, output_max), half to even, in float32, as
``quantized_decomposed.quantize_per_tensor`` does it.

Geometry and the weight's shape: torchvk.ops.convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.ops.convolution import MAX_K, MAX_K_OF_FLOATS_TO_BYTES, convolve, output_shape, reason_against
from torchvk.ops.epilogue import apply_epilogue
from torchvk.ops.operator import Array, Operator, Types, expect, register
from torchvk.ops.quantized_conv_case import BIAS, SCALE, WEIGHT, QuantizedConvAttributes, operands
from torchvk.ops.quantized_conv_kernels import variants
from torchvk.ops.quantized_sum import apply_sum, infer_sum

FLOATS = (DType.FLOAT32, DType.FLOAT16)
EIGHT_BITS = (DType.INT8, DType.UINT8)
ZERO_POINTS = (DType.INT32, DType.INT64, DType.INT8, DType.UINT8, DType.INT16)


def _infer(attributes: QuantizedConvAttributes, inputs: Types) -> tuple[TensorType, ...]:
    x, weight, scale, bias, x_scale, x_zero, residual = operands(inputs)
    assert x is not None
    assert weight is not None
    floating = attributes.activation == "none"
    expect(
        x.dtype in (FLOATS if floating else EIGHT_BITS),
        f"quantized_conv with {attributes.activation} activations takes x in "
        f"{'float32 or float16' if floating else 'int8 or uint8'}, got {x}",
    )
    expect(weight.dtype in (DType.INT8, DType.INT4), f"quantized_conv takes a weight in int8 or int4, got {weight}")
    dtype = x.dtype if floating else attributes.dtype
    expect(dtype in FLOATS, f"quantized_conv gives float32 or float16, not {dtype.value}")
    shape = output_shape("quantized_conv", attributes, x, weight)
    channels = TensorType(DType.FLOAT32, shape[-1:])
    expect(scale == channels, f"quantized_conv takes a scale {channels}, got {scale}")
    expect(bias is None or bias == channels, f"quantized_conv takes a bias {channels}, got {bias}")
    if attributes.activation == "dynamic":
        good = x_scale is not None and x_scale.dtype in FLOATS and x_scale.numel == 1
        expect(good, f"quantized_conv takes a scale of x, of one element, got {x_scale}")
        good = x_zero is None or (x_zero.dtype in ZERO_POINTS and x_zero.numel == 1)
        expect(good, f"quantized_conv takes a zero point of x, of one element, got {x_zero}")
    else:
        expect(x_scale is None and x_zero is None, "quantized_conv: only dynamic activations have operands for scales")
    if attributes.activation == "static":
        low, high = _range(x.dtype)
        zero = attributes.input_zero_point
        expect(low <= zero <= high, f"quantized_conv: the zero point {zero} of x is outside of {low}…{high}")
        expect(_positive(attributes.input_scale), f"quantized_conv: the scale {attributes.input_scale} of x")
    floats = TensorType(dtype, shape)
    good = attributes.sum_dtype is not None or residual in (None, floats)
    expect(good, f"quantized_conv takes a residual like its result {floats}, got {residual}")
    if attributes.output_dtype is None:
        return (infer_sum("quantized_conv", attributes, floats, residual),)
    output = DType(attributes.output_dtype)
    low, high = _range(output)
    bounds = (attributes.output_min, attributes.output_max, attributes.output_zero_point)
    expect(all(low <= each <= high for each in bounds), f"quantized_conv: {bounds} are not in {low}…{high}")
    expect(attributes.output_min <= attributes.output_max, f"quantized_conv: bounds {bounds[:2]} exclude each other")
    expect(_positive(attributes.output_scale), f"quantized_conv: the scale {attributes.output_scale} of the result")
    return (infer_sum("quantized_conv", attributes, TensorType(output, shape), residual),)


def _positive(scale: float) -> bool:
    with np.errstate(over="ignore"):
        return math.isfinite(np.float32(scale)) and float(np.float32(scale)) > 0 and math.isfinite(1 / scale)


def _range(dtype: DType) -> tuple[int, int]:
    limits = np.iinfo(dtype.numpy)
    return int(limits.min), int(limits.max)


def _support(attributes: QuantizedConvAttributes, inputs: Types) -> str | None:
    x, weight = inputs[:2]
    assert x is not None
    assert weight is not None
    # |q − zero point| ≤ 255 and |w| ≤ 128: sums of MAX_K products stay below 2^31.
    floats_to_bytes = attributes.activation == "none" and attributes.output_dtype is not None
    return reason_against(
        "quantized_conv", attributes, x, weight, MAX_K_OF_FLOATS_TO_BYTES if floats_to_bytes else MAX_K
    )


def _reference(attributes: QuantizedConvAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    x, weight, scale, bias, x_scale, x_zero, residual = (*inputs, None, None, None, None)[:7]
    assert x is not None
    assert weight is not None
    assert scale is not None
    with np.errstate(all="ignore"):
        if attributes.activation == "none":
            sums = convolve(x.astype(np.float32), weight.astype(np.float32), attributes)
            factor, dtype = scale, x.dtype
        else:
            zero, own = attributes.input_zero_point, np.float32(attributes.input_scale)
            if attributes.activation == "dynamic":
                assert x_scale is not None
                zero, own = 0 if x_zero is None else int(x_zero.item()), np.float32(x_scale.item())
            # float64 holds the sums exactly.
            sums = convolve(x.astype(np.float64) - zero, weight.astype(np.float64), attributes).astype(np.float32)
            factor, dtype = scale * own, attributes.dtype.numpy
        y = sums * factor
        if bias is not None:
            y = y + bias
        y = apply_epilogue(attributes.epilogue, y, residual if attributes.sum_dtype is None else None)
        if attributes.output_dtype is None:
            return (y.astype(dtype),)
        q = np.rint(y * np.float32(1 / attributes.output_scale)) + np.float32(attributes.output_zero_point)
        q = np.where(np.isnan(q), 0, np.clip(q, attributes.output_min, attributes.output_max))
        return (apply_sum(attributes, q.astype(attributes.output_dtype), residual),)


register(
    Operator(
        name="quantized_conv",
        summary="conv with int4 or int8 weights per channel; activations floating-point or 8 bits static or dynamic",
        attributes=QuantizedConvAttributes,
        infer=_infer,
        reference=_reference,
        variants=variants,
        support=_support,
        constant_inputs=frozenset({WEIGHT, SCALE, BIAS}),
        dtypes=(*FLOATS, *EIGHT_BITS),
    )
)
