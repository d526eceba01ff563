"""torchao's integer weights of 1 to 8 bits, of linear layers and embeddings, end to end: quantize_, export, device."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quant_api import (
    FqnToConfig,
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm import IntxChooseQParamsAlgorithm
from torchao.utils import unwrap_tensor_subclass

from tests.edge import Lowered, compare, lower_module

BITS = {bits: getattr(torch, f"int{bits}") for bits in range(1, 9)}
STORED = {1: "int4", 2: "int4", 3: "int4", 4: "int4", 5: "int8", 6: "int8", 7: "int8", 8: "int8"}
MAPPINGS = (MappingType.SYMMETRIC, MappingType.ASYMMETRIC, MappingType.SYMMETRIC_NO_CLIPPING_ERR)
GRANULARITIES = (PerGroup(16), PerGroup(32), PerAxis(0))
# Sums of K products in another order than torch's, each off by half a unit of 24 bits.
TOLERANCE = 1e-5


class Linears(torch.nn.Module):
    """Layers that share an input, so that each is compared for itself."""

    def __init__(self, layers: dict[str, torch.nn.Module]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleDict(layers)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(layer(x) for layer in self.layers.values())


def quantized(module: torch.nn.Module, configs: dict[str, Any]) -> torch.nn.Module:
    """By one FqnToConfig."""
    quantize_(module, FqnToConfig({f"layers.{name}": config for name, config in configs.items()}), filter_fn=None)
    unwrap_tensor_subclass(module)
    return module


def check(lowered: Lowered, module: torch.nn.Module, *inputs: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    with torch.no_grad():
        expected = module(*inputs)
    for device in ("reference", None):
        compare(lowered.run(*inputs, device=device), expected, tolerance)


def operand_types(lowered: Lowered, op: str, slot: int) -> dict[str, str]:
    """By module, the dtype of an operand; "none" where it is absent."""
    graph = lowered.graph
    nodes = [node for node in graph.nodes if node.op == op]
    slots = {node.source: node.inputs[slot] if len(node.inputs) > slot else None for node in nodes}
    return {name: "none" if i is None else graph.tensors[i].dtype.value for name, i in slots.items()}


def test_linears_of_every_width(rng: np.random.Generator) -> None:
    """Every width with dynamic activations and without; mapping, granularity, bias and how scales are chosen vary."""
    torch.manual_seed(int(rng.integers(2**31)))
    layers: dict[str, torch.nn.Module] = {}
    configs: dict[str, Any] = {}
    for number, (bits, dynamic) in enumerate(itertools.product(BITS, (False, True))):
        # torchao divides by the largest integer for the last mapping, which is 0 for one bit.
        mapping = MAPPINGS[rng.integers(2 if bits == 1 else 3)]
        granularity = GRANULARITIES[rng.integers(3)]
        name = f"{number}_int{bits}_{mapping.name.lower()}"
        layers[name] = torch.nn.Linear(96, 8 + number % 3, bias=number % 2 == 0)
        if dynamic:
            configs[name] = Int8DynamicActivationIntxWeightConfig(
                weight_dtype=BITS[bits], weight_granularity=granularity, weight_mapping_type=mapping
            )
        else:
            scales = IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY
            more = {"intx_choose_qparams_algorithm": scales} if number % 4 == 0 else {}
            configs[name] = IntxWeightOnlyConfig(BITS[bits], granularity, mapping, **more)
    module = quantized(Linears(layers), configs)
    x = torch.randn(int(rng.integers(1, 8)), 96)
    lowered = lower_module(module, (x,))
    assert lowered.operators() == {"quantized_linear": len(layers)}
    widths = {f"layers.{name}": STORED[int(name.split("int")[1][0])] for name in layers}
    assert operand_types(lowered, "quantized_linear", 1) == widths
    # Only these have no room for the differences with zero points.
    zeros = operand_types(lowered, "quantized_linear", 5)
    assert {name for name, dtype in zeros.items() if dtype != "none"} <= {
        name for name in widths if "_asymmetric" in name and name.split("int")[1][0] in "248"
    }
    check(lowered, module, x)
