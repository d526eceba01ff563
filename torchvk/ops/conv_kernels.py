"""Which kernels compute a convolution in floating point, and with which parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torchvk.graph import DType
from torchvk.ops.conv_matrix import matrix_constants, matrix_tiles
from torchvk.ops.convolution import LANES, Geometry, lanes_rows, takes_lanes, takes_vectors
from torchvk.ops.operator import Arg, Capabilities, Dispatch, Kernels, grid, read, write
from torchvk.ops.quantization import reads_texels


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
    units = -(-g.y_elements // (2 if case.half else 1))
    groups = grid(units, capabilities)
    direct = case.dispatch(f"conv_direct_{case.name}", capabilities.local_size, groups, (0, 0))
    yield "direct", Kernels((direct,))
