"""Which kernels compute a convolution in floating point, and with which parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torchvk.graph import DType
from torchvk.ops.codes import DTYPE
from torchvk.ops.conv_matrix import matrix_constants, matrix_tiles
from torchvk.ops.convolution import LANES, Geometry, lanes_rows, takes_lanes, takes_vectors
from torchvk.ops.linear import Product, Slots, product_kernels
from torchvk.ops.operator import Arg, Capabilities, Dispatch, Kernels, grid, read, scratch_read, scratch_write, write
from torchvk.ops.quantization import reads_texels

MAX_COLUMNS = 1 << 30  # bytes of scratch memory


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


def columns_bytes(geometry: Geometry, dtype: DType, capabilities: Capabilities, pitch: int = 0) -> int:
    """The size of the matrix that conv_columns.slang writes, or 0 where it is not to be written."""
    size = geometry.pixels * (pitch or geometry.k) * dtype.bits // 8
    return size if geometry.groups == 1 and size <= min(MAX_COLUMNS, capabilities.max_storage_range) else 0


def _columns(case: Case, capabilities: Capabilities) -> Kernels:
    """The pixels' columns in scratch memory, and the product of a linear layer."""
    g = case.geometry
    slots = Slots(0, 1, case.bias, case.residual, case.ending)
    product = product_kernels(Product(g.pixels, g.outputs, g.k, case.dtype, transpose_b=True), slots, capabilities)
    own = len(product.scratch)

    def moved(arg: Arg) -> Arg:
        if arg.role != "input" or arg.index not in (0, 1):
            return arg
        there = scratch_read(own) if arg.index == 0 else case.weight(False)
        return replace(arg, role=there.role, index=there.index, layout=there.layout)

    each = 128 // case.dtype.bits
    wide = g.channels % each == 0
    units = -(-g.pixels * g.k // (each if wide else each // 4))
    first = Dispatch(
        "conv_columns_wide" if wide else "conv_columns",
        (read(0), scratch_write(own)),
        grid(units, capabilities),
        (capabilities.local_size, DTYPE[case.dtype]),
        g.push(g.k, units) + bytes(16),
        bytes=2 * g.pixels * g.k * case.dtype.bits // 8,
    )
    rest = (replace(each, buffers=tuple(map(moved, each.buffers))) for each in product.dispatches)
    return Kernels((first, *rest), (*product.scratch, g.pixels * g.k * case.dtype.bits // 8))


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
    for tile in matrix_tiles(g, False, capabilities) if case.half else ():
        work = g.tiles(tile.m, tile.n)
        groups = grid(work[1], capabilities, 1)
        kernel = f"conv_matrix_{tile.name}"
        dispatch = case.dispatch(kernel, tile.threads, groups, work, more=matrix_constants(g))
        yield f"matrix_{tile.name}", Kernels((dispatch,))
    if columns_bytes(g, case.dtype, capabilities) and case.bias_dtype is case.dtype and capabilities.kind != "cpu":
        yield "columns", _columns(case, capabilities)
    units = -(-g.y_elements // (2 if case.half else 1))
    groups = grid(units, capabilities)
    direct = case.dispatch(f"conv_direct_{case.name}", capabilities.local_size, groups, (0, 0))
    yield "direct", Kernels((direct,))
