"""What the convolutional networks share, and how all of them are initialized."""

from __future__ import annotations

import math

import torch
from torch import nn


def divisible(channels: float, by: int = 8) -> int:
    """The nearest multiple of 8 that is not 10 % below (MobileNetV2's rule for width multipliers)."""
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * channels else rounded


def repeats(count: int, depth: float) -> int:
    return max(1, math.ceil(count * depth))


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch normalization, activation."""

    def __init__(
        self, inside: int, outside: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: nn.Module | None = None
    ) -> None:
        super().__init__(
            nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outside),
            *([act] if act is not None else []),
        )


class SqueezeExcite(nn.Module):
    """Channels weighted by what they are on average (Hu et al. 2017, arXiv:1709.01507)."""

    def __init__(self, channels: int, inner: int, act: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.act = nn.Conv2d(channels, inner, 1), act
        self.expand, self.gate = nn.Conv2d(inner, channels, 1), gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.expand(self.act(self.reduce(self.pool(x)))))


class InvertedResidual(nn.Module):
    """Pointwise expansion, depthwise convolution, [squeeze and excite], pointwise projection without activation; the
    input is added where the shapes allow (Sandler et al. 2018, figure 4)."""

    def __init__(
        self,
        inside: int,
        expanded: int,
        outside: int,
        kernel: int,
        stride: int,
        act: type[nn.Module],
        squeeze: SqueezeExcite | None = None,
    ) -> None:
        super().__init__()
        self.adds = stride == 1 and inside == outside
        layers: list[nn.Module] = []
        if expanded != inside:
            layers.append(ConvNorm(inside, expanded, act=act()))
        layers.append(ConvNorm(expanded, expanded, kernel, stride, expanded, act()))
        if squeeze is not None:
            layers.append(squeeze)
        layers.append(ConvNorm(expanded, outside))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


class Head(nn.Sequential):
    """The mean over the image, and a linear classifier."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


@torch.no_grad()
def initialize(model: nn.Module, x: torch.Tensor, seed: int = 0) -> nn.Module:
    """Weights that keep the scale of activations (He et al. 2015, arXiv:1502.01852), and batch norms that have seen
    ``x``: every channel has mean 0 and deviation 1 before its own (random) scale and shift. In evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def random(tensor: torch.Tensor, mean: float, deviation: float) -> None:
        tensor.copy_(mean + deviation * torch.randn(tensor.shape, generator=generator))

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            # Of a transposed convolution with stride 2 a quarter of the kernel meets each output.
            fan_in = module.weight[0].numel() if not isinstance(module, nn.ConvTranspose2d) else module.in_channels
            random(module.weight, 0.0, math.sqrt(1.5 / fan_in))
            if module.bias is not None:
                random(module.bias, 0.0, 0.05)
        elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            random(module.weight, 1.0, 0.2)
            random(module.bias, 0.0, 0.3)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(x)
    return model.eval()
