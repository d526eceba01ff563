"""Which kernels compute a convolution with integer weights, and with which parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from torchvk.graph import DType, TensorType
from torchvk.ops.codes import DTYPE, INT4, units
from torchvk.ops.conv_blocked import blocked
from torchvk.ops.conv_kernels import Case as FloatCase
from torchvk.ops.conv_kernels import (
    columns_bytes,
    columns_constants,
    columns_pitch,
    float_kernels,
    images_at_once,
    of_images,
)
from torchvk.ops.conv_matrix import matrix_constants, matrix_tiles
from torchvk.ops.conv_narrow import narrow_constants, narrow_work, takes_narrow
from torchvk.ops.convolution import DOT_COLUMNS, LANES, lanes_rows, takes_dots, takes_lanes, takes_vectors
from torchvk.ops.operator import (
    NOTHING,
    Arg,
    Capabilities,
    Dispatch,
    Kernels,
    Types,
    Variants,
    get,
    grid,
    read,
    scratch_read,
    scratch_write,
)
from torchvk.ops.quantization import reads_texels
from torchvk.ops.quantize import DequantizeAttributes
from torchvk.ops.quantized_conv_case import (
    BIAS,
    RESIDUAL,
    SCALE,
    WEIGHT,
    Case,
    Packing,
    QuantizedConvAttributes,
    X,
    operands,
)

MIN_PIXELS = 32  # for which a weight is made floating-point as a whole


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
        if not texels and takes_narrow(g):
            yield "narrow", Kernels((_narrow(case, capabilities),))
        for name, dispatch in _blocked(case, rows, capabilities):
            yield name, Kernels((dispatch,))


def _narrow(case: Case, capabilities: Capabilities) -> Dispatch:
    g, size = case.geometry, capabilities.local_size
    work, groups = narrow_work(g, capabilities)
    kernel, packing = f"quantized_conv_narrow_{g.stride[2]}", replace(case.packing, narrow=True)
    return case.dispatch(kernel, size, groups, work, packing, more=narrow_constants(g))


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
    """The pixels' columns in scratch memory, in rows of whole words, multiplied as a convolution of one pixel; some
    images at a time."""
    g, pitch = case.geometry, columns_pitch(case.geometry.k, DType.INT8)
    image_bytes = {("input", X): case.x.nbytes // g.images, ("output", 0): case.y.nbytes // g.images}
    if case.residual is not None:
        image_bytes["input", RESIDUAL] = case.residual.nbytes // g.images
    at_once = images_at_once(g, DType.INT8, list(image_bytes.values()))

    def products(images: int) -> dict[str, Dispatch]:
        inner = replace(case, geometry=g.pointwise(g.pixels // g.images * images, pitch))
        # Register blocks gather whole words themselves.
        without = [] if g.group_channels % 4 == 0 else _blocked(inner, rows, capabilities)
        return dict(_matrix(inner, rows, capabilities) or without)

    def some(images: int, name: str) -> Kernels:
        part = replace(case, geometry=replace(g, images=images))
        size = part.geometry.pixels * pitch
        columns = Dispatch(
            "quantized_conv_columns",
            (*case.buffers(packing=rows)[:7], scratch_write(0)),
            grid(size // 16, capabilities),
            (*case.constants(capabilities.local_size), *columns_constants(g, DType.INT8)),
            part.push(0, size // 16),
            bytes=2 * size,
        )
        offered = products(images)
        product = offered.get(name) or next(iter(offered.values()))  # Few images may have other tiles.
        buffers = (scratch_read(0), *product.buffers[1:])
        product = replace(product, buffers=buffers, bytes=size + case.y.nbytes // g.images * images)
        return Kernels((columns, product), (size,))

    for name in products(at_once):
        if products(g.images % at_once or at_once):
            yield f"columns_{name}", of_images(g.images, at_once, partial(some, name=name), image_bytes)


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
    bias = BIAS if case.bias else None
    residual = None if case.residual is None else RESIDUAL
    of_floats = (bias, DType.FLOAT32, residual, case.ending)
    inner = FloatCase(g, case.x.dtype, lambda texels: replace(bare, texels=texels), *of_floats)
    for name, kernels in float_kernels(inner, capabilities):
        rest = (replace(each, buffers=tuple(map(_behind, each.buffers))) for each in kernels.dispatches)
        yield name, Kernels((first, *rest), (result.nbytes, *kernels.scratch))


def _behind(arg: Arg) -> Arg:
    return replace(arg, index=arg.index + 1) if arg.role == "scratch" else arg


def _direct(case: Case, capabilities: Capabilities) -> Kernels:
    """A thread a word of the result: right for everything."""
    groups = grid(units(case.y.numel, case.y.dtype), capabilities)
    return Kernels((case.dispatch("quantized_conv_direct", capabilities.local_size, groups, (0, 0)),))


def variants(
    attributes: QuantizedConvAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Variants:
    if outputs[0].numel == 0:
        return NOTHING
    case = Case.of(attributes, inputs, outputs)
    ways: Iterator[tuple[str, Kernels]]
    if case.integer:
        ways = _integer_kernels(case, capabilities)
    else:
        _, _, scale, *_ = operands(inputs)
        assert scale is not None
        ways = ((f"{name}_of_floats", kernels) for name, kernels in _weight_only(case, scale, capabilities))
    return (*ways, ("direct", _direct(case, capabilities)))
