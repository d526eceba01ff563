"""Random graphs on the device, staged and not, against the NumPy references."""

from __future__ import annotations

from typing import Any

import numpy as np
from harness import check_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from torchvk import ops
from torchvk.graph import DType, Graph, TensorType
from torchvk.graph.build import GraphBuilder
from torchvk.runtime import Session, validation_messages

SHAPES = ((4, 6), (6, 4), (2, 12), (24,), (2, 3, 4))


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    builder = GraphBuilder()

    def op(name: str, inputs: list[int], attributes: dict[str, Any]) -> int:
        types = [builder.tensors[index].type for index in inputs]
        builder.node(name, inputs, (), attributes)
        decoded = ops.get(name).decode(builder.nodes.pop())
        return builder.node(name, inputs, ops.get(name).infer(decoded, types), decoded, name=name)[0]

    shapes = st.sampled_from(SHAPES)
    known = [builder.input(f"x{i}", TensorType(DType.FLOAT32, draw(shapes))) for i in range(draw(st.integers(1, 3)))]
    for i in range(draw(st.integers(0, 2))):
        shape = draw(shapes)
        known.append(builder.constant(f"c{i}", np.arange(24, dtype=np.float32).reshape(shape) - i))
    for _ in range(draw(st.integers(1, 12))):
        first = draw(st.sampled_from(known))
        shape = builder.tensors[first].shape
        match draw(st.sampled_from(["binary", "binary", "neg", "reshape", "permute"])):
            case "binary":
                name = draw(st.sampled_from(["add", "mul"]))
                second = draw(st.sampled_from([index for index in known if builder.tensors[index].shape == shape]))
                known.append(op(name, [first, second], {}))
            case "neg":
                known.append(op("neg", [first], {}))
            case "reshape":
                known.append(op("reshape", [first], {"shape": list(draw(shapes))}))
            case "permute":
                known.append(op("permute", [first], {"dims": list(draw(st.permutations(range(len(shape)))))}))
    return builder.build(draw(st.lists(st.sampled_from(known), min_size=1, max_size=4)))


@given(graphs())
@settings(max_examples=60, deadline=None)
def test_random_graphs(graph: Graph) -> None:
    random = np.random.default_rng(0)
    inputs = [random.standard_normal(graph.tensors[index].shape).astype(np.float32) for index in graph.inputs]
    with Session(graph, "reference") as session, np.errstate(all="ignore"):
        expected = session.run(inputs)
    check_plan(graph)
    before = len(validation_messages())
    for staged in (False, True):
        with Session(graph, poison=True, staged=staged) as session:
            for output, wanted in zip(session.run(inputs), expected, strict=True):
                np.testing.assert_array_equal(output, wanted)
    assert validation_messages()[before:] == []
