"""MobileNetV2: Sandler, Howard, Zhu, Zhmoginov, Chen 2018, "Inverted Residuals and Linear Bottlenecks",
arXiv:1801.04381, table 2."""

from __future__ import annotations

import torch
from torch import nn

from tests.models.blocks import ConvNorm, Head, InvertedResidual, divisible, repeats

# expansion t, channels c, repeats n, stride s
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(nn.Module):
    """[N, 3, H, W] → [N, classes]. width: multiplier of channels; depth: of repeats."""

    def __init__(self, width: float = 1.0, depth: float = 1.0, classes: int = 1000) -> None:
        super().__init__()
        channels = divisible(32 * width)
        self.stem = ConvNorm(3, channels, 3, 2, act=nn.ReLU6())
        blocks = []
        for expansion, size, count, stride in STAGES:
            for number in range(repeats(count, depth)):
                outside = divisible(size * width)
                step = stride if number == 0 else 1
                blocks.append(InvertedResidual(channels, channels * expansion, outside, 3, step, nn.ReLU6))
                channels = outside
        self.blocks = nn.Sequential(*blocks)
        last = divisible(1280 * min(width, 1.0)) if width < 0.5 else max(1280, divisible(1280 * width))
        self.last = ConvNorm(channels, last, act=nn.ReLU6())
        self.head = Head(last, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.blocks(self.stem(x))))
