"""Convolutions with integer weights: the attributes, how weights lie in device memory, and what kernels are told."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from torchvk.graph import DType, TensorType, pack_bits
from torchvk.ops.codes import DTYPE
from torchvk.ops.convolution import LANES, Geometry, is_depthwise
from torchvk.ops.epilogue import Epilogue, epilogue_constants
from torchvk.ops.operator import Arg, Array, Dispatch, Layout, Types, expect, read, write
from torchvk.ops.quantized_sum import QuantizedSum
from torchvk.ops.requantization import ResultAttributes

X, WEIGHT, SCALE, BIAS, X_SCALE, X_ZERO, RESIDUAL = range(7)


@dataclass(frozen=True)
class QuantizedConvAttributes(ResultAttributes):
    """Geometry as for conv. activation: "none", x is floating-point; "static", x is int8 or uint8 with input_scale and
    input_zero_point; "dynamic", the same with both as operands of one element. A residual is as for quantized_linear:
    of the float result's type, or, with sum_dtype, 8-bit."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    input_dilation: list[int]
    groups: int = 1
    activation: Literal["none", "static", "dynamic"] = "none"
    input_scale: float = 1.0
    input_zero_point: int = 0
    epilogue: Epilogue = "none"


def operands(inputs: Types) -> tuple[TensorType | None, ...]:
    """x, weight, scale, bias, x's scale and zero point, residual; raises OperatorError without the first three."""
    expect(3 <= len(inputs) <= 7, f"quantized_conv takes 3 to 7 operands, {len(inputs)} were given")
    expect(all(each is not None for each in inputs[:3]), "quantized_conv needs x, weight and scale")
    return (*inputs, None, None, None, None)[:7]


