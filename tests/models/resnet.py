"""ResNet-18: He, Zhang, Ren, Sun 2015, "Deep Residual Learning for Image Recognition", arXiv:1512.03385, table 1."""

from __future__ import annotations

import torch
from torch import nn

from tests.models.blocks import ConvNorm, Head, divisible, repeats


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and the input beside them, projected where the shape changes (figure 2, option B)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = ConvNorm(inside, outside, 3, stride, act=nn.ReLU())
        self.second = ConvNorm(outside, outside, 3)
        same = stride == 1 and inside == outside
        self.shortcut = nn.Identity() if same else ConvNorm(inside, outside, 1, stride)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.second(self.first(x)) + self.shortcut(x))


class ResNet18(nn.Module):
    """[N, 3, H, W] → [N, classes]. width: multiplier of channels; depth: of the blocks of a stage."""

    def __init__(self, width: float = 1.0, depth: float = 1.0, classes: int = 1000) -> None:
        super().__init__()
        channels = divisible(64 * width)
        self.stem = ConvNorm(3, channels, 7, 2, act=nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1)
        blocks = []
        for size, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            for number in range(repeats(2, depth)):
                outside = divisible(size * width)
                blocks.append(BasicBlock(channels, outside, stride if number == 0 else 1))
                channels = outside
        self.blocks = nn.Sequential(*blocks)
        self.head = Head(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.pool(self.stem(x))))
