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
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from torchvk.graph import DType, TensorType, pack_bits
from torchvk.ops.codes import DTYPE, INT4, units
from torchvk.ops.conv_blocked import blocked
from torchvk.ops.conv_kernels import Case as FloatCase
from torchvk.ops.conv_kernels import columns_bytes, columns_constants, columns_pitch, float_kernels
from torchvk.ops.conv_matrix import matrix_constants, matrix_tiles
from torchvk.ops.convolution import (
    DOT_COLUMNS,
    LANES,
    MAX_K,
    MAX_K_OF_FLOATS_TO_BYTES,
    Geometry,
    convolve,
    is_depthwise,
    lanes_rows,
    output_shape,
    reason_against,
    takes_dots,
    takes_lanes,
    takes_vectors,
)
from torchvk.ops.epilogue import EPILOGUES, Activation, apply_epilogue
from torchvk.ops.operator import (
    NOTHING,
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
    get,
    grid,
    read,
    register,
    scratch_read,
    scratch_write,
    write,
)
from torchvk.ops.quantization import reads_texels
from torchvk.ops.quantize import DequantizeAttributes
from torchvk.ops.quantized_sum import QuantizedSum, apply_sum, infer_sum

X, WEIGHT, SCALE, BIAS, X_SCALE, X_ZERO, RESIDUAL = range(7)
FLOATS = (DType.FLOAT32, DType.FLOAT16)
EIGHT_BITS = (DType.INT8, DType.UINT8)
MIN_PIXELS = 32  # for which a weight is made floating-point as a whole
ZERO_POINTS = (DType.INT32, DType.INT64, DType.INT8, DType.UINT8, DType.INT16)


