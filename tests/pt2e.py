"""Quantize through PT2E as a user does, and look at what came of it."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn
from torchao.quantization.pt2e import PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationSpec

from torchvk.quantizer.vulkan_quantizer import VulkanQuantizer, get_symmetric_quantization_config

QUANTIZE_CHANNEL = "quantized_decomposed.quantize_per_channel.default"
DEQUANTIZE_CHANNEL = "quantized_decomposed.dequantize_per_channel.default"
CHOOSE = "quantized_decomposed.choose_qparams.tensor"
QUANTIZE_TENSOR = "quantized_decomposed.quantize_per_tensor.tensor"
DEQUANTIZE_TENSOR = "quantized_decomposed.dequantize_per_tensor.tensor"
QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"
DEQUANTIZE = "quantized_decomposed.dequantize_per_tensor.default"


def convert(
    model: nn.Module,
    *inputs: torch.Tensor,
    filter_function: Callable[[torch.fx.Node], bool] | None = None,
    calibrate: bool = True,
    **config: object,
) -> torch.fx.GraphModule:
    quantizer = VulkanQuantizer().set_global(get_symmetric_quantization_config(**config))
    if filter_function is not None:
        quantizer.set_filter_function(filter_function)
    prepared = prepare_pt2e(torch.export.export(model.eval(), inputs).module(), quantizer)
    if calibrate:
        prepared(*inputs)
    return convert_pt2e(prepared)


def operators(model: torch.fx.GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in model.graph.nodes if node.op == "call_function")


def spec(**changes: object) -> QuantizationSpec:
    values = {
        "dtype": torch.int8,
        "observer_or_fake_quant_ctr": PerChannelMinMaxObserver,
        "quant_min": -128,
        "quant_max": 127,
        "qscheme": torch.per_channel_symmetric,
    }
    return QuantizationSpec(**(values | changes))


def prepare(model: nn.Module, inputs: tuple[torch.Tensor, ...], quantizer: VulkanQuantizer) -> torch.fx.GraphModule:
    """Exported in evaluation mode, with observers; not calibrated."""
    return prepare_pt2e(torch.export.export(model.eval(), inputs).module(), quantizer)


def quantize(
    model: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    quantizer: VulkanQuantizer | None = None,
    **config: object,
) -> torch.fx.GraphModule:
    """Calibrated with ``inputs`` and converted; with a global configuration of ``config`` if no quantizer is given."""
    if quantizer is None:
        quantizer = VulkanQuantizer().set_global(get_symmetric_quantization_config(**config))
    prepared = prepare(model, inputs, quantizer)
    with torch.no_grad():
        prepared(*inputs)
    return convert_pt2e(prepared)


def find(model: torch.fx.GraphModule, *targets: str) -> list[torch.fx.Node]:
    """The calls of these operators, in order."""
    return [node for node in model.graph.nodes if node.op == "call_function" and str(node.target) in targets]


def arithmetic(model: torch.fx.GraphModule) -> list[str]:
    """The operators that are not of quantization, in order, without overloads."""
    names = [str(node.target) for node in model.graph.nodes if node.op == "call_function"]
    names = [name for name in names if not name.startswith(("quantized_decomposed", "torchao", str(operator.getitem)))]
    return [name.removeprefix("aten.").partition(".")[0] for name in names]


def sqnr(reference: torch.Tensor, y: torch.Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB."""
    signal, given = reference.detach().double(), y.detach().double()
    return float(10 * torch.log10(signal.square().mean() / (signal - given).square().mean()))
