"""Integer weights of 1 to 8 bits, of linear layers and embeddings, end to end: torchao (or PT2E), export, device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torchao.quantization.granularity import PerAxis, PerGroup, PerRow, PerTensor
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.quant_api import (
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm import IntxChooseQParamsAlgorithm
from torchao.utils import unwrap_tensor_subclass

from tests.edge import Lowered, compare, lower_module
from torchvk.errors import ArgumentError
from torchvk.quantizer.vulkan_quantizer import VulkanQuantizer, get_symmetric_quantization_config

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
    """With dynamic activations or without; mapping, granularity, bias and how scales are chosen vary."""
    torch.manual_seed(int(rng.integers(2**31)))
    layers: dict[str, torch.nn.Module] = {}
    configs: dict[str, Any] = {}
    for number, bits in enumerate(BITS):
        dynamic = bool(rng.integers(2))
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
            more = {"intx_choose_qparams_algorithm": scales} if rng.integers(3) == 0 else {}
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


def test_embeddings_of_pt2e_and_tied_ones() -> None:
    """Tables of 4 and 8 bits by VulkanQuantizer; one table that is the last layer's weight, too, in float16 as well."""
    torch.manual_seed(0)
    ids = torch.randint(0, 16, (2, 3))
    settings = {name: get_symmetric_quantization_config(weight_bits=bits) for name, bits in (("0", 4), ("1.0", 8))}
    quantizer = VulkanQuantizer()
    for name, config in settings.items():
        quantizer.set_module_name(name, config)
    tables = torch.nn.ModuleList([torch.nn.Embedding(16, 10), torch.nn.Sequential(torch.nn.Embedding(16, 10))])

    class Sum(torch.nn.Sequential):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            total: torch.Tensor = self[0](ids) + self[1](ids)
            return total

    prepared = prepare_pt2e(torch.export.export(Sum(*tables).eval(), (ids,)).module(), quantizer)
    prepared(ids)
    converted: Any = convert_pt2e(prepared)
    converted.eval = lambda: converted
    lowered = lower_module(converted, (ids,))
    assert lowered.operators() == {"quantized_embedding": 2, "add": 1}
    assert sorted(t.type.dtype.value for t in lowered.graph.tensors if t.data) == ["float32", "float32", "int4", "int8"]
    check(lowered, converted, ids)

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("q", torch.randint(-8, 8, (16, 32), dtype=torch.int8))
            self.register_buffer("scale", torch.rand(16, 1) + 0.1)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            w = torch.ops.torchao.dequantize_affine(self.q, [1, 32], self.scale, None, torch.int8, -8, 7)
            return torch.nn.functional.linear(torch.nn.functional.embedding(ids, w), w)

    tied = Tied()
    for options, tolerance in (({}, TOLERANCE), ({"force_fp16": True}, 2**-8)):
        lowered = lower_module(tied, (ids,), compile_options=options)
        assert (lowered.operators()["quantized_embedding"], lowered.operators()["quantized_linear"]) == (1, 1)
        assert sum(t.data.size for t in lowered.graph.tensors if t.data) == 16 * 32 // 2 + 4 * 16  # stored once
        check(lowered, tied, ids, tolerance=tolerance)


def static(granularity: Any, zero_point: int | None) -> Int8StaticActivationInt8WeightConfig:
    asymmetric = zero_point is not None
    return Int8StaticActivationInt8WeightConfig(
        act_quant_scale=torch.full((1, 1), 0.04),
        act_quant_zero_point=torch.full((1, 1), zero_point, dtype=torch.int8) if asymmetric else None,
        granularity=[PerTensor(), granularity],
        act_mapping_type=MappingType.ASYMMETRIC if asymmetric else MappingType.SYMMETRIC,
        set_inductor_config=False,
    )


def test_int8_tensors() -> None:
    """The configurations of torchao whose layers multiply integers themselves, by ``_int_mm``."""
    asymmetric = {"act_mapping_type": MappingType.ASYMMETRIC, "set_inductor_config": False}
    configs: dict[str, Any] = {
        "rows": Int8WeightOnlyConfig(set_inductor_config=False),
        "tensor": Int8WeightOnlyConfig(granularity=PerTensor(), set_inductor_config=False),
        "groups": Int8WeightOnlyConfig(granularity=PerGroup(32), set_inductor_config=False),
        "dynamic": Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
        "dynamic_narrow": Int8DynamicActivationInt8WeightConfig(reduce_range=True, **asymmetric),
        "dynamic_tensor": Int8DynamicActivationInt8WeightConfig(granularity=PerTensor(), set_inductor_config=False),
        "static": static(PerTensor(), None),
        "static_asymmetric": static(PerRow(), 9),
    }
    torch.manual_seed(0)
    layers = {name: torch.nn.Linear(64, 12, bias=name != "dynamic") for name in configs}
    module = Linears(layers)  # type: ignore[arg-type]
    quantize_(module, FqnToConfig({f"layers.{name}": config for name, config in configs.items()}), filter_fn=None)
    x = torch.randn(5, 64)
    with torch.no_grad():
        expected = module(x)  # by torchao's integer products
    unwrap_tensor_subclass(module)
    lowered = lower_module(module, (x,))
    assert not lowered.cpu
    assert lowered.operators()["quantized_linear"] == len(configs)
    for device in ("reference", None):
        compare(lowered.run(x, device=device), expected, TOLERANCE)


