"""The networks by name: as published, and tiny ones of the same kinds of layers for the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tests.models.blocks import initialize
from tests.models.efficientnet import EfficientNetB0
from tests.models.mobilenet_v2 import MobileNetV2
from tests.models.mobilenet_v3 import MobileNetV3Small
from tests.models.resnet import ResNet18
from tests.models.unet import UNet
from tests.models.vit import ViT


@dataclass(frozen=True)
class Entry:
    """How a network is made, as published and tiny, and the images [channels, size, size] that it takes."""

    published: Callable[[], nn.Module]
    image: tuple[int, int, int]
    tiny: Callable[[], nn.Module]
    tiny_image: tuple[int, int, int]


ZOO = {
    "mobilenet_v2": Entry(MobileNetV2, (3, 224, 224), lambda: MobileNetV2(0.25, 0.2, 10), (3, 32, 32)),
    "mobilenet_v3_small": Entry(MobileNetV3Small, (3, 224, 224), lambda: MobileNetV3Small(0.25, 4, 10), (3, 32, 32)),
    "resnet18": Entry(ResNet18, (3, 224, 224), lambda: ResNet18(0.125, 0.5, 10), (3, 32, 32)),
    "unet": Entry(UNet, (1, 256, 256), lambda: UNet(0.125, 2), (1, 16, 16)),
    "efficientnet_b0": Entry(EfficientNetB0, (3, 224, 224), lambda: EfficientNetB0(0.25, 0.2, 4, 10), (3, 32, 32)),
    "vit": Entry(ViT, (3, 224, 224), lambda: ViT(16, 4, 32, 2, 2, 10), (3, 16, 16)),
}


def images(image: tuple[int, int, int], batch: int, seed: int = 0) -> torch.Tensor:
    """Random images like normalized photographs, smooth over a few pixels: float32 [batch, *image]."""
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = image
    coarse = torch.randn((batch, channels, -(-height // 4), -(-width // 4)), generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return smooth + 0.3 * torch.randn((batch, *image), generator=generator)


def make(name: str, tiny: bool = True, seed: int = 0, batch: int = 8) -> nn.Module:
    """An initialized network in evaluation mode."""
    entry = ZOO[name]
    image = entry.tiny_image if tiny else entry.image
    torch.manual_seed(seed)
    return initialize((entry.tiny if tiny else entry.published)(), images(image, batch, seed), seed)


def inputs(name: str, tiny: bool = True, batch: int = 1, seed: int = 1) -> tuple[torch.Tensor]:
    entry = ZOO[name]
    return (images(entry.tiny_image if tiny else entry.image, batch, seed),)
