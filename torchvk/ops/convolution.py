"""What the convolutions share: their geometry, and the reference.

x [N, *spatial, C], y [N, *spatial, O]; one to three spatial dimensions, which kernels see as three. The weight is
[O, *kernel, C / groups], or [*kernel, O] where each channel of x is a group of its own (depthwise): then neighbouring
channels lie side by side in all operands.

x may be dilated: input_dilation - 1 zeros lie between its pixels. A transposed convolution is one over a dilated x,
with stride 1, the kernel flipped, and padding dilation · (kernel - 1) - p, which may be negative: then it cuts off.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.ops.operator import Array, expect

MAX_ELEMENTS = 1 << 31  # kernels count elements in 32 bits
MAX_STEP = (1 << 16) - 1  # stride and input dilation share a word
# lavapipe ends loops, silently, after 65535 iterations of all loops of a workgroup together. The kernel for all
# convolutions goes over taps and channels, for up to two results (four where they are 8 bits of floats: fewer then).
MAX_K = 30_000
MAX_K_OF_FLOATS_TO_BYTES = 15_000
DOT_COLUMNS = 8  # of x, for which quantized_conv_depthwise.slang computes a strip of pixels
DOT_TAPS = 128  # of products of 9 bits by 8 the sum stays below 2^22
MAX_TAPS = 1024  # of a depthwise convolution: sums of 8-bit products are exact in float32


class Sliding(Protocol):
    """The attributes that say how a kernel slides over x: a number a spatial dimension, two for the padding (before
    and after the first, before and after the second, …)."""

    @property
    def stride(self) -> list[int]: ...
    @property
    def padding(self) -> list[int]: ...
    @property
    def dilation(self) -> list[int]: ...
    @property
    def input_dilation(self) -> list[int]: ...
    @property
    def groups(self) -> int: ...


def output_size(size: int, kernel: int, stride: int, before: int, after: int, dilation: int, up: int) -> int:
    """Pixels of y along a dimension; may be negative where the kernel does not fit."""
    return ((size - 1) * up + before + after - dilation * (kernel - 1)) // stride + 1


def is_depthwise(attributes: Sliding, x: TensorType) -> bool:
    return attributes.groups > 1 and attributes.groups == x.shape[-1]


def output_shape(name: str, attributes: Sliding, x: TensorType, weight: TensorType) -> tuple[int, ...]:
    """The shape of y; raises OperatorError in words where the operands do not fit."""
    rank = len(attributes.stride)
    expect(1 <= rank <= 3, f"{name} takes 1 to 3 spatial dimensions, got {rank} strides")
    lists = (attributes.padding[::2], attributes.padding[1::2], attributes.dilation, attributes.input_dilation)
    expect(all(len(each) == rank for each in lists), f"{name}: strides, paddings and dilations differ in number")
    expect(len(x.shape) == rank + 2, f"{name} of rank {rank} takes x [N, {rank} spatial dimensions, C], got {x}")
    steps = (*attributes.stride, *attributes.dilation, *attributes.input_dilation)
    expect(all(step >= 1 for step in steps), f"{name}: strides and dilations must be 1 or more, got {steps}")
    groups, channels = attributes.groups, x.shape[-1]
    expect(groups >= 1 and channels % groups == 0, f"{name}: {groups} groups do not divide the {channels} channels")
    deep = is_depthwise(attributes, x)
    expected = rank + (1 if deep else 2)
    form = "[*kernel, O]" if deep else f"[O, *kernel, {channels // groups}]"
    expect(len(weight.shape) == expected, f"{name} takes a weight {form}, got {weight}")
    kernel = weight.shape[:-1] if deep else weight.shape[1:-1]
    outputs = weight.shape[-1] if deep else weight.shape[0]
    expect(deep or weight.shape[-1] == channels // groups, f"{name} of {x} takes a weight {form}, got {weight}")
    expect(outputs % groups == 0, f"{name}: {groups} groups do not divide the {outputs} channels of the result")
    expect(channels > 0 and outputs > 0 and min(kernel) > 0, f"{name}: {x} or the weight {weight} is empty")
    spatial = tuple(output_size(*sizes) for sizes in zip(x.shape[1:-1], kernel, attributes.stride, *lists, strict=True))
    expect(
        min(x.shape[1:-1]) >= 1 and min(spatial) >= 1,
        f"{name}: a kernel {list(kernel)} does not fit into {x} with padding {attributes.padding}",
    )
    return (x.shape[0], *spatial, outputs)


@dataclass(frozen=True)
class Geometry:
    """A convolution of three spatial dimensions, and the matrix product that it is."""

    images: int
    size: tuple[int, ...]
    output: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    dilation: tuple[int, ...]
    up: tuple[int, ...]
    groups: int
    channels: int
    outputs: int
    depthwise: bool

    @staticmethod
    def of(attributes: Sliding, x: TensorType, weight: TensorType, y: TensorType) -> Geometry:
        depthwise = is_depthwise(attributes, x)
        fill = 3 - len(attributes.stride)

        def three(values: Sequence[int], default: int = 1) -> tuple[int, ...]:
            return (*(default,) * fill, *values)

        return Geometry(
            x.shape[0],
            three(x.shape[1:-1]),
            three(y.shape[1:-1]),
            three(weight.shape[:-1] if depthwise else weight.shape[1:-1]),
            three(attributes.stride),
            three(attributes.padding[::2], 0),
            three(attributes.dilation),
            three(attributes.input_dilation),
            attributes.groups,
            x.shape[-1],
            y.shape[-1],
            depthwise,
        )

    @property
    def pixels(self) -> int:
        """Of y: the rows of the product."""
        return self.images * math.prod(self.output)

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def group_channels(self) -> int:
        return self.channels // self.groups

    @property
    def group_outputs(self) -> int:
        return self.outputs // self.groups

    @property
    def k(self) -> int:
        return self.taps * self.group_channels

    @property
    def flops(self) -> int:
        return 2 * self.pixels * self.outputs * self.k

    @property
    def x_elements(self) -> int:
        return self.images * math.prod(self.size) * self.channels

    @property
    def y_elements(self) -> int:
        return self.pixels * self.outputs

    def pointwise(self, rows: int, columns: int) -> Geometry:
        """A matrix of so many rows and columns as a convolution of single pixels, with this one's outputs."""
        one, ones = (1, 1, rows), (1, 1, 1)
        return Geometry(1, one, one, ones, ones, (0, 0, 0), ones, ones, 1, columns, self.outputs, False)

    @property
    def flat(self) -> bool:
        """At most two dimensions, which most kernels are for."""
        return self.size[0] == self.kernel[0] == self.output[0] == 1 and self.before[0] == 0

    def strips(self, vector: int, pixels: int) -> tuple[int, int]:
        """Strips of so many pixels of a row of y, and all of them times vectors of so many channels."""
        across = -(-self.output[2] // pixels)
        return across, self.images * self.output[1] * across * (self.channels // vector)

    def tiles(self, m: int, n: int) -> tuple[int, int]:
        """Tiles of m pixels and n channels: side by side in a group, and all of them."""
        tiles_n = -(-self.group_outputs // n)
        return tiles_n, -(-self.pixels // m) * tiles_n * self.groups

    def push(self, tiles_n: int = 0, tiles: int = 0) -> bytes:
        """The push constants of convolution.slang, without the last 16 bytes."""
        steps = [stride | up << 16 for stride, up in zip(self.stride, self.up, strict=True)]
        head = (self.pixels, self.group_outputs, self.k, self.groups, tiles_n, tiles)
        counts = (self.x_elements - 1, self.group_channels)
        words = (*head, *counts, *self.size, *self.output, *self.kernel, *steps)
        return struct.pack("<20I3i3I", *words, *self.before, *self.dilation)


def reason_against(name: str, attributes: Sliding, x: TensorType, weight: TensorType, max_k: int = MAX_K) -> str | None:
    """What the kernels cannot do, in words."""
    y = TensorType(x.dtype, output_shape(name, attributes, x, weight))
    geometry = Geometry.of(attributes, x, weight, y)
    if max(geometry.x_elements, geometry.y_elements, weight.numel) >= MAX_ELEMENTS:
        return f"{name} of {x} and {weight} has more than {MAX_ELEMENTS} elements"
    if geometry.k + geometry.taps > max_k:
        return f"{name} sums over {geometry.k} products under {geometry.taps} taps; together {max_k} are supported"
    if max(*geometry.stride, *geometry.up) > MAX_STEP:
        return f"{name} with strides above {MAX_STEP} is not supported"
    reach = (abs(b) + d * k + s * o for b, d, k, s, o in zip(*_reach(geometry), strict=True))
    size = ((n - 1) * up + 1 for n, up in zip(geometry.size, geometry.up, strict=True))
    if max(*reach, *size) >= MAX_ELEMENTS:
        return f"{name} of {x} reaches beyond {MAX_ELEMENTS} pixels"
    return None


def _reach(g: Geometry) -> tuple[tuple[int, ...], ...]:
    return g.before, g.dilation, g.kernel, g.stride, g.output


LANES = 8  # of the kernels for CPUs


def takes_vectors(geometry: Geometry, vector: int) -> bool:
    """Whether conv_depthwise.slang is for it, with vectors of so many channels."""
    g = geometry
    plain = g.depthwise and g.outputs == g.channels and g.channels % vector == 0
    return plain and g.flat and set(g.up) == {1} and g.taps <= MAX_TAPS


def takes_dots(geometry: Geometry) -> bool:
    """Whether quantized_conv_depthwise.slang is for it."""
    g = geometry
    return takes_vectors(g, 4) and g.dilation[2] == 1 and g.kernel[2] <= DOT_COLUMNS and g.taps <= DOT_TAPS


def takes_lanes(geometry: Geometry, output: DType) -> bool:
    """Whether conv_lanes.slang is for it: no two lanes may write one word."""
    words = output is DType.FLOAT32 or geometry.group_outputs % 4 == 0
    return not geometry.depthwise and geometry.flat and words


def lanes_rows(geometry: Geometry) -> tuple[int, str]:
    """The pixels that a workgroup of conv_lanes.slang computes, and the end of the kernel's name."""
    return (16, "") if geometry.group_channels % 4 == 0 else (8, "_odd")


def convolve(x: Array, weight: Array, attributes: Sliding, fill: float = 0) -> Array:
    """The reference: x and weight of one floating dtype, in which it multiplies and adds; padding is ``fill``.

    Tap by tap: a matrix product, or an elementwise one for depthwise convolutions.
    """
    groups, channels = attributes.groups, x.shape[-1]
    depthwise = groups > 1 and groups == channels
    kernel = weight.shape[:-1] if depthwise else weight.shape[1:-1]
    outputs = weight.shape[-1] if depthwise else weight.shape[0]
    wide = _widened(x, attributes, fill)
    sizes = [
        (size - dilation * (k - 1) - 1) // stride + 1
        for size, dilation, k, stride in zip(
            wide.shape[1:-1], attributes.dilation, kernel, attributes.stride, strict=True
        )
    ]
    y = np.zeros((x.shape[0], *sizes, outputs), x.dtype)
    for tap in itertools.product(*map(range, kernel)):
        starts = [t * d for t, d in zip(tap, attributes.dilation, strict=True)]
        window = tuple(
            slice(start, start + (size - 1) * stride + 1, stride)
            for start, size, stride in zip(starts, sizes, attributes.stride, strict=True)
        )
        part = wide[(slice(None), *window)]
        if depthwise:
            y += np.repeat(part, outputs // channels, axis=-1) * weight[tap]
            continue
        w = np.moveaxis(weight, 0, -2)[tap].reshape(groups, outputs // groups, channels // groups)
        rows = part.reshape(-1, groups, channels // groups).swapaxes(0, 1)
        y += np.matmul(rows, w.swapaxes(1, 2)).swapaxes(0, 1).reshape(y.shape)
    return y


def _widened(x: Array, attributes: Sliding, fill: float) -> Array:
    """x dilated and padded; negative padding cuts off."""
    ups = attributes.input_dilation
    sizes = [(size - 1) * up + 1 for size, up in zip(x.shape[1:-1], ups, strict=True)]
    pairs = list(zip(attributes.padding[::2], attributes.padding[1::2], strict=True))
    whole = np.full(
        (x.shape[0], *(s + max(b, 0) + max(a, 0) for s, (b, a) in zip(sizes, pairs, strict=True)), x.shape[-1]),
        fill,
        x.dtype,
    )
    inside = tuple(slice(max(b, 0), max(b, 0) + s, up) for s, up, (b, _) in zip(sizes, ups, pairs, strict=True))
    whole[(slice(None), *inside)] = x
    cut = tuple(slice(max(-b, 0), whole.shape[i + 1] - max(-a, 0)) for i, (b, a) in enumerate(pairs))
    return whole[(slice(None), *cut)]
