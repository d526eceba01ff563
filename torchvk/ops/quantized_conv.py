"""Convolutions with integer weights: ``quantized_conv``.

    y[p, o] = f(sx · sw[o] · Σ_k (qx[p, k] − zx) · qw[o, k] + b[o])

with quantized activations, whose padding is the real 0; the sums are integers and exact. Without (weight only) the sum
is Σ_k x[p, k] · qw[o, k], in float32. f: torchvk.ops.epilogue. The result may be quantized at once:
clamp(round(y · (1 / output_scale)) + output_zero_point, output_min, output_max), half to even, in float32, as
``quantized_decomposed.quantize_per_tensor`` does it.

Geometry and the weight's shape: torchvk.ops.convolution. Devices hold the weight as int8.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.ops.codes import DTYPE, units
from torchvk.ops.convolution import Geometry, convolve, is_depthwise, output_shape, reason_against
from torchvk.ops.epilogue import EPILOGUES, Epilogue, apply_epilogue
from torchvk.ops.operator import (
    Arg,
    Array,
    Capabilities,
    Dispatch,
    Kernels,
    Layout,
    Operator,
    Types,
    Variants,
    expect,
    grid,
    read,
    register,
    write,
)

X, WEIGHT, SCALE, BIAS, X_SCALE, X_ZERO = range(6)
FLOATS = (DType.FLOAT32, DType.FLOAT16)
EIGHT_BITS = (DType.INT8, DType.UINT8)
ZERO_POINTS = (DType.INT32, DType.INT64, DType.INT8, DType.UINT8, DType.INT16)


@dataclass(frozen=True)
class QuantizedConvAttributes:
    """Geometry as for conv. activation: "none", x is floating-point; "static", x is int8 or uint8 with input_scale and
    input_zero_point; "dynamic", the same with both as operands of one element. dtype: of a result that is not
    quantized, float32 or float16; output_dtype and what follows: of one that is."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    input_dilation: list[int]
    groups: int = 1
    activation: Literal["none", "static", "dynamic"] = "none"
    input_scale: float = 1.0
    input_zero_point: int = 0
    dtype: DType = DType.FLOAT32
    epilogue: Epilogue = "none"
    output_dtype: Literal["int8", "uint8"] | None = None
    output_scale: float = 1.0
    output_zero_point: int = 0
    output_min: int = -128
    output_max: int = 127


def _operands(inputs: Types) -> tuple[TensorType | None, ...]:
    expect(3 <= len(inputs) <= 6, f"quantized_conv takes 3 to 6 operands, {len(inputs)} were given")
    expect(all(each is not None for each in inputs[:3]), "quantized_conv needs x, weight and scale")
    return (*inputs, None, None, None)[:6]


def _infer(attributes: QuantizedConvAttributes, inputs: Types) -> tuple[TensorType, ...]:
    x, weight, scale, bias, x_scale, x_zero = _operands(inputs)
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
    if attributes.output_dtype is None:
        return (TensorType(dtype, shape),)
    output = DType(attributes.output_dtype)
    low, high = _range(output)
    bounds = (attributes.output_min, attributes.output_max, attributes.output_zero_point)
    expect(all(low <= each <= high for each in bounds), f"quantized_conv: {bounds} are not in {low}…{high}")
    expect(attributes.output_min <= attributes.output_max, f"quantized_conv: bounds {bounds[:2]} exclude each other")
    expect(_positive(attributes.output_scale), f"quantized_conv: the scale {attributes.output_scale} of the result")
    return (TensorType(output, shape),)


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
    return reason_against("quantized_conv", attributes, x, weight)


