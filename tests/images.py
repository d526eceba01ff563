"""Operators on images: a family as in test_lowering_operators.py, of x [2, 4, 9, 7], a row of it, and a volume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def layer(layer: nn.Module, seed: int = 0) -> nn.Module:
    """With parameters and statistics that are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=generator) + 0.5
    return layer.eval()


GROUP_NORM = layer(nn.GroupNorm(2, 4))
INSTANCE_NORM = layer(nn.InstanceNorm2d(4, affine=True))
BATCH_NORM = layer(nn.BatchNorm2d(4, track_running_stats=False))

IMAGES: Mapping[str, Callable[..., Any]] = {
    "max_pool2d": lambda x, row, v: F.max_pool2d(x, 3, 2, 1),
    "max_pool2d, ceil, dilated": lambda x, row, v: F.max_pool2d(x, (2, 3), (3, 2), 1, dilation=2, ceil_mode=True),
    "max_pool2d of one image": lambda x, row, v: F.max_pool2d(x[0], 2),
    "max_pool1d": lambda x, row, v: F.max_pool1d(row, 3),
    "max_pool3d": lambda x, row, v: F.max_pool3d(v, 2),
    "avg_pool2d": lambda x, row, v: F.avg_pool2d(x, 3, 2, 1),
    "avg_pool2d without padding": lambda x, row, v: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "avg_pool2d with a divisor": lambda x, row, v: F.avg_pool2d(x, 2, divisor_override=3),
    "avg_pool1d": lambda x, row, v: F.avg_pool1d(row, 2),
    "avg_pool3d": lambda x, row, v: F.avg_pool3d(v, 2, 1),
    "lp_pool2d": lambda x, row, v: F.lp_pool2d(x, 2, 2),
    "local response": lambda x, row, v: F.local_response_norm(x, 2),
    "adaptive_avg_pool2d": lambda x, row, v: F.adaptive_avg_pool2d(x, (4, 3)),
    "adaptive_avg_pool2d to more": lambda x, row, v: F.adaptive_avg_pool2d(x, (11, 7)),
    "adaptive_avg_pool2d to one": lambda x, row, v: F.adaptive_avg_pool2d(x, 1),
    "adaptive_avg_pool1d": lambda x, row, v: F.adaptive_avg_pool1d(row, 5),
    "adaptive_avg_pool3d": lambda x, row, v: F.adaptive_avg_pool3d(v, 2),
    "nearest": lambda x, row, v: F.interpolate(x, scale_factor=2),
    "nearest by a fraction": lambda x, row, v: F.interpolate(x, scale_factor=1.7),
    "nearest to a size": lambda x, row, v: F.interpolate(x, size=(5, 13)),
    "nearest exact": lambda x, row, v: F.interpolate(x, scale_factor=3, mode="nearest-exact"),
    "nearest, rows": lambda x, row, v: F.interpolate(row, scale_factor=2),
    "nearest, volumes": lambda x, row, v: F.interpolate(v, scale_factor=2),
    "bilinear": lambda x, row, v: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear to a size": lambda x, row, v: F.interpolate(x, size=(5, 20), mode="bilinear"),
    "bilinear by corners": lambda x, row, v: F.interpolate(x, size=(1, 20), mode="bilinear", align_corners=True),
    "group_norm": lambda x, row, v: GROUP_NORM(x),
    "group_norm without parameters": lambda x, row, v: F.group_norm(row, 1),
    "instance_norm": lambda x, row, v: INSTANCE_NORM(x),
    "batch_norm of this batch": lambda x, row, v: BATCH_NORM(x),
    "pixel_shuffle": lambda x, row, v: F.pixel_shuffle(x, 2),
    "reflection": lambda x, row, v: F.pad(x, (1, 2, 0, 3), mode="reflect"),
    "replication": lambda x, row, v: F.pad(x, (1, 2, 0, 3), mode="replicate"),
}


def image_inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 4, 9, 7), (2, 4, 12), (1, 2, 4, 5, 3))
    )
