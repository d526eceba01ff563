"""``quantized_linear`` for few rows on GPUs: weights read once, at the speed of memory.

Vector kernels (quantized_linear_gemv.slang, tier 1 with subgroup shuffles) for one to eight rows, and matrix kernels
(quantized_linear_skinny.slang, tier 2) for up to 16, whose subgroups share k.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from torchvk.graph import DType
from torchvk.ops.operator import (
    Arg,
    Array,
    Dispatch,
    Kernels,
    Layout,
    Variants,
    grid,
    read,
    scratch_read,
)
from torchvk.ops.quantization import Activations, Scheme, activations, spreading
from torchvk.ops.quantized_linear_case import BIAS, RESIDUAL, SCALE, WEIGHT, ZERO_POINT, Case, X
from torchvk.ops.quantized_packing import UNIT
from torchvk.ops.storing import storing

STAGED_BYTES = 32 << 10  # of shared memory for x
SUMS_BYTES = 8 << 10  # and for sums

# Matrix shapes, lanes of a subgroup, and (tile, split).
HALF_TILES = (
    ((16, 16, 16), 32, (((16, 64, 2), 4), ((16, 32, 2), 6))),
    ((16, 16, 16), 64, (((16, 64, 2), 4),)),
    ((8, 8, 8), 8, (((16, 32, 2), 4),)),
)
INTEGER_TILES = (
    ((16, 16, 32), 32, (((16, 16, 4), 4), ((16, 32, 4), 4))),
    ((16, 16, 16), 32, (((16, 32, 4), 4),)),
    ((16, 16, 16), 64, (((16, 32, 4), 4),)),
    ((8, 8, 8), 8, (((16, 32, 4), 3),)),
)

Mode = Literal["integer", "quantize", "float"]


@dataclass(frozen=True)
class Gemv:
    """How gemv runs. Its subgroups are teams of ``split`` that share k; ``workgroups``: how many there shall be.

    mode: "integer" meets x quantized by a dispatch before, "quantize" does that itself, "float" has x as floats.
    """

    mode: Mode
    local_size: int
    split: int
    workgroups: int

    def columns(self, rows: int) -> int:
        """Columns of y whose weights a lane holds at a time: fewer where registers are needed for x."""
        return 2 if rows == (4 if self.mode == "float" else 8) else 4

    @property
    def name(self) -> str:
        return f"gemv_{self.mode}_{self.local_size}_{self.split}_{self.workgroups}"


def gemv_kernels(case: Case, gemv: Gemv) -> Kernels | None:
    """The dispatches, or None where the device has too little of something."""
    packing, m, capabilities = case.packing, case.m, case.capabilities
    rows = 1 << (m - 1).bit_length()
    lanes = capabilities.subgroup_size
    teams = gemv.local_size // lanes // gemv.split
    block = gemv.columns(rows) * teams
    columns = -(-packing.n // (gemv.workgroups * block)) * block
    most = SUMS_BYTES // (4 * rows * gemv.split)
    columns = min(columns, most // block * block)
    if columns == 0:
        return None
    stationary = case.pieces <= gemv.split * lanes
    half_x = case.x.dtype is DType.FLOAT16 and (gemv.mode == "quantize" or case.direct)
    # uint4s of x that a piece meets.
    words = case.piece // (16 if gemv.mode != "float" else 8 if half_x else 4)
    chunk = case.pieces
    if gemv.mode == "float" and stationary:
        chunk = min(chunk, STAGED_BYTES // (16 * rows * words) - 1)
    staged = 1 if gemv.mode == "integer" else rows * words * (chunk + 1)
    sums = rows * columns * gemv.split
    if 16 * staged + 4 * sums + 2048 + 12 > capabilities.shared_memory:
        return None
    operand = _activations(case, gemv.mode)
    scheme = case.scheme
    scales = read(SCALE, scale_layout(packing.n, packing.groups, case.scale.dtype, gemv.columns(rows)))
    quantizing: tuple[int | float, ...] = (0, False, 0, 0, 0.0, 1)
    if isinstance(scheme, Scheme):
        smallest = float(scheme.smallest(case.x.dtype))
        quantizing = (
            scheme.formula,
            scheme.symmetric,
            scheme.quant_min,
            scheme.quant_max,
            smallest,
            -(-packing.columns // (8 * gemv.local_size)),
        )
    group_pieces = max(1, packing.pitch // case.piece)
    constants: tuple[int | float, ...] = (half_x, case.half_scale, group_pieces, packing.groups == 1, lanes, gemv.split)
    constants = (*constants, stationary, sums, staged, chunk)
    kernel = f"gemv_{gemv.mode}_{rows}"
    tiles = -(-packing.n // columns)
    constants = (*constants, *quantizing, case.zeros)
    zeros = read(ZERO_POINT, zero_layout(packing.n, packing.groups, gemv.columns(rows))) if case.zeros else scales
    return _finish(case, operand, kernel, gemv.local_size, scales, constants, (columns, tiles), (scales, zeros))


def scale_layout(n: int, groups: int, dtype: DType, columns: int) -> Layout:
    """[N, groups] to [N / columns, groups, columns], so that a lane loads several scales at once."""

    def pack(scale: Array) -> Array:
        blocks = -(-n // columns)
        padded = np.zeros((blocks * columns, groups), scale.dtype)
        padded[:n] = scale
        return np.ascontiguousarray(padded.reshape(blocks, columns, groups).transpose(0, 2, 1))

    return Layout(f"quantized_scale_blocks_{columns}_{dtype.value}_{n}_{groups}", pack)


def zero_layout(n: int, groups: int, columns: int) -> Layout:
    """Zero points as scales, in the first bytes of a word a block."""
    blocks = scale_layout(n, groups, DType.INT8, columns)

    def pack(zero_point: Array) -> Array:
        packed = blocks.pack(zero_point)
        words = np.zeros((*packed.shape[:2], 4), np.int8)
        words[:, :, :columns] = packed
        return words

    return Layout(f"quantized_zero_blocks_{columns}_{n}_{groups}", pack)


def _activations(case: Case, mode: Mode) -> Activations:
    """x in the form that the kernel reads, and what brings it there."""
    rows = case.packing.rows(case.m, case.x.dtype)
    if mode == "integer":
        assert case.scheme is not None
        return activations(rows, X, SCALE, case.scheme, case.capabilities, floats=False, texels=False)
    weights = read(WEIGHT, case.packing.layout)  # a stand-in for what is not there
    if mode == "float" and not case.direct:
        dispatch, size = spreading(rows, X, case.capabilities, texels=False)
        return Activations(scratch_read(0), weights, (dispatch,), (size,))
    return Activations(read(X), weights, (), ())


def _finish(
    case: Case,
    operand: Activations,
    kernel: str,
    local_size: int,
    scales: Arg,
    constants: Sequence[int | float],
    tiles: tuple[int, int],
    more: tuple[Arg, ...] = (),
) -> Kernels:
    """With the product, whose kernel has the bindings and constants of quantized_linear.slang and some more."""
    packing, m, x = case.packing, case.m, case.x
    weights = read(WEIGHT, packing.layout)
    stored = storing(case.results, 2, len(operand.scratch), case.capabilities)
    shared = (local_size, packing.bits, case.scheme is not None, packing.half_groups, case.bias_code)
    product = Dispatch(
        kernel=kernel,
        # Every binding needs a buffer: what is absent is replaced by one that is there, and not read.
        buffers=(
            operand.values,
            weights,
            scales,
            weights if case.bias is None else read(BIAS),
            operand.qparams,
            stored.out,
            weights if case.residual is None else read(RESIDUAL),
            *more,
        ),
        groups=grid(tiles[1], case.capabilities, 1),
        constants=(*shared, stored.code, *case.ending, *constants),
        push=struct.pack(
            "<7I", m, packing.n, packing.units, packing.groups, packing.units_per_group, tiles[0], tiles[1]
        )
        + stored.push,
        bytes=x.nbytes + packing.nbytes + case.scale.nbytes + m * packing.n * (4, 2, 1)[stored.code],
        flops=2 * m * packing.n * packing.k,
    )
    return Kernels((*operand.dispatches, product, *stored.after), (*operand.scratch, *stored.scratch))


@dataclass(frozen=True)
class Skinny:
    """A kernel of quantized_linear_skinny.slang: the matrices' shape, its tile of rows, columns and units a step."""

    shape: tuple[int, int, int]
    tile: tuple[int, int, int]
    half: bool
    lanes: int
    split: int

    @property
    def name(self) -> str:
        return f"skinny_{'x'.join(map(str, self.tile))}_{self.split}"

    def shared_memory(self, one_group: bool) -> int:
        """Bytes; see the shader."""
        m, n, step = self.tile
        operands = (m + n) * (UNIT * step * (2 if self.half else 1) + 16)
        slab = max(operands, m * (4 * n + 16))
        sums = 0 if self.half else step * n * (4 if one_group else 8)
        return self.split * (slab + sums) + 4 * m


