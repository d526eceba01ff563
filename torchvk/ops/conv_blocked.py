"""Convolutions by register blocks (shaders/conv_blocked.slang): what tiles there are, and for which cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torchvk.graph import DType
from torchvk.ops.blocked import Block, enough, pick
from torchvk.ops.convolution import Geometry
from torchvk.ops.operator import Capabilities, grid

WORDS = 8  # of a step: of 4 bytes each, or floating-point numbers
# From large to small. In shared memory each word of all pixels begins 16 bytes behind the last one's end.
BLOCKS = (
    Block("64x64", 64, 64, 128, WORDS, beside=256),
    Block("128x32", 128, 32, 128, WORDS, beside=256),
    Block("32x32", 32, 32, 64, WORDS, beside=256),
)


@dataclass(frozen=True)
class Blocked:
    """A tile for a convolution; ``geometry`` is its own with so many groups together taken for one."""

    block: Block
    geometry: Geometry
    together: int

    @property
    def work(self) -> tuple[int, int]:
        """The tiles of a row of tiles of a group, and all of them."""
        return self.geometry.tiles(self.block.m, self.block.n)

    def fills(self, capabilities: Capabilities) -> bool:
        """Whether there are tiles enough to keep a GPU busy until the last ones end."""
        return self.work[1] >= 3 * enough(capabilities)

    def groups(self, capabilities: Capabilities) -> tuple[int, int, int]:
        return grid(self.work[1], capabilities, 1)

    @property
    def constants(self) -> tuple[int, ...]:
        """Specialization constants from 10 on."""
        g = self.geometry
        flat = g.flat and set(g.up) == {1}
        return (g.k, g.group_channels, *g.kernel[:0:-1], self.together, flat)


def blocked(geometry: Geometry, x: DType, y: DType, capabilities: Capabilities) -> list[Blocked]:
    """Tiles that may compute it, the best first. Words of x lie in one tap, words of y in one group."""
    g = geometry
    per_word = 32 // x.bits
    whole = y is DType.FLOAT32 or g.group_outputs % 4 == 0
    if g.depthwise or capabilities.kind == "cpu" or g.group_channels % per_word or not whole:
        return []
    together = _together(g, WORDS * (4 if x.bits == 8 else 1))
    merged = replace(g, groups=g.groups // together)
    fitting = [block for block in BLOCKS if block.fits(capabilities)]
    wide = [block for block in fitting if block.n >= merged.group_outputs]
    return _best(wide, merged, together, capabilities) if together > 1 and wide else _best(fitting, g, 1, capabilities)


def _together(g: Geometry, step: int) -> int:
    """How many groups have a step's channels of x together; 1 where they do not come out even."""
    count = step // g.group_channels
    even = count * g.group_channels == step and g.groups % max(count, 1) == 0
    return count if count > 1 and even and g.group_outputs % 4 == 0 else 1


def _best(blocks: Sequence[Block], g: Geometry, together: int, capabilities: Capabilities) -> list[Blocked]:
    """Those that do not lie outside of the result for the most part, the largest that keeps a GPU busy first."""
    if not blocks:
        return []
    sizes = (g.pixels, g.group_outputs, g.groups)
    areas = {block: block.tiles(*sizes) * block.m * block.n for block in blocks}
    blocks = [block for block in blocks if 4 * areas[block] <= 5 * min(areas.values())]
    first = pick(blocks, capabilities, *sizes)
    return [Blocked(block, g, together) for block in (first, *(block for block in blocks if block != first))]
