"""The schemes that models are quantized by, under the names that the tests and tables use."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torchao.quantization.granularity import PerGroup
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.quant_api import (
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.utils import unwrap_tensor_subclass

from torchvk.quantizer.vulkan_quantizer import VulkanQuantizer, get_symmetric_quantization_config

# name → what it is
SCHEMES = {
    "fp32": "float32",
    "fp16": "float16 (force_fp16)",
    "static": "int8, activations from calibration (PT2E)",
    "dynamic": "int8, activations per tensor at run time (PT2E)",
    "token": "int8, activations per token at run time (PT2E)",
    "8w": "int8 weights per output channel (PT2E)",
    "4w": "int4 weights: linears in groups of 32 (torchao)",
    "4w-channel": "int4 weights per output channel (PT2E)",
    "8da4w": "int4 weights in groups of 32, int8 activations per token (torchao)",
    "static-4w": "int4 weights, one scale a layer, int8 activations from calibration (PT2E)",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "static": {"is_static": True},
    "dynamic": {"is_dynamic": True},
    "token": {"is_dynamic": True, "is_per_token": True},
    "8w": {},
    "4w-channel": {"weight_bits": 4},
    "static-4w": {"is_static": True, "weight_bits": 4, "is_per_channel": False},
}
Inputs = tuple[torch.Tensor, ...]


def quantized(model: nn.Module, scheme: str, inputs: Inputs, calibration: Sequence[Inputs] = ()) -> nn.Module:
    """A quantized copy of ``model`` that torch.export takes with ``inputs``.

    calibration: what static activations are observed on; ``inputs`` if there is nothing else.
    """
    if scheme in ("fp32", "fp16"):
        return model
    if scheme in CONFIGS:
        quantizer = VulkanQuantizer().set_global(get_symmetric_quantization_config(**CONFIGS[scheme]))
        prepared = prepare_pt2e(torch.export.export(model, inputs).module(), quantizer)
        with torch.no_grad():
            for batch in calibration or [inputs]:
                prepared(*batch)
        converted: nn.Module = convert_pt2e(prepared)
        return converted
    model = copy.deepcopy(model)
    if scheme == "4w":
        quantize_(model, IntxWeightOnlyConfig(torch.int4, PerGroup(32)), _has_groups)
    else:
        assert scheme == "8da4w", scheme
        quantize_(model, Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32)), _has_groups)
    unwrap_tensor_subclass(model)
    return model


def _has_groups(module: nn.Module, path: str) -> bool:
    return isinstance(module, nn.Linear) and module.in_features % 32 == 0


def trained_quantized(
    model: nn.Module, scheme: str, inputs: Inputs, train: Callable[[nn.Module], None]
) -> torch.fx.GraphModule:
    """The same by quantization-aware training: ``train`` gets the prepared model, in training mode."""
    from torchao.quantization.pt2e import move_exported_model_to_eval, move_exported_model_to_train

    config = get_symmetric_quantization_config(is_qat=True, **CONFIGS[scheme])
    exported = torch.export.export(copy.deepcopy(model).train(), inputs).module()
    prepared = prepare_qat_pt2e(exported, VulkanQuantizer().set_global(config))
    move_exported_model_to_train(prepared)
    train(prepared)
    move_exported_model_to_eval(prepared)
    return convert_pt2e(prepared)
