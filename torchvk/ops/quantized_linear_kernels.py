"""Which kernels compute ``quantized_linear``, and with which parameters."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from torchvk.graph import DType
from torchvk.ops import blocked
from torchvk.ops.fragments import Fragment
from torchvk.ops.matrix import Tile, candidates, tiles_of
from torchvk.ops.matrix_half import FRAGMENT_TILES, TILES
from torchvk.ops.operator import Arg, Capabilities, Dispatch, Kernels, Variants, grid, read, scratch_read
from torchvk.ops.quantization import LANES, Activations, Static, activations, reads_texels, spreading
from torchvk.ops.quantized_linear_case import BIAS, RESIDUAL, SCALE, WEIGHT, ZERO_POINT, Case, X
from torchvk.ops.quantized_linear_gemv import few_rows
from torchvk.ops.quantized_linear_matrix import FEW_ROWS, fragment_candidates, fragment_kernel, weight_sums
from torchvk.ops.quantized_linear_matrix import candidates as integer_candidates
from torchvk.ops.quantized_packing import UNIT, Packing
from torchvk.ops.rows import stacked, whole_rows
from torchvk.ops.storing import Storing, storing

MAX_GEMV_ROWS = 4


@dataclass(frozen=True)
class Choice:
    """A kernel: the rows and columns of y that a workgroup computes, its size, and whether it reads texels."""

    kernel: str
    tile_m: int
    tile_n: int
    local_size: int
    texels: bool = False
    matrix: bool = False
    fragment: Fragment | None = None


def choose(m: int, packing: Packing, dynamic: bool, capabilities: Capabilities, half: bool = False) -> Choice:
    """The kernel for m rows: pure, and the one place that a new kernel (cooperative matrices at tier 2) joins."""
    x_bytes = 4 * m * packing.columns
    scale_bytes = 4 * packing.n * (packing.groups + 3)
    if reads_texels(capabilities, x_bytes, packing.nbytes, scale_bytes):
        rows = 1 if m == 1 else 4 if m <= 4 else 8
        suffix = "_broadcast" if capabilities.shuffle else ""
        return Choice(f"quantized_linear_lanes_{rows}{suffix}", rows, 4 * LANES, LANES, texels=True)
    if m <= MAX_GEMV_ROWS:
        # No more threads than units.
        local_size = min(128, max(32, 1 << (packing.units - 1).bit_length()))
        return Choice(f"quantized_gemv{'_subgroup' if capabilities.tier >= 1 else ''}", m, 2, local_size)
    return _block_choice(blocked.pick(_blocks(dynamic, half), capabilities, m, packing.n), dynamic, half)


def _blocks(dynamic: bool, half: bool) -> tuple[blocked.Block, ...]:
    return blocked.INTEGER if dynamic else blocked.WEIGHTS_HALF if half else blocked.WEIGHTS


def _block_choice(block: blocked.Block, dynamic: bool, half: bool) -> Choice:
    name = "integer" if dynamic else "f16" if half else "f32"
    return Choice(f"quantized_gemm_blocked_{name}_{block.name}", block.m, block.n, block.threads)


def _choices(
    m: int, packing: Packing, dynamic: bool, capabilities: Capabilities, half: bool
) -> tuple[tuple[str, Choice], ...]:
    """By name, the chosen kernel first, then those that may be better."""
    chosen = choose(m, packing, dynamic, capabilities, half)
    if chosen.texels or m <= 4:
        return (("plain", chosen),)
    blocks = blocked.plausible(_blocks(dynamic, half), capabilities, m, packing.n)
    choices = dict.fromkeys((chosen, *(_block_choice(block, dynamic, half) for block in blocks)))
    return tuple((choice.kernel, choice) for choice in choices)


def float_choices(
    m: int, packing: Packing, dtype: DType, capabilities: Capabilities, zeros: bool = False
) -> list[tuple[str, Choice]]:
    """Products of float16 cooperative matrices for m rows of floating-point activations, by name, best first. float32
    ones are rounded to float16 where that is allowed. Weights with zero points, and those of 2 bits, pass through
    shared memory."""
    if m <= MAX_GEMV_ROWS or capabilities.kind == "cpu":
        return []
    if dtype is DType.FLOAT32 and capabilities.matmul_precision == "highest":
        return []
    choices = [] if zeros or packing.few_bits else fragment_choices(m, packing, False, capabilities)
    tiles = candidates(tiles_of(TILES, capabilities, "float16", "float32"), m, packing.n)
    return choices + [(tile.name, matrix_choice(tile)) for tile in tiles]


def fragment_choices(m: int, packing: Packing, integers: bool, capabilities: Capabilities) -> list[tuple[str, Choice]]:
    """Products whose weight comes in fragments of matrices, by name, best first."""
    if integers:
        return [
            (f"fragments_{tile.name}", fragment_choice(tile, fragment, fragment_kernel(tile)))
            for tile, fragment in fragment_candidates(m, packing, capabilities)
        ]
    tiles = candidates(tiles_of(FRAGMENT_TILES, capabilities, "float16", "float32", both=False), m, packing.n)
    return [
        (f"fragments_{tile.name}", fragment_choice(tile, fragment, f"quantized_fragments_{tile.name}"))
        for tile in tiles
        for fragment in capabilities.fragments
        if fragment.suits(tile, "float16") and packing.takes(fragment)
    ]


def variants(case: Case) -> Variants:
    """Every plausible way by name, the default first. The last one is right for everything."""
    packing, m, capabilities = case.packing, case.m, case.capabilities
    few = few_rows(case)
    choices: list[tuple[str, Choice]] = []
    most = 2 if few else None
    if case.scheme is None:
        choices = float_choices(m, packing, case.x.dtype, capabilities, case.zeros)[:most]
    elif m > FEW_ROWS and not case.zeros and not packing.few_bits:  # Integer products on matrix units have neither.
        choices = fragment_choices(m, packing, True, capabilities)
        for tiles in list(integer_candidates(m, packing, capabilities))[:most]:
            kernel = tiles.kernel(packing.groups == 1)
            choices.append((tiles.name, Choice(kernel, tiles.tile_m, tiles.tile_n, tiles.threads, matrix=True)))
    half = case.scheme is None and case.x.dtype is DType.FLOAT16 and case.direct
    plain = _choices(m, packing, case.scheme is not None, capabilities, half)
    # Where there are matrix units, one of the others is enough.
    others = list(plain[:1] if choices or few else plain)
    # CPUs multiply integer matrices in vectors like anything else.
    choices = [*others, *choices] if case.scheme is not None and capabilities.kind == "cpu" else [*choices, *others]
    return (*few, *((name, _with_rest(case, choice)) for name, choice in choices))


def _with_rest(case: Case, choice: Choice) -> Kernels:
    """The chosen kernel, and for rows that do not fill its tiles another beside it."""
    everything = _chosen(case, choice)
    whole = case.m if choice.texels else whole_rows(case.m, choice.tile_m, -(-case.packing.n // choice.tile_n))
    # (float16 results of odd rows share words, and are rounded by a pass at the end.)
    if whole == case.m or not _reads(everything.dispatches[-1], "input", WEIGHT):
        return everything
    # Activations are quantized for all; a kernel that reads something else is no part of this.
    before = Kernels(everything.dispatches[:-1], everything.scratch)
    row_bytes = case.row_bytes() | {("scratch", i): size // case.m for i, size in enumerate(everything.scratch[:2])}
    tiles = _chosen(case.of_rows(whole), choice).dispatches[-1]
    rest = case.of_rows(case.m - whole)
    few = [kernels for _, kernels in variants(rest)]
    if choice.fragment is not None:
        choices = fragment_choices(rest.m, case.packing, case.scheme is not None, case.capabilities)
        few = [_chosen(rest, small) for _, small in choices]
    for kernels in few:
        if _sources(kernels.dispatches[-1]) == _sources(tiles):
            parts = ((whole, Kernels((tiles,))), (rest.m, Kernels(kernels.dispatches[-1:])))
            return stacked(before, parts, row_bytes) or everything
    return everything


def _reads(dispatch: Dispatch, role: str, index: int) -> bool:
    return any((arg.role, arg.index) == (role, index) for arg in dispatch.buffers if arg.read)


def _sources(dispatch: Dispatch) -> set[tuple[str, int, str, bool]]:
    """What a product reads but scales, bias and residual: x or its copy, and the weight, as it is packed. (Kernels that
    read texels may want other copies of x than those that do not.)"""
    return {
        (arg.role, arg.index, arg.layout.name if arg.layout else "", arg.texels)
        for arg in dispatch.buffers[:2]
        if arg.read and (arg.role == "scratch" or arg.index in (X, WEIGHT))
    }


def matrix_choice(tile: Tile) -> Choice:
    return Choice(f"quantized_matrix_{tile.name}", tile.m, tile.n, tile.threads, matrix=True)


def fragment_choice(tile: Tile, fragment: Fragment, kernel: str) -> Choice:
    return Choice(kernel, tile.m, tile.n, tile.threads, matrix=True, fragment=fragment)


def _chosen(case: Case, choice: Choice) -> Kernels:
    """All dispatches around the chosen kernel."""
    operand, x_format = _operand(case, choice)
    own = _bytes_at_once(choice, case.scheme is not None)
    stored = storing(case.results, own, len(operand.scratch), case.capabilities)
    main = _product(case, choice, operand, x_format, stored)
    return Kernels((*operand.dispatches, main, *stored.after), (*operand.scratch, *stored.scratch))


def _operand(case: Case, choice: Choice) -> tuple[Activations, int]:
    """x as the kernel reads it and what brings it there, and its format: of floats whether they are float16; of bytes,
    for the kernels that read texels, 1 signed, 2 unsigned; else 0."""
    x, scheme, texels = case.x, case.scheme, choice.texels
    rows = case.packing.rows(case.m, x.dtype)
    if scheme is not None:
        # The kernel for CPUs takes bytes where each of eight lanes brings another row.
        takes_bytes = isinstance(scheme, Static) and choice.kernel == "quantized_linear_lanes_8_broadcast"
        # Matrix units take signed ones, in pieces of eight. (MobileNetV2 on an H200, 1 / 32 images: 291 / 1032 µs;
        # with five dispatches that spread rows to whole units 306 / 1064.)
        takes_eights = choice.matrix and isinstance(scheme, Static) and not scheme.unsigned and not case.zeros
        quantized = activations(
            *(rows, X, SCALE, scheme, case.capabilities),
            floats=texels and not takes_bytes,
            texels=texels,
            whole=8 if takes_eights else 16 if takes_bytes and not case.zeros else 0,
        )
        unsigned = not quantized.dispatches and x.dtype is DType.UINT8
        return quantized, 2 if unsigned else 1 if takes_bytes else 0
    weights = read(WEIGHT, case.packing.layout, texels)  # a stand-in for scales and zero points
    if not case.direct or (texels and x.dtype is DType.FLOAT16):
        dispatch, size = spreading(rows, X, case.capabilities, texels=texels)
        return Activations(scratch_read(0, texels=texels), weights, (dispatch,), (size,)), 0
    return Activations(read(X, texels=texels), weights, (), ()), int(x.dtype is DType.FLOAT16)


def _bytes_at_once(choice: Choice, integers: bool) -> int:
    """Neighbouring 8-bit results that a thread of the kernel stores at once; 0 if it cannot."""
    if choice.kernel.startswith(("quantized_gemm_blocked_integer", "quantized_fragments_integer")):
        return 4
    return 2 if choice.texels or (choice.matrix and integers) else 0


def _product(case: Case, choice: Choice, operand: Activations, x_format: int, stored: Storing) -> Dispatch:
    """The matrix product proper."""
    packing, integers, texels = case.packing, case.scheme is not None, choice.texels
    tiles_n = -(-packing.n // choice.tile_n)
    tiles = tiles_n * -(-case.m // choice.tile_m)
    shared = (choice.local_size, packing.bits, integers, packing.half_groups, case.bias_code, stored.code, *case.ending)
    if texels:
        own = _texel_constants(case, operand.values, x_format)
    elif choice.matrix:
        own = _matrix_constants(case, choice.fragment, x_format, operand.values)
    else:
        own = _plain_constants(case, x_format)
    weights, scales = _weights(case, choice)
    sums: tuple[Arg, ...] = ()
    if choice.matrix and integers:
        sums = (weights if packing.groups > 1 else read(WEIGHT, weight_sums(packing)),)
    zero_points: tuple[Arg, ...] = ()
    if not choice.matrix or not (integers or choice.fragment):
        layout = packing.scale_layout(DType.INT8) if texels else None
        zero_points = (read(ZERO_POINT, layout, texels) if case.zeros else weights,)
    # Bytes of an element of x as the kernel reads it.
    element = (1 if x_format else 4) if texels else 2 if x_format == 1 else 1 if integers else 4
    return Dispatch(
        kernel=choice.kernel,
        # Every binding needs a buffer: what is absent is replaced by one that is there, and not read.
        buffers=(
            operand.values,
            weights,
            scales,
            weights if case.bias is None else read(BIAS, texels=texels),
            # Products of float16 matrices have no binding for the rows' scales and zero points.
            *(() if choice.matrix and not integers else (operand.qparams,)),
            stored.out,
            # (Residuals are no texels. Another packing of the weight would be uploaded.)
            (read(WEIGHT, packing.layout) if texels else weights) if case.residual is None else read(RESIDUAL),
            *sums,
            *zero_points,
        ),
        groups=grid(tiles, case.capabilities, 1),
        constants=(*shared, *own),
        push=struct.pack(
            "<7I", case.m, packing.n, packing.units, packing.groups, packing.units_per_group, tiles_n, tiles
        )
        + stored.push,
        bytes=case.m * packing.columns * element
        + packing.nbytes
        + case.scale.nbytes
        + case.m * packing.n * (4, 2, 1)[stored.code],
        flops=2 * case.m * packing.n * packing.k,
    )


def _weights(case: Case, choice: Choice) -> tuple[Arg, Arg]:
    """The weight and its scales as the kernel reads them."""
    packing, fragment, texels = case.packing, choice.fragment, choice.texels
    if fragment is None:
        layout = packing.scale_layout(case.scale.dtype) if texels else None
        return read(WEIGHT, packing.layout, texels), read(SCALE, layout, texels)
    in_groups = case.scheme is None and packing.groups > 1
    layout = packing.fragment_scale_layout(fragment, case.scale.dtype) if in_groups else None
    return read(WEIGHT, packing.fragment_layout(fragment)), read(SCALE, layout)


def _texel_constants(case: Case, source: Arg, x_format: int) -> tuple[int, ...]:
    """Of quantized_linear_lanes.slang, those that come after the ones that all kernels have."""
    packing, integers = case.packing, case.scheme is not None
    # Sums of products below 2^24 are exact in float32; longer groups are summed in pieces of that.
    largest = (1 << packing.bits) - 1 if case.zeros else 1 << (packing.bits - 1)
    exact_units = (1 << 24) // (255 * largest * UNIT)
    in_pieces = integers and packing.units_per_group > exact_units
    pitch = (packing.k if source.role == "input" else packing.columns) // 16
    return (exact_units, in_pieces, case.zeros, x_format, pitch)


def _matrix_constants(case: Case, fragment: Fragment | None, half_x: int, source: Arg) -> tuple[int, ...]:
    """Of the kernels of matrix units."""
    packing, scheme = case.packing, case.scheme
    if scheme is not None:
        zero_points = 0 if scheme.centered else 1 if scheme.per_token else 2
        columns = packing.k if source.role == "input" else packing.columns
        groups = () if fragment is not None else (packing.units_per_group,)
        return (case.half_scale, packing.units, *groups, zero_points, columns // 8)
    sizes = (packing.units, packing.units_per_group, packing.groups == 1)
    if fragment is None:
        return (half_x, case.half_scale, *sizes, case.zeros)
    slots, slot_shift, lane_shift = fragment.slots() or (1, 0, 0)
    return (half_x, case.half_scale, *sizes, slot_shift, lane_shift, slots)


def _plain_constants(case: Case, half_x: int) -> tuple[int, ...]:
    """Of the kernels for all GPUs."""
    packing = case.packing
    # How groups end: 2 or 1 in each unit, or 0, after several units (or once, after all).
    ends = 2 if packing.half_groups else 1 if packing.units_per_group == 1 else 0
    whole = ends == 0 and packing.groups == 1
    bitwise = packing.pitch <= (64 if case.zeros else 128)
    return (half_x, case.half_scale, min(case.m, 4), 1, ends, whole, bitwise, case.zeros)
