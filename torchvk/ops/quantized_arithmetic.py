"""``quantized_arithmetic``: sums, differences and products of 8-bit tensors, quantized again.

    y = quantize(dequantize(a) ∘ dequantize(b)), each step rounded to float32 as eager mode does it.

a stands for (a − input_zero_point) · input_scale, b for (b − other_zero_point) · other_scale. A relu or clamp behind
is in output_min and output_max. Operands broadcast.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.ops.codes import units
from torchvk.ops.operator import (
    Array,
    Capabilities,
    Dispatch,
    Kernels,
    Operator,
    Types,
    grid,
    read,
    register,
    write,
)
from torchvk.ops.quantization import LANES, reads_texels
from torchvk.ops.requantization import EightBits, Requantization, check_parameters
from torchvk.ops.shapes import Walk, broadcast, broadcast_strides, expect_dtype, nbytes, operands

EIGHT_BITS = (DType.INT8, DType.UINT8)
Operation = Literal["add", "sub", "mul"]
# Positions are the codes of shaders/quantized_arithmetic.slang.
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
FUNCTIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@dataclass(frozen=True)
class QuantizedArithmeticAttributes:
    operation: Operation
    input_scale: float
    input_zero_point: int
    other_scale: float
    other_zero_point: int
    output_dtype: EightBits
    output_scale: float
    output_zero_point: int
    output_min: int
    output_max: int


def _infer(attributes: QuantizedArithmeticAttributes, inputs: Types) -> tuple[TensorType, ...]:
    a, b = operands(inputs, 2)
    expect_dtype(a, EIGHT_BITS)
    expect_dtype(b, EIGHT_BITS, "the other operand")
    check_parameters("input", attributes.input_scale, attributes.input_zero_point, a.dtype)
    check_parameters("other", attributes.other_scale, attributes.other_zero_point, b.dtype)
    output = _output(attributes)
    output.check()
    return (TensorType(output.dtype, broadcast((a.shape, b.shape))),)


def _output(attributes: QuantizedArithmeticAttributes) -> Requantization:
    output = Requantization.of(attributes)
    assert output is not None
    return output


def reference(attributes: QuantizedArithmeticAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    a, b = inputs
    assert a is not None
    assert b is not None
    with np.errstate(all="ignore"):
        x = _dequantized(a, attributes.input_scale, attributes.input_zero_point)
        y = _dequantized(b, attributes.other_scale, attributes.other_zero_point)
        return (_output(attributes).apply(np.asarray(FUNCTIONS[attributes.operation](x, y))),)


def _dequantized(q: Array, scale: float, zero_point: int) -> Array:
    return np.asarray((q.astype(np.float32) - np.float32(zero_point)) * np.float32(scale))


def _kernels(
    attributes: QuantizedArithmeticAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    a, b = operands(inputs, 2)
    (y,) = outputs
    if y.numel == 0:
        return Kernels(())
    walk = Walk.over(y.shape, broadcast_strides(a.shape, y.shape), broadcast_strides(b.shape, y.shape))
    # Without broadcasting, four neighbours of both are a word.
    aligned = walk.rank == 1 and walk.strides == ((1,), (1,))
    texels = aligned and reads_texels(capabilities, a.nbytes, b.nbytes)
    local_size = LANES if texels else capabilities.local_size
    count = units(y.numel, y.dtype)
    output = _output(attributes)
    push = walk.push(2) + struct.pack(
        "<3f5i",
        *(attributes.input_scale, attributes.other_scale, output.inverse),
        *(attributes.input_zero_point, attributes.other_zero_point, output.zero_point, output.low, output.high),
    )
    dispatch = Dispatch(
        "quantized_arithmetic_lanes" if texels else "quantized_arithmetic",
        (write(), read(0, texels=texels), read(1, texels=texels)),
        grid(-(-count // 4) if texels else count, capabilities, local_size),
        (
            local_size,
            OPERATIONS.index(attributes.operation),
            a.dtype is DType.UINT8,
            b.dtype is DType.UINT8,
            0 if aligned else walk.rank,
        ),
        push,
        bytes=nbytes(inputs) + y.nbytes,
        flops=6 * y.numel,
    )
    return Kernels((dispatch,))


register(
    Operator(
        "quantized_arithmetic",
        "sums, differences and products of 8-bit tensors as 8-bit integers",
        _infer,
        reference,
        _kernels,
        QuantizedArithmeticAttributes,
        dtypes=EIGHT_BITS,
    )
)
