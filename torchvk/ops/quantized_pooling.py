"""Means of windows of statically quantized data, channels last: dequantize, pool and quantize in one operator.

y = Σ (q − zero point) · scale / divisor in float32, then clamp(round(y · (1 / output scale)) + output zero point)
with round half to even, as ``torch.ao.quantization.fx._decomposed`` does. Small windows add dequantized elements in
the order of torch's own kernels, so that ties, which are frequent where both scales are equal, are rounded alike.
Large ones (SHARED_TAPS) add integers, exactly.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.ops.operator import Array, Capabilities, Kernels, Operator, Types, expect, register
from torchvk.ops.pooling import (
    AVERAGE,
    BYTES,
    MAX_TAPS,
    SHARED_TAPS,
    AdaptiveAvgPoolAttributes,
    AvgPoolAttributes,
    mean,
    pool,
    pool_kernels,
    pooled_shape,
    windows,
)
from torchvk.ops.requantization import EightBits
from torchvk.ops.shapes import expect_dtype, operands

# Words of the image that one thread may go through on lavapipe, whose loops end after 65535 iterations.
MAX_WORDS = 60000


@dataclass(frozen=True, kw_only=True)
class Static:
    """Per-tensor parameters of input and result. output_dtype None: the result is float32."""

    input_scale: float
    input_zero_point: int
    output_dtype: EightBits | None = None
    output_scale: float = 1.0
    output_zero_point: int = 0
    output_min: int = -128
    output_max: int = 127


@dataclass(frozen=True, kw_only=True)
class QuantizedAvgPoolAttributes(Static, AvgPoolAttributes):
    """As for ``avg_pool``, and the parameters."""


@dataclass(frozen=True, kw_only=True)
class QuantizedAdaptiveAvgPoolAttributes(Static, AdaptiveAvgPoolAttributes):
    """As for ``adaptive_avg_pool``, and the parameters."""


def _result_dtype(attributes: Static) -> DType:
    return DType.FLOAT32 if attributes.output_dtype is None else DType(attributes.output_dtype)


def check_static(attributes: Static, x: TensorType) -> None:
    """Raise OperatorError unless the parameters fit the dtypes."""
    expect_dtype(x, BYTES)
    for what, scale in (("input", attributes.input_scale), ("output", attributes.output_scale)):
        inverse = np.float32(1) / np.float32(scale) if scale > 0 else np.float32(0)
        expect(bool(np.isfinite(np.float32(scale)) and 0 < inverse < np.inf), f"an {what} scale of {scale}")
    limits = np.iinfo(x.dtype.numpy)
    zero = attributes.input_zero_point
    expect(limits.min <= zero <= limits.max, f"an input zero point of {zero} for {x.dtype.value}")
    if attributes.output_dtype is not None:
        limits = np.iinfo(attributes.output_dtype)
        low, high, zero = attributes.output_min, attributes.output_max, attributes.output_zero_point
        expect(limits.min <= low <= high <= limits.max, f"{low} to {high} is no range of {attributes.output_dtype}")
        expect(limits.min <= zero <= limits.max, f"an output zero point of {zero} for {attributes.output_dtype}")


def static_result(real: Array, attributes: Static) -> Array:
    """float32 values as the result that the attributes ask for."""
    if attributes.output_dtype is None:
        return real
    with np.errstate(over="ignore"):
        inverse = np.float32(1.0 / attributes.output_scale)
        scaled = np.rint(np.clip(real * inverse, -65536, 65536)) + np.float32(attributes.output_zero_point)
    return np.clip(scaled, attributes.output_min, attributes.output_max).astype(attributes.output_dtype)


def static_push(attributes: Static) -> bytes:
    """As shaders/pooling.slang takes it."""
    inverse = float(np.float32(1.0 / attributes.output_scale))
    integers = (attributes.output_zero_point, attributes.output_min, attributes.output_max)
    return struct.pack("<fif3i", attributes.input_scale, attributes.input_zero_point, inverse, *integers)


def _infer(attributes: Any, inputs: Types) -> tuple[TensorType, ...]:
    (x,) = operands(inputs, 1)
    check_static(attributes, x)
    return (TensorType(_result_dtype(attributes), pooled_shape(attributes, x)),)


def _support(attributes: Any, inputs: Types) -> str | None:
    (x,) = operands(inputs, 1)
    taps = windows(attributes).taps(x.shape[1:-1])
    limit = MAX_WORDS if x.shape[-1] % 4 == 0 and attributes.output_dtype is not None else MAX_TAPS
    return None if taps <= limit else f"windows of {taps} elements are not supported: at most {limit}"


def _reference(attributes: Any, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    (x,) = inputs
    assert x is not None
    view, sizes = windows(attributes), x.shape[1:-1]
    scale, zero = np.float32(attributes.input_scale), attributes.input_zero_point
    centered = x.astype(np.int64) - zero
    if view.taps(sizes) < SHARED_TAPS:
        sums = pool(centered.astype(np.float32) * scale, view, np.float32(0), np.add)
    else:
        sums = pool(centered, view, np.int64(0), np.add).astype(np.float32) * scale
    with np.errstate(all="ignore"):
        return (static_result(mean(sums, view, sizes), attributes),)


def _kernels(attributes: Any, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities) -> Kernels:
    (x,) = operands(inputs, 1)
    return pool_kernels(windows(attributes), AVERAGE, x, outputs[0], capabilities, static_push(attributes))


for _name, _attributes in (
    ("avg_pool", QuantizedAvgPoolAttributes),
    ("adaptive_avg_pool", QuantizedAdaptiveAvgPoolAttributes),
):
    register(
        Operator(
            f"quantized_{_name}",
            f"{_name} of statically quantized data",
            _infer,
            _reference,
            _kernels,
            _attributes,
            _support,
            dtypes=BYTES,
        )
    )
