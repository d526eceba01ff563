"""Drafts written by hand, and what passes leave of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from torchvk import ops
from torchvk.graph import DType, Graph, TensorType
from torchvk.lowering.draft import Array, Draft, Value, constant
from torchvk.lowering.passes.clean import remove_dead

F32 = DType.FLOAT32


class Sketch:
    """A draft with inputs of the given shapes, filled by ``op``."""

    def __init__(self, *shapes: tuple[int, ...], dtype: DType = F32) -> None:
        self.draft = Draft(inputs=[Value(TensorType(dtype, shape), f"x{i}") for i, shape in enumerate(shapes)])

    def op(self, name: str, *inputs: Value | None, **attributes: Any) -> Value:
        return self.draft.emit(name, inputs, attributes, name)[0]

    def returns(self, *values: Value) -> Draft:
        self.draft.outputs = list(values)
        return self.draft


def number(value: float) -> Value:
    return constant(np.array(value, np.float32))


def evaluate(graph: Graph, inputs: Sequence[Array]) -> list[Array]:
    values = dict(zip(graph.inputs, inputs, strict=True))
    values |= {i: graph.constant_array(i) for i, tensor in enumerate(graph.tensors) if tensor.data is not None}
    for node in graph.nodes:
        operator = ops.get(node.op)
        operands = [None if i is None else values[i] for i in node.inputs]
        values.update(zip(node.outputs, operator.reference(operator.decode(node), operands), strict=True))
    return [values[i] for i in graph.outputs]


def check(draft: Draft, change: Callable[[Draft], Draft], *expected: str) -> Draft:
    """``change`` leaves these operators and the same results."""
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(v.shape).astype(v.dtype.numpy) for v in draft.inputs]
    before = evaluate(draft.graph(), inputs)
    after = remove_dead(change(draft))
    assert [call.op for call in after.calls] == list(expected)
    for a, b in zip(before, evaluate(after.graph(), inputs), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    return after
