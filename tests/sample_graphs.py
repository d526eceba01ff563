"""Graphs that several tests of the runtime share."""

from __future__ import annotations

from typing import Any

import numpy as np

from torchvk import ops
from torchvk.graph import DType, Graph, TensorType
from torchvk.graph.build import GraphBuilder

Array = np.ndarray[Any, Any]


class Builder(GraphBuilder):
    """A builder that asks the operators for their output types."""

    def op(self, name: str, *inputs: int, source: str = "", **attributes: Any) -> int:
        self.node(name, inputs, (), attributes)
        decoded = ops.get(name).decode(self.nodes.pop())
        types = ops.get(name).infer(decoded, [self.tensors[index].type for index in inputs])
        return self.node(name, inputs, types, decoded, name=name, source=source)[0]


def arithmetic() -> Graph:
    """(a + b) * c, permuted; float32 [3, 5]."""
    builder = Builder()
    a = builder.input("a", TensorType(DType.FLOAT32, (3, 5)))
    b = builder.input("b", TensorType(DType.FLOAT32, (3, 5)))
    c = builder.constant("c", np.arange(5, dtype=np.float32))
    total = builder.op("add", a, b, source="model.add")
    product = builder.op("mul", total, c, source="model.mul")
    return builder.build([builder.op("permute", product, dims=[1, 0])])


def arithmetic_inputs(seed: int = 0) -> list[Array]:
    random = np.random.default_rng(seed)
    return [random.standard_normal((3, 5)).astype(np.float32) for _ in range(2)]


def arithmetic_result(inputs: list[Array]) -> Array:
    return ((inputs[0] + inputs[1]) * np.arange(5, dtype=np.float32)).T
