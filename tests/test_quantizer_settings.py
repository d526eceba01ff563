"""Which configuration an operator gets: names, types, operators, the global one, and None."""

from __future__ import annotations

import logging
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchvk.errors
from tests.pt2e import DEQUANTIZE_CHANNEL, QUANTIZE, find, prepare, quantize
from torchvk.quantizer.vulkan_quantizer import VulkanQuantizer, get_symmetric_quantization_config

EIGHT, FOUR = get_symmetric_quantization_config(), get_symmetric_quantization_config(weight_bits=4)
STATIC = get_symmetric_quantization_config(is_static=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block1, self.block11 = Block(), Block()
        self.head = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block11(self.block1(x)))


X = torch.randn(2, 4, 5, 6)
WEIGHTS = ["block1.conv", "block1.fc", "block11.conv", "block11.fc", "head.0", "head.2"]


def bits(quantizer: VulkanQuantizer) -> list[int | None]:
    """Of each weight in the order of WEIGHTS: 8 or 4 bits, None for floating point."""
    converted = quantize(Net(), (X,), quantizer)
    found: list[int | None] = []
    for node in find(converted, "aten.conv2d.default", "aten.linear.default"):
        weight = node.args[1]
        is_quantized = str(weight.target) == DEQUANTIZE_CHANNEL
        found.append({127: 8, 7: 4}[weight.args[5]] if is_quantized else None)
    return found


def test_global() -> None:
    assert bits(VulkanQuantizer().set_global(EIGHT)) == [8] * 6


def test_module_name_takes_what_is_inside_and_no_namesake() -> None:
    assert bits(VulkanQuantizer().set_module_name("block1", FOUR)) == [4, 4, None, None, None, None]
    assert bits(VulkanQuantizer().set_global(EIGHT).set_module_name("head.2", FOUR)) == [8, 8, 8, 8, 8, 4]


def test_innermost_name_wins_in_any_order() -> None:
    for names in (("block1", "block1.conv"), ("block1.conv", "block1")):
        quantizer = VulkanQuantizer()
        for name in names:
            quantizer.set_module_name(name, FOUR if name == "block1" else EIGHT)
        assert bits(quantizer) == [8, 4, None, None, None, None]


def test_none_switches_off() -> None:
    quantizer = VulkanQuantizer().set_global(EIGHT).set_module_name("block1", None).set_module_name("block1.fc", FOUR)
    assert bits(quantizer) == [None, 4, 8, 8, 8, 8]
    assert bits(VulkanQuantizer().set_global(EIGHT).set_module_type(nn.Linear, None)) == [8, None, 8, None, None, None]
    assert bits(VulkanQuantizer().set_global(EIGHT).set_object_type(F.conv2d, None)) == [None, 8, None, 8, 8, 8]


def test_innermost_type_wins() -> None:
    quantizer = VulkanQuantizer().set_module_type(nn.Linear, EIGHT).set_module_type(Block, FOUR)
    assert bits(quantizer) == [4, 8, 4, 8, 8, 8]


def test_name_before_type_before_operator_before_global() -> None:
    quantizer = VulkanQuantizer().set_global(EIGHT).set_object_type(torch.ops.aten.linear, FOUR)
    assert bits(quantizer) == [8, 4, 8, 4, 4, 4]
    quantizer.set_module_type(nn.Linear, EIGHT)
    assert bits(quantizer) == [8] * 6
    quantizer.set_module_name("head", FOUR)
    assert bits(quantizer) == [8, 8, 8, 8, 4, 4]


def test_the_filter_must_agree() -> None:
    quantizer = VulkanQuantizer().set_global(EIGHT).set_module_name("head", FOUR)
    quantizer.set_filter_function(lambda node: "conv" not in node.name and node.args[1].target != "head.0.weight")
    assert bits(quantizer) == [None, 8, None, 8, None, 4]


@pytest.mark.parametrize(
    "object_type",
    [torch.ops.aten.linear, torch.ops.aten.linear.default, F.linear, torch.nn.functional.linear],
)
def test_ways_to_name_an_operator(object_type: object) -> None:
    assert bits(VulkanQuantizer().set_object_type(object_type, FOUR)) == [None, 4, None, 4, 4, 4]


@pytest.mark.parametrize(
    ("object_type", "name"),
    [
        (torch.add, "add"),
        (operator.add, "add"),
        (F.relu, "relu"),
        (torch.ops.aten.relu_, "relu"),
        (F.hardswish, "hardswish"),
        (F.gelu, "gelu"),
        (torch.cat, "cat"),
        (F.embedding, "embedding"),
        (F.adaptive_avg_pool2d, "adaptive_avg_pool2d"),
        (F.layer_norm, "layer_norm"),
        (torch.ops.aten.max_pool2d, "max_pool2d"),
    ],
)
def test_names_of_operators(object_type: object, name: str) -> None:
    assert list(VulkanQuantizer().set_object_type(object_type, None).settings.objects) == [name]


