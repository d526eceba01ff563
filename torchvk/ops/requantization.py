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
from torchvk.ops.operator import Arg, Array, Capabilities, Dispatch, expect, grid, scratch_read, scratch_write, write
from torchvk.ops.rounding import round_to_half

EightBits = Literal["int8", "uint8"]


@dataclass(frozen=True)
class Requantization:
    """dtype int8 or uint8, whose range holds ``low`` and ``high``."""

    dtype: DType
    scale: float
    zero_point: int
    low: int
    high: int

    @staticmethod
    def of(attributes: Any) -> Requantization | None:
        """From the attributes output_dtype, output_scale, … of an operator; None if its results are floats."""
        if attributes.output_dtype is None:
            return None
        return Requantization(
            DType(attributes.output_dtype),
            attributes.output_scale,
            attributes.output_zero_point,
            attributes.output_min,
            attributes.output_max,
        )

    def check(self) -> None:
        """Raise OperatorError for what is no quantization."""
        check_parameters("output", self.scale, self.zero_point, self.dtype)
        limits = np.iinfo(self.dtype.numpy)
        expect(
            limits.min <= self.low <= self.high <= limits.max,
            f"output_min {self.low} and output_max {self.high} are not a range of {self.dtype.value}",
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


NOTHING = bytes(16)  # instead of push() where results are floats


def check_parameters(name: str, scale: float, zero_point: int, dtype: DType) -> None:
    """Raise OperatorError unless the scale divides and the zero point is in the dtype's range."""
    with np.errstate(all="ignore"):
        rounded = float(np.float32(scale))
    expect(math.isfinite(rounded) and rounded > 0, f"{name}_scale {scale} divides nothing")
    limits = np.iinfo(dtype.numpy)
    expect(
        limits.min <= zero_point <= limits.max, f"{name}_zero_point {zero_point} is not in the range of {dtype.value}"
    )


def requantize(count: int, scratch: int, output: Requantization, capabilities: Capabilities) -> Dispatch:
    """The dispatch that quantizes ``count`` float32 values of a scratch buffer into the node's first output."""
    return Dispatch(
        kernel="requantize",
        buffers=(scratch_read(scratch), write(0)),
        groups=grid(-(-count // 4), capabilities),
        constants=(capabilities.local_size,),
        push=struct.pack("<I", count) + output.push(),
        bytes=5 * count,
    )


@dataclass(frozen=True)
class Storing:
    """How the results of a linear layer's kernel leave it.

    code: OUTPUT of shaders/quantized_linear.slang. out: what the kernel writes. push: what its push constants end
    with. after, scratch: dispatches that come behind, and the sizes of the scratch buffers between.
    """

    code: int
    out: Arg
    push: bytes
    after: tuple[Dispatch, ...]
    scratch: tuple[int, ...]


def storing(
    m: int,
    n: int,
    result: DType,
    output: Requantization | None,
    own: int,
    scratch: int,
    capabilities: Capabilities,
) -> Storing:
    """For m × n results, as ``output`` says or as floats of dtype ``result``.

    own: neighbouring bytes of a row that a thread of the kernel stores at once, 0 if it cannot store bytes. Where
    neighbouring rows share what it stores, results go as float32 to scratch buffer ``scratch``, to be rounded there.
    """
    push = NOTHING if output is None else output.push()
    if output is None and (result is DType.FLOAT32 or n % 2 == 0):
        return Storing(0 if result is DType.FLOAT32 else 1, write(0), push, (), ())
    if output is not None and own and n % own == 0:
        return Storing(2, write(0), push, (), ())
    if output is None:
        after = round_to_half(m * n, scratch, capabilities)
    else:
        after = requantize(m * n, scratch, output, capabilities)
    return Storing(0, scratch_write(scratch), push, (after,), (4 * m * n,))
