"""Annotation of activation functions: with 8 bits in and out, each is a table of 256 values."""

from __future__ import annotations

import torch
from torch.fx import Node

from torchvk.quantizer.annotation import CLAMPS, Scope, annotate, is_float

_aten = torch.ops.aten

_FUNCTIONS = (
    *CLAMPS,
    _aten.hardswish.default,
    _aten.hardsigmoid.default,
    _aten.sigmoid.default,
    _aten.silu.default,
    _aten.gelu.default,
    _aten.tanh.default,
    _aten.leaky_relu.default,
    _aten.elu.default,
)


def annotate_activations(scope: Scope) -> list[Node]:
    """Annotate input and output of activation functions with a static configuration; returns these nodes.

    A clamp that belongs to the operator before it is annotated already. Ranges are observed for all of them, also
    where the function bounds its values: those that occur may fill a small part of the bounds.
    """
    found = []
    for node in scope.model.graph.nodes:
        if node.op != "call_function" or node.target not in _FUNCTIONS or not is_float(node):
            continue
        if len(node.all_input_nodes) != 1 or node in scope.constants:  # clamp with tensors as bounds
            continue
        config = scope.static_config(node)
        if config is None:
            continue
        annotate(node, {node.all_input_nodes[0]: config.input_activation}, config.output_activation)
        found.append(node)
    return found
