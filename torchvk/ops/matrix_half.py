"""Tiles of the products on float16 cooperative matrices, in the order of preference (that of 32 lanes was measured on
an NVIDIA H200; no other was at hand)."""

from __future__ import annotations

from torchvk.ops.matrix import Tile

_16 = ((16, 16, 16), 32)
_AMD = ((16, 16, 16), 64)
_INTEL = ((8, 16, 16), 16)
_OLDER_INTEL = ((8, 8, 16), 8)
_8 = ((8, 8, 8), 8)

# Both operands pass through shared memory: linear_matrix.slang, quantized_linear_matrix.slang.
TILES = (
    Tile(*_16, 128, 128, 32, (2, 4, 1)),
    Tile(*_16, 128, 128, 32, (2, 2, 1)),
    Tile(*_16, 64, 64, 64, (2, 2, 1)),
    Tile(*_16, 32, 64, 64, (1, 1, 4)),
    Tile(*_16, 32, 32, 128, (1, 1, 4)),
    Tile(*_AMD, 128, 128, 32, (2, 2, 1)),
    Tile(*_AMD, 64, 64, 64, (2, 2, 1)),
    Tile(*_AMD, 32, 32, 64, (1, 1, 4)),
    Tile(*_INTEL, 64, 128, 32, (2, 2, 1)),
    Tile(*_INTEL, 32, 64, 64, (1, 2, 2)),
    Tile(*_OLDER_INTEL, 64, 64, 32, (2, 2, 1)),
    Tile(*_OLDER_INTEL, 32, 32, 64, (1, 2, 2)),
    Tile(*_8, 32, 32, 32, (2, 2, 1)),
    Tile(*_8, 16, 32, 32, (1, 2, 2)),
)
# Only x does: quantized_linear_fragments.slang. Channels are the rows of its matrices.
FRAGMENT_TILES = (
    Tile(*_16, 64, 128, 64, (1, 2, 2)),
    Tile(*_16, 128, 128, 32, (2, 4, 1)),
    Tile(*_16, 128, 128, 64, (2, 2, 2)),
    Tile(*_16, 64, 128, 32, (1, 2, 1)),
    Tile(*_16, 32, 64, 128, (1, 1, 4)),
    Tile(*_16, 32, 32, 128, (1, 1, 4)),
    Tile(*_8, 32, 32, 32, (2, 2, 1)),
    Tile(*_8, 16, 32, 64, (1, 2, 2)),
)
