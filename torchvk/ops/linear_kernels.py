"""Which kernels compute a matrix product in floating point, and with which parameters."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torchvk.errors import UnsupportedError
from torchvk.graph import DType
from torchvk.ops import blocked
from torchvk.ops.fragments import Fragment
from torchvk.ops.linear_fragments import fragment_dispatch, fragment_kernel, fragment_tiles
from torchvk.ops.matrix import Tile, candidates, pick, plausible, tiles_of
from torchvk.ops.matrix_half import TILES
from torchvk.ops.operator import (
    NOTHING,
    Arg,
    Capabilities,
    Dispatch,
    Kernels,
    Variants,
    grid,
    read,
    scratch_write,
    write,
)
from torchvk.ops.rounding import round_to_half
from torchvk.ops.rows import stacked, whole_rows

MAX_BATCH_RANK = 6
BLOCKS = {DType.FLOAT32: blocked.FLOAT, DType.FLOAT16: blocked.HALF}

# lavapipe ends loops, silently, after 65535 iterations of all loops of a workgroup together.
MAX_CPU_K = 200_000


@dataclass(frozen=True)
class Product:
    """y[batch, m, n] = Σ_k A(m, k) · B(n, k) + bias[n], with sizes, strides of the batch dimensions (counted in
    matrices, 0 where an operand is broadcast), how the operands lie in memory, and whether B is a constant."""

    m: int
    n: int
    k: int
    dtype: DType
    transpose_a: bool = False
    transpose_b: bool = False
    batch: tuple[int, ...] = ()
    strides_a: tuple[int, ...] = ()
    strides_b: tuple[int, ...] = ()
    constant_b: bool = False

    @property
    def batches(self) -> int:
        return math.prod(self.batch)

    @property
    def elements_a(self) -> int:
        """Elements of A over all batches; a broadcast operand counts once."""
        return self.m * self.k * _distinct(self.batch, self.strides_a)

    @property
    def elements_b(self) -> int:
        return self.n * self.k * _distinct(self.batch, self.strides_b)

    @property
    def contiguous_a(self) -> int:
        """Length of A's rows as they lie in memory."""
        return self.m if self.transpose_a else self.k

    @property
    def contiguous_b(self) -> int:
        return self.k if self.transpose_b else self.n


@dataclass(frozen=True)
class Choice:
    """A kernel for a Product: its tile, its workgroup size, how many elements it loads at once where rows allow,
    whether A and B are bound as texel buffers, whether it multiplies cooperative matrices or register blocks, how many
    k it takes at once, how many workgroups share a tile's k, and the tile if the weight comes in fragments."""

    kernel: str
    tile_m: int
    tile_n: int
    local_size: int
    group: int
    texels: bool = False
    matrix: bool = False
    block: bool = False
    step: int = 4
    splits: int = 1
    fragments: tuple[Tile, Fragment] | None = None


def choose(product: Product, capabilities: Capabilities) -> Choice:
    """The kernel for a product: pure, and the one place that a new kernel joins."""
    name = "f16" if product.dtype is DType.FLOAT16 else "f32"
    if capabilities.kind == "cpu":
        return _choose_lanes(product, capabilities, name)
    if product.m <= 4 and not product.transpose_a:
        local_size = min(128, capabilities.max_workgroup_invocations)
        if product.transpose_b:
            suffix = "_subgroup" if capabilities.tier >= 1 else ""
            if name == "f16" and product.k % 8 == 0:
                return Choice(f"gemv_rows_f16_wide{suffix}", 4, 4, local_size, 8)
            return Choice(f"gemv_rows_{name}{suffix}", 4, 4, local_size, 4)
        return Choice(f"gemv_columns_{name}", 4, 64, local_size, 2)
    if fragments := fragment_choices(product, capabilities):
        return fragments[0]
    tiles = matrix_tiles(product, capabilities)
    if tiles:
        return _matrix_choice(pick(tiles, product.m, product.n, product.batches))
    sizes = product.m, product.n
    block = blocked.pick(BLOCKS[product.dtype], capabilities, *sizes, product.batches)
    # (float16 results of odd rows share words, which parts cannot.)
    whole = name == "f16" and product.n % 2 == 1
    splits = 1 if whole else blocked.pick_splits(block, capabilities, *sizes, product.k, product.batches)
    return _block_choice(block, name, splits)


def _block_choice(block: blocked.Block, name: str, splits: int = 1) -> Choice:
    kernel = f"gemm_blocked_{name}_{block.name}"
    return Choice(kernel, block.m, block.n, block.threads, 4, block=True, step=block.step, splits=splits)


