"""get_symmetric_quantization_config: what each combination gives, and what is an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchao.quantization.pt2e import HistogramObserver
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationConfig

import torchvk.errors
from tests.pt2e import spec
from torchvk.quantizer.vulkan_quantizer import VulkanQuantizer, get_symmetric_quantization_config


@pytest.mark.parametrize(("bits", "low", "high"), [(8, -128, 127), (4, -8, 7)])
def test_weight_only_config(bits: int, low: int, high: int) -> None:
    config = get_symmetric_quantization_config(weight_bits=bits)
    assert config.input_activation is config.output_activation is config.bias is None
    weight = config.weight
    assert (weight.quant_min, weight.quant_max, weight.dtype) == (low, high, torch.int8)
    assert weight.qscheme == torch.per_channel_symmetric
    assert not weight.is_dynamic


def test_dynamic_config() -> None:
    activation = get_symmetric_quantization_config(is_dynamic=True).input_activation
    assert (activation.quant_min, activation.quant_max, activation.dtype) == (-128, 127, torch.int8)
    assert activation.qscheme == torch.per_tensor_affine
    assert activation.is_dynamic


def test_ranges_reach_the_config() -> None:
    config = get_symmetric_quantization_config(True, 8, 8, -100, 90, -127, 126)
    assert (config.input_activation.quant_min, config.input_activation.quant_max) == (-100, 90)
    assert (config.weight.quant_min, config.weight.quant_max) == (-127, 126)


def test_config_parameters_are_executorchs() -> None:
    by_name = get_symmetric_quantization_config(
        is_dynamic=False, weight_bits=8, act_bits=8, act_qmin=None, act_qmax=None, weight_qmin=None, weight_qmax=None
    )
    assert by_name == get_symmetric_quantization_config()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"weight_bits": 3}, torchvk.errors.ArgumentError, "weight_bits=3 is not supported: it must be 4 or 8"),
        ({"weight_bits": 8.0}, torchvk.errors.ArgumentTypeError, "weight_bits must be an int, not float"),
        ({"weight_bits": True}, torchvk.errors.ArgumentTypeError, "weight_bits must be an int, not bool"),
        ({"act_bits": 16}, torchvk.errors.ArgumentError, "act_bits=16 is not supported: it must be 8"),
        ({"is_dynamic": 1}, torchvk.errors.ArgumentTypeError, "is_dynamic must be a bool, not int"),
        ({"weight_qmin": -129}, torchvk.errors.ArgumentError, "-128 <= weight_qmin < weight_qmax <= 127"),
        ({"weight_bits": 4, "weight_qmax": 8}, torchvk.errors.ArgumentError, "weight_qmax=8 .* 4-bit"),
        ({"weight_qmin": 0}, torchvk.errors.ArgumentError, "weight_qmin < 0 < weight_qmax"),
        ({"weight_qmax": -1}, torchvk.errors.ArgumentError, "weight_qmin < 0 < weight_qmax"),
        ({"act_qmin": 5, "act_qmax": 5}, torchvk.errors.ArgumentError, "act_qmin < act_qmax"),
        ({"act_qmax": "127"}, torchvk.errors.ArgumentTypeError, "act_qmax must be an int, not str"),
        ({"is_static": True, "is_dynamic": True}, torchvk.errors.ArgumentError, "is_static and is_dynamic contradict"),
        ({"is_per_token": True}, torchvk.errors.ArgumentError, "is_per_token needs is_dynamic=True"),
        ({"is_per_token": True, "is_static": True}, torchvk.errors.ArgumentError, "is_per_token needs is_dyn"),
        (
            {"group_size": 32, "is_per_channel": False},
            torchvk.errors.ArgumentError,
            "contradict each other: groups lie",
        ),
        ({"group_size": 32, "is_static": True}, torchvk.errors.ArgumentError, "group_size and is_static contradict"),
        ({"group_size": 1}, torchvk.errors.ArgumentError, "group_size=1 is not supported: a group has 2"),
        ({"group_size": "32"}, torchvk.errors.ArgumentTypeError, "group_size must be an int, not str"),
        ({"is_static": 1}, torchvk.errors.ArgumentTypeError, "is_static must be a bool, not int"),
        ({"is_qat": None}, torchvk.errors.ArgumentTypeError, "is_qat must be a bool, not NoneType"),
        ({"is_per_channel": 0}, torchvk.errors.ArgumentTypeError, "is_per_channel must be a bool, not int"),
    ],
)
def test_bad_config(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        get_symmetric_quantization_config(**arguments)


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (None, torchvk.errors.ArgumentTypeError, "not NoneType"),
        (QuantizationConfig(None, None, None, None), torchvk.errors.UnsupportedError, "weight must not be None"),
        (
            QuantizationConfig(None, spec(qscheme=torch.per_tensor_affine), spec(), None),
            torchvk.errors.UnsupportedError,
            "a quantized output_activation needs a static input_activation",
        ),
        (
            QuantizationConfig(None, spec(), spec(), None),
            torchvk.errors.UnsupportedError,
            "output_activation with",
        ),
        (QuantizationConfig(None, None, spec(), spec()), torchvk.errors.UnsupportedError, "bias"),
        (
            QuantizationConfig(None, None, spec(dtype=torch.uint8), None),
            torchvk.errors.UnsupportedError,
            "weight with dtype=torch.uint8 is not supported: it must be torch.int8",
        ),
        (
            QuantizationConfig(None, None, spec(qscheme=torch.per_channel_affine), None),
            torchvk.errors.UnsupportedError,
            "torch.per_channel_symmetric or torch.per_tensor_symmetric",
        ),
        (
            QuantizationConfig(spec(), None, spec(), None),
            torchvk.errors.UnsupportedError,
            "input_activation with qscheme=torch.per_channel_symmetric",
        ),
    ],
)
def test_bad_global_config(config: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        VulkanQuantizer().set_global(config)


def test_setters_return_the_quantizer() -> None:
    quantizer = VulkanQuantizer()
    config = get_symmetric_quantization_config()
    assert quantizer.set_module_name("a.b", config) is quantizer
    assert quantizer.set_module_type(nn.Linear, None) is quantizer
    assert quantizer.set_object_type(torch.add, None) is quantizer
    assert quantizer.set_global(get_symmetric_quantization_config()) is quantizer
    assert quantizer.set_filter_function(lambda node: True) is quantizer
    with pytest.raises(torchvk.errors.ArgumentTypeError, match="filter_fn must be callable, not int"):
        quantizer.set_filter_function(1)


def test_no_config_is_an_error() -> None:
    exported = torch.export.export(nn.Linear(4, 4), (torch.randn(1, 4),)).module()
    with pytest.raises(torchvk.errors.ArgumentError, match="set_global"):
        prepare_pt2e(exported, VulkanQuantizer())


def test_static_config() -> None:
    config = get_symmetric_quantization_config(is_static=True, act_qmin=-127)
    activation = config.input_activation
    assert config.output_activation == activation
    assert (activation.dtype, activation.quant_min, activation.quant_max) == (torch.int8, -127, 127)
    assert activation.qscheme == torch.per_tensor_affine
    assert not activation.is_dynamic
    assert config.weight.qscheme == torch.per_channel_symmetric
    assert not config.is_qat


def test_weights_per_tensor() -> None:
    weight = get_symmetric_quantization_config(is_per_channel=False, weight_bits=4).weight
    assert (weight.qscheme, weight.quant_min, weight.quant_max) == (torch.per_tensor_symmetric, -8, 7)


@pytest.mark.parametrize("is_qat", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"weight_bits": 4, "group_size": 32},
        {"is_dynamic": True},
        {"is_dynamic": True, "is_per_token": True, "group_size": 64},
        {"is_static": True},
        {"is_static": True, "is_per_channel": False},
    ],
)
def test_configurations_are_equal_by_value(arguments: dict[str, object], is_qat: bool) -> None:
    config = get_symmetric_quantization_config(is_qat=is_qat, **arguments)
    assert config == get_symmetric_quantization_config(is_qat=is_qat, **arguments)
    assert config != get_symmetric_quantization_config(is_qat=not is_qat, **arguments)
    assert VulkanQuantizer().set_global(config).settings.default is config


def test_static_configs_of_other_quantizers() -> None:
    activation = spec(qscheme=torch.per_tensor_affine, observer_or_fake_quant_ctr=HistogramObserver)
    weight = spec(qscheme=torch.per_tensor_symmetric, quant_min=-127)
    for config in (
        QuantizationConfig(activation, activation, weight, None),
        QuantizationConfig(activation, None, weight, None),
        QuantizationConfig(None, None, weight, None, True),
    ):
        assert VulkanQuantizer().set_global(config).settings.default is config
