"""Dequantized table and a lookup → ``quantized_embedding``.

torchao and PT2E dequantize the table before ``embedding``; ExecuTorch has operators of its own that do both
(executorch/exir/passes/_quant_patterns_and_replacements.py), with two or four integers a byte.
"""

from __future__ import annotations

from torch.fx import Node

from torchvk.lowering.draft import Draft, Value
from torchvk.lowering.patterns.activations import quantization
from torchvk.lowering.patterns.match import Match, Values
from torchvk.lowering.patterns.weights import (
    DEQUANTIZE,
    QuantizedWeight,
    check_weight,
    described,
    read_weight,
    weight_values,
)
from torchvk.lowering.source import Source, operator_name
from torchvk.lowering.translate.registry import Translator, arguments
from torchvk.lowering.types import dtype_of

LOOKUP = "aten.embedding.default"
# ExecuTorch's operator → bits of an integer in its table
PACKED = {
    f"quantized_decomposed.embedding_{name}.{overload}": bits
    for name, bits in (("byte", 8), ("4bit", 4), ("2bit", 2))
    for overload in ("default", "dtype")
}


def match(node: Node, source: Source) -> Match | None:
    """The lookup that ``node`` is, or None if its table is not quantized."""
    name = operator_name(node)
    if name != LOOKUP and name not in PACKED:
        return None
    given = arguments(node, lambda operand: operand)
    interior: list[Node] = []
    if name in PACKED:
        weight = _packed_table(node, PACKED[name], source)
    elif _operator(given["weight"]) in DEQUANTIZE:
        interior = [given["weight"]]
        weight = read_weight(given["weight"], source)
    else:
        return None
    dtype = check_weight(weight, source)
    ids, result = given["indices"], node.meta["val"].dtype

    def emit(draft: Draft, values: Values) -> Value:
        data, scale, zero_point = weight_values(weight, False, dtype, source)
        operands = (data, scale, values(ids)) if zero_point is None else (data, scale, values(ids), zero_point)
        group = data.shape[1] // max(scale.shape[1], 1)
        t = Translator(draft, node)
        return t.op("quantized_embedding", *operands, group_size=group, dtype=dtype_of(result))

    return Match(node, frozenset(interior), (ids,), emit)


def chain(node: Node) -> frozenset[Node]:
    """What only serves a lookup: the table's dequantization."""
    table = node.args[0] if operator_name(node) == LOOKUP else None
    return frozenset(quantization(table)) if isinstance(table, Node) and _operator(table) in DEQUANTIZE else frozenset()


def _operator(node: Node) -> str:
    return operator_name(node) if node.op == "call_function" else ""


def _packed_table(node: Node, bits: int, source: Source) -> QuantizedWeight:
    given = arguments(node, lambda operand: operand)
    data, scale, zero_point = given["weight"], given["weight_scales"], given["weight_zero_points"]
    columns = data.meta["val"].shape[1] * (8 // bits)
    scales = scale.meta["val"]
    group = columns // (scales.shape[1] if scales.dim() == 2 else 1)
    limits = (int(given["weight_quant_min"]), int(given["weight_quant_max"]))
    return described(node, data, scale, zero_point, (1, group), limits, source, packed=bits)
