"""Convolutions from torch.export to the graph."""

from __future__ import annotations

import pytest
import torch
from edge import assert_same, compare, lower_program
from pt2e import quantize
from torch import nn


def batch_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def test_batch_norm_goes_into_the_weights() -> None:
    module = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding="same", dilation=2), batch_norm(4), nn.ReLU()),
        *(nn.Conv2d(4, 8, 3, groups=4, bias=False), batch_norm(8)),
        *(nn.Conv2d(8, 5, 1, bias=False), batch_norm(5)),
        *(nn.ConvTranspose2d(5, 6, 3, stride=2, output_padding=1), batch_norm(6)),
    )
    lowered = assert_same(module, (torch.randn(2, 3, 8, 8),))
    counts = lowered.operators()
    assert counts["conv"] == 3
    assert counts["linear"] == 1
    assert not {"add", "mul", "rsqrt"} & set(counts)


def test_batch_norm_alone() -> None:
    assert assert_same(batch_norm(3), (torch.randn(2, 3, 4, 4),)).operators() == {"mul": 1, "add": 1}


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(6, 4, 4, padding="same", groups=2), (2, 6, 9)),
        (nn.ConvTranspose1d(6, 12, 3, stride=2, padding=4, groups=6), (6, 9)),
        (nn.ConvTranspose2d(4, 6, (3, 2), stride=2, groups=2, dilation=2, bias=False), (1, 4, 3, 4)),
        (nn.Conv3d(4, 6, (3, 2, 1), stride=2, padding=1), (2, 4, 5, 6, 7)),
    ],
)
def test_ranks(module: nn.Module, shape: tuple[int, ...]) -> None:
    counts = assert_same(module, (torch.randn(shape),)).operators()
    assert counts["conv"] == 1
    assert "pad" not in counts


def test_channels_last() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).to(memory_format=torch.channels_last)
    assert_same(module, (torch.randn(2, 3, 5, 6).to(memory_format=torch.channels_last),))


def small_network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 16, 1)),
        *(nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.ConvTranspose2d(16, 6, 3, stride=2, groups=2)),
    )


class AffineWeight(nn.Module):
    """A convolution whose weight has zero points per channel."""

    def __init__(self, low: int, high: int, dtype: torch.dtype, zeros: list[int]) -> None:
        super().__init__()
        self.limits = low, high
        self.register_buffer("weight", torch.randint(low, high + 1, (4, 6, 3, 3), dtype=dtype))
        self.register_buffer("scale", torch.rand(4) + 0.5)
        self.register_buffer("zeros", torch.tensor(zeros))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.weight, self.scale, self.zeros, 0, *self.limits, self.weight.dtype
        )
        return nn.functional.conv2d(x, weight)


@pytest.mark.parametrize(
    ("module", "operator"),
    [
        (AffineWeight(-8, 7, torch.int8, [-8, 3, 0, 7]), "quantized_conv"),
        (AffineWeight(1, 255, torch.uint8, [128] * 4), "quantized_conv"),
        (AffineWeight(-128, 127, torch.int8, [-100, 3, 0, 7]), "conv"),  # 9 bits
    ],
)
def test_zero_points_of_weights(module: nn.Module, operator: str) -> None:
    counts = assert_same(module, (torch.randn(1, 6, 5, 4),)).operators()
    assert counts[operator] == 1


@pytest.mark.parametrize("config", [{}, {"weight_bits": 4}, {"is_static": True}, {"is_dynamic": True}])
def test_quantized(config: dict[str, object]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    module = quantize(small_network(), (x,), **config)
    lowered = lower_program(torch.export.export(module, (x,)))
    assert not lowered.cpu
    counts = lowered.operators()
    assert counts["quantized_conv"] == (4 if "is_dynamic" in config else 3)
    assert not {"conv", "clamp", "relu"} & set(counts)
    assert counts["permute"] == 2
    # Of weights, nothing is left in floating point.
    graph = lowered.graph
    floats = [t for t in graph.tensors if t.data is not None and t.dtype.value == "float32" and len(t.shape) > 2]
    assert all(t.type.numel == 1 for t in floats)
    compare(lowered.run(x), module(x), 1e-5)
