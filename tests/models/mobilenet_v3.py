"""MobileNetV3-small: Howard et al. 2019, "Searching for MobileNetV3", arXiv:1905.02244, table 2."""

from __future__ import annotations

import torch
from torch import nn

from tests.models.blocks import ConvNorm, InvertedResidual, SqueezeExcite, divisible

# kernel, expanded, out, squeeze and excite, activation, stride
BLOCKS = (
    (3, 16, 16, True, nn.ReLU, 2),
    (3, 72, 24, False, nn.ReLU, 2),
    (3, 88, 24, False, nn.ReLU, 1),
    (5, 96, 40, True, nn.Hardswish, 2),
    (5, 240, 40, True, nn.Hardswish, 1),
    (5, 240, 40, True, nn.Hardswish, 1),
    (5, 120, 48, True, nn.Hardswish, 1),
    (5, 144, 48, True, nn.Hardswish, 1),
    (5, 288, 96, True, nn.Hardswish, 2),
    (5, 576, 96, True, nn.Hardswish, 1),
    (5, 576, 96, True, nn.Hardswish, 1),
)


class MobileNetV3Small(nn.Module):
    """[N, 3, H, W] → [N, classes]. width: multiplier of channels; blocks: how many of the eleven."""

    def __init__(self, width: float = 1.0, blocks: int = len(BLOCKS), classes: int = 1000) -> None:
        super().__init__()
        channels = divisible(16 * width)
        self.stem = ConvNorm(3, channels, 3, 2, act=nn.Hardswish())
        layers, expanded = [], channels
        for kernel, inner, size, has_squeeze, act, stride in BLOCKS[:blocks]:
            expanded, outside = divisible(inner * width), divisible(size * width)
            squeeze = (
                SqueezeExcite(expanded, divisible(expanded / 4), nn.ReLU(), nn.Hardsigmoid()) if has_squeeze else None
            )
            layers.append(InvertedResidual(channels, expanded, outside, kernel, stride, act, squeeze))
            channels = outside
        self.blocks = nn.Sequential(*layers)
        self.last = ConvNorm(channels, expanded, act=nn.Hardswish())
        inner = divisible(1024 * width)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(expanded, inner),
            nn.Hardswish(),
            nn.Linear(inner, classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.blocks(self.stem(x))))
