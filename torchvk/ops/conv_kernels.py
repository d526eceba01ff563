"""Which kernels compute a convolution in floating point, and with which parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torchvk.graph import DType
from torchvk.ops.codes import DTYPE
from torchvk.ops.conv_blocked import WORDS, Blocked, blocked
from torchvk.ops.conv_matrix import matrix_constants, matrix_tiles
from torchvk.ops.conv_narrow import narrow_constants, narrow_work, takes_narrow
from torchvk.ops.convolution import LANES, MAX_ELEMENTS, Geometry, lanes_rows, takes_lanes, takes_vectors
from torchvk.ops.linear_kernels import Product, Slots, product_kernels
from torchvk.ops.matrix import Tile
from torchvk.ops.operator import (
    PART_ALIGNMENT,
    Arg,
    Capabilities,
    Dispatch,
    Kernels,
    grid,
    read,
    scratch_read,
    scratch_write,
    write,
)
from torchvk.ops.quantization import reads_texels
from torchvk.ops.rows import stacked

MAX_COLUMNS = 1 << 30  # bytes of scratch memory
COLUMNS_AT_ONCE = 12 << 20  # elements
FEW_TILES = 40


@dataclass(frozen=True)
class Case:
    """All that the choice of kernels asks. ``weight(texels)`` is the argument that holds it; bias and residual are
    inputs by their slots."""

    geometry: Geometry
    dtype: DType
    weight: Callable[[bool], Arg]
    bias: int | None
    bias_dtype: DType
    residual: int | None
    ending: tuple[int, int]

    @property
    def half(self) -> bool:
        return self.dtype is DType.FLOAT16

    @property
    def name(self) -> str:
        return "f16" if self.half else "f32"

    @property
    def nbytes(self) -> int:
        g = self.geometry
        return (g.x_elements + g.y_elements + g.outputs * g.k) * self.dtype.bits // 8

    def dispatch(
        self,
        kernel: str,
        local_size: int,
        groups: tuple[int, int, int],
        work: tuple[int, int],
        texels: bool = False,
        more: tuple[int, ...] = (),
    ) -> Dispatch:
        """``work``: the tiles of a row of tiles, and all of them, as the kernel counts them. ``more``: specialization
        constants from 10 on."""
        bias = 0 if self.bias is None else 1 if self.bias_dtype is DType.FLOAT32 else 2
        stand_in = read(0)
        return Dispatch(
            kernel,
            (
                read(0, texels=texels),
                self.weight(texels),
                stand_in if self.bias is None else read(self.bias),
                write(),
                stand_in if self.residual is None else read(self.residual),
            ),
            groups,
            (local_size, bias, *self.ending, self.geometry.depthwise, *((0,) * 5 if more else ()), *more),
            self.geometry.push(*work) + bytes(16),
            bytes=self.nbytes,
            flops=self.geometry.flops,
        )


def columns_bytes(geometry: Geometry, dtype: DType, capabilities: Capabilities) -> int:
    """The size of the matrix that conv_columns.slang writes, or 0 where it is not to be written."""
    size = geometry.pixels * columns_pitch(geometry.k, dtype) * dtype.bits // 8
    return size if geometry.groups == 1 and size <= min(MAX_COLUMNS, capabilities.max_storage_range) else 0


def images_at_once(geometry: Geometry, dtype: DType, image_bytes: Sequence[int]) -> int:
    """So many images that their columns take little memory beside x and y. ``image_bytes``: of the buffers of which
    each dispatch sees its images alone."""
    g = geometry
    step = math.lcm(*(PART_ALIGNMENT // math.gcd(size, PART_ALIGNMENT) for size in image_bytes))
    each = g.pixels // g.images * columns_pitch(g.k, dtype)
    return min(g.images, max(step, COLUMNS_AT_ONCE // each // step * step))


def of_images(
    images: int,
    at_once: int,
    kernels: Callable[[int], Kernels],
    image_bytes: Mapping[tuple[str, int], int],
    shared: int = 1,
) -> Kernels:
    """What ``kernels`` gives for so many images at a time, one after the other; the first ``shared`` scratch buffers
    are the same for all."""
    counts = [min(at_once, images - first) for first in range(0, images, at_once)]
    made = {count: kernels(count) for count in dict.fromkeys(counts)}
    if len(counts) == 1:
        return made[images]
    before = Kernels((), made[at_once].scratch[:shared])
    return stacked(before, [(count, made[count]) for count in counts], image_bytes) or kernels(images)


def columns_pitch(k: int, dtype: DType) -> int:
    """Elements of a row that conv_columns.slang writes."""
    each = 128 // dtype.bits
    return -(-k // each) * each


def columns_constants(geometry: Geometry, dtype: DType) -> tuple[int, ...]:
    """Specialization constants from 10 on of conv_columns.slang."""
    g = geometry
    pieces = columns_pitch(g.k, dtype) * dtype.bits // 128
    line = g.kernel[2] * g.group_channels * dtype.bits
    runs = g.dilation[2] == 1 and set(g.up) == {1} and line >= 32 and g.x_elements * dtype.bits // 8 < MAX_ELEMENTS
    return (g.k, g.group_channels, *g.kernel[:0:-1], pieces, runs)


def _written(geometry: Geometry, dtype: DType, source: Arg, scratch: int, capabilities: Capabilities) -> Dispatch:
    """The dispatch that writes columns of floating-point numbers."""
    size = geometry.pixels * columns_pitch(geometry.k, dtype) * dtype.bits // 8
    wide = geometry.channels * dtype.bits % 128 == 0
    return Dispatch(
        "conv_columns_wide" if wide else "conv_columns",
        (source, scratch_write(scratch)),
        grid(size // 16, capabilities),
        (capabilities.local_size, DTYPE[dtype], *(0,) * 8, *columns_constants(geometry, dtype)),
        geometry.push(0, size // 16) + bytes(16),
        bytes=2 * size,
    )


def _columns(case: Case, capabilities: Capabilities) -> Iterator[tuple[str, Kernels]]:
    """The pixels' columns in scratch memory, and the product of a linear layer or of a convolution of single pixels."""
    g = case.geometry
    slots = Slots(0, 1, case.bias, case.residual, case.ending)
    pitch = columns_pitch(g.k, case.dtype)
    x_bytes, y_bytes = (count // g.images * case.dtype.bits // 8 for count in (g.x_elements, g.y_elements))
    image_bytes = {("input", 0): x_bytes, ("output", 0): y_bytes}
    if case.residual is not None:
        image_bytes["input", case.residual] = y_bytes
    at_once = images_at_once(g, case.dtype, list(image_bytes.values()))

    # Rows of whole words of the weight are written once, for all images.
    padded = (
        None if pitch == g.k else _written(g.pointwise(g.outputs, g.k), case.dtype, case.weight(False), 1, capabilities)
    )

    def of_products(product: Callable[[Case], Kernels]) -> Kernels:
        """``product`` gives the kernels of a convolution of single pixels."""

        def some(images: int) -> Kernels:
            part = replace(case, geometry=replace(g, images=images))
            return _of_columns(part, product(_pixels(part)), capabilities)

        parts = of_images(g.images, at_once, some, image_bytes, 1 if padded is None else 2)
        return parts if padded is None else replace(parts, dispatches=(padded, *parts.dispatches))

    def linear(pixels: Case) -> Kernels:
        product = Product(pixels.geometry.pixels, g.outputs, pitch, case.dtype, transpose_b=True)
        return product_kernels(product, slots, capabilities)

    yield "columns", of_products(linear)
    few = _pixels(replace(case, geometry=replace(g, images=at_once)))
    for tile in matrix_tiles(few.geometry, False, capabilities) if case.half else []:

        def matrix(pixels: Case, tile: Tile = tile) -> Kernels:
            return Kernels((_matrix(pixels, tile, capabilities),))

        yield f"columns_matrix_{tile.name}", of_products(matrix)


def _pixels(case: Case) -> Case:
    """The product with its columns, as a convolution of single pixels."""
    g = case.geometry
    product = g.pointwise(g.pixels, columns_pitch(g.k, case.dtype))
    return replace(case, geometry=product, weight=lambda texels: read(1, texels=texels))


def _of_columns(case: Case, product: Kernels, capabilities: Capabilities) -> Kernels:
    """A product whose operands are inputs 0 and 1, of columns in scratch buffer 0; where rows are padded, those of the
    weight are in buffer 1, and others write them."""
    g = case.geometry
    pitch = columns_pitch(g.k, case.dtype)
    sizes = [count * pitch * case.dtype.bits // 8 for count in ((g.pixels,) if pitch == g.k else (g.pixels, g.outputs))]
    places = {0: scratch_read(0), 1: case.weight(False) if pitch == g.k else scratch_read(1)}

    def moved(arg: Arg) -> Arg:
        if arg.role == "scratch":
            return replace(arg, index=arg.index + len(sizes))
        if arg.role != "input" or arg.index not in places:
            return arg
        there = places[arg.index]
        return replace(arg, role=there.role, index=there.index, layout=there.layout)

    rest = (replace(each, buffers=tuple(map(moved, each.buffers))) for each in product.dispatches)
    columns = _written(g, case.dtype, read(0), 0, capabilities)
    return Kernels((columns, *rest), (*sizes, *product.scratch))


def _matrix(case: Case, tile: Tile, capabilities: Capabilities) -> Dispatch:
    """On matrix units."""
    work = case.geometry.tiles(tile.m, tile.n)
    groups = grid(work[1], capabilities, 1)
    more = matrix_constants(case.geometry)
    return case.dispatch(f"conv_matrix_{tile.name}", tile.threads, groups, work, more=more)


def _narrow(case: Case, capabilities: Capabilities) -> Dispatch:
    g, size = case.geometry, capabilities.local_size
    work, groups = narrow_work(g, capabilities)
    return case.dispatch(f"conv_narrow_{case.name}_{g.stride[2]}", size, groups, work, more=narrow_constants(g))


def _blocked(case: Case, tile: Blocked, capabilities: Capabilities) -> Dispatch:
    kernel, groups = f"conv_blocked_{case.name}_{tile.block.name}", tile.groups(capabilities)
    return case.dispatch(kernel, tile.block.threads, groups, tile.work, more=tile.constants)


def float_kernels(case: Case, capabilities: Capabilities) -> Iterator[tuple[str, Kernels]]:
    """Every plausible way by name, the default first. The last one is right for everything."""
    g = case.geometry
    sizes = [count * case.dtype.bits // 8 for count in (g.x_elements, g.outputs * g.k)]
    texels = reads_texels(capabilities, *sizes)
    suffix = "_texels" if texels else ""
    if takes_vectors(g, 8 if case.half else 4):
        work = g.strips(8 if case.half else 4, 4)
        groups = grid(work[1], capabilities)
        kernel = f"conv_depthwise_{case.name}{suffix}"
        yield "depthwise", Kernels((case.dispatch(kernel, capabilities.local_size, groups, work, texels),))
    if texels and capabilities.shuffle and takes_lanes(g, case.dtype):
        rows, odd = lanes_rows(g)
        work = g.tiles(rows, 4 * LANES)
        kernel = f"conv_lanes_{case.name}{odd}"
        yield "lanes", Kernels((case.dispatch(kernel, LANES, grid(work[1], capabilities, 1), work, texels),))
    tiles = matrix_tiles(g, False, capabilities) if case.half else []
    written = columns_bytes(g, case.dtype, capabilities) and case.bias_dtype is case.dtype and not texels
    # A few large tiles leave a GPU idle; linear layers have smaller ones.
    few = bool(tiles) and tiles[0].count(g.pixels, g.group_outputs) * g.groups < FEW_TILES
    if written and few:
        yield from _columns(case, capabilities)
    for tile in tiles:
        yield f"matrix_{tile.name}", Kernels((_matrix(case, tile, capabilities),))
    blocks = [] if tiles else blocked(g, case.dtype, case.dtype, capabilities)
    # Columns cost memory; but their products split a long K where tiles are few.
    gathered = bool(blocks) and blocks[0].fills(capabilities) and g.group_channels % WORDS == 0
    if written and not few and not gathered:
        yield from _columns(case, capabilities)
    if not tiles and not texels and takes_narrow(g):
        yield "narrow", Kernels((_narrow(case, capabilities),))
    for block in blocks:
        yield f"blocked_{block.block.name}", Kernels((_blocked(case, block, capabilities),))
    if written and gathered:
        yield from _columns(case, capabilities)
    units = -(-g.y_elements // (2 if case.half else 1))
    groups = grid(units, capabilities)
    direct = case.dispatch(f"conv_direct_{case.name}", capabilities.local_size, groups, (0, 0))
    yield "direct", Kernels((direct,))
