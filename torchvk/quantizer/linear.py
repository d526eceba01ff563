"""Annotation of linears, ``y = x Wᵀ + b`` in every form of ``torch.export``, and of products of activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec

from torchvk.errors import ArgumentError
from torchvk.quantizer.annotation import Scope, annotate, is_float
from torchvk.quantizer.config import along, group_size_of, is_per_token
from torchvk.quantizer.settings import module_path

_aten = torch.ops.aten

# Position of the input and of the weight among the arguments, and the weight's dimension of output channels:
# linear(x, W [N, K], b), mm(x, W [K, N]), matmul(x, W [K, N]), addmm(b, x, W [K, N]).
_FORMS: dict[Any, tuple[int, int, int]] = {
    _aten.linear.default: (0, 1, 0),
    _aten.mm.default: (0, 1, 1),
    _aten.matmul.default: (0, 1, 1),
    _aten.addmm.default: (1, 2, 1),
}
_PRODUCTS = (_aten.matmul.default, _aten.bmm.default, _aten.mm.default)


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
    if not is_float(input_node) or not is_float(weight):
        return None
    if weight.meta["val"].dim() != 2:  # matmul also takes vectors and batches of matrices
        return None
    return LinearOperands(input_node, weight, channel_dim)


def annotate_linears(scope: Scope) -> list[Node]:
    """Annotate every linear that the settings give a configuration, and return these nodes.

    Left alone are linears whose weight is not constant, those of other dtypes than float32 and float16, and those
    that have an annotation already. One weight used by several linears and one input shared by several linears need
    nothing here: PT2E gives edges that leave the same node with equal specifications one observer, so the tensor is
    quantized once.

    Raises ``ArgumentError`` for a linear whose input channels the group size does not divide.
    """
    found = []
    for node in scope.model.graph.nodes:
        operands = linear_operands(node)
        if operands is None or operands.weight not in scope.constants:
            continue
        # PT2E knows an edge by its two ends: linear(w, w) has two edges that it cannot tell apart.
        if _uses(node, operands.weight) > 1:
            continue
        config = scope.config(node)
        if config is None:
            continue
        _check_groups(node, operands, config)
        inputs = {operands.weight: along(config.weight, operands.channel_dim)}
        # A token of one value stays as it is: torchao takes blocks of one element for the whole tensor.
        single = operands.input.meta["val"].shape[-1] == 1
        if config.input_activation is not None and not (single and is_per_token(config.input_activation)):
            if _uses(node, operands.input) > 1:  # also the addend: addmm(x, x, W)
                continue
            inputs[operands.input] = config.input_activation
        output = config.output_activation
        annotate(node, inputs, output, scope.last(node, config) if output is not None else None)
        found.append(node)
    return found


def is_product(node: Node) -> bool:
    """Whether ``node`` multiplies two float matrices or batches of them, of which neither need be constant."""
    return node.op == "call_function" and node.target in _PRODUCTS and is_float(node)


def annotate_products(scope: Scope) -> list[Node]:
    """Annotate products of two activations (matmul, bmm, mm) with a static configuration: both operands and the
    result get observers. Returns these nodes."""
    found = []
    for node in scope.model.graph.nodes:
        if not is_product(node):
            continue
        operands = node.args[:2]
        if not all(is_float(operand) for operand in operands):
            continue
        if all(operand in scope.constants for operand in operands):
            continue
        config = scope.static_config(node)
        if config is None:
            continue
        output: QuantizationSpec | None = config.output_activation
        annotate(node, dict.fromkeys(operands, config.input_activation), output)
        found.append(node)
    return found


def _check_groups(node: Node, operands: LinearOperands, config: QuantizationConfig) -> None:
    size = group_size_of(config.weight)
    channels = operands.weight.meta["val"].shape[1 - operands.channel_dim]
    if size is not None and channels % size:
        raise ArgumentError(
            f"{module_path(node) or node.name}: group_size={size} does not divide its {channels} input channels; give "
            "this module another configuration, or None, with set_module_name"
        )


def _uses(node: Node, argument: Node) -> int:
    return sum(candidate is argument for candidate in node.args)
