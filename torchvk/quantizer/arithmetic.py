"""Annotation of sums, differences and products, element by element."""

from __future__ import annotations

import torch
from torch.fx import Node

from torchvk.quantizer.annotation import Scope, annotate, is_float

_aten = torch.ops.aten

_BINARY = (_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor)
# With a number in place of the second tensor they are functions of one tensor.
_WITH_NUMBER = (*_BINARY, _aten.add.Scalar, _aten.sub.Scalar, _aten.mul.Scalar, _aten.div.Tensor, _aten.div.Scalar)


def annotate_arithmetic(scope: Scope) -> list[Node]:
    """Annotate add, sub and mul with a static configuration, and div by a number; returns these nodes.

    Both operands get observers (a constant is quantized ahead, per tensor), and so does the result, behind the clamp
    where only that reads it.
    """
    found = []
    for node in scope.model.graph.nodes:
        if node.op != "call_function" or node.target not in _WITH_NUMBER or not is_float(node):
            continue
        operands = [operand for operand in node.args[:2] if isinstance(operand, Node)]
        if len(operands) == 2 and node.target not in _BINARY:
            continue
        if not operands or not all(is_float(operand) for operand in operands):
            continue
        # Nothing to gain: parameters that are computed from others, and numbers kept in tensors.
        if node in scope.constants or any(_is_number(operand, scope) for operand in operands):
            continue
        config = scope.static_config(node)
        if config is None:
            continue
        last = scope.last(node, config)
        annotate(node, dict.fromkeys(operands, config.input_activation), config.output_activation, last)
        found.append(node)
    return found


def _is_number(operand: Node, scope: Scope) -> bool:
    return operand in scope.constants and operand.meta["val"].dim() == 0
