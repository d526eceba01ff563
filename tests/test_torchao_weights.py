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
STORED = {1: "int2", 2: "int2", 3: "int4", 4: "int4", 5: "int8", 6: "int8", 7: "int8", 8: "int8"}
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


QD = torch.ops.quantized_decomposed


class PackedTable(torch.nn.Module):
    """ExecuTorch's own operators: a table with several integers a byte."""

    def __init__(self, bits: int, groups: int, zeros: bool, dtype: torch.dtype | None) -> None:
        super().__init__()
        top = 1 << (bits - 1)
        self.range, self.dtype = (-top, top - 1), dtype
        self.operator = {8: QD.embedding_byte, 4: QD.embedding_4bit, 2: QD.embedding_2bit}[bits]
        stored = torch.randint(-128, 128, (6, 4 * bits)).to(torch.int8)
        self.register_buffer("table", stored if bits == 8 else stored.view(torch.uint8))
        self.register_buffer("scales", torch.rand(6, groups) + 0.1)
        self.register_buffer("zeros", torch.randint(-top, top, (6, groups)).float() if zeros else None)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        given = (self.table, self.scales, self.zeros, *self.range, ids)
        result: torch.Tensor = self.operator(*given) if self.dtype is None else self.operator(*given, dtype=self.dtype)
        return result


def test_embeddings_of_every_width(rng: np.random.Generator) -> None:
    """By one FqnToConfig, beside a linear and a float table; and ExecuTorch's own operators."""
    torch.manual_seed(int(rng.integers(2**31)))
    layers: dict[str, torch.nn.Module] = {}
    configs: dict[str, Any] = {}
    for bits in BITS:
        mapping = MAPPINGS[rng.integers(2 if bits == 1 else 3)]
        name = f"{bits}_{mapping.name.lower()}"
        layers[name] = torch.nn.Embedding(7, 32).to(torch.float16 if bits == 4 else torch.float32)
        configs[name] = IntxWeightOnlyConfig(BITS[bits], GRANULARITIES[rng.integers(3)], mapping)
    layers["plain"] = torch.nn.Embedding(5, 3)
    for bits, groups, zeros, dtype in ((8, 1, True, None), (4, 2, True, torch.float16), (2, 1, False, None)):
        layers[f"packed{bits}"] = PackedTable(bits, groups, zeros, dtype)
    layers["head"] = torch.nn.Sequential(torch.nn.Embedding(6, 32), torch.nn.Linear(32, 4))
    configs["head.0"] = IntxWeightOnlyConfig(torch.int4, PerGroup(16), MappingType.ASYMMETRIC)
    configs["head.1"] = Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32))
    module = quantized(Linears(layers), configs)
    ids = torch.randint(0, 5, (2, 3))
    lowered = lower_module(module, (ids,))
    operators = lowered.operators()
    assert (operators["quantized_embedding"], operators["embedding"], operators["quantized_linear"]) == (12, 1, 1)
    assert not operators["dequantize"]
    stored = operand_types(lowered, "quantized_embedding", 0)
    assert {stored[f"layers.{name}"] for name in layers if name.startswith(("1_", "2_"))} == {"int2"}
    assert {stored[f"layers.{name}"] for name in layers if name.startswith(("3_", "4_"))} == {"int4"}
    assert (stored["layers.packed8"], stored["layers.packed4"], stored["layers.packed2"]) == ("int8", "int4", "int2")
    # Lookups are exact, the linear's sums are not.
    check(lowered, module, ids)
