"""An 8-bit residual of a layer with 8-bit results.

The layer's result is quantized as it would be alone, and then ``quantized_arithmetic`` would add the residual to it:
both are dequantized, added, and quantized again, each step rounded to float32. The layer gives those very bytes. A
relu behind the sum is in its bounds. See shaders/requantization.slang.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchvk.graph import TensorType
from torchvk.ops.epilogue import residual_kind
from torchvk.ops.operator import Arg, Array, Layout, expect, read
from torchvk.ops.quantized_arithmetic import EIGHT_BITS, QuantizedArithmeticAttributes
from torchvk.ops.quantized_arithmetic import reference as arithmetic
from torchvk.ops.requantization import Requantization, check_parameters

NO_SUM = bytes(20)  # instead of push() where there is none


@dataclass(frozen=True)
class QuantizedSum:
    """added: what quantized_arithmetic would have for attributes. slot: the layer's input that is the residual. kind:
    what shaders call its dtype."""

    added: QuantizedArithmeticAttributes
    slot: int
    kind: int

    @staticmethod
    def of(attributes: Any, residual: TensorType | None, slot: int) -> QuantizedSum | None:
        """From the attributes residual_scale, …, sum_max of a layer; None where sum_dtype is."""
        added = added_by(attributes)
        return None if added is None or residual is None else QuantizedSum(added, slot, residual_kind(residual))

    @property
    def output(self) -> Requantization:
        output = Requantization.of(self.added)
        assert output is not None
        return output

    @property
    def argument(self) -> Arg:
        return read(self.slot)

    @property
    def layout(self) -> Layout:
        """The same as a buffer, in place of any constant: for kernels whose push constants are full."""
        numbers = self.push()
        return Layout(f"quantized_sum_{numbers.hex()}", lambda _: np.frombuffer(numbers, np.uint8))

    def push(self) -> bytes:
        added, output = self.added, self.output
        numbers = (added.other_zero_point, output.zero_point, output.low, output.high)
        return struct.pack("<3f4h", added.input_scale, added.other_scale, output.inverse, *numbers)


def added_by(attributes: Any) -> QuantizedArithmeticAttributes | None:
    """The attributes of the quantized_arithmetic that a layer does by the way."""
    a = attributes
    if a.sum_dtype is None:
        return None
    return QuantizedArithmeticAttributes(
        *("add", a.output_scale, a.output_zero_point, a.residual_scale, a.residual_zero_point),
        *(a.sum_dtype, a.sum_scale, a.sum_zero_point, a.sum_min, a.sum_max),
    )


def infer_sum(name: str, attributes: Any, result: TensorType, residual: TensorType | None) -> TensorType:
    """The type of what leaves the layer ``name`` whose own result is ``result``; raises OperatorError."""
    if attributes.sum_dtype is None:
        return result
    expect(
        result.dtype in EIGHT_BITS and residual is not None and residual.dtype in EIGHT_BITS,
        f"{name} with a sum_dtype needs an output_dtype and an 8-bit residual, got {residual}",
    )
    assert residual is not None
    expect(residual.shape == result.shape, f"{name} takes a residual of the shape of its result {result}")
    check_parameters("residual", attributes.residual_scale, attributes.residual_zero_point, residual.dtype)
    output = Requantization.of(attributes, "sum")
    assert output is not None
    output.check("sum")
    return TensorType(output.dtype, result.shape)


def apply_sum(attributes: Any, result: Array, residual: Array | None) -> Array:
    """The reference."""
    added = added_by(attributes)
    return result if added is None else arithmetic(added, [result, residual])[0]
