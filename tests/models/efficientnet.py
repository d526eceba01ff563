"""EfficientNet-B0: Tan, Le 2019, "Rethinking Model Scaling for Convolutional Neural Networks", arXiv:1905.11946,
table 1."""

from __future__ import annotations

import torch
from torch import nn

from tests.models.blocks import ConvNorm, Head, InvertedResidual, SqueezeExcite, divisible, repeats

# expansion, kernel, channels, repeats, stride
STAGES = (
    (1, 3, 16, 1, 1),
    (6, 3, 24, 2, 2),
    (6, 5, 40, 2, 2),
    (6, 3, 80, 3, 2),
    (6, 5, 112, 3, 1),
    (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
)


class EfficientNetB0(nn.Module):
    """[N, 3, H, W] → [N, classes]. width and depth: the coefficients of section 3.3; stages: how many of the seven."""

    def __init__(self, width: float = 1.0, depth: float = 1.0, stages: int = len(STAGES), classes: int = 1000) -> None:
        super().__init__()
        channels = divisible(32 * width)
        self.stem = ConvNorm(3, channels, 3, 2, act=nn.SiLU())
        blocks = []
        for expansion, kernel, size, count, stride in STAGES[:stages]:
            for number in range(repeats(count, depth)):
                outside, expanded = divisible(size * width), channels * expansion
                # The squeeze has a quarter of the block's input channels.
                squeeze = SqueezeExcite(expanded, max(1, channels // 4), nn.SiLU(), nn.Sigmoid())
                step = stride if number == 0 else 1
                blocks.append(InvertedResidual(channels, expanded, outside, kernel, step, nn.SiLU, squeeze))
                channels = outside
        self.blocks = nn.Sequential(*blocks)
        last = divisible(1280 * width)
        self.last = ConvNorm(channels, last, act=nn.SiLU())
        self.head = Head(last, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.blocks(self.stem(x))))
