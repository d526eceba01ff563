"""Activations per token, weights in groups, convolutions without static activations, and training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization.granularity import PerGroup
from torchao.quantization.pt2e import move_exported_model_to_eval, move_exported_model_to_train
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
from torchao.quantization.quant_api import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_

import torchvk.errors
from tests.edge import agree
from tests.pt2e import CHOOSE, DEQUANTIZE_CHANNEL, arithmetic, convert, find, operators, prepare, quantize, sqnr
from torchvk.quantizer.vulkan_quantizer import VulkanQuantizer, get_symmetric_quantization_config

TOKEN = "torchao.choose_qparams_affine"


# --- tokens and groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_and_tokens_are_those_of_torchao(bits: int, dtype: torch.dtype) -> None:
    """The same integers and scales as quantize_ gives, and so the same values."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 5, bias=False)).to(dtype)
    x = torch.randn(2, 7, 64, dtype=dtype)
    weight_dtype = {4: torch.int4, 8: torch.int8}[bits]
    for is_dynamic in (False, True):
        scheme = Int8DynamicActivationIntxWeightConfig if is_dynamic else IntxWeightOnlyConfig
        config = {"is_dynamic": is_dynamic, "is_per_token": is_dynamic, "weight_bits": bits, "group_size": 8}
        converted = convert(model, x, calibrate=False, **config)
        reference = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 5, bias=False)).to(dtype)
        reference.load_state_dict(model.state_dict())
        granularity = {"weight_granularity": PerGroup(8)} if is_dynamic else {"granularity": PerGroup(8)}
        quantize_(reference, scheme(weight_dtype=weight_dtype, **granularity))
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(converted(x), reference(x), atol=tolerance, rtol=tolerance)
        assert sum(buffer.dtype == torch.int8 and buffer.dim() == 2 for buffer in converted.buffers()) >= 2
        assert len(find(converted, TOKEN)) == (2 if is_dynamic else 0)


def test_tokens_with_weights_per_channel() -> None:
    model, x = nn.Linear(33, 7), torch.randn(4, 33) * torch.tensor([[1.0], [100.0], [0.01], [0.0]])
    converted = convert(model, x, is_dynamic=True, is_per_token=True)
    assert operators(converted)[DEQUANTIZE_CHANNEL] == 1
    expected = F.linear(x, model.weight)
    y = converted(x) - model.bias
    for row in range(3):
        assert sqnr(expected[row], y[row]) > 30, "each token has a scale of its own"
    assert torch.equal(y[3], torch.zeros(7))


def test_range_of_tokens() -> None:
    converted = convert(
        nn.Linear(8, 4), torch.randn(3, 8), is_dynamic=True, is_per_token=True, act_qmin=-50, act_qmax=60
    )
    (choose,) = find(converted, TOKEN)
    assert choose.args[1:6] == ("ASYMMETRIC", (1, 8), torch.int8, -50, 60)


def test_tokens_of_one_value_are_not_quantized() -> None:
    """torchao takes blocks of one element for the whole tensor, and fails."""
    model, x = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 3)), torch.randn(2, 5, 1)
    converted = convert(model, x, is_dynamic=True, is_per_token=True)
    assert converted(x).shape == (2, 5, 3)
    assert len(find(converted, TOKEN)) == 1


def test_shared_tokens_are_quantized_once_and_apart_from_tensors() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(6, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) + self.k(x) + self.v(x)

    token = get_symmetric_quantization_config(is_dynamic=True, is_per_token=True)
    tensor = get_symmetric_quantization_config(is_dynamic=True)
    quantizer = VulkanQuantizer().set_global(token).set_module_name("v", tensor)
    converted = quantize(Heads(), (torch.randn(3, 6),), quantizer)
    assert len(find(converted, TOKEN)) == 1
    assert operators(converted)[CHOOSE] == 1


