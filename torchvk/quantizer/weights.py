"""Operators with weights: where the weight stands, and what may be quantized of them."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from torchvk.errors import UnsupportedError
from torchvk.quantizer.constants import constant_nodes
from torchvk.quantizer.conv import is_convolution
from torchvk.quantizer.linear import is_product, linear_operands


def operands_of(node: Node) -> tuple[Node | None, Node] | None:
    """The input (None if it cannot be quantized) and the weight of a linear, convolution or embedding, else None."""
    linear = linear_operands(node)
    if linear is not None:
        return linear.input, linear.weight
    if is_convolution(node):
        return node.args[0], node.args[1]
    if node.op == "call_function" and node.target is torch.ops.aten.embedding.default:
        return None, node.args[0]
    return None


def is_weight(argument: Node, user: Node) -> bool:
    """Whether ``argument`` is the weight of ``user``."""
    operands = operands_of(user)
    return operands is not None and operands[1] is argument


def validate_weights(model: GraphModule) -> None:
    """Raise ``UnsupportedError``, which names the node, for an annotation that quantizes a weight that is not
    constant, or a bias."""
    constants = constant_nodes(model)
    for node in model.graph.nodes:
        operands, annotation = operands_of(node), node.meta.get(Q_ANNOTATION_KEY)
        if operands is None or annotation is None:
            continue
        x, weight = operands
        if is_product(node) and weight not in constants:
            continue  # of two activations
        for argument, spec in annotation.input_qspec_map.items():
            if spec is None:
                continue
            if argument is not x and argument is not weight:
                raise UnsupportedError(f"{node.name}: {argument.name}, neither input nor weight, is quantized")
            if argument is weight and argument not in constants:
                raise UnsupportedError(f"{node.name}: the weight {argument.name} is not a constant")
