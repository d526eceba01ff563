"""Eight-bit data stays eight-bit: movement, pooling and upsampling between dequantize and quantize."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
import torch.nn.functional as F
from torch import nn

from tests.edge import lower_module, lower_program
from tests.networks import MobileNet, SqueezeExcite, UNet
from tests.pt2e import quantize

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
SAME, OTHER = (0.05, -3), (0.021, 11)

# Of x [2, 8, 6, 4], which is dequantized with SAME, and y, which is dequantized with OTHER; quantized with SAME.
MOVES: dict[str, Function] = {
    "reshape": lambda x, y: x.flatten(1),
    "permute": lambda x, y: x.permute(2, 0, 3, 1),
    "expand": lambda x, y: x[:, :1].expand(2, 3, 6, 4),
    "slice": lambda x, y: x[:, 1:7:2],
    "select": lambda x, y: x[:, 3],
    "flip": lambda x, y: x.flip(1, 3),
    "repeat": lambda x, y: x.repeat(1, 2, 1, 1),
    "pad": lambda x, y: F.pad(x, (1, 0, 2, 1)),
    "cat": lambda x, y: torch.cat([x, x.flip(1)], 1),
    "cat of two": lambda x, y: torch.cat([x, y, x], 2),
    "cat of a constant": lambda x, y: torch.cat(
        [x, torch.linspace(-9, 9, 8).reshape(1, 8, 1, 1).expand(2, 8, 6, 1)], 3
    ),
    "max_pool": lambda x, y: F.max_pool2d(x, 3, 2, 1),
    "amax": lambda x, y: x.amax((2, 3)),
    "nearest": lambda x, y: F.interpolate(x, scale_factor=2),
    "nearest in one dimension": lambda x, y: F.interpolate(x.flatten(2), scale_factor=1.5),
    "rows": lambda x, y: x.index_select(1, torch.tensor([3, 0, 0])),
    "chain": lambda x, y: F.max_pool2d(F.pad(x, (0, 1, 1, 0)), 2).permute(0, 2, 3, 1).reshape(2, -1)[:, 3:],
    "avg_pool": lambda x, y: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "adaptive": lambda x, y: F.adaptive_avg_pool2d(x, (4, 3)),
    "mean": lambda x, y: x.mean((2, 3), keepdim=True),
    "mean of channels": lambda x, y: y.mean(1),
    "mean of all": lambda x, y: y.mean((1, 2, 3)),
    "relu of a mean": lambda x, y: F.relu(F.adaptive_avg_pool2d(x, 1)),
}


class Quantized(nn.Module):
    def __init__(self, functions: dict[str, Function]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        decomposed = torch.ops.quantized_decomposed
        real = decomposed.dequantize_per_tensor(x, *SAME, -128, 127, torch.int8)
        other = decomposed.dequantize_per_tensor(y, *OTHER, -128, 127, torch.int8)
        results = [function(real, other) for function in self.functions.values()]
        return tuple(decomposed.quantize_per_tensor(r, *SAME, -128, 127, torch.int8) for r in results)


def test_moves() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-128, 128, (2, 8, 6, 4), generator=generator).to(torch.int8) for _ in range(2))
    module = Quantized(MOVES)
    lowered = lower_module(module, (x, y))
    graph = lowered.graph
    floats = [node.op for node in graph.nodes if any(graph.tensors[i].dtype.is_float for i in node.outputs)]
    # y is quantized anew for its place among others.
    assert floats in ([], ["dequantize"])
    for device in ("reference", None):
        outputs = zip(MOVES, lowered.run(x, y, device=device), module(x, y), strict=True)
        wrong = [name for name, output, want in outputs if not torch.equal(output, want)]
        assert wrong == []


def test_what_is_read_as_floats_is_moved_as_floats() -> None:
    """Permutations of what is not quantized again are left to those who can do without them."""

    class Product(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            real = torch.ops.quantized_decomposed.dequantize_per_tensor(x, *SAME, -128, 127, torch.int8)
            return torch.softmax(real, -1) @ real.mT

    x = torch.randint(-128, 128, (2, 3, 4), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    assert set(lower_module(Product(), (x,)).operators()) == {"dequantize", "softmax", "matmul"}


class Networks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList((MobileNet(), UNet(), SqueezeExcite()))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(network(x) for network in self.networks)


def test_static_networks_have_no_pair_left_but_at_their_edges() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    converted = quantize(Networks(), (x,), is_static=True)
    lowered = lower_program(torch.export.export(converted, (x,)))
    operators = lowered.operators()
    assert operators["quantize"] == 1
    assert operators["dequantize"] == 3
    edges = ("quantize", "dequantize", "permute")
    graph = lowered.graph
    inside = [node for node in graph.nodes if node.op not in edges]
    assert {graph.tensors[node.outputs[0]].dtype.value for node in inside} == {"int8"}
    with torch.no_grad():
        wanted = converted(x)
    for device in ("reference", None):
        for output, want in zip(lowered.run(x, device=device), wanted, strict=True):
            # A step is the smallest difference between two values of the result: at ties one may be taken for another.
            step = float(torch.unique(want).diff().min())
            wrong = (output - want).abs() > step / 2
            assert int(wrong.sum()) <= want.numel() // 10_000
            assert float((output - want).abs().max()) < 1.5 * step


def test_shuffled_channels_and_sums_of_them() -> None:
    """Channels shuffled as in ShuffleNet (arXiv:1707.01083), in another order of dimensions than what they are added
    to."""

    class Shuffle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x).unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
            return F.relu(self.second(y) + y)

    x = torch.randn(2, 4, 6, 5)
    converted = quantize(Shuffle(), (x,), is_static=True)
    with torch.no_grad():
        expected, lowered = converted(x), lower_program(torch.export.export(converted, (x,)))
    graph = lowered.graph
    floats = [node.op for node in graph.nodes if graph.tensors[node.outputs[0]].dtype.is_float]
    assert floats == ["dequantize", "permute"]
    assert torch.equal(lowered.run(x)[0], expected)
