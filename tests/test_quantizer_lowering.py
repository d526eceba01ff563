"""What the quantizer makes is lowered to programs that agree with the converted module, whatever part runs where."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.edge import agree
from tests.pt2e import quantize
from torchvk.quantizer.vulkan_quantizer import VulkanQuantizer, get_symmetric_quantization_config

pytestmark = pytest.mark.export


@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 33)])
@pytest.mark.parametrize("config", [{}, {"weight_bits": 4}, {"is_per_channel": False}], ids=str)
def test_static_linear(config: dict[str, object], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(33, 20), nn.ReLU(), nn.Linear(20, 7)), torch.randn(shape)
    agree(quantize(model, (x,), is_static=True, **config), x)


def test_static_convolution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, groups=8), nn.Hardswish(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    )  # fmt: skip
    x = torch.randn(2, 3, 12, 12)
    agree(quantize(model, (x,), is_static=True), x)


def test_static_transposed_convolution_and_joins() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ConvTranspose2d(4, 3, 2, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.relu(self.down(x))
            return torch.cat([self.up(y), F.interpolate(y, scale_factor=2)[:, :2], x], 1)[:, 1:] * 0.5

    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, 8)
    agree(quantize(Up(), (x,), is_static=True), x, steps=2)


def test_static_attention() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.q, self.k, self.v = nn.LayerNorm(16), *(nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            weights = torch.softmax(self.q(y) @ self.k(y).transpose(1, 2) / 4.0, -1)
            return x + weights @ self.v(y)

    torch.manual_seed(0)
    x = torch.randn(2, 6, 16)
    agree(quantize(Attention(), (x,), is_static=True), x, steps=2)


@pytest.mark.parametrize("config", [{}, {"weight_bits": 4, "group_size": 16}, {"is_per_channel": False}], ids=str)
def test_linear_per_token_runs_on_the_gpu(config: dict[str, object]) -> None:
    """Whole, in integer arithmetic: what is left is the order of float32 additions."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(48, 51), nn.ReLU(), nn.Linear(51, 7)), torch.randn(2, 5, 48)
    quantizer = VulkanQuantizer().set_global(
        get_symmetric_quantization_config(is_dynamic=True, is_per_token=True, **config)
    )
    if "group_size" in config:
        quantizer.set_module_name("2", get_symmetric_quantization_config(is_dynamic=True, is_per_token=True))
    lowered = agree(quantize(model, (x,), quantizer), x)
    assert not lowered.cpu
    nodes = [node for node in lowered.graph.nodes if node.op == "quantized_linear"]
    assert [node.attributes["activation"] for node in nodes] == ["dynamic_per_token"] * 2
    expected = 16 if "group_size" in config else 48
    assert nodes[0].attributes["group_size"] == expected


def test_groups_weight_only_run_on_the_gpu() -> None:
    model, x = nn.Linear(64, 10), torch.randn(3, 64)
    lowered = agree(quantize(model, (x,), weight_bits=4, group_size=32), x)
    assert not lowered.cpu
    assert lowered.operators()["quantized_linear"] == 1


@pytest.mark.parametrize("config", [{}, {"is_dynamic": True}, {"weight_bits": 4, "group_size": 8}], ids=str)
def test_convolutions_weight_only_and_dynamic(config: dict[str, object]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.randn(2, 3, 10, 10)
    agree(quantize(model, (x,), **config), x)


@pytest.mark.parametrize("bits", [8, 4])
def test_embedding(bits: int) -> None:
    torch.manual_seed(0)
    config = get_symmetric_quantization_config(weight_bits=bits)
    quantizer = VulkanQuantizer().set_global(config).set_module_type(nn.Embedding, config)
    model, ids = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 6)), torch.tensor([[3, 19, 0]])
    agree(quantize(model, (ids,), quantizer), ids)


def test_mixture_of_schemes() -> None:
    torch.manual_seed(0)
    quantizer = VulkanQuantizer().set_global(get_symmetric_quantization_config(is_static=True))
    quantizer.set_module_name("2", get_symmetric_quantization_config(is_dynamic=True, is_per_token=True))
    quantizer.set_module_name("4", None)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(5, 16)
    agree(quantize(model, (x,), quantizer), x, steps=4)
