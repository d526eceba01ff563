"""Random convolutions as torch has them, and as torchvk does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Convolution:
    """A convolution of torch: sizes and arguments. ``odd_after``: more padding behind than before."""

    images: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    channels: int  # of x, a group
    outputs: int  # a group
    transposed: bool = False
    output_padding: tuple[int, ...] = field(default=())

    @property
    def rank(self) -> int:
        return len(self.size)

    @property
    def arguments(self) -> dict[str, Any]:
        """For torch.nn.ConvNd and ConvTransposeNd."""
        extra = {"output_padding": self.output_padding} if self.transposed else {}
        return {
            "in_channels": self.channels * self.groups,
            "out_channels": self.outputs * self.groups,
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            **extra,
        }

    def module(self, bias: bool = True) -> torch.nn.Module:
        kind = f"Conv{'Transpose' if self.transposed else ''}{self.rank}d"
        module: torch.nn.Module = getattr(torch.nn, kind)(**self.arguments, bias=bias)
        return module

    @property
    def attributes(self) -> dict[str, Any]:
        """Of the operator."""
        pads = [(p, p) for p in self.padding]
        if self.transposed:
            sizes = zip(self.padding, self.dilation, self.kernel, self.output_padding, strict=True)
            pads = [(d * (k - 1) - p, d * (k - 1) - p + extra) for p, d, k, extra in sizes]
        ones = [1] * self.rank
        return {
            "stride": ones if self.transposed else list(self.stride),
            "padding": [each for pair in pads for each in pair],
            "dilation": list(self.dilation),
            "input_dilation": list(self.stride) if self.transposed else ones,
            "groups": self.groups,
        }

    def weight(self, weight: Array) -> Array:
        """torch's weight as the operator takes it."""
        if self.transposed:
            weight = np.flip(weight, tuple(range(2, self.rank + 2)))
            grouped = weight.reshape(self.groups, self.channels, self.outputs, *self.kernel)
            weight = grouped.swapaxes(1, 2).reshape(self.groups * self.outputs, self.channels, *self.kernel)
        weight = np.moveaxis(weight, 1, -1)
        if self.groups > 1 and self.channels == 1:
            weight = np.moveaxis(weight[..., 0], 0, -1)
        return np.ascontiguousarray(weight)


def last(x: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(x, 1, -1))


def first(x: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(x, -1, 1))


@st.composite
def convolutions(draw: st.DrawFn, max_rank: int = 3, max_channels: int = 9) -> Convolution:
    rank = draw(st.integers(1, max_rank))

    def numbers(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    transposed = draw(st.booleans())
    kernel, stride, dilation = numbers(1, 4 if rank < 3 else 3), numbers(1, 3), numbers(1, 2)
    reach = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    padding = numbers(0, 3)
    groups = draw(st.sampled_from((1, 1, 2, 3, 5, 8)))
    depthwise = draw(st.booleans())
    channels = 1 if depthwise else draw(st.integers(1, max_channels))
    outputs = draw(st.integers(1, 3 if groups > 1 else max_channels))
    if transposed:
        output_padding = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        # At least one pixel must be left.
        size = tuple(
            max(draw(st.integers(1, 5)), 1 + max(0, -(-(2 * p - r - e) // s)))
            for p, r, s, e in zip(padding, reach, stride, output_padding, strict=True)
        )
    else:
        output_padding = ()
        size = tuple(
            max(draw(st.integers(1, 9 if rank < 3 else 5)), r + 1 - 2 * p) for r, p in zip(reach, padding, strict=True)
        )
    return Convolution(
        *(draw(st.integers(1, 2)), size, kernel, stride, padding, dilation, groups, channels, outputs, transposed),
        output_padding,
    )
