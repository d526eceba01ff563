"""Tiles of the register-blocked matrix products (shaders/gemm_blocked.slang): which there are, and which to take."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from torchvk.ops.operator import Arg, Capabilities, Dispatch, grid, scratch_read, write


@dataclass(frozen=True)
class Block:
    """A workgroup of ``threads`` computes m × n results in steps of ``step`` k, of which each of ``slices`` groups of
    threads takes a part. ``name`` ends the kernels' names."""

    name: str
    m: int
    n: int
    threads: int
    step: int
    slices: int = 1
    beside: int = 0  # more bytes of shared memory: the integer kernels' scales and sums of both operands

    @property
    def shared(self) -> int:
        """Bytes of shared memory: two steps of both operands, or the slices' results."""
        results = self.slices * self.m * self.n if self.slices > 1 else 0
        return 4 * max(2 * self.step * (self.m + self.n), results) + self.beside

    def tiles(self, m: int, n: int, batches: int) -> int:
        return -(-m // self.m) * -(-n // self.n) * batches

    def fits(self, capabilities: Capabilities) -> bool:
        return (
            self.threads <= min(capabilities.max_workgroup_invocations, capabilities.max_workgroup_size[0])
            and self.shared <= capabilities.shared_memory
        )


SPLITS = (2, 4, 8)
# From large to small.
FLOAT = (
    Block("64x128", 64, 128, 128, 16),
    Block("64x64", 64, 64, 128, 16),
    Block("32x32x4", 32, 32, 256, 32, 4),
    Block("32x32x2", 32, 32, 128, 32, 2),
)
INTEGER = (
    Block("128x64", 128, 64, 256, 8, beside=4096),
    Block("64x64", 64, 64, 128, 8, beside=3072),
    Block("32x32", 32, 32, 64, 8, beside=1536),
)
HALF = tuple(block for block in FLOAT if block.name in ("64x128", "64x64", "32x32x4"))
# Weights that are quantized, with activations in float32 and in float16.
WEIGHTS = HALF
WEIGHTS_HALF = HALF


def pick(blocks: Sequence[Block], capabilities: Capabilities, m: int, n: int, batches: int = 1) -> Block:
    """The largest tile of which there are enough to fill a GPU; else the smallest."""
    fitting = [block for block in blocks if block.fits(capabilities)]
    for block in fitting:
        if block.tiles(m, n, batches) >= enough(capabilities):
            return block
    return min(fitting, key=lambda block: block.m * block.n)


def plausible(
    blocks: Sequence[Block], capabilities: Capabilities, m: int, n: int, batches: int = 1
) -> tuple[Block, ...]:
    """The tiles that may be the fastest: not those that lie half outside the product."""
    fitting = [block for block in blocks if block.fits(capabilities)]
    areas = [block.tiles(m, n, batches) * block.m * block.n for block in fitting]
    return tuple(block for block, area in zip(fitting, areas, strict=True) if area <= 2 * min(areas))


def pick_splits(block: Block, capabilities: Capabilities, m: int, n: int, k: int, batches: int = 1) -> int:
    """How many workgroups share the k of a tile: more than one where tiles are few and k is long, so that the second
    dispatch, which adds their parts, is worth it."""
    tiles, wanted = block.tiles(m, n, batches), enough(capabilities)
    if tiles >= 2 * wanted:
        return 1
    return max([s for s in SPLITS if tiles * s <= 6 * wanted and k >= max(768, 192 * s)], default=1)


def plausible_splits(block: Block, capabilities: Capabilities, m: int, n: int, k: int, batches: int = 1) -> list[int]:
    """1, and those that give a GPU work enough and not too many parts to add."""
    tiles, wanted = block.tiles(m, n, batches), enough(capabilities)
    return [1, *(s for s in SPLITS if wanted <= tiles * s <= 6 * wanted and k >= 4 * s * block.step)]


def enough(capabilities: Capabilities) -> int:
    """Workgroups that keep a GPU busy. Vulkan does not tell how many it has room for."""
    return 96 if capabilities.kind == "discrete" else 24


def split_sum(
    rows: int,
    n: int,
    splits: int,
    bias: tuple[int, Arg],
    ending: tuple[int, int],
    residual: Arg,
    half: bool,
    scratch: int,
    capabilities: Capabilities,
) -> tuple[Dispatch, int]:
    """The dispatch that adds the parts [splits, rows, n] in scratch ``scratch``, and the size of those in bytes.

    ``bias``: 0 none, 1 float32 or 2 float16, and the argument that holds it; ``ending``: torchvk.ops.epilogue.
    """
    pieces = -(-n // 4)
    size = 16 * splits * rows * pieces
    dispatch = Dispatch(
        "split_sum",
        (scratch_read(scratch), bias[1], residual, write(0)),
        grid(rows * pieces, capabilities),
        (capabilities.local_size, splits, bias[0], half, *ending),
        struct.pack("<2I", rows, n),
        bytes=size + rows * n * (2 if half else 4),
        flops=splits * rows * n,
    )
    return dispatch, size