@dataclass(frozen=True)
class Packing:
    """The weight as kernels read it: rows [O, taps, C / groups], or [taps, O] for depthwise convolutions; the last
    dimension padded with zeros to a multiple of ``align`` elements. ``flat``: rows [O, taps · C / groups]. ``dense``:
    as it is, for those that read single elements. ``lanes``: in the order of conv_lanes.slang, whose lanes load eight
    elements of x each; ``narrow``: in that of conv_narrow.slang. 4 bits stay 4: see
    quantized_convolution.slang."""

    shape: tuple[int, ...]
    dtype: DType
    depthwise: bool
    align: int = 4
    flat: bool = False
    dense: bool = False
    lanes: bool = False
    narrow: bool = False

    @property
    def rows(self) -> tuple[int, ...]:
        """The shape without padding."""
        return (self.shape[0], math.prod(self.shape[1:])) if self.flat else self.shape

    @property
    def columns(self) -> int:
        """Elements of a row as it is packed."""
        return -(-self.rows[-1] // self.align) * self.align

    @property
    def nbytes(self) -> int:
        elements = math.prod(self.rows[:-1]) * self.columns
        return elements if self.dtype is DType.INT8 else -(-elements // 32) * 16

    @property
    def layout(self) -> Layout | None:
        if self.dense:
            whole = self.dtype is DType.INT8 or self.shape[-1] % 2 == 0
            return None if whole else Layout("conv_weight_dense", lambda weight: pack_bits(weight.reshape(-1), 4))
        if self.dtype is DType.INT8 and self.columns == self.rows[-1] and not self.lanes and not self.narrow:
            return None
        order = (self.columns, self.flat, self.lanes, self.narrow)
        return Layout(f"conv_weight_{self.dtype.value}_{'_'.join(map(str, order))}", self.pack)

    def pack(self, weight: Array) -> Array:
        packed = np.zeros((*self.rows[:-1], self.columns), np.int8)
        packed[..., : self.rows[-1]] = weight.reshape(self.rows)
        if self.lanes:
            packed = np.ascontiguousarray(packed.reshape(-1, LANES, 2, 4).swapaxes(1, 2)).reshape(packed.shape)
        if self.narrow:
            packed = np.ascontiguousarray(packed.reshape(len(packed), -1, 4).swapaxes(0, 1))
        if self.dtype is DType.INT8:
            return packed
        whole = np.zeros(2 * self.nbytes, np.int8)
        whole[: packed.size] = packed.reshape(-1)
        words = whole.view(np.uint32) & np.uint32(0x0F0F0F0F)
        nibbles: Array = words[0::2] | words[1::2] << np.uint32(4)
        return nibbles

    @property
    def sums(self) -> Layout:
        """Σ_k w[o, k], int32 [O]."""
        axes = tuple(range(len(self.shape) - 1)) if self.depthwise else tuple(range(1, len(self.shape)))

        def pack(weight: Array) -> Array:
            result: Array = weight.sum(axis=axes, dtype=np.int32)
            return result

        return Layout(f"conv_weight_sums_{'_'.join(map(str, self.shape))}_{self.depthwise}", pack)


@dataclass(frozen=True)
class Case:
    """All that the choice of kernels asks."""

    residual: TensorType | None
    sum: QuantizedSum | None
    attributes: QuantizedConvAttributes
    geometry: Geometry
    x: TensorType
    y: TensorType
    weight: TensorType
    bias: bool
    x_scale: DType | None
    x_zero: DType | None

    @staticmethod
    def of(attributes: QuantizedConvAttributes, inputs: Types, outputs: Sequence[TensorType]) -> Case:
        x, weight, _, bias, x_scale, x_zero, residual = operands(inputs)
        assert x is not None
        assert weight is not None
        geometry = Geometry.of(attributes, x, weight, outputs[0])
        x_types = (None if each is None else each.dtype for each in (x_scale, x_zero))
        added = QuantizedSum.of(attributes, residual, RESIDUAL)
        return Case(residual, added, attributes, geometry, x, outputs[0], weight, bias is not None, *x_types)

    @property
    def ending(self) -> tuple[int, int]:
        return epilogue_constants(self.attributes.epilogue, self.residual)

    @property
    def integer(self) -> bool:
        return self.attributes.activation != "none"

    @property
    def packing(self) -> Packing:
        depthwise = is_depthwise(self.attributes, self.x)
        return Packing(self.weight.shape, self.weight.dtype, depthwise, dense=not self.integer)

    @property
    def nbytes(self) -> int:
        return self.x.nbytes + self.y.nbytes + self.packing.nbytes + 8 * self.geometry.outputs

    def buffers(self, texels: bool = False, packing: Packing | None = None) -> tuple[Arg, ...]:
        """In the order of quantized_convolution.slang. Every binding needs a buffer: the scale stands in for what is
        not there, and is not read."""
        packing = packing or self.packing
        stand_in = read(SCALE)
        return (
            read(X, texels=texels),
            read(WEIGHT, packing.layout, texels),
            read(WEIGHT, packing.sums) if self.integer else stand_in,
            stand_in,
            read(BIAS) if self.bias else stand_in,
            read(X_SCALE) if self.x_scale else stand_in,
            read(X_ZERO) if self.x_zero else stand_in,
            write(),
            stand_in if self.residual is None else read(RESIDUAL),
            stand_in if self.sum is None else read(SCALE, self.sum.layout),
        )

    def constants(self, local_size: int) -> tuple[int, ...]:
        """Those that kernels share; see quantized_convolution.slang."""
        epilogue, residual = self.ending
        return (
            local_size,
            DTYPE[self.x.dtype],
            DTYPE[self.y.dtype],
            self.bias,
            epilogue,
            0 if self.x_scale is None else 1 + DTYPE[self.x_scale],
            0 if self.x_zero is None else 1 + DTYPE[self.x_zero],
            self.geometry.depthwise,
            residual,
            self.weight.dtype.bits,
        )

    def push(self, tiles_n: int = 0, tiles: int = 0) -> bytes:
        a = self.attributes
        numbers = (a.input_zero_point, a.output_zero_point, a.output_min, a.output_max)
        scales = (np.float32(a.input_scale), np.float32(1 / a.output_scale))
        return self.geometry.push(tiles_n, tiles) + struct.pack("<2f4h", *scales, *numbers)

    def dispatch(
        self,
        kernel: str,
        local_size: int,
        groups: tuple[int, int, int],
        work: tuple[int, int],
        packing: Packing | None = None,
        texels: bool = False,
        more: tuple[int, ...] = (),
    ) -> Dispatch:
        """``work``: the tiles of a row of tiles, and all of them, as the kernel counts them. ``more``: specialization
        constants from 10 on."""
        return Dispatch(
            kernel,
            self.buffers(texels, packing),
            groups,
            (*self.constants(local_size), *more),
            self.push(*work),
            bytes=self.nbytes,
            flops=self.geometry.flops,
        )