def _reference(attributes: QuantizedConvAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    x, weight, scale, bias, x_scale, x_zero = (*inputs, None, None, None)[:6]
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
        y = apply_epilogue(attributes.epilogue, y, None)
        if attributes.output_dtype is None:
            return (y.astype(dtype),)
        q = np.rint(y * np.float32(1 / attributes.output_scale)) + np.float32(attributes.output_zero_point)
        q = np.clip(np.where(np.isnan(q), 0, q), attributes.output_min, attributes.output_max)
        return (q.astype(attributes.output_dtype),)


@dataclass(frozen=True)
class Packing:
    """The weight as kernels read it, int8: rows [O, taps, C / groups], or [taps, O] for depthwise convolutions; the
    last dimension padded with zeros to whole words of ``align`` elements."""

    shape: tuple[int, ...]
    dtype: DType
    depthwise: bool
    align: int = 4

    @property
    def columns(self) -> int:
        """Elements of a row as it is packed."""
        return -(-self.shape[-1] // self.align) * self.align

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.columns

    @property
    def layout(self) -> Layout | None:
        if self.dtype is DType.INT8 and self.columns == self.shape[-1]:
            return None
        return Layout(f"conv_weight_{self.dtype.value}_{self.columns}", self.pack)

    def pack(self, weight: Array) -> Array:
        packed = np.zeros((*self.shape[:-1], self.columns), np.int8)
        packed[..., : self.shape[-1]] = weight
        return packed

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
        x, weight, _, bias, x_scale, x_zero = _operands(inputs)
        assert x is not None
        assert weight is not None
        geometry = Geometry.of(attributes, x, weight, outputs[0])
        kinds = (None if each is None else each.dtype for each in (x_scale, x_zero))
        return Case(attributes, geometry, x, outputs[0], weight, bias is not None, *kinds)

    @property
    def integer(self) -> bool:
        return self.attributes.activation != "none"

    @property
    def packing(self) -> Packing:
        return Packing(self.weight.shape, self.weight.dtype, is_depthwise(self.attributes, self.x))

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
        )

    def constants(self, local_size: int) -> tuple[int, ...]:
        """Those that kernels share; see quantized_convolution.slang."""
        return (
            local_size,
            DTYPE[self.x.dtype],
            DTYPE[self.y.dtype],
            self.bias,
            EPILOGUES.index(self.attributes.epilogue),
            0 if self.x_scale is None else 1 + DTYPE[self.x_scale],
            0 if self.x_zero is None else DTYPE[self.x_zero],
            self.geometry.depthwise,
            self.x_zero is not None,
        )

    def push(self, tiles_n: int = 0, tiles: int = 0) -> bytes:
        a = self.attributes
        numbers = (a.input_zero_point, a.output_zero_point, a.output_min, a.output_max)
        scales = (np.float32(a.input_scale), np.float32(1 / a.output_scale))
        return self.geometry.push(tiles_n, tiles) + struct.pack("<2f4h", *scales, *numbers)


def _direct(case: Case, capabilities: Capabilities) -> Kernels:
    """A thread a word of the result: right for everything."""
    dispatch = Dispatch(
        "quantized_conv_direct",
        case.buffers(),
        grid(units(case.y.numel, case.y.dtype), capabilities),
        case.constants(capabilities.local_size),
        case.push(),
        bytes=case.nbytes,
        flops=case.geometry.flops,
    )
    return Kernels((dispatch,))


def _variants(
    attributes: QuantizedConvAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Variants:
    if outputs[0].numel == 0:
        return (("nothing", Kernels(())),)
    case = Case.of(attributes, inputs, outputs)
    return (("direct", _direct(case, capabilities)),)


def _kernels(
    attributes: QuantizedConvAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    return _variants(attributes, inputs, outputs, capabilities)[0][1]


register(
    Operator(
        name="quantized_conv",
        summary="conv with int4 or int8 weights per channel; activations floating-point or 8 bits static or dynamic",
        attributes=QuantizedConvAttributes,
        infer=_infer,
        reference=_reference,
        kernels=_kernels,
        variants=_variants,
        support=_support,
        constant_inputs=frozenset({WEIGHT, SCALE, BIAS}),
        dtypes=(*FLOATS, *EIGHT_BITS),
    )
)
