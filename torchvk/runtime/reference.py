"""The device "reference": a graph by its operators' NumPy references, with no Vulkan at all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from torchvk import ops
from torchvk.graph import Graph
from torchvk.runtime.profile import ProfileRow

Array = np.ndarray[Any, Any]

NAME = "reference"


def run(graph: Graph, inputs: Sequence[Array]) -> tuple[list[Array], list[ProfileRow]]:
    """Outputs, and a row a node. Values are dropped after their last use."""
    last_use = {index: number for number, node in enumerate(graph.nodes) for index in node.inputs}
    values: dict[int, Array] = dict(zip(graph.inputs, inputs, strict=True))

    def value(index: int | None) -> Array | None:
        if index is None or index in values:
            return None if index is None else values[index]
        return graph.constant_array(index)

    rows = []
    begin = time.perf_counter()
    for number, node in enumerate(graph.nodes):
        operator = ops.get(node.op)
        start = time.perf_counter() - begin
        # Overflow and invalid values are results here, as on the device, not occasions for warnings.
        with np.errstate(all="ignore"):
            outputs = operator.reference(operator.decode(node), [value(index) for index in node.inputs])
        end = time.perf_counter() - begin
        values.update(zip(node.outputs, outputs, strict=True))
        for index in node.inputs:
            if index is not None and last_use[index] == number and index not in graph.outputs:
                values.pop(index, None)
        work = sum(graph.tensors[index].type.nbytes for index in (*node.inputs, *node.outputs) if index is not None)
        rows.append(ProfileRow(node.op, node.source, "numpy", 1, end - start, work, 0, start, end))
    # Copies: an output may be a view of an input or a constant, and belongs to the caller.
    return [np.array(value(index)) for index in graph.outputs], rows
