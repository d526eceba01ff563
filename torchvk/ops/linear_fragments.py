"""``linear`` in float16 whose weight is a constant: packed to fragments, so that only x passes through shared memory.

The kernels are those of quantized_linear_fragments.slang, with weights of 16 bits and no scales.
"""

from __future__ import annotations

import struct

import numpy as np

from torchvk.ops.fragments import UNIT, Fragment
from torchvk.ops.matrix import Tile, tiles_of
from torchvk.ops.matrix_half import HALF_FRAGMENT_TILES
from torchvk.ops.operator import Arg, Array, Capabilities, Dispatch, Layout, grid, read
from torchvk.ops.storing import NOTHING

BITS = 16


def fragment_tiles(k: int, capabilities: Capabilities) -> tuple[tuple[Tile, Fragment], ...]:
    """The tiles that a device can run for rows of k columns, in the order of preference."""
    if k % UNIT:
        return ()
    return tuple(
        (tile, fragment)
        for tile in tiles_of(HALF_FRAGMENT_TILES, capabilities, "float16", "float32", both=False)
        for fragment in capabilities.fragments
        if fragment.suits(tile, "float16")
    )


def fragment_kernel(tile: Tile) -> str:
    return f"quantized_fragments_{tile.name}"


def fragment_layout(k: int, fragment: Fragment) -> Layout:
    def pack(weight: Array) -> Array:
        return fragment.pack_weight(np.ascontiguousarray(weight), BITS)

    return Layout(f"linear_fragments_{fragment.digest}_{k}", pack)


def fragment_dispatch(
    m: int,
    n: int,
    k: int,
    tile: Tile,
    fragment: Fragment,
    slots: tuple[int, int, int | None, int | None],
    ending: tuple[int, int],
    out: Arg,
    capabilities: Capabilities,
) -> Dispatch:
    """The product. ``slots``: the node's inputs x, weight, bias and residual."""
    x, b, bias, residual = slots
    tiles_n = -(-n // tile.n)
    tiles = tiles_n * -(-m // tile.m)
    weights, units = read(b, fragment_layout(k, fragment)), k // UNIT
    half_output, half, whole_groups = out.role == "output", True, True
    # As in quantized_linear.slang; neither activations nor groups, and no slots of scales.
    shared = (tile.threads, BITS, False, False, 0 if bias is None else 2, half_output, *ending)
    return Dispatch(
        kernel=fragment_kernel(tile),
        # Every binding needs a buffer: the weights stand in for what is not there, and is not read.
        buffers=(
            read(x),
            weights,
            weights,
            weights if bias is None else read(bias),
            out,
            weights if residual is None else read(residual),
        ),
        groups=grid(tiles, capabilities, 1),
        constants=(*shared, half, half, units, units, whole_groups, 0, 0, 1),
        push=struct.pack("<7I", m, n, units, 1, units, tiles_n, tiles) + NOTHING,
        bytes=2 * (m * k + n * k + m * n),
        flops=2 * m * n * k,
    )