def test_int8_tensors_of_float16_models() -> None:
    """Their float32 scales of float16 activations no integer product has: floats times packed weights, on the GPU."""
    torch.manual_seed(0)
    rows = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    whole = Int8DynamicActivationInt8WeightConfig(
        granularity=PerTensor(), act_mapping_type=MappingType.ASYMMETRIC, set_inductor_config=False
    )
    module = Linears({"rows": torch.nn.Linear(64, 12), "whole": torch.nn.Linear(64, 12)}).half()  # type: ignore[arg-type]
    quantize_(module, FqnToConfig({"layers.rows": rows, "layers.whole": whole}), filter_fn=None)
    x = torch.randn(5, 64).half()
    with torch.no_grad():
        expected = module(x)
    unwrap_tensor_subclass(module)
    lowered = lower_module(module, (x,))
    assert not lowered.cpu
    assert list(operand_types(lowered, "quantized_linear", 1).values()) == ["int8"] * 2
    for device in ("reference", None):
        compare(lowered.run(x, device=device), expected, 2**-9)


def test_degenerate_weights_and_activations() -> None:
    """All zeros, constant, and one huge outlier: row by row what eager gives."""
    torch.manual_seed(0)
    layers, configs = {}, {}
    for kind in ("zeros", "constant", "outlier"):
        for config in (
            IntxWeightOnlyConfig(torch.int4, PerGroup(32), MappingType.ASYMMETRIC),
            Int8DynamicActivationIntxWeightConfig(torch.int2, PerAxis(0)),
        ):
            name = f"{kind}_{type(config).__name__}"
            layers[name], configs[name] = torch.nn.Linear(64, 6), config
            with torch.no_grad():
                weight = layers[name].weight
                if kind == "outlier":
                    weight[2, 5] = 1e6
                else:
                    weight.fill_(0 if kind == "zeros" else -0.75)
    module = quantized(Linears(layers), configs)  # type: ignore[arg-type]
    x = torch.stack([torch.randn(64), torch.zeros(64), torch.full((64,), 3.0), torch.randn(64)])
    x[3, 7] = -1e5
    lowered = lower_module(module, (x,))
    assert lowered.operators() == {"quantized_linear": 6}
    with torch.no_grad():
        expected = module(x)
    for device in ("reference", None):
        for output, wanted in zip(lowered.run(x, device=device), expected, strict=True):
            compare(list(output), list(wanted), TOLERANCE)


class Damaged(torch.nn.Module):
    """A linear whose weight [6, 32] of 4 bits in groups of 16 is wrong in one way."""

    def __init__(self, damage: str) -> None:
        super().__init__()
        self.damage = damage
        self.register_buffer("q", torch.randint(-8, 8, (6, 32), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(6, 2) + 0.1)
        self.register_buffer("zero", torch.zeros(6, 2, dtype=torch.int8))
        for name, value in {"integers": ("q", 9), "zero points": ("zero", -9)}.items():
            if damage == name:
                self.get_buffer(value[0])[3, 1] = value[1]
        if damage == "scales":
            self.scale[5] = torch.tensor([torch.nan, 0])  # type: ignore[index, operator]
        if damage == "channels":
            self.scale = torch.rand(5)
        if damage == "groups":
            self.q, self.scale = self.q.view(torch.uint8), torch.rand(6, 3)  # type: ignore[operator]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.damage == "channels":
            w = QD.dequantize_per_channel(self.q, self.scale, None, 0, -8, 7, torch.int8)
        elif self.damage == "groups":
            ids = x[:, 0].to(torch.int64)
            lookup: torch.Tensor = QD.embedding_4bit(self.q, self.scale, None, -8, 7, ids)
            return lookup
        else:
            w = torch.ops.torchao.dequantize_affine(self.q, [1, 16], self.scale, self.zero, torch.int8, -8, 7)
        return torch.nn.functional.linear(x, w)


DAMAGES = {
    "integers": r"integers from -?\d+ to 9, but is declared to be quantized to -8…7",
    "zero points": r"zero points reach from -9 to 0, outside of the declared -8…7",
    "scales": r"2 of its 12 scales are zero or not finite \(nan\)",
    "channels": r"its scale has 5 values, but its shape \[6, 32\] in blocks of \[1, 32\] needs 6",
    "groups": r"blocks of \[1, 21\] do not divide its shape \[6, 64\]; choose a group size",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights(damage: str) -> None:
    """An error that names the module, never a wrong program."""
    model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Sequential(Damaged(damage)))
    with pytest.raises(ArgumentError, match=rf"quantized weight of 1\.0 is damaged: .*{DAMAGES[damage]}"):
        lower_module(model, (torch.rand(3, 32),))
