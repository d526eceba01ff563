"""Pooling, upsampling and normalization of images, from torch.export on, against eager mode."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.edge import lower_module, mismatch
from tests.images import IMAGES, image_inputs
from tests.test_lowering_operators import Family, check


def test_images() -> None:
    """By the references and on the device."""
    inputs = image_inputs()
    lowered = check(IMAGES, inputs)
    outputs = zip(IMAGES.items(), lowered.run(*inputs, device=None), strict=True)
    wrong = {name: mismatch(output, function(*inputs), 1e-5) for (name, function), output in outputs}
    assert {name: difference for name, difference in wrong.items() if difference} == {}


def test_images_in_float16() -> None:
    names = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "nearest", "bilinear", "group_norm")
    functions = {name: IMAGES[name] for name in names}
    functions["group_norm"] = lambda x, row, v: F.group_norm(x, 2)
    check(functions, image_inputs(torch.float16), 2**-9)


def test_the_places_of_largest_elements_are_not_computed() -> None:
    places = {"places": lambda x: F.max_pool2d(x, 2, return_indices=True)[1]}
    lowered = lower_module(Family(places), (torch.randn(1, 2, 4, 4),))
    assert "does not compute all of its results" in str(lowered.report[0])
