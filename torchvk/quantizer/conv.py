"""Annotation of convolutions, plain and transposed, with the batch norm and the clamp behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from torchvk.quantizer.annotation import Scope, annotate, is_float
from torchvk.quantizer.config import per_channel, per_tensor

_aten = torch.ops.aten

# The weight's dimension of output channels: [out, in / groups, …], transposed [in, out / groups, …].
_CHANNEL_DIM: dict[Any, int] = {
    _aten.conv1d.default: 0,
    _aten.conv1d.padding: 0,
    _aten.conv2d.default: 0,
    _aten.conv2d.padding: 0,
    _aten.conv_transpose1d.default: 1,
    _aten.conv_transpose2d.input: 1,
}


def is_convolution(node: Node) -> bool:
    """Whether ``node`` is a convolution of one or two dimensions, plain or transposed, in floating point."""
    return node.op == "call_function" and node.target in _CHANNEL_DIM and all(map(is_float, node.args[:2]))


def annotate_convolutions(scope: Scope) -> list[Node]:
    """Annotate every convolution with a constant weight that the settings give a configuration; returns these nodes.

    The weight is quantized per output channel or per tensor, never in groups; a transposed convolution with groups
    has a scale for each of the ``out / groups`` channels that its weight tells apart. The bias stays in floating
    point. Activations that the configuration quantizes per token are quantized per tensor. A static output is that of
    the batch norm and clamp behind the convolution, where only they read it.
    """
    found = []
    for node in scope.model.graph.nodes:
        if not is_convolution(node):
            continue
        x, weight = node.args[:2]
        if weight not in scope.constants or x is weight:
            continue
        config = scope.config(node)
        if config is None:
            continue
        activation = None if config.input_activation is None else per_tensor(config.input_activation)
        # The input first, and there even without quantization: prepare_qat_pt2e goes by the order.
        inputs = {x: activation, weight: per_channel(config.weight, _CHANNEL_DIM[node.target])}
        last = scope.last(node, config, batch_norm=True)
        annotate(node, inputs, config.output_activation, last if config.output_activation is not None else None)
        found.append(node)
    return found
