"""Tiles of the products on float16 cooperative matrices, in the order of preference.

Those of 32 lanes were measured on an NVIDIA H200 (N = K = 4096, float16 x, TFLOP/s at M = 512 / 2048): both operands
through shared memory 128x128 188 / 193, 64x64 122 / 126; int4 weights in fragments 64x128 266 / 268 (two steps of 64
instead of four of 32 ahead: 257 / 259), 128x128 173 / 278. Small tiles that split k are for small products, whose time
is latency. Tiles of other devices follow from these; none was at hand.
"""

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
    Tile(*_16, 64, 64, 32, (2, 2, 1), ahead=4),
    Tile(*_16, 32, 64, 64, (1, 1, 4)),
    Tile(*_16, 32, 32, 128, (1, 1, 4)),
    Tile(*_16, 32, 32, 128, (1, 1, 4), ahead=2),
    Tile(*_AMD, 128, 128, 32, (2, 2, 1)),
    Tile(*_AMD, 64, 64, 64, (2, 2, 1)),
    Tile(*_AMD, 32, 32, 64, (1, 1, 4)),
    Tile(*_INTEL, 64, 128, 32, (2, 2, 1)),
    Tile(*_INTEL, 32, 64, 64, (1, 2, 2)),
    Tile(*_OLDER_INTEL, 64, 64, 32, (2, 2, 1)),
    Tile(*_OLDER_INTEL, 32, 32, 64, (1, 2, 2)),
    Tile(*_8, 32, 32, 32, (2, 2, 1)),
    Tile(*_8, 16, 32, 32, (1, 2, 2), ahead=2),
)
# Only x does, weights are float16 in fragments: quantized_linear_fragments.slang. On an H200, N = K = 4096, µs (and
# with both operands through shared memory): M = 32 20.5 (24.6), 128 31 (56), 512 71 (91), 2048 258 (354).
HALF_FRAGMENT_TILES = (
    Tile(*_16, 128, 128, 32, (2, 2, 1), least=384),
    Tile(*_16, 64, 128, 64, (1, 2, 2)),
    Tile(*_16, 32, 64, 128, (1, 1, 4), least=128),
    Tile(*_16, 32, 32, 128, (1, 1, 4), ahead=2),
    Tile(*_16, 32, 32, 128, (1, 1, 4)),
    Tile(*_8, 32, 32, 32, (2, 2, 1), ahead=3),
    Tile(*_8, 16, 32, 64, (1, 2, 2)),
)
# Only x does: quantized_linear_fragments.slang. Channels are the rows of its matrices.
FRAGMENT_TILES = (
    Tile(*_16, 64, 128, 32, (1, 4, 1), ahead=4),
    Tile(*_16, 128, 128, 32, (2, 4, 1)),
    Tile(*_16, 64, 128, 64, (1, 2, 2)),
    Tile(*_16, 128, 128, 64, (2, 4, 1), ahead=2),
    Tile(*_16, 32, 64, 128, (1, 1, 4)),
    Tile(*_16, 32, 32, 128, (1, 1, 4)),
    Tile(*_16, 32, 32, 128, (1, 1, 4), ahead=2),
    Tile(*_8, 32, 32, 32, (2, 2, 1), ahead=3),
    Tile(*_8, 16, 32, 64, (1, 2, 2)),
)
