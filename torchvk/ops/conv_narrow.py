"""Convolutions in groups of few channels (shaders/conv_narrow.slang): which, and how they are cut."""

from __future__ import annotations

from torchvk.ops.convolution import Geometry
from torchvk.ops.operator import Capabilities, grid

COLUMNS, TAPS = 8, 5  # of a row that the kernel loads at once; that a kernel's row may have
MAX_CHANNELS = 12  # of x a group: with 16 register blocks are faster, on an H200


def takes_narrow(geometry: Geometry) -> bool:
    g = geometry
    fours = g.group_channels % 4 == 0 and g.group_outputs % 4 == 0
    plain = g.flat and set(g.up) == {1} and g.dilation[2] == 1 and g.stride[2] <= 2 and g.kernel[2] <= TAPS
    return g.groups > 1 and fours and plain and g.group_channels <= MAX_CHANNELS


def narrow_work(geometry: Geometry, capabilities: Capabilities) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Strips of pixels of a row of y, and all of them; workgroup counts."""
    g = geometry
    across = -(-g.output[2] // ((COLUMNS - g.kernel[2]) // g.stride[2] + 1))
    strips = g.images * g.output[1] * across
    return (across, strips), grid(-(-strips // 4) * 4 * (g.outputs // 4), capabilities)


def narrow_constants(geometry: Geometry) -> tuple[int, int]:
    """Specialization constants from 10 on."""
    return geometry.kernel[2], geometry.group_channels // 4
