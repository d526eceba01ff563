"""The networks of tests/models, tiny, through the .pte on the device: delegated whole, and what the module gives.

Pairs that prove most; `python -m benchmarks.accuracy --sections networks` has the whole matrix.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

import torchvk
from tests.edge import Lowered, lower_program
from tests.models.zoo import inputs, make
from tests.schemes import quantized
from torchvk import ops
from torchvk.program.compare import compare

BATCH = 2
# Largest difference to the eager (quantized) module, relative to its largest output. float32: a hundred layers of
# rounding. float16: beside the float32 module; the rounding of 11 bits, in some fifty layers that amplify it. static:
# steps of the output, see below.
TOLERANCE = {"fp32": 1e-5, "fp16": 2.5e-2, "8w": 2e-5, "4w-channel": 2e-5, "dynamic": 2e-2}
PAIRS = [
    ("mobilenet_v2", "static"),
    ("mobilenet_v3_small", "fp32"),
    ("resnet18", "dynamic"),
    ("unet", "static"),
    ("efficientnet_b0", "8w"),
    ("vit", "fp16"),
]


@functools.cache
def lower(name: str, scheme: str) -> tuple[Lowered, torch.nn.Module, tuple[torch.Tensor]]:
    images = inputs(name, batch=BATCH)
    module = quantized(make(name), scheme, images, [images])
    options: dict[str, Any] = {"compile_options": {"force_fp16": True}} if scheme == "fp16" else {}
    with torch.no_grad():
        return lower_program(torch.export.export(module, images), **options), module, images


@pytest.mark.parametrize(("name", "scheme"), PAIRS)
def test_delegated_whole_and_same_as_eager(name: str, scheme: str) -> None:
    lowered, module, images = lower(name, scheme)
    assert len(lowered.graphs) == 1
    assert not lowered.cpu, [str(refusal) for refusal in lowered.report]
    if name == "resnet18":
        assert not {"add", "relu"} & lowered.operators().keys(), "residuals and what follows belong to the layers"
    with torchvk.load(lowered.edge.to_executorch()) as program, torch.no_grad():
        output, expected = program(*images), module(*images)
    difference = (output - expected).abs()
    if scheme != "static":
        assert difference.max() <= TOLERANCE[scheme] * expected.abs().max()
        return
    # int8 all the way: as a rule nothing differs at all. A value next to the middle between two steps may fall to the
    # other side, and what reads it moves by a step or so. (The test below feeds each layer by itself.)
    steps = expected.unique().diff()
    assert float((difference > 0).float().mean()) <= 0.01
    assert difference.max() <= 2 * steps.min()
    _assert_int8_between(lowered, name)


def test_every_layer_is_the_converted_modules_but_for_ties() -> None:
    """Each fed with the converted module's own integers, so that no tie spreads: one in ten thousand, by one step."""
    lowered, module, images = lower("unet", "static")
    integers = iter(_quantized_values(module, images))
    graph, values = lowered.graph, dict(zip(lowered.graph.inputs, [x.numpy() for x in images], strict=True))
    total = different = 0
    for node in graph.nodes:
        operands = [values[i] if i in values else graph.constant_array(i) for i in node.inputs if i is not None]
        (values[node.outputs[0]],) = ops.get(node.op).reference(ops.get(node.op).decode(node), operands)
        got = values[node.outputs[0]]
        if got.dtype != np.int8 or node.op == "reshape":
            continue
        want = next(integers)
        want = want if node.op == "quantize" else np.moveaxis(want, 1, -1)
        steps = np.abs(got.astype(np.int32) - want)
        assert steps.max() <= 1, node.source
        total, different = total + steps.size, different + np.count_nonzero(steps)
        values[node.outputs[0]] = want
    assert next(integers, None) is None

    assert total > 40_000
    assert different <= 1e-4 * total


def _quantized_values(module: torch.nn.Module, images: tuple[torch.Tensor]) -> list[np.ndarray[Any, Any]]:
    """What the module's quantize nodes give, in their order."""
    found = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if str(n.target) == "quantized_decomposed.quantize_per_tensor.default":
                found.append(value.numpy())
            return value

    assert isinstance(module, torch.fx.GraphModule)
    with torch.no_grad():
        Watch(module).run(*images)
    return found


def _assert_int8_between(lowered: Lowered, name: str) -> None:
    """One quantize and at most one dequantize are left, at the edges; nothing between layers is larger than a byte."""
    operators = lowered.operators()
    assert operators["quantize"] == 1, (name, operators)
    assert operators["dequantize"] <= 1, (name, operators)
    assert "quantized_arithmetic" not in operators, "residuals are added by the layers"
    graph = lowered.graph
    edges = {graph.tensors[index].type.numel for index in (*graph.inputs, *graph.outputs)}
    inner = [graph.tensors[index].type for node in graph.nodes for index in node.outputs]
    assert {type.numel for type in inner if type.dtype.is_float} <= edges


def test_compare_finds_the_layers_of_a_static_network() -> None:
    """Convolutions, int8 and float, by their modules; the noise of each as large as int8's steps make it."""
    network = "resnet18"
    images = inputs(network, batch=BATCH)
    files = [lower(network, scheme)[0].edge.to_executorch().buffer for scheme in ("fp32", "static")]
    result = compare(*files, [tensor.numpy() for tensor in images])
    rows = {row.path: row for row in result.layers}
    convolutions = {path for path, module in make(network).named_modules() if isinstance(module, torch.nn.Conv2d)}
    assert convolutions <= rows.keys()
    assert all(np.isfinite(row.sqnr) and row.sqnr > 5 for row in rows.values())
    assert rows["stem.0"].sqnr > 25
