"""Tiles of the matrix products on cooperative matrices (tier 2): what kernels there are, and which a case may use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchvk.graph import DType
from torchvk.ops.operator import Capabilities

# Workgroups that keep a large GPU busy: below that, smaller tiles are better. (The H200 has 132 multiprocessors.)
BUSY = 96


@dataclass(frozen=True, slots=True)
class Tile:
    """A kernel's tile: the cooperative matrix's shape, lanes of a subgroup, results and columns a step of a
    workgroup, its subgroups (rows × columns × split over k), how many steps ahead operands are loaded, and the
    workgroups below which smaller tiles are better."""

    shape: tuple[int, int, int]
    lanes: int
    m: int
    n: int
    depth: int
    subgroups: tuple[int, int, int]
    ahead: int = 1
    least: int = BUSY

    @property
    def threads(self) -> int:
        rows, columns, split = self.subgroups
        return self.lanes * rows * columns * split

    @property
    def name(self) -> str:
        """As in the kernel's name and in a variant's."""
        rows, columns, split = self.subgroups
        shape = "x".join(map(str, (*self.shape, self.lanes)))
        return f"{shape}_{self.m}x{self.n}x{self.depth}_{rows}x{columns}x{split}_{self.ahead}"

    def shared(self, per_word: int, both: bool = True) -> int:
        """Bytes of shared memory, with ``per_word`` elements in 16 bytes (see matrix.slang); ``both``: of the operands
        pass through it, otherwise only the rows of x do."""
        words = self.m * (self.depth // per_word + 1)
        if both:
            words = sum(
                max(rows * (self.depth // per_word + 1), self.depth * (rows // per_word + 1))
                for rows in (self.m, self.n)
            )
        rows, _, split = self.subgroups
        return 16 * max(2 * words, split * rows * self.shape[0] * (self.n // 4 + 1))

    def count(self, m: int, n: int) -> int:
        """Workgroups for m × n results."""
        return -(-m // self.m) * -(-n // self.n)

    def defines(self) -> dict[str, int]:
        """The macros of matrix.slang."""
        rows, columns, split = self.subgroups
        return {
            "SHAPE_M": self.shape[0],
            "SHAPE_N": self.shape[1],
            "SHAPE_K": self.shape[2],
            "LANES": self.lanes,
            "SUBGROUPS_M": rows,
            "SUBGROUPS_N": columns,
            "SPLIT": split,
            "FRAGS_M": self.m // rows // self.shape[0],
            "FRAGS_N": self.n // columns // self.shape[1],
            "DEPTH": self.depth,
            "AHEAD": self.ahead,
        }

    def weights_first(self) -> dict[str, int]:
        """The same where weights are the first matrix (quantized_linear_fragments): the tile's columns are its rows."""
        rows, columns, _ = self.subgroups
        frags = {"FRAGS_M": self.m // rows // self.shape[1], "FRAGS_N": self.n // columns // self.shape[0]}
        # Words that a lane has of 32 columns of int4: two or four.
        return {**self.defines(), **frags, "UNIT_WORDS_2": int(self.shape[0] * 32 // self.lanes == 16)}


def tiles_of(
    tiles: Sequence[Tile], capabilities: Capabilities, element: str, accumulator: str, both: bool = True
) -> tuple[Tile, ...]:
    """Those of ``tiles`` that the device can run, in order. ``both``: see Tile.shared."""
    if capabilities.tier < 2:
        return ()
    shapes = capabilities.matrix_shapes(element, accumulator)
    per_word = 16 // DType(element).numpy.itemsize
    return tuple(
        tile
        for tile in tiles
        if tile.shape in shapes
        and tile.lanes == capabilities.subgroup_size
        and tile.threads <= capabilities.max_workgroup_invocations
        and tile.shared(per_word, both) <= capabilities.shared_memory
    )


def pick(tiles: Sequence[Tile], m: int, n: int, batches: int = 1) -> Tile:
    """The first (tiles stand in the order of preference, large ones first) that gives enough workgroups without
    much of it lying beyond the results; else the one with the most workgroups."""
    for tile in tiles:
        count = tile.count(m, n) * batches
        if count >= tile.least and count * tile.m * tile.n <= 1.5 * m * n * batches:
            return tile
    return max(tiles, key=lambda tile: tile.count(m, n))


def plausible(tiles: Sequence[Tile], m: int, n: int, batches: int = 1) -> list[Tile]:
    """Tiles that a measurement may prefer to the picked one: at most twice the results in vain, and neither far too
    few workgroups nor far too many."""
    least = min(tile.count(m, n) * tile.m * tile.n for tile in tiles)
    most = max(tile.count(m, n) * batches for tile in tiles)
    return [
        tile
        for tile in tiles
        if tile.count(m, n) * tile.m * tile.n <= 2 * least
        and min(BUSY, most) / 2 <= tile.count(m, n) * batches <= 32 * BUSY
    ]


def candidates(tiles: Sequence[Tile], m: int, n: int, batches: int = 1) -> list[Tile]:
    """The picked tile and then the plausible ones; none if there are no tiles."""
    if not tiles:
        return []
    picked = pick(tiles, m, n, batches)
    return [picked, *(tile for tile in plausible(tiles, m, n, batches) if tile != picked)]