@dataclass(frozen=True)
class QuantizedConvAttributes:
    """Geometry as for conv. activation: "none", x is floating-point; "static", x is int8 or uint8 with input_scale and
    input_zero_point; "dynamic", the same with both as operands of one element. dtype: of a result that is not
    quantized, float32 or float16; output_dtype and what follows: of one that is. A residual is 8-bit, and belongs to
    sum_dtype, as for quantized_linear."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    input_dilation: list[int]
    groups: int = 1
    activation: Literal["none", "static", "dynamic"] = "none"
    input_scale: float = 1.0
    input_zero_point: int = 0
    dtype: DType = DType.FLOAT32
    epilogue: Activation = "none"
    output_dtype: Literal["int8", "uint8"] | None = None
    output_scale: float = 1.0
    output_zero_point: int = 0
    output_min: int = -128
    output_max: int = 127
    residual_scale: float = 1.0
    residual_zero_point: int = 0
    sum_dtype: Literal["int8", "uint8"] | None = None
    sum_scale: float = 1.0
    sum_zero_point: int = 0
    sum_min: int = -128
    sum_max: int = 127


def _operands(inputs: Types) -> tuple[TensorType | None, ...]:
    expect(3 <= len(inputs) <= 7, f"quantized_conv takes 3 to 7 operands, {len(inputs)} were given")
    expect(all(each is not None for each in inputs[:3]), "quantized_conv needs x, weight and scale")
    return (*inputs, None, None, None, None)[:7]


def _infer(attributes: QuantizedConvAttributes, inputs: Types) -> tuple[TensorType, ...]:
    x, weight, scale, bias, x_scale, x_zero, residual = _operands(inputs)
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
    has_sum = attributes.sum_dtype is not None
    expect(has_sum == (residual is not None), f"quantized_conv: sum_dtype {attributes.sum_dtype}, residual {residual}")
    if attributes.output_dtype is None:
        return (infer_sum("quantized_conv", attributes, TensorType(dtype, shape), residual),)
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
        y = apply_epilogue(attributes.epilogue, y, None)
        if attributes.output_dtype is None:
            return (y.astype(dtype),)
        q = np.rint(y * np.float32(1 / attributes.output_scale)) + np.float32(attributes.output_zero_point)
        q = np.where(np.isnan(q), 0, np.clip(q, attributes.output_min, attributes.output_max))
        return (apply_sum(attributes, q.astype(attributes.output_dtype), residual),)


@dataclass(frozen=True)
class Packing:
    """The weight as kernels read it: rows [O, taps, C / groups], or [taps, O] for depthwise convolutions; the last
    dimension padded with zeros to a multiple of ``align`` elements. ``flat``: rows [O, taps · C / groups]. ``dense``:
    as it is, for those that read single elements. ``lanes``: in the order of conv_lanes.slang, whose lanes load eight
    elements of x each. 4 bits stay 4: see quantized_convolution.slang."""

    shape: tuple[int, ...]
    dtype: DType
    depthwise: bool
    align: int = 4
    flat: bool = False
    dense: bool = False
    lanes: bool = False

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
        if self.dtype is DType.INT8 and self.columns == self.rows[-1] and not self.lanes:
            return None
        return Layout(f"conv_weight_{self.dtype.value}_{self.columns}_{self.flat}_{self.lanes}", self.pack)

    def pack(self, weight: Array) -> Array:
        packed = np.zeros((*self.rows[:-1], self.columns), np.int8)
        packed[..., : self.rows[-1]] = weight.reshape(self.rows)
        if self.lanes:
            packed = np.ascontiguousarray(packed.reshape(-1, LANES, 2, 4).swapaxes(1, 2)).reshape(packed.shape)
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
        x, weight, _, bias, x_scale, x_zero, residual = _operands(inputs)
        assert x is not None
        assert weight is not None
        geometry = Geometry.of(attributes, x, weight, outputs[0])
        x_types = (None if each is None else each.dtype for each in (x_scale, x_zero))
        added = QuantizedSum.of(attributes, residual, RESIDUAL)
        return Case(added, attributes, geometry, x, outputs[0], weight, bias is not None, *x_types)

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
            *((stand_in, stand_in) if self.sum is None else (self.sum.argument, read(SCALE, self.sum.layout))),
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
            0 if self.x_zero is None else 1 + DTYPE[self.x_zero],
            self.geometry.depthwise,
            0 if self.sum is None else self.sum.kind,
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


def _integer_kernels(case: Case, capabilities: Capabilities) -> Iterator[tuple[str, Kernels]]:
    """Every plausible way by name, the default first."""
    g, packing = case.geometry, case.packing
    rows = replace(packing, align=128 // case.weight.dtype.bits, flat=not g.depthwise)
    texels = reads_texels(capabilities, case.x.nbytes, rows.nbytes)
    if not texels and takes_dots(g):
        pixels = (DOT_COLUMNS - g.kernel[2]) // g.stride[2] + 1
        work = g.strips(4, pixels)
        groups = grid(work[1], capabilities)
        constants = (g.kernel[2], g.stride[2], pixels)
        kernel = "quantized_conv_depthwise_dots"
        dispatch = case.dispatch(kernel, capabilities.local_size, groups, work, rows, more=constants)
        yield "depthwise_dots", Kernels((dispatch,))
    if takes_vectors(g, 16):
        work = g.strips(16, 2)
        kernel = f"quantized_conv_depthwise{'_texels' if texels else ''}"
        groups = grid(work[1], capabilities)
        yield "depthwise", Kernels((case.dispatch(kernel, capabilities.local_size, groups, work, rows, texels),))
    if texels and capabilities.shuffle and takes_lanes(g, case.y.dtype):
        tile_m, suffix = lanes_rows(g)
        work = g.tiles(tile_m, 4 * LANES)
        groups = grid(work[1], capabilities, 1)
        wide = g.group_channels % 8 == 0
        own = replace(rows, align=8 * LANES, lanes=True) if wide else rows
        kernel = f"quantized_conv_lanes{'_wide' if wide else suffix}"
        yield "lanes", Kernels((case.dispatch(kernel, LANES, groups, work, own, texels),))
    on_matrices = _matrix(case, rows, capabilities)
    for name, dispatch in on_matrices:
        yield name, Kernels((dispatch,))
    if g.group_channels % 16 and columns_bytes(g, DType.INT8, capabilities):
        yield from _columns(case, rows, capabilities)
    if not on_matrices:
        for name, dispatch in _blocked(case, rows, capabilities):
            yield name, Kernels((dispatch,))


def _matrix(case: Case, rows: Packing, capabilities: Capabilities) -> list[tuple[str, Dispatch]]:
    g = case.geometry
    result = []
    for tile in matrix_tiles(g, True, capabilities):
        work = g.tiles(tile.m, tile.n)
        groups = grid(work[1], capabilities, 1)
        kernel = f"quantized_conv_matrix_{tile.name}"
        dispatch = case.dispatch(kernel, tile.threads, groups, work, rows, more=matrix_constants(g))
        result.append((f"matrix_{tile.name}", dispatch))
    return result


def _blocked(case: Case, rows: Packing, capabilities: Capabilities) -> list[tuple[str, Dispatch]]:
    result = []
    for tile in blocked(case.geometry, case.x.dtype, case.y.dtype, capabilities):
        kernel, groups = f"quantized_conv_blocked_{tile.block.name}", tile.groups(capabilities)
        dispatch = case.dispatch(kernel, tile.block.threads, groups, tile.work, rows, more=tile.constants)
        result.append((f"blocked_{tile.block.name}", dispatch))
    return result


def _columns(case: Case, rows: Packing, capabilities: Capabilities) -> Iterator[tuple[str, Kernels]]:
    """The pixels' columns in scratch memory, in rows of whole words, multiplied as a convolution of one pixel."""
    g, pitch = case.geometry, columns_pitch(case.geometry.k, DType.INT8)
    size = g.pixels * pitch
    product = g.pointwise(g.pixels, pitch)
    columns = Dispatch(
        "quantized_conv_columns",
        (*case.buffers(packing=rows)[:7], scratch_write(0)),
        grid(size // 16, capabilities),
        (*case.constants(capabilities.local_size), *columns_constants(g, DType.INT8)),
        case.push(0, size // 16),
        bytes=2 * size,
    )
    inner = replace(case, geometry=product)
    # Register blocks gather whole words themselves.
    without = [] if g.group_channels % 4 == 0 else _blocked(inner, rows, capabilities)
    for name, dispatch in _matrix(inner, rows, capabilities) or without:
        dispatch = replace(dispatch, buffers=(scratch_read(0), *dispatch.buffers[1:]))
        yield f"columns_{name}", Kernels((columns, dispatch), (size,))


def _weight_only(case: Case, scale: TensorType, capabilities: Capabilities) -> Iterator[tuple[str, Kernels]]:
    """The weight is made floating-point, in scratch memory, where that is little beside the convolution."""
    g = case.geometry
    if g.pixels < MIN_PIXELS or case.attributes.output_dtype is not None:
        return
    shape = (1,) * (len(case.weight.shape) - 1)
    blocks = (*shape, g.outputs) if g.depthwise else (g.outputs, *shape)
    types = [TensorType(DType.INT8, case.weight.shape), TensorType(scale.dtype, blocks)]
    result = TensorType(case.x.dtype, case.weight.shape)
    (made,) = get("dequantize").kernels(DequantizeAttributes(case.x.dtype), types, [result], capabilities).dispatches
    code = DTYPE[DType.INT8] if case.weight.dtype is DType.INT8 else INT4
    first = replace(
        made,
        buffers=(read(WEIGHT, case.packing.layout), read(SCALE), read(SCALE), scratch_write(0)),
        constants=(made.constants[0], code, *made.constants[2:]),
        bytes=case.weight.nbytes + result.nbytes,
    )
    bare = Arg("scratch", -1)  # the weight: the others come behind it
    ending = (EPILOGUES.index(case.attributes.epilogue), 0)
    bias = BIAS if case.bias else None
    inner = FloatCase(g, case.x.dtype, lambda texels: replace(bare, texels=texels), bias, DType.FLOAT32, None, ending)
    for name, kernels in float_kernels(inner, capabilities):
        rest = (replace(each, buffers=tuple(map(_behind, each.buffers))) for each in kernels.dispatches)
        yield name, Kernels((first, *rest), (result.nbytes, *kernels.scratch))


def _behind(arg: Arg) -> Arg:
    return replace(arg, index=arg.index + 1) if arg.role == "scratch" else arg


def _direct(case: Case, capabilities: Capabilities) -> Kernels:
    """A thread a word of the result: right for everything."""
    groups = grid(units(case.y.numel, case.y.dtype), capabilities)
    return Kernels((case.dispatch("quantized_conv_direct", capabilities.local_size, groups, (0, 0)),))


def _variants(
    attributes: QuantizedConvAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Variants:
    if outputs[0].numel == 0:
        return NOTHING
    case = Case.of(attributes, inputs, outputs)
    ways: Iterator[tuple[str, Kernels]]
    if case.integer:
        ways = _integer_kernels(case, capabilities)
    else:
        _, _, scale, *_ = _operands(inputs)
        assert scale is not None
        ways = ((f"{name}_of_floats", kernels) for name, kernels in _weight_only(case, scale, capabilities))
    return (*ways, ("direct", _direct(case, capabilities)))


register(
    Operator(
        name="quantized_conv",
        summary="conv with int4 or int8 weights per channel; activations floating-point or 8 bits static or dynamic",
        attributes=QuantizedConvAttributes,
        infer=_infer,
        reference=_reference,
        variants=_variants,
        support=_support,
        constant_inputs=frozenset({WEIGHT, SCALE, BIAS}),
        dtypes=(*FLOATS, *EIGHT_BITS),
    )
)
