"""Run one operator on the Vulkan device, as the tests of kernels do."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from spirv import contract_errors

from torchvk import ops
from torchvk.graph import DType, Graph, TensorType
from torchvk.graph.build import GraphBuilder
from torchvk.runtime import Session, validation_messages
from torchvk.runtime.device import max_tier as tier_cap
from torchvk.runtime.device import open_device
from torchvk.runtime.hazards import hazards
from torchvk.runtime.plan import make_plan

Array = np.ndarray[Any, Any]


def one_node_graph(
    name: str,
    attributes: Any,
    inputs: Sequence[Array | None],
    *,
    constants: Collection[int] = (),
    int4: Collection[int] = (),
    int2: Collection[int] = (),
) -> tuple[Graph, list[Array]]:
    """A graph of one node and the arrays to call it with.

    Inputs whose slot is in ``constants`` or in Operator.constant_inputs are constants, those in ``int4`` and ``int2``
    stored packed; None stays absent. ``attributes``: the operator's dataclass, a mapping or None.
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
        packed = DType.INT4 if slot in int4 else DType.INT2 if slot in int2 else None
        if slot in constants or packed or slot in operator.constant_inputs:
            slots.append(builder.constant(f"constant{slot}", array, packed))
        else:
            slots.append(builder.input(f"input{slot}", TensorType(DType.of(array.dtype), array.shape)))
            arguments.append(array)
    types = [None if index is None else builder.tensors[index].type for index in slots]
    node = builder.node(name, slots, (), attributes, name=name)
    decoded = operator.decode(builder.nodes.pop())
    node = builder.node(name, slots, operator.infer(decoded, types), decoded, name=name)
    return builder.build(node), arguments


def variant_names(
    name: str,
    attributes: Any,
    inputs: Sequence[Array | None],
    *,
    constants: Collection[int] = (),
    int4: Collection[int] = (),
    int2: Collection[int] = (),
    max_tier: int | None = None,
) -> list[str]:
    """The variants that the operator offers for this case on this device; arguments as for :func:`run_op`.

    Pass each to ``run_op(..., variant=...)``, so that all of them are tested whatever a device would choose.
    """
    graph, _ = one_node_graph(name, attributes, inputs, constants=constants, int4=int4, int2=int2)
    node = graph.nodes[0]
    types = [None if index is None else graph.tensors[index].type for index in node.inputs]
    outputs = [graph.tensors[index].type for index in node.outputs]
    operator = ops.get(name)
    capabilities = open_device().physical.capabilities(tier_cap(max_tier))
    decoded = operator.decode(node)
    variants = operator.variants(decoded, types, outputs, capabilities)
    names = [variant for variant, _ in variants]
    assert len(set(names)) == len(names), f"two variants of one name: {names}"
    if variants:
        assert variants[0][1] == operator.kernels(decoded, types, outputs, capabilities), "the default is not first"
    return names


def _only(graph: Graph, variant: str | None) -> dict[str, str]:
    """``variant`` for every node of the graph."""
    if variant is None:
        return {}
    classes = {}
    for node in graph.nodes:
        types = [None if index is None else graph.tensors[index].type for index in node.inputs]
        classes[ops.shape_class(node.op, ops.get(node.op).decode(node), types)] = variant
    return classes


def check_plan(graph: Graph, max_tier: int | None = None, variant: str | None = None) -> None:
    """Hold every dispatch of the graph's plan against its SPIR-V, and the plan against the hazard checker."""
    capabilities = open_device().physical.capabilities(tier_cap(max_tier))
    for staged in (False, True):
        plan = make_plan(graph, capabilities, stage_inputs=staged, stage_outputs=staged, tuned=_only(graph, variant))
        assert hazards(plan) == []
    for step in plan.steps:
        if step.dispatch is not None:
            assert (errors := contract_errors(step.dispatch, capabilities)) == [], errors


def run_graph(
    graph: Graph, inputs: Sequence[Array], *, max_tier: int | None = None, variant: str | None = None
) -> tuple[Array, ...]:
    """The graph's outputs on the Vulkan device; by the ``variant`` of that name where operators offer it.

    Outputs, scratch and temporaries are filled with 0xFF first; the validation layers must stay silent.
    """
    check_plan(graph, max_tier, variant)
    before = len(validation_messages())
    with Session(graph, poison=True, max_tier=max_tier, tuned=_only(graph, variant)) as session:
        outputs = session.run(inputs)
    said = validation_messages()[before:]
    assert not said, "the validation layers said:\n" + "\n".join(said)
    return tuple(outputs)


def run_op(
    name: str,
    attributes: Any,
    inputs: Sequence[Array | None],
    *,
    constants: Collection[int] = (),
    int4: Collection[int] = (),
    int2: Collection[int] = (),
    max_tier: int | None = None,
    variant: str | None = None,
) -> tuple[Array, ...]:
    """The outputs of one operator, computed on the Vulkan device as :func:`run_graph` does."""
    graph, arguments = one_node_graph(name, attributes, inputs, constants=constants, int4=int4, int2=int2)
    return run_graph(graph, arguments, max_tier=max_tier, variant=variant)


def every_variant(
    name: str, attributes: Any, inputs: Sequence[Array | None], but: str | None = None, **options: Any
) -> Iterator[tuple[Array, ...]]:
    """What :func:`run_op` gives, by the default kernels first and then by each other variant that is offered here; not
    by those with ``but`` in their names (tested elsewhere)."""
    default, *others = variant_names(name, attributes, inputs, **options) or [""]
    for variant in [None, *others]:
        if but is not None and but in (variant or default):
            continue
        if variant is not None:
            print(f"variant {variant}")  # shown if the test fails
        yield run_op(name, attributes, inputs, variant=variant, **options)
