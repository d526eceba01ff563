"""``quantized_linear`` with quantized activations on 8-bit matrix units: the tiles that a device can run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from torchvk.ops import matrix
from torchvk.ops.fragments import Fragment
from torchvk.ops.matrix import Tile
from torchvk.ops.operator import Array, Capabilities, Layout

if TYPE_CHECKING:
    from torchvk.ops.quantized_packing import Packing

UNIT = 32
FEW_ROWS = 16  # which other kernels multiply
MULTIPROCESSORS = 128  # of a large GPU; Vulkan does not say


@dataclass(frozen=True)
class Tiles:
    """How a workgroup of quantized_linear_matrix_integer.slang computes its results; see there for the words.

    step_time, other_time: microseconds that a multiprocessor takes for a step, and all else, as fitted to times on an
    H200; what counts is how tiles compare.
    """

    shape: tuple[int, int, int]  # of a cooperative matrix: m, n, k
    lanes: int  # of a subgroup
    subgroups: tuple[int, int]
    split: int
    frags: tuple[int, int]
    step: int  # units
    depth: tuple[int, int]  # steps on their way from memory: with groups, with one scale a channel
    step_time: float
    other_time: float

    @property
    def tile_m(self) -> int:
        return self.subgroups[0] * self.frags[0] * self.shape[0]

    @property
    def tile_n(self) -> int:
        return self.subgroups[1] * self.frags[1] * self.shape[1]

    @property
    def threads(self) -> int:
        return self.lanes * self.subgroups[0] * self.subgroups[1] * self.split

    @property
    def shared_memory(self) -> int:
        """Bytes, at most (with groups)."""
        pitch = (2 * self.step + 1) * 16
        buffers = 2 * (self.tile_m + self.tile_n) * pitch
        strip = self.split * self.subgroups[0] * self.shape[0] * (self.tile_n * 4 + 16)
        return max(buffers, strip) + 24 * self.step * self.tile_n + 12 * self.tile_m

    @property
    def name(self) -> str:
        """Tile, subgroups, and columns of a step."""
        m, n = self.subgroups
        return f"{self.tile_m}x{self.tile_n}_{m}x{n}x{self.split}_{UNIT * self.step}"

    def kernel(self, one_group: bool) -> str:
        shape = "x".join(map(str, self.shape))
        return f"quantized_matrix_integer_{shape}_{self.name}{'_one' if one_group else ''}"

    def directive(self, one_group: bool) -> str:
        """The line of the shader that makes this kernel."""
        values = {
            **dict(zip(("SHAPE_M", "SHAPE_N", "SHAPE_K"), self.shape, strict=True)),
            "LANES": self.lanes,
            "SUBGROUPS_M": self.subgroups[0],
            "SUBGROUPS_N": self.subgroups[1],
            "SPLIT": self.split,
            "FRAGS_M": self.frags[0],
            "FRAGS_N": self.frags[1],
            "STEP": self.step,
            "DEPTH": self.depth[one_group],
            "ONE": int(one_group),
        }
        options = " ".join(f"-D{name}={value}" for name, value in values.items())
        return f"//@kernel {self.kernel(one_group)} entry=product -capability spvCooperativeMatrixKHR {options}"


NVIDIA, AMD, INTEL, LAVAPIPE = (16, 16, 32), (16, 16, 16), (8, 16, 32), (8, 8, 8)
# Of these, NVIDIA's and lavapipe's have been run.
TILES = (
    Tiles(NVIDIA, 32, (2, 4), 1, (4, 2), 2, (2, 1), 1.34, 6),
    Tiles(NVIDIA, 32, (2, 2), 1, (2, 2), 2, (2, 2), 0.57, 6),
    Tiles(NVIDIA, 32, (2, 1), 4, (1, 2), 4, (3, 3), 0.45, 3),
    Tiles(AMD, 64, (2, 2), 1, (2, 2), 2, (1, 1), 0.57, 6),
    Tiles(INTEL, 32, (2, 2), 1, (4, 2), 2, (1, 1), 0.57, 6),
    Tiles(LAVAPIPE, 8, (2, 2), 1, (2, 2), 2, (2, 1), 0.57, 6),
    Tiles(LAVAPIPE, 8, (1, 2), 2, (2, 2), 2, (3, 2), 0.45, 3),
)


# Of the kernels whose weights come packed to fragments, with one scale an output channel. On an H200, N = K = 4096,
# int8 weights, µs (and with both operands through shared memory): M = 32 19.6 (25.6), 64 22 (27), 128 27 (40),
# 512 55 (56), 2048 172 (196).
_16 = (NVIDIA, 32)
_8 = (LAVAPIPE, 8)
FRAGMENT_TILES = (
    Tile(*_16, 64, 128, 64, (1, 4, 1)),
    Tile(*_16, 32, 64, 256, (1, 1, 4), least=128),
    Tile(*_16, 32, 32, 128, (1, 1, 4), ahead=3),
    Tile(*_8, 32, 32, 64, (2, 2, 1)),
    Tile(*_8, 16, 32, 64, (1, 2, 2), ahead=3),
)


def fragment_kernel(tile: Tile) -> str:
    return f"quantized_fragments_integer_{tile.name}"


def fragment_candidates(m: int, packing: Packing, capabilities: Capabilities) -> list[tuple[Tile, Fragment]]:
    """Tiles for m rows whose weights come in fragments; the default first."""
    if capabilities.tier < 2 or packing.groups > 1:
        return []
    shapes = capabilities.matrix_shapes("int8", "int32")
    fragments = {
        tile: fragment
        for tile in FRAGMENT_TILES
        for fragment in capabilities.fragments
        if fragment.suits(tile, "int8")
        and fragment.complete
        and tile.shape in shapes
        and tile.lanes == capabilities.subgroup_size
        and tile.threads <= min(capabilities.max_workgroup_invocations, capabilities.max_workgroup_size[0])
        and fragment_memory(tile) <= capabilities.shared_memory
    }
    return [(tile, fragments[tile]) for tile in matrix.candidates(list(fragments), m, packing.n)]


def fragment_memory(tile: Tile) -> int:
    """Bytes of shared memory."""
    rows, _, split = tile.subgroups
    strip = split * rows * tile.shape[1] * (4 * tile.n + 16)
    return max(2 * tile.m * (tile.depth + 16), strip) + 8 * tile.m


def _runs(tiles: Tiles, capabilities: Capabilities) -> bool:
    return (
        capabilities.subgroup_size == tiles.lanes
        and tiles.shape in capabilities.matrix_shapes("int8", "int32")
        and tiles.threads <= min(capabilities.max_workgroup_invocations, capabilities.max_workgroup_size[0])
        and tiles.shared_memory <= capabilities.shared_memory
    )


def candidates(m: int, packing: Packing, capabilities: Capabilities) -> list[Tiles]:
    """Tiles for m rows; the default first."""
    if capabilities.tier < 2 or packing.half_groups or m <= FEW_ROWS:
        return []
    fitting = [tiles for tiles in TILES if _runs(tiles, capabilities)]
    return sorted(fitting, key=lambda tiles: _cost(tiles, m, packing))


def _cost(tiles: Tiles, m: int, packing: Packing) -> float:
    """An estimate of microseconds, for a device of MULTIPROCESSORS."""
    count = -(-m // tiles.tile_m) * -(-packing.n // tiles.tile_n)
    return tiles.other_time + -(-packing.units // tiles.step) * -(-count // MULTIPROCESSORS) * tiles.step_time


def weight_sums(packing: Packing) -> Layout:
    """Σ_k w[n, k], for one group a row."""

    def pack(weight: Array) -> Array:
        sums: Array = weight.sum(axis=1, dtype=np.int32)
        return sums

    return Layout(f"quantized_weight_sums_{packing.n}_{packing.k}", pack)
