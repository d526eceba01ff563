"""Annotation of what moves values and changes none: cat, views, slices and their like."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node
from torchao.quantization.pt2e.quantizer import SharedQuantizationSpec

from torchvk.quantizer.annotation import Scope, annotate, annotated, is_float, output_spec

_aten = torch.ops.aten

_JOINS = (_aten.cat.default, _aten.concat.default, _aten.stack.default)
# One tensor in, as their first argument, and one out.
_MOVES = (
    _aten.view.default,
    _aten.reshape.default,
    _aten._unsafe_view.default,
    _aten.flatten.using_ints,
    _aten.unflatten.int,
    _aten.permute.default,
    _aten.transpose.int,
    _aten.t.default,
    _aten.mT.default,
    _aten.movedim.int,
    _aten.movedim.intlist,
    _aten.swapaxes.default,
    _aten.numpy_T.default,
    _aten.squeeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.unsqueeze.default,
    _aten.slice.Tensor,
    _aten.select.int,
    _aten.narrow.default,
    _aten.expand.default,
    _aten.repeat.default,
    _aten.flip.default,
    _aten.contiguous.default,
    _aten.clone.default,
    _aten.alias.default,
    _aten.detach.default,
    _aten.pixel_shuffle.default,
    _aten.channel_shuffle.default,
)
# One tensor in, a list out, of which getitem takes the parts.
_SPLITS = (
    _aten.split.Tensor,
    _aten.split.sizes,
    _aten.split_with_sizes.default,
    _aten.chunk.default,
    _aten.unbind.int,
)


def annotate_joins(scope: Scope) -> list[Node]:
    """Annotate cat and stack with a static configuration: all tensors share one observer. Returns these nodes."""
    found = []
    for node in scope.model.graph.nodes:
        if node.op != "call_function" or node.target not in _JOINS or not is_float(node):
            continue
        tensors = list(node.args[0])
        if not all(is_float(tensor) for tensor in tensors) or node in scope.constants:
            continue
        config = scope.static_config(node)
        if config is None:
            continue
        first = (tensors[0], node)
        shared = SharedQuantizationSpec(first)
        inputs = {**dict.fromkeys(tensors, shared), tensors[0]: config.input_activation}
        annotate(node, inputs, shared if config.output_activation is not None else None)
        found.append(node)
    return found


def is_move(node: Node) -> bool:
    """Whether ``node`` gives one float tensor, or a list of them, whose values are its first operand's."""
    if node.op != "call_function" or not node.args or not is_float(node.args[0]):
        return False
    return node.target in _SPLITS or (is_float(node) and (node.target in _MOVES or _is_idle(node)))


def annotate_move(node: Node, scope: Scope) -> bool:
    """Let ``node``, if it only moves values, share the parameters of its input; whether it was annotated.

    That is done where the input is quantized and the settings give ``node`` a static configuration; the filter is not
    asked. Nodes before it come first.
    """
    if annotated(node):
        return False
    if node.target is operator.getitem:
        parts = node.args[0]
        # A list has no observer; its parts share that of the tensor it was made from.
        if not isinstance(parts, Node) or parts.target not in _SPLITS or not annotated(parts) or not is_float(node):
            return False
        annotate(node, {}, SharedQuantizationSpec(parts.args[0]))
        return True
    if not is_move(node):
        return False
    x = node.args[0]
    if not isinstance(x, Node) or output_spec(x) is None or scope.static_config(node, ask=False) is None:
        return False
    shared = SharedQuantizationSpec(x)
    annotate(node, {x: shared}, None if node.target in _SPLITS else shared)
    return True


def _is_idle(node: Node) -> bool:
    """Padding with zeros, which every range includes, and dropout that drops nothing."""
    if node.target is _aten.dropout.default:
        return not node.args[2]
    if node.target is _aten.pad.default:
        mode = node.args[2] if len(node.args) > 2 else "constant"
        return mode == "constant" and not (len(node.args) > 3 and node.args[3])
    return node.target is _aten.constant_pad_nd.default and not (len(node.args) > 2 and node.args[2])