def matrix_tiles(product: Product, capabilities: Capabilities) -> tuple[Tile, ...]:
    """Tiles of cooperative matrices that a product may use: float16, or float32 rounded to it where that is allowed."""
    if product.dtype is DType.FLOAT32 and (
        capabilities.matmul_precision == "highest" or product.contiguous_a % 8 or product.contiguous_b % 8
    ):
        return ()
    return tiles_of(TILES, capabilities, "float16", "float32")


def fragment_choices(product: Product, capabilities: Capabilities) -> list[Choice]:
    """Products whose weight comes in fragments of matrices, the default first."""
    if product.dtype is not DType.FLOAT16 or not (product.transpose_b and product.constant_b) or product.batch:
        return []
    fragments = dict(fragment_tiles(product.k, capabilities))
    return [
        Choice(fragment_kernel(tile), tile.m, tile.n, tile.threads, 8, matrix=True, fragments=(tile, fragments[tile]))
        for tile in candidates(list(fragments), product.m, product.n)
    ]


def _matrix_choice(tile: Tile) -> Choice:
    return Choice(f"gemm_matrix_{tile.name}", tile.m, tile.n, tile.threads, 8, matrix=True)


def _choose_lanes(product: Product, capabilities: Capabilities, name: str) -> Choice:
    if product.k > MAX_CPU_K:
        raise UnsupportedError(f"a matrix product over K = {product.k}: CPU devices take at most {MAX_CPU_K}")
    lanes = capabilities.subgroup_size
    if product.m == 1:
        rows, suffix = 1, ""
    elif capabilities.tier < 1 or not capabilities.shuffle:
        rows, suffix = 4, ""
    else:
        rows, suffix = (4 if product.m <= 8 else 16), "_broadcast"
    per_texel = 128 // product.dtype.bits
    texels = max(product.elements_a, product.elements_b) <= capabilities.max_texels * per_texel
    suffix += "_texels" if texels else ""
    return Choice(f"gemm_lanes_{name}_{rows}{suffix}", rows, 4 * lanes, lanes, 4, texels)


@dataclass(frozen=True)
class Slots:
    """The node's inputs that hold the operands; None for what is not there. ``ending``: see torchvk.ops.epilogue."""

    a: int = 0
    b: int = 1
    bias: int | None = None
    residual: int | None = None
    ending: tuple[int, int] = (0, 0)


def product_variants(product: Product, slots: Slots, capabilities: Capabilities) -> Variants:
    """The chosen kernel first, then those that may be better: tiles of cooperative matrices, or register blocks."""
    if product.batches * product.m * product.n == 0:
        return NOTHING
    choices = _choices(product, capabilities)
    return tuple((_name(choice), product_kernels(product, slots, capabilities, choice)) for choice in choices)


def _choices(product: Product, capabilities: Capabilities) -> Iterable[Choice]:
    chosen = choose(product, capabilities)
    choices = {chosen: None}
    if capabilities.kind == "cpu":
        return choices
    if "_wide" in chosen.kernel:
        choices[replace(chosen, kernel=chosen.kernel.replace("_wide", ""), group=4)] = None
    choices.update(dict.fromkeys(fragment_choices(product, capabilities)))
    tiles = matrix_tiles(product, capabilities) if product.m > 1 else ()
    if tiles:
        for tile in plausible(tiles, product.m, product.n, product.batches):
            choices[_matrix_choice(tile)] = None
    if not chosen.matrix:
        choices.update(dict.fromkeys(_block_choices(product, capabilities)))
    return choices


def _block_choices(product: Product, capabilities: Capabilities) -> Iterator[Choice]:
    name = "f16" if product.dtype is DType.FLOAT16 else "f32"
    for block in blocked.plausible(BLOCKS[product.dtype], capabilities, product.m, product.n, product.batches):
        for splits in blocked.plausible_splits(block, capabilities, product.m, product.n, product.k, product.batches):
            if splits == 1 or name == "f32" or product.n % 2 == 0:
                yield _block_choice(block, name, splits)


def _name(choice: Choice) -> str:
    return choice.kernel if choice.splits == 1 else f"{choice.kernel}_split{choice.splits}"


