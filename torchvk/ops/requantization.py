"""Results that leave an operator as 8-bit integers: clamp(round(y / scale) + zero point, low, high), in float32.

As ``torch.ao.quantization.fx._decomposed.quantize_per_tensor`` has it, with the multiplication by 1 / scale and round
half to even. See shaders/requantization.slang.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from torchvk.graph import DType
from torchvk.ops.operator import Array, expect

EightBits = Literal["int8", "uint8"]


@dataclass(frozen=True, kw_only=True)
class ResultAttributes:
    """The attributes of a layer that say what it gives.

    dtype: of float results, if x is integers. output_dtype: None for float results; else they are quantized to that,
    with output_scale and output_zero_point, and limited to output_min … output_max.
    sum_dtype: for 8-bit results. Then the residual has 8 bits, too, with residual_scale and residual_zero_point, and is
    added to the quantized result; the sum is as sum_scale, … say (torchvk.ops.quantized_sum).
    """

    dtype: DType = DType.FLOAT32
    output_dtype: EightBits | None = None
    output_scale: float = 1.0
    output_zero_point: int = 0
    output_min: int = -128
    output_max: int = 127
    residual_scale: float = 1.0
    residual_zero_point: int = 0
    sum_dtype: EightBits | None = None
    sum_scale: float = 1.0
    sum_zero_point: int = 0
    sum_min: int = -128
    sum_max: int = 127


@dataclass(frozen=True)
class Requantization:
    """dtype int8 or uint8, whose range holds ``low`` and ``high``."""

    dtype: DType
    scale: float
    zero_point: int
    low: int
    high: int

    @staticmethod
    def of(attributes: Any, prefix: str = "output") -> Requantization | None:
        """From the attributes output_dtype, output_scale, … of an operator; None if its results are floats."""
        dtype, *numbers = (
            getattr(attributes, f"{prefix}_{name}") for name in ("dtype", "scale", "zero_point", "min", "max")
        )
        return None if dtype is None else Requantization(DType(dtype), *numbers)

    def check(self, prefix: str = "output") -> None:
        """Raise OperatorError for what is no quantization."""
        check_parameters(prefix, self.scale, self.zero_point, self.dtype)
        limits = np.iinfo(self.dtype.numpy)
        expect(
            limits.min <= self.low <= self.high <= limits.max,
            f"{prefix}_min {self.low} and {prefix}_max {self.high} are not a range of {self.dtype.value}",
        )

    @property
    def inverse(self) -> float:
        return float(np.float32(1 / self.scale))

    def push(self) -> bytes:
        return struct.pack("<4f", self.inverse, self.zero_point, self.low, self.high)

    def apply(self, y: Array) -> Array:
        """The reference: float32 to integers; 0 for NaN."""
        with np.errstate(all="ignore"):
            q = np.rint(y.astype(np.float32) * np.float32(self.inverse)) + np.float32(self.zero_point)
            return np.where(np.isnan(q), 0, np.clip(q, self.low, self.high)).astype(self.dtype.numpy)


def check_parameters(name: str, scale: float, zero_point: int, dtype: DType) -> None:
    """Raise OperatorError unless the scale divides and the zero point is in the dtype's range."""
    with np.errstate(all="ignore"):
        rounded = float(np.float32(scale))
    expect(math.isfinite(rounded) and rounded > 0, f"{name}_scale {scale} divides nothing")
    limits = np.iinfo(dtype.numpy)
    expect(
        limits.min <= zero_point <= limits.max, f"{name}_zero_point {zero_point} is not in the range of {dtype.value}"
    )
