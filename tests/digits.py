"""A real task, small enough to train in the tests: handwritten digits of 8×8 pixels, by a convolutional network and by
a transformer.

The images come with scikit-learn (Alpaydin, Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI Machine
Learning Repository, doi:10.24432/C50P49).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from tests.models.blocks import ConvNorm
from tests.models.vit import Layer

CLASSES, BATCH = 10, 64
HELD_OUT = 14 * BATCH  # about half of them


class SmallCNN(nn.Module):
    """[N, 1, 8, 8] → [N, 10]: plain, depthwise, pointwise and strided convolutions, a residual, pooling."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = ConvNorm(1, width, 3, act=nn.ReLU())
        self.depthwise = ConvNorm(width, width, 3, groups=width, act=nn.ReLU6())
        self.pointwise = ConvNorm(width, width)
        self.down = ConvNorm(width, 2 * width, 3, 2, act=nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(2 * width * 4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.pointwise(self.depthwise(x))
        return self.head(self.pool(self.down(x)).flatten(1))


class SmallTransformer(nn.Module):
    """[N, 1, 8, 8] → [N, 10]: a token for each row of pixels."""

    def __init__(self, width: int = 32, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.positions = nn.Parameter(0.02 * torch.randn(8, width))
        self.layers = nn.Sequential(*(Layer(width, heads, 2 * width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers(self.embed(x.squeeze(1)) + self.positions)
        return self.head(self.norm(x.mean(1)))


# class, epochs, learning rate
MODELS = {"cnn": (SmallCNN, 16, 1e-2), "transformer": (SmallTransformer, 50, 4e-3)}


@dataclass(frozen=True)
class Digits:
    """Images float32 [N, 1, 8, 8], of mean 0 and deviation 1, and labels."""

    images: torch.Tensor
    labels: torch.Tensor
    held_out: torch.Tensor
    held_out_labels: torch.Tensor


@functools.cache
def digits() -> Digits:
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images = torch.tensor(loaded.images, dtype=torch.float32).unsqueeze(1)
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(loaded.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, rest = order.split([len(order) - HELD_OUT, HELD_OUT])
    return Digits(images[train], labels[train], images[rest], labels[rest])


def fit(model: nn.Module, epochs: int, rate: float, seed: int = 0) -> None:
    """AdamW with a cosine schedule, in batches of BATCH; the model is in training mode already."""
    data = digits()
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.1, fused=True)
    orders = (torch.randperm(len(data.labels), generator=generator) for _ in range(epochs))
    batches = [batch for order in orders for batch in order.split(BATCH) if len(batch) == BATCH]
    steps = len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    for batch in batches:
        optimizer.zero_grad()
        functional.cross_entropy(model(data.images[batch]), data.labels[batch]).backward()
        optimizer.step()
        schedule.step()


@functools.cache
def trained(name: str) -> nn.Module:
    """One of MODELS, trained on the half that is not held out; in evaluation mode. A few seconds of one core."""
    kind, epochs, rate = MODELS[name]
    with _one_thread(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind().train()
        fit(model, epochs, rate)
    return model.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Such small products are slower on several; and sums are the same everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def sample() -> tuple[torch.Tensor]:
    """The first batch: what networks are exported with, and calibrated on."""
    return (digits().images[:BATCH],)


@torch.no_grad()
def logits_of(model: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Of the held-out images, in batches of BATCH."""
    return torch.cat([model(batch) for batch in digits().held_out.split(BATCH)])


def accuracy(logits: torch.Tensor) -> float:
    """Of the held-out images, in percent."""
    return 100.0 * float((logits.argmax(1) == digits().held_out_labels).float().mean())
