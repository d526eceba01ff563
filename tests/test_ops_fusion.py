"""Fused dispatches give bit for bit what the dispatches that they replace give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from harness import run_graph
from variants import DEVICES

from torchvk.graph import DType, Graph, TensorType
from torchvk.graph.build import GraphBuilder
from torchvk.runtime import order
from torchvk.runtime.device import open_device
from torchvk.runtime.hazards import hazards
from torchvk.runtime.plan import make_plan

GPU = DEVICES["gpu_1"]


def layer_norm_and_linears(rng: np.random.Generator, rows: int, width: int, dtype: str, **scheme: Any) -> Graph:
    """y = layer_norm(x), and two quantized linear layers of y; all three are outputs."""
    builder = GraphBuilder()
    type = TensorType(DType(dtype), (rows, width))
    x = builder.input("x", type)
    weight = builder.constant("weight", rng.standard_normal(width).astype(dtype))
    bias = builder.constant("bias", rng.standard_normal(width).astype(dtype))
    (y,) = builder.node("layer_norm", [x, weight, bias], [type], {"dims": 1, "eps": 1e-5}, name="norm")
    (view,) = builder.node("reshape", [y], [TensorType(type.dtype, (1, rows, width))], {"shape": [1, rows, width]})
    outputs = [y]
    for columns in (8, 12):
        w = builder.constant("w", rng.integers(-128, 128, (columns, width), np.int8))
        scale = builder.constant("scale", rng.uniform(0.01, 0.02, (columns, 1)).astype(np.float32))
        attributes = {"group_size": width, "activation": "dynamic_per_token", **scheme}
        result = TensorType(type.dtype, (1, rows, columns))
        outputs += builder.node("quantized_linear", [view, w, scale], [result], attributes)
    return builder.build(outputs)


def kernels(graph: Graph, capabilities: Any) -> list[str]:
    plan = make_plan(graph, capabilities)
    assert hazards(plan) == []
    return [step.dispatch.kernel for step in plan.steps if step.dispatch is not None]


@pytest.mark.usefixtures("device_kind")
@pytest.mark.parametrize("device_kind", ["gpu"], indirect=True)  # elsewhere nothing is fused
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("width", [64, 96, 384])
@pytest.mark.parametrize(
    "scheme", [{}, {"symmetric": True, "quant_min": -127}, {"qparams": "pt2e"}, {"qparams": "pt2e", "symmetric": True}]
)
def test_the_same_bits(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, dtype: str, width: int, scheme: dict[str, Any]
) -> None:
    rows = int(rng.choice([7, 40]))  # a single row is quantized where it is multiplied
    graph = layer_norm_and_linears(rng, rows, width, dtype, **scheme)
    x = (3 * rng.standard_normal((rows, width)) + 1).astype(dtype)
    x[rows // 2, width // 3] = rng.choice([np.inf, 100])
    capabilities = open_device().physical.capabilities()
    assert kernels(graph, capabilities)[0].endswith("_quantize")
    fused = run_graph(graph, [x])
    monkeypatch.setattr(order, "fuse", lambda producer, consumer: None)
    for a, b in zip(fused, run_graph(graph, [x]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_plans_are_shorter(rng: np.random.Generator) -> None:
    graph = layer_norm_and_linears(rng, 64, 384, "float32")
    assert kernels(graph, GPU)[0] == "layer_norm_rows_f32_quantize"
    assert not any(name.startswith("quantize_") for name in kernels(graph, GPU))
    assert "layer_norm_rows_f32_quantize" not in kernels(graph, replace(GPU, tier=0))


def test_padded_rows_stay_apart(rng: np.random.Generator) -> None:
    """40 columns are padded to 64 integers: the fused kernel has no such rows."""
    names = kernels(layer_norm_and_linears(rng, 64, 40, "float32"), GPU)
    assert names[0] == "layer_norm_rows_f32"
    assert names[1].startswith("quantize_")