def test_static_module_in_a_float_model() -> None:
    """The ReLU behind the linear belongs to it, although the name is the linear's alone."""
    converted = quantize(Net(), (X,), VulkanQuantizer().set_module_name("head.0", STATIC))
    quantized = [str(node.args[0].target) for node in find(converted, QUANTIZE)]
    assert quantized == ["aten.linear.default", "aten.relu.default"], "input, which block11.fc gives, and output"
    separate = VulkanQuantizer().set_module_name("head.0", STATIC).set_module_type(nn.ReLU, None)
    quantized = [str(node.args[0].target) for node in find(quantize(Net(), (X,), separate), QUANTIZE)]
    assert quantized == ["aten.linear.default", "aten.linear.default"]


def test_static_and_dynamic_in_one_model() -> None:
    dynamic = get_symmetric_quantization_config(is_dynamic=True, is_per_token=True, weight_bits=4, group_size=3)
    quantizer = VulkanQuantizer().set_module_type(Block, STATIC).set_module_name("head", dynamic)
    converted = quantize(Net(), (X,), quantizer)
    assert len(find(converted, QUANTIZE)) == 5, "the input and four outputs"
    assert len(find(converted, "torchao.choose_qparams_affine.default", "torchao.choose_qparams_affine")) == 2
    exported = torch.export.export(converted, (X,)).module()
    assert torch.equal(exported(X), converted(X))


def test_embeddings_are_quantized_on_request_per_row() -> None:
    model, ids = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8)), torch.tensor([[1, 9, 4]])
    assert len(find(quantize(model, (ids,), VulkanQuantizer().set_global(EIGHT)), DEQUANTIZE_CHANNEL)) == 1
    grouped = get_symmetric_quantization_config(weight_bits=4, group_size=4)
    per_tensor = get_symmetric_quantization_config(is_per_channel=False)
    for config, high in ((EIGHT, 127), (FOUR, 7), (grouped, 7), (per_tensor, 127)):
        for quantizer in (
            VulkanQuantizer().set_module_type(nn.Embedding, config),
            VulkanQuantizer().set_object_type(F.embedding, config),
            VulkanQuantizer().set_module_name("0", config),
        ):
            converted = quantize(model, (ids,), quantizer)
            (table,) = find(converted, DEQUANTIZE_CHANNEL)
            (embedding,) = table.users
            assert str(embedding.target) == "aten.embedding.default"
            assert table.args[3:6] == (0, -high - 1, high)
            weight = model[0].weight
            scale = weight.abs().amax(1, keepdim=True) / (high + 0.5)
            expected = torch.clamp(torch.round(weight * (1 / scale)), -high - 1, high) * scale
            torch.testing.assert_close(converted(ids), model[1](expected[ids]), atol=1e-5, rtol=1e-5)


def test_a_setting_that_fits_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    quantizer = VulkanQuantizer().set_global(EIGHT).set_module_name("head.7", None)
    quantizer.set_module_type(nn.LSTM, FOUR).set_object_type(torch.ops.aten.gelu, None)
    with caplog.at_level(logging.WARNING, logger="torchvk"):
        prepare(Net(), (X,), quantizer)
    for words in ("set_module_name('head.7')", "set_module_type(torch.nn.modules.rnn.LSTM)", "set_object_type(gelu)"):
        assert f"{words} applies to no operator" in caplog.text


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q: q.set_module_name("", EIGHT), "module_name must be the path of a module"),
        (lambda q: q.set_module_name(nn.Linear, EIGHT), "module_name must be the path of a module"),
        (lambda q: q.set_module_type("Linear", EIGHT), "module_type must be a subclass of torch.nn.Module"),
        (lambda q: q.set_module_type(nn.Linear(2, 2), EIGHT), "module_type must be a subclass of torch.nn.Module"),
        (lambda q: q.set_object_type(nn.Linear, EIGHT), "use set_module_type"),
        (lambda q: q.set_object_type("linear", EIGHT), "object_type must be an ATen operator"),
        (lambda q: q.set_object_type(torch.ops.torchao.quantize_affine, EIGHT), "object_type must be an ATen operator"),
        (lambda q: q.set_object_type(len, EIGHT), "object_type must be an ATen operator"),
        (lambda q: q.set_module_name("a", 8), "must be a torchao.*QuantizationConfig"),
        (lambda q: q.set_module_type(nn.Linear, "8w"), "must be a torchao.*QuantizationConfig"),
        (lambda q: q.set_object_type(F.linear, True), "must be a torchao.*QuantizationConfig"),
    ],
)
def test_wrong_arguments(call: object, words: str) -> None:
    with pytest.raises(torchvk.errors.ArgumentTypeError, match=words):
        call(VulkanQuantizer())  # type: ignore[operator]
