"""What quantization costs on a real task: accuracy on held-out digits, on the GPU's path, against float32.

docs/accuracy.md has all schemes (``make accuracy``); here are those whose loss is promised.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

import torchvk
from tests.digits import BATCH, MODELS, accuracy, digits, fit, logits_of, sample, trained
from tests.edge import lower_program
from tests.models.blocks import ConvNorm
from tests.schemes import quantized, trained_quantized

pytestmark = pytest.mark.xdist_group("digits")  # one process trains each network once

# Points of accuracy that a scheme may lose against float32.
ALLOWED = {"fp32": 0.0, "static": 0.5, "4w": 1.0, "4w-channel": 1.0}
FLOAT_ACCURACY = {"cnn": 96.0, "transformer": 94.0}
CALIBRATION = [(batch,) for batch in digits().images.split(BATCH)[:4]]


def on_the_device(model: nn.Module) -> torch.Tensor:
    """The logits of the held-out images by a program that is delegated whole."""
    with torch.no_grad():
        lowered = lower_program(torch.export.export(model, sample()))
    assert not lowered.cpu, [str(refusal) for refusal in lowered.report]
    with torchvk.load(lowered.edge.to_executorch()) as program:
        return logits_of(program)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *(("cnn", scheme) for scheme in ("fp32", "static", "4w-channel")),
        *(("transformer", scheme) for scheme in ("static", "4w")),
    ],
)
def test_accuracy(name: str, scheme: str) -> None:
    model = trained(name)
    with_floats = accuracy(logits_of(model))
    assert with_floats >= FLOAT_ACCURACY[name]
    module = quantized(model, scheme, sample(), CALIBRATION)
    logits = on_the_device(module)
    assert accuracy(logits) >= with_floats - ALLOWED[scheme]
    # And the program is the module: it decides otherwise only where two classes are as good as equal.
    expected = logits_of(module)
    differs = logits.argmax(1) != expected.argmax(1)
    best, second = expected[differs].topk(2, 1).values.unbind(1) if differs.any() else (torch.zeros(1),) * 2
    assert float(differs.float().mean()) <= 0.005
    assert (best - second).max() <= 0.05 * expected.abs().max()


def test_training_recovers_what_4_bits_cost() -> None:
    """Weights of 4 bits with one scale a layer, static int8 activations: what both networks together lose by
    quantization after training, and get back by training with it. (The convolutional network's batch norms are
    folded before, since torchao takes 15 seconds to look for them.)"""
    losses = []
    for name in MODELS:
        model = _folded(trained(name)) if name == "cnn" else trained(name)
        with_floats = accuracy(logits_of(model))
        after = accuracy(logits_of(quantized(model, "static-4w", sample(), CALIBRATION)))
        trained_with = trained_quantized(model, "static-4w", sample(), lambda prepared: fit(prepared, 8, 1e-3))
        losses.append((with_floats - after, with_floats - accuracy(on_the_device(trained_with))))
    after, recovered = np.array(losses).sum(0)
    assert after >= 0.5
    assert recovered <= after / 2


def _folded(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, ConvNorm):
            module[0], module[1] = fuse_conv_bn_eval(module[0], module[1]), nn.Identity()
    return model
