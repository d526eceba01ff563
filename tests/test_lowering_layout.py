"""Permutations between operators on images: none is left but at the edges, and the results stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.edge import assert_same
from tests.networks import MobileNet, SqueezeExcite, UNet

# Between two convolutions: x [2, 4, 6, 5], and the network's input as y [2, 4, 6, 5].
BETWEEN: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "arithmetic": lambda x, y: (x * 2 + x.exp()) * torch.arange(4.0).reshape(4, 1, 1),
    "of rows": lambda x, y: x * torch.arange(30.0).reshape(6, 5),
    "with the input": lambda x, y: torch.where(x > y, x, y * 2),
    "cat": lambda x, y: torch.cat([x[:, :2], y[:, 1:3]], 1),
    "cat of rows": lambda x, y: torch.cat([x, y], 2),
    "softmax": lambda x, y: x.softmax(1),
    "normalize": lambda x, y: F.normalize(x, dim=1),
    "pad": lambda x, y: F.pad(x, (1, 2, 0, 1), value=0.5),
    "flip": lambda x, y: x.flip(3),
    "repeat": lambda x, y: x.repeat(1, 1, 2, 1),
    "mean of channels": lambda x, y: x * x.mean(1, keepdim=True),
    "mean of rows": lambda x, y: x + x.mean(2)[:, :, None],
    "channels split": lambda x, y: torch.cat(x.chunk(2, 1)[::-1], 1),
    "shuffle": lambda x, y: F.channel_shuffle(x, 2),
    "pixels joined": lambda x, y: x.flatten(2).softmax(1).reshape(2, 4, 6, 5),
    "a channel": lambda x, y: x * x[:, 1][:, None],
    "a row": lambda x, y: x + x[:, :, 3][:, :, None],
}


class Between(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.ModuleList(nn.Conv2d(4, 2, 2) for _ in BETWEEN)

    def forward(self, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.first(y)
        return tuple(conv(f(x, y)) for conv, f in zip(self.last, BETWEEN.values(), strict=True))


def test_everything_between_convolutions() -> None:
    torch.manual_seed(0)
    graph = assert_same(Between(), (torch.randn(2, 4, 6, 5),)).graph
    moved = [node for node in graph.nodes if node.op == "permute"]
    # One for the input, one for each output; one for a slice of the input, and two around a shuffle.
    assert len(moved) == 1 + len(BETWEEN) + 3


@pytest.mark.parametrize(
    ("network", "permutes"), [(MobileNet, 1), (UNet, 2), (SqueezeExcite, 2)], ids=lambda value: str(value)
)
def test_networks(network: type[nn.Module], permutes: int) -> None:
    torch.manual_seed(0)
    operators = assert_same(network(), (torch.randn(2, 3, 8, 8),)).operators()
    assert operators["permute"] == permutes
    # What exir takes apart is put together, or part of the layer before it.
    assert not operators.keys() & {"clamp", "div"}
    assert operators["add"] == 0


def test_rows() -> None:
    """One spatial dimension: the permutation to channels last is the one back, too."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv1d(3, 4, 3)
            self.last = nn.Conv1d(8, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.max_pool1d(F.silu(self.first(x)), 2)
            return self.last(torch.cat([x, x.flip(2)], 1))

    torch.manual_seed(0)
    assert assert_same(Rows(), (torch.randn(2, 3, 20),)).operators()["permute"] == 2


def test_no_images() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.conv(x).relu() + 1).flatten()

    assert_same(Flat(), (torch.zeros(0, 2, 4, 5),))
