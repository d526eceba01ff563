"""Annotation of linears: ``y = x Wᵀ + b`` in every form that ``torch.export`` gives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationConfig, QuantizationSpec
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from torchvk.quantizer.constants import constant_nodes

_aten = torch.ops.aten

# Position of the input and of the weight among the arguments, and the weight's dimension of output channels:
# linear(x, W [N, K], b), mm(x, W [K, N]), matmul(x, W [K, N]), addmm(b, x, W [K, N]).
_FORMS: dict[Any, tuple[int, int, int]] = {
    _aten.linear.default: (0, 1, 0),
    _aten.mm.default: (0, 1, 1),
    _aten.matmul.default: (0, 1, 1),
    _aten.addmm.default: (1, 2, 1),
}
_DTYPES = (torch.float32, torch.float16)


@dataclass(frozen=True)
class LinearOperands:
    """The nodes that make a linear: its input, its weight, and the weight's dimension of output channels."""

    input: Node
    weight: Node
    channel_dim: int


def linear_operands(node: Node) -> LinearOperands | None:
    """The operands of ``node`` if it is a floating-point linear, else None. The weight need not be constant."""
    if node.op != "call_function" or node.target not in _FORMS:
        return None
    input_position, weight_position, channel_dim = _FORMS[node.target]
    input_node, weight = node.args[input_position], node.args[weight_position]
    if not isinstance(input_node, Node) or not isinstance(weight, Node):
        return None
    if any(float(node.kwargs.get(factor, 1)) != 1.0 for factor in ("alpha", "beta")):
        return None  # addmm that scales: beta * b + alpha * x W
    values = [argument.meta.get("val") for argument in (input_node, weight)]
    if not all(isinstance(value, torch.Tensor) and value.dtype in _DTYPES for value in values):
        return None
    if values[1].dim() != 2:  # matmul also takes vectors and batches of matrices
        return None
    return LinearOperands(input_node, weight, channel_dim)


def annotate_linears(
    model: GraphModule, config: QuantizationConfig, filter_function: Callable[[Node], bool] | None = None
) -> list[Node]:
    """Write ``config`` into the metadata of every linear that can have it and return these nodes.

    Left alone are linears whose weight is not constant, those of other dtypes than float32 and float16, those that
    ``filter_function`` returns False for, and those that have an annotation already. One weight used by several
    linears and one input shared by several linears need nothing here: PT2E gives edges that leave the same node
    with equal specifications one observer, so the tensor is quantized once.
    """
    constants = constant_nodes(model)
    annotated = []
    for node in model.graph.nodes:
        operands = linear_operands(node)
        if operands is None or operands.weight not in constants or _is_annotated(node):
            continue
        if filter_function is not None and not filter_function(node):
            continue
        specifications = _specifications(operands, config)
        # PT2E knows an edge by its two ends: linear(w, w) has two edges that it cannot tell apart.
        if any(_uses(node, argument) > 1 for argument in specifications):
            continue
        node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(input_qspec_map=specifications, _annotated=True)
        annotated.append(node)
    return annotated


def _specifications(operands: LinearOperands, config: QuantizationConfig) -> dict[Node, QuantizationSpec]:
    weight = config.weight
    if weight.qscheme == torch.per_channel_symmetric:
        weight = replace(weight, ch_axis=operands.channel_dim)
    if config.input_activation is None:
        return {operands.weight: weight}
    return {operands.input: config.input_activation, operands.weight: weight}


def _is_annotated(node: Node) -> bool:
    annotation = node.meta.get(Q_ANNOTATION_KEY)
    return annotation is not None and annotation._annotated


def _uses(node: Node, argument: Node) -> int:
    return sum(candidate is argument for candidate in node.args)