def product_kernels(
    product: Product, slots: Slots, capabilities: Capabilities, choice: Choice | None = None
) -> Kernels:
    """Dispatches of a product."""
    count = product.batches * product.m * product.n
    if count == 0:
        return Kernels(())
    choice = choice or choose(product, capabilities)
    half = product.dtype is DType.FLOAT16
    # With odd N neighbouring rows share a word of halves: float32 first, then one pass that rounds.
    detour = half and product.n % 2 == 1
    out: Arg = scratch_write(0) if detour or choice.splits > 1 else write(0)
    if not (product.batch or product.transpose_a or detour) and choice.splits == 1:
        across = -(-product.n // choice.tile_n)
        whole = whole_rows(product.m, choice.tile_m, across) if choice.matrix or choice.block else product.m
        if whole != product.m and (kernels := _with_rest(product, slots, capabilities, choice, whole)):
            return kernels
    main = _dispatch(product, slots, choice, out, capabilities)
    if choice.splits > 1:
        bias, residual = main.buffers[2], main.buffers[4]
        total, size = blocked.split_sum(
            product.batches * product.m,
            product.n,
            choice.splits,
            (0 if slots.bias is None else 2 if half else 1, bias),
            slots.ending,
            residual,
            half,
            0,
            capabilities,
        )
        return Kernels((main, total), (size,))
    if not detour:
        return Kernels((main,))
    return Kernels((main, round_to_half(count, 0, capabilities)), (4 * count,))


def _with_rest(
    product: Product, slots: Slots, capabilities: Capabilities, choice: Choice, whole: int
) -> Kernels | None:
    """The first ``whole`` rows by the chosen kernel, and beside it the others by what is chosen for so few (with the
    weight in fragments, too, if that is how it is there)."""
    rest = replace(product, m=product.m - whole)
    few = fragment_choices(rest, capabilities)[0] if choice.fragments else None
    parts = (
        (whole, product_kernels(replace(product, m=whole), slots, capabilities, choice)),
        (rest.m, product_kernels(rest, slots, capabilities, few)),
    )
    size = product.dtype.bits // 8
    row_bytes = {("input", slots.a): product.k * size, ("output", 0): product.n * size}
    if slots.residual is not None:
        row_bytes["input", slots.residual] = product.n * size
    return stacked(Kernels(()), parts, row_bytes)


def _dispatch(product: Product, slots: Slots, choice: Choice, out: Arg, capabilities: Capabilities) -> Dispatch:
    """The product itself."""
    if choice.fragments is not None:
        operands = (slots.a, slots.b, slots.bias, slots.residual)
        of_product = (product.m, product.n, product.k, *choice.fragments)
        return fragment_dispatch(*of_product, operands, slots.ending, out, capabilities)
    tiles_n = -(-product.n // choice.tile_n)
    tiles = -(-product.m // choice.tile_m) * tiles_n
    half = product.dtype is DType.FLOAT16
    # The whole push block is one layout; dimensions that are not there are 0.
    sizes = (product.m, product.n, product.k, product.batches, tiles_n, tiles)
    push = struct.pack("<8I", *sizes, max(product.elements_a - 1, 0), max(product.elements_b - 1, 0))
    for values in (product.batch, product.strides_a, product.strides_b):
        push += struct.pack(f"<{MAX_BATCH_RANK}I", *values, *(0,) * (MAX_BATCH_RANK - len(values)))
    tail = product.k % choice.step != 0 or product.k == 0
    constants = (
        choice.local_size,
        product.transpose_a,
        product.transpose_b,
        product.contiguous_a % choice.group == 0,
        product.contiguous_b % choice.group == 0,
        slots.bias is not None,
        half and out.role == "output",
        len(product.batch),
        *slots.ending,
        *((product.k, half) if choice.matrix else (tail, choice.splits)),
    )
    count = product.batches * product.m * product.n
    return Dispatch(
        kernel=choice.kernel,
        # Every binding needs a buffer: B stands in for what is not there, and is not read.
        buffers=(
            read(slots.a, texels=choice.texels),
            read(slots.b, texels=choice.texels),
            read(slots.b if slots.bias is None else slots.bias),
            out,
            read(slots.b if slots.residual is None else slots.residual),
        ),
        groups=(
            *grid(tiles * choice.splits, capabilities, 1)[:2],
            min(product.batches, capabilities.max_workgroup_count[2]),
        ),
        constants=constants,
        push=push,
        bytes=(product.elements_a + product.elements_b + count) * product.dtype.bits // 8,
        flops=2 * count * product.k,
    )


def _distinct(batch: Sequence[int], strides: Sequence[int]) -> int:
    """Matrices that a broadcast operand really has."""
    return math.prod(size for size, stride in zip(batch, strides, strict=True) if stride)
