"""U-Net: Ronneberger, Fischer, Brox 2015, "Convolutional Networks for Biomedical Image Segmentation",
arXiv:1505.04597, figure 1; padded convolutions and batch normalization: the output has the input's size."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from tests.models.blocks import ConvNorm, divisible


class Double(nn.Sequential):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__(
            ConvNorm(inside, outside, 3, act=nn.ReLU()),
            ConvNorm(outside, outside, 3, act=nn.ReLU()),
        )


class Up(nn.Module):
    """A transposed convolution doubles the size, and what was there on the way down stands beside it; "nearest": the
    size is doubled by repeating, and a convolution follows."""

    def __init__(self, inside: int, outside: int, nearest: bool) -> None:
        super().__init__()
        self.up: nn.Module = (
            nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(inside, outside, 3, padding=1))
            if nearest
            else nn.ConvTranspose2d(inside, outside, 2, 2)
        )
        self.merge = Double(2 * outside, outside)

    def forward(self, x: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
        return self.merge(torch.cat([beside, self.up(x)], 1))


class UNet(nn.Module):
    """[N, 1, H, W] → [N, classes, H, W]; H and W must be multiples of 2 ** levels. width: multiplier of channels."""

    def __init__(self, width: float = 1.0, levels: int = 4, classes: int = 2, nearest: bool = False) -> None:
        super().__init__()
        sizes = [divisible(64 * 2**level * width) for level in range(levels + 1)]
        self.first = Double(1, sizes[0])
        self.pool = nn.MaxPool2d(2)
        self.down = nn.ModuleList(Double(a, b) for a, b in pairwise(sizes))
        self.up = nn.ModuleList(Up(b, a, nearest) for a, b in reversed(list(pairwise(sizes))))
        self.last = nn.Conv2d(sizes[0], classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        passed = []
        for down in self.down:
            passed.append(x)
            x = down(self.pool(x))
        for up in self.up:
            x = up(x, passed.pop())
        return self.last(x)
