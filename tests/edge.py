"""Lower a module as a user does, and look at what came of it."""

from __future__ import annotations

import collections
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from executorch.exir import EdgeProgramManager, to_edge_transform_and_lower

import torchvk
from tests.pt2e import find
from torchvk.graph import Graph, from_bytes
from torchvk.partitioner.vulkan_partitioner import Refusal, VulkanPartitioner

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Lowered:
    """``graphs`` are the delegates in the order in which they run; ``cpu`` the operators that stay outside."""

    edge: EdgeProgramManager
    graphs: list[Graph]
    cpu: list[str]
    report: list[Refusal]
    claimed: int

    @property
    def graph(self) -> Graph:
        """The one delegate of a module that is delegated whole."""
        assert not self.cpu, f"left on the CPU: {[str(refusal) for refusal in self.report]}"
        (graph,) = self.graphs
        return graph

    def operators(self) -> collections.Counter[str]:
        return collections.Counter(node.op for graph in self.graphs for node in graph.nodes)

    def run(self, *inputs: torch.Tensor, device: str | None = "reference") -> tuple[torch.Tensor, ...]:
        """Through the .pte file and its reader; operators left over run on the CPU."""
        with torchvk.load(self.edge.to_executorch(), device=device) as program:
            outputs = program(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def lower_module(module: torch.nn.Module, inputs: Sequence[Any], **options: Any) -> Lowered:
    """Export with ``inputs`` and lower; ``options`` are the partitioner's."""
    dynamic_shapes = options.pop("dynamic_shapes", None)
    with torch.no_grad():
        program = torch.export.export(module.eval(), tuple(inputs), dynamic_shapes=dynamic_shapes)
    return lower_program(program, **options)


def lower_program(program: torch.export.ExportedProgram, **options: Any) -> Lowered:
    partitioner = VulkanPartitioner(**options)
    return inspect_edge(to_edge_transform_and_lower(program, partitioner=[partitioner]), partitioner)


def inspect_edge(edge: EdgeProgramManager, partitioner: VulkanPartitioner | None = None) -> Lowered:
    graph_module = edge.exported_program().graph_module
    graphs, cpu = [], []
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and hasattr(getattr(graph_module, node.target), "processed_bytes"):
            graphs.append(from_bytes(getattr(graph_module, node.target).processed_bytes))
        elif node.op == "call_function" and node.target is not operator.getitem:
            name = getattr(node.target, "_name", str(node.target))
            if "executorch_call_delegate" not in name:
                cpu.append(name)
    report, claimed = (list(partitioner.report), partitioner.claimed) if partitioner else ([], 0)
    return Lowered(edge, graphs, cpu, report, claimed)


def assert_same(module: torch.nn.Module, inputs: Sequence[Any], tolerance: float = 1e-5, **options: Any) -> Lowered:
    """Lowered whole, and the references give what eager gives, to ``tolerance`` of the largest value."""
    lowered = lower_module(module, inputs, **options)
    assert not lowered.cpu, f"left on the CPU: {[str(refusal) for refusal in lowered.report]}"
    assert len(lowered.graphs) == 1
    with torch.no_grad():
        expected = module(*inputs)
    compare(lowered.run(*inputs), expected, tolerance)
    return lowered


def agree(converted: torch.fx.GraphModule, x: torch.Tensor, steps: float = 1.0) -> Lowered:
    """Lower; outputs differ from the converted module's by rounding, or ``steps`` of the last quantization.

    Whatever stays on the CPU has a reason in words.
    """
    with torch.no_grad():
        expected = converted(x)
        lowered = lower_program(torch.export.export(converted, (x,)))
    (y,) = lowered.run(x)
    quantize = find(converted, "quantized_decomposed.quantize_per_tensor.default")
    step = quantize[-1].args[1] * steps if quantize else 0.0
    assert y.shape == expected.shape
    assert float((y - expected).abs().max()) <= step + 1e-5 * float(expected.abs().max())
    # A value that lies within rounding of the middle between two steps may go to either; few do.
    assert float(((y - expected).abs() > 1e-5 * expected.abs().max()).float().mean()) <= 0.02
    assert all(refusal.reason for refusal in lowered.report)
    assert bool(lowered.report) == bool(lowered.cpu)
    return lowered


def compare(outputs: Sequence[torch.Tensor], expected: Any, tolerance: float = 1e-5) -> None:
    wanted = expected if isinstance(expected, (tuple, list)) else (expected,)
    assert len(outputs) == len(wanted)
    for position, (output, want) in enumerate(zip(outputs, wanted, strict=True)):
        difference = mismatch(output, want, tolerance)
        assert difference is None, f"output {position}: {difference}"


def mismatch(output: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> str | None:
    """None, or in what they differ; ``tolerance`` is relative to the largest finite value, or to 1."""
    if (output.dtype, output.shape) != (want.dtype, want.shape):
        return f"{output.dtype} {list(output.shape)} instead of {want.dtype} {list(want.shape)}"
    a, b = output.double().flatten(), want.double().flatten()
    finite = b[b.isfinite()].abs()
    allowed = tolerance * max(float(finite.max()) if finite.numel() else 1.0, 1.0)
    if torch.allclose(a, b, rtol=0, atol=allowed, equal_nan=True):
        return None
    worst = int((a - b).abs().nan_to_num(torch.inf).argmax())
    return f"{a[worst]} instead of {b[worst]} at {worst}; {allowed:.2g} is allowed"
