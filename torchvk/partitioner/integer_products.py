"""torchao's ``Int8Tensor`` written so that its meaning can be seen: dequantized operands of a matrix product.

``Int8WeightOnlyConfig``, ``Int8DynamicActivationInt8WeightConfig`` and ``Int8StaticActivationInt8WeightConfig`` export
how torchao multiplies on this machine, which depends on its processor
(torchao/quantization/quantize_/workflows/int8/int8_tensor.py, torchao/kernel/intmm.py):

    (x @ w.to(float)) * sw
    ((q + 128).to(uint8) @ w - 128 Σ w) * sx [- zx sx Σ w] * sw

where the integer product is the operator _int_mm, which exir does not allow.

Both are dequantize(q) @ dequantize(w).t(), which the patterns of torchvk.lowering know, and which runs anywhere.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from torchvk.lowering.source import operator_name

VIEWS = ("aten.view.default", "aten._to_copy.default")
INT_MM = "aten._int_mm.default"


@dataclass(frozen=True)
class Product:
    """``x``, perhaps quantized by ``quantize`` (a call of torchao's quantize_affine), times ``weight`` [N, K]."""

    x: Node
    quantize: Node | None
    weight: Node
    scale: Node


def simplify_products(program: ExportedProgram) -> ExportedProgram:
    """The program with these products as products of floats; itself, if it has none. The given one stays as it is."""
    if not any(_may_be_one(node) for node in program.graph.nodes):
        return program
    changed = program.run_decompositions({})  # in functional form, and a copy
    graph = changed.graph_module.graph
    found = [(node, product) for node in graph.nodes if (product := _product(node)) is not None]
    if not found:
        return program
    for node in list(graph.nodes):
        if _name(node) == "aten._assert_tensor_metadata.default":
            graph.erase_node(node)
    for node, product in found:
        _replace(node, product)
    graph.eliminate_dead_code()
    changed.graph_module.recompile()
    return changed


def _may_be_one(node: Node) -> bool:
    if _name(node) == INT_MM:
        return True
    return _name(node) == "aten.mm.default" and _dtype(_base(node.args[1], ("aten.to.dtype", *VIEWS))) == torch.int8


def _product(node: Node) -> Product | None:
    """What ``node``, the product with the weight's scales, gives."""
    if _name(node) != "aten.mul.Tensor":
        return None
    inner, scale = _base(node.args[0], VIEWS[1:]), _base(node.args[1])
    if not isinstance(inner, Node) or not _is_along(node.args[1], -1):
        return None
    if _name(inner) == "aten.mm.default":
        x, cast = inner.args
        weight = _untransposed(_base(cast, VIEWS[1:]))
        return Product(x, None, weight, scale) if _fits(weight, scale) and cast is not weight else None
    correction = None
    if _name(inner) == "aten.sub.Tensor":
        correction, inner = inner.args[1], _base(inner.args[0], VIEWS[1:])
    if _name(inner) != "aten.mul.Tensor":
        return None
    sums, x_scale = _base(inner.args[0], VIEWS[1:]), _base(inner.args[1])
    middle = 0
    if _name(sums) == "aten.sub.Tensor":
        middle, sums = _factor_of_sums(sums.args[1]), sums.args[0]
    if _name(sums) != INT_MM or not _is_along(inner.args[1], 0):
        return None
    weight = _untransposed(sums.args[1])
    x = _base(sums.args[0], VIEWS[1:])
    if _name(x) == "aten.add.Tensor" and x.args[1] == middle != 0:
        x, middle = _base(x.args[0], VIEWS[1:]), 0
    quantize = _base(x)
    if middle != 0:
        return None
    if _name(quantize) != "torchao.quantize_affine.default" or quantize.args[2] is not x_scale:
        return None
    if not _fits(weight, scale) or not _agrees(correction, quantize, weight):
        return None
    return Product(x, quantize, weight, scale)


def _is_along(node: Any, dim: int) -> bool:
    """Whether it is a tensor whose values all lie along one dimension."""
    if _dtype(node) is None:
        return False
    shape = node.meta["val"].shape
    return len(shape) > 0 and shape[dim] == shape.numel()


def _factor_of_sums(node: Any) -> Any:
    """128 if it is 128 Σ w."""
    if _name(node) == "aten.mul.Tensor" and _name(node.args[0]) == "aten.sum.dim_IntList":
        return node.args[1]
    return None


def _agrees(correction: Any, quantize: Node, weight: Any) -> bool:
    """Whether the zero points of x are subtracted, or there are none."""
    scale, zero_point = quantize.args[2:4]
    if correction is not None:
        return set(_leaves(correction)) == {scale, zero_point, weight}
    if _name(zero_point) in ("aten.zeros_like.default", "aten.full_like.default"):
        return _name(zero_point) == "aten.zeros_like.default" or zero_point.args[1] == 0
    choose = scale.args[0] if isinstance(scale, Node) and scale.target is operator.getitem else None
    return isinstance(choose, Node) and choose.args[1:2] == ("SYMMETRIC",)


def _leaves(node: Any) -> Iterator[Any]:
    if _name(node) in (*VIEWS, "aten.mul.Tensor", "aten.sum.dim_IntList"):
        for operand in node.all_input_nodes:
            yield from _leaves(operand)
    else:
        yield node


def _replace(node: Node, product: Product) -> None:
    weight, scale = product.weight, product.scale
    shape = weight.meta["val"].shape
    block = [size // count for size, count in zip(shape, scale.meta["val"].shape, strict=True)]
    dtype, dequantize = node.meta["val"].dtype, torch.ops.torchao.dequantize_affine.default
    with node.graph.inserting_before(node):
        x = product.x
        if product.quantize is not None:
            _, x_block, *parameters = product.quantize.args
            x = _call(node, dequantize, product.quantize, x_block, *parameters, output_dtype=dtype)
            x = _call(node, torch.ops.aten.view.default, x, [-1, shape[1]])
        dequantized = _call(node, dequantize, weight, block, scale, None, torch.int8, -128, 127, output_dtype=dtype)
        transposed = _call(node, torch.ops.aten.permute.default, dequantized, [1, 0])
        node.replace_all_uses_with(_call(node, torch.ops.aten.mm.default, x, transposed))


def _call(like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A call with the value that it gives, from the module of ``like``."""
    made = like.graph.call_function(target, args, kwargs)
    values = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in args]
    with like.meta["val"].fake_mode:
        made.meta = {key: like.meta[key] for key in ("nn_module_stack", "stack_trace", "torch_fn") if key in like.meta}
        made.meta["val"] = target(*values, **kwargs)
    return made


def _fits(weight: Any, scale: Node) -> bool:
    """An int8 matrix and scales for the whole of it or for each row."""
    if _dtype(weight) != torch.int8 or weight.meta["val"].dim() != 2 or _dtype(scale) is None:
        return False
    return tuple(scale.meta["val"].shape) in ((1, 1), (weight.meta["val"].shape[0], 1))


def _untransposed(node: Any) -> Any:
    return node.args[0] if _name(node) == "aten.t.default" else None


def _base(node: Any, names: tuple[str, ...] = VIEWS) -> Any:
    while _name(node) in names:
        node = node.args[0]
    return node


def _name(node: Any) -> str:
    return operator_name(node) if isinstance(node, Node) and node.op == "call_function" else ""


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None
