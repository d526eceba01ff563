"""Convolutions on cooperative matrices (shaders/conv_matrix.slang): what tiles there are, and for which cases.

Rows of 16 bytes of the product must lie in one tap of the kernel, and whole words of results in one group.
"""

from __future__ import annotations

from torchvk.ops.convolution import Geometry
from torchvk.ops.matrix import Tile, candidates, tiles_of
from torchvk.ops.operator import Capabilities

# In the order of preference. Those of 32 lanes are for NVIDIA's GPUs, of 8 for lavapipe; others follow from these. On
# an H200, 32 images of 56 x 56 x 64 and 14 x 14 x 256, 3 x 3: 64x64 65 and 71 us (8 bits 40 and 40), with steps 4 ahead
# 72 and 76 (48 and 43); 128x128 94 and 50 (65 and 29).
HALF = (
    Tile((16, 16, 16), 32, 128, 128, 32, (2, 4, 1), ahead=2),
    Tile((16, 16, 16), 32, 64, 64, 32, (2, 2, 1)),
    Tile((16, 16, 16), 64, 64, 64, 32, (2, 2, 1), ahead=2),
    Tile((8, 16, 16), 16, 64, 64, 32, (2, 2, 1), ahead=2),
    Tile((8, 8, 8), 8, 32, 32, 32, (2, 2, 1)),
)
INTEGER = (
    Tile((16, 16, 32), 32, 128, 128, 64, (2, 4, 1), ahead=2),
    Tile((16, 16, 32), 32, 64, 64, 64, (2, 2, 1)),
    Tile((16, 16, 16), 64, 64, 64, 64, (2, 2, 1), ahead=2),
    Tile((8, 16, 32), 32, 64, 64, 64, (2, 2, 1), ahead=2),
    Tile((8, 8, 8), 8, 32, 32, 64, (2, 2, 1), ahead=2),
)


def matrix_tiles(geometry: Geometry, integer: bool, capabilities: Capabilities) -> list[Tile]:
    """Tiles that may compute it, the best first."""
    g = geometry
    if g.depthwise or not g.flat or g.group_channels % (16 if integer else 8) or g.group_outputs % 4:
        return []
    if set(g.up) != {1}:
        return []
    kinds = ("int8", "int32") if integer else ("float16", "float32")
    tiles = tiles_of(INTEGER if integer else HALF, capabilities, *kinds)
    return candidates(tiles, g.pixels, g.group_outputs, g.groups)


def matrix_constants(geometry: Geometry) -> tuple[int, int, int]:
    """Specialization constants 10 to 12 of conv_matrix.slang."""
    return geometry.k, geometry.group_channels, geometry.kernel[2]
