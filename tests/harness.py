"""Run one operator on the Vulkan device, as the tests of kernels do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from torchvk import ops
from torchvk.graph import DType, TensorType
from torchvk.graph.build import GraphBuilder
from torchvk.runtime import Session, validation_messages

Array = np.ndarray[Any, Any]


def one_node_graph(
    name: str,
    attributes: Any,
    inputs: Sequence[Array | None],
    *,
    constants: Collection[int] = (),
    int4: Collection[int] = (),
) -> tuple[Any, list[Array]]:
    """A graph of one node and the arrays to call it with.

    Inputs whose slot is in ``constants`` or in Operator.constant_inputs are constants, those in ``int4`` stored
    packed; None stays absent.
    """
    operator = ops.get(name)
    builder = GraphBuilder()
    slots: list[int | None] = []
    arguments = []
    for slot, value in enumerate(inputs):
        if value is None:
            slots.append(None)
            continue
        array = np.asarray(value)
        if slot in constants or slot in int4 or slot in operator.constant_inputs:
            slots.append(builder.constant(f"constant{slot}", array, DType.INT4 if slot in int4 else None))
        else:
            slots.append(builder.input(f"input{slot}", TensorType(DType.of(array.dtype), array.shape)))
            arguments.append(array)
    types = [None if index is None else builder.tensors[index].type for index in slots]
    if attributes is None:
        attributes = ops.NoAttributes()
    outputs = builder.node(name, slots, operator.infer(attributes, types), attributes, name=name)
    return builder.build(outputs), arguments


def run_op(
    name: str,
    attributes: Any,
    inputs: Sequence[Array | None],
    *,
    constants: Collection[int] = (),
    int4: Collection[int] = (),
    max_tier: int | None = None,
) -> tuple[Array, ...]:
    """The outputs of one operator, computed on the Vulkan device.

    Outputs, scratch and temporaries are filled with 0xFF first; the validation layers must stay silent.
    """
    graph, arguments = one_node_graph(name, attributes, inputs, constants=constants, int4=int4)
    before = len(validation_messages())
    with Session(graph, poison=True, max_tier=max_tier) as session:
        outputs = session.run(arguments)
    said = validation_messages()[before:]
    assert not said, "the validation layers said:\n" + "\n".join(said)
    return tuple(outputs)
