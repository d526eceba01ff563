"""The networks in tests/models are what their papers say, and their activations are sane."""

from __future__ import annotations

import pytest
import torch

from tests.models.zoo import ZOO, inputs, make

# Parameters of the published networks with 1000 classes, as torchvision (and, of the vision transformer, timm) has
# them; the U-Net's is the commonly quoted 31.0 million, with batch normalization.
PARAMETERS = {
    "mobilenet_v2": 3_504_872,
    "mobilenet_v3_small": 2_542_856,
    "resnet18": 11_689_512,
    "unet": 31_036_546,
    "efficientnet_b0": 5_288_548,
    "vit": 22_050_664,
}


@pytest.mark.parametrize("name", ZOO)
def test_size_of_the_published_network(name: str) -> None:
    with torch.device("meta"):
        model = ZOO[name].published()
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ZOO)
def test_activations_are_sane(name: str) -> None:
    """Nothing dies or explodes on the way, and the result depends on the image."""
    model = make(name)
    deviations = []
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _, __, output: deviations.append(float(output.std())))
    with torch.no_grad():
        output = model(*inputs(name, batch=4))
    assert min(deviations) > 0.02
    assert max(deviations) < 5
    assert output.isfinite().all()
    assert output.std(0).mean() > 0.1 * output.std()
