"""Annotation of pooling, mean and nearest upsampling."""

from __future__ import annotations

import torch
from torch.fx import Node
from torchao.quantization.pt2e.quantizer import SharedQuantizationSpec

from torchvk.quantizer.annotation import Scope, annotate, is_float

_aten = torch.ops.aten

# Every value of the output is one of the input's.
_CHOOSES = (
    _aten.max_pool1d.default,
    _aten.max_pool2d.default,
    _aten.upsample_nearest1d.default,
    _aten.upsample_nearest1d.vec,
    _aten.upsample_nearest2d.default,
    _aten.upsample_nearest2d.vec,
)
_AVERAGES = (
    _aten.avg_pool1d.default,
    _aten.avg_pool2d.default,
    _aten.adaptive_avg_pool1d.default,
    _aten.adaptive_avg_pool2d.default,
    _aten.mean.default,
    _aten.mean.dim,
)


def annotate_pooling(scope: Scope) -> list[Node]:
    """Annotate pooling, mean and nearest upsampling with a static configuration; returns these nodes.

    Where values are only chosen, input and output share their parameters. Averages have a smaller range than what they
    are taken of, so their output has an observer of its own.
    """
    found = []
    for node in scope.model.graph.nodes:
        if node.op != "call_function" or node.target not in (*_CHOOSES, *_AVERAGES) or not is_float(node):
            continue
        x = node.args[0]
        if not is_float(x) or node in scope.constants:
            continue
        config = scope.static_config(node)
        if config is None:
            continue
        output = config.output_activation
        if output is not None and node.target in _CHOOSES:
            output = SharedQuantizationSpec((x, node))
        annotate(node, {x: config.input_activation}, output)
        found.append(node)
    return found
