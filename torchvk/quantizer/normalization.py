"""Annotation of softmax and layer norm: floating point inside, int8 outside where it pays."""

from __future__ import annotations

import torch
from torch.fx import Node

from torchvk.quantizer.annotation import Scope, annotate, input_spec, is_float, output_spec
from torchvk.quantizer.movement import is_move

_aten = torch.ops.aten

_NORMALIZATIONS = (_aten.softmax.int, _aten._softmax.default, _aten.layer_norm.default)


def annotate_normalization(node: Node, scope: Scope) -> bool:
    """Annotate ``node`` if it is a softmax or layer norm with a static configuration; whether it was annotated.

    They compute in floating point, so int8 pays only where the neighbour has it: the input gets an observer if what
    it comes from is quantized, the output if an operator that reads it, perhaps through views, quantizes it. Nodes
    before it come first, and all other families.
    """
    if node.op != "call_function" or node.target not in _NORMALIZATIONS or not is_float(node):
        return False
    x = node.args[0]
    if not is_float(x) or not isinstance(x, Node):
        return False
    before, after = output_spec(x) is not None, _is_read_quantized(node)
    config = scope.static_config(node) if before or after else None
    if config is None:
        return False
    inputs = {x: config.input_activation} if before else {}
    annotate(node, inputs, config.output_activation if after else None)
    return True


def _is_read_quantized(node: Node) -> bool:
    return any(
        input_spec(user, node) is not None or (is_move(user) and _is_read_quantized(user)) for user in node.users
    )