def skinny_kernels(case: Case, skinny: Skinny) -> Kernels | None:
    """The dispatches, or None where the device has too little of something."""
    packing, capabilities = case.packing, case.capabilities
    one_group = packing.groups == 1
    local_size = skinny.lanes * skinny.split
    if (
        skinny.shared_memory(one_group) > capabilities.shared_memory
        or local_size > capabilities.max_workgroup_invocations
    ):
        return None
    operand = _activations(case, "float" if skinny.half else "integer")
    kind = "half" if skinny.half else "integer"
    shape = "x".join(map(str, (*skinny.shape, skinny.lanes)))
    kernel = f"skinny_{kind}_{shape}_{'x'.join(map(str, skinny.tile))}"
    if one_group and not skinny.half:
        kernel += "_one"
    constants = (case.half_scale, packing.units, packing.units_per_group, one_group, skinny.split)
    tiles = (1, -(-packing.n // skinny.tile[1]))
    return _finish(case, operand, kernel, local_size, read(SCALE), constants, tiles)


def few_rows(case: Case) -> Variants:
    """The ways to run it with these kernels, by name, best first; none where they do not suit."""
    capabilities, packing, m = case.capabilities, case.packing, case.m
    if capabilities.kind == "cpu" or capabilities.tier < 1 or not capabilities.shuffle:
        return ()
    if packing.pitch % case.piece:
        return ()
    found = [(name, gemv_kernels(case, gemv)) for name, gemv in {gemv.name: gemv for gemv in _gemvs(case)}.items()]
    skinnies = [(skinny.name, skinny_kernels(case, skinny)) for skinny in _skinnies(case)]
    found = skinnies + found if m > _gemv_rows(case) else found + skinnies
    return tuple((name, kernels) for name, kernels in found if kernels is not None)


def _gemv_rows(case: Case) -> int:
    """Rows up to which the vector kernels are faster than the matrix kernels."""
    if case.scheme is None:
        return 2
    return 4 if case.packing.bits == 8 else 8


def _gemvs(case: Case) -> Iterator[Gemv]:
    """Vector kernels, best first."""
    scheme, m, lanes = case.scheme, case.m, case.capabilities.subgroup_size
    if m > (4 if scheme is None else 8):
        return
    modes: list[Mode] = ["float"]
    if scheme is not None:
        # The range of one row is that of the tensor.
        fused = m == 1 and case.direct and isinstance(scheme, Scheme)
        modes = ["quantize", "integer"] if fused else ["integer"]
    limit = min(case.capabilities.max_workgroup_invocations, case.capabilities.max_workgroup_size[0])
    # Teams as wide as a row, if that is no wider than 16 subgroups.
    width = -(-case.pieces // lanes)
    split = width if width <= 16 else 4
    split = min(split, limit // lanes)
    if split == 0:
        return
    # What was fastest where a card of 132 multiprocessors was measured, and its neighbours. Each workgroup brings x
    # into its shared memory, so workgroups are large; wide teams should not be alone, unless x is quantized as well.
    sizes: tuple[tuple[int, int], ...]
    for mode in modes:
        if mode == "float" and split > 8:
            sizes = ((1024, 132), (512, 264))
        elif mode == "integer":
            sizes = ((256, 528), (256, 1056), (128, 1056))
        else:
            usual = 512 if mode == "quantize" else 256
            sizes = ((usual, 264), (usual, 528), (usual // 2, 528))
        for size, workgroups in sizes:
            teams = max(1, min(size, limit) // (split * lanes))
            yield Gemv(mode, teams * split * lanes, split, workgroups)


def _skinnies(case: Case) -> Iterator[Skinny]:
    """Matrix kernels, best first."""
    capabilities = case.capabilities
    packing = case.packing
    if capabilities.tier < 2 or not 2 <= case.m <= 16 or packing.half_groups or packing.few_bits or case.zeros:
        return
    half = case.scheme is None
    if half and not (case.x.dtype is DType.FLOAT16 and case.direct and case.half_scale):
        return
    offered = capabilities.matrix_shapes(*(("float16", "float32") if half else ("int8", "int32")))
    for shape, lanes, tiles in HALF_TILES if half else INTEGER_TILES:
        if shape in offered and lanes == capabilities.subgroup_size:
            # float16 tiles: wide ones read x less often, narrow ones are more, where there are few columns.
            for tile, split in tiles if packing.n >= 8192 or not half else reversed(tiles):
                yield Skinny(shape, tile, half, lanes, split)