def test_weight_in_groups_stored_as_columns() -> None:
    """x @ W with W [K, N]: groups lie along K, which is its first dimension."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.w

    model, x = Product(), torch.randn(3, 16)
    converted = convert(model, x, weight_bits=4, group_size=4)
    columns = model.w.detach().T.reshape(6, 4, 4)
    scale = columns.abs().amax(-1, keepdim=True) / 7.5
    expected = (torch.clamp(torch.round(columns * (1 / scale)), -8, 7) * scale).reshape(6, 16)
    torch.testing.assert_close(converted(x), x @ expected.T, atol=1e-5, rtol=1e-5)


def test_group_that_does_not_divide_names_the_module() -> None:
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 4))
    quantizer = VulkanQuantizer().set_global(get_symmetric_quantization_config(group_size=16))
    with pytest.raises(torchvk.errors.ArgumentError, match=r"1: group_size=16 does not divide its 8 input channels"):
        prepare(model, (torch.randn(2, 32),), quantizer)
    prepare(model, (torch.randn(2, 32),), quantizer.set_module_name("1", None))


def test_exports_again() -> None:
    model, x = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(2, 3, 32)
    converted = convert(model, x, is_dynamic=True, is_per_token=True, weight_bits=4, group_size=16)
    exported = torch.export.export(converted, (x,))
    assert torch.equal(exported.module()(x), converted(x))


# --- convolutions --------------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2), torch.randn(2, 4, 15), 0),
    "conv2d": (nn.Conv2d(4, 6, 3, padding="same"), torch.randn(2, 4, 9, 9), 0),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), torch.randn(1, 4, 9, 9), 0),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), torch.randn(2, 4, 15), 1),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 6, 3, groups=2), torch.randn(2, 4, 9, 9), 1),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_weight_only_and_dynamic(case: str) -> None:
    module, x, axis = CONVOLUTIONS[case]
    for bits, least in ((8, 35), (4, 12)):
        for config in ({}, {"is_dynamic": True}, {"is_dynamic": True, "is_per_token": True}, {"group_size": 2}):
            converted = convert(module, x, weight_bits=bits, **config)
            (weight,) = find(converted, DEQUANTIZE_CHANNEL)
            assert weight.args[3] == axis
            assert operators(converted)[CHOOSE] == ("is_dynamic" in config), "per tensor: there are no tokens"
            assert not find(converted, TOKEN)
            assert sqnr(module(x), converted(x)) > least


def test_batch_norm_is_folded_before_weights_are_quantized() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()).eval()
    model[1].running_var.uniform_(0.5, 2)
    x = torch.randn(1, 4, 9, 9)
    converted = convert(model, x)
    assert arithmetic(converted) == ["conv2d", "relu"]
    assert sqnr(model(x), converted(x)) > 35


# --- training ------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Convolutions of both kinds, with batch norm if ``norm``, and linears."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8) if norm else nn.Identity()
        self.up, self.up_bn = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.BatchNorm2d(4) if norm else nn.Identity()
        self.hidden, self.head = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.bn(self.conv(x)), inplace=True)
        x = torch.relu(self.up_bn(self.up(x))).mean((2, 3))
        return self.head(torch.relu(self.hidden(x)))


def trained(
    config: dict[str, Any], norm: bool, steps: int = 25
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule, list[float]]:
    """Model prepared and trained, in evaluation mode; the same converted; the losses."""
    torch.manual_seed(0)
    model, x, target = Small(norm), torch.randn(12, 2, 8, 8), torch.arange(12) % 3
    x += target[:, None, None, None]
    quantizer = VulkanQuantizer().set_global(get_symmetric_quantization_config(is_qat=True, **config))
    if "group_size" in config:
        quantizer.set_module_name("hidden", None)  # 4 input channels
    prepared = prepare_qat_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    move_exported_model_to_train(prepared)
    optimizer = torch.optim.Adam(prepared.parameters(), 0.02)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(prepared(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    move_exported_model_to_eval(prepared)
    with torch.no_grad():
        prepared.x, prepared.y = x, prepared(x)
        converted = convert_pt2e(prepared)
    move_exported_model_to_eval(converted)
    return prepared, converted, losses


# With batch norm, torchao exports a hundred patterns to look for: 15 seconds.
@pytest.mark.parametrize(
    ("norm", "config"),
    [
        (True, {"is_static": True, "weight_bits": 4}),
        (False, {"is_static": True}),
        (False, {"is_static": True, "is_per_channel": False}),
        (False, {"is_dynamic": True}),
        (False, {"is_dynamic": True, "is_per_token": True, "weight_bits": 4, "group_size": 8}),
        (False, {"weight_bits": 4}),
    ],
    ids=str,
)
def test_training_converts(norm: bool, config: dict[str, Any]) -> None:
    """The loss falls, batch norm is folded, and the converted model computes what training saw; lowered, too."""
    prepared, converted, losses = trained(config, norm)
    assert losses[-1] < 0.8 * losses[0]
    names = arithmetic(converted)
    assert not [name for name in names if "batch_norm" in name]
    assert names.index("relu6") == 1 + names.index("conv2d")
    integers = [
        buffer for buffer in converted.buffers() if buffer.dtype == torch.int8 and buffer.any()
    ]  # no zero points
    assert len(integers) == (3 if "group_size" in config else 4)
    if config.get("weight_bits") == 4:
        assert all(buffer.abs().max() <= 8 for buffer in integers)
    with torch.no_grad():
        assert sqnr(prepared.y, converted(prepared.x)) > 25
    if norm or config == {"is_dynamic": True}:
        agree(converted, prepared.x)


def test_training_sees_values_per_token_as_converted() -> None:
    """What the fake quantizers give is what the converted model computes, bit by bit of the quantized values."""
    torch.manual_seed(0)
    config = {"is_dynamic": True, "is_per_token": True, "weight_bits": 4, "group_size": 8}
    quantizer = VulkanQuantizer().set_global(get_symmetric_quantization_config(is_qat=True, **config))
    model, x = nn.Linear(32, 6), torch.randn(2, 5, 32)
    prepared = prepare_qat_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    y = prepared(x)
    y.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in prepared.parameters())
    torch.testing.assert_close(convert_pt2e(prepared)(x), y, atol=1e-5, rtol=1e-5)


def test_fake_quantizers_can_be_switched_off() -> None:
    config = {"is_dynamic": True, "is_per_token": True, "group_size": 8}
    quantizer = VulkanQuantizer().set_global(get_symmetric_quantization_config(is_qat=True, **config))
    model, x = nn.Linear(32, 6), torch.randn(5, 32)
    prepared = prepare_qat_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    for module in prepared.modules():
        if hasattr(module, "disable_fake_quant"):
            module.disable_fake_quant()
    torch.testing.assert_close(prepared(x), model(x))
