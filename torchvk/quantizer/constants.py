"""Which nodes of an exported graph module hold constants: parameters, buffers, and what is computed from them."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg


def constant_nodes(model: GraphModule) -> set[Node]:
    """The nodes of ``model`` whose value is a tensor that no call changes.

    These are parameters and buffers that nothing writes to, and ATen operators on such tensors alone: a
    transposed weight, or the weight that weight normalization computes. Operators of other libraries do not count;
    a dequantize node is the mark of a weight that is quantized already.
    """
    written = _written_nodes(model)
    constants: set[Node] = set()
    for node in model.graph.nodes:
        if node.op == "get_attr":
            if node not in written and isinstance(_attribute(model, node), torch.Tensor):
                constants.add(node)
        elif _is_pure_aten(node) and node not in written:
            inputs = node.all_input_nodes
            if inputs and all(argument in constants for argument in inputs):
                constants.add(node)
    return constants


def constant_value(model: GraphModule, node: Node) -> Any:
    """The tensor that a node of :func:`constant_nodes` stands for."""
    if node.op == "get_attr":
        return _attribute(model, node)
    arguments = map_arg(node.args, lambda argument: constant_value(model, argument))
    keywords = map_arg(node.kwargs, lambda argument: constant_value(model, argument))
    with torch.no_grad():
        return node.target(*arguments, **keywords)


def _attribute(model: GraphModule, node: Node) -> Any:
    return attrgetter(str(node.target))(model)


def _is_pure_aten(node: Node) -> bool:
    target = node.target
    return (
        node.op == "call_function"
        and isinstance(target, torch._ops.OpOverload)
        and target.namespace == "aten"
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
    )


def _written_nodes(model: GraphModule) -> set[Node]:
    """Nodes that an in-place operator writes to, with all that they were made from: views share memory."""
    written: set[Node] = set()
    for node in model.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        for argument, description in zip(node.args, node.target._schema.arguments, strict=False):
            is_write = description.alias_info is not None and description.alias_info.is_write
            pending = [argument] if is_write and isinstance(argument, Node) else []
            while pending:
                producer = pending.pop()
                if producer not in written:
                    written.add(producer)
                    pending.extend(producer.all_input_nodes)
    return written
